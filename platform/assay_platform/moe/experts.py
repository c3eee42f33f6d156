"""Experts as parts: each a module with weights of its own; a pool runs the chosen ones and lets them come and go.

    kind     swiglu   (silu(x W_gate) * x W_up) W_out      Shazeer, arXiv:2002.05202
             gelu     gelu(x W_in) W_out
    columns  a slice of the input that the expert reads, for experts of one feature; all of it if there is none

Experts of one pool may differ in kind and size. Run one by one, those that no row chose get no gradient at all (None,
not zeros), so optimizers skip them; one product over all gives zeros, see `MoELayer.drop_unchosen_gradients`.
Changes to the pool go through `MoELayer`, which keeps the router in step.
"""

# N rows, K chosen, M rows of one expert, D model width, E experts, H hidden width, F = 2 H: gate columns, up columns

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from assay_platform.errors import ConfigError
from assay_platform.kernels.experts import compilable, expert_swiglu, fits_compiled
from assay_platform.moe.router import Routing

_BUILDING = threading.RLock()


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """What an expert is, apart from its weights. columns: (first, past the last) of the input, None for all."""

    hidden: int
    kind: str = "swiglu"
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("swiglu", "gelu"):
            raise ConfigError(f"expert kind is {self.kind!r}; allowed are swiglu and gelu")
        if self.hidden < 1:
            raise ConfigError(f"expert hidden width is {self.hidden}; it must be at least 1")
        if self.columns is not None and not 0 <= self.columns[0] < self.columns[1]:
            raise ConfigError(f"expert columns are {self.columns}; the first must be below the end, neither below 0")


class Expert(nn.Module):
    """(M, D) → (M, D)."""

    def __init__(self, width: int, spec: ExpertSpec) -> None:
        super().__init__()
        start, stop = spec.columns or (0, width)
        if stop > width:
            raise ConfigError(f"expert columns are {spec.columns}; the layer is {width} wide")
        self.spec = spec
        factor = 2 if spec.kind == "swiglu" else 1
        self.w_in_DF = nn.Parameter(torch.randn(stop - start, factor * spec.hidden) / math.sqrt(stop - start))
        self.w_out_HD = nn.Parameter(torch.randn(spec.hidden, width) / math.sqrt(spec.hidden))

    def forward(self, x_MD: Tensor) -> Tensor:
        """Run rows, on the device that the weights are on; the result is there too."""
        device = self.w_in_DF.device
        if x_MD.device != device:
            x_MD = x_MD.to(device, non_blocking=True)
        if self.spec.columns is not None:
            x_MD = x_MD[:, self.spec.columns[0] : self.spec.columns[1]]
        inner_MF = x_MD @ self.w_in_DF
        if self.spec.kind == "gelu":
            return gelu(inner_MF) @ self.w_out_HD
        gate_MH, up_MH = inner_MF.chunk(2, dim=-1)
        return (silu(gate_MH) * up_MH) @ self.w_out_HD


def alike(experts: Sequence[Expert]) -> bool:
    """Whether all are SwiGLU of one size, over all columns, on one device."""
    first = experts[0]
    same, device = ExpertSpec(hidden=first.spec.hidden), first.w_in_DF.device
    return all(e.spec == same and e.w_in_DF.device == device for e in experts)


