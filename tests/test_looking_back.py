"""After a run: what is printed, the spike table of every logger, the plot, the command line."""

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

from lightning_autoclip import Constant, GradientClipping, NonFiniteGradientError
from lightning_autoclip.__main__ import main
from lightning_autoclip.checkpoint import read_run
from lightning_autoclip.suggest import candidates, nearest_fixed, nearest_fixed_value, recommended

SPIKES = {41: 100.0, 42: 100.0}  # batch -> factor on its loss


def spiky(steps: int = 60, spikes=SPIKES):
    return loader(n=4 * steps, scales=[spikes.get(i // 4, 1.0) for i in range(4 * steps)])


def fit(*loggers, steps: int = 60, callback: GradientClipping | None = None, spikes=SPIKES, **kwargs):
    """A run on batches of four rows; the callback, and the norms before clipping."""
    callback, norms = callback or by_percentile(50, verbose=False), Gradients()
    run = trainer(norms, callback, logger=list(loggers), log_every_n_steps=10, **kwargs)
    run.fit(Net(), spiky(steps, spikes))
    return run, callback, norms.norms


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run's checkpoint, with its callback and norms."""
    path = tmp_path_factory.mktemp("recorded") / "last.ckpt"
    run, callback, norms = fit()
    run.save_checkpoint(path)
    return path, callback, np.array(norms)


# --- the end of fit ---------------------------------------------------------------------------------------------------


def test_the_report_is_printed_once_at_the_end_of_fit_and_only_if_wanted(capsys):
    _, callback, _ = fit(callback=by_percentile(50))
    printed = capsys.readouterr().out
    assert printed.count("60 steps") == 1
    assert str(callback.report()) in printed
    fit(callback=by_percentile(50, verbose=False))
    assert "60 steps" not in capsys.readouterr().out


@pytest.mark.usefixtures("wandb_offline")
def test_the_spike_table_and_the_summary_of_the_report_reach_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb"), WandbLogger(save_dir=tmp_path / "wb")]
    _, callback, norms = fit(*loggers)
    wandb.finish()
    worst = int(np.argmax(norms))
    with Path(loggers[0].log_dir, "autoclip_spikes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert (int(rows[0]["step"]), rows[0]["batches"], rows[0]["skipped"]) == (worst, str(worst), "")
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

    (run,) = read_runs(tmp_path / "wb")
    assert run.summary["autoclip/health"] == callback.report().summary == "spikes"


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
def test_a_run_that_is_interrupted_prints_its_report_and_leaves_its_spike_table(
    tmp_path, capsys, error, logged, monkeypatch
):
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Lightning leaves an interrupt ignored
    callback, logger = by_percentile(50), CSVLogger(tmp_path)
    failing = Failing("on_train_batch_start", error, at=56)
    run = trainer(failing, callback, logger=logger if logged else False, log_every_n_steps=10)
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(Net(), spiky())
    printed = capsys.readouterr().out
    assert printed == f"\n{callback.report()}\n"
    assert "autoclip: 55 steps" in printed
    assert "  - spikes: 2 of the 20" in printed
    if logged:
        with Path(logger.log_dir, "autoclip_spikes.csv").open() as file:
            assert {int(row["step"]) for row in list(csv.DictReader(file))[:2]} == {41, 42}


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

    run = trainer(by_percentile(), Failing("on_train_batch_start", ZeroDivisionError, at=9), logger=Full("."))
    with (
        pytest.warns(UserWarning, match="could not log its last rows: no space left"),
        pytest.raises(ZeroDivisionError),
    ):
        run.fit(Net(), loader())
    assert "autoclip: 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}, {"max_steps": 0}], ids=str)
def test_runs_without_loggers_or_steps_end_quietly(options, capsys):
    callback = by_percentile()
    run = trainer(callback, **options)
    run.fit(Net(), loader())
    callback.report(), callback.spikes()
    if options == {"max_steps": 0}:
        assert str(callback.report()).startswith("No step was clipped in this process.")
        with pytest.raises(ValueError, match="at least one optimizer step to plot"):
            callback.plot()


def test_the_step_that_nonfinite_raise_stops_at_is_named_by_the_error_and_was_not_made():
    callback = by_percentile(50, nonfinite="raise", verbose=False)
    with pytest.raises(NonFiniteGradientError, match=r"step 33 \(epoch 0, batch 33\).*net\.0\.weight"):
        fit(callback=callback, spikes={33: math.nan})
    assert 33 not in {spike["step"] for spike in callback.spikes()}
    assert callback.report().sections[0].figures.steps == 33


@pytest.mark.parametrize(("steps", "said"), [(3, "mean norm "), (60, " in the first tenth, ")])
def test_a_report_of_few_steps_speaks_of_no_tenths(steps, said):
    _, callback, _ = fit(steps=steps, spikes={})
    text = " ".join(str(callback.report()).split())
    assert said in text
    assert ("tenth" in text) == (steps == 60)


# --- the plot ---------------------------------------------------------------------------------------------------------


def test_the_plot_shows_norms_thresholds_coefficients_and_the_largest_steps(recorded):
    _, callback, norms = recorded
    upper, lower = callback.plot().axes
    lines = {line.get_label(): line.get_ydata() for line in upper.lines}
    np.testing.assert_allclose(lines["gradient norm"], norms, rtol=1e-5)
    thresholds = [np.percentile(norms[: i + 1], 50) for i in range(60)]
    np.testing.assert_allclose(lines["threshold"], thresholds, rtol=1e-5)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), np.minimum(1, np.array(thresholds) / norms), rtol=1e-5)
    assert f"step {int(np.argmax(norms))}\n" in upper.texts[0].get_text()
    assert upper.get_yscale() == "log"


def test_by_value_the_plot_shows_what_the_threshold_follows():
    _, callback, norms = fit(callback=by_percentile(50, gradient_clip_algorithm="value", verbose=False))
    elements = sum(parameter.numel() for parameter in Net().parameters())
    (norm, threshold) = callback.plot().axes[0].lines[:2]
    np.testing.assert_allclose(norm.get_ydata(), np.array(norms) / math.sqrt(elements), rtol=1e-5)
    assert (norm.get_label(), threshold.get_label()) == ("gradient RMS", "threshold")


def labels(figure) -> list[str]:
    return [line.get_label() for axes in figure.axes for line in [*axes.lines, *axes.collections]]


@pytest.mark.parametrize("steps", [60, 1100], ids=["a step per bin", "bins that were merged"])
def test_the_plot_marks_and_counts_the_non_finite_steps_as_the_report_does(steps):
    run, callback, norms = fit(steps=steps, spikes=dict.fromkeys(range(20, 60), math.nan))
    run.save_checkpoint("run.ckpt")
    assert callback.report().sections[0].figures.nonfinite == 40
    for plot in (callback.plot(), read_run(Path("run.ckpt")).plot()):
        assert "non-finite (40)" in labels(plot)
    upper, lower = callback.plot().axes
    if steps == 60:
        assert list(lower.lines[1].get_xdata()) == [*range(20, 60)]
        return
    assert {"smallest to largest", "geometric mean gradient norm"} <= set(labels(upper.figure))
    heights, finite = upper.collections[0].get_paths()[0].vertices[:, 1], np.array(norms)[np.isfinite(norms)]
    assert (heights.min(), heights.max()) == pytest.approx((finite.min(), finite.max()), rel=1e-4)


def test_fixed_clipping_has_a_report_and_a_plot_too():
    _, callback, norms = fit(callback=GradientClipping(Constant(1.0), verbose=False))
    figures = callback.report().sections[0].figures
    assert figures.clipped_fraction == pytest.approx(np.mean(np.array(norms) > 1))
    assert math.isnan(figures.expected_fraction)
    callback.plot()


# --- the command line: report -----------------------------------------------------------------------------------------


def test_the_report_of_a_checkpoint_is_that_of_the_callback(recorded, capsys):
    path, callback, _ = recorded
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"checkpoint {path}\n{callback.report()}\n"
    assert [*Path().iterdir()] == []


@pytest.mark.parametrize("name", ["name", "name.jpeg", "deep.er.png", "-x.png"])
def test_the_plot_is_in_the_file_that_was_named(recorded, name, capsys):
    Path(name).write_bytes(b"an older one")
    assert main(["report", str(recorded[0]), f"--plot={name}"]) == 0
    assert [path.name for path in Path().iterdir()] == [name]
    kind = "jpeg" if name.endswith("jpeg") else "png"
    assert matplotlib.image.imread(BytesIO(Path(name).read_bytes()), kind).shape[1] > 600
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "why"), [("folder", "directory"), ("no/where.png", "No such"), ("x.foo", "'foo'")])
def test_what_cannot_be_the_plot_is_an_error_and_nothing_is_written(recorded, name, why, capsys):
    Path("folder").mkdir()
    assert main(["report", str(recorded[0]), "--plot", name]) == 1
    assert why in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["folder"]


