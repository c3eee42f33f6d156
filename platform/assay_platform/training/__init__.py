"""The single-device training loop."""

from assay_platform.training.trainer import FitResult, StopTraining, TrainConfig, UpdateOn, fastest_device, fit

__all__ = ["FitResult", "StopTraining", "TrainConfig", "UpdateOn", "fastest_device", "fit"]
