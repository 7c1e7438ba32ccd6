"""The trainings that the rules are compared on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from _heldout import (
    Recurrent,
    adapters,
    batch_norm_resnet,
    causal_text,
    fine_tuning,
    game,
    lower_halves,
    new_digits,
    tumours,
    words,
)
from _problems import CharGPT, CharLSTM, Problem, autoencoder, convolutions, images, perceptron, separation, text


@dataclass(frozen=True)
class Task:
    """A problem with its optimizer.

    Attributes:
        problem: Builds network and data from the global random generator.
        optimizer: Builds the optimizer from parameters and learning rate.
        lr: The learning rate.
        steps: Optimizer steps.
        group: Where the task counts: ``"choose"`` (a rule may be chosen by it), ``"report"`` (held out),
            ``"scale"`` (loss scaled, learning rate divided alike), ``"rate"`` (tolerance to the learning rate),
            ``"paper"`` (its table in miniature), ``"new"`` (new ground, see `NEW_TASKS`) or ``"further"`` (likewise,
            rates of the figure alone).
        hot: Whether the learning rate is four times the tuned one or more.
        loss_scale: What the loss is multiplied by.
        bad: Probability of a bad batch.
        decay: Whether the learning rate falls to zero along a cosine.
        objective: Of a separation, for its SI-SDR.
        repeats: How many times as many seeds as others: small models are noisier, and cheap.
        factor: Of new ground, how many times the tuned learning rate it is.
        warmup: Share of the steps in which the learning rate rises, along a line, before it falls.

    Attributes:
        is_sgd: Whether a bound on the step relative to the weights can hold.
    """

    problem: Callable[[], Problem]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    steps: int
    group: str
    hot: bool = False
    loss_scale: float = 1.0
    bad: float = 0.0
    decay: bool = False
    objective: str = ""
    repeats: int = 1
    factor: float = 1.0
    warmup: float = 0.0

    @property
    def is_sgd(self) -> bool:
        return getattr(self.optimizer, "func", self.optimizer) is torch.optim.SGD


sgd = partial(torch.optim.SGD, momentum=0.9)
adam, adamw = torch.optim.Adam, partial(torch.optim.AdamW, weight_decay=0.1)
lstm, gpt = partial(text, CharLSTM), partial(text, CharGPT)
mlp = partial(images, partial(perceptron, 64, 10))
small_mlp = partial(images, partial(perceptron, 64, 10, gain=0.7))
conv = partial(images, convolutions)
deep_mlp = partial(new_digits, partial(perceptron, 64, 10, width=48, depth=12))

# Rates are tuned without clipping, see rates.py; hot ones are four times as high.
TASKS = {
    "lstm, Adam": Task(lstm, adam, 1e-2, 500, "choose"),
    "lstm, SGD, hot": Task(lstm, sgd, 8.0, 500, "choose", hot=True),
    "gpt, AdamW, hot": Task(gpt, adamw, 6.4e-2, 350, "choose", hot=True, decay=True),
    "mlp, SGD, bad batches": Task(mlp, sgd, 0.04, 800, "choose", bad=0.03, repeats=3),
    "conv, SGD": Task(conv, sgd, 0.1, 600, "choose", decay=True, repeats=3),
    "autoencoder, Adam": Task(autoencoder, adam, 5e-3, 800, "choose", repeats=3),
    "separation SNR, Adam": Task(partial(separation, "snr"), adam, 5e-3, 250, "choose"),
    "separation DC, Adam": Task(partial(separation, "dc"), adam, 5e-3, 250, "choose"),
    "lstm, SGD": Task(lstm, sgd, 2.0, 500, "report"),
    "lstm, Adam, hot": Task(lstm, adam, 4e-2, 500, "report", hot=True),
    "gpt, AdamW, bad batches": Task(gpt, adamw, 1.6e-2, 350, "report", bad=0.03, decay=True),
    "mlp, SGD, hot": Task(mlp, sgd, 0.16, 800, "report", hot=True, repeats=3),
    "conv, AdamW, bad batches": Task(conv, adamw, 8e-3, 600, "report", bad=0.03, decay=True, repeats=3),
    "mlp, SGD, small init": Task(small_mlp, sgd, 0.05, 800, "report", repeats=3),
    "autoencoder, SGD, hot": Task(autoencoder, sgd, 4e-2, 800, "report", hot=True, repeats=3),
    "separation L1, Adam": Task(partial(separation, "mi"), adam, 5e-3, 250, "report"),
}
TASKS |= {
    f"loss x {scale:g}": Task(lstm, sgd, 2.0 / scale, 500, "scale", loss_scale=scale) for scale in (0.001, 1.0, 1000.0)
}
TASKS |= {f"rate {rate:g}": Task(mlp, sgd, rate, 800, "rate") for rate in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}
TASKS |= {
    f"paper {name}": Task(partial(separation, name), adam, 5e-3, 350, "paper", objective=name)
    for name in ("dc", "wkm", "mi", "chimera", "snr")
}

# New ground: no rule has been tuned on it, and it was fixed before any was trained. Rates are tuned likewise: half of
# the best for layer normalisation and adapters, where twice the best fails, and for the regression, where the best
# fails with a third seed.
NEW_TASKS = {
    "resnet BN, SGD": Task(
        partial(new_digits, batch_norm_resnet), partial(sgd, weight_decay=5e-4), 0.1, 250, "new", decay=True, warmup=0.1
    ),
    "resnet LN, Nesterov": Task(causal_text, partial(sgd, nesterov=True), 0.2, 250, "new", decay=True),
    "regression, SGD without momentum": Task(lower_halves, torch.optim.SGD, 0.4, 400, "new"),
    "deep mlp, SGD of momentum 0.99": Task(deep_mlp, partial(sgd, momentum=0.99), 0.004, 400, "new", decay=True),
    "gru, Nesterov": Task(partial(new_digits, Recurrent), partial(sgd, nesterov=True), 0.4, 300, "new"),
    "words, SGD": Task(words, sgd, 0.8, 400, "new"),
    "adapters, SGD": Task(adapters, sgd, 0.05, 300, "new"),
    "logistic from zero, SGD": Task(tumours, sgd, 0.02, 300, "new"),
    "GAN, SGD without momentum": Task(game, torch.optim.SGD, 0.2, 400, "new"),
    "fine-tuning in groups, SGD": Task(fine_tuning, sgd, 0.4, 300, "new"),
}
FACTORS = {"1/4": 0.25, "1": 1.0, "4": 4.0, "16": 16.0}
FURTHER = {"1/100": 0.01, "1/20": 0.05, "100": 100.0}  # of the figure, for three rules
TASKS |= {
    f"{name}, x{label}": replace(task, lr=factor * task.lr, factor=factor, hot=factor > 1, group=group)
    for group, factors in (("new", FACTORS), ("further", FURTHER))
    for name, task in NEW_TASKS.items()
    for label, factor in factors.items()
}
