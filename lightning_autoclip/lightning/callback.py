"""The Lightning callback: hooks and the state in a checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoclip._checks import check_bool, check_integer
from lightning_autoclip.checkpoint import STATE_KEY, VERSION, check_callback_state
from lightning_autoclip.clipper import GradientClipper
from lightning_autoclip.lightning.clipped_optimizers import ClippedOptimizers
from lightning_autoclip.lightning.monitor import Monitor
from lightning_autoclip.lightning.strategies import InPlace, ZeroEngine, check_trainer, clipping_under
from lightning_autoclip.lightning.trainer import (
    batch_index,
    grad_scaler,
    located,
    log_every,
    parameter_names,
    step_of,
)
from lightning_autoclip.param_groups import Groups, check_groups
from lightning_autoclip.plot import plot_of
from lightning_autoclip.policies import Policy
from lightning_autoclip.report import Report, report_of
from lightning_autoclip.settings import Algorithm, Clipping, NonFinite, changes_of, flat_settings, settings_of_run
from lightning_autoclip.skip import NonFiniteGradientError
from lightning_autoclip.steplog import StepLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER_DEPTH = 2  # of `log_layers=True`

# The CLI of `pytorch_lightning`, and before 2.6 its Trainer, take only its own callbacks. Its users have imported it.
_OTHERS = (sys.modules["pytorch_lightning"].Callback,) if "pytorch_lightning" in sys.modules else ()


class GradientClipping(Callback, *_OTHERS):  # type: ignore[misc]
    """Clips gradients at a threshold that a policy sets from the norms of past steps.

    Add it to the Trainer instead of ``gradient_clip_val``. Each optimizer has a norm history and a threshold of its
    own, which are saved in every checkpoint and restored by ``trainer.fit(ckpt_path=...)``. Every logger gets one row
    per ``log_every_n_steps``, under ``autoclip/`` (``autoclip/<optimizer>/`` if there are several).

    Args:
        policy: Turns the norm history into a threshold: `Percentile`, `ZScore`, `Constant`, or a `Policy` of your own.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``, as the Trainer's own argument.
        window: How many of the last optimizer steps the policy sees, at least 1; ``None`` for all of them.
        warmup_steps: The first so many steps are observed; only ``max_threshold`` and ``max_update_ratio`` limit them.
        max_threshold: Upper bound of the threshold, above 0; also used during the warm-up.
        max_update_ratio: No step of SGD moves a weight matrix by more than this part of its norm: see `Clipping`.
        skip_above: A step whose norm is so many times the median, at least 1, is skipped as an outlier: `Clipping`.
        nonfinite: What happens at non-finite gradients: ``"skip"``, ``"raise"`` or ``"ignore"``: see `Clipping`.
        groups: Groups of parameters with a history, a threshold and log keys each: ``"param_groups"`` for those of the
            optimizer, or patterns of parameter names by the group's name, such as
            ``{"encoder": "encoder.*", "heads": ["policy.*", "value.*"]}``; ``rest`` is what none of them matches.
        log_every_step: Also log the exact series ``autoclip/step/grad_norm`` and ``autoclip/step/threshold``.
        log_layers: Also log each module's mean share of the squared norm, from 0 to 1, under ``autoclip_layers/``, and
            its mean norm, under ``autoclip_layers_norm/``: of modules two names deep, or as many as the number says.
        log_histogram: Also log a histogram of the norms per row, to Weights & Biases.
        alert_above: Send a W&B alert when a norm is so many times the usual one, at least 1, and without a loss scaler
            another one at a non-finite step; at most every 10 minutes each.
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
        max_update_ratio: float | None = None,
        skip_above: float | None = None,
        nonfinite: NonFinite = "skip",
        groups: Groups | None = None,
        log_every_step: bool = False,
        log_layers: bool | int = False,
        log_histogram: bool = False,
        alert_above: float | None = None,
        verbose: bool = True,
    ) -> None:
        self._clipping = Clipping(
            policy,
            gradient_clip_algorithm=gradient_clip_algorithm,
            window=window,
            warmup_steps=warmup_steps,
            max_threshold=max_threshold,
            max_update_ratio=max_update_ratio,
            skip_above=skip_above,
            nonfinite=nonfinite,
        )
        self._groups: Any = check_groups(groups)
        depth = int(log_layers) * _LAYER_DEPTH if isinstance(log_layers, bool) else log_layers
        layer_depth = check_integer("log_layers", depth, "a bool, or a number of names of at least 0", 0)
        every_step = check_bool("log_every_step", log_every_step)
        self._optimizers = ClippedOptimizers(self._clipping, self._groups, every_step, layer_depth)
        self._monitor = Monitor(type(self).__name__, verbose, log_histogram, alert_above)
        self._strategy: InPlace | ZeroEngine | None = None
        self._trainer: Trainer | None = None  # of the fit that is going on
        self._stage: str | None = None
        self._batch_idx, self._backward_ran = 0, False
        self._has_scaler = self._several_policies = False
        self._trained = False  # whether the histories are those of a fit, rather than empty or loaded by hand

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: one for all settings, so that a changed one is noticed at a resume."""
        return STATE_KEY

    @property
    def policy(self) -> Policy:
        """Turns the norm history into a threshold."""
        return self._clipping.policy

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that decide a step, as plain values: compared at a resume, saved and logged."""
        return {**self._clipping.to_dict(), "groups": self._groups}

    @property
    def clippers(self) -> list[GradientClipper]:
        """One per optimizer, or per group of its parameters: their histories and thresholds."""
        return list(self._optimizers.clippers.values())

    @property
    def logs(self) -> dict[str, StepLog]:
        """Likewise what happened, by the prefix of their keys."""
        return self._optimizers.logs

    def __repr__(self) -> str:
        groups = "" if self._groups is None else f", groups={self._groups!r}"
        return f"{type(self).__name__}({self._clipping!r}{groups})"

    # --- start of fit -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would clip twice or wrongly; start with empty histories if this is a new run."""
        self._stage = stage
        if stage != "fit":
            return
        check_trainer(trainer, pl_module, type(self).__name__, GradientClipping, self._clipping)
        self._trainer = trainer
        if trainer.global_step == 0:  # fitting on with the same Trainer is no new run
            self._reset(keeps_histories=not self._trained)  # which were loaded by hand

    def _reset(self, keeps_histories: bool = False) -> None:
        self._optimizers.reset(keeps_histories)
        self._several_policies = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each optimizer its clippers, or check that the restored ones fit."""
        self._strategy = clipping_under(trainer, self._clipping, self._groups is not None)
        self._has_scaler, self._trained = grad_scaler(trainer) is not None, True
        has_engine = isinstance(self._strategy, ZeroEngine)
        every = min(max((log_every(trainer) or 50) // 5, 1), 10)  # five times per row
        self._optimizers.attach(trainer.optimizers, parameter_names(pl_module), has_engine, every)
        settings = flat_settings(self.settings) | ({"several_policies": True} if self._several_policies else {})
        self._monitor.begin(trainer, self._optimizers, settings, self._has_scaler, has_engine)

    # --- every step ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new accumulation window, as the following."""
        self._optimizers.begin_window()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin a new accumulation window."""
        self._optimizers.begin_window(optimizer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the batch, for steps without a backward pass."""
        self._batch_idx, self._backward_ran = batch_idx, False
        for clipped in self._optimizers:
            clipped.begin_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the first batch of an accumulation window."""
        self._batch_idx = batch_index(trainer, self._batch_idx)
        if not self._backward_ran:  # the others of a batch may follow on steps of it
            self._optimizers.note_batch(self._batch_idx)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this batch has computed gradients."""
        self._backward_ran = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip; leave the record pending."""
        if self._strategy is None or not self._strategy.is_at_a_step():
            return
        clipped = self._optimizers.of(optimizer, trainer.optimizers, pl_module)
        clipped.announce(self._backward_ran or not pl_module.automatic_optimization, trainer.global_step)
        scaler = grad_scaler(trainer)
        if trainer.fit_loop._skip_backward:
            return  # StochasticWeightAveraging passes over the data once more: the gradients are stale
        if scaler is not None and pl_module.automatic_optimization and not self._backward_ran:
            return  # `training_step` returned None: Lightning neither unscales the gradients nor steps
        if clipped.computes_again:
            raise MisconfigurationException(
                f"`{type(optimizer).__name__}` computes its gradients several times per step, which"
                f" `{type(self).__name__}` does not support. Remove the callback or use another optimizer."
            )
        place = clipped.place_of(step_of(trainer), trainer.current_epoch, batch_index(trainer, self._batch_idx))
        try:
            records = self._strategy.clip(clipped.groups, optimizer, scaler, place)
        except NonFiniteGradientError as error:
            raise located(error, pl_module, place) from None
        clipped.measured += any(record is not None for record in records)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Commit the steps of the batch; log a row if one is due; warn of optimizers whose steps are not clipped."""
        self._monitor.end_batch(trainer, self._optimizers)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figures of the logging interval so far to whatever watches the validation."""
        if self._stage == "fit" and not trainer.sanity_checking:
            self._monitor.show(trainer, self._optimizers)

    # --- end of fit and checkpoints -----------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left and what it amounts to; warn of optimizers that stepped past the callback."""
        self._monitor.end(trainer, self._optimizers, self.report)
        if self._strategy is not None:
            self._strategy.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what is left, and print the report, before the run ends."""
        if trainer is self._trainer:
            self._monitor.interrupt(trainer, self._optimizers, self.report, exception)
            self._optimizers.release()  # there will be no `teardown`

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have an engine forget the threshold, which it would save."""
        self._monitor.warn_if_trained_elsewhere(trainer, self._optimizers)
        if self._strategy is not None:
            self._strategy.release()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn of a checkpoint that was written without this callback."""
        began = checkpoint["global_step"] > 0  # the learning rate finder's checkpoint is of step 0
        if self._stage == "fit" and began and not checkpoint["callbacks"].get(self.state_key):
            self._reset()
            rank_zero_warn(
                f"The checkpoint was written without `{type(self).__name__}`, so the norm history starts empty: the"
                " first thresholds come from few steps. Use `warmup_steps` to observe first."
            )

    def state_dict(self) -> dict[str, Any]:
        """The histories and logs of the steps that were made, and the settings that they were made with."""
        if not self._optimizers.clippers:
            return {}
        if self._trainer is not None:
            self._optimizers.commit_if_counted(self._trainer.global_step)
        return {
            "version": VERSION,
            "settings": self.settings,
            "several_policies": self._several_policies,
            "has_scaler": self._has_scaler,
            "groups": self._optimizers.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the histories.

        With another policy, window or other setting the norms are kept, the newest ones if the window is smaller, and a
        warning says so.

        Raises:
            ValueError: The state is damaged, of another version, or of other ``groups`` or another
                ``gradient_clip_algorithm``, whose norms have another unit.
        """
        if self._stage not in ("fit", None):
            return  # `trainer.test(ckpt_path=...)` must not take back what a later fit continues with
        check_callback_state(state_dict)
        changes = changes_of(state_dict["settings"], self.settings, self.state_key)
        self._optimizers.load_state_dict(state_dict["groups"])
        if changes:
            rank_zero_warn(f"The checkpoint was written with other settings, and this run continues with: {changes}.")
        self._has_scaler = state_dict["has_scaler"]
        has_policy = state_dict["settings"]["policy"] == self.settings["policy"]
        self._several_policies = state_dict["several_policies"] or not has_policy
        self._trained = self._stage == "fit"  # by hand, it is for the fit to come

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the optimizers' own steps back."""
        if stage == "fit":
            self._optimizers.commit_if_counted(trainer.global_step)
            self._optimizers.release()
            self._trainer = None
        self._stage = None

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's `log` on every callback, and with it the whole model.
        kept = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}
        return {**kept, "_strategy": None, "_trainer": None}  # of this process

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What clipping did so far, and what it may hide: print it, or see `Report`."""
        return report_of(self.logs, settings_of_run(self.settings, self._several_policies), self._has_scaler)

    def spikes(self) -> list[dict[str, Any]]:
        """The first steps with non-finite gradients, then those with the largest norms of the run, largest first.

        Returns:
            At most 20 of each, for every optimizer: ``optimizer`` (the prefix of its keys), ``step`` (of the loggers),
            ``epoch``, ``batches``, ``norm``, ``times`` (in units of the geometric mean norm up to there),
            ``threshold``, ``clip_coef``, ``skipped`` (why: as an ``"outlier"`` or ``"non-finite"``; else empty) and
            ``parameters`` (those with the largest shares of the squared norm, or those that were not finite).
        """
        return self._monitor.spikes(self.logs)

    def plot(self) -> Figure:
        """Norms on a log scale, thresholds, clipped and non-finite steps, the largest norms: needs matplotlib."""
        return plot_of(self.logs, settings_of_run(self.settings, self._several_policies))
