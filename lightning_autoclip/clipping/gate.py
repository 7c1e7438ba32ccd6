"""What stands before the step of an optimizer, and leaves it out on demand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_autoclip._text import printable


class StepGate:
    """Stands before the step of one optimizer: knows of each step, and leaves one out on demand.

    A step that is left out moves neither weights nor momentum and decays nothing, since for its time the parameters
    have no gradients. Whoever looks at them before or after the step (other callbacks, hooks of the module) sees them.
    The optimizer's own step hooks do it, where Lightning computes the gradients inside of the step (``closure``) too.

    Attributes:
        has_hooks: Whether the optimizer has step hooks of torch. Else nothing is known of its steps, and gradients are
            taken away for good.
        computed: How many times the step that is being made has computed gradients.
        is_expected: Whether a step has been announced and not been made, as far as that is known.
        passed_by: How many steps were made that :meth:`expect` did not announce.
    """

    _all: ClassVar[WeakKeyDictionary[Any, StepGate]] = WeakKeyDictionary()

    def __init__(self, has_hooks: bool) -> None:
        self.has_hooks, self.computed, self.passed_by = has_hooks, 0, 0
        self.is_expected = self._leaves_out = False
        self._is_young = True  # whether the hooks may be younger than the step that is being made
        self._depth = 0  # a subclass's step may call its parent's, and both have the hooks
        self._is_within = False  # a closure
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._versions: list[int] = []  # of the parameters whose gradients are taken
        self._is_told_of = False  # whether its steps move weights that have no gradients
        self._given_back: list[tuple[Tensor, Tensor]] = []
        self._is_asked = False  # to drop them: else they would be held for nothing
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
        self.is_expected, self._given_back = True, []
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
        """Say that no step is being made now, and that :meth:`drop_left_out` is called before each backward pass."""
        self._is_young, self._is_asked = not self.has_hooks, True

    def leave_out_if(self, found_inf: Tensor, optimizer: Any) -> None:
        """Have the coming step of a fused optimizer change nothing if this, on its device, is 1."""
        optimizer.found_inf = self._found_inf = found_inf

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth, self._is_young = self._depth + 1, False
        self._join_found_inf(optimizer)
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
            self._take_away(optimizer)

    # Within a compiled step. What this does dynamo does not know before torch 2.13.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_away(self, optimizer: Any) -> None:
        self._leaves_out = False
        self._note_zero_grad(optimizer, True)
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            if parameter.grad is not None:
                self._taken.append((parameter, parameter.grad))
                parameter.grad = None
        self._versions = [parameter._version for parameter, _ in self._taken]

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget_found_inf(optimizer)
        self._depth, self._is_young = self._depth - 1, False
        if self._depth > 0:
            return
        self.passed_by += not self.is_expected
        self.computed, self._depth, self.is_expected = 0, 0, False
        if self._taken or self._notes_zero_grad:
            self._give_back(optimizer)
        else:
            self._given_back = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _give_back(self, optimizer: Any) -> None:
        if not self._is_told_of and [each._version for each, _ in self._taken] != self._versions:
            self._is_told_of = True
            warnings.warn(
                f"`{printable(type(optimizer).__name__)}` has moved weights at a step that was left out: to it, a"
                " gradient that is not there is one of zero, so momentum and weight decay go on. Stop at such"
                ' steps with `nonfinite="raise"`, or use an optimizer that passes over parameters without a gradient.',
                stacklevel=2,
            )
        given_back = [] if self._was_zeroed else [each for each in self._taken if each[0].grad is None]
        for parameter, gradient in given_back:
            parameter.grad = gradient
        self._given_back = given_back if self._is_asked else []
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

    def _join_found_inf(self, optimizer: Any) -> None:
        """A scaler, which knows nothing of this step's size, has put its own in the place of ours."""
        theirs = getattr(optimizer, "found_inf", None)
        if self._found_inf is not None and theirs is not None and theirs is not self._found_inf:
            optimizer.found_inf = torch.maximum(theirs, self._found_inf.to(theirs))

    def _forget_found_inf(self, optimizer: Any) -> None:
        """Torch would believe it at every later step. A scaler deletes its own itself."""
        if self._found_inf is not None and getattr(optimizer, "found_inf", None) is self._found_inf:
            del optimizer.found_inf
        self._found_inf = None
