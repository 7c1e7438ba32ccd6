"""LightningCLI takes the callbacks and their policies from config files and the command line, as a user gives them."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import yaml
from processes import ROOT, run_program

EXAMPLE = ROOT / "examples" / "cli"
SHORT = ["--model.steps=10", "--trainer.enable_progress_bar=false"]
AUTOCLIP, ZSCORE = (["--config", EXAMPLE / name] for name in ("config.yaml", "zscore.yaml"))


def call(*arguments: object) -> CompletedProcess[str]:
    """Run ``python main.py fit ...`` in the current directory."""
    return run_program(EXAMPLE / "main.py", "fit", *arguments)


def fit(*arguments: object) -> dict[str, Any]:
    """Train in a short form, and return the last checkpoint."""
    done = call(*arguments, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "autoclip: " in done.stdout  # its report
    last = max(Path().glob("**/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(last, weights_only=True)


def printed(*arguments: object) -> dict[str, Any]:
    """The config that ``--print_config`` prints."""
    done = call(*arguments, "--print_config")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def clipping_of(config: dict[str, Any]) -> dict[str, Any]:
    """The last callback of a config: the clipping one."""
    return config["trainer"]["callbacks"][-1]


def state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["callbacks"]["AutoClip"]


def test_a_config_file_sets_the_callback_up_and_a_run_resumes_from_its_checkpoint():
    half = fit(*AUTOCLIP, "--trainer.callbacks.percentile=25")
    settings = state_of(half)["settings"]
    assert settings["policy"] == {
        "class": "lightning_autoclip.policies.Percentile",
        "arguments": {"percentile": 25, "multiplier": 1},  # of the command line
    }
    assert settings["window"] == 100  # of the file
    (last,) = Path().glob("**/last.ckpt")
    resumed = ["--trainer.callbacks.percentile=25", "--trainer.max_epochs=3", "--ckpt_path", last]
    whole = fit(*AUTOCLIP, *resumed)
    first, second = (state_of(checkpoint)["groups"]["autoclip/"]["clipper"] for checkpoint in (half, whole))
    assert (first["steps"], second["steps"]) == (20, 30)
    assert second["history"]["values"][:20] == first["history"]["values"]


def test_the_printed_config_says_everything_and_trains_as_what_it_was_printed_from():
    arguments = [*AUTOCLIP, "--trainer.callbacks.percentile=40", "--trainer.callbacks.warmup_steps=3"]
    config = printed(*arguments)
    clipping = clipping_of(config)
    assert clipping["class_path"] == "lightning_autoclip.AutoClip"
    given = {"percentile": 40.0, "window": 100, "warmup_steps": 3}
    defaults = {"multiplier": None, "gradient_clip_algorithm": "norm", "max_threshold": None, "nonfinite": "skip"}
    assert clipping["init_args"].items() >= (given | defaults).items()
    Path("printed.yaml").write_text(yaml.safe_dump(config))
    assert printed("--config", "printed.yaml") == config
    first, second = fit(*arguments), fit("--config", "printed.yaml")
    assert state_of(first)["settings"] == state_of(second)["settings"]
    assert all(torch.equal(first["state_dict"][name], weight) for name, weight in second["state_dict"].items())


def test_a_policy_is_chosen_and_set_by_its_class_path():
    settings = state_of(fit(*AUTOCLIP, *ZSCORE, "--trainer.callbacks.policy.z=1.5"))["settings"]
    assert settings["policy"] == {"class": "lightning_autoclip.policies.ZScore", "arguments": {"z": 1.5}}
    assert settings["window"] == 200
    another = ["--trainer.callbacks.policy=lightning_autoclip.Constant", "--trainer.callbacks.policy.threshold=0.5"]
    policy = clipping_of(printed(*AUTOCLIP, *ZSCORE, *another))["init_args"]["policy"]
    assert policy == {"class_path": "lightning_autoclip.Constant", "init_args": {"threshold": 0.5}}


def test_the_command_line_alone_sets_the_callback_up():
    config = printed(
        "--trainer.callbacks+=AutoClip",
        "--trainer.callbacks.window=null",
        "--trainer.callbacks.gradient_clip_algorithm=value",
        "--trainer.callbacks.log_layers=3",
        "--trainer.callbacks.max_threshold=5",
    )
    (clipping,) = config["trainer"]["callbacks"]
    assert clipping["class_path"] == "lightning_autoclip.AutoClip"
    given = {"window": None, "gradient_clip_algorithm": "value", "log_layers": 3, "max_threshold": 5.0}
    assert clipping["init_args"].items() >= given.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.callbacks.percentile=200"], "Expected `percentile` to be a number between 0 and 100, but got 200"),
        ([*ZSCORE, "--trainer.callbacks.policy.z=-1"], "Expected `z` to be a number above 0, but got -1"),
        (["--trainer.gradient_clip_val=1"], "Remove `gradient_clip_val`"),
    ],
    ids=["percentile", "policy", "clipped twice"],
)
def test_a_bad_value_ends_the_program_with_our_message(arguments, message):
    done = call(*AUTOCLIP, *arguments, *SHORT)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(Path().glob("**/*.ckpt"))


def test_a_word_that_is_no_algorithm_is_an_error_before_anything_is_made():
    done = call(*AUTOCLIP, "--trainer.callbacks.gradient_clip_algorithm=median")
    assert done.returncode == 2  # as argparse ends
    assert "gradient_clip_algorithm" in done.stderr
