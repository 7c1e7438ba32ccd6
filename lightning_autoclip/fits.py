"""The fit that a callback serves: one at a time, since its record is that of one training."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Fit:
    """The fit that was begun last, which may have ended."""

    def __init__(self) -> None:
        self._trainer: weakref.ref[Trainer] | None = None

    def begin(self, trainer: Trainer, name: str) -> bool:
        """Begin a fit.

        Args:
            trainer: Its Trainer.
            name: What the callback is called.

        Returns:
            Whether the last fit was another Trainer's that still is there.

        Raises:
            MisconfigurationException: The last fit is another Trainer's, and still goes on.
        """
        last = None if self._trainer is None else self._trainer()
        is_anothers = last is not None and last is not trainer
        if last is not None and is_anothers and (last.state.fn, last.state.status) == ("fit", "running"):
            raise MisconfigurationException(
                f"This `{name}` is in the fit of another Trainer that still goes on, and its record is that of one"
                f" training. Give each Trainer a `{name}` of its own, or fit one after the other."
            )
        self._trainer = weakref.ref(trainer)
        return is_anothers

    def is_of(self, trainer: Trainer) -> bool:
        """Whether it is, or was, this Trainer's."""
        return self._trainer is not None and self._trainer() is trainer

    @property
    def global_step(self) -> int:
        """How many steps its Trainer has counted; -1 where there is none."""
        trainer = None if self._trainer is None else self._trainer()
        return -1 if trainer is None else trainer.global_step

    def __getstate__(self) -> dict[str, Any]:
        return {"_trainer": None}  # of this process
