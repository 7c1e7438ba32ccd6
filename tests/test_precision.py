"""The callback under every precision of Lightning, against float64 arithmetic on the gradients it was handed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, by_percentile, loader, trainer, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from models import BadBatches, Gradients, Manual, WithoutLoss
from torch import Tensor
from torch.optim import SGD, AdamW

from lightning_autoclip import AutoClip

TOLERANCE = {"64-true": 1e-6, "32-true": 1e-5, "bf16-mixed": 1e-5, "16-mixed": 1e-5, "16-true": 2e-3, "bf16-true": 1e-2}
SCALES = [1.0, 3.0, 0.5, 8.0]


class Weights(Callback):
    """Notes all weights and the loss scale after each batch."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []
        self.scales: list[float] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.after.append(weights(pl_module).clone())

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        self.after.append(weights(pl_module).clone())
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            self.scales.append(scaler.get_scale())


def precision(mode: str, init_scale: float = 1024.0) -> dict[str, Any]:
    if mode != "16-mixed":
        return {"precision": mode}
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)  # by itself Lightning takes bfloat16 on the CPU
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def sgd(fused: bool, **kwargs: Any):
    return lambda parameters: SGD(parameters, lr=0.1, fused=fused, **kwargs)


def history_of(autoclip: AutoClip) -> np.ndarray:
    return autoclip.clippers[0].history.values.numpy()


def thresholds(gradients: list[np.ndarray], percentile: float, by_value: bool) -> list[float]:
    norms = [np.linalg.norm(g) / (math.sqrt(g.size) if by_value else 1) for g in gradients if np.isfinite(g).all()]
    return [(3 if by_value else 1) * np.percentile(norms[: i + 1], percentile) for i in range(len(norms))]


def clipped(gradient: np.ndarray, threshold: float, by_value: bool) -> np.ndarray:
    if by_value:
        return gradient.clip(-threshold, threshold)
    return gradient * min(1.0, threshold / np.linalg.norm(gradient))


CASES = [(mode, Net, "norm") for mode in TOLERANCE]
CASES += [(mode, Net, "value") for mode in ("32-true", "16-mixed", "bf16-true")]
CASES += [(mode, Manual, "norm") for mode in ("32-true", "16-mixed")]


@pytest.mark.parametrize(("mode", "net", "algorithm"), CASES)
@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_each_step_is_the_clipped_step_by_hand(mode, net, algorithm, fused):
    by_value = algorithm == "value"
    before, after, steps = Gradients(), Gradients(), Weights()
    autoclip = by_percentile(40, gradient_clip_algorithm=algorithm)
    model = net(sgd(fused))
    trainer(before, autoclip, after, steps, max_epochs=2, **precision(mode)).fit(model, loader(scales=SCALES))

    assert len(before.gradients) == 32
    norms = [np.linalg.norm(g) / (math.sqrt(g.size) if by_value else 1) for g in before.gradients]
    np.testing.assert_allclose(history_of(autoclip), norms, rtol=1e-6)
    limits = thresholds(before.gradients, 40, by_value)
    some_clipped = 0
    for i, (raw, limit) in enumerate(zip(before.gradients, limits, strict=True)):
        expected = clipped(raw, limit, by_value)
        some_clipped += not np.array_equal(expected, raw)
        tolerance = TOLERANCE[mode]
        np.testing.assert_allclose(after.gradients[i], expected, rtol=tolerance, atol=tolerance * limit / 100)
        if not (fused and mode in ("16-true", "bf16-true")):  # torch 2.13's fused SGD moves no such weight on the CPU
            step = (steps.after[i] - steps.after[i + 1]).double().numpy()
            largest = weights(model).abs().max().item()
            np.testing.assert_allclose(step, 0.1 * expected, rtol=10 * tolerance, atol=tolerance * largest)
    assert 5 < some_clipped < 32


@pytest.mark.parametrize(("mode", "fused"), [("32-true", False), ("16-mixed", True)])
def test_accumulated_gradients_enter_the_history_once_per_step(mode, fused):
    ledger, autoclip = Gradients(), by_percentile(40)
    trainer(ledger, autoclip, accumulate_grad_batches=3, **precision(mode)).fit(Net(sgd(fused)), loader(scales=SCALES))
    assert len(ledger.gradients) == 6  # 16 batches: five full windows and a short one
    np.testing.assert_allclose(history_of(autoclip), ledger.norms, rtol=1e-6)


