"""Bounded work with elastic overflow: every expert has so many places a batch, spare sets of places help hot ones.

The layer is dropless by default: a hot expert simply takes longer. Where the longest time has to be bounded (an expert
on a device of its own, a fixed buffer, a latency promise), `ElasticCapacity` gives each expert `places` rows a batch,
runs all of them as one batched product, and lends spare sets of places to the experts that overflow. A spare runs the
weights of the expert it serves, so whoever is served gets exactly the dropless result. A spare that nobody needs goes
back after `patience` batches. What finds no place is not computed: its gate is 0, and it is counted as overflow.

First choices take places before second ones (GShard, arXiv:2006.16668, section 2.2), earlier rows before later ones.
"""

# N rows, K chosen, E experts, S spares in use, C places of one expert, P = N K pairs

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from assay_platform.errors import ConfigError
from assay_platform.moe.router import Routing


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """factor: places of an expert as a multiple of its even share N · K / E. spares: at most so many in use at once."""

    factor: float = 1.25
    spares: int = 0
    patience: int = 8

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"capacity.factor is {self.factor}; it must be above 0")
        if self.spares < 0 or self.patience < 1:
            raise ConfigError(
                f"capacity.spares is {self.spares} and patience {self.patience}; at least 0 and 1 are allowed"
            )


class Served(NamedTuple):
    """How a batch fared."""

    served: float  # fraction of pairs that were computed
    spares: int  # in use


class ElasticCapacity:
    """State of the spares of one layer. Not for several threads at once."""

    def __init__(self, config: CapacityConfig) -> None:
        self.config = config
        self.last = Served(1.0, 0)
        self._lent: list[list[int]] = []  # [expert, batches without need] of every spare in use

    def run(
        self, x_ND: Tensor, routing: Routing, block: Callable[[], tuple[Tensor, Tensor]], num_experts: int
    ) -> Tensor:
        """Σ_k gate_k · expert_k(x) over the pairs that find a place. block: the stacked weights, see `ExpertPool`."""
        num_rows, num_slots = routing.expert_NK.shape
        if not num_rows:
            return torch.zeros_like(x_ND)
        places = max(1, math.ceil(self.config.factor * num_rows * num_slots / num_experts))
        # Pairs in order of choice, then row: first choices first.
        expert_P = routing.expert_NK.T.reshape(-1)
        counts = torch.bincount(expert_P + 1, minlength=num_experts + 1)[1:]
        owners = self._lend(counts.tolist(), places)
        place_P = self._place(expert_P, counts, owners, places, num_experts)
        pair_of = torch.nonzero(place_P >= 0).squeeze(1)
        row_of = pair_of % num_rows
        num_sets = num_experts + len(owners)
        buffer = x_ND.new_zeros(num_sets * places, x_ND.shape[1])
        buffer = buffer.index_copy(0, place_P[pair_of], x_ND.index_select(0, row_of)).view(num_sets, places, -1)
        w_in_EDF, w_out_EHD = (weights[:num_experts] for weights in block())
        results = [_swiglu(buffer[:num_experts], w_in_EDF, w_out_EHD)]
        if owners:
            index = torch.tensor(owners, device=x_ND.device)
            results.append(_swiglu(buffer[num_experts:], w_in_EDF[index], w_out_EHD[index]))
        output = torch.cat(results).flatten(0, 1).index_select(0, place_P[pair_of])
        gate = routing.gate_NK.T.reshape(-1, 1)[pair_of].to(output.dtype)
        wanted = max(1, int(counts.sum()))
        self.last = Served(len(pair_of) / wanted, len(owners))
        return torch.zeros_like(x_ND, dtype=output.dtype).index_add(0, row_of, output * gate)

    def _lend(self, counts: list[int], places: int) -> list[int]:
        """The expert that every spare in use serves, in order of spares."""
        need = {e: -(-(count - places) // places) for e, count in enumerate(counts) if count > places}
        kept: list[list[int]] = []
        for expert, idle in self._lent:
            if need.get(expert, 0) > 0:
                need[expert] -= 1
                kept.append([expert, 0])
            else:
                kept.append([expert, idle + 1])
        wanting = sorted((e for e, n in need.items() for _ in range(n)), key=lambda e: -counts[e])
        for expert in wanting:
            free = next((spare for spare in kept if spare[1] > 0), None)  # idle now, so it may move at once
            if len(kept) < self.config.spares:
                kept.append([expert, 0])
            elif free is not None:
                free[:] = [expert, 0]
        self._lent = [spare for spare in kept if spare[1] < self.config.patience]
        return [expert for expert, _ in self._lent]

    @staticmethod
    def _place(expert_P: Tensor, counts: Tensor, owners: list[int], places: int, num_experts: int) -> Tensor:
        """(P,) place of every pair among all sets of places, -1 where there is none."""
        order_P = torch.argsort(expert_P, stable=True)
        order_P = order_P[len(expert_P) - int(counts.sum()) :]
        expert = expert_P[order_P]
        start_E = counts.cumsum(0) - counts
        rank = torch.arange(len(order_P), device=expert.device) - start_E[expert]
        # sets[e, i]: the i-th set of places of expert e, its own first; -1 past the last.
        table = torch.full((num_experts, len(owners) + 1), -1, dtype=torch.int64)
        table[:, 0] = torch.arange(num_experts)
        used = [1] * num_experts
        for spare, owner in enumerate(owners):
            table[owner, used[owner]] = num_experts + spare
            used[owner] += 1
        turn = torch.div(rank, places, rounding_mode="floor")
        inside = turn <= len(owners)
        chosen_set = table.to(expert.device)[expert, turn.clamp_max(len(owners))]
        place = torch.where(inside & (chosen_set >= 0), chosen_set * places + rank % places, -1)
        return torch.full_like(expert_P, -1).index_copy(0, order_P, place)


def _swiglu(x_SCD: Tensor, w_in_SDF: Tensor, w_out_SHD: Tensor) -> Tensor:
    gate, up = torch.bmm(x_SCD, w_in_SDF.to(x_SCD.dtype)).chunk(2, dim=-1)
    return torch.bmm(silu(gate) * up, w_out_SHD.to(x_SCD.dtype))
