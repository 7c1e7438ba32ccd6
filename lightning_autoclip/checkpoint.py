"""The state of the callback in a Lightning checkpoint, read for report, plot and suggestions."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from lightning_autoclip._checks import check_state
from lightning_autoclip.clipper import GradientClipper
from lightning_autoclip.history import History
from lightning_autoclip.plot import plot_of
from lightning_autoclip.policies import Constant
from lightning_autoclip.report import Report, report_of
from lightning_autoclip.settings import Clipping, settings_of_run
from lightning_autoclip.steplog import StepLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure


STATE_KEY = "AutoClip"  # of the callback in a checkpoint
VERSION = 1  # of the state
_STATE: dict[str, Any] = {
    "version": VERSION,
    "settings": dict,
    "several_policies": bool,
    "has_scaler": bool,
    "groups": dict,
}
_SETTINGS = {**dict.fromkeys(Clipping(Constant(1.0)).to_dict(), object), "groups": object}


def check_callback_state(state: Any) -> None:
    """Raise a `ValueError` if a state is not one that the callback has saved."""
    check_state(STATE_KEY, state, _STATE)
    check_state(f"{STATE_KEY}.settings", state["settings"], _SETTINGS)


@dataclass(frozen=True)
class RecordedRun:
    """A run as a checkpoint holds it.

    Attributes:
        path: The file.
        logs: What happened, per optimizer, by the prefix of its keys.
        norms: Likewise, the norms of single steps, oldest first; by value the gradient RMS. Of a run with more steps
            than the log has bins, those that the norm history still holds.
        settings: The callback's settings.
        has_scaler: Whether a loss scaler was at work.
    """

    path: Path
    logs: dict[str, StepLog]
    norms: dict[str, list[float]]
    settings: dict[str, Any]
    has_scaler: bool

    def report(self) -> Report:
        """Return what clipping did, and what it may hide."""
        return report_of(self.logs, self.settings, self.has_scaler)

    def plot(self) -> Figure:
        """Draw norms, thresholds and clip coefficients: needs matplotlib."""
        return plot_of(self.logs, self.settings)


def read_run(path: Path) -> RecordedRun:
    """Read a Lightning checkpoint, or the newest ``*.ckpt`` below a folder.

    Nothing in the file is executed, and no module that it names is imported.

    Raises:
        ValueError: There is no such file, it is damaged or no Lightning checkpoint, or it was written without us.
    """
    try:
        path = _newest_below(path) if path.is_dir() else path
        path.open("rb").close()  # torch's own errors of missing files differ
    except OSError as error:
        raise ValueError(f"Expected a checkpoint that can be read, but got {path}: {error}.") from error
    state = _our_state(_load(path), path)
    try:
        check_callback_state(state)
        settings, logs, norms = settings_of_run(state["settings"], state["several_policies"]), {}, {}
        for prefix, group in state["groups"].items():
            clipper, logs[prefix] = GradientClipper(Constant(1.0), window=None), StepLog(prefix)
            logs[prefix].load_state_dict(group["log"])
            clipper.load_state_dict({**group["clipper"], "gradient_clip_algorithm": "norm"})
            norms[prefix] = _norms(logs[prefix], clipper.history)
        return RecordedRun(path, logs, norms, settings, state["has_scaler"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"The norm history in {path} cannot be read: {error}") from error


def _newest_below(folder: Path) -> Path:
    found = [path for path in folder.rglob("*.ckpt") if path.is_file()]
    if not found:
        raise ValueError(f"Expected {folder} to have a checkpoint (`*.ckpt`) in it or below it, but found none.")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _our_state(checkpoint: Any, path: Path) -> dict[str, Any]:
    """Return the callback's entry."""
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"Expected {path} to be a checkpoint of Lightning's Trainer, but it is another file of torch.")
    if not isinstance(checkpoint.get("callbacks"), dict):
        raise ValueError(
            f"{path} is a weights-only checkpoint, which holds no state of callbacks. Save one without"
            " `save_weights_only=True`, or call `report()` of the callback after the fit."
        )
    if not (state := checkpoint["callbacks"].get(STATE_KEY)):
        raise ValueError(f"{path} was written without `AutoClip` or `GradientClipping`: it has no {STATE_KEY!r}.")
    return state  # type: ignore[no-any-return]


def _norms(log: StepLog, history: History) -> list[float]:
    """Return the norms of all steps while each has its bin, else those in the norm history."""
    if all(row.steps == 1 for row in log.bins):
        return [row.statistic for row in log.bins if row.norms]
    norms: list[float] = history.values.tolist()
    return norms


class _Inert:
    """Stands in for an object of a class that is not imported: takes any arguments and state, and keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _load(path: Path) -> Any:
    """Load a file of `torch.save` by torch's safe unpickler, with stand-ins for the classes that it does not know."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: dict[str, Any] = {name: type(name, (_Inert,), {}) for name in names}
        stand_ins |= {"builtins.getattr": lambda *args: _Inert, "": _Inert}  # of a class that stands in another one
        while True:
            known: Any = [(stand_in, name) for name, stand_in in stand_ins.items()]
            try:
                with torch.serialization.safe_globals(known):
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except UnpicklingError as error:
                _exchange(stand_ins, str(error.__context__ or error))  # around the first one is a page of advice
    except Exception as error:  # a damaged file can lead to any
        raise ValueError(
            f"Expected {path} to be a checkpoint of `torch.save`, but it cannot be read: {error}"
        ) from error


def _exchange(stand_ins: dict[str, Any], reason: str) -> None:
    """Exchange the stand-in that could not be loaded for a list or a dict, as the unpickler fills no class of others.

    Raises:
        ValueError: It was something else that could not be loaded.
    """
    for name, stand_in in stand_ins.items():
        if str(stand_in) in reason and stand_in.__new__ is _Inert.__new__:  # each once, whatever a file has as names
            new: Any = (lambda cls, *args: OrderedDict()) if "SETITEM" in reason else (lambda cls, *args: [])
            stand_ins[name] = type(name, (), {"__new__": new})
            return
    raise ValueError(reason)
