"""What is learnt: networks, losses, batches, and the measure by which runs are compared."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from _data import CHARACTERS, FRAME, digits, mixtures, spectrogram, text_windows, waveform
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as si_sdr

Batch = tuple[Tensor, ...]


@dataclass
class Problem:
    """A network with its data.

    Attributes:
        network: With initial weights.
        loss: From a batch to what is minimised.
        train: Batches without end.
        validation: One batch.
        error: From a batch to the figure that runs are compared by, above 0, lower is better; the loss if `None`.
        spoil: Makes a bad batch of a good one.
        rates: Where parts of the network have learning rates of their own: by name, relative to the task's.
        players: Where parts of the network have optimizers of their own: by name, what each minimises.
    """

    network: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Iterator[Batch]
    validation: Batch
    error: Callable[[nn.Module, Batch], Tensor] | None = None
    spoil: Callable[[Batch], Batch] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    players: dict[str, Callable[[nn.Module, Batch], Tensor]] = field(default_factory=dict)


class CharLSTM(nn.Module):
    """The next character from those before it."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 48)
        self.lstm = nn.LSTM(48, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(characters))[0])


class CharGPT(nn.Module):
    """The same with a small causal transformer."""

    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(CHARACTERS, width), nn.Embedding(48, width)
        block = partial(nn.TransformerEncoderLayer, width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        length = characters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.embedding(characters) + self.position.weight[:length]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


class Separator(nn.Module):
    """A BLSTM over the mixture's spectrogram: masks of two sources, and an embedding of each time-frequency bin."""

    def __init__(self, hidden: int = 32, embedding: int = 8) -> None:
        super().__init__()
        bins = FRAME // 2 + 1
        self.lstm = nn.LSTM(bins, hidden, batch_first=True, bidirectional=True)
        self.mask, self.embed = nn.Linear(2 * hidden, bins), nn.Linear(2 * hidden, bins * embedding)

    def forward(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.lstm(torch.log1p(mixture.abs()).mT)[0]
        mask = torch.sigmoid(self.mask(hidden)).mT
        embeddings = self.embed(hidden).unflatten(2, (mask.shape[1], -1)).permute(0, 2, 1, 3)
        return torch.stack((mask, 1 - mask), 1), normalize(embeddings, dim=3)


def text(network: Callable[[], nn.Module]) -> Problem:
    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(network(batch[0][:, :-1]).mT, batch[0][:, 1:])

    def noise(batch: Batch) -> Batch:
        return (torch.randint_like(batch[0], CHARACTERS),)

    windows, later = text_windows()
    return Problem(network(), loss, batches(16, windows), (later,), spoil=noise)


def perceptron(features: int, outputs: int, width: int = 64, depth: int = 5, gain: float = math.sqrt(2)) -> nn.Module:
    """Linear layers and ReLUs without normalisation; a gain of √2 keeps the scale of what passes through."""
    sizes = [features, *[width] * depth, outputs]
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=gain / math.sqrt(i))
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    """Three layers without normalisation."""
    channels, layers = [1, 16, 32, 32], []
    for i, o in pairwise(channels):
        layers += [nn.Conv2d(i, o, 3, stride=1 if i == 1 else 2, padding=1), nn.ReLU()]
    return nn.Sequential(nn.Unflatten(1, (1, 8)), *layers, nn.Flatten(), nn.Linear(128, 10))


def images(network: Callable[[], nn.Module]) -> Problem:
    def loss(network: nn.Module, batch: Batch) -> Tensor:
        pixels = batch[0] if isinstance(network[0], nn.Linear) else batch[0].unflatten(1, (8, 8))
        return cross_entropy(network(pixels), batch[1], label_smoothing=0.1 if network.training else 0.0)

    def outlier(batch: Batch) -> Batch:
        return 30 * batch[0], batch[1][torch.randperm(len(batch[1]))]

    pixels, classes = digits()
    train = batches(32, pixels[:1200], classes[:1200])
    return Problem(network(), loss, train, (pixels[1200:], classes[1200:]), spoil=outlier)


def autoencoder() -> Problem:
    """Images through eight numbers and back, in the units of the data set (0 to 16): losses that are far from 1."""

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return mse_loss(network(batch[0]), 16 * batch[0])

    def outlier(batch: Batch) -> Batch:
        return (30 * batch[0],)

    pixels, _ = digits()
    network = nn.Sequential(*perceptron(64, 8, depth=2), *perceptron(8, 64, depth=2))
    return Problem(network, loss, batches(32, pixels[:1200]), (pixels[1200:],), spoil=outlier)


def separation(objective: str) -> Problem:
    """The setting of the AutoClip paper in miniature.

    Args:
        objective: ``"mi"`` (mask inference, L1), ``"snr"``, ``"dc"`` (deep clustering), ``"wkm"`` (whitened k-means) or
            ``"chimera"`` (whitened k-means and mask inference).
    """
    sources = mixtures()
    loss = _OBJECTIVES[objective]
    validation = (sources[320:],)
    error = (lambda network, batch: 10 ** (loss(network, batch) / 10)) if objective == "snr" else None
    return Problem(Separator(), loss, batches(8, sources[:320]), validation, error)


def _parts(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixture and the sources as spectrograms, and what the network makes of the mixture."""
    sources = spectrogram(batch[0])
    mixture = sources.sum(1)
    return mixture, sources, *network(mixture)


def _mask_inference(network: nn.Module, batch: Batch) -> Tensor:
    mixture, sources, masks, _ = _parts(network, batch)
    return (masks * mixture.abs()[:, None] - sources.abs()).abs().mean()


def _snr(network: nn.Module, batch: Batch) -> Tensor:
    mixture, _, masks, _ = _parts(network, batch)
    noise = waveform(masks * mixture[:, None]) - batch[0]
    return 10 * torch.log10(noise.square().sum(2) / batch[0].square().sum(2)).mean()


def _memberships(sources: Tensor) -> Tensor:
    """Which source is the louder in each bin, of the louder half of all bins."""
    magnitude = sources.abs()
    loud = magnitude.sum(1) > magnitude.sum(1).flatten(1).median(1).values[:, None, None]
    louder = torch.stack((magnitude[:, 0] > magnitude[:, 1], magnitude[:, 0] <= magnitude[:, 1]), 3)
    return (louder & loud[..., None]).flatten(1, 2).float()


def _deep_clustering(network: nn.Module, batch: Batch) -> Tensor:
    _, sources, _, embeddings = _parts(network, batch)
    is_of = _memberships(sources)
    embeddings = embeddings.flatten(1, 2) * is_of.sum(2, keepdim=True)
    pairs = ((embeddings, embeddings), (embeddings, is_of), (is_of, is_of))
    within, across, ideal = [(a.mT @ b).square().sum((1, 2)) for a, b in pairs]
    return ((within - 2 * across + ideal) / is_of.sum((1, 2))).mean()


def _whitened_k_means(network: nn.Module, batch: Batch) -> Tensor:
    _, sources, _, embeddings = _parts(network, batch)
    is_of = _memberships(sources)
    embeddings = embeddings.flatten(1, 2) * is_of.sum(2, keepdim=True)
    within = embeddings.mT @ embeddings + 1e-3 * torch.eye(embeddings.shape[2])
    across = embeddings.mT @ is_of
    counts = torch.diag_embed(1 / is_of.sum(1).clamp(min=1))
    explained = torch.linalg.solve(within, across @ counts @ across.mT).diagonal(dim1=1, dim2=2).sum(1)
    return (embeddings.shape[2] - explained).mean()


def _chimera(network: nn.Module, batch: Batch) -> Tensor:
    return _whitened_k_means(network, batch) + _mask_inference(network, batch)


_OBJECTIVES = {
    "mi": _mask_inference,
    "snr": _snr,
    "dc": _deep_clustering,
    "wkm": _whitened_k_means,
    "chimera": _chimera,
}


@torch.no_grad()
def si_sdr_improvement(problem: Problem, objective: str) -> float:
    """How many dB of scale-invariant signal-to-distortion ratio the separation gains over the mixture itself."""
    mixture, _, masks, embeddings = _parts(problem.network, problem.validation)
    if objective in ("dc", "wkm"):  # these have learnt no masks: cluster the bins
        masks = torch.stack([_clustered(*pair) for pair in zip(embeddings, mixture.abs(), strict=True)])
    sources = problem.validation[0]
    separated = waveform(masks * mixture[:, None])
    before = si_sdr(sources.sum(1, keepdim=True).expand_as(sources), sources).mean(1)
    after = torch.maximum(*[si_sdr(order, sources).mean(1) for order in (separated, separated.flip(1))])
    return float((after - before).mean())


def _clustered(embeddings: Tensor, magnitude: Tensor) -> Tensor:
    """Binary masks, shape ``(2, frequencies, frames)``; the louder half of the bins says where the centres are."""
    bins = embeddings.flatten(0, 1).numpy()
    loud = (magnitude > magnitude.median()).flatten().numpy()
    first = torch.from_numpy(KMeans(2, n_init=1, random_state=0).fit(bins[loud]).predict(bins)).view_as(magnitude) == 0
    return torch.stack((first, ~first)).float()


def batches(size: int, *tensors: Tensor) -> Iterator[Batch]:
    """Random batches from the global generator."""
    while True:
        drawn = torch.randint(len(tensors[0]), (size,))
        yield tuple(tensor[drawn] for tensor in tensors)
