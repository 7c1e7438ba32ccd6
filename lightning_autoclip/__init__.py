"""Gradient clipping for PyTorch Lightning at a running percentile of the gradient norms: no threshold to tune."""

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