class ExpertPool(nn.Module):
    """Runs every chosen (row, expert) pair; nothing is dropped. The last `num_always` experts run for every row.

    Where all are SwiGLU of one size on one device, their weights are views of one block, so one product over the block
    serves them all and still every expert is a module of its own.
    """

    def __init__(self, width: int, specs: Sequence[ExpertSpec], num_always: int = 0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width, spec) for spec in specs)
        self.num_always = num_always
        self._block: tuple[Tensor, Tensor] | None = None
        self._uniform: bool | None = None

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, index: int) -> Expert:
        expert = self.experts[index]
        assert isinstance(expert, Expert)
        return expert

    def __iter__(self) -> Iterator[Expert]:
        return (self[e] for e in range(len(self)))

    @property
    def uniform(self) -> bool:
        """Whether one product over a block of weights can run them all."""
        if self._uniform is None:
            self._uniform = alike(list(self))
        return self._uniform

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Σ_k gate_k · expert_k(x), each row's own experts, + Σ those that always run."""
        if self._in_one(x_ND):
            w_in_EDF, w_out_EHD = self.block()
            return expert_swiglu(
                x_ND, w_in_EDF, w_out_EHD, routing.expert_NK, routing.gate_NK,
                num_always=self.num_always, partial=routing.partial,
            )  # fmt: skip
        return self.always(x_ND) + self._each(x_ND, routing)

    def always(self, x_ND: Tensor) -> Tensor:
        """The part of the experts that every row has."""
        total = x_ND.new_zeros(())
        for e in range(len(self) - self.num_always, len(self)):
            total = total + self[e](x_ND).to(x_ND.device)
        return total

    def compilable(self) -> bool:
        """Whether the compiled CPU form takes these experts."""
        return self.uniform and compilable(self[0].w_out_HD)

    def _in_one(self, x_ND: Tensor) -> bool:
        if x_ND.is_cuda:
            return self.uniform and x_ND.device == self[0].w_out_HD.device
        return fits_compiled(x_ND) and self.compilable()

    def _each(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Pairs sorted by expert, so that an expert is one product over its rows, wherever it is."""
        num_slots = routing.expert_NK.shape[1]
        expert_P = routing.expert_NK.reshape(-1)
        order_P = torch.argsort(expert_P, stable=True)
        none, *sizes = torch.bincount(expert_P + 1, minlength=len(self) + 1).tolist()
        order_P = order_P[none:]
        row_P = torch.div(order_P, num_slots, rounding_mode="floor")
        chunks = torch.split(x_ND.index_select(0, row_P), sizes)
        outputs = [self[e](chunk).to(x_ND.device) for e, chunk in enumerate(chunks) if sizes[e]]
        if not outputs:
            return torch.zeros_like(x_ND)
        output_PD = torch.cat(outputs)
        gate_P1 = routing.gate_NK.reshape(-1, 1).index_select(0, order_P).to(output_PD.dtype)
        return torch.zeros_like(x_ND, dtype=output_PD.dtype).index_add(0, row_P, output_PD * gate_P1)

    def block(self) -> tuple[Tensor, Tensor]:
        """All weights as (E, D, F) and (E, H, D), with gradients to every expert's own where there are any.

        Weights that are exchanged rather than changed (`p.data = …`) need `forget_block` after it.
        """
        if self._block is not None and not torch.is_grad_enabled():
            return self._block
        ins: list[Tensor] = [e.w_in_DF for e in self]
        outs: list[Tensor] = [e.w_out_HD for e in self]
        if torch.is_grad_enabled() and any(w.requires_grad for w in (*ins, *outs)):
            return torch.stack(ins), torch.stack(outs)
        with _BUILDING:  # serving threads share a model: one block, published when it is whole
            if self._block is None:
                # Weights made in inference mode could not be trained any more.
                with torch.inference_mode(False), torch.no_grad():
                    block = torch.stack(ins), torch.stack(outs)
                    for e, expert in enumerate(self):
                        # A change of an expert's weights in place is a change of the block, and the other way round.
                        expert.w_in_DF.data, expert.w_out_HD.data = block[0][e], block[1][e]
                self._block = block
            return self._block

    def failing(self, x_ND: Tensor, routing: Routing) -> dict[int, str]:
        """Which chosen experts fail on the rows that chose them, and how; rows that are not finite prove nothing."""
        reasons: dict[int, str] = {}
        for e in sorted(set(routing.expert_NK.reshape(-1).tolist()) - {-1}):
            rows_MD = x_ND[(routing.expert_NK == e).any(dim=1)]
            rows_MD = rows_MD[rows_MD.isfinite().all(dim=1)]
            try:
                if not self[e](rows_MD).isfinite().all():
                    reasons[e] = "output is not finite"
            except Exception as error:  # noqa: BLE001 - whatever an expert dies of, the others go on
                reasons[e] = f"{type(error).__name__}: {error}"
        return reasons

    def rearrange(self, experts: Sequence[Expert]) -> None:
        """Take these experts instead, those that always run included."""
        self.experts = nn.ModuleList(experts)
        self.forget_block()

    def forget_block(self) -> None:
        """Weights have moved: what was known of them as a block holds no more."""
        self._block = self._uniform = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget_block()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": None, "_uniform": None}  # a copy's experts have weights of their own
