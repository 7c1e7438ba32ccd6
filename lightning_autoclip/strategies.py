"""What each strategy and precision plugin of Lightning does to gradients, and what is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_autoclip.clipping._numbers import Number
from lightning_autoclip.clipping.gradients import Shard

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins import Precision
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
        MisconfigurationException: The engine runs without ZeRO, measures no norm, or clips by its own config.
    """

    def __init__(self, trainer: Trainer, skips: bool) -> None:
        self.engine = engine = cast(Any, trainer.strategy.model)
        self.optimizer: Any = trainer.optimizers[0]
        if not hasattr(self.optimizer, "_get_norm_groups") and not hasattr(self.optimizer, "scaled_global_norm"):
            raise MisconfigurationException(
                "Under DeepSpeed, gradient clipping by percentile needs a ZeRO optimizer, but got"
                f" `{type(self.optimizer).__name__}`. Use `DeepSpeedStrategy(stage=2)` or 3, or stage 1 without"
                " `grad_accum_dtype`."
            )
        if engine.gradient_clipping() > 0 or not getattr(self.optimizer, "compute_grad_norm", True):
            raise MisconfigurationException(
                "DeepSpeed's config sets `gradient_clipping`, which would be overridden, or switches off"
                " `compute_grad_norm`, which clipping needs. Remove both from the config."
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

    def clip_at(self, threshold: Number) -> None:
        """Have the step that follows clip at this threshold. Reads the host, as the engine itself does."""
        value = float(threshold)
        self.optimizer.clip_grad = value if value < math.inf else 0.0

    def release(self) -> None:
        """Forget the last threshold, which the engine would save and a run without the callback would be clipped at."""
        self.optimizer.clip_grad = 0.0


def zero_engine(trainer: Trainer, skips: bool) -> ZeroEngine | None:
    """The engine that steps in the optimizer's place, if the strategy has one."""
    return ZeroEngine(trainer, skips) if _kind(trainer.strategy) == "in an engine" else None


def gradient_shards(trainer: Trainer) -> dict[Tensor, Shard] | None:
    """What this rank holds of each parameter's gradient, where nothing on the gradient tells it.

    ``None`` where every rank holds whole gradients; empty where DTensors tell their shards themselves, and every rank
    must take part in the sum, also for an optimizer that holds none of them.
    """
    kind, strategy = _kind(trainer.strategy), trainer.strategy
    if kind == "flat shards":
        assert strategy.model is not None
        return _fsdp_shards(strategy.model)
    if kind != "dtensors":
        return None
    plain = any(not hasattr(parameter, "placements") for parameter in trainer.lightning_module.parameters())
    if plain and strategy.device_mesh["data_parallel"].size() > 1:  # type: ignore[attr-defined]
        rank_zero_warn(
            "Some parameters are no DTensors beside others that are. Nothing averages their gradients over the"
            " data-parallel ranks, so the ranks drift apart; their mean square counts towards the norm. Shard or"
            " replicate them in `configure_model`."
        )
    return {}


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


# Precision plugins, by what scales the loss. With a scaler, a fused optimizer still holds scaled gradients in the hook.
_SCALES = {
    "MixedPrecision": "by a scaler",
    "FSDPPrecision": "by a scaler",
    "DeepSpeedPrecision": "by the engine",
    "DoublePrecision": "true",
    "HalfPrecision": "true",
    "BitsandbytesPrecision": "true",
    "TransformerEnginePrecision": "true",
}


def check_precision(plugin: Precision) -> None:
    """Warn of a precision plugin of which nobody knows by what it multiplies the loss."""
    names = [base.__name__ for base in type(plugin).__mro__]
    if names[0] != "Precision" and not _SCALES.keys() & names:
        rank_zero_warn(
            f"The precision plugin `{names[0]}` is not known: its gradients are taken to be at their true scale, or at"
            " that of a `GradScaler` in its attribute `scaler`. Extend `MixedPrecision` if it scales the loss."
        )


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """The loss scaler of ``precision="16-mixed"``; ``None`` for every other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)
