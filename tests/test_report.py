"""The report, on real trainings: what a sick one shows is said, and a healthy one is left in peace."""

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

from lightning_autoclip import AutoClip, Constant, GradientClipping
from lightning_autoclip.monitoring.report import report_of
from lightning_autoclip.monitoring.summary import Point
from lightning_autoclip.monitoring.trace import Trace
from lightning_autoclip.monitoring.verdicts import LEAST_STEPS

Data = tuple[Tensor, Tensor]


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


# --- networks ---------------------------------------------------------------------------------------------------------


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


# --- data -------------------------------------------------------------------------------------------------------------


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


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Data], Callable[..., Tensor]]] = {
    "regression": (lambda: mlp(16, 64, 64, 1), regression, mse_loss),
    "deep regression": (lambda: mlp(16, *[64] * 7, 1, act=nn.Tanh), regression, mse_loss),
    "classification": (lambda: mlp(16, 64, 64, 8), classification, cross_entropy),
    "conv": (conv, images, cross_entropy),
    "lstm": (LSTM, text, cross_entropy),
    "transformer": (Transformer, text, cross_entropy),
}
SGD_RATES = {"lstm": 0.5, "transformer": 0.05}


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
    seed: int = 0,
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
    torch.manual_seed(seed)
    usual_net, usual_data, usual_loss = TASKS[task]
    rows = DataLoader(TensorDataset(*(data or usual_data)(n)), batch_size, shuffle=shuffle)
    module = Task((net or usual_net)(), loss or usual_loss, optimizer(opt, lr), warm_up)
    trainer(clipping, max_epochs=epochs, **kwargs).fit(module, rows)
    return module


def names(clipping: GradientClipping) -> list[str]:
    return [verdict.name for verdict in clipping.report().verdicts]


def evidence(clipping: GradientClipping, name: str) -> str:
    return next(verdict.evidence for verdict in clipping.report().verdicts if verdict.name == name)


# --- healthy runs -----------------------------------------------------------------------------------------------------

HEALTHY = [  # task, optimizer, percentile, algorithm, steps of warm-up
    ("regression", "SGD", 10, "norm", 0),
    ("regression", "Adam", 50, "value", 50),
    ("deep regression", "AdamW", 10, "norm", 50),
    ("deep regression", "SGD", 90, "norm", 0),
    ("classification", "SGD", 50, "norm", 50),
    ("classification", "AdamW", 10, "value", 0),
    ("conv", "SGD", 10, "norm", 0),
    ("conv", "Adam", 90, "value", 50),
    ("lstm", "SGD", 50, "value", 0),
    ("lstm", "Adam", 90, "norm", 0),
    ("transformer", "AdamW", 10, "norm", 50),
    ("transformer", "SGD", 90, "value", 0),
]


@pytest.mark.parametrize(("task", "opt", "percentile", "algorithm", "warm_up"), HEALTHY)
def test_a_healthy_run_is_called_healthy(task, opt, percentile, algorithm, warm_up):
    clipping = AutoClip(percentile, gradient_clip_algorithm=algorithm)
    lr = SGD_RATES.get(task, 0.02) if opt == "SGD" else 2e-3
    module = train(clipping, task, opt, lr, warm_up=warm_up)
    assert np.mean(module.losses[-20:]) < 0.7 * np.mean(module.losses[:5])  # it learns
    assert clipping.report().healthy, str(clipping.report())
    assert clipping.report().summary == "healthy"
    assert str(clipping.report()).endswith("Healthy.")


@pytest.mark.parametrize("seed", [0, 1])
def test_norms_that_fall_by_more_than_a_tenth_are_healthy(seed):
    clipping = AutoClip(50)
    train(clipping, "classification", seed=seed)
    figures = clipping.report().sections[0].figures
    assert figures.norm_last < 0.1 * figures.norm_first
    assert clipping.report().healthy, str(clipping.report())


def pretrained(frozen: bool) -> nn.Sequential:
    """A classifier of other classes than those to come, with a new head."""
    net, (x, y) = mlp(16, 64, 64, 8), classification(640)
    adam = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(100):
        adam.zero_grad()
        cross_entropy(net(x), y).backward()
        adam.step()
    net[:-1].requires_grad_(not frozen)
    net[-1] = nn.Linear(64, 8)
    return net


@pytest.mark.parametrize("frozen", [False, True], ids=["all of it", "the head alone"])
@pytest.mark.parametrize("percentile", [10, 90])
def test_fine_tuning_is_healthy(percentile, frozen):
    clipping = AutoClip(percentile)
    opt, lr = ("SGD", 0.02) if frozen else ("AdamW", 3e-4)
    train(clipping, "classification", opt, lr, net=lambda: pretrained(frozen))
    assert clipping.report().healthy, str(clipping.report())


