"""Helper of overhead.py: the four models whose gradients are clipped."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Shape(LightningModule):
    """A model whose steps are as cheap as its gradients allow; the learning rate leaves the norms where they are."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-7)

    def loader(self, steps: int) -> DataLoader:
        return DataLoader(torch.arange(steps), batch_size=None)

    def batch(self, seed: Tensor, *size: int) -> tuple[Tensor, float]:
        """Random inputs of the step, and a factor for its loss, so that norms differ from step to step."""
        generator = torch.Generator().manual_seed(int(seed))
        x, spread = torch.randn(*size, generator=generator), torch.randn((), generator=generator)
        return x, float((0.5 * spread).exp())


class MLP(Shape):
    """6 tensors, 9,000 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, seed: Tensor, batch_idx: int) -> Tensor:
        x, factor = self.batch(seed, 32, 64)
        return factor * self.net(x).square().mean()


class Transformer(Shape):
    """150 tensors, 10 million elements."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        self.read, self.position = nn.Linear(1000, 256, bias=False), nn.Parameter(torch.zeros(16, 256))
        self.body = nn.TransformerEncoder(layer, 12, norm=nn.LayerNorm(256), enable_nested_tensor=False)
        self.write = nn.Linear(256, 1000)

    def training_step(self, seed: Tensor, batch_idx: int) -> Tensor:
        x, factor = self.batch(seed, 1, 16, 1000)
        return factor * self.write(self.body(self.read(x) + self.position)).square().mean()


class Large(Shape):
    """100 tensors, 50 million elements: a linear loss, whose gradients are noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(500_000) for _ in range(100))
        self.noise = [torch.randn(500_000) / 7000 for _ in range(100)]

    def training_step(self, seed: Tensor, batch_idx: int) -> Tensor:
        _, factor = self.batch(seed, 1)
        return factor * sum(torch.dot(weight, noise) for weight, noise in zip(self.weights, self.noise, strict=True))


class ManyTensors(Shape):
    """10,000 tensors of 100 elements: a linear loss too, of one operation, so that little but clipping counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(100) for _ in range(10_000))
        self.noise = torch.randn(1_000_000) / 1000

    def training_step(self, seed: Tensor, batch_idx: int) -> Tensor:
        _, factor = self.batch(seed, 1)
        return factor * torch.dot(torch.cat([*self.weights]), self.noise)


SHAPES: dict[str, type[Shape]] = {
    "MLP, 6 tensors": MLP,
    "10M in 150 tensors": Transformer,
    "50M in 100 tensors": Large,
    "1M in 10,000 tensors": ManyTensors,
}
