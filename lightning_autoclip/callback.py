"""The Lightning callback: hooks and checkpoint state, no arithmetic and no bookkeeping."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoclip.clipping.clipper import GradientClipper
from lightning_autoclip.clipping.optimizers import NonFiniteGradientError
from lightning_autoclip.clipping.policies import Policy
from lightning_autoclip.clipping.threshold import Algorithm, NonFinite
from lightning_autoclip.groups import Groups
from lightning_autoclip.monitoring.plot import plot_of
from lightning_autoclip.monitoring.report import Report, report_of
from lightning_autoclip.monitoring.trace import Trace
from lightning_autoclip.scopes import Scopes
from lightning_autoclip.settings import STATE_KEY, Settings
from lightning_autoclip.strategies import (
    InPlace,
    ZeroEngine,
    check_trainer,
    clipping_under,
    grad_scaler,
    parameter_names,
)
from lightning_autoclip.telling import Telling, located, log_every, step_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The CLI of `pytorch_lightning`, and before 2.6 its Trainer, take only its own callbacks. Who uses it has imported it.
_OTHERS = (sys.modules["pytorch_lightning"].Callback,) if "pytorch_lightning" in sys.modules else ()


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
        warmup_steps: The first so many steps are recorded, and clipped at most by the two bounds that follow.
        max_threshold: Upper bound of the threshold, above 0; also used during the warm-up.
        max_update_ratio: No step of SGD moves a weight matrix by more than this part of its norm: `GradientClipper`.
        skip_above: A step whose norm is so many times the typical one, at least 1, is left out: `GradientClipper`.
        nonfinite: What happens at a NaN or an infinity: ``"skip"``, ``"raise"`` or ``"ignore"``: `GradientClipper`.
        groups: Groups of parameters that each have a record, a threshold, keys and a section of the report of their
            own: ``"param_groups"`` for those of the optimizer, or patterns of parameter names by the group's name, such
            as ``{"encoder": "encoder.*", "heads": ["policy.*", "value.*"]}``; ``rest`` is what none of them matches.
        log_every_step: Also log the exact series ``autoclip/step/grad_norm`` and ``autoclip/step/threshold``.
        log_layers: Also log each module's mean share in the squared norm, from 0 to 1, under ``autoclip_layers/``, and
            its mean norm, under ``autoclip_layers_norm/``: of modules two names deep, or as many as the number says.
        log_histogram: Also log a histogram of the norms per row, to Weights & Biases.
        alert_above: Send a W&B alert when a norm is so many times the typical one, at least 1, as the verdict "spikes"
            measures it, and without a loss scaler one of its own when it is not finite; at most every 10 minutes each.
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
        self._settings = Settings(
            policy,
            groups,
            gradient_clip_algorithm=gradient_clip_algorithm,
            window=window,
            warmup_steps=warmup_steps,
            max_threshold=max_threshold,
            max_update_ratio=max_update_ratio,
            skip_above=skip_above,
            nonfinite=nonfinite,
        )
        self._scopes = Scopes(self._settings, log_every_step, log_layers)
        self._telling = Telling(type(self).__name__, self._scopes, self._settings, verbose, log_histogram, alert_above)
        self._clipping: InPlace | ZeroEngine | None = None
        self._trainer: weakref.ref[Trainer] | None = None  # of the fit that was begun last
        self._stage: str | None = None
        self._batch_idx: int | None = None
        self._backward_ran = False
        self._trained = False  # whether the record is that of a fit, rather than empty or loaded

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: one for all settings, so that a changed one is noticed at a resume."""
        return STATE_KEY

    @property
    def policy(self) -> Policy:
        """From recorded norms to a threshold."""
        return self._settings.policy

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values: what is compared at a resume and shown in the config of a W&B run."""
        return self._settings.to_dict()

    @property
    def clippers(self) -> list[GradientClipper]:
        """One per optimizer, or per group of its parameters: their records and thresholds."""
        return [scope.clipper for scope in self._scopes]

    @property
    def traces(self) -> dict[str, Trace]:
        """Likewise what happened, by the prefix of their keys."""
        return self._scopes.traces

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings!r})"

    # --- start of fit -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would clip twice or wrongly; start a new record for a new training."""
        self._stage = stage
        if stage != "fit":
            return
        is_anothers = self._trainer is not None and self._trainer() is not trainer
        self._trainer = weakref.ref(trainer)
        algorithm = self._settings.arguments["gradient_clip_algorithm"]
        check_trainer(trainer, pl_module, type(self).__name__, GradientClipping, algorithm)
        self._scopes.leave(trainer.global_step)
        if self._trained and (trainer.global_step == 0 or is_anothers):  # fitting on with the same Trainer keeps it
            self._scopes.forget()
            self._settings.several_policies = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each optimizer its scopes, or check that the restored ones fit."""
        skips, settings = self._settings.arguments["nonfinite"] == "skip", self._settings
        self._clipping = clipping_under(trainer, settings.groups is not None, skips, settings.skips_outliers)
        self._settings.has_engine = isinstance(self._clipping, ZeroEngine)
        self._settings.has_scaler = grad_scaler(trainer) is not None
        measure_every = min(max((log_every(trainer) or 50) // 5, 1), 10)  # five times per row
        self._scopes.take_up(trainer.optimizers, parameter_names(pl_module), measure_every, step_of(trainer))
        self._batch_idx, self._trained = None, True
        self._telling.begin(trainer)

    # --- every step ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the batch, for error messages and for steps without a backward pass."""
        self._batch_idx, self._backward_ran = batch_idx, False
        for known in self._scopes.optimizers:
            known.begin_batch(batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """See to it that no gradient is added to one of a step that was left out."""
        for known in self._scopes.optimizers:
            known.gate.drop_left_out()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this batch has computed gradients."""
        self._backward_ran = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, record, decide, clip."""
        if self._clipping is None or not self._clipping.is_at_a_step():
            return
        known = self._scopes.of(optimizer, trainer.optimizers)
        known.announce(self._backward_ran or not pl_module.automatic_optimization, trainer.global_step)
        scaler = grad_scaler(trainer)
        if trainer.fit_loop._skip_backward:
            return  # StochasticWeightAveraging passes over the data once more: the gradients are stale
        if scaler is not None and pl_module.automatic_optimization and not self._backward_ran:
            return  # `training_step` returned None: Lightning neither unscales the gradients nor steps
        if known.computes_again:
            raise MisconfigurationException(
                f"`{type(optimizer).__name__}` computes its gradients several times per step, which"
                f" `{type(self).__name__}` does not support. Remove the callback or use another optimizer."
            )
        if known.has_changed:  # parameters have joined, or changed places
            self._scopes.take_in(known, parameter_names(pl_module))
        where = step_of(trainer), trainer.current_epoch, self._batch_idx or 0
        parts = [(scope.clipper, scope.positions) for scope in known.scopes.values()]
        try:
            known.keep(self._clipping.clip(parts, optimizer, scaler), *where)
        except NonFiniteGradientError as error:
            raise located(error, pl_module, known.keep(error.records, *where)) from None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a row every ``log_every_n_steps``; warn in time of optimizers whose steps are not clipped."""
        self._telling.after_batch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the latest figures where callbacks that act after a validation look for them."""
        if self._stage == "fit" and not trainer.sanity_checking:
            self._telling.publish(trainer)

    # --- end of fit and checkpoints -----------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left and what it amounts to; warn of optimizers that stepped past the callback."""
        self._telling.end(trainer, self.report)
        if self._clipping is not None:
            self._clipping.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what is left, and print the report, before the run ends."""
        self._telling.break_off(trainer, self.report)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what waits for its row in the checkpoint: a resumed run neither repeats nor misses a row."""
        self._telling.warn_if_trained_elsewhere(trainer)
        self._telling.before_checkpoint(trainer)
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("scopes", {})
        self._scopes.update_held(saved, trainer.global_step)
        if self._clipping is not None:
            self._clipping.release()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn of a checkpoint that was written without this callback."""
        began = checkpoint["global_step"] > 0  # the learning rate finder's checkpoint is of step 0
        if self._stage == "fit" and began and not checkpoint["callbacks"].get(self.state_key):
            self._scopes.forget()
            rank_zero_warn(
                f"The checkpoint was written without `{type(self).__name__}`, so the record of gradient norms starts"
                " empty: the first thresholds come from few steps. Use `warmup_steps` to observe first."
            )

    def state_dict(self) -> dict[str, Any]:
        """The record and the trace of each scope, and the settings that they were made with."""
        if not self._scopes:
            return {}
        trainer = None if self._trainer is None else self._trainer()
        return {
            "settings": self.settings,
            "several_policies": self._settings.several_policies,
            "has_scaler": self._settings.has_scaler,
            "scopes": self._scopes.state_dict(-1 if trainer is None else trainer.global_step),
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
            flags = [state_dict[key] for key in ("has_scaler", "several_policies")]
            if not state_dict["scopes"] or not all(isinstance(flag, bool) for flag in flags):
                raise TypeError(f"no records, or flags of {[*map(type, flags)]}")
            changed = self._settings.compare(written := state_dict["settings"])
            self._scopes.load_state_dict(state_dict["scopes"])
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"The checkpoint's state of `{self.state_key}` is damaged or not of this callback ({error!r}). Resume"
                " from another checkpoint, or delete that entry to start with an empty record."
            ) from error
        if changed:
            rank_zero_warn(changed)
        self._settings.several_policies = flags[1] or not self._settings.has_policy(written)
        self._settings.has_scaler, self._trained = flags[0], self._stage == "fit"  # by hand, it is for the fit to come

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the stage that :meth:`setup` entered."""
        self._stage = None
        if stage == "fit":
            self._scopes.leave(trainer.global_step)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's `log` on every callback, and with it the whole model.
        kept = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}
        return {**kept, "_clipping": None, "_trainer": None}  # of this process

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What clipping did so far, and what it may hide: print it, or see `Report`.

        Steps since the last logged row, validation or end of epoch are left out while a fit is going on.
        """
        return report_of(self.traces, self._settings.of_run(), self._settings.has_scaler)

    def spikes(self) -> list[dict[str, Any]]:
        """The first steps that were not finite, then those with the largest norms of the run, largest first.

        Returns:
            At most 20 of each, for every optimizer: ``optimizer`` (the prefix of its keys), ``step`` (of the loggers),
            ``epoch``, ``batches``, ``norm``, ``times`` (in units of the typical norm up to there), ``threshold``,
            ``clip_coef``, ``left_out`` (for its size) and ``parameters`` (those with the largest shares of the squared
            norm, or those that were not finite).
        """
        return self._scopes.spikes()

    def plot(self) -> Figure:
        """Norms on a log scale, thresholds, clipped and non-finite steps, the largest norms: needs matplotlib."""
        return plot_of(self.traces, self._settings.of_run())