@pytest.mark.parametrize("percentile", [10, 90])
def test_norms_that_rise_slowly_are_healthy_though_they_are_clipped_often(percentile):
    clipping = AutoClip(percentile)
    train(clipping, "lstm", "Adam", 2e-3, net=lambda: LSTM(500), data=lambda n: text(n, 500))
    figures = clipping.report().sections[0].figures
    assert figures.clipped_fraction > figures.expected_fraction + 0.05
    assert clipping.report().healthy, str(clipping.report())


@pytest.mark.parametrize("percentile", [10, 90])
def test_batches_of_one_row_are_healthy(percentile):
    clipping = AutoClip(percentile)
    train(clipping, lr=0.002, n=300, batch_size=1, epochs=1)
    assert clipping.report().healthy, str(clipping.report())


# --- sick runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("percentile", [10, 50])
def test_a_learning_rate_that_is_far_too_high_is_seen_in_growing_norms(percentile, seed):
    clipping = by_percentile(percentile)
    train(clipping, "transformer", "SGD", 3.0, seed=seed)
    assert {"growing norms", "clipped far more often than the percentile implies"} <= set(names(clipping))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_with_the_weights_as_a_bound_it_is_called_by_its_name_and_norms_do_not_grow(percentile, seed):
    clipping = AutoClip(percentile)
    train(clipping, "transformer", "SGD", 3.0, seed=seed)
    assert "learning rate too high" in names(clipping)
    assert "growing norms" not in names(clipping)


@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_a_loss_without_a_floor_is_seen_in_growing_norms(percentile):
    def of_the_wrong_sign(predicted, y):
        return -mse_loss(predicted, y)

    clipping = AutoClip(percentile)
    train(clipping, opt="Adam", lr=2e-3, loss=of_the_wrong_sign)
    assert {"growing norms", "clipped far more often than the percentile implies"} <= set(names(clipping))
    expected = {10: "90%", 50: "50%", 90: "10%"}[percentile]
    assert f"{expected} are to be expected" in evidence(clipping, "clipped far more often than the percentile implies")


@pytest.mark.parametrize("seed", [0, 1])
def test_norms_that_grew_and_fell_again_are_seen(seed):
    clipping = AutoClip(90)
    train(clipping, "transformer", "AdamW", 10.0, seed=seed)
    figures = clipping.report().sections[0].figures
    assert figures.norm_last < figures.norm_first
    assert "growing norms" in names(clipping)


def scaled(net: nn.Sequential, layer: int, factor: float) -> nn.Sequential:
    with torch.no_grad():
        net[layer].weight.mul_(factor)
    return net


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_that_starts_a_hundred_times_too_large_is_seen_in_the_one_that_holds_the_norm(seed, algorithm):
    clipping = AutoClip(50, gradient_clip_algorithm=algorithm)
    train(clipping, opt="Adam", lr=2e-3, seed=seed, net=lambda: scaled(mlp(16, 64, 1), 0, 100.0))
    assert "one layer holds the norm" in names(clipping)
    assert evidence(clipping, "one layer holds the norm").startswith("net.2 holds ")  # its inputs are too large


@pytest.mark.parametrize("opt", ["SGD", "Adam"])
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
def test_vanishing_gradients_of_a_deep_network_are_seen(act, opt):
    def deep():
        net = mlp(16, *[32] * 12, 8, act=act)
        for layer in net if act is nn.Tanh else ():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        return net

    clipping = AutoClip(50)
    module = train(clipping, "classification", opt, {"SGD": 0.02, "Adam": 1e-3}[opt], net=deep)
    assert np.mean(module.losses[-20:]) > 0.9 * math.log(8)  # it learns nothing
    assert "vanishing gradients" in names(clipping)
    assert "net.0.weight" in evidence(clipping, "vanishing gradients")


@pytest.mark.parametrize(("opt", "lr"), [("SGD", 5.0), ("Adam", 0.3)])
@pytest.mark.parametrize("output", [nn.ReLU, nn.Sigmoid])
def test_units_that_die_or_saturate_are_seen_in_vanishing_norms(output, opt, lr):
    def positive(n):
        x, y = regression(n)
        return x, y.abs() if output is nn.ReLU else (y > y.median() - 1).float()

    clipping = by_percentile(50)
    train(clipping, opt=opt, lr=lr, net=lambda: nn.Sequential(*mlp(16, 64, 64, 1), output()), data=positive)
    assert names(clipping) == ["vanishing norms"]
    assert "exactly zero" in evidence(clipping, "vanishing norms")


