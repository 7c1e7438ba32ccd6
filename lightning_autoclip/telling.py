"""What is told during a fit: rows to the loggers when they are due, warnings and the report to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autoclip.monitoring import live, loggers
from lightning_autoclip.monitoring.report import Report
from lightning_autoclip.scopes import Scopes
from lightning_autoclip.settings import Settings

_ROWS_WITHOUT_LOGGING = 1024  # steps between two summaries with `Trainer(log_every_n_steps=0)`


class Telling:
    """Tells of the steps of a fit.

    Args:
        name: What the callback is called.
        scopes: What happens.
        settings: How it is clipped.
        verbose: Whether the report is printed at the end.
        options: Keyword arguments of :func:`loggers.send`: histogram and alerts.
    """

    def __init__(self, name: str, scopes: Scopes, settings: Settings, verbose: bool, **options: Any) -> None:
        self._name, self._scopes, self._settings = name, scopes, settings
        self._verbose, self._options = verbose, options
        self._batches = 0  # of this fit
        self._told = 0  # how many non-finite steps the user knows of
        self._has_told = False  # in this fit

    def begin(self, trainer: Trainer) -> None:
        """Say what will be logged. From now on ``trainer.callback_metrics`` has the figures of the latest step."""
        self._batches, self._told, self._has_told = 0, self._scopes.total("nonfinite_total"), False
        live.show(trainer, self._scopes.figures)
        keys = [key for scope in self._scopes for key in scope.recorder.keys]
        loggers.describe(_loggers(trainer), keys, self._settings.to_dict())

    def after_batch(self, trainer: Trainer) -> None:
        """Log a row every ``log_every_n_steps``; warn in time of optimizers whose steps are not clipped."""
        every = log_every(trainer) or _ROWS_WITHOUT_LOGGING
        if any(scope.recorder.is_due(every) for scope in self._scopes):
            self.flush(trainer)
        for known in self._scopes.optimizers:
            known.end_batch()
        self._batches += 1
        rows, rest = divmod(self._batches, every * trainer.accumulate_grad_batches)
        if not rest:
            self._warn_of_steps(has_ended=rows > 1 and not any(known.has_stepped for known in self._scopes.optimizers))

    def flush(self, trainer: Trainer) -> None:
        """Send what is held to every logger."""
        for scope in self._scopes:
            rows, points = scope.recorder.flush()
            scope.clipper.measure_next()  # each row knows what clipping did
            alert_nonfinite = not self._settings.has_scaler
            loggers.send(
                _loggers(trainer), scope.recorder.prefix, rows, points, alert_nonfinite=alert_nonfinite, **self._options
            )
        if not self._has_told:
            self._warn_of_nonfinite()

    def end(self, trainer: Trainer, report: Callable[[], Report], spikes: Callable[[], list[dict[str, Any]]]) -> None:
        """Log what is left and what it amounts to, print the report, warn of what went past."""
        self.flush(trainer)
        self._warn_of_nonfinite()
        quick = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        try:
            self.conclude(trainer, report, spikes)
            if self._verbose and trainer.is_global_zero and not quick:
                print(f"\n{report()}")  # below the progress bar
        except Exception as error:  # nothing that is only told may fail a training that is done
            rank_zero_warn(f"`{self._name}` could not print its report: {error!r}")
        if self._batches:
            self._warn_of_steps(has_ended=True)

    def conclude(
        self, trainer: Trainer, report: Callable[[], Report], spikes: Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Log the spike table, and to W&B the report's verdicts."""
        if told := _loggers(trainer):
            health = report().summary if self._scopes else None
            loggers.conclude(told, spikes(), health, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _warn_of_nonfinite(self) -> None:
        """Warn of non-finite gradients: when the first one is logged, and of further ones at the end of fit."""
        reaction = self._settings.arguments["nonfinite"]
        if reaction == "raise" or self._settings.has_scaler:
            return  # with a `GradScaler` overflows are the way in which it finds its scale
        total = self._scopes.total("nonfinite_total")
        if total <= self._told:
            return
        self._told, self._has_told = total, True
        done = "applied as they were" if reaction == "ignore" and not self._settings.has_engine else "left out"
        rank_zero_warn(
            f"{total} of {self._scopes.total('steps')} optimizer steps so far had a NaN or an"
            f" infinity in their gradient and were {done}. `spikes()` of the callback names batches and parameters;"
            ' `nonfinite="raise"` stops at such a step.'
        )

    def _warn_of_steps(self, has_ended: bool) -> None:
        """Warn, once, of each optimizer whose steps are not clipped."""
        for known in self._scopes.optimizers:
            if not known.is_told_of and (why := known.why_not_clipped(has_ended)):
                known.is_told_of = True
                rank_zero_warn(f"`{self._name}` {why}")


def log_every(trainer: Trainer) -> int:
    """Every how many steps the Trainer logs; 0 for never."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return every


def _loggers(trainer: Trainer) -> list[Logger]:
    """Those that are to be told something by this process."""
    return trainer.loggers if trainer.is_global_zero and log_every(trainer) else []
