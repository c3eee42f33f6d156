"""The sparse Mixture-of-Experts backbone that every model of the platform stands on."""

from assay_platform.moe.backbone import Backbone, BackboneConfig
from assay_platform.moe.capacity import CapacityConfig
from assay_platform.moe.experts import Expert, ExpertSpec
from assay_platform.moe.layer import MoELayer
from assay_platform.moe.router import ROUTERS, Router, Routing

__all__ = [
    "ROUTERS",
    "Backbone",
    "BackboneConfig",
    "CapacityConfig",
    "Expert",
    "ExpertSpec",
    "MoELayer",
    "Router",
    "Routing",
]
