"""The registered model that a latency benchmark asks."""

from pathlib import Path

from assay_features.feast.repository import FeatureRepository
from assay_pipelines.tracking import open_registry
from assay_platform.config import load_config
from assay_platform.tracking import CHAMPION


def champion(model: str, made_by: str) -> tuple[Path, FeatureRepository]:
    """Its artifact and its features. made_by: the command that there has to be a champion of."""
    config = load_config()
    registry = open_registry(config)
    number = registry.version_of(model, CHAMPION)
    if number is None:
        raise SystemExit(f"{model} has no champion; `{made_by}` makes one")
    return registry.download(model, number), FeatureRepository(config.paths.feature_repositories / model)
