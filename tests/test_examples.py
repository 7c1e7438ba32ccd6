"""Each example runs as a user runs it, in shortened form."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.image
import pytest
import torch
import yaml
from processes import ROOT, run_program
from wandb_reader import read_runs

FILES = sorted((ROOT / "examples").glob("*.py"))


def run(example: str, *arguments: object, cwd: Path) -> str:
    """What the example prints when it is run in the directory ``cwd``."""
    done = run_program(ROOT / "examples" / example, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr  # nothing but progress bars
    return done.stdout


def numbers(pattern: str, output: str) -> tuple[float, ...]:
    """The numbers at the groups of the pattern, which must occur once."""
    (found,) = re.findall(pattern, output)
    return tuple(map(float, [found] if isinstance(found, str) else found))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo printed, and the directory that it ran in."""
    cwd = tmp_path_factory.mktemp("demo")
    return run("char_lm.py", "--steps", 16, "--out", "there", cwd=cwd), cwd


def test_the_demo_compares_its_three_runs_in_a_table(demo):
    cell = r" +([\d.]+)"
    row = cell + cell + cell + "%" + cell
    none, fixed, auto = (numbers(f"(?m)^{name}{row}$", demo[0]) for name in ("no clipping", "fixed 1", "AutoClip"))
    assert none[2:] == (0, 1)  # percent of the steps clipped, mean factor: it only observes
    for loss, largest, clipped, factor in (fixed, auto):
        assert 1 < loss < none[0]
        assert largest > 1
        assert 0 < clipped <= 100
        assert 0 < factor < 1
    assert auto[2] > fixed[2]


def test_the_demo_draws_a_figure_of_1200_by_900_pixels(demo):
    image = matplotlib.image.imread(demo[1] / "there" / "char_lm.png")
    assert image.shape[:2] == (900, 1200)
    assert image[..., :3].std() > 0.05  # not blank


def test_the_demo_ends_each_run_with_its_report_and_draws_the_last(demo):
    assert len(re.findall(r"(?m)^autoclip: 16 steps, ", demo[0])) == 3
    assert matplotlib.image.imread(demo[1] / "there" / "autoclip.png").shape[1] == 880


def test_the_demo_names_the_figure_and_the_offline_wandb_runs_that_it_wrote(demo):
    output, cwd = demo
    (figure,) = re.findall(r"(?m)^figure +(.+)$", output)
    assert (cwd / figure).is_file()
    wandb, directory = re.search(r"(?m)^browse in the terminal +(.+) leet (.+)$", output).groups()
    assert (cwd / wandb).is_file()
    assert len(list((cwd / directory).glob("offline-run-*/run-*.wandb"))) == 3
    (pattern,) = re.findall(r"(?m)^send to W&B +.+ sync (.+)$", output)
    assert len(list(cwd.glob(pattern))) == 3


def test_the_demo_writes_where_it_is_told_to(demo):
    assert [path.name for path in demo[1].iterdir()] == ["there"]


def test_two_optimizers_have_a_threshold_each(tmp_path):
    output = run("two_optimizers.py", "--steps", 100, cwd=tmp_path)
    thresholds = [
        numbers(rf"(?m)^{network} +last norm [\d.]+ +threshold ([\d.]+)$", output)[0]
        for network in ("generator", "discriminator")
    ]
    assert all(threshold > 0 for threshold in thresholds)
    assert thresholds[0] != thresholds[1]


def test_clipping_by_value_withstands_the_outliers_that_spoil_the_run_without_clipping(tmp_path):
    output = run("value_clipping.py", "--steps", 200, cwd=tmp_path)
    unclipped, clipped = numbers(r"loss on clean data: ([\d.]+) without clipping, ([\d.]+) with AutoClip", output)
    assert clipped < 0.5 < 10 < unclipped
    rms, threshold = numbers(r"root-mean-square entry ([\d.]+), threshold ([\d.]+)", output)
    assert rms > 0
    assert threshold > 0


def test_overflows_of_mixed_precision_are_counted_and_not_recorded(tmp_path):
    output = run("mixed_precision.py", "--steps", 60, cwd=tmp_path)
    overflowed, recorded, threshold, scale = (
        numbers(rf"(?m)^{name} +([\d.]+)$", output)[0]
        for name in ("of these overflowed", "norms in the record", "threshold", "loss scale at the end")
    )
    assert overflowed >= 1
    assert overflowed + recorded == 60
    assert threshold > 0
    assert scale == 65536 / 2**overflowed


def test_the_resumed_example_ends_with_the_thresholds_and_weights_of_the_uninterrupted_run(tmp_path):
    output = run("resume.py", "--epochs", 4, cwd=tmp_path)
    assert "thresholds equal: True" in output
    assert "weights equal: True" in output
    half, whole, resumed = numbers(r"half way ([\d.]+), at the end ([\d.]+) uninterrupted and ([\d.]+)", output)
    assert half != whole
    assert whole == resumed
    assert (tmp_path / "runs" / "resume" / "half.ckpt").is_file()


def test_the_resumed_fabric_loop_ends_with_the_threshold_and_weights_of_the_uninterrupted_one(tmp_path):
    output = run("fabric.py", "--steps", 40, cwd=tmp_path)
    whole, resumed = numbers(r"at the end ([\d.]+) uninterrupted and ([\d.]+)", output)
    assert whole == resumed > 0
    assert "weights equal: True" in output


def test_the_plain_loop_leaves_overflows_to_its_scaler_and_resumes_from_its_file(tmp_path):
    output = run("plain_pytorch.py", "--steps", 40, cwd=tmp_path)
    steps, overflowed = numbers(r"(\d+) steps, (\d+) of them overflowed", output)
    assert steps == 40
    assert 1 <= overflowed < 10
    assert "weights equal: True" in output
    assert torch.load(tmp_path / "runs" / "plain_pytorch" / "half.pt", weights_only=True)["clipper"]["steps"] == 20


def test_a_sweep_on_this_machine_ranks_percentiles_and_leaves_a_run_of_each(tmp_path):
    output = run("sweep/main.py", "--loop", 50, 100, "--steps", 60, cwd=tmp_path)
    (best, least), (worst, most) = re.findall(r"(?m)^ +(\d+)  ([\d.]+)$", output)
    assert (best, worst) == ("50", "100")  # one target in 300 is far off
    assert 10 * float(least) < float(most)
    runs = read_runs(tmp_path / "runs" / "sweep")
    policies = [run.config["lightning_autoclip"]["percentile"] for run in runs]
    assert sorted(policies) == [50, 100]
    (pattern,) = re.findall(r"(?m)^send to W&B: wandb sync (.+)$", output)
    assert len(list(tmp_path.glob(pattern))) == 2


def test_the_program_of_the_sweep_takes_what_an_agent_calls_it_with(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep = yaml.safe_load((ROOT / "examples" / "sweep" / "sweep.yaml").read_text())
    assert (sweep["program"], sweep["metric"]["name"]) == ("main.py", "val_loss")
    chosen = [f"--{name}={entry['values'][0]}" for name, entry in sweep["parameters"].items()]
    ended = run_program(ROOT / "examples" / "sweep" / "main.py", *chosen, "--steps", 20, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (done,) = read_runs(tmp_path / "runs" / "sweep")
    assert any("val_loss" in row for row in done.history)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_under_eighty_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_every_example_is_run_by_a_test():
    tests = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"model_zoo.py"}  # in `make test-zoo`, which has an environment of its own
    programs = [path.name for path in FILES if not path.name.startswith("_") and path.name not in elsewhere]
    assert len(programs) >= 5
    assert [name for name in programs if f'run("{name}"' not in tests] == []