OVERFLOW = [1.0, 1.0, 1.0, 1.0, 1e6, 1e6, 1e6, 1e6, *[2.0] * 4, *[3.0] * 4]  # the second of every four batches


def optimizers(fused: bool) -> dict[str, Any]:
    return {
        "sgd": sgd(fused, momentum=0.9, weight_decay=0.1),
        "adamw": lambda parameters: AdamW(parameters, lr=0.01, fused=fused),
    }


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize(
    ("net", "algorithm", "optimizer", "nonfinite"),
    [
        (Net, "norm", "sgd", "skip"),
        (Net, "value", "adamw", "skip"),
        (Manual, "norm", "sgd", "ignore"),
        (Manual, "value", "adamw", "skip"),
    ],
)
def test_an_overflow_under_amp_moves_nothing_and_the_scaler_backs_off(fused, net, algorithm, optimizer, nonfinite):
    factory = optimizers(fused)[optimizer]
    ledger, steps = Gradients(), Weights()
    autoclip = by_percentile(40, gradient_clip_algorithm=algorithm, nonfinite=nonfinite)
    trainer(ledger, autoclip, steps, **precision("16-mixed")).fit(net(factory), loader(n=32, scales=OVERFLOW))

    finite = [np.isfinite(g).all() for g in ledger.gradients]
    assert finite == [True, False, True, True] * 2
    assert [torch.equal(a, b) for a, b in zip(steps.after[1:], steps.after, strict=False)] == [not f for f in finite]
    assert steps.scales == [1024.0] + [512.0] * 4 + [256.0] * 3
    history = history_of(autoclip)
    scale = math.sqrt(ledger.gradients[0].size) if algorithm == "value" else 1
    np.testing.assert_allclose(
        history, [np.linalg.norm(g) / scale for g, f in zip(ledger.gradients, finite, strict=True) if f], rtol=1e-6
    )
    assert autoclip.clippers[0].nonfinite_steps == 2


@pytest.mark.parametrize(("mode", "fused"), [("32-true", False), ("16-mixed", False), ("16-mixed", True)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_batches_without_a_loss_the_history_is_what_was_stepped(mode, fused, accumulate):
    ledger, steps, autoclip = Gradients(), Weights(), by_percentile(100)
    trainer(ledger, autoclip, steps, accumulate_grad_batches=accumulate, **precision(mode)).fit(
        WithoutLoss((1, 5), sgd(fused)), loader(n=32)
    )
    moved = [not torch.equal(a, b) for a, b in zip(steps.after[1:], steps.after, strict=False)]
    assert autoclip.clippers[0].history.values.numel() == sum(moved)
    expected = {(1, "32-true"): 6, (1, "16-mixed"): 6, (2, "32-true"): 4, (2, "16-mixed"): 2}
    assert sum(moved) == expected[accumulate, mode]
    if mode == "32-true" and accumulate == 2:  # the gradient of the batch before is stepped: it is clipped too
        np.testing.assert_allclose(history_of(autoclip), ledger.norms, rtol=1e-6)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "inner"])
def test_a_compiled_module_trains_as_the_plain_one(whole):
    class Quiet(Net):
        def training_step(self, batch, batch_idx):  # `self.log` does not compile
            return self.loss(batch)

    plain, compiled = Quiet(), Quiet()
    trainer(by_percentile()).fit(plain, loader())
    if not whole:
        compiled.net.compile(backend="aot_eager")
    trainer(by_percentile()).fit(torch.compile(compiled, backend="aot_eager") if whole else compiled, loader())
    torch.testing.assert_close(weights(compiled), weights(plain))


@pytest.mark.parametrize("case", ["fused optimizer under 16-mixed", "manual optimization", "a NaN in one batch"])
def test_where_lightnings_own_clipping_raises_or_is_wrong_autoclip_trains(case):
    def fit(callbacks: list[Callback], **kwargs: Any) -> Net:
        if case.startswith("fused"):
            model, kwargs = Net(sgd(True)), {**kwargs, **precision("16-mixed")}
        else:
            model = Manual(sgd(False)) if case.startswith("manual") else BadBatches({3: math.nan}, sgd(False))
        trainer(*callbacks, **kwargs).fit(model, loader())
        return model

    if case == "a NaN in one batch":
        assert weights(fit([], gradient_clip_val=1.0)).isnan().all()
    else:
        with pytest.raises((RuntimeError, MisconfigurationException), match=r"gradient clipping"):
            fit([], gradient_clip_val=1.0)
    assert weights(fit([by_percentile()])).isfinite().all()
