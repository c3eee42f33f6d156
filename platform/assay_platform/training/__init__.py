"""The single-device training loop."""

from assay_platform.training.trainer import FitResult, StopTraining, TrainConfig, fit

__all__ = ["FitResult", "StopTraining", "TrainConfig", "fit"]
