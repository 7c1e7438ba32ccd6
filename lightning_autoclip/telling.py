"""What is told during a fit: rows to the loggers when they are due, warnings and the report to the user."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autoclip._checks import check_bool, check_number
from lightning_autoclip._text import printable
from lightning_autoclip.clipping.optimizers import NonFiniteGradientError
from lightning_autoclip.monitoring import loggers
from lightning_autoclip.monitoring.recorder import Row, joined
from lightning_autoclip.monitoring.report import Report
from lightning_autoclip.monitoring.summary import Point
from lightning_autoclip.monitoring.verdicts import where
from lightning_autoclip.scopes import Scopes
from lightning_autoclip.settings import Settings
from lightning_autoclip.steps import Scope
from lightning_autoclip.strategies import parameter_names, trains_in_others

_IDLE = 50  # batches without any step; fewer may well be accumulated by hand
_ROWS_WITHOUT_LOGGING = 1024  # steps between two summaries with `Trainer(log_every_n_steps=0)`


class Telling:
    """Tells of the steps of a fit.

    Args:
        name: What the callback is called.
        scopes: What happens.
        settings: How it is clipped.
        verbose: As in `GradientClipping`, as the following.
        log_histogram: Whether a histogram of the norms is logged too.
        alert_above: Of what norms an alert is sent.
    """

    def __init__(
        self,
        name: str,
        scopes: Scopes,
        settings: Settings,
        verbose: bool,
        log_histogram: bool,
        alert_above: float | None,
    ) -> None:
        self._name, self._scopes, self._settings = name, scopes, settings
        if alert_above is not None:
            alert_above = check_number("alert_above", alert_above, "a number of at least 1, or `None`", 1)
        self._verbose, histogram = check_bool("verbose", verbose), check_bool("log_histogram", log_histogram)
        self._options: dict[str, Any] = {"histogram": histogram, "alert_above": alert_above}
        self._batches = 0  # of this fit
        self._told = 0  # how many non-finite steps the user knows of
        self._has_told = False  # in this fit
        self._is_open = False  # whether there is a fit whose end is to be told of
        self._defined = set[str]()  # keys that the loggers know of

    def begin(self, trainer: Trainer) -> None:
        """Say what will be logged. From now on ``trainer.callback_metrics`` has all keys."""
        self._batches, self._told, self._has_told = 0, self._scopes.total("nonfinite_total"), False
        self._is_open = True
        self.publish(trainer)
        self._defined = set[str]()
        self._define(trainer)
        hparams, step = getattr(trainer.lightning_module, "hparams", {}), step_of(trainer)
        loggers.describe(_loggers(trainer), self._settings.to_log(), hparams, step)

    def _define(self, trainer: Trainer) -> None:
        """Tell of the keys that are new: groups, optimizers and layers may join in mid-fit."""
        keys = [key for scope in self._scopes for key in scope.recorder.keys if key not in self._defined]
        self._defined.update(keys)
        loggers.define(_loggers(trainer), keys)

    def after_batch(self, trainer: Trainer) -> None:
        """Log a row every ``log_every_n_steps``; warn in time of optimizers whose steps are not clipped."""
        every = log_every(trainer) or _ROWS_WITHOUT_LOGGING
        for known in self._scopes.optimizers:
            known.end_batch()
        if self._is_due(trainer):
            self.flush(trainer)
        elif trainer.fit_loop.epoch_loop._num_ready_batches_reached() or _is_saved(trainer):
            self.publish(trainer)
        self._batches += 1
        rows, rest = divmod(self._batches, every * trainer.accumulate_grad_batches)
        if not rest:
            is_idle = not any(known.announced or known.passed_by for known in self._scopes.optimizers)
            self._warn_of_steps(has_ended=is_idle and rows > 1 and self._batches >= _IDLE)

    def publish(self, trainer: Trainer) -> None:
        """Put the latest row into ``trainer.callback_metrics``; a number that is not finite replaces none that is."""
        metrics = trainer._logger_connector._callback_metrics
        for key, value in self._scopes.figures().items():
            if math.isfinite(value) or key not in metrics:
                metrics[key] = torch.tensor(value if math.isfinite(value) else math.nan, dtype=torch.float32)

    def flush(self, trainer: Trainer) -> None:
        """Send what is held to every logger."""
        self.publish(trainer)
        told, parts = _loggers(trainer), []

        def rows_of(scope: Scope) -> list[Row]:
            rows, points = scope.recorder.flush()
            parts.append((scope, points))
            scope.clipper.measure_next()  # each row knows what clipping did
            return rows

        self._define(trainer)
        self._send(told, rows_of)
        options = {"alert_nonfinite": not self._settings.has_scaler, **self._options}
        for scope, points in parts:
            loggers.illustrate(told, scope.recorder.prefix, points, scope.trace, **options)
        if not self._has_told:
            self._warn_of_nonfinite()

    def _send(self, told: list[Logger], rows_of: Callable[[Scope], list[Row]]) -> None:
        """Log the rows of all scopes. Of what no logger has taken, the steps wait for their row as before."""
        waiting, taken = [scope.recorder.waiting() for scope in self._scopes], list[Logger]()
        try:
            loggers.send(told, joined([rows_of(scope) for scope in self._scopes]), taken)
        except BaseException:
            for put_back in () if taken else waiting:
                put_back()
            raise

    def _try_to(self, do: Callable[[], None]) -> None:
        """Log what no more than a warning may come of: at a checkpoint, or at the end of a fit."""
        try:
            do()
        except Exception as error:  # the logger, the device or the disk may be what failed
            rank_zero_warn(f"`{self._name}` could not log its last rows: {str(error) or repr(error)}")

    def before_checkpoint(self, trainer: Trainer) -> None:
        """See to it that a resumed run neither repeats nor misses a row: what is held is part of the checkpoint.

        The rows of single steps are sent, since the run may go on to where it ends without another checkpoint.
        """
        self._define(trainer)
        if self._is_due(trainer) or _is_last(trainer):
            self._try_to(lambda: self.flush(trainer))
        else:
            self._try_to(lambda: self._send(_loggers(trainer), lambda scope: scope.recorder.flush_steps()))

    def _is_due(self, trainer: Trainer) -> bool:
        every = log_every(trainer) or _ROWS_WITHOUT_LOGGING
        return any(scope.recorder.is_due(every) for scope in self._scopes)

    def end(self, trainer: Trainer, report: Callable[[], Report]) -> None:
        """Log what is left and what it amounts to, print the report, warn of what went past."""
        self._try_to(lambda: self.flush(trainer))
        self._warn_of_nonfinite()
        self._sum_up(trainer, report)
        if self._batches:
            self._warn_of_steps(has_ended=True)

    def break_off(self, trainer: Trainer, report: Callable[[], Report]) -> None:
        """Likewise of a fit that ends with an exception, which is the one to be shown."""
        if not self._is_open:
            return  # it is not of a fit, or one that was told of
        with suppress(UserWarning):  # where warnings are errors
            self._try_to(lambda: self.flush(trainer))
        with suppress(UserWarning):
            self._sum_up(trainer, report)

    def _sum_up(self, trainer: Trainer, report: Callable[[], Report]) -> None:
        quick = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        self._is_open = False
        try:
            self.conclude(trainer, report)
            if self._verbose and trainer.is_global_zero and not quick and (report().sections or self._batches):
                print(f"\n{report()}")  # below the progress bar
        except Exception as error:  # nothing that is only told may fail a training that is done
            rank_zero_warn(f"`{self._name}` could not print its report: {error!r}")

    def conclude(self, trainer: Trainer, report: Callable[[], Report]) -> None:
        """Log the spike table and the report's verdicts."""
        if told := _loggers(trainer):
            health = report().summary if self._scopes else None
            loggers.conclude(told, self._scopes.spikes(), health, step_of(trainer))

    def warn_if_trained_elsewhere(self, trainer: Trainer) -> None:
        """Warn of a checkpoint of a process that has seen no step since others have made them."""
        if not self._scopes and trains_in_others(trainer):
            rank_zero_warn(
                f"The checkpoint has no record of `{self._name}`: this process saw no step, and those that trained have"
                " ended. Their own checkpoints (`ModelCheckpoint`) have it."
            )

    def _warn_of_nonfinite(self) -> None:
        """Warn of non-finite gradients: when the first one is logged, and of further ones at the end of fit."""
        reaction = self._settings.arguments["nonfinite"]
        if reaction == "raise" or self._settings.has_scaler:
            return  # with a `GradScaler` overflows are the way in which it finds its scale
        if not any(scope.trace.nonfinite for scope in self._scopes):
            return  # to ask the clippers is one more wait for the device in every row
        total = self._scopes.total("nonfinite_total")
        if total <= self._told:
            return
        self._told, self._has_told = total, True
        firsts = [scope.trace.nonfinite[0].point for scope in self._scopes if scope.trace.nonfinite]
        first = where(min(firsts, key=lambda point: point.step))
        done = "applied as they were" if reaction == "ignore" and not self._settings.has_engine else "left out"
        rank_zero_warn(
            f"{total} of {self._scopes.total('steps')} optimizer steps so far had a NaN or an infinity in their"
            f" gradient and were {done}, the first at {first}. `spikes()` of the callback names batches and parameters;"
            ' `nonfinite="raise"` stops at such a step.'
        )

    def _warn_of_steps(self, has_ended: bool) -> None:
        """Warn, once, of each optimizer whose steps are not clipped."""
        for known in self._scopes.optimizers:
            if not known.is_told_of and (why := known.why_not_clipped(has_ended)):
                known.is_told_of = True
                rank_zero_warn(f"`{self._name}` {why}")


