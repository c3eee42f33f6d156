"""One sparse layer: shared experts + routed experts, and all that one may do to its experts.

y = Σ shared(x) + Σ_{e chosen} gate_e(x) · expert_e(x). A shared expert learns what all inputs have in common, so that
routed ones can differ (Dai et al., 'DeepSeekMoE', arXiv:2401.06066, section 3.2).

After `add`, `remove` and `replace` the layer has other parameters than before: make a new optimizer. A checkpoint says
which experts it holds, and a layer takes that shape when the checkpoint is loaded.
"""

# N rows, D model width, E experts, K chosen

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from assay_platform.errors import ConfigError, InputError, WorkError
from assay_platform.kernels.experts import fits_compiled_layer
from assay_platform.moe.capacity import CapacityConfig, ElasticCapacity
from assay_platform.moe.experts import Expert, ExpertPool, ExpertSpec, alike
from assay_platform.moe.fences import Fences
from assay_platform.moe.router import Router, Routing

if TYPE_CHECKING:
    from assay_platform.kernels.experts_numba import CompiledLayer

_PROBE_ROWS = 16
_NOTHING = torch.zeros(())


class LayerOutput(NamedTuple):
    """What one layer says besides its result."""

    y_ND: Tensor
    balance_loss: Tensor  # scalar, to be added to the task's loss as it is
    routing: Routing
    overflow: float  # fraction of choices that found no place; 0 unless capacity is bounded


