"""The dashboard as code: built without a login, saved at a server of our own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
from helpers import Net, loader, trainer
from lightning.pytorch.loggers import WandbLogger
from models import Manual
from torch.optim import Adam, Optimizer
from wandb_reader import read_runs
from wandb_server import ENTITY, serve
from wandb_workspaces.workspaces.internal import WorkspaceViewspec

from lightning_autoclip import AutoClip, create_workspace
from lightning_autoclip.steplog import StepLog


class TwoAdams(Manual):
    """Two optimizers that step in turn, each with a parameter of both layers."""

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        parts = [[getattr(self.net[i], name) for i in (0, 2)] for name in ("weight", "bias")]
        return [Adam(part, lr=0.01) for part in parts]


OPTIMIZERS = pytest.mark.parametrize(
    ("optimizers", "names"),
    [((), [""]), (("Adam",), [""]), (("Adam", "Adam-1"), ["Adam/", "Adam-1/"])],
    ids=["one optimizer", "one that is named", "two optimizers"],
)
METRICS = [
    *(["grad_norm", "grad_rms", "threshold"], ["grad_norm_max", "threshold"], ["grad_norm_mean", "grad_norm_clipped"]),
    *(["clipped_fraction"], ["clip_coef_mean", "clip_coef_min"]),
    *(["limited_fraction"], ["update_ratio"], ["nonfinite_total", "skipped_total"]),
]


def spec_of(workspace: Any) -> dict[str, Any]:
    """What W&B is sent, checked by the package's own model of it."""
    spec = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    assert WorkspaceViewspec.model_validate(spec)
    return spec


def configs(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The line plots of a workspace, section by section."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    plots = [panel for section in sections for panel in section["panels"] if "Line Plot" in panel["viewType"]]
    return [plot["config"] for plot in plots]


def covered(spec: dict[str, Any], keys: Iterable[str]) -> set[str]:
    """Those of the keys that a line plot shows."""
    plots = configs(spec)
    named = {key for plot in plots for key in plot["metrics"]}
    patterns = [plot["metricRegex"] for plot in plots if plot.get("useMetricRegex")]
    return {key for key in keys if key in named or any(re.search(pattern, key) for pattern in patterns)}


def logged(name: str) -> list[str]:
    """The keys that the rows of an optimizer hold."""
    log = StepLog(f"autoclip/{name}", by_value=True, skips_outliers=True, layer_depth=2)
    log.set_parameters(["net.0.weight", "net.2.weight"], [32, 8])
    log.max_update_ratio = 0.25
    return log.keys


@OPTIMIZERS
def test_it_shows_what_is_logged_of_each_optimizer(optimizers: Sequence[str], names: list[str]) -> None:
    plots = configs(spec_of(create_workspace(ENTITY, "project", optimizers=optimizers, save=False)))
    expected = [[f"autoclip/{name}{key}" for key in keys] for name in names for keys in METRICS]
    assert [plot["metrics"] for plot in plots if plot["metrics"]] == [*expected, ["train_loss"]]
    assert {key for keys in expected for key in keys} <= {key for name in names for key in logged(name)}
    assert all(plot["xAxis"] == "trainer/global_step" for plot in plots)
    together = [plot for plot in plots if any(key.endswith("/threshold") for key in plot["metrics"])]
    assert len(together) == 2 * len(names)
    assert all(plot["yLogScale"] for plot in together)
    every, of_layers = [key for name in names for key in logged(name)], [p for p in plots if p.get("useMetricRegex")]
    shown = [[key for key in every if re.search(plot["metricRegex"], key)] for plot in of_layers]
    sections = ("autoclip_layers", "autoclip_layers_norm")
    assert shown == [[f"{each}/{name}net.{i}" for i in (0, 2)] for name in names for each in sections]
    assert [plot.get("yLogScale", False) for plot in of_layers] == [False, True] * len(names)


@pytest.mark.parametrize(
    ("model", "options", "prefix"),
    [
        (Net, {}, ""),
        (Net, {"groups": ["head(s)", "rest"]}, "trial.1"),
        (TwoAdams, {"optimizers": ["Adam", "Adam-1"], "groups": ["head(s)", "rest"]}, ""),
        (TwoAdams, {"optimizers": ["Adam", "Adam-1"]}, "trial.1"),
    ],
    ids=["one optimizer", "groups", "groups of two", "two optimizers"],
)
@pytest.mark.usefixtures("wandb_offline")
def test_every_key_of_a_run_has_a_panel(tmp_path: Path, model: type[Net], options: dict[str, Any], prefix: str) -> None:
    groups = {"groups": {"head(s)": "net.2.*"}} if "groups" in options else {}
    logger = WandbLogger(save_dir=tmp_path, project="test", id="run", prefix=prefix)
    autoclip = AutoClip(log_layers=True, verbose=False, **groups)
    trainer(autoclip, logger=logger, log_every_n_steps=2).fit(model(), loader())
    wandb.finish()
    (run,) = read_runs(tmp_path)
    hidden = {metric.name.replace("\\.", ".") for metric in run.metrics if metric.options.hidden}
    logged = {key for row in run.history for key in row if "autoclip" in key and isinstance(row[key], (int, float))}
    start = f"{prefix}-" if prefix else ""
    keys = {*logged - hidden, f"{start}train_loss"}
    assert {key.rpartition("/")[2].rpartition(".")[2] for key in hidden & logged} == {
        *("ncols", "nrows", "size"),
        "grad_norm_max_step",
    }
    spec = spec_of(create_workspace(ENTITY, "project", prefix=prefix, **options, save=False))
    assert covered(spec, keys) == keys
    assert f"{start}autoclip/spikes.path" in {key for row in run.history for key in row}
    assert f'"val": "{start}autoclip/spikes"' in json.dumps(spec)


def test_diagnoses_are_beside_the_names_of_runs_the_table_is_there_once_and_layers_can_be_left_out() -> None:
    options = {"optimizers": ["Adam", "SGD"], "prefix": "trial", "layers": False}
    spec = spec_of(create_workspace(ENTITY, "project", **options, save=False))
    (runs,) = spec["section"]["runSets"]
    assert runs["runFeed"]["columnPinned"]["summary:trial-autoclip/health"] is True
    assert json.dumps(spec).count('"val": "trial-autoclip/spikes"') == 1
    assert "metricRegex" not in json.dumps(spec)


def test_what_is_saved_is_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        workspace = create_workspace(ENTITY, "project", optimizers=["Adam", "Adam-1"])
        (view,) = server.views
        workspace.save()  # once more is no second view
        assert workspace.url.startswith(f"{server.url}/{ENTITY}/project?nw=")
        wandb.teardown()
    assert (view["entityName"], view["projectName"], view["type"]) == (ENTITY, "project", "project-view")
    assert view["displayName"] == "Gradient clipping"
    assert json.loads(view["spec"]) == spec_of(workspace)
    assert len(configs(json.loads(view["spec"]))) == 10 * 2 + 1
    assert server.views[1]["id"] == "view-1"


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ImportError, match=re.escape("pip install lightning-autoclip[dashboard]")):
        create_workspace(ENTITY, "project", save=False)


@pytest.mark.parametrize("argument", ["optimizers", "groups"])
def test_a_name_is_not_taken_for_a_list_of_letters(argument: str) -> None:
    with pytest.raises(TypeError, match=rf"`{argument}`.*'Adam'.*`\['Adam'\]`"):
        create_workspace(ENTITY, "project", **{argument: "Adam"}, save=False)
