"""After a run: plot, command line, tables of every logger, what is printed."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import wandb
from helpers import Net, by_percentile, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from models import Gradients
from processes import ROOT, TIME_LIMIT
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from wandb_reader import read_runs

from lightning_autoclip import Constant, GradientClipping, NonFiniteGradientError, Policy
from lightning_autoclip.__main__ import main
from lightning_autoclip.checkpoint import read_run
from lightning_autoclip.monitoring.suggest import candidates, nearest_fixed, nearest_fixed_value, recommended

pytestmark = pytest.mark.usefixtures("wandb_offline")
SPIKES = {41: 100.0, 42: 100.0}  # batch -> factor on its loss


def fit(*loggers, steps: int = 60, callback: GradientClipping | None = None, spikes=SPIKES, **kwargs):
    """A run on batches of four rows; the callback, and the norms before clipping."""
    callback, norms = callback or by_percentile(50, verbose=False), Gradients()
    scales = [spikes.get(i // 4, 1.0) for i in range(4 * steps)]
    run = trainer(norms, callback, logger=list(loggers), log_every_n_steps=10, **kwargs)
    run.fit(Net(), loader(n=4 * steps, scales=scales))
    return run, callback, norms.norms


# --- the end of fit ---------------------------------------------------------------------------------------------------


def test_the_report_is_printed_once_at_the_end_of_fit_and_only_if_wanted(capsys):
    _, callback, _ = fit(callback=by_percentile(50))
    printed = capsys.readouterr().out
    assert printed.count("60 steps") == 1
    assert str(callback.report()) in printed
    fit(callback=by_percentile(50, verbose=False))
    assert "60 steps" not in capsys.readouterr().out


def test_the_spike_table_reaches_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb"), WandbLogger(save_dir=tmp_path / "wb")]
    _, callback, norms = fit(*loggers)
    wandb.finish()
    worst = int(np.argmax(norms))
    with Path(loggers[0].log_dir, "autoclip_spikes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert (int(rows[0]["step"]), rows[0]["batches"]) == (worst, str(worst))
    assert [float(row["norm"]) for row in rows] == pytest.approx(sorted(norms)[:-21:-1], rel=1e-5)

    (events,) = (tmp_path / "tb").rglob("events*")
    texts = [v for e in EventFileLoader(str(events)).Load() for v in e.summary.value if "spikes" in v.tag]
    (text,) = (v.tensor.string_val[0].decode() for v in texts)
    assert text.splitlines()[0] == "| " + " | ".join(rows[0]) + " |"
    assert text.splitlines()[2].startswith(f"| autoclip | {worst} | 0 | {worst} |")

    (table,) = (tmp_path / "wb").rglob("*.table.json")
    table = json.loads(table.read_text())
    assert table["columns"] == list(rows[0])
    assert [row[1] for row in table["data"]] == [spike["step"] for spike in callback.spikes()]


def test_the_verdicts_stand_in_the_summary_of_the_wandb_run(tmp_path):
    _, callback, _ = fit(WandbLogger(save_dir=tmp_path))
    wandb.finish()
    (run,) = read_runs(tmp_path)
    assert run.summary["autoclip/health"] == callback.report().summary
    assert "spikes" in run.summary["autoclip/health"]


def test_a_run_that_crashes_leaves_its_spike_table(tmp_path):
    class Crash(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 50:
                raise RuntimeError("crash")

    logger = CSVLogger(tmp_path)
    callback = by_percentile(50, verbose=False)
    run = trainer(Crash(), callback, logger=logger, log_every_n_steps=10)
    with pytest.raises(RuntimeError, match="crash"):
        run.fit(Net(), loader(n=240, scales=[SPIKES.get(i // 4, 1.0) for i in range(240)]))
    with Path(logger.log_dir, "autoclip_spikes.csv").open() as file:
        assert {int(row["step"]) for row in list(csv.DictReader(file))[:2]} == {41, 42}


class Failing(Callback):
    """Fails in one of Lightning's hooks, which has been called so often."""

    def __init__(self, hook: str, error: type[BaseException], at: int = 1) -> None:
        self.hook, self.error, self.calls_left = hook, error, at
        setattr(self, hook, self.fail)

    def fail(self, *args, **kwargs):
        self.calls_left -= 1
        if not self.calls_left:
            raise self.error("stop")


