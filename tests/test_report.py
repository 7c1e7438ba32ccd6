"""The report on real runs: each diagnosis appears where it should, and none on a healthy run."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, by_percentile, loader, norm_of, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from models import Gradients
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoclip import AutoClip, Constant, GradientClipping, StepRecord
from lightning_autoclip.diagnoses import LEAST_STEPS
from lightning_autoclip.report import report_of
from lightning_autoclip.steplog import StepLog
from lightning_autoclip.table import Place

Data = tuple[Tensor, Tensor]
NOTHING = "no problems found in the gradient norms"


class Task(LightningModule):
    """A network, a loss and an optimizer, with a learning rate that may rise in the first steps."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor], optimizer: Any, warm_up: int = 0) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer, self.warm_up = net, loss, optimizer, warm_up
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / (self.warm_up + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# --- networks and data ------------------------------------------------------------------------------------------------


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def conv() -> nn.Module:
    first = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6))


class LSTM(nn.Module):
    def __init__(self, vocabulary: int = 24) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(vocabulary, 24), nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, vocabulary)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0]).mT


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(24, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 24)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(self.embedding(x) + self.position, mask=mask, is_causal=True)).mT


def regression(n: int) -> Data:
    x, teacher = torch.randn(n, 16), mlp(16, 32, 1, act=nn.Tanh)
    return x, 3 * teacher(x).detach() + 0.1 * torch.randn(n, 1)


def classification(n: int) -> Data:
    centres, y = 2 * torch.randn(8, 16), torch.randint(8, (n,))
    return centres[y] + 1.5 * torch.randn(n, 16), y


def images(n: int) -> Data:
    centres, y = torch.randn(6, 1, 8, 8), torch.randint(6, (n,))
    return centres[y] + torch.randn(n, 1, 8, 8), y


def text(n: int, vocabulary: int = 24) -> Data:
    """Each token drawn given the one before it, and the tokens that follow."""
    following = (3 * torch.randn(vocabulary, vocabulary)).softmax(1)
    tokens = [torch.randint(vocabulary, (n,))]
    for _ in range(16):
        tokens.append(torch.multinomial(following[tokens[-1]], 1)[:, 0])
    drawn = torch.stack(tokens, 1)
    return drawn[:, :-1], drawn[:, 1:]


def multiplied(batches: dict[int, float]) -> Callable[[int], Data]:
    """The regression with the inputs of some batches of 16 rows multiplied by a factor."""

    def made(n):
        x, y = regression(n)
        for batch, factor in batches.items():
            x[16 * batch : 16 * (batch + 1)] *= factor
        return x, y

    return made


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Data], Callable[..., Tensor]]] = {
    "regression": (lambda: mlp(16, 64, 64, 1), regression, mse_loss),
    "deep regression": (lambda: mlp(16, *[64] * 7, 1, act=nn.Tanh), regression, mse_loss),
    "classification": (lambda: mlp(16, 64, 64, 8), classification, cross_entropy),
    "conv": (conv, images, cross_entropy),
    "lstm": (LSTM, text, cross_entropy),
    "transformer": (Transformer, text, cross_entropy),
}


def optimizer(name: str, lr: float) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    if name == "SGD":
        return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return lambda parameters: getattr(torch.optim, name)(parameters, lr=lr)


def train(
    clipping: GradientClipping,
    task: str = "regression",
    opt: str = "SGD",
    lr: float = 0.02,
    *,
    net: Callable[[], nn.Module] | None = None,
    data: Callable[[int], Data] | None = None,
    loss: Callable[..., Tensor] | None = None,
    n: int = 640,
    batch_size: int = 16,
    epochs: int = 6,
    warm_up: int = 0,
    shuffle: bool = True,
    **kwargs: Any,
) -> Task:
    """240 steps, if nothing else is said."""
    torch.manual_seed(0)
    usual_net, usual_data, usual_loss = TASKS[task]
    rows = DataLoader(TensorDataset(*(data or usual_data)(n)), batch_size, shuffle=shuffle)
    module = Task((net or usual_net)(), loss or usual_loss, optimizer(opt, lr), warm_up)
    trainer(clipping, max_epochs=epochs, **kwargs).fit(module, rows)
    return module


def names(clipping: GradientClipping) -> list[str]:
    return [diagnosis.name for diagnosis in clipping.report().diagnoses]