@pytest.mark.parametrize("factor", [math.nan, 0.0])
def test_a_run_without_a_norm_that_counts_has_a_diagnosis_and_no_suggestion(capsys, factor):
    run, callback, _ = fit(spikes=dict.fromkeys(range(60), factor))
    run.save_checkpoint("run.ckpt")
    assert main(["report", "run.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert callback.report().diagnoses
    assert "No problems found" not in printed
    assert "already clipped" not in printed
    assert main(["suggest", "run.ckpt"]) == 1
    assert "Expected at least 2 norms to suggest a percentile from, but got 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["suggest", "report"])
def test_a_reader_that_closes_the_pipe_ends_the_program_quietly(recorded, command):
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


def test_a_run_with_two_percentiles_is_not_judged_by_the_last_one(recorded, capsys):
    callback = by_percentile(90, verbose=False)
    resumed = trainer(callback, max_epochs=2)
    with pytest.warns(UserWarning, match=r"continues with: percentile 50\.0 → 90\.0\.$"):
        resumed.fit(Net(), loader(n=240), ckpt_path=recorded[0])
    assert math.isnan(callback.report().sections[0].figures.expected_fraction)
    resumed.save_checkpoint("both.ckpt")
    assert main(["report", "both.ckpt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sections"][0]["figures"]["expected_fraction"] is None


# --- the command line: suggest ----------------------------------------------------------------------------------------


def row_of(printed: str, percentile: float) -> list[str]:
    (row,) = (line.split() for line in printed.splitlines() if line.split()[:2] == [f"{percentile:g}", "100"])
    return row[2:]


def thresholds_of(norms: np.ndarray, percentile: float, window: int = 100) -> np.ndarray:
    return np.array([np.percentile(norms[max(0, i + 1 - window) : i + 1], percentile) for i in range(len(norms))])


def log_difference(norms: np.ndarray, thresholds: np.ndarray, fixed: float) -> float:
    """Between the logarithms of the clip coefficients of the thresholds and of a fixed one."""
    return float(np.mean((np.minimum(0, np.log(thresholds / norms)) - np.minimum(0, np.log(fixed / norms))) ** 2))


def printed_fixed(printed: str) -> float:
    return float(re.search(r"gradient_clip_val=(\S+)", printed)[1])


def test_suggest_shows_what_percentiles_and_the_nearest_fixed_threshold_would_have_clipped(recorded, capsys):
    path, _, norms = recorded
    assert main(["suggest", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "60 norms" in printed
    thresholds = thresholds_of(norms, 90)
    coefs = np.minimum(1, thresholds / norms)
    assert row_of(printed, 90)[:2] == [f"{np.mean(norms > thresholds):.1%}", f"{coefs.mean():.2f}"]
    percentile = float(re.search(r"Start with AutoClip\(percentile=(\d+)", printed)[1])
    thresholds, grid = thresholds_of(norms, percentile), np.geomspace(norms.min() / 2, norms.max() * 2, 3000)
    best, fixed = min(grid, key=lambda each: log_difference(norms, thresholds, each)), printed_fixed(printed)
    assert fixed == pytest.approx(best, rel=0.01)
    said = re.search(r"is the nearest here: (\S+)% clipped, mean coefficient (\S+)\.\n", printed)
    assert float(said[1]) == pytest.approx(100 * np.mean(norms > fixed), abs=2)
    assert float(said[2]) == pytest.approx(np.mean(np.minimum(1, fixed / norms)), abs=0.01)


def test_the_window_counts_in_what_is_suggested():
    norms = np.random.default_rng(0).lognormal(0, 1, 400)
    norms[200:] *= 100
    by_setting = candidates(norms.tolist())
    for window in (100, None):
        coefs = np.minimum(1, thresholds_of(norms, 25, window or 400) / norms)
        assert by_setting[25.0, window].clip_coef_mean == pytest.approx(coefs.mean(), rel=1e-5)
        assert by_setting[25.0, window].coef_min == pytest.approx(coefs.min(), rel=1e-5)
    assert by_setting[25.0, None].clip_coef_mean < by_setting[25.0, 100].clip_coef_mean
    best = recommended(by_setting)
    assert best[1] == 100
    assert by_setting[best].clip_coef_mean >= 0.6


@pytest.mark.parametrize("percentile", [1, 50, 100])
@pytest.mark.parametrize("kind", ["alike", "falling", "with spikes", "equal"])
def test_the_fixed_threshold_is_the_nearest_of_all(kind, percentile):
    norms = np.random.default_rng(0).lognormal(0, 0 if kind == "equal" else 0.5, 300)
    norms *= {"falling": np.geomspace(100, 0.1, 300), "with spikes": np.where(np.arange(300) % 40, 1, 50)}.get(kind, 1)
    thresholds = thresholds_of(norms, percentile)
    fixed = nearest_fixed(norms.tolist(), thresholds.tolist())
    grid = np.geomspace(norms.min() / 10, norms.max() * 10, 1000)
    least = min(log_difference(norms, thresholds, each) for each in grid)
    assert log_difference(norms, thresholds, fixed) <= least + 1e-9
    if percentile == 100 and kind != "falling":
        assert fixed == pytest.approx(norms.max()), "nothing was clipped: the least that clips nothing"


@pytest.mark.parametrize("policy", ["a percentile and a multiplier", "another"])
def test_by_value_suggest_names_the_fixed_threshold_that_comes_nearest(capsys, policy):
    options = {"gradient_clip_algorithm": "value", "verbose": False}
    percentile, multiplier = (50, 3.0) if policy == "another" else (75, 2.0)
    other = GradientClipping(Constant(0.1), **options)
    callback = other if policy == "another" else by_percentile(75, multiplier=2.0, **options)
    run, _, norms = fit(callback=callback, spikes={})
    run.save_checkpoint("value.ckpt")
    assert main(["suggest", "value.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert f"{multiplier:g} times the percentile" in printed
    rms = np.array(norms) / math.sqrt(sum(parameter.numel() for parameter in Net().parameters()))
    thresholds = multiplier * thresholds_of(rms, percentile)
    row = [float(cell) for cell in row_of(printed, percentile)]
    assert row[:2] == pytest.approx([thresholds.min(), thresholds.max()], rel=1e-2)
    geometric = np.exp(np.log(thresholds).mean())
    assert nearest_fixed_value(thresholds.tolist()) == pytest.approx(geometric)
    assert row[2] == printed_fixed(printed) == pytest.approx(geometric, rel=1e-2)
    assert f"percentile {percentile} over 100 steps" in printed
    assert 'gradient_clip_algorithm="value"' in printed
    assert "60 values of the gradient RMS" in printed


@pytest.mark.parametrize(
    ("steps", "windows", "said"),
    [
        (60, ["100"], "With 60 norms a window of 1000 or all is the same as 100."),
        (300, ["100", "1000"], "With 300 norms a window of all is the same as 1000."),
        (1010, ["100", "1000", "all"], None),
    ],
)
def test_windows_that_hold_all_norms_alike_are_shown_once(capsys, steps, windows, said):
    callback = by_percentile(50, window=None, verbose=False)
    fit(steps=steps, spikes={}, callback=callback)[0].save_checkpoint("run.ckpt")
    assert main(["suggest", "run.ckpt"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if "%  " in line]
    assert [*dict.fromkeys(row[1] for row in rows)] == windows
    assert len(rows) == 7 * len(windows)
    assert said in printed if said else "is the same as" not in printed


def test_a_long_run_is_suggested_from_the_steps_that_its_history_still_holds(capsys):
    run, _, norms = fit(steps=1200, spikes={})
    run.save_checkpoint("long.ckpt", weights_only=False)
    assert main(["suggest", "long.ckpt"]) == 0
    printed, last = capsys.readouterr().out, np.array(norms[-100:])
    assert "100 norms" in printed
    assert row_of(printed, 10)[0] == f"{np.mean(last > thresholds_of(last, 10)):.1%}"