@pytest.mark.parametrize("logged", [True, False], ids=["csv", "no logger"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_is_broken_off_has_its_report_printed(tmp_path, capsys, error, logged, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Lightning leaves an interrupt ignored
    callback = by_percentile(50)
    failing = Failing("on_train_batch_start", error, at=56)
    run = trainer(failing, callback, logger=CSVLogger(tmp_path) if logged else False, log_every_n_steps=10)
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(Net(), loader(n=240, scales=[SPIKES.get(i // 4, 1.0) for i in range(240)]))
    printed = capsys.readouterr().out
    assert printed == f"\n{callback.report()}\n"
    assert "autoclip: 55 steps" in printed
    assert "  - spikes: 2 of the 20" in printed


@pytest.mark.parametrize(
    ("hook", "options", "times"),
    [
        ("on_train_batch_start", {"verbose": False}, 0),
        ("setup", {}, 0),
        ("on_train_start", {}, 0),
        ("on_train_end", {}, 1),
        ("on_test_start", {}, 1),
    ],
    ids=["not wanted", "before the fit", "before any step", "after the report", "in a test after the fit"],
)
def test_the_report_is_printed_no_more_than_once(capsys, hook, options, times):
    run, model = trainer(by_percentile(**options), Failing(hook, RuntimeError)), Net()
    model.test_step = lambda batch, batch_idx: None
    with suppress(RuntimeError):
        run.fit(model, loader())
    with suppress(RuntimeError):
        run.test(model, loader())
    assert run.callbacks[-1].calls_left <= 0
    assert capsys.readouterr().out.count("16 steps") == times


def test_the_report_is_printed_though_a_logger_fails_with_the_run(capsys):
    class Full(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if "autoclip/grad_norm" in metrics:
                raise OSError("no space left on device")

    with (
        pytest.warns(UserWarning, match="could not log its last rows: no space left"),
        pytest.raises(ZeroDivisionError),
    ):
        trainer(by_percentile(), Failing("on_train_batch_start", ZeroDivisionError, at=9), logger=Full(".")).fit(
            Net(), loader()
        )
    assert "autoclip: 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}, {"max_steps": 0}], ids=str)
def test_runs_without_loggers_or_steps_end_quietly(options, capsys):
    callback = by_percentile()
    run = trainer(callback, **options)
    run.fit(Net(), loader())
    callback.report(), callback.spikes()
    if options == {"max_steps": 0}:
        assert str(callback.report()).startswith("No step was seen in this process.")
        with pytest.raises(ValueError, match="at least one optimizer step to plot"):
            callback.plot()


# --- the plot ---------------------------------------------------------------------------------------------------------


def test_the_plot_shows_norms_thresholds_factors_and_the_largest_steps():
    _, callback, norms = fit()
    upper, lower = callback.plot().axes
    lines = {line.get_label(): line.get_ydata() for line in upper.lines}
    np.testing.assert_allclose(lines["gradient norm"], norms, rtol=1e-5)
    thresholds = [np.percentile(norms[: i + 1], 50) for i in range(60)]
    np.testing.assert_allclose(lines["threshold"], thresholds, rtol=1e-5)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), np.minimum(1, np.array(thresholds) / norms), rtol=1e-5)
    assert f"step {int(np.argmax(norms))}\n" in upper.texts[0].get_text()
    assert upper.get_yscale() == "log"


def test_steps_that_were_not_finite_are_marked():
    _, callback, norms = fit(spikes={5: math.nan, 9: math.inf})
    assert not np.isfinite([norms[5], norms[9]]).any()
    (_, marks) = callback.plot().axes[1].lines
    assert list(marks.get_xdata()) == [5, 9]
    assert marks.get_label() == "not finite (2)"


def test_by_value_the_plot_shows_what_the_threshold_follows():
    _, callback, norms = fit(callback=by_percentile(50, gradient_clip_algorithm="value", verbose=False))
    entries = sum(parameter.numel() for parameter in Net().parameters())
    (norm, threshold) = callback.plot().axes[0].lines[:2]
    np.testing.assert_allclose(norm.get_ydata(), np.array(norms) / math.sqrt(entries), rtol=1e-5)
    assert threshold.get_label() == "threshold"


def labels(figure) -> list[str]:
    return [line.get_label() for axes in figure.axes for line in [*axes.lines, *axes.collections]]


@pytest.mark.parametrize("steps", [60, 2100])  # a step per bin; bins that were merged twice
def test_the_plot_counts_the_steps_that_were_not_finite_as_the_report_does(steps):
    bad = dict.fromkeys(range(20, 60), math.nan)
    run, callback, _ = fit(steps=steps, spikes=bad)
    run.save_checkpoint("run.ckpt")
    assert callback.report().sections[0].figures.nonfinite == 40
    for plot in (callback.plot(), read_run(Path("run.ckpt")).plot()):
        assert "not finite (40)" in labels(plot)


def test_the_plot_of_a_long_run_shades_from_the_smallest_to_the_largest_norm():
    _, callback, norms = fit(steps=1200, spikes={})
    upper = callback.plot().axes[0]
    assert {"smallest to largest", "typical gradient norm"} <= set(labels(upper.figure))
    (shade,) = upper.collections
    heights = shade.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((min(norms), max(norms)), rel=1e-4)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run's checkpoint, with its callback and norms."""
    path = tmp_path_factory.mktemp("recorded") / "last.ckpt"
    run, callback, norms = fit()
    run.save_checkpoint(path)
    return path, callback, norms


def test_the_report_of_a_checkpoint_is_that_of_the_callback(recorded, capsys):
    path, callback, _ = recorded
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"checkpoint {path}\n{callback.report()}\n"
    assert [*Path().iterdir()] == []


def test_suggest_shows_what_each_percentile_would_have_clipped(recorded, capsys):
    path, _, norms = recorded
    assert main(["suggest", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "60 norms" in printed
    thresholds = [np.percentile(norms[: i + 1], 90) for i in range(60)]
    clipped, factor = np.mean(norms > np.array(thresholds)), np.mean(np.minimum(1, thresholds / np.array(norms)))
    (row,) = (line.split() for line in printed.splitlines() if line.split()[:2] == ["90", "100"])
    assert (row[2], row[3]) == (f"{clipped:.1%}", f"{factor:.2f}")
    assert "Start with AutoClip(percentile=" in printed


def test_the_window_counts_in_what_is_suggested():
    norms = np.random.default_rng(0).lognormal(0, 1, 400)
    norms[200:] *= 100
    by_setting = candidates(norms.tolist())
    for window in (100, None):
        past = [norms[max(0, i + 1 - (window or 400)) : i + 1].astype(np.float32) for i in range(400)]
        coefs = np.minimum(1, [np.percentile(kept, 25) for kept in past] / norms)
        found = by_setting[25.0, window]
        assert found.clip_coef_mean == pytest.approx(coefs.mean(), rel=1e-5)
        assert found.clip_coef_min == pytest.approx(coefs.min(), rel=1e-5)
    assert by_setting[25.0, None].clip_coef_mean < by_setting[25.0, 100].clip_coef_mean
    best = recommended(by_setting)
    assert best[1] == 100
    assert by_setting[best].clip_coef_mean >= 0.6


def printed_fixed(printed: str) -> float:
    return float(re.search(r"gradient_clip_val=(\S+)", printed)[1])


def log_difference(norms: np.ndarray, thresholds: np.ndarray, fixed: float) -> float:
    """Between the logarithms of the factors of the thresholds and of a fixed one."""
    return float(np.mean((np.minimum(0, np.log(thresholds / norms)) - np.minimum(0, np.log(fixed / norms))) ** 2))


@pytest.mark.parametrize("percentile", [1, 25, 50, 90, 100])
@pytest.mark.parametrize("kind", ["alike", "falling", "with spikes", "equal"])
def test_the_fixed_threshold_is_the_nearest_of_all(kind, percentile):
    norms = np.random.default_rng(0).lognormal(0, 0 if kind == "equal" else 0.5, 300)
    norms *= {"falling": np.geomspace(100, 0.1, 300), "with spikes": np.where(np.arange(300) % 40, 1, 50)}.get(kind, 1)
    thresholds = np.array([np.percentile(norms[max(0, i - 99) : i + 1], percentile) for i in range(300)])
    fixed = nearest_fixed(norms.tolist(), thresholds.tolist())
    grid = np.geomspace(norms.min() / 10, norms.max() * 10, 3000)
    least = min(log_difference(norms, thresholds, each) for each in grid)
    assert log_difference(norms, thresholds, fixed) <= least + 1e-9
    if percentile == 100 and kind != "falling":
        assert fixed == pytest.approx(norms.max()), "nothing was clipped: the least that clips nothing"


def test_suggest_names_the_fixed_threshold_that_would_have_done_most_nearly_the_same(recorded, capsys):
    assert main(["suggest", str(recorded[0])]) == 0
    printed, norms = capsys.readouterr().out, np.array(recorded[2])
    percentile = float(re.search(r"AutoClip\(percentile=(\d+)", printed)[1])
    thresholds = np.array([np.percentile(norms[: i + 1], percentile) for i in range(60)])
    grid = np.geomspace(norms.min() / 2, norms.max() * 2, 3000)
    best = min(grid, key=lambda each: log_difference(norms, thresholds, each))
    fixed = printed_fixed(printed)
    assert fixed == pytest.approx(best, rel=0.01)
    said = re.search(r"the same here: (\S+)% clipped, mean factor (\S+)\.\n", printed)
    assert float(said[1]) == pytest.approx(100 * np.mean(norms > fixed), abs=2)
    assert float(said[2]) == pytest.approx(np.mean(np.minimum(1, fixed / norms)), abs=0.01)


@pytest.mark.parametrize("policy", ["percentile", "a multiplier", "another"])
def test_by_value_suggest_names_the_fixed_threshold_that_comes_nearest(capsys, policy):
    options = {"gradient_clip_algorithm": "value", "verbose": False}
    policies = {"percentile": 75, "a multiplier": 75, "another": 50}
    own = {"multiplier": 2.0} if policy == "a multiplier" else {}
    callback = (
        GradientClipping(Constant(0.1), **options) if policy == "another" else by_percentile(75, **own, **options)
    )
    run, _, norms = fit(callback=callback, spikes={})
    run.save_checkpoint("value.ckpt")
    assert main(["suggest", "value.ckpt"]) == 0
    printed, percentile = capsys.readouterr().out, policies[policy]
    multiplier = own.get("multiplier", by_percentile(**options).policy.multiplier)
    assert f"{multiplier:g} times the percentile" in printed
    entries = np.array(norms) / math.sqrt(sum(parameter.numel() for parameter in Net().parameters()))
    thresholds = multiplier * np.array([np.percentile(entries[: i + 1], percentile) for i in range(60)])
    (row,) = (line.split() for line in printed.splitlines() if line.split()[:2] == [str(percentile), "100"])
    assert [float(cell) for cell in row[2:4]] == pytest.approx([thresholds.min(), thresholds.max()], rel=1e-2)
    geometric = np.exp(np.log(thresholds).mean())
    assert nearest_fixed_value(thresholds.tolist()) == pytest.approx(geometric)
    assert float(row[4]) == printed_fixed(printed) == pytest.approx(geometric, rel=1e-2)
    assert f"percentile {percentile} over 100 steps" in printed
    assert 'gradient_clip_algorithm="value"' in printed
    assert "60 root-mean-square entries" in printed


@pytest.mark.parametrize(
    ("steps", "windows", "said"),
    [
        (60, ["100"], "With 60 norms a window of 1000 or all is the same as 100."),
        (300, ["100", "1000"], "With 300 norms a window of all is the same as 1000."),
        (1010, ["100", "1000", "all"], None),
    ],
)
def test_windows_that_hold_all_norms_alike_are_shown_once(tmp_path, capsys, steps, windows, said):
    callback = by_percentile(50, window=None, verbose=False)
    fit(steps=steps, spikes={}, callback=callback)[0].save_checkpoint("run.ckpt")
    assert main(["suggest", "run.ckpt"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if "%  " in line]
    assert [*dict.fromkeys(row[1] for row in rows)] == windows
    assert len(rows) == 7 * len(windows)
    assert said in printed if said else "is the same as" not in printed


def test_fixed_clipping_has_a_report_and_a_plot_too():
    _, callback, norms = fit(callback=GradientClipping(Constant(1.0), verbose=False))
    figures = callback.report().sections[0].figures
    assert figures.clipped_fraction == pytest.approx(np.mean(np.array(norms) > 1))
    assert math.isnan(figures.expected_fraction)
    callback.plot()


@pytest.mark.parametrize("spikes", [{33: math.nan}, dict.fromkeys(range(60), math.nan), dict.fromkeys(range(60), 0.0)])
def test_a_sick_run_is_not_called_healthy(capsys, spikes):
    run, callback, _ = fit(spikes=spikes)
    run.save_checkpoint("run.ckpt")
    assert main(["report", "run.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert "Healthy" not in printed
    assert "already clipped" not in printed
    assert not callback.report().healthy


def test_a_run_without_a_norm_that_counts_says_so_to_who_asks_for_advice(capsys):
    fit(spikes=dict.fromkeys(range(60), 0.0))[0].save_checkpoint("run.ckpt")
    assert main(["suggest", "run.ckpt"]) == 1
    assert "Expected at least 2 recorded norms to suggest a percentile from, but got 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["suggest", "report"])
def test_who_reads_no_further_ends_the_program_quietly(recorded, command):
    program = subprocess.Popen(
        [sys.executable, "-m", "lightning_autoclip", command, recorded[0]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    program.stdout.close()  # before it writes
    error = program.stderr.read().decode()
    assert program.wait(TIME_LIMIT) == 0
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


def test_a_long_run_is_suggested_from_the_steps_that_its_record_still_holds(capsys):
    run, _, norms = fit(steps=1200, spikes={})
    run.save_checkpoint("long.ckpt", weights_only=False)
    assert main(["suggest", "long.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert "100 norms" in printed
    last = np.array(norms[-100:])
    clipped = np.mean(last > [np.percentile(last[: i + 1], 10) for i in range(100)])
    (row,) = (line.split() for line in printed.splitlines() if line.split()[:2] == ["10", "100"])
    assert row[2] == f"{clipped:.1%}"


@pytest.mark.parametrize("name", ["name", "name.jpeg", "deep.er.png", "-x.png"])
def test_the_plot_is_in_the_file_that_was_named(recorded, name, capsys):
    Path(name).write_bytes(b"an older one")
    assert main(["report", str(recorded[0]), f"--plot={name}"]) == 0
    assert [path.name for path in Path().iterdir()] == [name]
    kind = "jpeg" if name.endswith("jpeg") else "png"
    assert matplotlib.image.imread(BytesIO(Path(name).read_bytes()), kind).shape[1] > 600
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "why"), [("folder", "directory"), ("no/where.png", "No such"), ("x.foo", "'foo'")])
def test_what_cannot_be_the_plot_is_refused_and_nothing_is_written(recorded, name, why, capsys):
    Path("folder").mkdir()
    assert main(["report", str(recorded[0]), "--plot", name]) == 1
    assert why in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["folder"]


@pytest.mark.parametrize(("steps", "told"), [(3, "; typical norm "), (60, " in the first tenth, ")])
def test_a_report_of_few_steps_speaks_of_no_tenths(steps, told):
    _, callback, _ = fit(steps=steps, spikes={})
    text = " ".join(str(callback.report()).split())
    assert told in text
    assert ("tenth" in text) == (steps == 60)


def test_the_step_that_nonfinite_raise_stops_at_is_in_the_report():
    callback = by_percentile(50, nonfinite="raise", verbose=False)
    with pytest.raises(NonFiniteGradientError, match="batch 33"):
        fit(callback=callback, spikes={33: math.nan})
    assert callback.spikes()[0]["step"] == 33
    assert callback.report().summary == "non-finite gradients"


def test_a_policy_of_the_users_own_may_be_called_percentile_too(capsys):
    @dataclass(frozen=True)
    class Percentile(Policy):
        def __call__(self, history):
            return history.percentile(0) * 2

    fit(callback=GradientClipping(Percentile()))
    assert "60 steps" in capsys.readouterr().out


def test_a_run_with_two_percentiles_is_not_judged_by_the_last_one(tmp_path):
    run, _, _ = fit(spikes={})
    run.save_checkpoint("p50.ckpt")
    callback = by_percentile(90, verbose=False)
    resumed = trainer(callback, max_epochs=2)
    with pytest.warns(UserWarning, match="goes on with"):
        resumed.fit(Net(), loader(n=240), ckpt_path="p50.ckpt")
    assert math.isnan(callback.report().sections[0].figures.expected_fraction)
    resumed.save_checkpoint("both.ckpt")
    assert main(["report", "both.ckpt", "--json"]) == 0
