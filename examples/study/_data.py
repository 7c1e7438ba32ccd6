"""Data that every machine has: source text of the standard library, scikit-learn's bundled sets, synthetic mixtures."""

import re
import sysconfig
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor

FRAME, HOP, SAMPLES, SAMPLE_RATE = 128, 32, 2048, 4000  # of the mixtures: half a second each
CHARACTERS = 128
WORDS, MODULES = 4000, 24  # the vocabulary, and how many modules it is of


@lru_cache(maxsize=1)
def text_windows() -> tuple[Tensor, Tensor]:
    """Overlapping windows of 49 characters to train on, and later, disjoint ones to validate."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)[:1_000_000]
    characters = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
    return characters[:900_000].unfold(0, 49, 1), characters[900_000:].unfold(0, 49, 49)[::8]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels from 0 to 1, in an order of no meaning, and their classes."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]


@lru_cache(maxsize=1)
def halves_of_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The digits from 0 to 4, and those from 5 to 9, whose classes are counted from 0 again."""
    images, classes = digits()
    low = classes < 5
    return (images[low], classes[low]), (images[~low], classes[~low] - 5)


@lru_cache(maxsize=1)
def breast_cancer() -> tuple[Tensor, Tensor]:
    """569 tumours, thirty features each of mean 0 and variance 1, and whether they are benign."""
    features, benign = load_breast_cancer(return_X_y=True)
    features = torch.tensor((features - features.mean(0)) / features.std(0), dtype=torch.float32)
    order = torch.randperm(len(benign), generator=torch.Generator().manual_seed(0))
    return features[order], torch.tensor(benign)[order]


@lru_cache(maxsize=1)
def module_words(length: int = 32) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Windows of words and the module that each is from: to train on, and of every fifth stretch to validate."""
    paths = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    largest = sorted(sorted(paths), key=lambda path: path.stat().st_size)[-MODULES:]
    texts = [re.findall(r"[A-Za-z_]{2,}", path.read_text(encoding="utf-8", errors="replace")) for path in largest]
    common = Counter(word for words in texts for word in words).most_common(WORDS - 1)
    numbers = {word: i for i, (word, _) in enumerate(common, 1)}  # 0 is any other word
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for words in texts:
        windows = torch.tensor([numbers.get(word, 0) for word in words]).unfold(0, length, length)
        later = torch.arange(len(windows)) // 5 % 5 == 4
        parts[0].append(windows[~later])
        parts[1].append(windows[later])
    train, validation = ((torch.cat(part), _number_of_part(part)) for part in parts)
    return train, validation


def _number_of_part(parts: list[Tensor]) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(part) for part in parts]))


@lru_cache(maxsize=1)
def mixtures(count: int = 384) -> Tensor:
    """Pairs of sources, shape ``(count, 2, samples)``: a gliding harmonic tone, and bursts of band-passed noise."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    seconds = torch.arange(SAMPLES) / SAMPLE_RATE
    pitch = uniform(90, 300, 1) * torch.exp(uniform(-0.5, 0.5, 1) * seconds + 0.05 * torch.sin(30 * seconds))
    phase = 2 * torch.pi * pitch.cumsum(1) / SAMPLE_RATE
    tone = sum(uniform(0.2, 1, 1) / k * torch.sin(k * phase + uniform(0, 6, 1)) for k in range(1, 7))
    tone = tone * (1.2 + torch.sin(2 * torch.pi * uniform(1, 5, 1) * seconds + uniform(0, 6, 1)))
    spectrum = torch.fft.rfft(torch.randn(count, SAMPLES, generator=generator))
    frequencies = torch.fft.rfftfreq(SAMPLES, 1 / SAMPLE_RATE)
    band = torch.exp(-((frequencies - uniform(300, 1800, 1)) ** 2) / (2 * uniform(100, 400, 1) ** 2))
    noise = torch.fft.irfft(spectrum * band, SAMPLES)
    noise = noise * torch.sigmoid(8 * torch.sin(2 * torch.pi * uniform(2, 8, 1) * seconds + uniform(0, 6, 1)))
    sources = torch.stack((tone, noise), 1)
    return sources / sources.square().mean(2, keepdim=True).sqrt()


def spectrogram(signal: Tensor) -> Tensor:
    """Complex, shape ``(..., frequencies, frames)``."""
    shape = signal.shape[:-1]
    window = torch.hann_window(FRAME)
    spectra = torch.stft(signal.reshape(-1, SAMPLES), FRAME, HOP, window=window, return_complex=True)
    return spectra.reshape(*shape, *spectra.shape[1:])


def waveform(spectra: Tensor) -> Tensor:
    """The inverse of `spectrogram`."""
    shape = spectra.shape[:-2]
    window = torch.hann_window(FRAME)
    signal = torch.istft(spectra.reshape(-1, *spectra.shape[-2:]), FRAME, HOP, window=window, length=SAMPLES)
    return signal.reshape(*shape, SAMPLES)
