"""Measure, record, decide, clip: adaptive gradient clipping for any PyTorch loop."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_autoclip._checks import check_choice, check_integer, check_positive
from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, single
from lightning_autoclip.clipping.gradients import Gradients, Shard, at_positions, norm_of
from lightning_autoclip.clipping.optimizers import (
    NonFiniteGradientError,
    forget_found_inf,
    must_not_skip_itself,
    parameters_of,
    pending_scale,
    raise_if_nonfinite,
    skip_if_nonfinite,
    steps_with_found_inf,
    unwrapped,
)
from lightning_autoclip.clipping.policies import Policy, threshold_of
from lightning_autoclip.clipping.record import History

Algorithm = Literal["norm", "value"]
NonFinite = Literal["skip", "raise", "ignore"]
_CPU = torch.device("cpu")


class StepRecord(NamedTuple):
    """What one step's clipping saw and did.

    Every field is a float where the gradients are on the CPU; elsewhere a tensor of shape ``()``, float32, on their
    device, so that the host waits for it only when somebody reads it, as ``float(record.norm)`` does.

    Attributes:
        norm: L2 norm of all gradients viewed as one vector, before clipping.
        clipped_norm: The same after clipping; by value NaN at the steps at which it is not measured.
        statistic: What was recorded and compared: the norm, or by value the root-mean-square entry, norm / √numel.
        threshold: The threshold of this step, in units of ``statistic``; ``inf`` while nothing is clipped.
        nonfinite_total: How many steps so far, this one included, had a NaN or an infinity in their gradient.
        parameter_norms: L2 norm of each parameter's gradient before clipping, in the optimizer's order, 0 where there
            is none, at the scale of the loss: floats, or a tensor of shape ``(n,)``. ``None`` where nobody measured it.
    """

    norm: Number
    clipped_norm: Number
    statistic: Number
    threshold: Number
    nonfinite_total: Number
    parameter_norms: list[float] | Tensor | None = None


class GradientClipper:
    """Clips the gradients of one optimizer at a threshold that follows their own record.

    Call :meth:`clip_` between ``backward()`` and ``optimizer.step()``. Each call measures the gradients, records the
    measurement, lets the policy set the threshold from the record (the current step included) and clips in place.
    On an accelerator nothing is read back to the host, except one scalar per step where ``nonfinite="skip"`` meets
    an optimizer that can neither skip by itself (``fused=True``) nor be skipped by a `GradScaler`, and where
    ``nonfinite="raise"``.

    Args:
        policy: From recorded norms to a threshold, for example ``Percentile(10)``.
        gradient_clip_algorithm: ``"norm"`` scales the whole gradient so that its L2 norm is at most the threshold;
            ``"value"`` records the root-mean-square entry and clamps each entry to ``[-threshold, threshold]``.
        window: How many of the last steps the policy sees, at least 1; ``None`` for all of them.
        warmup_steps: The first so many steps are recorded, not clipped.
        max_threshold: Upper bound of the threshold, above 0; also used during the warm-up.
        nonfinite: What happens to a step whose gradient holds a NaN or an infinity. ``"skip"``: no weight moves (with
            a `GradScaler` it is the scaler that skips, and backs off). ``"raise"``: `NonFiniteGradientError`; with a
            `GradScaler` only once the scale is down to 1, since above it the overflow may be the scale's own.
            ``"ignore"``: nothing, the gradient is applied as it is. Such a step never enters the record; nor does one
            whose gradient is exactly zero.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_autoclip import Constant, GradientClipper
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> clipper = GradientClipper(Constant(1.0))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper.clip_(optimizer).norm
        5.0
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """

    def __init__(
        self,
        policy: Policy,
        *,
        gradient_clip_algorithm: Algorithm = "norm",
        window: int | None = 100,
        warmup_steps: int = 0,
        max_threshold: float | None = None,
        nonfinite: NonFinite = "skip",
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"Expected `policy` to be a `Policy` such as `Percentile(10)`, but got {policy!r}.")
        algorithms, reactions = get_args(Algorithm), get_args(NonFinite)
        self.policy = policy
        self.gradient_clip_algorithm = check_choice("gradient_clip_algorithm", gradient_clip_algorithm, algorithms)
        self.nonfinite = check_choice("nonfinite", nonfinite, reactions)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, "an integer of at least 0", 0)
        self.max_threshold = math.inf if max_threshold is None else check_positive("max_threshold", max_threshold)
        self.history = History(window)
        self.steps = 0
        self.clipped_norm_every = 1  # steps, by value; the callback is content with a few per row
        self._until_measured = 0
        self._nonfinite: Number = 0.0
        self._optimizer: weakref.ref[Any] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments other than the policy, as plain values that a checkpoint can hold."""
        return {
            "gradient_clip_algorithm": self.gradient_clip_algorithm,
            "window": self.history.window,
            "warmup_steps": self.warmup_steps,
            "max_threshold": self.max_threshold if self.max_threshold < math.inf else None,
            "nonfinite": self.nonfinite,
        }

    def clip_(
        self,
        target: Optimizer | Tensor | Iterable[Tensor],
        grad_scaler: GradScaler | None = None,
        shards: Mapping[Tensor, Shard] | None = None,
    ) -> StepRecord | None:
        """Clip the gradients of an optimizer, or of some parameters, in place.

        Args:
            target: The optimizer that is about to step, or its parameters. One clipper serves one optimizer.
            grad_scaler: The scaler of mixed-precision training, if there is one. Its ``unscale_`` may have been called
                before or not: scaled gradients (all that a fused optimizer ever has) are measured and clipped at
                their true scale.
            shards: For gradients that several processes share without being DTensors (FSDP1): what this one holds of
                each. All processes must then call this alike.

        Returns:
            The record of the step, or ``None`` where no parameter has a gradient (where processes share gradients, a
            record of norm 0: only a read of the host would tell).

        Raises:
            NonFiniteGradientError: With ``nonfinite="raise"``, at a NaN or an infinity.
            TypeError: ``target`` is neither an optimizer nor parameters, or the policy gave no single number.
            ValueError: The clipper has served another optimizer before, or FSDP1 shares its gradients and ``shards``
                are not given.
        """
        return clip_together_([self], target, None, grad_scaler, shards)[0]

    @torch.no_grad()
    def record_(self, norm: Tensor, loss_scale: float = 1.0) -> StepRecord:
        """Record a norm that somebody else has measured, who is to clip at the threshold that is returned.

        Args:
            norm: Shape ``()``: the L2 norm of the whole gradient, at its true scale, equal on every process.
            loss_scale: What the loss was multiplied by. Above 1 a norm that is not finite is nothing to raise.

        Raises:
            NonFiniteGradientError: With ``nonfinite="raise"``, if the norm is not finite.
        """
        norm = norm.to(torch.float32)
        number = norm.item() if _numbers.reads_are_free(norm.device) else norm
        threshold = self._decide(number, number)
        record = StepRecord(number, _smaller(number, threshold), number, threshold, self._nonfinite)
        if self.nonfinite == "raise" and loss_scale <= 1 and not math.isfinite(number):
            raise NonFiniteGradientError(f"The norm of the gradient is {float(number)}.", [], [record])
        return record

    def _decide(self, norm: Number, statistic: Number) -> Number:
        """Record the step and return its threshold.

        Args:
            norm: Of the whole gradient, of which this clipper may have a part: whether the step counts.
            statistic: Of this clipper's part: what is recorded.
        """
        history = self.history
        device = norm.device if isinstance(norm, Tensor) else _CPU
        if history.values.device != device:
            history.to(device)
            self._nonfinite = float(self._nonfinite)
        self.steps += 1
        # A gradient of exactly zero moves nothing and tells no scale; enough of them (hinge losses, masked batches)
        # would pull a percentile to zero and stop the training for good.
        if not isinstance(norm, Tensor) or not isinstance(statistic, Tensor):
            finite = norm < math.inf
            self._nonfinite += not finite
            if finite and statistic > 0:
                history.record(statistic)
            limit, (norms, count) = single(self.max_threshold), history.on_host()
            if not count or self.steps <= self.warmup_steps:
                return limit
            return min(single(self.policy.on_host(norms, count)), limit)
        finite = norm < math.inf
        self._nonfinite = self._nonfinite + finite.logical_not().to(torch.float32)
        history.record(torch.where(finite & (statistic > 0), statistic, math.nan))
        if self.steps <= self.warmup_steps:
            return norm.new_full((), self.max_threshold)
        threshold = threshold_of(self.policy, history.ordered, history.size)
        return torch.where(history.count > 0, threshold, math.inf).clamp(max=self.max_threshold)

    def _is_measured(self, norm: Number) -> bool:
        """By value, whether the norm after clipping is measured at this step: it is one more read of the gradients."""
        if self._until_measured > 0:
            self._until_measured -= 1
            return False
        if isinstance(norm, Tensor) or norm < math.inf:  # else the next one
            self._until_measured = self.clipped_norm_every - 1
        return True

    @property
    def nonfinite_total(self) -> int:
        """How many steps so far had a NaN or an infinity in their gradient. Reads the host."""
        return int(self._nonfinite)

    def _bind(self, optimizer: Any, shards: Mapping[Tensor, Shard] | None) -> None:
        forget_found_inf(optimizer)  # of a step that was given up
        served = None if self._optimizer is None else self._optimizer()
        if served is optimizer:
            return
        if served is not None:
            raise ValueError(
                "Expected `clip_` to be called with the optimizer it was called with first, but got another one, whose"
                " norms would mix with the first one's. Use one `GradientClipper` per optimizer, or call `release()`"
                " if this optimizer takes the other's place."
            )
        flat = any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters_of(optimizer))
        if flat and shards is None and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "Expected `shards` beside an optimizer of `FullyShardedDataParallel` parameters: without them each"
                " process would clip its part at a threshold of its own. Shard with `fully_shard` (FSDP2), whose"
                " gradients tell what is held, or use a Trainer with the callback."
            )
        self._optimizer = weakref.ref(optimizer)
        if steps_with_found_inf(optimizer):
            optimizer.register_step_post_hook(forget_found_inf)

    def measure_next(self) -> None:
        """Measure what clipping by value does at the next step, and from there on every so many steps again."""
        self._until_measured = 0

    def release(self) -> None:
        """Forget the optimizer (not its record), so that the next :meth:`clip_` may be given another one."""
        self._optimizer = None

    def state_dict(self) -> dict[str, Any]:
        """What happened so far, as tensors and ints; loads with ``torch.load(..., weights_only=True)``."""
        return {
            "steps": self.steps,
            "nonfinite_total": self.nonfinite_total,
            "history": dict(self.history.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        A smaller ``window`` than the one the state was made with keeps the newest values; a larger one starts with
        what there is.

        Raises:
            ValueError: An entry is missing, damaged, or not one of this class.
        """
        try:
            steps = check_integer("steps", state_dict["steps"], "a count", 0)
            nonfinite_total = check_integer("nonfinite_total", state_dict["nonfinite_total"], "a count", 0)
            history = dict(state_dict["history"])
            self.history.load_state_dict(history)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"The state of a `GradientClipper` is damaged or not one: {error!r}.") from error
        if bool((self.history.ordered <= 0).any()):
            raise ValueError("The state of a `GradientClipper` is damaged: its norms are not all above 0.")
        self.steps, self._nonfinite = steps, float(min(nonfinite_total, steps))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None}  # a weak reference does not pickle


@torch.no_grad()
def clip_together_(
    clippers: Sequence[GradientClipper],
    target: Optimizer | Tensor | Iterable[Tensor],
    groups: Sequence[Sequence[int]] | None = None,
    grad_scaler: GradScaler | None = None,
    shards: Mapping[Tensor, Shard] | None = None,
) -> list[StepRecord | None]:
    """Clip groups of an optimizer's parameters, each at a threshold of its own: one pass, and one collective for all.

    A NaN or an infinity in one group is one of the step: it enters no record, and with ``nonfinite="skip"`` no weight
    of any group moves.

    Args:
        clippers: One per group, alike in everything but their records.
        target: As in :meth:`GradientClipper.clip_`.
        groups: Of each clipper its parameters, as positions among those of ``target``. Together they hold each
            parameter once. ``None``: the one clipper has all.
        grad_scaler: As in :meth:`GradientClipper.clip_`.
        shards: As in :meth:`GradientClipper.clip_`.

    Returns:
        A record per clipper; ``None`` where no parameter of its group has a gradient.
    """
    target = unwrapped(target)
    optimizer = target if hasattr(target, "param_groups") else None
    for clipper in clippers if optimizer is not None else ():
        clipper._bind(optimizer, shards)
    parameters = list(parameters_of(target))
    gradients = Gradients.of(parameters, shards)
    if not gradients.tensors and gradients.shards is None:
        return [None] * len(clippers)
    nonfinite, by_value = clippers[0].nonfinite, clippers[0].gradient_clip_algorithm == "value"
    scale: Number | None = pending_scale(grad_scaler, optimizer)
    if scale is not None and nonfinite != "ignore" and must_not_skip_itself(optimizer):
        grad_scaler.unscale_(optimizer)  # type: ignore[union-attr, arg-type]
        scale = None
    parts = [gradients] if groups is None else gradients.parts(groups)
    norms = gradients.norms()
    norm, numels, of_all = gradients.whole(norms, [part.numel() for part in parts] if by_value else ())
    if scale is not None:
        scale = float(scale) if isinstance(norm, float) else torch.as_tensor(scale, device=norm.device)
        norm = _divided(norm, scale)
    records: list[StepRecord | None] = []
    for i, (clipper, part) in enumerate(zip(clippers, parts, strict=True)):
        if not part.tensors and (part.shards is None or _is_frozen(parameters, groups, i)):
            records.append(None)
            continue
        own, own_norms = (norm, of_all) if groups is None else _of_group(of_all, groups[i], scale)
        statistic = _divided(own, numels[i] ** 0.5) if by_value else own
        threshold = clipper._decide(norm, statistic)
        if by_value:
            part.clip_value_(own, threshold if scale is None else threshold * scale)
        else:  # the factor is a ratio: the same at every loss scale
            part.clip_norm_(own, threshold)
        clipped = _unknown(own) if by_value else _smaller(own, threshold)
        records.append(StepRecord(own, clipped, statistic, threshold, clipper._nonfinite, own_norms))
    if by_value:
        records = _with_clipped_norms(records, clippers, gradients, groups, norm, scale)
    if nonfinite == "raise":
        raise_if_nonfinite(norm, norms, gradients, grad_scaler, records)
    if nonfinite != "ignore":
        skip_if_nonfinite(norm, gradients, optimizer, grad_scaler, pending=scale is not None)
    return records


def _is_frozen(parameters: Sequence[Tensor], groups: Sequence[Sequence[int]] | None, index: int) -> bool:
    """Whether a group will have no gradient on any process."""
    return groups is not None and not any(parameters[at].requires_grad for at in groups[index])


def _with_clipped_norms(
    records: list[StepRecord | None],
    clippers: Sequence[GradientClipper],
    gradients: Gradients,
    groups: Sequence[Sequence[int]] | None,
    norm: Number,
    scale: Number | None,
) -> list[StepRecord | None]:
    """The records of clipping by value, with the norms after it where they are due: one more read of the gradients."""
    pairs = zip(clippers, records, strict=True)
    due = [record is not None and clipper._is_measured(norm) for clipper, record in pairs]
    if not any(due):
        return records
    whole, _, of_all = gradients.whole(gradients.norms())
    whole = whole if scale is None else _divided(whole, scale)
    clipped = [whole] if groups is None else [_of_group(of_all, positions, scale)[0] for positions in groups]
    return [
        record._replace(clipped_norm=after) if record is not None and is_due else record
        for record, after, is_due in zip(records, clipped, due, strict=True)
    ]


def _of_group(
    norms: list[float] | Tensor, positions: Sequence[int], scale: Number | None
) -> tuple[Number, list[float] | Tensor]:
    """The norm of a group's gradients at their true scale, and those of its parameters."""
    own = at_positions(norms, positions)
    norm = norm_of(own)
    return norm if scale is None else _divided(norm, scale), own


def _divided(number: Number, divisor: Number) -> Number:
    if not isinstance(divisor, Tensor) and divisor == 0:  # no entries, or a loss scale that has vanished
        return math.nan if isinstance(number, float) else torch.full_like(number, math.nan)
    quotient = number / divisor
    return quotient if isinstance(quotient, Tensor) else single(quotient)


def _unknown(like: Number) -> Number:
    return math.nan if isinstance(like, float) else torch.full_like(like, math.nan)


def _smaller(number: Number, other: Number) -> Number:
    if isinstance(number, Tensor) and isinstance(other, Tensor):
        return torch.minimum(number, other)
    return min(number, other)
