"""The single-device training loop."""

from assay_platform.training.checkpoint import Checkpoint
from assay_platform.training.trainer import FitResult, StopTraining, TrainConfig, UpdateOn, fastest_device, fit

__all__ = ["Checkpoint", "FitResult", "StopTraining", "TrainConfig", "UpdateOn", "fastest_device", "fit"]
