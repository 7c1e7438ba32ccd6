"""What optimizers and gradient scalers do with a step: which parameters, which loss scale, how a step is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

_STEP_WHAT_THEY_WRAP = ("LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer")


class NonFiniteGradientError(RuntimeError):
    """A gradient held a NaN or an infinity and ``nonfinite="raise"`` was asked for.

    Attributes:
        parameters: The parameters whose gradients were not finite.
        records: What :func:`clip_together_` would have returned: a `StepRecord` per clipper, or ``None``.
    """

    def __init__(self, message: str, parameters: list[Tensor], records: Sequence[Any]) -> None:
        super().__init__(message)
        self.parameters, self.records = parameters, records


def wrapped_in(target: Any) -> list[Any]:
    """An optimizer and those that it wraps, outermost first, whatever their attribute is called.

    What it wraps has the same parameters; another optimizer that it only knows of has others.
    """
    found = [target]
    while True:
        held = (each for each in getattr(found[-1], "__dict__", {}).values() if hasattr(each, "param_groups"))
        others = (each for each in held if all(each is not known for known in found))
        inner = next((each for each in others if _ids(each) == _ids(target)), None)
        if inner is None:
            return found
        found.append(inner)


def _ids(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def unwrapped(target: Any) -> Any:
    """The optimizer inside Lightning's, Fabric's and Accelerate's wrappers: the one whose step is made."""
    if not _steps_what_it_wraps(target):
        return target
    return next((inner for inner in wrapped_in(target) if not _steps_what_it_wraps(inner)), target)


def _steps_what_it_wraps(optimizer: Any) -> bool:
    return any(base.__name__ in _STEP_WHAT_THEY_WRAP for base in type(optimizer).__mro__)


def parameters_of(target: Any) -> list[Tensor]:
    """The parameters of an optimizer, or those that were given, each once; anything else is a `TypeError`."""
    if hasattr(target, "param_groups"):
        given = list(chain.from_iterable(group["params"] for group in target.param_groups))
        return given if len(set(map(id, given))) == len(given) else _each_once(given)
    parameters = _each_once(target if isinstance(target, Iterable) and not isinstance(target, Tensor) else [target])
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"Expected `target` to be an optimizer or parameters, but got a `{type(parameter).__name__}`. Pass the"
                " optimizer, or `model.parameters()`."
            )
    return parameters


def _each_once(parameters: Iterable[Tensor]) -> list[Tensor]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def unscale_(grad_scaler: GradScaler, target: Any) -> list[Tensor]:
    """Unscale the gradients unless that was done before, as ``grad_scaler.step`` would.

    A wrapper and the optimizer in it have the same gradients, and nobody but the user knows which of both the scaler
    will step: what is unscaled counts as unscaled for both.

    Returns:
        On each device shape ``()``, float32: where the scaler keeps whether it has found an infinity.
    """
    if not hasattr(target, "param_groups"):
        raise ValueError(
            "Expected the optimizer beside `grad_scaler`: which gradients are unscaled is kept per optimizer."
        )
    states, optimizers = grad_scaler._per_optimizer_states, wrapped_in(target)
    known = [states[id(optimizer)] for optimizer in optimizers if id(optimizer) in states]
    state = next((state for state in known if state["stage"] is not OptState.READY), None)
    if state is None:
        grad_scaler.unscale_(unwrapped(target))
        state = states[id(unwrapped(target))]
    for optimizer in optimizers:
        states[id(optimizer)] = state
    return list(state["found_inf_per_device"].values())