def test_a_loss_that_is_solved_is_seen_in_vanishing_norms():
    clipping = AutoClip(50)
    net = lambda: scaled(mlp(16, 64, 64, 8), 2, 100.0)  # noqa: E731
    module = train(clipping, "classification", lr=1e-3, net=net, batch_size=64, n=1280, epochs=12)
    assert module.losses[-1] < 1e-3 * module.losses[0]
    assert "vanishing norms" in names(clipping)


def poisoned(batches: dict[int, float], data: Callable[[int], Data], of_targets: bool = False) -> Callable[[int], Data]:
    """The inputs, or the targets, of some batches of 16 rows multiplied by a factor."""

    def made(n):
        x, y = data(n)
        for batch, factor in batches.items():
            (y if of_targets else x)[16 * batch : 16 * (batch + 1)] *= factor
        return x, y

    return made


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("percentile", [10, 50, 90])
@pytest.mark.parametrize("of_targets", [False, True], ids=["inputs", "targets"])
def test_poisoned_batches_are_seen_as_spikes_that_are_named(of_targets, percentile, algorithm):
    clipping = AutoClip(percentile, gradient_clip_algorithm=algorithm)
    data = poisoned({20: 200.0, 31: 1000.0}, regression, of_targets)
    train(clipping, data=data, epochs=3, shuffle=False)
    assert evidence(clipping, "spikes").startswith("6 of the 20 largest norms ")  # two batches, three epochs
    assert ", batch 31)" in evidence(clipping, "spikes")
    assert "net.4.weight" in evidence(clipping, "spikes")


def test_a_poisoned_batch_of_accumulated_ones_is_named_with_its_window():
    clipping = AutoClip(50)
    train(clipping, data=poisoned({30: 300.0}, regression), epochs=8, shuffle=False, accumulate_grad_batches=4)
    assert ", batch 28 to 31)" in evidence(clipping, "spikes")


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_nan_in_a_batch_is_seen_and_named(algorithm):
    clipping = AutoClip(gradient_clip_algorithm=algorithm)
    train(clipping, data=poisoned({7: math.nan}, regression), epochs=2, shuffle=False)
    assert names(clipping) == ["non-finite gradients"]
    assert evidence(clipping, "non-finite gradients").startswith("2 of 80 steps had a NaN or an infinity")
    assert "first at step 7 (epoch 0, batch 7) in net.0.weight" in evidence(clipping, "non-finite gradients")


def with_scaler(init_scale: float, growth_interval: int = 2000) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def test_the_overflows_by_which_a_loss_scaler_finds_its_scale_are_healthy():
    clipping = AutoClip(50)
    train(clipping, **with_scaler(2.0**30))
    assert 5 < clipping.report().sections[0].figures.nonfinite <= 20
    assert clipping.report().healthy, str(clipping.report())


def test_more_overflows_than_a_loss_scaler_needs_are_seen():
    clipping = AutoClip(50)
    data = poisoned(dict.fromkeys(range(5, 40, 5), math.inf), regression)
    train(clipping, data=data, shuffle=False, **with_scaler(1024.0))
    assert "non-finite gradients" in names(clipping)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_threshold_that_is_far_too_low_is_seen_in_steps_cut_to_a_fraction(algorithm):
    clipping = GradientClipping(Constant(1e-4), gradient_clip_algorithm=algorithm)
    train(clipping)
    assert names(clipping) == ["steps cut to a fraction"]
    assert clipping.report().sections[0].figures.clip_coef_mean < 0.1


# --- the warm-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [10, 50, 90])
@pytest.mark.parametrize("warmup_steps", [0, 60, 240, 1000])
def test_clipping_is_expected_of_the_steps_after_the_warm_up_alone(warmup_steps, percentile):
    clipping = AutoClip(percentile, warmup_steps=warmup_steps)
    train(clipping, "regression", "AdamW", 1e-4)  # so slow that the norms have one distribution all along
    figures = clipping.report().sections[0].figures
    expected = (1 - percentile / 100) * max(0, 240 - warmup_steps) / 240
    assert figures.expected_fraction == pytest.approx(expected)
    assert abs(figures.clipped_fraction - expected) < 0.05
    assert f"({expected:.0%} expected at percentile {percentile})" in " ".join(str(clipping.report()).split())


