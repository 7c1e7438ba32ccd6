"""What is logged and reported during a fit: rows when they are due, warnings, the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autoclip._checks import check_bool, check_number
from lightning_autoclip.lightning import loggers
from lightning_autoclip.lightning.clipped_optimizers import ClippedOptimizers
from lightning_autoclip.lightning.trainer import is_last_step, log_every, step_of, trains_elsewhere
from lightning_autoclip.report import Report
from lightning_autoclip.skip import NonFiniteGradientError
from lightning_autoclip.steplog import Row, StepLog
from lightning_autoclip.table import LargeStep

_IDLE = 50  # batches without any step; fewer may well be accumulated by hand
_WITHOUT_LOGGING = 1024  # steps between two rows with `Trainer(log_every_n_steps=0)`
Logs = Mapping[str, StepLog]


class Monitor:
    """Logs and reports the steps of a fit.

    Args:
        name: What the callback is called.
        verbose: As in `GradientClipping`, as the following.
        log_histogram: See there.
        alert_above: See there.
    """

    def __init__(self, name: str, verbose: bool, log_histogram: bool, alert_above: float | None) -> None:
        if alert_above is not None:
            alert_above = check_number("alert_above", alert_above, "a number of at least 1, or `None`", 1)
        self._name, self._verbose = name, check_bool("verbose", verbose)
        self._histogram, self._alert_above = check_bool("log_histogram", log_histogram), alert_above
        self._reaction, self._has_scaler, self._has_engine = "skip", False, False
        self._batches = 0
        self._nonfinite = 0  # how many non-finite steps were reported
        self._is_open = False  # whether the end of the fit is still to be reported
        self._defined = set[str]()  # keys that the loggers know

    def begin(
        self,
        trainer: Trainer,
        optimizers: ClippedOptimizers,
        settings: dict[str, Any],
        has_scaler: bool,
        has_engine: bool,
    ) -> None:
        """Log the settings, and the keys that rows will have."""
        self._reaction, self._has_scaler, self._has_engine = settings["nonfinite"], has_scaler, has_engine
        self._batches, self._is_open, self._defined = 0, True, set()
        self._nonfinite = _total(optimizers, "nonfinite")
        self._define(trainer, optimizers)
        hparams = getattr(trainer.lightning_module, "hparams", {})
        loggers.describe(_loggers(trainer), settings, hparams, step_of(trainer))

    def _define(self, trainer: Trainer, optimizers: ClippedOptimizers) -> None:
        """Name the keys that are new: groups, optimizers and layers may join in mid-fit."""
        keys = [key for log in optimizers.logs.values() for key in log.keys if key not in self._defined]
        if keys:
            self._defined.update(keys)
            loggers.define(_loggers(trainer), keys)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def end_batch(self, trainer: Trainer, optimizers: ClippedOptimizers) -> None:
        """Commit the steps of the batch; log a row if one is due; warn in time of steps that are not clipped."""
        self._batches += 1
        every = log_every(trainer) or _WITHOUT_LOGGING
        for clipped in optimizers:
            clipped.end_batch()
        if _is_due(optimizers, every) or is_last_step(trainer):
            self._flush(trainer, optimizers)
        else:
            for error in loggers.send(_loggers(trainer), joined(_step_rows(optimizers.logs)))[:1]:
                raise error
            if trainer.is_last_batch or _saves_here(trainer):
                self.show(trainer, optimizers)
        intervals, rest = divmod(self._batches, every * trainer.accumulate_grad_batches)
        if not rest:
            is_idle = not any(clipped.announced for clipped in optimizers)
            self._warn_of_steps(optimizers, has_ended=is_idle and intervals > 1 and self._batches >= _IDLE)

    def _flush(self, trainer: Trainer, optimizers: ClippedOptimizers, commits: bool = True) -> None:
        """Log the row of the logging interval, and begin a new one once the loggers have taken it."""
        if commits:
            optimizers.commit()
        self._define(trainer, optimizers)
        waiting = [(log, span, log.norms()) for log in optimizers.logs.values() if (span := log.span) is not None]
        rows = [[(int(last), log.row())] for log, (_, last), _ in waiting]
        _show(trainer, rows)
        failed = loggers.send(_loggers(trainer), joined([*_step_rows(optimizers.logs), *rows]))
        if len(failed) < len(_loggers(trainer)) or not failed:  # else the steps wait for the next row
            for log, _, _ in waiting:
                log.flush()
        for error in failed[:1]:
            raise error
        for log, span, norms in waiting:
            shown = norms if self._histogram else ()
            loggers.illustrate(_loggers(trainer), log, span, shown, self._alert_above, not self._has_scaler)
        if not self._nonfinite:
            self._warn_of_nonfinite(optimizers)

    def show(self, trainer: Trainer, optimizers: ClippedOptimizers) -> None:
        """Put the figures of the logging interval so far into ``trainer.callback_metrics``."""
        optimizers.commit()
        _show(trainer, [[(0, log.row())] for log in optimizers.logs.values() if log.span is not None])

    # --- the end ------------------------------------------------------------------------------------------------------

    def end(self, trainer: Trainer, optimizers: ClippedOptimizers, report: Callable[[], Report]) -> None:
        """Log what is left and what it amounts to, print the report, warn of steps that were not clipped."""
        self._try(lambda: self._flush(trainer, optimizers))
        self._warn_of_nonfinite(optimizers)
        self._conclude(trainer, optimizers, report)
        if self._batches:
            self._warn_of_steps(optimizers, has_ended=True)

    def interrupt(
        self, trainer: Trainer, optimizers: ClippedOptimizers, report: Callable[[], Report], exception: BaseException
    ) -> None:
        """Likewise of a fit that ends with an exception, which is the one to be shown."""
        if not self._is_open:
            return
        optimizers.commit_if_counted(trainer.global_step)
        with suppress(UserWarning):  # where warnings are errors
            self._try(lambda: self._flush(trainer, optimizers, commits=False))
        stopped = "stopped at non-finite gradients" if isinstance(exception, NonFiniteGradientError) else ""
        with suppress(UserWarning):
            self._conclude(trainer, optimizers, report, stopped)

    def _conclude(
        self, trainer: Trainer, optimizers: ClippedOptimizers, report: Callable[[], Report], stopped: str = ""
    ) -> None:
        quick = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        self._is_open = False
        try:
            found, made = _loggers(trainer), report()
            if found:
                summary = stopped or (made.summary if optimizers.logs else None)
                loggers.conclude(found, self.spikes(optimizers.logs), summary, step_of(trainer))
            if self._verbose and trainer.is_global_zero and not quick and (made.sections or self._batches):
                print(f"\n{made}")  # below the progress bar
        except Exception as error:  # nothing that is only reported may fail a run that is done
            rank_zero_warn(f"`{self._name}` could not print its report: {error!r}")

    def _try(self, log: Callable[[], None]) -> None:
        """Log what only a warning may come of."""
        try:
            log()
        except Exception as error:  # the logger, the device or the disk may be what failed
            rank_zero_warn(f"`{self._name}` could not log its last rows: {str(error) or repr(error)}")

    # --- warnings -----------------------------------------------------------------------------------------------------

    def warn_if_trained_elsewhere(self, trainer: Trainer, optimizers: ClippedOptimizers) -> None:
        """Warn of a checkpoint of a process that has seen no step since others have made them."""
        if not optimizers.logs and trains_elsewhere(trainer):
            rank_zero_warn(
                f"The checkpoint has no norm history of `{self._name}`: this process saw no step, and those that"
                " trained have ended. Their own checkpoints (`ModelCheckpoint`) have it."
            )

    def _warn_of_nonfinite(self, optimizers: ClippedOptimizers) -> None:
        """Warn of non-finite gradients: when the first one is logged, and of further ones at the end of fit."""
        total = _total(optimizers, "nonfinite")
        if self._reaction == "raise" or self._has_scaler or total <= self._nonfinite:
            return  # with a `GradScaler` overflows are the way in which it finds its scale
        self._nonfinite = total
        first = min(
            (log.nonfinite[0] for log in optimizers.logs.values() if log.nonfinite), key=lambda large: large.place.step
        )
        is_applied = self._reaction == "ignore" and not self._has_engine
        rank_zero_warn(
            f"{total} of {_total(optimizers, 'steps')} optimizer steps so far had non-finite gradients (NaN or Inf) and"
            f" were {'applied as they were' if is_applied else 'skipped'}, the first at {first.place.where}. `spikes()`"
            ' of the callback names batches and parameters; `nonfinite="raise"` stops at such a step.'
        )

    def _warn_of_steps(self, optimizers: ClippedOptimizers, has_ended: bool) -> None:
        """Warn, once, of each optimizer whose steps are not clipped."""
        for clipped in optimizers:
            if not clipped.is_reported and (why := clipped.why_not_clipped(has_ended)):
                clipped.is_reported = True
                rank_zero_warn(f"`{self._name}` {why}")

    def spikes(self, logs: Logs) -> list[dict[str, Any]]:
        """The rows of the table of large steps: the non-finite ones first, then the largest of each group."""
        bad = [(prefix, large) for prefix, log in logs.items() for large in log.nonfinite]
        largest = [(prefix, large) for prefix, log in logs.items() for large in log.largest]
        bad.sort(key=lambda pair: pair[1].place.step)
        return [_spike(prefix, large, self._reaction) for prefix, large in [*bad, *largest]]


def _spike(prefix: str, large: LargeStep, nonfinite: str) -> dict[str, Any]:
    names = ", ".join(f"{name} ({share:.0%})" if share == share else name for name, share in large.parameters)
    is_bad = not math.isfinite(large.norm)
    return {
        "optimizer": prefix.strip("/"),
        "step": large.place.step,
        "epoch": large.place.epoch,
        "batches": large.place.batches,
        "norm": large.norm,
        "times": large.times,
        "threshold": large.threshold,
        "clip_coef": large.clip_coef,
        "skipped": "outlier" if large.is_skipped else "non-finite" if is_bad and nonfinite != "ignore" else "",
        "parameters": names,
    }


def joined(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of several groups as one row per step; of a group with several at one step, the first with the first."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for part in parts:
        seen: Counter[int] = Counter()
        for step, row in part:
            found.setdefault((step, seen[step]), {}).update(row)
            seen[step] += 1
    return [(step, row) for (step, _), row in sorted(found.items(), key=lambda item: item[0])]


def _step_rows(logs: Logs) -> list[list[Row]]:
    """The rows of single steps that were not logged yet."""
    parts = []
    for log in logs.values():
        if log.step_rows:
            parts.append(log.step_rows)
            log.step_rows = []
    return parts


def _is_due(optimizers: ClippedOptimizers, every: int) -> bool:
    """Whether the steps of a logging interval reach a multiple of ``every``; one may still be pending."""
    for clipped in optimizers:
        for log in clipped.logs:
            steps = list(log.span or ())
            if clipped.place is not None and clipped.has_pending:
                steps.append(clipped.place.step)
            if steps and (steps[-1] + 1) // every > steps[0] // every:
                return True
    return False


def _show(trainer: Trainer, parts: Sequence[Sequence[Row]]) -> None:
    """Put figures into ``trainer.callback_metrics``; one that is not finite replaces no finite one.

    A run that is stopped at a NaN is not to be stopped for a step that was skipped.
    """
    metrics = trainer._logger_connector._callback_metrics
    for key, value in _figures(parts):
        if math.isfinite(value) or key not in metrics:
            metrics[key] = torch.tensor(value, dtype=torch.float32)


def _figures(parts: Sequence[Sequence[Row]]) -> Iterator[tuple[str, float]]:
    return (figure for part in parts for _, row in part for figure in row.items())


def _saves_here(trainer: Trainer) -> bool:
    """Whether a `ModelCheckpoint` saves at this step, which may watch our figures."""
    every = (getattr(each, "_every_n_train_steps", 0) for each in trainer.checkpoint_callbacks)
    return any(steps and trainer.global_step % steps == 0 for steps in every)


def _total(optimizers: ClippedOptimizers, column: str) -> int:
    """Of all steps of all optimizers; the groups of one have the same steps."""
    totals = ([sum(getattr(row, column) for row in log.bins) for log in clipped.logs] for clipped in optimizers)
    return int(sum(max(of_groups, default=0) for of_groups in totals))


def _loggers(trainer: Trainer) -> list[Logger]:
    """Those that this process logs to."""
    return trainer.loggers if trainer.is_global_zero and log_every(trainer) else []
