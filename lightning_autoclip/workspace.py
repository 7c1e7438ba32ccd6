"""A W&B dashboard of what clipping did, as code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from lightning_autoclip._text import as_key, shown
from lightning_autoclip.steplog import LAYER_SECTIONS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_X = "trainer/global_step"  # the loggers' step; the client's own "Step" counts rows
_PANELS: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("Gradient norm and threshold", ("grad_norm", "grad_rms", "threshold"), {"log_y": True}),
    ("Largest gradient norm", ("grad_norm_max", "threshold"), {"log_y": True}),
    ("Mean norm before and after clipping", ("grad_norm_mean", "grad_norm_clipped"), {"log_y": True}),
    ("Steps that were clipped", ("clipped_fraction",), {"range_y": (0.0, 1.0)}),
    ("Clip coefficient", ("clip_coef_mean", "clip_coef_min"), {"range_y": (0.0, 1.0)}),
    ("Steps limited by max_update_ratio, with SGD", ("limited_fraction",), {"range_y": (0.0, 1.0)}),
    ("Update ratio before clipping, with SGD", ("update_ratio",), {"log_y": True}),
    ("Non-finite steps and skipped outliers so far", ("nonfinite_total", "skipped_total"), {}),
]
_OF_LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("Share of each layer in the squared norm", {"range_y": (0.0, 1.0)}),
    ("Norm of each layer before clipping", {"log_y": True}),
]


def create_workspace(
    entity: str,
    project: str,
    *,
    optimizers: Sequence[str] = (),
    groups: Sequence[str] = (),
    prefix: str = "",
    layers: bool = True,
    save: bool = True,
) -> Workspace:
    """Make a W&B workspace that shows what clipping did: needs ``pip install lightning-autoclip[dashboard]``.

    Its panels show norms and thresholds, what was clipped, non-finite steps, spikes, layers, and ``train_loss``.

    Args:
        entity: The team or user that the project belongs to.
        project: The project of the runs, as given to `WandbLogger`.
        optimizers: Of runs with several optimizers, their names as in the keys ``autoclip/<name>/grad_norm``, such as
            ``["Adam", "Adam-1"]``. With one optimizer or none it is left out: the keys then hold no name.
        groups: Of runs with ``groups``, their names as in the keys ``autoclip/<name>/grad_norm``, such as
            ``["encoder", "rest"]``; with several optimizers, those that one of them has.
        prefix: That of the logger, as in ``WandbLogger(prefix="trial")``.
        layers: Whether to show what ``log_layers`` logs.
        save: Whether to save the workspace at W&B, for which one must be logged in, and print its address.

    Returns:
        The `wandb_workspaces.workspaces.Workspace`, to change and `save()`.

    Raises:
        ModuleNotFoundError: `wandb-workspaces` is not installed.
        TypeError: ``optimizers`` or ``groups`` is one string.
    """
    for argument, value in (("optimizers", optimizers), ("groups", groups)):
        if isinstance(value, str):
            raise TypeError(
                f"Expected `{argument}` to be a sequence of names, but got {shown(value)}: `[{shown(value)}]`."
            )
    try:
        from wandb_workspaces.reports.v2 import LinePlot, WeavePanelSummaryTable
        from wandb_workspaces.workspaces import RunsetSettings, Section, Workspace, WorkspaceSettings
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`create_workspace` found no `{error.name}`. `pip install lightning-autoclip[dashboard]` installs it."
        ) from error

    start = f"{prefix}-" if prefix else ""  # as `WandbLogger` joins them
    several = [f"{name}/" for name in optimizers] if len(optimizers) > 1 else [""]
    sections = []
    for name in ["".join(pair) for pair in product(several, [f"{as_key(group)}/" for group in groups] or [""])]:
        panels: list[Any] = [
            LinePlot(title=title, x=_X, y=[f"{start}autoclip/{name}{key}" for key in keys], **options)
            for title, keys, options in _PANELS
        ]
        for (title, options), of_layers in zip(_OF_LAYERS, LAYER_SECTIONS, strict=True) if layers else ():
            pattern = _literally(f"{start}{of_layers}/{name}")
            panels.append(LinePlot(title=title, x=_X, metric_regex=f"^{pattern}", **options))
        title = f"Gradient clipping of {name.strip('/')}" if name else "Gradient clipping"
        sections.append(Section(name=title, panels=panels, is_open=True))
    spikes = WeavePanelSummaryTable(table_name=f"{start}autoclip/spikes")
    panels = [LinePlot(title="Loss", x=_X, y=[f"{start}train_loss"]), spikes]
    workspace = Workspace(
        entity=entity,
        project=project,
        name="Gradient clipping",
        sections=[*sections, Section(name="Training and spikes", panels=panels, is_open=True)],
        settings=WorkspaceSettings(x_axis=_X),
        runset_settings=RunsetSettings(pinned_columns=[f"summary:{start}autoclip/health"]),
    )
    return workspace.save() if save else workspace


def _literally(text: str) -> str:
    """The text as a pattern of any dialect: `re.escape` escapes hyphens too, which a browser may refuse."""
    return re.sub(r"[.+*?^$()\[\]{}|\\]", r"\\\g<0>", text)