def evidence(clipping: GradientClipping, name: str) -> str:
    return next(diagnosis.evidence for diagnosis in clipping.report().diagnoses if diagnosis.name == name)


# --- healthy runs -----------------------------------------------------------------------------------------------------

HEALTHY = [  # task, optimizer, learning rate, percentile, algorithm, steps of the learning-rate warm-up
    ("regression", "SGD", 0.02, 10, "norm", 0),
    ("lstm", "SGD", 0.5, 50, "value", 0),
    ("lstm", "Adam", 2e-3, 90, "norm", 0),
    ("conv", "Adam", 2e-3, 90, "value", 50),
    ("deep regression", "AdamW", 2e-3, 10, "norm", 50),
    ("transformer", "AdamW", 2e-3, 10, "norm", 50),
    ("classification", "AdamW", 2e-3, 10, "value", 0),
]


@pytest.mark.parametrize(("task", "opt", "lr", "percentile", "algorithm", "warm_up"), HEALTHY)
def test_a_healthy_run_has_no_diagnosis(task, opt, lr, percentile, algorithm, warm_up):
    clipping = AutoClip(percentile, gradient_clip_algorithm=algorithm)
    module = train(clipping, task, opt, lr, warm_up=warm_up)
    assert np.mean(module.losses[-20:]) < 0.7 * np.mean(module.losses[:5])  # it learns
    assert not clipping.report().diagnoses, str(clipping.report())
    assert clipping.report().summary == NOTHING
    assert " ".join(str(clipping.report()).split()).endswith("No problems found in the gradient norms.")


def pretrained() -> nn.Sequential:
    """A classifier of other classes than those to come, with a new head, which alone is to be trained."""
    net, (x, y) = mlp(16, 64, 64, 8), classification(640)
    adam = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(100):
        adam.zero_grad()
        cross_entropy(net(x), y).backward()
        adam.step()
    net[:-1].requires_grad_(False)
    net[-1] = nn.Linear(64, 8)
    return net


