"""Names of modules and files may have any printable characters: every logger takes them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers import Net, loader, read_csv, trainer
from lightning.pytorch.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loggers import HEALTHS, MAKERS, READERS, TABLES, _mlflow_on_disk, of_all_loggers  # noqa: F401  # a fixture
from torch import Tensor, nn
from wandb_reader import finish, read_runs

from lightning_autoclip import AutoClip, NonFiniteGradientError
from lightning_autoclip.__main__ import main
from lightning_autoclip._text import as_markdown, shown

NAMES = ["a*b", "=1+1|x", "<b>h</b>", "`code`", "[l](u)", "$a$b$\\frac", "ü 漢", "*"]
NAMES += ["a_2a_b", "_fc_ _6f22_"]  # the keys of the first one and, in MLflow, of another
LAST = "=cmd|' /C calc'!A0"


class Odd(Net):
    """A network whose modules have such names; the last of them has the largest gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({name: nn.Linear(4, 4) for name in NAMES})
        self.add_module(LAST, nn.Linear(4, 1))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y, scale = batch
        for module in self.net.values():
            x = module(x)
        return ((self._modules[LAST](x) - y).square().squeeze(1) * scale).mean()


def test_every_logger_takes_them_in_keys_tables_and_summaries(tmp_path: Path, wandb_offline: None) -> None:
    loggers = [*of_all_loggers(tmp_path), WandbLogger(save_dir=tmp_path / "wandb", project="names")]
    autoclip = AutoClip(50, log_layers=True, alert_above=5.0, verbose=False)
    data = loader(n=128, scales=[1.0] * 96 + [300.0] * 4 + [float("nan")] * 4 + [1.0] * 24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(autoclip, logger=loggers, log_every_n_steps=4).fit(Odd(), data)
    assert not [each for each in caught if "could not be" in str(each.message)]
    finish(tmp_path)
    (run,) = read_runs(tmp_path)
    keys = {kind: {*read(tmp_path / kind)} for kind, read in READERS.items()}
    for found in (*keys.values(), {key for row in run.history for key in row}):
        layers = [key for key in found if key.startswith("autoclip_layers/")]
        assert len(layers) == len(NAMES) + 1
        assert all(re.fullmatch(r"[\w\-. /:]+", key) for key in layers)
    summaries = [*(of(tmp_path / kind) for kind, of in HEALTHS.items()), run.summary["autoclip/health"]]
    assert summaries == [autoclip.report().summary] * 4
    expected = [spike["parameters"] for spike in autoclip.spikes()]
    assert any(LAST in parameters for parameters in expected)
    rows = read_csv(tmp_path / "csv" / "run" / "autoclip_spikes.csv")
    assert [row["parameters"] for row in rows] == expected
    assert TABLES["mlflow"](tmp_path / "mlflow") == (tmp_path / "csv" / "run" / "autoclip_spikes.csv").read_text()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard" / "run")).Reload().Tensors("autoclip/spikes/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1, "as many cells in each row"
    assert "<b>" not in text.replace(r"\<", "")
    assert {"net.a*b.weight", f"{LAST}.bias"} <= autoclip.logs["autoclip/"].shares.keys()
    assert "=1+1" in autoclip.report().to_markdown() + str(autoclip.report())
    autoclip.plot().savefig(tmp_path / "plot.png", dpi=20)


def test_an_error_names_them() -> None:
    with pytest.raises(NonFiniteGradientError, match=re.escape("net.=1+1|x.weight")):
        trainer(AutoClip(50, nonfinite="raise")).fit(Odd(), loader(scales=[float("nan")] * 64))


def test_values_in_messages_are_short_and_marks_of_markdown_are_escaped() -> None:
    nested: Any = 1
    for _ in range(60):
        nested = {"a": [nested, nested], "b": (nested, nested)}
    assert len(shown(nested)) <= 120
    assert shown({"a": [1, "x" * 50], "b": (2.5,)}) == repr({"a": [1, "x" * 50], "b": (2.5,)})
    assert as_markdown("a|b`c`<d>") == r"a\|b\`c\`\<d>"


@pytest.mark.parametrize("name", ["with space.ckpt", "-dash $x$ %s{}.ckpt"])
def test_a_file_may_have_any_name(name: str) -> None:
    run = trainer(AutoClip(50, verbose=False))
    run.fit(Net(), loader())
    run.save_checkpoint(Path(name).absolute())
    assert main(["report", "--plot=out of it.png", "--", name]) == 0
    assert Path("out of it.png").exists()
    assert main(["report", "--", f"no {name}"]) == 1


def test_groups_and_layers_stay_apart_in_mlflow(tmp_path: Path) -> None:
    """Lightning strips all but letters, digits and `_/. -` there."""

    class Nested(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"a/b": nn.Linear(4, 8), "a": nn.Linear(8, 1), "x" * 300: nn.Linear(1, 1)})

        def loss(self, batch: list[Tensor]) -> Tensor:
            x, y, scale = batch
            for module in self.net.values():
                x = module(x)
            return ((x - y).square().squeeze(1) * scale).mean()

    groups = {"a:b": "net.a/b.*", "a,b": "net.a.*", "ü": "net.x*.weight", "#": "net.x*.bias"}
    autoclip = AutoClip(50, groups=groups, log_layers=True, verbose=False)
    trainer(autoclip, logger=MAKERS["mlflow"](tmp_path), log_every_n_steps=4).fit(Nested(), loader())
    series = READERS["mlflow"](tmp_path)
    norms = [key for key in series if key.endswith("/grad_norm_mean")]
    assert len(norms) == 4
    assert len({tuple(series[key]) for key in norms}) == 4
    assert len([key for key in series if key.startswith("autoclip_layers/")]) == 4
