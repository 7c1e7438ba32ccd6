"""What each strategy and precision plugin of Lightning does to gradients, and what is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_autoclip.gradients import Shard

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy
    from torch.amp.grad_scaler import GradScaler

# What a rank holds in the hook. Classes are told apart by name, so that `pytorch_lightning`'s are known beside
# `lightning.pytorch`'s. The first class of a strategy's method resolution order that stands here decides: a subclass
# counts as what it extends, and DeepSpeedStrategy is not taken for the DDPStrategy that it extends.
_GRADIENTS = {
    "SingleDeviceStrategy": "whole",
    "DDPStrategy": "whole",
    "ModelParallelStrategy": "dtensors",
    "FSDPStrategy": "flat shards",
    "DeepSpeedStrategy": "in an engine",
    "SingleDeviceXLAStrategy": "refused",
    "XLAStrategy": "refused",
}


def _kind(strategy: Strategy) -> str:
    bases = type(strategy).__mro__
    return next((_GRADIENTS[base.__name__] for base in bases if base.__name__ in _GRADIENTS), "refused")


def check_strategy(strategy: Strategy, gradient_clip_algorithm: str) -> None:
    """Refuse a strategy under which the whole gradient cannot be measured, or not clipped by this algorithm.

    Raises:
        MisconfigurationException: The strategy is not known, or it clips by itself and only by norm.
    """
    kind, name = _kind(strategy), type(strategy).__name__
    if kind == "refused":
        raise MisconfigurationException(
            f"Gradient clipping by percentile does not support the strategy `{name}`: the norm that one process"
            " measures there may not be the norm of the whole gradient. Use a single device, DDP, FSDP, DeepSpeed or"
            ' `ModelParallelStrategy`, for example `Trainer(strategy="ddp")`, or remove the callback.'
        )
    if kind == "in an engine" and gradient_clip_algorithm != "norm":
        raise MisconfigurationException(
            f"Under `{name}` the engine holds the gradients and clips them by norm only. Use"
            ' `gradient_clip_algorithm="norm"`, or another strategy.'
        )


class ZeroEngine:
    """DeepSpeed's engine: measures with its own routine, and has it clip at a threshold that is set anew each step.

    Args:
        trainer: A Trainer that fits with `DeepSpeedStrategy`.
        skips: Whether a step with a non-finite gradient is to move no weight. (With bfloat16, ZeRO 1 and 2 would take
            it otherwise; else it is what they do.)

    Raises:
        MisconfigurationException: The engine runs without ZeRO.
    """

    def __init__(self, trainer: Trainer, skips: bool) -> None:
        self.engine: Any = trainer.strategy.model
        self.optimizer: Any = trainer.optimizers[0]
        if not hasattr(self.optimizer, "_get_norm_groups") and not hasattr(self.optimizer, "scaled_global_norm"):
            raise MisconfigurationException(
                "Under DeepSpeed, gradient clipping by percentile needs ZeRO. Use `DeepSpeedStrategy(stage=1)`, 2 or 3."
            )
        if skips and hasattr(self.optimizer, "check_grad_overflow"):
            self.optimizer.check_grad_overflow = True

    def is_at_a_step(self) -> bool:
        """Whether gradients are complete; DeepSpeed has Lightning call the hook after every micro-batch."""
        return bool(self.engine.is_gradient_accumulation_boundary())

    def norm(self) -> Tensor:
        """L2 norm of the whole gradient at its true scale: shape ``()``, equal on every rank, NaN if not finite."""
        if hasattr(self.optimizer, "_get_norm_groups"):  # ZeRO 3
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        else:
            norm = self.optimizer.scaled_global_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32)
        return torch.where(norm >= 0, norm / self.optimizer.loss_scale, torch.nan)  # it says -1 for what is not finite

    def clip_at(self, threshold: Tensor) -> None:
        """Have the step that follows clip at this threshold. Reads the host, as the engine itself does."""
        value = float(threshold)
        self.optimizer.clip_grad = value if value < math.inf else 0.0


def zero_engine(trainer: Trainer, skips: bool) -> ZeroEngine | None:
    """The engine that steps in the optimizer's place, if the strategy has one."""
    return ZeroEngine(trainer, skips) if _kind(trainer.strategy) == "in an engine" else None


def gradient_shards(trainer: Trainer) -> dict[Tensor, Shard] | None:
    """What this rank holds of each parameter's gradient, where nothing on the gradient tells it.

    ``None`` where every rank holds whole gradients, or DTensors, which tell their shards themselves.
    """
    kind, module = _kind(trainer.strategy), trainer.strategy.model
    assert module is not None
    if kind == "dtensors" and any(not hasattr(parameter, "placements") for parameter in module.parameters()):
        rank_zero_warn(
            "Some parameters are no DTensors beside others that are. Nothing averages their gradients over the ranks,"
            " so the ranks drift apart; their mean square counts towards the norm. Shard or replicate them in"
            " `configure_model`."
        )
    return _fsdp_shards(module) if kind == "flat shards" else None


def _fsdp_shards(root: nn.Module) -> dict[Tensor, Shard]:
    """The shards of FSDP1's parameters, which only the handles of its modules know."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    shards: dict[Tensor, Shard] = {}
    for module in FullyShardedDataParallel.fsdp_modules(root):
        if (handle := module._handle) is None:
            continue
        count = handle.process_group.size() if handle.uses_sharded_strategy else 1
        share, flat = count / dist.get_world_size(), handle.flat_param
        if handle._use_orig_params:
            shards |= {parameter: Shard(share) for parameter in flat._params or ()}
        else:
            shards[flat] = Shard(share, flat._unpadded_unsharded_size.numel() / count)
    if any(parameter not in shards for parameter in root.parameters()):
        rank_zero_warn(
            "FSDP leaves some parameters alone (`ignored_modules`). Nothing averages their gradients over the ranks, so"
            " the ranks drift apart; their mean square counts towards the norm."
        )
    return shards


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """The loss scaler of ``precision="16-mixed"``; ``None`` for every other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)
