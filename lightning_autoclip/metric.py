"""The exact running percentile as a torchmetrics metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_autoclip import gradients
from lightning_autoclip.history import History, check_percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class RunningPercentile(Metric):
    """Exact percentile of the last ``window`` values, or of all of them.

    A `torchmetrics.Metric` with the verbs of that library. Agrees with ``numpy.percentile`` (linear interpolation) for
    every history length and percentile; a NaN or an Inf never enters. On a GPU ``update`` does not wait for the value,
    and ``compute`` does. The values are part of the ``state_dict`` of the metric and of its module, always in float64.

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
        self._history, self.percentile, self._keeps = History(window), check_percentile(percentile), True
        self._arrival: gradients.Arrival | None = None  # of the last value

    def update(self, value: Tensor | float) -> None:
        """Append one value.

        Args:
            value: Shape ``()`` or ``(1,)``, a real dtype, or a float. Skipped if it is not finite.

        Raises:
            ValueError: There is not exactly one value; :meth:`extend` takes many.
        """
        self._receive()
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"Expected one `value`, but got a tensor of shape {tuple(value.shape)}. `extend` takes many."
            )
        if isinstance(value, Tensor) and gradients.can_read_later(value.device):
            self._arrival = gradients.Arrival(value.detach().reshape(1))
        else:
            self._history.extend([float(value)])

    def _receive(self) -> None:
        if self._arrival is not None:
            arrival, self._arrival = self._arrival, None
            self._history.extend(arrival.wait())

    @property
    def history(self) -> History:
        """The values that count. Waits for the last one."""
        self._receive()
        return self._history

    def extend(self, values: Tensor) -> None:
        """Append many values at once, oldest first.

        Args:
            values: Shape ``(n,)``, a real dtype. Those that are not finite are skipped.
        """
        given = torch.as_tensor(values).detach().reshape(-1).tolist()
        self.history.extend(given)
        self._update_count += len(given)
        self._computed = None

    def compute(self) -> Tensor:
        """Return the percentile: shape ``()``, float32, on the metric's device; NaN before the first value."""
        return torch.tensor(self.history.percentile(self.percentile), dtype=torch.float32, device=self.device)

    def forward(self, value: Tensor | float) -> Tensor:
        """Append one value and return its own percentile: the value."""
        self.update(value)
        return torch.as_tensor(value, dtype=torch.float32, device=self.device).reshape(())

    @property
    def values(self) -> Tensor:
        """The values that count, oldest first: shape ``(n,)``, float64, on the CPU."""
        return self.history.values

    def reset(self) -> None:
        """Start with no values."""
        super().reset()
        self._history, self._arrival = History(self._history.window), None

    def persistent(self, mode: bool = False) -> None:
        """Set whether the values are part of the ``state_dict``, as they are by default."""
        self._keeps = mode

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._keeps:
            destination |= {f"{prefix}values": self.values, f"{prefix}count": torch.tensor(self.history.count)}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        missing_keys, _, error_msgs = lists
        state = {key: state_dict.pop(prefix + key) for key in ("values", "count") if prefix + key in state_dict}
        if len(state) == 2:
            try:
                history = History(self._history.window)
                history.extend(state["values"].double().tolist())
                history.count = int(state["count"])
                self._history, self._arrival = history, None
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                error_msgs.append(f"`{prefix}` holds damaged values: {error}")
            self._update_count, self._computed = self._history.count, None
        elif self._keeps:
            missing_keys += [prefix + key for key in ("values", "count") if key not in state]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the values in order, with the percentile as a line. Needs matplotlib.

        Args:
            val: The percentile to draw; the present one if ``None``.
            ax: The axes to draw on; new ones if ``None``.

        Returns:
            The matplotlib figure and axes.
        """
        import matplotlib.pyplot as plt

        values, last = self.values, self.history.count
        val = self.compute() if val is None else val
        if ax is None:
            _, ax = plt.subplots()
        ax.plot(range(last - values.numel() + 1, last + 1), values, lw=0.8, label="values")
        ax.axhline(float(val), color="C3", ls="--", label=f"percentile {self.percentile:g}: {float(val):.4g}")
        if values.numel() and float(values.min()) > 0:
            ax.set_yscale("log")
        ax.set(xlabel="update", ylabel="value")
        ax.legend()
        return ax.figure, ax  # type: ignore[return-value]
