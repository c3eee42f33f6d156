"""Fused products behind plain functions: one signature, an eager form that runs anywhere, a Triton form for GPUs."""

from assay_platform.kernels.experts import expert_swiglu
from assay_platform.kernels.norm import layer_norm_gelu_residual

__all__ = ["expert_swiglu", "layer_norm_gelu_residual"]
