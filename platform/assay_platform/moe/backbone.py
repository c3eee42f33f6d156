"""The backbone: a projection, then residual blocks of LayerNorm → MoE layer → dropout.

The fraud model and the recommender both use this module as it is; they differ in what they feed it and in
the head they put on top.
"""

# N rows, D model width, I input width

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from assay_platform.errors import ConfigError
from assay_platform.moe.fences import Fences
from assay_platform.moe.layer import MoELayer
from assay_platform.moe.router import ROUTERS


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape of a backbone. `hidden` is the width inside one expert, `router` a name of `ROUTERS`."""

    width: int = 128
    hidden: int = 128
    num_blocks: int = 2
    num_experts: int = 8
    top_k: int = 2
    num_shared: int = 1
    router: str = "softmax"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "num_blocks", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"backbone.{name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(f"backbone.top_k is {self.top_k}; it must not be above num_experts ({self.num_experts})")
        if self.num_shared < 0:
            raise ConfigError(f"backbone.num_shared is {self.num_shared}; it must not be below 0")
        if self.router not in ROUTERS:
            raise ConfigError(f"backbone.router is {self.router!r}; allowed are {', '.join(ROUTERS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"backbone.dropout is {self.dropout}; allowed is 0 up to below 1")


class BackboneOutput(NamedTuple):
    """Result of one batch."""

    y_ND: Tensor
    balance_loss: Tensor  # scalar, mean over blocks, to be added to the task's loss as it is


class Backbone(nn.Module):
    """(N, I) → (N, D)."""

    def __init__(self, input_width: int, config: BackboneConfig) -> None:
        super().__init__()
        self.project = nn.Linear(input_width, config.width)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.num_blocks))
        self.layers = nn.ModuleList(
            MoELayer(
                config.width,
                config.hidden,
                config.num_experts,
                config.top_k,
                router=config.router,
                num_shared=config.num_shared,
                name=f"layer {block}",
            )
            for block in range(config.num_blocks)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.final_norm = nn.LayerNorm(config.width)

    def guard(self, **options: Any) -> tuple[Fences, ...]:
        """Fence off experts that fail, in every layer; see `MoELayer.guard`."""
        return tuple(layer.guard(**options) for layer in self.layers if isinstance(layer, MoELayer))

    def forward(self, x_NI: Tensor) -> BackboneOutput:
        """Run a batch."""
        return self.blocks(self.project(x_NI))

    def blocks(self, h_ND: Tensor) -> BackboneOutput:
        """All but the projection."""
        losses = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out = layer(norm(h_ND))
            h_ND = h_ND + self.dropout(out.y_ND)
            losses.append(out.balance_loss)
        return BackboneOutput(self.final_norm(h_ND), torch.stack(losses).mean())
