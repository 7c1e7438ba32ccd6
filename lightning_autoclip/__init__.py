"""Gradient clipping for PyTorch Lightning at a running percentile of the gradient norms: no threshold to tune."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_autoclip.autoclip import AutoClip
    from lightning_autoclip.callback import GradientClipping
    from lightning_autoclip.clipping.clipper import GradientClipper
    from lightning_autoclip.clipping.metric import RunningPercentile
    from lightning_autoclip.clipping.optimizers import NonFiniteGradientError
    from lightning_autoclip.clipping.policies import Constant, Percentile, Policy, ZScore
    from lightning_autoclip.clipping.record import History
    from lightning_autoclip.clipping.step import StepRecord
    from lightning_autoclip.monitoring.report import Report
    from lightning_autoclip.monitoring.workspace import create_workspace

__version__ = "0.1.0"

__all__ = [
    "AutoClip",
    "Constant",
    "GradientClipper",
    "GradientClipping",
    "History",
    "NonFiniteGradientError",
    "Percentile",
    "Policy",
    "Report",
    "RunningPercentile",
    "StepRecord",
    "ZScore",
    "create_workspace",
]

# Lightning takes seconds to import, which neither the command line nor a loop without a Trainer has need of.
_ROOMS = {
    "AutoClip": "autoclip",
    "Constant": "clipping.policies",
    "GradientClipper": "clipping.clipper",
    "GradientClipping": "callback",
    "History": "clipping.record",
    "NonFiniteGradientError": "clipping.optimizers",
    "Percentile": "clipping.policies",
    "Policy": "clipping.policies",
    "Report": "monitoring.report",
    "RunningPercentile": "clipping.metric",
    "StepRecord": "clipping.step",
    "ZScore": "clipping.policies",
    "create_workspace": "monitoring.workspace",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
