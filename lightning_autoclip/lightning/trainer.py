"""What the Trainer of a fit knows: steps, batches, the loss scaler, names of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_autoclip.skip import NonFiniteGradientError
from lightning_autoclip.table import Place

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.amp.grad_scaler import GradScaler


def trains_elsewhere(trainer: Trainer) -> bool:
    """Whether fitting starts processes, of which this one may not be one (ddp_spawn, ddp_fork, ddp_notebook)."""
    return any("MultiProcessing" in base.__name__ for base in type(trainer.strategy.launcher).__mro__)


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """The loss scaler of ``precision="16-mixed"``; ``None`` for every other precision, and where it is disabled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def parameter_names(pl_module: LightningModule) -> list[tuple[int, str]]:
    """The ids of parameters with their names as the user wrote them, without what wrappers put in between."""
    wrappers = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return [
        (id(parameter), ".".join(part for part in name.split(".") if part not in wrappers))
        for name, parameter in pl_module.named_parameters(remove_duplicate=False)
    ]


def batch_index(trainer: Trainer, batch_idx: int) -> int:
    """The index of the batch that is being trained on.

    Args:
        trainer: The Trainer.
        batch_idx: What Lightning has told its hooks. With ``training_step(self, dataloader_iter)``, that is the index
            before the batch was fetched.
    """
    fetcher = trainer.fit_loop._data_fetcher
    is_iterator = type(fetcher).__name__ == "_DataLoaderIterDataFetcher"
    return int(fetcher._batch_idx) if is_iterator else batch_idx  # type: ignore[union-attr]


def log_every(trainer: Trainer) -> int:
    """Every how many steps the Trainer logs; 0 for never."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return every


def step_of(trainer: Trainer) -> int:
    """The loggers' step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_last_step(trainer: Trainer) -> bool:
    """Whether the fit ends with this step, as far as that can be known: it may be stopped later."""
    loop = trainer.fit_loop
    in_last_epoch = trainer.max_epochs not in (None, -1) and loop.epoch_progress.current.ready >= trainer.max_epochs
    return bool(
        trainer.global_step >= trainer.max_steps > -1
        or (in_last_epoch and loop.epoch_loop.batch_progress.is_last_batch)
        or (trainer.should_stop and loop._can_stop_early)
    )


def located(error: NonFiniteGradientError, pl_module: LightningModule, place: Place) -> NonFiniteGradientError:
    """The error with what only the Trainer knows: step, batches and the parameters' names."""
    names = dict(reversed(parameter_names(pl_module)))
    bad = ", ".join(names.get(id(each), "(not in the model)") for each in error.parameters)
    which = f" They are: {bad}." if bad else ""  # an engine does not name them
    return NonFiniteGradientError(
        f'At optimizer {place.where}: {error}{which} Look at that batch, or use `nonfinite="skip"` to skip such steps.',
        error.parameters,
    )
