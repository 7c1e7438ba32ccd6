"""Names of modules and files may be any: every logger takes them, and no terminal obeys them."""

from __future__ import annotations

import csv
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, loader, trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from test_loggers import HEALTHS, MAKERS, READERS, _mlflow_on_disk, mlflow_runs  # noqa: F401  # a fixture
from torch import Tensor, nn
from wandb_reader import finish, read_runs

from lightning_autoclip import AutoClip, NonFiniteGradientError
from lightning_autoclip.__main__ import main
from lightning_autoclip._text import as_markdown, printable, shown

NAMES = [
    "a*b",
    "=1+1|x",
    "x\ny",
    "\x1b[31mred",
    "<b>h</b>",
    "`code`",
    "[l](u)",
    "$a$b$\\frac",
    "ü 漢",
    "\u202eleft",
    "*",
    "a_2a_b",  # what the first one's key is
    "_fc_ _6f22_",  # what MLflow is told of another
]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\u202e]")  # any but the end of a line


class Odd(Net):
    """A network whose modules have such names; the worst of them hold the largest gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({name: nn.Linear(4, 4) for name in NAMES})
        self.add_module("=cmd|' /C calc'!A0", nn.Linear(4, 1))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y, scale = batch
        for module in self.net.values():
            x = module(x)
        return ((self._modules["=cmd|' /C calc'!A0"](x) - y).square().squeeze(1) * scale).mean()


def fit(logger: Any, capsys: pytest.CaptureFixture[str], **kwargs: Any) -> tuple[AutoClip, str]:
    autoclip = AutoClip(50, log_layers=True, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(autoclip, logger=logger, log_every_n_steps=4).fit(
            Odd(), loader(n=128, scales=[1.0] * 96 + [300.0] * 4 + [float("nan")] * 4 + [1.0] * 24)
        )
    assert not [each for each in caught if "could not be" in str(each.message)]
    return autoclip, capsys.readouterr().out


def assert_harmless(text: str) -> None:
    assert not CONTROL.search(text), CONTROL.search(text)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_logger_takes_them(kind, tmp_path, capsys):
    autoclip, printed = fit(MAKERS[kind](tmp_path), capsys)
    assert_harmless(printed)
    assert_harmless(str(autoclip.report()))
    assert_harmless(autoclip.report().to_markdown())
    series = READERS[kind](tmp_path)
    layers = [key for key in series if key.startswith("autoclip_layers/")]
    assert len(layers) == len(NAMES) + 1
    assert all(re.fullmatch(r"[\w\-. /:]+", key) for key in layers)
    assert HEALTHS[kind](tmp_path) == autoclip.report().summary
    autoclip.plot().savefig(tmp_path / "plot.png", dpi=20)


def test_the_table_has_a_line_for_each_spike(tmp_path, capsys):
    autoclip, _ = fit(CSVLogger(tmp_path, name="", version="run"), capsys)
    text = (tmp_path / "run" / "autoclip_spikes.csv").read_text(encoding="utf-8")
    assert_harmless(text)
    rows = [*csv.DictReader(io.StringIO(text))]
    assert len(rows) == len(autoclip.spikes()) == len(text.splitlines()) - 1
    assert [row["parameters"] for row in rows] == [spike["parameters"] for spike in autoclip.spikes()]


def test_weights_and_biases_takes_them_too(tmp_path, capsys, wandb_offline):
    autoclip, _ = fit(WandbLogger(save_dir=tmp_path, project="names"), capsys, alert_above=5.0)
    finish(tmp_path)
    (run,) = read_runs(tmp_path)
    layers = {key for row in run.history for key in row if key.startswith("autoclip_layers/")}
    assert len(layers) == len(NAMES) + 1
    assert run.summary["autoclip/health"] == autoclip.report().summary


def test_mlflows_table_is_one(tmp_path, capsys):
    fit(MAKERS["mlflow"](tmp_path), capsys)
    client, (run,) = mlflow_runs(tmp_path)
    assert_harmless(Path(client.download_artifacts(run.info.run_id, "autoclip_spikes.csv")).read_text(encoding="utf-8"))


def test_tensorboards_markdown_has_as_many_cells_in_each_row(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(MAKERS["tensorboard"](tmp_path), capsys)
    (event,) = EventAccumulator(str(tmp_path / "run")).Reload().Tensors("autoclip/spikes/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert_harmless(text)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1
    assert "<b>" not in text.replace(r"\<", "")


def test_an_error_shows_them_harmlessly():
    with pytest.raises(NonFiniteGradientError, match=r"x\\ny") as caught:
        trainer(AutoClip(50, nonfinite="raise")).fit(Odd(), loader(scales=[float("nan")] * 64))
    assert_harmless(str(caught.value))


def test_what_is_shared_in_many_places_is_shown_in_short():
    nested: Any = 1
    for _ in range(60):
        nested = {"a": [nested, nested], "b": (nested, nested)}
    assert len(shown(nested)) <= 120
    assert shown({"b": [1, "x" * 50], "a": (2.5,)}) == repr({"b": [1, "x" * 50], "a": (2.5,)})


@pytest.mark.parametrize("name", ["with space.ckpt", "-dash.ckpt", "a\nb.ckpt", "\x1b[31m.ckpt", "$x$", "%s{}.ckpt"])
def test_a_file_may_have_any_name(name, capsys):
    run = trainer(AutoClip(50, verbose=False))
    run.fit(Net(), loader())
    run.save_checkpoint(Path(name).absolute())
    capsys.readouterr()
    assert main(["report", "--plot=out of it.png", "--", name]) == 0
    shown = capsys.readouterr()
    assert_harmless(shown.out + shown.err)
    assert Path("out of it.png").exists()
    assert main(["report", "--", f"no {name}"]) == 1
    assert_harmless(capsys.readouterr().err)


def test_groups_and_layers_stay_apart_in_mlflow(tmp_path, capsys):
    """Lightning strips there what is no letter, digit or one of `_/. -`."""

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


def test_what_has_no_glyph_is_an_escape():
    assert printable("it's ü") == "it's ü"
    assert printable("a\nb\x00\ud800\u202e ü") == r"a\nb\x00\ud800\u202e ü"
    assert as_markdown("a|b`c`<d>\n") == r"a\|b\`c\`\<d>\\n"


def test_parameters_are_called_by_their_names_in_the_record():
    autoclip = AutoClip(50, verbose=False)
    trainer(autoclip).fit(Odd(), loader())
    assert "net.a*b.weight" in autoclip.traces["autoclip/"].names
    assert torch.isfinite(torch.tensor([*autoclip.traces["autoclip/"].shares.values()])).all()
