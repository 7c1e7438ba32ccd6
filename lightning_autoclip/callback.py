"""The Lightning callbacks: hooks and checkpoint state, no arithmetic."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from lightning_autoclip._checks import check_bool, check_integer, check_number
from lightning_autoclip.clipping.clipper import Algorithm, GradientClipper, NonFinite, StepRecord, clip_together_
from lightning_autoclip.clipping.gradients import Shard
from lightning_autoclip.clipping.optimizers import NonFiniteGradientError, parameters_of
from lightning_autoclip.clipping.policies import Policy
from lightning_autoclip.groups import Groups, check_groups, group_by_id, positions_by_group
from lightning_autoclip.monitoring import loggers
from lightning_autoclip.monitoring.plot import plot_of
from lightning_autoclip.monitoring.recorder import Recorder
from lightning_autoclip.monitoring.report import Report, report_of
from lightning_autoclip.monitoring.runs import STATE_KEY
from lightning_autoclip.monitoring.trace import Trace
from lightning_autoclip.strategies import (
    ZeroEngine,
    check_precision,
    check_strategy,
    grad_scaler,
    gradient_shards,
    zero_engine,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The LightningCLI of `pytorch_lightning`, and before 2.6 its Trainer, take nothing that is not of its own base class.
# Who uses them has imported it; nobody else is made to.
_OTHERS = (sys.modules["pytorch_lightning"].Callback,) if "pytorch_lightning" in sys.modules else ()

_LAYER_DEPTH = 2  # of `log_layers=True`
_ROWS_WITHOUT_LOGGING = 1024  # steps between two summaries with `Trainer(log_every_n_steps=0)`


class GradientClipping(Callback, *_OTHERS):  # type: ignore[misc]
    """Clips gradients at a threshold that a policy sets from the norms of past steps.

    Add it to the Trainer instead of ``gradient_clip_val``, once: a Trainer takes one clipping callback. Each optimizer
    has a record and a threshold of its own, which are saved in every checkpoint and restored by
    ``trainer.fit(ckpt_path=...)``. What happened is logged to every logger of the Trainer, one row per
    ``log_every_n_steps``, under ``autoclip/`` (``autoclip/<optimizer>/`` if there are several).

    Args:
        policy: From recorded norms to a threshold: `Percentile`, `ZScore`, `Constant`, or a `Policy` of your own.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``, as the Trainer's own argument.
        window: How many of the last optimizer steps the policy sees, at least 1; ``None`` for all of them.
        warmup_steps: The first so many steps are recorded, not clipped.
        max_threshold: Upper bound of the threshold, above 0; also used during the warm-up.
        nonfinite: What happens to a step whose gradient holds a NaN or an infinity: ``"skip"``, ``"raise"`` or
            ``"ignore"``; see `GradientClipper`.
        groups: Groups of parameters that each have a record, a threshold, keys and a section of the report of their
            own: ``"param_groups"`` for those of the optimizer, or patterns of parameter names by the group's name, such
            as ``{"encoder": "encoder.*", "heads": ["policy.*", "value.*"]}``; ``rest`` is what none of them matches.
        log_every_step: Also log the exact series ``autoclip/step/grad_norm`` and ``autoclip/step/threshold``.
        log_layers: Also log each module's mean share in the squared norm, from 0 to 1, under ``autoclip_layers/``: of
            modules two names deep, or as many as the number says.
        log_histogram: Also log a histogram of the norms per row, to Weights & Biases.
        alert_above: Send a W&B alert, at most every 10 minutes, when a norm is so many times the threshold, at least 1,
            or, without a loss scaler, not finite. By default none is sent.
        verbose: Print a short report at the end of fit.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
        MisconfigurationException: At the start of fit, where something else clips too, or the strategy or the
            optimizer is not supported.
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
        groups: Groups | None = None,
        log_every_step: bool = False,
        log_layers: bool | int = False,
        log_histogram: bool = False,
        alert_above: float | None = None,
        verbose: bool = True,
    ) -> None:
        self.policy = policy
        self.groups = check_groups(groups)
        self.log_every_step = check_bool("log_every_step", log_every_step)
        depth = int(log_layers) * _LAYER_DEPTH if isinstance(log_layers, bool) else log_layers
        self.layer_depth = check_integer("log_layers", depth, "a bool, or a number of names of at least 0", 0)
        self.log_histogram = check_bool("log_histogram", log_histogram)
        self.alert_above = None
        if alert_above is not None:
            self.alert_above = check_number("alert_above", alert_above, "a number of at least 1, or `None`", 1)
        self.verbose = check_bool("verbose", verbose)
        self._arguments = GradientClipper(  # refuses bad arguments now rather than at the start of fit
            policy,
            gradient_clip_algorithm=gradient_clip_algorithm,
            window=window,
            warmup_steps=warmup_steps,
            max_threshold=max_threshold,
            nonfinite=nonfinite,
        ).arguments
        self.clippers: list[GradientClipper] = []  # one per optimizer, or per group of its parameters
        self.traces: dict[str, Trace] = {}  # likewise, by the prefix of its keys
        self._has_scaler = False
        self._mixed = False  # whether the run has had several policies
        self._recorders: list[Recorder] = []  # likewise
        self._members: list[dict[int, list[int]]] = []  # per optimizer: by its clippers, which parameters they clip
        self._seen: list[list[list[int]]] = []  # per optimizer: the parameters of its own groups at that time, by id
        self._steps_seen: list[int | None] = []  # per optimizer: `global_step` when the hook ran last
        self._first_batch: list[int | None] = []  # per optimizer: of the accumulation window
        self._stage: str | None = None
        self._batch_idx: int | None = None
        self._backward_ran = False
        self._shards: dict[Tensor, Shard] | None = None  # of parameters that several ranks share
        self._engine: ZeroEngine | None = None  # what clips in our place
        self._told = 0  # how many non-finite steps the user knows of
        self._has_told = False  # in this fit
        self._trained = False  # whether the record is that of a fit, rather than empty or loaded

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: one for all settings, so that a changed one is noticed at a resume."""
        return STATE_KEY

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values: what is compared at a resume and shown in the config of a W&B run."""
        policy: Any = self.policy
        known = dataclasses.is_dataclass(policy)
        fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)} if known else {}
        return {"policy": {"name": type(policy).__qualname__, **fields}, **self._arguments, "groups": self.groups}

    @property
    def _settings_of_run(self) -> dict[str, Any]:
        """The settings that hold for every step of the run, resumed ones included."""
        return self.settings | ({"policy": {"name": "several"}} if self._mixed else {})

    def __repr__(self) -> str:
        given = self._arguments if self.groups is None else {**self._arguments, "groups": self.groups}
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        return f"{type(self).__name__}({self.policy!r}, {arguments})"

    # --- start of fit -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would clip twice or wrongly; start a new record for a new training."""
        self._stage = stage
        if stage != "fit":
            return
        if trainer.gradient_clip_algorithm is not None:
            raise MisconfigurationException(
                f"`Trainer(gradient_clip_algorithm={str(trainer.gradient_clip_algorithm)!r})` has no effect on"
                f" `{type(self).__name__}`. Remove it there, and give `gradient_clip_algorithm` to the callback."
            )
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"`Trainer(gradient_clip_val={trainer.gradient_clip_val})` and `{type(self).__name__}` would both clip."
                " Remove `gradient_clip_val` (`GradientClipping(Constant(...))` clips at a fixed threshold)."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if sum(isinstance(callback, GradientClipping) for callback in callbacks) > 1:
            raise MisconfigurationException(
                "The Trainer has several clipping callbacks, and each would record what the one before it has clipped."
                " Keep one; several optimizers need only one."
            )
        hook = pl_module.configure_gradient_clipping
        if pl_module.automatic_optimization and not hook.__module__.startswith(("lightning.", "pytorch_lightning.")):
            raise MisconfigurationException(
                f"`{type(pl_module).__name__}.configure_gradient_clipping` is overridden and would clip what"
                f" `{type(self).__name__}` has clipped. Remove the override or the callback."
            )
        check_strategy(trainer.strategy, self._arguments["gradient_clip_algorithm"])
        check_precision(trainer.precision_plugin)
        if self._trained and trainer.global_step == 0:  # fitting on with the same Trainer keeps the record
            self.clippers, self.traces, self._members, self._mixed = [], {}, [], False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each optimizer its clipper, or check that the restored ones fit."""
        optimizers = trainer.optimizers
        if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
            raise MisconfigurationException(
                "LBFGS computes its gradients several times per step and searches along them; clipping them breaks the"
                f" search. Remove `{type(self).__name__}` or use another optimizer."
            )
        self._shards = gradient_shards(trainer)
        self._has_scaler = grad_scaler(trainer) is not None
        self._engine = zero_engine(trainer, skips=self._arguments["nonfinite"] == "skip")
        if self._engine is not None and self.groups is not None:
            raise MisconfigurationException(
                "DeepSpeed measures and clips the whole gradient, so it has no `groups`. Remove them, or use FSDP."
            )
        self._take_up(optimizers, pl_module)
        self._recorders = [self._new_recorder(prefix) for prefix in self.traces]
        self._steps_seen, self._first_batch = [None] * len(optimizers), [None] * len(optimizers)
        self._batch_idx, self._trained = None, True
        for clipper in self.clippers:
            clipper.release()  # a second fit has new optimizers
            clipper.clipped_norm_every = min(max((_log_every(trainer) or 50) // 5, 1), 10)  # five times per row
        self._told, self._has_told = self._total("nonfinite_total"), False
        keys = [key for recorder in self._recorders for key in recorder.keys]
        loggers.describe(_loggers(trainer), keys, self.settings)

    # --- every step ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the batch, for error messages and for steps without a backward pass."""
        self._batch_idx, self._backward_ran = batch_idx, False
        self._first_batch = [batch_idx if first is None else first for first in self._first_batch]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this batch has computed gradients."""
        self._backward_ran = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, record, decide, clip."""
        if self._engine is not None and not self._engine.is_at_a_step():
            return
        index = next(i for i, candidate in enumerate(trainer.optimizers) if candidate is optimizer)
        scaler = grad_scaler(trainer)
        if trainer.fit_loop._skip_backward:
            return  # StochasticWeightAveraging passes over the data once more: the gradients are stale
        if scaler is not None and pl_module.automatic_optimization and not self._backward_ran:
            self._steps_seen[index] = trainer.global_step
            return  # `training_step` returned None: Lightning neither unscales the gradients nor steps
        if self._steps_seen[index] == trainer.global_step:
            raise MisconfigurationException(
                f"`{type(optimizer).__name__}` computes its gradients several times per step, which"
                f" `{type(self).__name__}` does not support. Remove the callback or use another optimizer."
            )
        self._steps_seen[index] = trainer.global_step
        try:
            records = self._clip(trainer, pl_module, index, scaler)
        except NonFiniteGradientError as error:
            self._keep(trainer, pl_module, index, error.records)
            raise self._located(error, trainer, pl_module) from None
        self._keep(trainer, pl_module, index, records)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a row every ``log_every_n_steps``."""
        every = _log_every(trainer) or _ROWS_WITHOUT_LOGGING
        if any(recorder.is_due(every) for recorder in self._recorders):
            self._flush(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the latest figures to what monitors them, however short the epoch."""
        self._show(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the latest figures to what monitors them at the end of this validation."""
        if self._stage == "fit":
            self._show(trainer)

    # --- end of fit and checkpoints -----------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left and what it amounts to; warn of optimizers that stepped past the callback."""
        self._flush(trainer)
        self._tell_of_nonfinite(trainer)
        quick = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        try:
            self._conclude(trainer)
            if self.verbose and trainer.is_global_zero and not quick:
                print(f"\n{self.report()}")  # below the progress bar
        except Exception as error:  # nothing that is only told may fail a training that is done
            rank_zero_warn(f"`{type(self).__name__}` could not print its report: {error!r}")
        if self._engine is not None:
            self._engine.release()
        for optimizer, seen in zip(trainer.optimizers, self._steps_seen, strict=True):
            if seen is None and self._batch_idx is not None:
                rank_zero_warn(
                    f"`{type(self).__name__}` saw no step of `{type(optimizer).__name__}` in this fit, so none was"
                    " clipped. In manual optimization, step what `self.optimizers()` returns: `optimizer.step()`, not"
                    " `optimizer.optimizer.step()`."
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what is left before the run ends."""
        try:
            self._flush(trainer)
            self._conclude(trainer)
        except Exception as error:  # the device or the disk may be what failed: the first exception is the one to show
            rank_zero_warn(f"`{type(self).__name__}` could not log its last rows: {error}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Log what the checkpoint counts as done: a resumed run neither repeats nor misses a row."""
        self._flush(trainer)
        if self._engine is not None:
            self._engine.release()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn of a checkpoint that was written without this callback."""
        began = checkpoint["global_step"] > 0  # the learning rate finder's checkpoint is of step 0
        if self._stage == "fit" and began and not checkpoint["callbacks"].get(self.state_key):
            self.clippers, self.traces, self._members = [], {}, []
            rank_zero_warn(
                f"The checkpoint was written without `{type(self).__name__}`, so the record of gradient norms starts"
                " empty: the first thresholds come from few steps. Use `warmup_steps` to observe first."
            )

    def state_dict(self) -> dict[str, Any]:
        """The record of each optimizer, and the settings that it was made with."""
        if not self.clippers:
            return {}
        for recorder in self._recorders:
            recorder.summarise()  # Lightning asks before `on_save_checkpoint`
        return {
            "settings": self.settings,
            "optimizers": [clipper.state_dict() for clipper in self.clippers],
            "has_scaler": self._has_scaler,
            "several_policies": self._mixed,
            "traces": {prefix: trace.state_dict() for prefix, trace in self.traces.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the records.

        With another policy, window or other setting the recorded norms are kept, the newest ones if the window is
        smaller, and a warning says so.

        Raises:
            ValueError: The state is damaged, not of this callback, or of the other ``gradient_clip_algorithm``, whose
                record has another unit.
        """
        if self._stage not in ("fit", None):
            return  # `trainer.test(ckpt_path=...)` must not take back what a later fit goes on with
        try:
            self._mixed = bool(state_dict["several_policies"])
            self._compare_settings(state_dict["settings"])
            states = list(state_dict["optimizers"])
            clippers = [self._new_clipper() for _ in states]
            for clipper, state in zip(clippers, states, strict=True):
                clipper.load_state_dict(state)
            if not clippers:
                raise KeyError("optimizers")
            traces = {prefix: Trace.from_state(state) for prefix, state in state_dict["traces"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The checkpoint's state of `{self.state_key}` is damaged or not of this callback ({error!r}). Resume"
                " from another checkpoint, or delete that entry to start with an empty record."
            ) from error
        if len(clippers) != len(self.clippers):
            self._members = []  # known once there are optimizers
        # In the middle of a fit, where the learning rate finder takes trial steps back, what runs goes on with these.
        for clipper, before in zip(clippers, self.clippers, strict=False):
            clipper.clipped_norm_every = before.clipped_norm_every
        for recorder, trace in zip(self._recorders, traces.values(), strict=False):
            recorder.trace = trace
        self.clippers, self.traces, self._has_scaler = clippers, traces, bool(state_dict["has_scaler"])
        self._trained = self._stage == "fit"  # by hand, it is for the fit to come

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the stage that :meth:`setup` entered."""
        self._stage = None

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's `log` on every callback, and with it the whole model.
        kept = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}
        return {**kept, "_shards": None, "_engine": None}  # of this process

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What clipping did so far, and what it may hide: print it, or see `Report`.

        Steps since the last logged row, validation or end of epoch are left out while a fit is going on.
        """
        return report_of(self.traces, self._settings_of_run, self._has_scaler)

    def spikes(self) -> list[dict[str, Any]]:
        """The first steps that were not finite, then those with the largest norms of the run, largest first.

        Returns:
            At most 20 of each, for every optimizer: ``optimizer`` (the prefix of its keys), ``step`` (of the loggers),
            ``epoch``, ``batches``, ``norm``, ``times`` (in units of the typical norm up to there), ``threshold``,
            ``clip_coef`` and ``parameters`` (those with the largest shares of the squared norm, or those that were
            not finite).
        """
        return [
            {"optimizer": prefix.strip("/"), **spike.to_dict()}
            for prefix, trace in self.traces.items()
            for spike in [*trace.nonfinite, *trace.largest]
        ]

    def plot(self) -> Figure:
        """Norms on a log scale, thresholds, clipped and non-finite steps, the largest norms: needs matplotlib."""
        return plot_of(self.traces, self._settings_of_run)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _new_clipper(self) -> GradientClipper:
        return GradientClipper(self.policy, **self._arguments)

    def _clip(
        self, trainer: Trainer, pl_module: LightningModule, index: int, scaler: GradScaler | None
    ) -> Sequence[StepRecord | None]:
        optimizer = trainer.optimizers[index]
        if self._engine is not None:
            record = self.clippers[index].record_(self._engine.norm(), self._engine.optimizer.loss_scale)
            self._engine.clip_at(record.threshold)
            return [record]
        if self.groups is None:
            return [self.clippers[index].clip_(optimizer, scaler, self._shards)]
        if _ids(optimizer) != self._seen[index]:  # parameters have joined, or changed places
            self._take_in(trainer, pl_module, index)
        members = self._members[index]
        clippers = [(self.clippers[i], positions) for i, positions in members.items()]
        return clip_together_(clippers, optimizer, scaler, self._shards)

    def _keep(
        self, trainer: Trainer, pl_module: LightningModule, index: int, records: Sequence[StepRecord | None]
    ) -> None:
        """Hand a step's records to their recorders, with what only the Trainer knows."""
        last, first = self._batch_idx or 0, self._first_batch[index]
        self._first_batch[index] = None
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        where = {"step": step, "epoch": trainer.current_epoch, "last_batch": last}
        where["first_batch"] = last if first is None else first
        for i, record in zip(self._members[index], records, strict=True):
            if record is None:
                continue
            recorder, norms = self._recorders[i], record.parameter_norms
            if norms is not None and len(norms) != len(recorder.trace.names):  # parameters have joined
                self._flush(trainer)
                self._name_parameters(recorder.trace, trainer.optimizers[index], pl_module, self._members[index][i])
            recorder.add(record, **where)

    def _compare_settings(self, written: dict[str, Any]) -> None:
        changed = {key: value for key, value in self.settings.items() if written[key] != value}
        if "gradient_clip_algorithm" in changed:
            raise ValueError(
                f"The checkpoint's record was made with gradient_clip_algorithm={written['gradient_clip_algorithm']!r},"
                " whose thresholds have another unit. Resume with that algorithm, or delete"
                f" `checkpoint['callbacks']['{self.state_key}']` to start with an empty record."
            )
        kinds = [sorted(one) if isinstance(one, dict) else one for one in (written["groups"], self.groups)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"The checkpoint's records were made with groups={written['groups']!r}, but this run has"
                f" groups={self.groups!r}. Resume with those groups, or delete"
                f" `checkpoint['callbacks']['{self.state_key}']` to start with empty records."
            )
        self._mixed = self._mixed or "policy" in changed
        if changed:
            was = ", ".join(f"{key}={written[key]!r}" for key in changed)
            now = ", ".join(f"{key}={value!r}" for key, value in changed.items())
            rank_zero_warn(f"The checkpoint was written with {was}; this run goes on with {now} on the same record.")

    def _take_up(self, optimizers: list[Optimizer], pl_module: LightningModule) -> None:
        """Give each optimizer, or each group, its clipper and its trace: those that were restored, or new ones."""
        own = list(zip(_prefixes(optimizers), optimizers, strict=True))
        found = [{prefix + group: at for group, at in self._groups(one, pl_module).items()} for prefix, one in own]
        prefixes = [prefix for of_optimizer in found for prefix in of_optimizer]
        held = dict(zip(self.traces, self.clippers, strict=False))
        # A group may have joined after the last step of the checkpoint.
        fits = len(self.clippers) == len(prefixes) if self.groups is None else held.keys() <= set(prefixes)
        if self.clippers and not fits:
            raise MisconfigurationException(
                f"`{type(self).__name__}` holds {len(self.clippers)} records ({', '.join(held)}), but this run needs"
                f" {len(prefixes)} ({', '.join(prefixes)}). Resume with the optimizers and the groups that the run was"
                " started with."
            )
        if not self.clippers:
            self.clippers = [self._new_clipper() for _ in prefixes]
        elif self.groups is not None:
            self.clippers = [held.get(prefix) or self._new_clipper() for prefix in prefixes]
        self.traces = {prefix: self.traces.get(prefix, Trace()) for prefix in prefixes}
        self._members, self._seen = [], [_ids(optimizer) for optimizer in optimizers]
        for (_, optimizer), of_optimizer in zip(own, found, strict=True):
            self._members.append({prefixes.index(prefix): at for prefix, at in of_optimizer.items()})
            for prefix, at in of_optimizer.items():
                self._name_parameters(self.traces[prefix], optimizer, pl_module, at)

    def _take_in(self, trainer: Trainer, pl_module: LightningModule, index: int) -> None:
        """An optimizer's parameters have changed during the fit: which clippers they belong to, maybe new ones."""
        self._flush(trainer)  # what is held has the places of before
        optimizer = trainer.optimizers[index]
        prefix, prefixes = _prefixes(trainer.optimizers)[index], list(self.traces)
        self._members[index], self._seen[index] = {}, _ids(optimizer)
        for group, positions in self._groups(optimizer, pl_module).items():
            if prefix + group not in self.traces:
                prefixes.append(prefix + group)
                self.traces[prefix + group] = Trace()
                self.clippers.append(self._new_clipper())
                self.clippers[-1].clipped_norm_every = self.clippers[0].clipped_norm_every
                self._recorders.append(self._new_recorder(prefix + group))
            self._members[index][prefixes.index(prefix + group)] = positions
            self._name_parameters(self.traces[prefix + group], optimizer, pl_module, positions)

    def _groups(self, optimizer: Optimizer, pl_module: LightningModule) -> dict[str, list[int]]:
        """The parameters of an optimizer by group, whose names end in a slash; all under no name without groups."""
        if self.groups is None:
            return {"": list(range(len(list(parameters_of(optimizer)))))}
        group_of = None if isinstance(self.groups, str) else group_by_id(self.groups, _named(pl_module))
        return {f"{group}/": at for group, at in positions_by_group(optimizer, group_of).items()}

    def _new_recorder(self, prefix: str) -> Recorder:
        by_value = self._arguments["gradient_clip_algorithm"] == "value"
        return Recorder(prefix, by_value, self.log_every_step, self.layer_depth, self.traces[prefix])

    def _name_parameters(
        self, trace: Trace, optimizer: Optimizer, pl_module: LightningModule, positions: Sequence[int]
    ) -> None:
        names, parameters = _names(pl_module), list(parameters_of(optimizer))
        chosen = [(i, parameters[i]) for i in positions] if self.groups is not None else list(enumerate(parameters))
        known = [names.get(id(parameter), f"parameter {i}") for i, parameter in chosen]
        # What FSDP1 leaves in a parameter is a part of it, of a size that says nothing.
        trace.follow(known, [0 if self._shards else parameter.numel() for _, parameter in chosen])

    def _total(self, count: str) -> int:
        """Of all steps of all optimizers; the groups of one have the same steps."""
        return sum(max((getattr(self.clippers[i], count) for i in members), default=0) for members in self._members)

    def _flush(self, trainer: Trainer) -> None:
        """Send what is held to every logger."""
        for clipper, recorder in zip(self.clippers, self._recorders, strict=False):
            rows, points = recorder.flush()
            clipper.measure_next()  # each row knows what clipping did
            loggers.send(
                _loggers(trainer),
                recorder.prefix,
                rows,
                points,
                histogram=self.log_histogram,
                alert_above=self.alert_above,
                alert_nonfinite=not self._has_scaler,
            )
        self._show(trainer)
        if not self._has_told:
            self._tell_of_nonfinite(trainer)

    def _conclude(self, trainer: Trainer) -> None:
        """Log the spike table, and to W&B the report's verdicts."""
        if told := _loggers(trainer):
            health = self.report().summary if self.traces else None
            loggers.conclude(told, self.spikes(), health, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _tell_of_nonfinite(self, trainer: Trainer) -> None:
        """Warn of non-finite gradients: when the first one is logged, and of further ones at the end of fit."""
        reaction = self._arguments["nonfinite"]
        if reaction == "raise" or grad_scaler(trainer) is not None:
            return  # with a `GradScaler` overflows are the way in which it finds its scale
        total = self._total("nonfinite_total")
        if total <= self._told:
            return
        self._told, self._has_told = total, True
        done = "applied as they were" if reaction == "ignore" and self._engine is None else "left out"
        rank_zero_warn(
            f"{total} of {self._total('steps')} optimizer steps so far had a NaN or an"
            f" infinity in their gradient and were {done}. `spikes()` of the callback names batches and parameters;"
            ' `nonfinite="raise"` stops at such a step.'
        )

    def _show(self, trainer: Trainer) -> None:
        """Put the latest summary into ``trainer.callback_metrics``, for `ModelCheckpoint` and `EarlyStopping`."""
        for recorder in self._recorders:
            trainer.callback_metrics.update({key: tensor(value) for key, value in recorder.summarise().items()})

    def _located(
        self, error: NonFiniteGradientError, trainer: Trainer, pl_module: LightningModule
    ) -> NonFiniteGradientError:
        """The error with what only the Trainer knows: step, batch and the parameters' names."""
        names = _names(pl_module)
        bad = ", ".join(names.get(id(parameter), "(not in the model)") for parameter in error.parameters)
        which = f" They are: {bad}." if bad else ""  # an engine does not tell
        where = f"At optimizer step {trainer.global_step} (epoch {trainer.current_epoch}, batch {self._batch_idx}):"
        return NonFiniteGradientError(
            f'{where} {error}{which} Look at that batch, or use `nonfinite="skip"` to leave such steps out.',
            error.parameters,
            error.records,
        )


def _log_every(trainer: Trainer) -> int:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return every


def _loggers(trainer: Trainer) -> list[Logger]:
    """Those that are to be told something by this process."""
    return trainer.loggers if trainer.is_global_zero and _log_every(trainer) else []


def _prefixes(optimizers: list[Optimizer]) -> list[str]:
    """``autoclip/`` for one optimizer; for several their class names too, numbered as `LearningRateMonitor` does."""
    if len(optimizers) == 1:
        return ["autoclip/"]
    names: list[str] = []
    for optimizer in optimizers:
        name = type(optimizer).__name__
        same = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{same}" if same else name)
    return [f"autoclip/{name}/" for name in names]


def _ids(optimizer: Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def _named(pl_module: LightningModule) -> list[tuple[int, str]]:
    """The ids of parameters with their names as the user wrote them, without what wrappers put in between."""
    wrappers = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return [
        (id(parameter), ".".join(part for part in name.split(".") if part not in wrappers))
        for name, parameter in pl_module.named_parameters(remove_duplicate=False)
    ]


def _names(pl_module: LightningModule) -> dict[int, str]:
    """By a parameter's id its name, the first of several."""
    return dict(reversed(_named(pl_module)))