class StepGate:
    """Stands before the step of one optimizer: knows of each step, and leaves one out on demand.

    A step that is left out moves neither weights nor momentum and decays nothing, since for its time the parameters
    have no gradients. Whoever looks at them before or after the step (other callbacks, hooks of the module) sees them.
    The optimizer's own step hooks do it, where Lightning computes the gradients inside of the step (``closure``) too.

    Attributes:
        has_hooks: Whether the optimizer has step hooks of torch. Else nothing is known of its steps, and gradients are
            taken away for good.
        computed: How many times the step that is being made has computed gradients.
        passed_by: How many steps were made that :meth:`expect` did not announce.
    """

    _all: ClassVar[WeakKeyDictionary[Any, StepGate]] = WeakKeyDictionary()

    def __init__(self, has_hooks: bool) -> None:
        self.has_hooks, self.computed, self.passed_by = has_hooks, 0, 0
        self._is_expected = self._leaves_out = False
        self._is_young = True  # whether the hooks may be younger than the step that is being made
        self._depth = 0  # a subclass's step may call its parent's, and both have the hooks
        self._is_within = False  # a closure
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._given_back: list[tuple[Tensor, Tensor]] = []
        self._was_zeroed = self._notes_zero_grad = False  # while they are taken
        self._found_inf: Tensor | None = None

    @classmethod
    def of(cls, optimizer: Any) -> StepGate:
        """The gate of an optimizer."""
        if (gate := cls._all.get(optimizer)) is None:
            is_patched = getattr(getattr(type(optimizer), "step", None), "hooked", False)
            gate = cls._all[optimizer] = cls(is_patched and hasattr(optimizer, "_optimizer_step_pre_hooks"))
            if gate.has_hooks:
                optimizer.register_step_pre_hook(gate._before)
                optimizer.register_step_post_hook(gate._after)
        return gate

    def expect(self, optimizer: Any) -> None:
        """Announce a step. What was said of one that was never made is taken back."""
        self.forget(optimizer)
        self._is_expected, self._given_back = True, []
        if not self._is_within:  # whatever has become of the last step
            self._depth = self.computed = 0

    def forget(self, optimizer: Any) -> None:
        """Take back what was said of a step that was not made."""
        self._leaves_out, self._taken = False, []
        self._forget_found_inf(optimizer)
        self._note_zero_grad(optimizer, False)

    def drop_left_out(self) -> None:
        """Before the next gradients: those of a step that was left out must not be added to."""
        for parameter, gradient in self._given_back:
            if parameter.grad is gradient:
                parameter.grad = None
        self._given_back = []

    def leave_out(self, optimizer: Any) -> None:
        """Have the coming step change nothing."""
        self._leaves_out = True
        if self._is_young:
            self._take(optimizer)

    def settle(self) -> None:
        """Say that no step is being made now."""
        self._is_young = not self.has_hooks

    def leave_out_if(self, found_inf: Tensor, optimizer: Any) -> None:
        """Have the coming step of a fused optimizer change nothing if this, on its device, is 1."""
        optimizer.found_inf = self._found_inf = found_inf

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth, self._is_young = self._depth + 1, False
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take(optimizer)
            return None
        if getattr(closure, "autoclip_gate", None) is self:
            return None  # of the subclass's step
        self.computed, self._depth = 0, 1
        within = self._around(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": within}
        return (args[0], within, *args[2:]), kwargs

    def _around(self, closure: Callable[..., Any], optimizer: Any) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            self.computed, self._is_within = self.computed + 1, True
            try:
                loss = closure(*args, **kwargs)
            finally:
                self._is_within = False
            self._take(optimizer)
            return loss

        within.autoclip_gate = self  # type: ignore[attr-defined]
        return within

    def _take(self, optimizer: Any) -> None:
        if self._leaves_out:
            self._leaves_out = False
            self._note_zero_grad(optimizer, True)
            for parameter in parameters_of(optimizer):
                if parameter.grad is not None:
                    self._taken.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget_found_inf(optimizer)
        self._depth, self._is_young = self._depth - 1, False
        if self._depth > 0:
            return
        self.passed_by += not self._is_expected
        self.computed, self._depth, self._is_expected = 0, 0, False
        self._given_back = [] if self._was_zeroed else [each for each in self._taken if each[0].grad is None]
        for parameter, gradient in self._given_back:
            parameter.grad = gradient
        self._taken = []
        self._note_zero_grad(optimizer, False)

    def _note_zero_grad(self, optimizer: Any, begins: bool) -> None:
        """Know whether somebody zeroes the gradients while they are taken: then nobody wants them back."""
        if self._notes_zero_grad:
            optimizer.__dict__.pop("zero_grad", None)
        self._notes_zero_grad = begins and "zero_grad" not in optimizer.__dict__
        if not self._notes_zero_grad:
            self._was_zeroed = False
            return
        zero_grad = optimizer.zero_grad

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._was_zeroed = True
            return zero_grad(*args, **kwargs)

        optimizer.zero_grad = noted

    def _forget_found_inf(self, optimizer: Any) -> None:
        """Torch would believe it at every later step. A scaler deletes its own itself."""
        if self._found_inf is not None and getattr(optimizer, "found_inf", None) is self._found_inf:
            del optimizer.found_inf
        self._found_inf = None


def steps_with_found_inf(optimizer: Any) -> bool:
    """Whether the optimizer's step reads ``found_inf``: all of its groups are fused."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False) and StepGate.of(optimizer).has_hooks
    return supports and all(group.get("fused") for group in optimizer.param_groups)


def must_not_skip_itself(optimizer: Any, is_sharded: bool = False) -> bool:
    """Whether a fused step that is told to skip would leave uninitialised memory as momentum behind.

    Fused SGD allocates momentum buffers when it first meets their parameters, without filling them, and a skipped
    kernel leaves them so (torch 2.13, also under a `GradScaler`). That step must be skipped by having no gradients.

    Args:
        optimizer: The optimizer.
        is_sharded: Whether other processes may meet a parameter at another step than this one, though all of them must
            go the same way.
    """
    return steps_with_found_inf(optimizer) and any(
        is_sharded or (parameter.grad is not None and optimizer.state.get(parameter, {}).get("momentum_buffer") is None)
        for group in optimizer.param_groups
        if group.get("momentum")
        for parameter in group["params"]
    )


def must_be_read(nonfinite: str, optimizer: Any, has_scaler: bool, is_sharded: bool) -> bool:
    """Whether the host must know the norm before the step: where nothing on the accelerator can leave it out."""
    if nonfinite != "skip":
        return nonfinite == "raise"
    return not (has_scaler or steps_with_found_inf(optimizer)) or must_not_skip_itself(optimizer, is_sharded)


def raise_if_nonfinite(
    norm: float,
    norms: Sequence[float],
    parameters: Sequence[Tensor],
    grad_scaler: GradScaler | None,
    records: Sequence[Any],
) -> None:
    """Raise at a non-finite norm, unless a `GradScaler` may cure it by lowering its scale.

    Args:
        norm: Of the whole gradient.
        norms: Of the gradient of each parameter.
        parameters: The parameters.
        grad_scaler: The scaler of the loss.
        records: For the error.
    """
    if norm < math.inf or (grad_scaler is not None and grad_scaler.get_scale() > 1):
        return
    bad = [parameter for parameter, own in zip(parameters, norms, strict=True) if not math.isfinite(own)]
    having = sum(parameter.grad is not None for parameter in parameters)
    where = f"a NaN or an infinity in the gradient of {len(bad)} of {having} parameters" if bad else "beyond float32"
    raise NonFiniteGradientError(f"The norm of the gradient is {norm}: {where}.", bad, records)


def skip_if_nonfinite(
    is_finite: bool | Tensor,
    parameters: Sequence[Tensor],
    optimizer: Any,
    gate: StepGate | None,
    found_infs: list[Tensor] | None,
) -> None:
    """See to it that the coming step moves no weight if the norm is not finite: neither momentum nor weight decay.

    Args:
        is_finite: Whether the norm is; a tensor where nobody may read it.
        parameters: Those that step.
        optimizer: Their optimizer; ``None`` if it is not known.
        gate: Of the optimizer; ``None`` if that is not known.
        found_infs: Where the scaler keeps whether it has found an infinity, if there is one.
    """
    if is_finite is True:
        return
    if found_infs:
        # Where it looks before the step. A norm beyond float32 is an infinity too, though no entry may be. The scaler
        # adds up what stands here, and fused kernels skip at exactly 1.
        first, *others = found_infs
        bad = is_finite.logical_not().to(first) if isinstance(is_finite, Tensor) else torch.ones_like(first)
        torch.maximum(first, bad, out=first)
        for other in others:
            other.zero_()
    if isinstance(is_finite, Tensor):
        if found_infs is None and gate is not None and gate.has_hooks:
            gate.leave_out_if(is_finite.logical_not().to(torch.float32), optimizer)
    elif found_infs is None or must_not_skip_itself(optimizer):
        if gate is not None:
            gate.leave_out(optimizer)
        else:
            for parameter in parameters:
                parameter.grad = None
