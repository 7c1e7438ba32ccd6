"""What each strategy and precision plugin of Lightning does to gradients, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS

from lightning_autoclip.clipped_optimizer import Group
from lightning_autoclip.clipper import clip_together_
from lightning_autoclip.settings import Clipping
from lightning_autoclip.shards import Shard
from lightning_autoclip.skip import NonFiniteGradientError
from lightning_autoclip.step import StepRecord
from lightning_autoclip.table import Place

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
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
    "SingleDeviceXLAStrategy": "whole",  # reduced at the end of the closure, which is before the hook
    "XLAStrategy": "whole",
}


def check_trainer(
    trainer: Trainer, pl_module: LightningModule, name: str, of_kind: type[Callback], clipping: Clipping
) -> None:
    """Refuse, at the start of a fit, what would clip twice or wrongly.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        name: What the callback is called.
        of_kind: The class of all clipping callbacks.
        clipping: Its settings.

    Raises:
        MisconfigurationException: Something else clips too, or the strategy is not supported.
    """
    if (theirs := trainer.gradient_clip_algorithm) is not None:
        raise MisconfigurationException(
            f"`Trainer(gradient_clip_algorithm={str(getattr(theirs, 'value', theirs))!r})` has no effect on `{name}`."
            " Remove it there, and give `gradient_clip_algorithm` to the callback."
        )
    if (trainer.gradient_clip_val or 0) > 0:  # Lightning clips above 0 only
        raise MisconfigurationException(
            f"`Trainer(gradient_clip_val={trainer.gradient_clip_val})` and `{name}` would both clip. Remove"
            " `gradient_clip_val` (`GradientClipping(Constant(...))` clips at a fixed threshold). If you"
            " did not set it, a package did (its model or its tuner): set `trainer.gradient_clip_val = None` before"
            " `fit`, or in `setup` of a callback that stands before this one."
        )
    if sum(isinstance(other, of_kind) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"The Trainer has several clipping callbacks, but a Trainer takes one `{name}`. Keep one; for several"
            " thresholds use `groups`."
        )
    hook = pl_module.configure_gradient_clipping
    if pl_module.automatic_optimization and not hook.__module__.startswith(("lightning.", "pytorch_lightning.")):
        raise MisconfigurationException(
            f"`{type(pl_module).__name__}.configure_gradient_clipping` is overridden and would clip what `{name}` has"
            " clipped. Remove the override or the callback."
        )
    check_strategy(trainer.strategy, clipping.gradient_clip_algorithm)
    check_precision(trainer.precision_plugin)


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
            " measures there may not be the norm of the whole gradient. Use a single device, DDP, FSDP, DeepSpeed,"
            ' `ModelParallelStrategy` or `XLAStrategy`, for example `Trainer(strategy="ddp")`, or remove the callback.'
        )
    if kind == "in an engine" and gradient_clip_algorithm != "norm":
        raise MisconfigurationException(
            f"Under `{name}` the engine holds the gradients and clips them by norm only. Use"
            ' `gradient_clip_algorithm="norm"`, or another strategy.'
        )


class InPlace:
    """Gradients that stand where they are measured and clipped, whole or in parts.

    Args:
        shards: What this rank holds of each parameter's gradient, where nothing on the gradient tells it. ``None``
            where every rank holds whole gradients; empty where DTensors tell their shards themselves, and every rank
            must take part in the sum, also for an optimizer that holds none of them.
    """

    def __init__(self, shards: dict[Tensor, Shard] | None) -> None:
        self._shards = shards

    def is_at_a_step(self) -> bool:
        """Whether gradients are complete: Lightning calls the hook at no other time."""
        return True

    def clip(
        self, groups: Sequence[Group], optimizer: Any, scaler: GradScaler | None, place: Place
    ) -> list[StepRecord | None]:
        """Measure and clip, as :func:`clip_together_`."""
        return clip_together_(groups, optimizer, scaler, self._shards, place)

    def release(self) -> None:
        """Nothing is kept from step to step."""


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

    def clip(
        self, groups: Sequence[Group], optimizer: Any, scaler: GradScaler | None, place: Place
    ) -> list[StepRecord | None]:
        """Compute the threshold, and have the engine clip at it."""
        ((clipper, _),) = groups
        norm = float(self.norm())  # the engine itself reads it at each step
        if clipper.settings.nonfinite == "raise" and self.optimizer.loss_scale <= 1 and not math.isfinite(norm):
            raise NonFiniteGradientError(f"The norm of the gradient is {norm}.", [])
        record = clipper.observe(norm, place)
        self.clip_at(float(record.threshold))
        return [record]

    def norm(self) -> float:
        """L2 norm of the whole gradient at its true scale, equal on every rank; NaN if it is not finite."""
        if hasattr(self.optimizer, "_get_norm_groups"):  # ZeRO 3
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(self.optimizer._get_norm_groups()))
        else:
            norm = float(self.optimizer.scaled_global_norm())
        return norm / float(self.optimizer.loss_scale) if norm >= 0 else math.nan  # -1 stands for what is not finite

    def clip_at(self, threshold: float) -> None:
        """Have the step that follows clip at this threshold; 0 stands for none."""
        self.optimizer.clip_grad = threshold if threshold < math.inf else 0.0

    def release(self) -> None:
        """Forget the last threshold, which the engine would save and a run without the callback would be clipped at."""
        self.optimizer.clip_grad = 0.0


def clipping_under(trainer: Trainer, clipping: Clipping, has_groups: bool) -> InPlace | ZeroEngine:
    """How gradients are clipped under the strategy and with the optimizers of a fit that begins.

    Args:
        trainer: The Trainer.
        clipping: The settings.
        has_groups: Whether groups of parameters are clipped apart.

    Raises:
        MisconfigurationException: They cannot be.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "LBFGS computes its gradients several times per step and searches along them; clipping them breaks the"
            " search. Remove the clipping callback or use another optimizer."
        )
    kind, strategy = _kind(trainer.strategy), trainer.strategy
    if kind == "in an engine":
        if has_groups:
            raise MisconfigurationException(
                "DeepSpeed measures and clips the whole gradient, so it has no `groups`. Remove them, or use FSDP."
            )
        if clipping.skip_above is not None:
            raise MisconfigurationException(
                "DeepSpeed's engine makes its step by itself and skips no outlier, so it has no `skip_above`. Remove"
                " it, or use FSDP."
            )
        return ZeroEngine(trainer, clipping.nonfinite == "skip")
    if kind == "flat shards":
        assert strategy.model is not None
        return InPlace(_fsdp_shards(strategy.model))
    if kind != "dtensors":
        return InPlace(None)
    plain = any(not hasattr(parameter, "placements") for parameter in trainer.lightning_module.parameters())
    if plain and strategy.device_mesh["data_parallel"].size() > 1:  # type: ignore[attr-defined]
        rank_zero_warn(
            "Some parameters are no DTensors beside others that are. Nothing averages their gradients over the"
            " data-parallel ranks, so the ranks drift apart; their mean square counts towards the norm. Shard or"
            " replicate them in `configure_model`."
        )
    return InPlace({})


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
            pairs = zip(flat._params or (), flat._shapes, strict=True)
            shards |= {parameter: Shard(share, shape=shape) for parameter, shape in pairs}
        else:
            whole = flat._unpadded_unsharded_size
            shards[flat] = Shard(share, whole.numel() / count, whole)
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
    "XLAPrecision": "true",
}


def check_precision(plugin: Precision) -> None:
    """Warn of an unknown precision plugin, whose scale of the loss is not known; refuse a loss scaler on XLA."""
    names = [base.__name__ for base in type(plugin).__mro__]
    if "XLAPrecision" in names and getattr(plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"Gradient clipping by percentile does not support the loss scaler of `{names[0]}`, whose steps are left"
            ' out by the host: train on XLA with `precision="bf16-true"` or "32-true".'
        )
    if names[0] != "Precision" and not _SCALES.keys() & names:
        rank_zero_warn(
            f"The precision plugin `{names[0]}` is not known: its gradients are taken to be at their true scale, or at"
            " that of a `GradScaler` in its attribute `scaler`. Extend `MixedPrecision` if it scales the loss."
        )