@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_a_loss_without_a_floor_is_seen_after_a_warm_up_too(percentile):
    clipping = AutoClip(percentile, warmup_steps=120)
    train(clipping, opt="Adam", lr=2e-3, loss=lambda predicted, y: -mse_loss(predicted, y))
    assert "clipped far more often than the percentile implies" in names(clipping)
    calm = AutoClip(percentile, warmup_steps=120)
    train(calm, "lstm", "Adam", 2e-3, net=lambda: LSTM(500), data=lambda n: text(n, 500))
    assert calm.report().healthy, str(calm.report())


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


def clipped_twice(clipping: GradientClipping, at: float = 50.0, n: int = 640, epochs: int = 6, **kwargs: Any) -> Task:
    torch.manual_seed(0)
    module = ClipsItself(at, kwargs.pop("normalises", False))
    rows = DataLoader(TensorDataset(*regression(n)), 16, shuffle=True)
    trainer(clipping, max_epochs=epochs, **kwargs).fit(module, rows)
    return module


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_gradients_that_the_module_clips_before_are_seen_in_norms_at_one_number(percentile, algorithm):
    clipping = AutoClip(percentile, gradient_clip_algorithm=algorithm)
    norms = np.array(clipped_twice(clipping).norms)
    assert 0.15 < np.mean(norms > 50) < 0.9
    assert names(clipping) == ["already clipped"]
    said = evidence(clipping, "already clipped")
    assert said == f"{np.sum(norms > 50 * (1 - 1e-3))} of 240 norms were the same number, 50, and none was larger."


@pytest.mark.parametrize("at", [1e-3, 1.0, 1e4])
def test_normalised_gradients_are_seen_however_large_or_small(at):
    clipping = AutoClip(50)
    clipped_twice(clipping, at, normalises=True)
    assert evidence(clipping, "already clipped").startswith(f"240 of 240 norms were the same number, {at:.5g},")


def test_a_limit_that_few_steps_reach_is_no_verdict():
    clipping, free = AutoClip(50), AutoClip(50)
    at = float(np.quantile(clipped_twice(free, math.inf).norms, 0.95))
    clipped_twice(clipping, at)
    assert not {"already clipped"} & {*names(clipping), *names(free)}


def test_gradients_that_are_clipped_before_are_seen_in_a_short_run_and_after_a_resume(tmp_path):
    whole, first, second = AutoClip(10), AutoClip(10), AutoClip(10)
    clipped_twice(whole, n=160, epochs=2)
    run_of_first = clipped_twice(first, n=160, epochs=1).trainer
    run_of_first.save_checkpoint(tmp_path / "it.ckpt")
    assert names(first) == names(whole) == ["already clipped"]
    torch.manual_seed(0)
    rows = DataLoader(TensorDataset(*regression(160)), 16)
    trainer(second, max_epochs=2).fit(ClipsItself(50.0), rows, ckpt_path=tmp_path / "it.ckpt")
    assert names(second) == ["already clipped"]
    assert " of 20 norms" in evidence(second, "already clipped")


@pytest.mark.parametrize("percentile", [10, 100])
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 30])
def test_a_tiny_training_is_not_said_to_be_clipped_before(steps, percentile):
    clipping = AutoClip(percentile)
    train(clipping, n=16 * steps, epochs=1)
    assert clipping.report().summary == "too few steps to tell"


def test_norms_that_creep_up_are_not_one_number():
    assert told_of(np.exp(np.linspace(0, 0.3, 1200))) == []


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
    assert figures.norm_typical == pytest.approx(np.exp(np.log(norms).mean()), rel=1e-4)
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


class SickAndHealthy(Task):
    """Two networks with an optimizer each; the gradients of the second one vanish."""

    def __init__(self) -> None:
        super().__init__(mlp(16, 64, 1), mse_loss, None)
        self.sick = mlp(16, *[32] * 10, 1, act=nn.Sigmoid)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx) -> None:
        x, y = batch
        for opt, net in zip(self.optimizers(), (self.net, self.sick), strict=True):
            opt.zero_grad()
            self.manual_backward(mse_loss(net(x), y))
            opt.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=0.02), torch.optim.Adam(self.sick.parameters(), lr=1e-3)]


def test_each_of_two_optimizers_has_a_section_of_its_own():
    torch.manual_seed(0)
    clipping = AutoClip(50)
    rows = DataLoader(TensorDataset(*regression(640)), 16)
    trainer(clipping, max_epochs=3).fit(SickAndHealthy(), rows)
    first, second = clipping.report().sections
    assert (first.name, second.name) == ("autoclip/SGD", "autoclip/Adam")
    assert not first.verdicts
    assert "vanishing gradients" in [verdict.name for verdict in second.verdicts]
    assert clipping.report().verdicts == second.verdicts
    assert clipping.report().summary == "; ".join(f"{verdict.name} (Adam)" for verdict in second.verdicts)
    assert str(clipping.report()).startswith("autoclip/SGD: 120 steps, ")
    assert "## autoclip/Adam" in clipping.report().to_markdown()


