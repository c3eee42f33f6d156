"""A table with labels in, a fast calibrated model out: cleaning, features, a search over families, one model of all."""

from assay_pipelines.automl.pipeline import run_automl

__all__ = ["run_automl"]
