"""The training loop: in one process, or in several that share every batch."""

from assay_platform.training.checkpoint import Checkpoint
from assay_platform.training.ranks import ALONE, Ranks
from assay_platform.training.trainer import FitResult, StopTraining, TrainConfig, UpdateOn, fastest_device, fit
from assay_platform.training.workers import HERE, Workers

__all__ = [
    "ALONE",
    "HERE",
    "Checkpoint",
    "FitResult",
    "Ranks",
    "StopTraining",
    "TrainConfig",
    "UpdateOn",
    "Workers",
    "fastest_device",
    "fit",
]
