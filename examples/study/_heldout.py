"""What is learnt on new ground: problems that were fixed before any rule was trained on them."""

import copy
import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from _data import CHARACTERS, MODULES, WORDS, breast_cancer, digits, halves_of_digits, module_words
from _problems import Batch, Problem, batches, convolutions, perceptron, text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, softplus


class Residual(nn.Module):
    """What comes in, and a function of it added."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.branch(hidden)


class Flat(nn.Sequential):
    """Layers over images that come as rows of 64 pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels.unflatten(1, (1, 8, 8)))


def batch_norm_resnet(width: int = 8) -> nn.Module:
    """Two residual blocks of two convolutions, one before each, and a linear layer; batch normalisation throughout."""

    def conv(i: int, o: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o)]

    def block(width: int) -> list[nn.Module]:
        return [Residual(*conv(width, width), nn.ReLU(), *conv(width, width)), nn.ReLU()]

    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)]
    down = [*conv(width, 2 * width, stride=2), nn.ReLU()]
    return Flat(*conv(1, width), nn.ReLU(), *block(width), *down, *block(2 * width), *pooled)


class Causal(nn.Module):
    """A convolution over the past, after layer normalisation; sequences are of shape ``(batch, time, width)``."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm, self.past = nn.LayerNorm(width), nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.conv, self.mix = nn.Conv1d(width, 2 * width, 3, dilation=dilation), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mix(torch.relu(self.conv(self.past(self.norm(hidden).mT))).mT)


def layer_norm_resnet(width: int = 24) -> nn.Module:
    """The next character from a residual network of dilated convolutions over those before it."""
    blocks = [Residual(Causal(width, dilation)) for dilation in (1, 3, 9)]
    return nn.Sequential(nn.Embedding(CHARACTERS, width), *blocks, nn.LayerNorm(width), nn.Linear(width, CHARACTERS))


class Recurrent(nn.Module):
    """A GRU that reads an image four pixels at a time."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.gru(pixels.unflatten(1, (16, 4)))[0][:, -1])


class BagOfWords(nn.Module):
    """The module that a window of words is from, out of the mean of their embeddings."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(WORDS, width),
            nn.Linear(width, 64),
            nn.Linear(64, MODULES),
        )

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(words).mean(1))))


class Adapted(nn.Module):
    """A frozen linear layer, and beside it a product of two thin matrices that starts at zero (LoRA)."""

    def __init__(self, frozen: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) / math.sqrt(frozen.in_features))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.frozen(hidden) + hidden @ self.down.mT @ self.up.mT


def classification(
    network: nn.Module, inputs: Tensor, classes: Tensor, count: int, smoothing: float = 0.1, size: int = 32
) -> Problem:
    """The first so many examples are to train on, the others to validate."""
    train = batches(size, inputs[:count], classes[:count])
    return Problem(network, partial(_cross_entropy, smoothing), train, (inputs[count:], classes[count:]))


def _cross_entropy(smoothing: float, network: nn.Module, batch: Batch) -> Tensor:
    smoothing = smoothing if network.training else 0.0
    return cross_entropy(network(batch[0]), batch[1], label_smoothing=smoothing)


def new_digits(network: Callable[[], nn.Module], count: int = 1200) -> Problem:
    return classification(network(), *digits(), count)


def causal_text() -> Problem:
    return text(layer_norm_resnet)


def lower_halves() -> Problem:
    """A regression: the lower half of an image from the upper one, in units of the pixels' deviation."""

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return mse_loss(network(batch[0]), batch[1])

    pixels, _ = digits()
    upper, lower = ((pixels - pixels.mean()) / pixels.std()).split(32, 1)
    train = batches(32, upper[:1200], lower[:1200])
    return Problem(perceptron(32, 32, depth=3), loss, train, (upper[1200:], lower[1200:]))


def words() -> Problem:
    train, validation = module_words()
    loss = partial(_cross_entropy, 0.1)
    return Problem(BagOfWords(), loss, batches(64, *train), validation)


def tumours() -> Problem:
    """Logistic regression from weights of zero."""
    features, benign = breast_cancer()
    network = nn.Linear(30, 2)
    nn.init.zeros_(network.weight), nn.init.zeros_(network.bias)
    return classification(network, features, benign, 350)


@lru_cache(maxsize=2)
def _pretrained(build: Callable[[], nn.Module]) -> nn.Module:
    """A network that knows the digits from 0 to 4; the same one whatever the state of the random generator."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = build()
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        drawn = batches(32, *halves_of_digits()[0])
        for _ in range(300):
            optimizer.zero_grad()
            _cross_entropy(0.1, network, next(drawn)).backward()
            optimizer.step()
    return network


def _source_perceptron() -> nn.Module:
    return perceptron(64, 5, width=64, depth=3)


def _source_convolutions() -> nn.Module:
    return Flat(*list(convolutions())[1:-1], nn.Linear(128, 5))


def adapters() -> Problem:
    """From the lower half of the digits to the upper one, most of the weights frozen."""
    layers = copy.deepcopy(_pretrained(_source_perceptron))
    network = nn.Sequential(*[Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in layers])
    return classification(network, *halves_of_digits()[1], 500)


def fine_tuning() -> Problem:
    """From the lower half of the digits to the upper one with a new head, all else at a tenth of its rate."""
    layers = list(copy.deepcopy(_pretrained(_source_convolutions)))[:-1]
    network = nn.Sequential()
    network.add_module("backbone", Flat(*layers))
    network.add_module("head", nn.Linear(128, 5))
    problem = classification(network, *halves_of_digits()[1], 500)
    problem.rates = {"backbone": 0.1, "head": 1.0}
    return problem


def game(noise: int = 16, width: int = 64, features: int = 8) -> Problem:
    """A generator of the digits' principal components, and a discriminator; compared by their energy distance."""

    def players_loss(network: nn.Module, batch: Batch, of: str) -> Tensor:
        fake = network["generator"](torch.randn(len(batch[0]), noise))
        if of == "generator":
            return softplus(-network["discriminator"](fake)).mean()
        real_loss = softplus(-network["discriminator"](batch[0])).mean()
        return real_loss + softplus(network["discriminator"](fake.detach())).mean()

    def distance(network: nn.Module, batch: Batch) -> Tensor:
        real, fake = batch[0], network["generator"](batch[1])
        across, within, among = (torch.cdist(*pair).mean() for pair in ((real, fake), (real, real), (fake, fake)))
        return 2 * across - within - among

    def layers(i: int, o: int) -> nn.Module:
        hidden = [nn.Linear(i, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
        return nn.Sequential(*hidden, nn.Linear(width, o))

    pixels, _ = digits()
    centred = pixels - pixels.mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:features].mT
    components = components / components.std()
    network = nn.ModuleDict({"generator": layers(noise, features), "discriminator": layers(features, 1)})
    fixed = torch.randn(len(components) - 1200, noise, generator=torch.Generator().manual_seed(0))
    problem = Problem(network, distance, batches(64, components[:1200]), (components[1200:], fixed))
    problem.players = {name: partial(players_loss, of=name) for name in ("discriminator", "generator")}
    return problem