UNUSUAL: dict[str, Callable[[AutoClip], Any]] = {
    "norms that fall by more than a tenth": lambda clipping: train(clipping, "classification"),
    "fine-tuning of the head alone": lambda clipping: train(clipping, "classification", net=pretrained),
    "batches of one row": lambda clipping: train(clipping, lr=0.002, n=300, batch_size=1, epochs=1),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_an_unusual_run_that_is_healthy_has_no_diagnosis(case):
    clipping = AutoClip(50)
    UNUSUAL[case](clipping)
    assert not clipping.report().diagnoses, str(clipping.report())
    figures = clipping.report().sections[0].figures
    assert case != "norms that fall by more than a tenth" or figures.norm_last < 0.1 * figures.norm_first


@pytest.mark.parametrize("warmup_steps", [0, 120])
def test_norms_that_rise_slowly_have_no_diagnosis_though_they_are_clipped_often(warmup_steps):
    clipping = AutoClip(90, warmup_steps=warmup_steps)
    train(clipping, "lstm", "Adam", 2e-3, net=lambda: LSTM(500), data=lambda n: text(n, 500))
    figures = clipping.report().sections[0].figures
    assert figures.clipped_fraction > figures.expected_fraction + 0.05 * (1 - warmup_steps / 240)
    assert not clipping.report().diagnoses, str(clipping.report())


# --- a bad run for each diagnosis -------------------------------------------------------------------------------------


def test_a_learning_rate_that_is_far_too_high_shows_in_growing_norms_unless_the_update_ratio_is_limited():
    unlimited, limited = by_percentile(50), AutoClip(50)
    for clipping in (unlimited, limited):
        train(clipping, "transformer", "SGD", 3.0)
    assert {"growing norms", "clipped far more often than the percentile implies"} <= set(names(unlimited))
    assert "learning rate too high" in names(limited)
    assert "growing norms" not in names(limited)


@pytest.mark.parametrize(("percentile", "warmup_steps", "expected"), [(10, 0, "90%"), (90, 120, "5%")])
def test_an_unbounded_loss_shows_in_growing_norms(percentile, warmup_steps, expected):
    clipping = AutoClip(percentile, warmup_steps=warmup_steps)
    train(clipping, opt="Adam", lr=2e-3, loss=lambda predicted, y: -mse_loss(predicted, y))
    assert {"growing norms", "clipped far more often than the percentile implies"} <= set(names(clipping))
    evidence_of_clipping = evidence(clipping, "clipped far more often than the percentile implies")
    assert evidence_of_clipping.endswith(f"of the steps were clipped, where {expected} are expected.")


def test_norms_that_grew_and_fell_again_are_diagnosed():
    clipping = AutoClip(90)
    train(clipping, "transformer", "AdamW", 10.0)
    figures = clipping.report().sections[0].figures
    assert figures.norm_last < figures.norm_first
    assert "growing norms" in names(clipping)


def scaled(net: nn.Sequential, layer: int, factor: float) -> nn.Sequential:
    with torch.no_grad():
        net[layer].weight.mul_(factor)
    return net


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_layer_that_starts_a_hundred_times_too_large_makes_one_layer_dominate(algorithm):
    clipping = AutoClip(50, gradient_clip_algorithm=algorithm)
    train(clipping, opt="Adam", lr=2e-3, net=lambda: scaled(mlp(16, 64, 1), 0, 100.0))
    assert evidence(clipping, "one layer dominates the gradient norm").startswith("net.2 has ")  # its inputs are large


@pytest.mark.parametrize(("act", "opt", "lr"), [(nn.Sigmoid, "SGD", 0.02), (nn.Tanh, "Adam", 1e-3)])
def test_vanishing_gradients_of_a_deep_network_are_diagnosed(act, opt, lr):
    def deep():
        net = mlp(16, *[32] * 12, 8, act=act)
        for layer in net if act is nn.Tanh else ():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        return net

    clipping = AutoClip(50)
    module = train(clipping, "classification", opt, lr, net=deep)
    assert np.mean(module.losses[-20:]) > 0.9 * math.log(8)  # it learns nothing
    assert "net.0.weight" in evidence(clipping, "vanishing gradients")


def test_units_that_die_show_in_vanishing_norms():
    def positive(n):
        x, y = regression(n)
        return x, y.abs()

    clipping = by_percentile(50)
    train(clipping, lr=5.0, net=lambda: nn.Sequential(*mlp(16, 64, 64, 1), nn.ReLU()), data=positive)
    assert names(clipping) == ["vanishing norms"]
    assert "exactly zero" in evidence(clipping, "vanishing norms")


def test_a_loss_that_is_solved_shows_in_vanishing_norms():
    clipping = AutoClip(50)
    net = lambda: scaled(mlp(16, 64, 64, 8), 2, 100.0)  # noqa: E731
    module = train(clipping, "classification", lr=1e-3, net=net, batch_size=64, n=1280, epochs=12)
    assert module.losses[-1] < 1e-3 * module.losses[0]
    assert "vanishing norms" in names(clipping)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_spikes_name_the_batch_and_the_parameters(algorithm):
    clipping = AutoClip(gradient_clip_algorithm=algorithm)
    train(clipping, data=multiplied({20: 200.0, 31: 1000.0}), epochs=3, shuffle=False)
    assert evidence(clipping, "spikes").startswith("6 of the 20 largest norms ")  # two batches, three epochs
    assert ", batch 31)" in evidence(clipping, "spikes")
    assert "net.4.weight" in evidence(clipping, "spikes")


def test_a_spike_of_accumulated_batches_is_named_with_its_window():
    clipping = AutoClip(50)
    train(clipping, data=multiplied({30: 300.0}), epochs=8, shuffle=False, accumulate_grad_batches=4)
    assert ", batch 28 to 31)" in evidence(clipping, "spikes")


def with_scaler(init_scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def test_a_loss_scaler_may_have_the_overflows_by_which_it_finds_its_scale_and_no_more():
    usual, many = AutoClip(50), AutoClip(50)
    train(usual, **with_scaler(2.0**30))
    assert 5 < usual.report().sections[0].figures.nonfinite <= 20
    assert not usual.report().diagnoses, str(usual.report())
    train(many, data=multiplied(dict.fromkeys(range(5, 40, 5), math.inf)), shuffle=False, **with_scaler(1024.0))
    assert "non-finite gradients" in names(many)


def test_a_threshold_that_is_far_too_low_is_over_clipping_by_value_too():
    clipping = GradientClipping(Constant(1e-4), gradient_clip_algorithm="value")
    train(clipping, epochs=2)
    assert names(clipping) == ["over-clipping"]
    assert clipping.report().sections[0].figures.clip_coef_mean < 0.1


@pytest.mark.parametrize(("percentile", "warmup_steps"), [(10, 60), (90, 0), (50, 1000)])
def test_clipping_is_expected_only_of_the_steps_after_the_warm_up(percentile, warmup_steps):
    clipping = AutoClip(percentile, warmup_steps=warmup_steps)
    train(clipping, "regression", "AdamW", 1e-4)  # so slow that the norms have one distribution all along
    figures = clipping.report().sections[0].figures
    expected = (1 - percentile / 100) * max(0, 240 - warmup_steps) / 240
    assert figures.expected_fraction == pytest.approx(expected)
    assert abs(figures.clipped_fraction - expected) < 0.05
    assert f"({expected:.0%} expected at percentile {percentile})" in " ".join(str(clipping.report()).split())


# --- something else clips too -----------------------------------------------------------------------------------------


class ClipsItself(Task):
    """Clips before any callback sees the gradient, or normalises it."""

    def __init__(self, at: float, normalises: bool = False) -> None:
        super().__init__(mlp(16, 64, 64, 1), lambda p, y: 100 * mse_loss(p, y), optimizer("SGD", 2e-4))
        self.at, self.normalises = at, normalises
        self.norms: list[float] = []

    def on_after_backward(self) -> None:
        self.norms.append(norm_of(self.parameters()))
        if self.normalises:
            for parameter in self.parameters():
                parameter.grad *= self.at / self.norms[-1]
        else:
            nn.utils.clip_grad_norm_(self.parameters(), self.at)


def clipped_twice(
    clipping: GradientClipping, at: float = 50.0, normalises: bool = False, n: int = 640, epochs: int = 6
) -> ClipsItself:
    torch.manual_seed(0)
    module = ClipsItself(at, normalises)
    rows = DataLoader(TensorDataset(*regression(n)), 16, shuffle=True)
    trainer(clipping, max_epochs=epochs).fit(module, rows)
    return module


@pytest.mark.parametrize(("percentile", "algorithm"), [(10, "norm"), (90, "norm"), (50, "value")])
def test_gradients_that_the_module_has_clipped_before_show_in_norms_at_one_number(percentile, algorithm):
    clipping = AutoClip(percentile, gradient_clip_algorithm=algorithm)
    norms = np.array(clipped_twice(clipping).norms)
    assert 0.15 < np.mean(norms > 50) < 0.9
    assert names(clipping) == ["already clipped"]
    at_max = np.sum(norms > 50 * (1 - 1e-3))
    expected = f"{at_max} of 240 norms were the same number, 50, and none was larger."
    assert evidence(clipping, "already clipped") == expected


@pytest.mark.parametrize("at", [1e-3, 1e4])
def test_normalised_gradients_are_diagnosed_however_large_or_small(at):
    clipping = AutoClip(50)
    clipped_twice(clipping, at, normalises=True, epochs=2)
    assert evidence(clipping, "already clipped").startswith(f"80 of 80 norms were the same number, {at:.5g},")


def test_a_maximum_that_few_steps_reach_is_no_diagnosis():
    clipping, free = AutoClip(50), AutoClip(50)
    at = float(np.quantile(clipped_twice(free, math.inf).norms, 0.95))
    clipped_twice(clipping, at)
    assert not {"already clipped"} & {*names(clipping), *names(free)}


def test_gradients_that_were_clipped_before_are_diagnosed_in_a_short_run_and_after_a_resume(tmp_path):
    first, second = AutoClip(10), AutoClip(10)
    clipped_twice(first, n=160, epochs=1).trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert names(first) == ["already clipped"]
    torch.manual_seed(0)
    rows = DataLoader(TensorDataset(*regression(160)), 16)
    trainer(second, max_epochs=2).fit(ClipsItself(50.0), rows, ckpt_path=tmp_path / "it.ckpt")
    assert names(second) == ["already clipped"]
    assert " of 20 norms" in evidence(second, "already clipped")


# --- what the report says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_figures_are_those_that_numpy_computes(algorithm):
    gradients, clipping, model = Gradients(), by_percentile(30, gradient_clip_algorithm=algorithm, window=20), Net()
    trainer(gradients, clipping, max_epochs=10, log_every_n_steps=5).fit(model, loader(scales=[1.0, 3.0, 0.5]))
    by_value, seen = algorithm == "value", np.stack(gradients.gradients)
    norms = np.linalg.norm(seen, axis=1) / (math.sqrt(seen.shape[1]) if by_value else 1)
    thresholds = [np.percentile(norms[max(0, i - 19) : i + 1], 30) * (3 if by_value else 1) for i in range(len(norms))]
    if by_value:
        after = np.stack([np.clip(g, -t, t) for g, t in zip(seen, thresholds, strict=True)])
        coefs = np.linalg.norm(after, axis=1) / np.linalg.norm(seen, axis=1)
    else:
        coefs = np.minimum(1, thresholds / norms)
    squares = seen**2 / (seen**2).sum(1, keepdims=True)
    first_layer = model.net[0].weight.numel() + model.net[0].bias.numel()
    figures = clipping.report().sections[0].figures
    assert (figures.steps, figures.nonfinite) == (160, 0)
    assert figures.clipped_fraction == pytest.approx(np.mean(coefs < 1 - 1e-6))
    assert figures.clip_coef_mean == pytest.approx(np.mean(coefs), rel=1e-4)
    assert figures.clip_coef_min == pytest.approx(np.min(coefs), rel=1e-4)
    assert figures.norm_first == pytest.approx(np.exp(np.log(norms[:16]).mean()), rel=1e-4)
    assert figures.norm_mean == pytest.approx(np.exp(np.log(norms).mean()), rel=1e-4)
    assert figures.norm_last == pytest.approx(np.exp(np.log(norms[-16:]).mean()), rel=1e-4)
    assert figures.norm_max == pytest.approx(norms.max(), rel=1e-4)
    assert figures.threshold == pytest.approx(thresholds[-1], rel=1e-4)
    assert figures.modules["net.0"] == pytest.approx(squares[:, :first_layer].sum(1).mean(), rel=1e-4)
    assert figures.modules["net.2"] == pytest.approx(squares[:, first_layer:].sum(1).mean(), rel=1e-4)
    assert list(figures.modules.values()) == sorted(figures.modules.values(), reverse=True)
    assert figures.expected_fraction == pytest.approx(0.7) if not by_value else math.isnan(figures.expected_fraction)


def test_the_report_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path):
    whole, first, second = AutoClip(), AutoClip(), AutoClip()
    trainer(whole, max_epochs=6).fit(Net(), loader())
    run = trainer(first, max_epochs=2)
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    trainer(second, max_epochs=6).fit(Net(), loader(), ckpt_path=tmp_path / "it.ckpt")
    assert first.report().sections[0].figures.steps == 32
    assert second.report().sections[0].figures.steps == 96
    assert second.report() == whole.report()


class GoodAndBad(Task):
    """Two networks with an optimizer each; the gradients of the second one vanish."""

    def __init__(self) -> None:
        super().__init__(mlp(16, 64, 1), mse_loss, None)
        self.bad = mlp(16, *[32] * 10, 1, act=nn.Sigmoid)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx) -> None:
        x, y = batch
        for opt, net in zip(self.optimizers(), (self.net, self.bad), strict=True):
            opt.zero_grad()
            self.manual_backward(mse_loss(net(x), y))
            opt.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=0.02), torch.optim.Adam(self.bad.parameters(), lr=1e-3)]


