"""The callbacks in a Trainer and a LightningCLI of `pytorch_lightning`: the same runs as in those of `lightning`."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import yaml
from helpers import dataset, read_csv, weights
from lightning_utilities.core.imports import RequirementCache
from processes import run_program
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_autoclip import AutoClip, GradientClipping, ZScore


class Both(AutoClip, pytorch_lightning.Callback):
    """What a program writes that imports `lightning_autoclip` before `pytorch_lightning`."""


def model_of(package: Any, manual: bool) -> Any:
    """A module of the package's own class."""

    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.automatic_optimization = not manual
            self.net, self.second = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), nn.Linear(4, 1)

        def loss(self, batch: list[Tensor], net: nn.Module) -> Tensor:
            x, y, scale = batch
            return ((net(x) - y).square().squeeze(1) * scale).mean()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            if not manual:
                loss = self.loss(batch, self.net)
                self.log("loss", loss)
                return loss
            for optimizer, net in zip(self.optimizers(), (self.net, self.second), strict=True):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch, net))
                optimizer.step()
            return None

        def configure_optimizers(self) -> Any:
            first = SGD(self.net.parameters(), lr=0.1, momentum=0.9)
            return [first, Adam(self.second.parameters(), lr=0.01)] if manual else first

    return Net()


def fit(package: Any, folder: Path, callback: Any, manual: bool = False, epochs: int = 2, ckpt: Any = None) -> Any:
    """Train with everything of one package; return the Trainer, whose last checkpoint is ``folder/last.ckpt``."""
    trainer = package.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[callback, package.callbacks.ModelCheckpoint(folder, save_last=True)],
        logger=__import__(f"{package.__name__}.loggers", fromlist=["loggers"]).CSVLogger(folder),
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model_of(package, manual), DataLoader(dataset(scales=[1.0, 9.0, 3.0]), batch_size=4), ckpt_path=ckpt)
    return trainer


def rows(folder: Path) -> list[dict[str, str]]:
    """What the CSV logger has written."""
    (path,) = folder.glob("**/metrics.csv")
    return read_csv(path)


def callback_for(package: Any, *args: Any, **kwargs: Any) -> Any:
    return (Both if package is pytorch_lightning else AutoClip)(*args, **kwargs)


@pytest.mark.parametrize(
    ("algorithm", "manual"), [("norm", False), ("value", True)], ids=["automatic", "manual with two optimizers"]
)
def test_a_trainer_of_the_other_package_takes_and_logs_the_same_steps(algorithm, manual, tmp_path):
    ends, written = [], []
    for package in (lightning.pytorch, pytorch_lightning):
        callback = callback_for(package, 30, gradient_clip_algorithm=algorithm)
        trainer = fit(package, tmp_path / package.__name__, callback, manual)
        ends.append(weights(trainer.lightning_module))
        written.append(rows(tmp_path / package.__name__))
        assert [clipper.steps for clipper in callback.clippers] == [32] * (1 + manual)
    assert torch.equal(*ends)
    assert written[0] == written[1]
    assert any(key.startswith("autoclip/") for row in written[1] for key in row)


def test_a_checkpoint_of_one_package_continues_in_either(tmp_path):
    whole = fit(lightning.pytorch, tmp_path / "whole", AutoClip(30))
    fit(pytorch_lightning, tmp_path / "half", callback_for(pytorch_lightning, 30), epochs=1)
    for package in (lightning.pytorch, pytorch_lightning):
        callback = callback_for(package, 30)
        resumed = fit(package, tmp_path / package.__name__, callback, ckpt=tmp_path / "half" / "last.ckpt")
        assert callback.clippers[0].steps == 32
        assert torch.equal(weights(resumed.lightning_module), weights(whole.lightning_module))


@pytest.mark.skipif(
    not RequirementCache("pytorch-lightning>=2.6"),
    reason="Before 2.6 its Trainer asks for its own Callback class, which the program must have imported first.",
)
def test_a_trainer_takes_the_callback_whichever_package_was_imported_first(tmp_path):
    trainer = fit(pytorch_lightning, tmp_path, GradientClipping(ZScore(1.0)))
    assert float(trainer.callback_metrics["autoclip/threshold"]) > 0


def test_both_clippings_at_once_raise(tmp_path):
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", callbacks=[Both()], gradient_clip_val=1.0, logger=False, enable_checkpointing=False
    )
    with pytest.raises(Exception, match="would both clip"):
        trainer.fit(model_of(pytorch_lightning, manual=False), DataLoader(dataset()))


# --- LightningCLI -----------------------------------------------------------------------------------------------------

PROGRAM = """
{imports}
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel

{body}

if __name__ == "__main__":
    LightningCLI(BoringModel, seed_everything_default=0, save_config_callback=None, trainer_defaults={defaults})
"""
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=6",
    "--trainer.limit_val_batches=0",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
]


def call(*arguments: str, imports: str = "", body: str = "", defaults: str = "{}") -> CompletedProcess[str]:
    """Run a program with the other package's LightningCLI in the current directory."""
    Path("program.py").write_text(PROGRAM.format(imports=imports, body=body, defaults=defaults))
    return run_program(Path("program.py"), "fit", *SHORT, *arguments)


def settings() -> dict[str, Any]:
    """Those of the clipping callback in the one checkpoint that there is."""
    (path,) = Path().glob("**/*.ckpt")
    return torch.load(path, weights_only=True)["callbacks"]["AutoClip"]["settings"]


def test_the_cli_takes_callback_and_policy_from_a_config_file_and_the_command_line():
    clipping = {
        "class_path": "lightning_autoclip.GradientClipping",
        "init_args": {"policy": {"class_path": "lightning_autoclip.ZScore", "init_args": {"z": 3.0}}, "window": 50},
    }
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [clipping]}}))
    done = call("--config", "config.yaml", "--trainer.callbacks.policy.z=1.5")
    assert done.returncode == 0, done.stderr
    assert settings()["policy"] == {"class": "lightning_autoclip.policies.ZScore", "arguments": {"z": 1.5}}
    assert settings()["window"] == 50


def test_the_cli_takes_a_class_of_the_programs_own_that_extends_both():
    done = call(
        "--trainer.callbacks+=Clip",
        "--trainer.callbacks.percentile=25",
        imports="import lightning_autoclip\nimport pytorch_lightning",  # the other order
        body="class Clip(lightning_autoclip.AutoClip, pytorch_lightning.Callback):\n    pass",
    )
    assert done.returncode == 0, done.stderr
    assert settings()["policy"]["arguments"] == {"percentile": 25, "multiplier": 1}


def test_a_callback_among_the_clis_defaults_clips():
    done = call(
        imports="import pytorch_lightning\nimport lightning_autoclip",
        defaults='{"callbacks": lightning_autoclip.AutoClip(percentile=25)}',
    )
    assert done.returncode == 0, done.stderr
    assert settings()["policy"]["arguments"]["percentile"] == 25


def test_importing_the_package_does_not_import_the_other_one():
    Path("program.py").write_text("import sys, lightning_autoclip\nsys.exit('pytorch_lightning' in sys.modules)")
    assert run_program(Path("program.py")).returncode == 0
