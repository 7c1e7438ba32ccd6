"""What each strategy and precision plugin of Lightning does to gradients, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.amp.grad_scaler import GradScaler

# Classes are told apart by name, so that `pytorch_lightning`'s are known beside `lightning.pytorch`'s. The first class
# of a strategy's method resolution order that stands here decides: a subclass counts as what it extends, and
# DeepSpeedStrategy is not taken for the DDPStrategy that it extends.
_GRADIENTS_ARE_WHOLE = {"SingleDeviceStrategy": True, "DDPStrategy": True} | dict.fromkeys(
    ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "SingleDeviceXLAStrategy", "XLAStrategy"), False
)


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which the gradients that a rank holds are not the whole, reduced gradient.

    Raises:
        MisconfigurationException: The strategy shards gradients, steps in an engine of its own, or is not known.
    """
    strategy = type(trainer.strategy)
    known = (_GRADIENTS_ARE_WHOLE[base.__name__] for base in strategy.__mro__ if base.__name__ in _GRADIENTS_ARE_WHOLE)
    if not next(known, False):
        raise MisconfigurationException(
            f"Gradient clipping by percentile does not support the strategy `{strategy.__name__}` yet: the norm that"
            " one process measures there is not the norm of the whole gradient. Use a single device or"
            ' `Trainer(strategy="ddp")`, or remove the callback.'
        )


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """The loss scaler of ``precision="16-mixed"``; ``None`` for every other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)