def test_each_of_two_optimizers_has_a_section_of_its_own():
    torch.manual_seed(0)
    clipping = AutoClip(50)
    rows = DataLoader(TensorDataset(*regression(640)), 16)
    trainer(clipping, max_epochs=3).fit(GoodAndBad(), rows)
    first, second = clipping.report().sections
    assert (first.name, second.name) == ("autoclip/SGD", "autoclip/Adam")
    assert not first.diagnoses
    assert "vanishing gradients" in [diagnosis.name for diagnosis in second.diagnoses]
    assert clipping.report().diagnoses == second.diagnoses
    assert clipping.report().summary == "; ".join(f"{diagnosis.name} (Adam)" for diagnosis in second.diagnoses)
    assert str(clipping.report()).startswith("autoclip/SGD: 120 steps, ")
    assert "## autoclip/Adam" in clipping.report().to_markdown()


def test_the_report_before_any_step_says_so():
    report = AutoClip().report()
    assert (report.diagnoses, report.summary) == ((), "too few steps to tell")
    assert str(report) == report.to_markdown()
    assert str(report).startswith("No step was clipped in this process.")
    assert report.to_dict() == {"sections": []}


@pytest.mark.parametrize("steps", [1, 10, LEAST_STEPS - 1])
def test_few_steps_show_no_trend(steps):
    clipping = AutoClip(10)
    train(clipping, "transformer", "AdamW", 10.0, n=16 * steps, epochs=1)
    assert clipping.report().summary == "too few steps to tell"
    assert str(clipping.report()).endswith("Too few steps to tell.")
    assert clipping.report().to_markdown().endswith("Too few steps to tell.\n")


