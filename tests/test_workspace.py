"""The dashboard as code: built without a login, saved at a server of our own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import wandb
from wandb_server import ENTITY, serve
from wandb_workspaces.workspaces.internal import WorkspaceViewspec

from lightning_autoclip import create_workspace
from lightning_autoclip.monitoring.recorder import Recorder
from lightning_autoclip.monitoring.trace import Trace

OPTIMIZERS = pytest.mark.parametrize(
    ("optimizers", "names"),
    [((), [""]), (("Adam",), [""]), (("Adam", "Adam-1"), ["Adam/", "Adam-1/"])],
    ids=["one optimizer", "one that is named", "two optimizers"],
)
METRICS = [
    *(["grad_norm", "threshold"], ["grad_norm_max", "threshold"], ["grad_norm_mean", "grad_norm_clipped"]),
    *(
        ["clipped_fraction"],
        ["clip_coef_mean", "clip_coef_min"],
        ["bounded_fraction"],
        ["update_ratio"],
        ["nonfinite_total"],
    ),
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


def logged(name: str) -> list[str]:
    """The keys that the rows of an optimizer hold."""
    trace = Trace()
    trace.follow(["net.0.weight", "net.2.weight"], [32, 8])
    recorder = Recorder(f"autoclip/{name}", layer_depth=2, trace=trace)
    recorder.max_update_ratio = 0.25
    return recorder.keys


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


@OPTIMIZERS
def test_the_layers_of_each_optimizer_have_a_panel(optimizers: Sequence[str], names: list[str]) -> None:
    plots = configs(spec_of(create_workspace(ENTITY, "project", optimizers=optimizers, save=False)))
    patterns = [plot["metricRegex"] for plot in plots if plot.get("useMetricRegex")]
    keys = [[key for key in logged(name) if "layers/" in key] for name in names]
    assert keys == [[f"autoclip_layers/{name}net.{i}" for i in (0, 2)] for name in names]
    every = [key for name in names for key in logged(name)]
    assert [[key for key in every if re.search(pattern, key)] for pattern in patterns] == keys


def test_the_layers_can_be_left_out() -> None:
    spec = spec_of(create_workspace(ENTITY, "project", layers=False, save=False))
    assert "metricRegex" not in json.dumps(spec)


def test_the_table_of_spikes_is_there_once() -> None:
    spec = spec_of(create_workspace(ENTITY, "project", optimizers=["Adam", "SGD"], save=False))
    assert json.dumps(spec).count('"val": "autoclip/spikes"') == 1


@OPTIMIZERS
def test_what_is_saved_is_what_was_built(
    monkeypatch: pytest.MonkeyPatch, optimizers: Sequence[str], names: list[str]
) -> None:
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        workspace = create_workspace(ENTITY, "project", optimizers=optimizers)
        (view,) = server.views
        workspace.save()  # once more is no second view
        assert workspace.url.startswith(f"{server.url}/{ENTITY}/project?nw=")
        wandb.teardown()
    assert (view["entityName"], view["projectName"], view["type"]) == (ENTITY, "project", "project-view")
    assert view["displayName"] == "Gradient clipping"
    assert json.loads(view["spec"]) == spec_of(workspace)
    assert len(configs(json.loads(view["spec"]))) == 9 * len(names) + 1
    assert server.views[1]["id"] == "view-1"


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ImportError, match=re.escape("pip install lightning-autoclip[dashboard]")):
        create_workspace(ENTITY, "project", save=False)


def test_a_name_is_not_taken_for_a_list_of_letters() -> None:
    with pytest.raises(TypeError, match=r"`optimizers`.*'Adam'.*`\['Adam'\]`"):
        create_workspace(ENTITY, "project", optimizers="Adam", save=False)
