"""Gradient clipping for PyTorch Lightning at a running percentile of the gradient norms: no threshold to tune."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_autoclip.clipper import GradientClipper
    from lightning_autoclip.history import History
    from lightning_autoclip.lightning.autoclip import AutoClip
    from lightning_autoclip.lightning.callback import GradientClipping
    from lightning_autoclip.metric import RunningPercentile
    from lightning_autoclip.policies import Constant, Percentile, Policy, ZScore
    from lightning_autoclip.report import Report
    from lightning_autoclip.settings import Clipping
    from lightning_autoclip.skip import NonFiniteGradientError
    from lightning_autoclip.step import StepRecord
    from lightning_autoclip.workspace import create_workspace

__version__ = "0.1.0"

__all__ = [
    "AutoClip",
    "Clipping",
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

# Lightning takes seconds to import, which neither the command line nor a loop without a Trainer needs.
_MODULES = {
    "AutoClip": "lightning.autoclip",
    "Clipping": "settings",
    "Constant": "policies",
    "GradientClipper": "clipper",
    "GradientClipping": "lightning.callback",
    "History": "history",
    "NonFiniteGradientError": "skip",
    "Percentile": "policies",
    "Policy": "policies",
    "Report": "report",
    "RunningPercentile": "metric",
    "StepRecord": "step",
    "ZScore": "policies",
    "create_workspace": "workspace",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
