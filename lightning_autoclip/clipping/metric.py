"""The exact running percentile as a torchmetrics metric."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping.record import History, check_percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class RunningPercentile(Metric):
    """Exact percentile of the last ``window`` values, or of all of them.

    A `torchmetrics.Metric` with the verbs of that library. Agrees with ``numpy.percentile`` (linear interpolation) for
    every history length and percentile; a NaN or an infinity never enters; no host read in ``update`` and ``compute``.
    The values are part of the ``state_dict`` of the metric and of its module, always in float32.

    Args:
        percentile: Between 0 and 100.
        window: How many values to keep, at least 1, or ``None`` for the full history as in the AutoClip paper.

    Raises:
        TypeError: ``percentile`` is no number, ``window`` is neither an integer nor ``None``.
        ValueError: ``percentile`` is outside [0, 100] or NaN, ``window`` is below 1.

    Example:
        >>> from lightning_autoclip import RunningPercentile
        >>> metric = RunningPercentile(percentile=50, window=3)
        >>> for norm in (9.0, 1.0, 3.0, float("nan"), 2.0):
        ...     metric.update(norm)
        >>> metric.compute()
        tensor(2.)

    References:
        Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation Networks
        <https://arxiv.org/abs/2007.14469>`_, 2020.
    """

    def __init__(self, percentile: float, window: int | None = 100) -> None:
        super().__init__(sync_on_compute=False)
        self.history, self.percentile, self._keeps = History(window), check_percentile(percentile), True

    def update(self, value: Tensor | float) -> None:
        """Record one value.

        Args:
            value: Shape ``()`` or ``(1,)``, a real dtype (kept as float32), or a float. Not recorded if not finite.

        Raises:
            ValueError: There is not exactly one value; :meth:`extend` takes many.
        """
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
        if value.numel() != 1:
            raise ValueError(
                f"Expected one `value`, but got a tensor of shape {tuple(value.shape)}. `extend` takes many."
            )
        if not _numbers.reads_are_free(value.device):
            self.history.record(value.reshape(()), value.reshape(()).abs() < math.inf)
        elif math.isfinite(number := value.item()):
            self.history.record(number)

    def extend(self, values: Tensor) -> None:
        """Record many values at once, oldest first. Reads the host.

        Args:
            values: Shape ``(n,)``, a real dtype. Those that are not finite are left out.
        """
        self.history.extend(values)
        self._update_count += torch.as_tensor(values).numel()
        self._computed = None

    def compute(self) -> Tensor:
        """Return the percentile: shape ``()``, float32, on the metric's device; NaN before the first value."""
        return torch.as_tensor(self.history.percentile(self.percentile), dtype=torch.float32, device=self.device)

    def forward(self, value: Tensor | float) -> Tensor:
        """Record one value and return its own percentile: the value."""
        self.update(value)
        return torch.as_tensor(value, dtype=torch.float32, device=self.device).reshape(())

    @property
    def recorded(self) -> Tensor:
        """The values in the record, oldest first: shape ``(n,)``, float32, on the CPU. Reads the host."""
        return self.history.recorded

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.history = History(self.history.window)

    def persistent(self, mode: bool = False) -> None:
        """Say whether the values are part of the ``state_dict``, as they are by default."""
        self._keeps = mode

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._keeps:
            state = self.history.state_dict()
            destination |= {f"{prefix}values": state["values"], f"{prefix}count": torch.tensor(state["count"])}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        missing_keys, _, error_msgs = lists
        state = {key: state_dict.pop(prefix + key) for key in ("values", "count") if prefix + key in state_dict}
        if len(state) == 2:
            try:
                self.history.load_state_dict({**state, "count": int(state["count"])})
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"`{prefix}` holds a damaged record: {error}")
            self._update_count, self._computed = self.history.count, None
        elif self._keeps:
            missing_keys += [prefix + key for key in ("values", "count") if key not in state]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the recorded values in order, with the percentile as a line. Needs matplotlib.

        Args:
            val: The percentile to draw; the present one if ``None``.
            ax: The axes to draw on; new ones if ``None``.

        Returns:
            The matplotlib figure and axes.
        """
        import matplotlib.pyplot as plt

        recorded, last = self.recorded, self.history.count
        val = self.compute() if val is None else val
        if ax is None:
            _, ax = plt.subplots()
        ax.plot(range(last - recorded.numel() + 1, last + 1), recorded, lw=0.8, label="recorded")
        ax.axhline(float(val), color="C3", ls="--", label=f"percentile {self.percentile:g}: {float(val):.4g}")
        if recorded.numel() and float(recorded.min()) > 0:
            ax.set_yscale("log")
        ax.set(xlabel="update", ylabel="value")
        ax.legend()
        return ax.figure, ax  # type: ignore[return-value]
