"""The sparse Mixture-of-Experts backbone that every model of the platform stands on."""

from assay_platform.moe.backbone import Backbone, BackboneConfig
from assay_platform.moe.embeddings import CategoricalEmbedding, PiecewiseLinearEmbedding
from assay_platform.moe.layer import MoELayer, Routing

__all__ = [
    "Backbone",
    "BackboneConfig",
    "CategoricalEmbedding",
    "MoELayer",
    "PiecewiseLinearEmbedding",
    "Routing",
]