def located(error: NonFiniteGradientError, pl_module: LightningModule, point: Point) -> NonFiniteGradientError:
    """The error with what only the Trainer knows: step, batches and the parameters' names."""
    names = dict(reversed(parameter_names(pl_module)))
    bad = printable(", ".join(names.get(id(each), "(not in the model)") for each in error.parameters))
    which = f" They are: {bad}." if bad else ""  # an engine does not tell
    return NonFiniteGradientError(
        f"At optimizer {where(point)}: {error}{which} Look at that batch, or use"
        ' `nonfinite="skip"` to leave such steps out.',
        error.parameters,
        error.records,
    )


def log_every(trainer: Trainer) -> int:
    """Every how many steps the Trainer logs; 0 for never."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return every


def step_of(trainer: Trainer) -> int:
    """The loggers' step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _is_saved(trainer: Trainer) -> bool:
    """Whether a `ModelCheckpoint(every_n_train_steps=...)` saves at this step; it may monitor a key."""
    intervals = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return any(every and trainer.global_step % every == 0 for every in intervals)


def _is_last(trainer: Trainer) -> bool:
    """Whether the fit ends with this step, as far as that can be known: whoever stops it may do so later."""
    loop = trainer.fit_loop
    in_last_epoch = trainer.max_epochs not in (None, -1) and loop.epoch_progress.current.ready >= trainer.max_epochs
    return bool(
        trainer.global_step >= trainer.max_steps > -1
        or (in_last_epoch and loop.epoch_loop.batch_progress.is_last_batch)
        or (trainer.should_stop and loop._can_stop_early)
    )


def _loggers(trainer: Trainer) -> list[Logger]:
    """Those that are to be told something by this process."""
    return trainer.loggers if trainer.is_global_zero and log_every(trainer) else []