class MoELayer(nn.Module):
    """(N, D) → (N, D); no row is dropped unless capacity is bounded."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        router: str = "softmax",
        num_shared: int = 1,
        capacity: CapacityConfig | None = None,
        experts: Iterable[ExpertSpec] | None = None,
        name: str = "moe",
    ) -> None:
        """experts: what each is, for layers whose experts differ; by default `num_experts` SwiGLU of size `hidden`."""
        super().__init__()
        specs = tuple(experts or (ExpertSpec(hidden=hidden),) * num_experts)
        self.width = width
        self.router = Router(router, width, len(specs), top_k)
        self.pool = ExpertPool(width, (*specs, *(ExpertSpec(hidden=hidden),) * num_shared), num_always=num_shared)
        self.capacity = None if capacity is None else ElasticCapacity(capacity)
        self._check_capacity(list(self.pool))
        self.fences: Fences | None = None
        self._compiled: CompiledLayer | Literal[False] | None = None  # False: not of the kind
        self._weights: tuple[nn.Parameter, ...] = ()  # as long as there is a compiled form
        self._name = name
        self.register_load_state_dict_pre_hook(MoELayer._take_shape)  # type: ignore[no-untyped-call]

    @property
    def num_experts(self) -> int:
        """Routed ones; they are the first of the pool, the shared ones come after them."""
        return len(self.pool) - self.pool.num_always

    def forward(self, x_ND: Tensor) -> LayerOutput:
        """Run a batch."""
        return self._run(x_ND) if self.fences is None or self.training else self._run_guarded(x_ND, self.fences)

    def _run(self, x_ND: Tensor, allowed_E: Tensor | None = None) -> LayerOutput:
        if allowed_E is None and not self.training and self.capacity is None:
            compiled = self._compiled
            # Looking for a layer's weights takes longer than a row does.
            weights = self._weights if compiled is not None else tuple(self.parameters())
            if fits_compiled_layer(x_ND, weights):
                if compiled is None:
                    compiled, self._weights = self._compile(), weights
                    self._compiled = compiled
                if compiled:
                    y_ND, expert_NK, gate_NK = compiled(x_ND)
                    return LayerOutput(y_ND, _NOTHING, Routing(expert_NK, gate_NK, _NOTHING.expand(len(x_ND), 0)), 0.0)
        routing, loss = self.router(x_ND, allowed_E)
        if self.capacity is None:
            return LayerOutput(self.pool(x_ND, routing), loss, routing, 0.0)
        routed_ND = self.capacity.run(x_ND, routing, self.pool.block, self.num_experts)
        return LayerOutput(self.pool.always(x_ND) + routed_ND, loss, routing, 1.0 - self.capacity.last.served)

    def _compile(self) -> "CompiledLayer | Literal[False]":
        """Router and experts as one call for small batches on a CPU, if they are of the kind that it takes."""
        scores = self.router.scores
        if scores.linear is None or self.router.has_newcomers() or not self.pool.compilable():
            return False
        from assay_platform.kernels.experts_numba import CompiledLayer

        return CompiledLayer(
            scores.weight_ED, self.router.steering(), *self.pool.block(), sigmoid=scores.linear == "sigmoid",
            top_k=scores.num_slots(self.num_experts), num_always=self.pool.num_always,
        )  # fmt: skip

    def train(self, mode: bool = True) -> "MoELayer":
        """Training changes what serving has prepared."""
        self._compiled = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._compiled = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_weights": ()}  # it looks at the weights of this one

    # -------------------------------------------------------------------------------------------- failing experts

    def guard(self, **options: Any) -> Fences:
        """From now on, outside of training: fence off a routed expert that fails, others get its rows. See `Fences`.

        An expert fails that raises, or gives numbers that are not finite for rows that are. A shared expert has no
        substitute: where one fails, the call does. Without options fences that are there stay.
        """
        if self.fences is None or options:
            self.fences = Fences(self._name, **options)
        return self.fences

    def _run_guarded(self, x_ND: Tensor, fences: Fences) -> LayerOutput:
        for _ in range(self.num_experts + 1):
            allowed_E = fences.allowed(self.num_experts, x_ND.device)
            failure: Exception | None = None
            try:
                out = self._run(x_ND, allowed_E)
                if bool(out.y_ND.isfinite().all()):
                    fences.settle(out.routing.expert_NK)
                    return out
            except Exception as error:  # noqa: BLE001 - an expert may die of anything; who it was is found below
                failure = error
            routing, _ = self.router(x_ND, allowed_E)
            failing = self.pool.failing(x_ND, routing)
            for expert, reason in failing.items():
                fences.close(expert, reason)
            if failure is not None and not failing:
                raise failure
            if not failing:  # no routed expert is to blame
                finite_MD = x_ND[x_ND.isfinite().all(dim=1)]
                if not bool(self.pool.always(finite_MD).isfinite().all()):
                    raise WorkError(f"{self._name}: a shared expert gives numbers that are not finite")
                return out
        raise WorkError(f"{self._name}: experts fail faster than they can be fenced off")

    @torch.no_grad()
    def restore(self, expert: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Let a fenced expert serve again, with these weights if given (its `state_dict`).

        Raises:
            InputError: it still fails on a probe of random rows; it stays fenced.
        """
        part = self.pool[self._checked(expert)]
        if weights is not None:
            part.load_state_dict(dict(weights))
        probe = torch.randn(_PROBE_ROWS, self.width, generator=torch.Generator().manual_seed(0))
        try:
            well = bool(part(probe).isfinite().all())
        except Exception as error:
            raise InputError(f"{self._name}: expert {expert} still fails: {error}") from error
        if not well:
            raise InputError(f"{self._name}: expert {expert} still gives numbers that are not finite")
        if self.fences is not None:
            self.fences.open(expert)

    # -------------------------------------------------------------------------------------------- changing experts

    def add(self, *, like: int, spec: ExpertSpec | None = None) -> int:
        """One more expert; returns its number. The layer's function is the same until the next optimizer step.

        It starts as a copy of expert `like`, scores included, or fresh if `spec` is given, and is chosen by nobody at
        first; over the next 200 steps it comes to compete as all others do.
        """
        source = self.pool[self._checked(like)]
        fresh = deepcopy(source) if spec is None else Expert(self.width, spec).to(source.w_in_DF.device)
        new = self.num_experts
        self._rearrange([*range(new), like], {new: fresh})
        return new

    def remove(self, expert: int) -> None:
        """One expert less; those after it move up by one."""
        self._checked(expert)
        if self.num_experts == 1:
            raise ConfigError("the last expert cannot be removed")
        self._rearrange([e for e in range(self.num_experts) if e != expert], {})

    def replace(self, expert: int, new: Expert) -> None:
        """Another expert in the same place, chosen for the same rows."""
        self._checked(expert)
        self._set_experts(
            [new if e == expert else old for e, old in enumerate(self.pool)], list(range(self.num_experts))
        )
        if self.fences is not None:
            self.fences.open(expert)

    def freeze(self, experts: Iterable[int]) -> None:
        """These learn no more."""
        for expert in experts:
            self.pool[self._checked(expert)].requires_grad_(False)

    def train_only(self, experts: Iterable[int]) -> None:
        """Of this layer these experts learn, and nothing else, the router included."""
        chosen = [self._checked(expert) for expert in experts]
        self.requires_grad_(False)
        for expert in chosen:
            self.pool[expert].requires_grad_(True)

    def isolate(self, selected: Iterable[int]) -> None:
        """Pre-training: only these experts are chosen and learn. Make the optimizer after this: no other gets state.

        The rest keeps its weights until `open_all`. With all experts selected nothing changes.
        """
        kept = {self._checked(expert) for expert in selected}
        closed = [expert for expert in range(self.num_experts) if expert not in kept]
        if len(kept) < self.router.top_k:
            raise InputError(f"{self._name}: {len(kept)} experts are selected; a row needs {self.router.top_k}")
        for expert in kept:
            self.pool[expert].requires_grad_(True)
        self.freeze(closed)
        self.router.close(closed)
        self._compiled = None

    def open_all(self) -> None:
        """Fine-tuning: every expert learns, those that were closed come in as new ones do; make a new optimizer."""
        for expert in self.pool:
            expert.requires_grad_(True)
        self.router.open()
        self._compiled = None

    @torch.no_grad()
    def drop_unchosen_gradients(self) -> None:
        """Before an optimizer step: experts that no row chose since the last one get none instead of zeros."""
        for expert, count in enumerate(self.router.choices().tolist()):
            if not count:
                for parameter in self.pool[expert].parameters():
                    parameter.grad = None

    def place(self, expert: int, device: torch.device | str) -> None:
        """Keep an expert on a device; rows go there and results come back."""
        if self.capacity is not None:
            raise ConfigError("bounded capacity keeps all experts on one device; leave capacity out to place them")
        self.pool[self._checked(expert)].to(device)
        self.pool.forget_block()
        self._compiled = None

    def _checked(self, expert: int) -> int:
        if not 0 <= expert < self.num_experts:
            raise InputError(f"{self._name}: there is no expert {expert}; allowed are 0 to {self.num_experts - 1}")
        return expert

    def _rearrange(self, old: list[int], fresh: dict[int, Expert]) -> None:
        routed = [fresh[place] if place in fresh else self.pool[e] for place, e in enumerate(old)]
        self._set_experts([*routed, *list(self.pool)[len(self.pool) - self.pool.num_always :]], old)
        self.router.rearrange(old, newcomers=list(fresh))

    def _set_experts(self, experts: list[Expert], old: list[int]) -> None:
        self._check_capacity(experts)
        self.pool.rearrange(experts)
        self._compiled = None
        if self.fences is not None:
            self.fences.rearrange(old)

    def _check_capacity(self, experts: list[Expert]) -> None:
        if self.capacity is not None and not alike(experts):
            raise ConfigError("bounded capacity needs SwiGLU experts of one size on one device; leave capacity out")

    # -------------------------------------------------------------------------------------------- checkpoints

    def get_extra_state(self) -> Tensor:
        """What every expert is, as the bytes of a JSON list, so that it fits into a file of tensors."""
        text = json.dumps([asdict(expert.spec) for expert in self.pool])
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Done before, in `_take_shape`: the parts have to exist when their weights arrive."""

    @staticmethod
    def _take_shape(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        assert isinstance(module, MoELayer)
        module._compiled = None
        module.pool.forget_block()  # weights may be exchanged
        described = state.get(prefix + "_extra_state")
        if described is None:
            return
        specs = []
        for spec in json.loads(bytes(described.tolist()).decode()):
            columns = spec["columns"]
            specs.append(ExpertSpec(**{**spec, "columns": None if columns is None else tuple(columns)}))
        if specs == [expert.spec for expert in module.pool]:
            return
        device = module.pool[0].w_in_DF.device
        module.router.rearrange([0] * (len(specs) - module.pool.num_always))
        if module.fences is not None:
            module.fences.rearrange([])
        module.pool.rearrange([Expert(module.width, spec).to(device) for spec in specs])