def test_few_steps_show_a_nan():
    clipping = AutoClip(50)
    train(clipping, data=multiplied({3: math.nan}), n=160, epochs=1, shuffle=False)
    assert names(clipping) == ["non-finite gradients"]


RUNS = {  # clipping, data, diagnoses
    "healthy": (AutoClip(50), regression, []),
    "a fixed threshold": (GradientClipping(Constant(1e-4)), regression, ["over-clipping"]),
    "a NaN": (AutoClip(), multiplied({7: math.nan}), ["non-finite gradients"]),
    "a NaN by value": (
        AutoClip(gradient_clip_algorithm="value"),
        multiplied({7: math.nan}),
        ["non-finite gradients"],
    ),
    "nothing but NaN": (AutoClip(), multiplied(dict.fromkeys(range(40), math.nan)), ["non-finite gradients"]),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_report_is_text_markdown_and_json(case):
    clipping, data, diagnoses = RUNS[case]
    train(clipping, data=data, epochs=2, shuffle=False)
    report = clipping.report()
    assert names(clipping) == diagnoses
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [diagnosis["name"] for diagnosis in plain["sections"][0]["diagnoses"]] == diagnoses
    assert plain["sections"][0]["figures"]["steps"] == 80
    markdown = report.to_markdown().splitlines()
    assert markdown[:5] == ["## autoclip", "", "| figure | value |", "|---|---|", "| steps | 80 |"]
    assert all(line.count("|") == 3 for line in markdown if line.startswith("|"))
    assert str(report).startswith("autoclip: 80 steps")
    for diagnosis in report.diagnoses:
        assert str(diagnosis) == f"{diagnosis.name}: {diagnosis.evidence} {diagnosis.advice}"
        assert f"- {diagnosis}" in " ".join(str(report).split())
        assert max(map(len, str(report).splitlines())) <= 100
        assert f"- **{diagnosis.name}**: {diagnosis.evidence} {diagnosis.advice}" in markdown
        assert diagnosis.evidence.endswith(".")
        assert diagnosis.advice.endswith(".")
    assert report.summary == ("; ".join(diagnoses) or NOTHING)
    if "a NaN" in case:
        of_nan = evidence(clipping, "non-finite gradients")
        assert of_nan.startswith("2 of 80 steps had a NaN or an Inf in their gradients, first at step 7 (epoch 0,")
        assert "batch 7) in net.0.weight" in of_nan


def diagnosed(norms: np.ndarray) -> list[str]:
    """The diagnoses of a run with these norms, clipped at their 50th percentile with a window of 100."""
    log = StepLog()
    log.set_parameters(["a.weight", "b.weight"], [10, 10])
    for i, norm in enumerate(norms.tolist()):
        threshold = float(np.percentile(norms[max(0, i - 99) : i + 1], 50))
        each = [norm * math.sqrt(0.5)] * 2
        log.add(StepRecord(norm, min(norm, threshold), norm, threshold, parameter_norms=each), i + 1, Place(i, 0, i, i))
    return [diagnosis.name for diagnosis in report_of({"autoclip/": log}, AutoClip(50).settings).diagnoses]


@pytest.mark.parametrize("steps", [300, 2500])
def test_a_long_run_has_the_diagnoses_of_a_short_one(steps):
    rng, time = np.random.default_rng(0), np.linspace(0, 1, steps)
    noise = np.exp(0.3 * rng.standard_normal(steps))
    assert diagnosed(noise) == []
    assert diagnosed(noise * 10 ** (-1.5 * time)) == []
    assert diagnosed(np.exp(0.3 * time)) == []  # norms that creep up are not one number
    assert diagnosed(noise * 100**time)[0] == "growing norms"
    assert diagnosed(noise * 10.0 ** (-4 * time)) == ["vanishing norms"]
    spiky = noise.copy()
    spiky[steps // 2] *= 1000
    assert diagnosed(spiky) == ["spikes"]
    assert diagnosed(np.minimum(noise, 1.1)) == ["already clipped"]
    assert diagnosed(np.minimum(noise, 2.0)) == []