def test_the_report_before_any_step_says_so():
    report = AutoClip().report()
    assert (report.healthy, report.summary) == (True, "too few steps to tell")
    assert str(report) == report.to_markdown()
    assert str(report).startswith("No step was seen in this process.")
    assert report.to_dict() == {"healthy": True, "sections": []}


def test_few_steps_tell_of_no_trend_but_of_a_nan():
    short, sick = AutoClip(50), AutoClip(50)
    train(short, "transformer", "SGD", 3.0, n=16 * (LEAST_STEPS - 1), epochs=1)
    assert set(names(short)) <= {"non-finite gradients"}
    train(sick, data=poisoned({3: math.nan}, regression), n=160, epochs=1, shuffle=False)
    assert names(sick) == ["non-finite gradients"]
    calm = AutoClip(50)
    train(calm, n=160, epochs=1)
    assert calm.report().summary == "too few steps to tell"
    assert str(calm.report()).endswith("Too few steps to tell.")
    assert calm.report().to_markdown().endswith("Too few steps to tell.\n")


RUNS = {
    "healthy": lambda: (AutoClip(50), regression),
    "a fixed threshold": lambda: (GradientClipping(Constant(1e-4)), regression),
    "by value, with a NaN": lambda: (AutoClip(gradient_clip_algorithm="value"), poisoned({7: math.nan}, regression)),
    "nothing but NaN": lambda: (AutoClip(), poisoned(dict.fromkeys(range(40), math.nan), regression)),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_report_is_text_markdown_and_json(case):
    clipping, data = RUNS[case]()
    train(clipping, data=data, epochs=2)
    report = clipping.report()
    told = report.to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["healthy"] is report.healthy
    assert [verdict["name"] for verdict in told["sections"][0]["verdicts"]] == [v.name for v in report.verdicts]
    assert told["sections"][0]["figures"]["steps"] == 80
    markdown = report.to_markdown().splitlines()
    assert markdown[:5] == ["## autoclip", "", "| figure | value |", "|---|---|", "| steps | 80 |"]
    assert all(line.count("|") == 3 for line in markdown if line.startswith("|"))
    assert str(report).startswith("autoclip: 80 steps")
    for verdict in report.verdicts:
        assert str(verdict) == f"{verdict.name}: {verdict.evidence} {verdict.advice}"
        assert f"- {verdict}" in " ".join(str(report).split())
        assert max(map(len, str(report).splitlines())) <= 100
        assert f"- **{verdict.name}**: {verdict.evidence} {verdict.advice}" in markdown
        assert verdict.evidence.endswith(".")
        assert verdict.advice.endswith(".")
    assert report.summary == ("; ".join(verdict.name for verdict in report.verdicts) or "healthy")


def told_of(norms: np.ndarray) -> list[str]:
    """The verdicts on a run with these norms, clipped at their 50th percentile with a window of 100."""
    trace = Trace(["a.weight", "b.weight"], [10, 10])
    points = []
    for i, norm in enumerate(norms):
        threshold = float(np.percentile(norms[max(0, i - 99) : i + 1], 50))
        points.append(Point(i, 0, i, i, float(norm), min(float(norm), threshold), float(norm), threshold, 0.0))
    squares = torch.tensor(norms).square()[:, None] * torch.tensor([0.5, 0.5])
    trace.extend(points, squares)
    return [verdict.name for verdict in report_of({"autoclip/": trace}, AutoClip(50).settings).verdicts]


@pytest.mark.parametrize("steps", [300, 6000])
def test_a_long_run_is_judged_as_a_short_one(steps):
    rng, time = np.random.default_rng(0), np.linspace(0, 1, steps)
    noise = np.exp(0.3 * rng.standard_normal(steps))
    assert told_of(noise) == []
    assert told_of(noise * 10 ** (-1.5 * time)) == []
    assert told_of(noise * 100**time)[0] == "growing norms"
    assert told_of(noise * 10.0 ** (-4 * time)) == ["vanishing norms"]
    spiky = noise.copy()
    spiky[steps // 2] *= 1000
    assert told_of(spiky) == ["spikes"]
    assert told_of(np.minimum(noise, 1.1)) == ["already clipped"]
    assert told_of(np.minimum(noise, 2.0)) == []
