"""Which experts see an input: scores say how well an expert fits, a balance says how busy it is, the router chooses.

    scores   softmax of a linear map · its sigmoids · similarity to the centroid of what an expert has served ·
             groups first, experts in the best groups then · ReLU of a linear map (as many experts as stay positive)
    choice   the K largest of affinity + steering, among the experts that are allowed
    gates    scores of the chosen, without the steering, normalised to sum to one (ReLU: as they are)

Everything here is float32 whatever the rest computes in: a rounding of the logits flips choices (Fedus et al., 'Switch
Transformers', arXiv:2101.03961, section 2.4). State (biases, load history, centroids) is buffers, changes only in
`after_step`, and from sums over all ranks, so it is the same on each and part of every checkpoint. Ranks run their
routers alike in training: each batch's load is summed over them.

Not covered: expert-choice routing, where experts choose rows; it looks at rows that come later.
"""

# N rows, D model width, E experts, K chosen, G groups of experts

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, pad

from assay_platform.errors import ConfigError
from assay_platform.moe.balance import (
    AuxiliaryLoss,
    Balance,
    LoadFactor,
    LoadForecast,
    NoBalance,
    SelectionBias,
    SparsityControl,
)

# A new expert is chosen by nobody before the first step, then its affinity is lowered by this much at first and by
# nothing after so many steps.
_NEWCOMER_HANDICAP, _NEWCOMER_STEPS = 4.0, 200


class Routing(NamedTuple):
    """The choice for one batch."""

    expert_NK: Tensor  # int64, which experts; -1 where a row has fewer than K, which only `partial` choices have
    gate_NK: Tensor  # float32, their weights; 0 where there is no expert
    probability_NE: Tensor  # float32, all scores normalised, for instruments; (N, 0) from the compiled form in serving
    partial: bool = False


class Scores(nn.Module):
    """(N, D) float32 → affinity (N, E), which is chosen by, and score (N, E) ≥ 0, which gates are made of.

    Tensors named in `per_expert` have E as their first dimension.
    """

    per_expert: tuple[str, ...] = ("weight_ED",)
    normalised = True  # gates are
    distribution = True  # scores of a row add up to one
    linear: str | None = "softmax"  # of a linear map, where scores are no more than that
    complete = True  # whether every row has K experts with a finite affinity

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight_ED = nn.Parameter(torch.randn(num_experts, width) * 0.02)

    def num_slots(self, num_experts: int) -> int:
        """The most experts that a row may have."""
        return min(self.top_k, num_experts)

    def forward(self, x_ND: Tensor, present_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax of a linear map. present_E: how much every expert is there, 0 to 1; None where all are."""
        logits_NE = linear(x_ND, self.weight_ED.float())
        return logits_NE, torch.softmax(logits_NE, dim=-1)

    def saw(self, x_ND: Tensor, expert_NK: Tensor) -> None:
        """Take note of a training batch."""

    def settle(self, reduce: Callable[[Tensor], None]) -> None:
        """Settle what was noted since the last optimizer step. reduce: in-place sum over ranks."""


SoftmaxScores = Scores


class SigmoidScores(Scores):
    """Experts do not compete for one unit of probability (DeepSeek-V3, arXiv:2412.19437, equation 15)."""

    distribution = False
    linear = "sigmoid"

    def forward(self, x_ND: Tensor, present_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sigmoids of a linear map."""
        score_NE = torch.sigmoid(linear(x_ND, self.weight_ED.float()))
        return score_NE, score_NE


class CentroidScores(Scores):
    """Cosine similarity to the running mean of the inputs that had the expert as their first choice.

    Nothing is learned by gradient: centroids follow the data as in k-means, at `rate` a step.
    """

    per_expert = ("centroid_ED", "_sum_ED")
    linear = None
    centroid_ED: Tensor
    _sum_ED: Tensor

    def __init__(self, width: int, num_experts: int, top_k: int, temperature: float = 0.1, rate: float = 0.02) -> None:
        super().__init__(width, num_experts, top_k)
        del self.weight_ED
        self.temperature, self.rate = temperature, rate
        self.register_buffer("centroid_ED", normalize(torch.randn(num_experts, width), dim=-1))
        self.register_buffer("_sum_ED", torch.zeros(num_experts, width), persistent=False)

    def forward(self, x_ND: Tensor, present_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax of similarity / temperature."""
        similarity_NE = linear(normalize(x_ND, dim=-1), normalize(self.centroid_ED, dim=-1))
        return similarity_NE, torch.softmax(similarity_NE / self.temperature, dim=-1)

    def saw(self, x_ND: Tensor, expert_NK: Tensor) -> None:
        """Sum directions by first choice."""
        here = expert_NK[:, 0] >= 0
        self._sum_ED.index_add_(0, expert_NK[here, 0], normalize(x_ND[here], dim=-1))

    def settle(self, reduce: Callable[[Tensor], None]) -> None:
        """Move centroids toward the mean direction of what they served."""
        reduce(self._sum_ED)
        served_E1 = self._sum_ED.abs().sum(dim=1, keepdim=True) > 0
        moved_ED = self.centroid_ED.lerp(normalize(self._sum_ED, dim=-1), self.rate)
        self.centroid_ED.copy_(torch.where(served_E1, normalize(moved_ED, dim=-1), self.centroid_ED))
        self._sum_ED.zero_()


class TwoStageScores(Scores):
    """Groups of experts by a coarse map, then experts by a fine map within the better half of the groups.

    p(expert) = p(group) · p(expert | group).
    """

    per_expert = ("weight_ED", "group_E")
    linear = None
    complete = False
    group_E: Tensor

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__(width, num_experts, top_k)
        num_groups = max(1, round(math.sqrt(num_experts)))
        self.weight_GD = nn.Parameter(torch.randn(num_groups, width) * 0.02)
        self.register_buffer("group_E", torch.arange(num_experts) * num_groups // num_experts)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        groups = state.get(prefix + "weight_GD")
        if groups is not None and groups.shape != self.weight_GD.shape:  # of a layer that was made with more or fewer
            self.weight_GD = nn.Parameter(torch.empty_like(groups, device=self.weight_GD.device))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x_ND: Tensor, present_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities, -inf outside of the chosen groups."""
        logits_NG, logits_NE = linear(x_ND, self.weight_GD.float()), linear(x_ND, self.weight_ED.float())
        num_groups = logits_NG.shape[1]
        member_EG = self.group_E.unsqueeze(1) == torch.arange(num_groups, device=x_ND.device)
        # A newcomer takes its part of what its group has as it comes in, and nothing before.
        counted_NE = logits_NE if present_E is None else logits_NE + present_E.log()
        within_NEG = torch.where(member_EG, counted_NE.unsqueeze(-1), -torch.inf)
        # A group may have lost all of its experts; its normaliser is never looked up.
        fine_NE = logits_NE - torch.logsumexp(within_NEG, dim=1)[:, self.group_E]
        coarse_NG = torch.where(member_EG.any(dim=0), logits_NG, -torch.inf)
        probability_NE = (torch.log_softmax(coarse_NG, dim=-1)[:, self.group_E] + fine_NE).exp()
        smallest = max(1, len(self.group_E) // num_groups)
        num_best = min(num_groups, max((num_groups + 1) // 2, -(-self.top_k // smallest)))
        best_NG = torch.zeros_like(coarse_NG, dtype=torch.bool)
        best_NG.scatter_(1, coarse_NG.topk(num_best, dim=-1).indices, True)
        affinity_NE = torch.where(best_NG[:, self.group_E], probability_NE.clamp_min(1e-30).log(), -torch.inf)
        return affinity_NE, probability_NE


class ReLUScores(Scores):
    """As many experts as have a positive score, at most four times K (Wang et al., ReMoE, arXiv:2412.14711).

    With a threshold for every expert: without one, half of all centred inputs stay on the positive side whatever the
    weights are.
    """

    per_expert = ("weight_ED", "bias_E")
    linear = None
    normalised = distribution = complete = False

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__(width, num_experts, top_k)
        self.bias_E = nn.Parameter(torch.zeros(num_experts))

    def num_slots(self, num_experts: int) -> int:
        """Four times K."""
        return min(4 * self.top_k, num_experts)

    def forward(self, x_ND: Tensor, present_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ReLU of a linear map; -inf where it is closed."""
        score_NE = torch.relu(linear(x_ND, self.weight_ED.float(), self.bias_E.float()))
        if present_E is not None:
            score_NE = score_NE * present_E
        return torch.where(score_NE > 0, score_NE, -torch.inf), score_NE


# The name in a config → how to score, how to balance.
ROUTERS: dict[str, tuple[Callable[[int, int, int], Scores], Callable[[int, int], Balance]]] = {
    "unbalanced": (SoftmaxScores, lambda num_experts, top_k: NoBalance()),
    "softmax": (SoftmaxScores, AuxiliaryLoss),
    "sigmoid-bias": (SigmoidScores, SelectionBias),
    "load-factor": (SoftmaxScores, LoadFactor),
    "load-aware": (SoftmaxScores, LoadForecast),
    # Centroids move with what they serve, so the bias has to be faster than they are.
    "centroid": (CentroidScores, lambda num_experts, top_k: SelectionBias(num_experts, top_k, rate=0.01)),
    "two-stage": (TwoStageScores, AuxiliaryLoss),
    "relu": (ReLUScores, SparsityControl),
}


class Router(nn.Module):
    """Chooses experts for every row and keeps them evenly busy."""

    newcomer_E: Tensor  # 1 for a new expert, 0 for one that competes as all others, infinite for one that is closed
    _seen_E1: Tensor  # choices of every expert, then the number of rows, since the last step

    def __init__(self, name: str, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if name not in ROUTERS:
            raise ConfigError(f"router is {name!r}; allowed are {', '.join(ROUTERS)}")
        make_scores, make_balance = ROUTERS[name]
        self.top_k = top_k
        self.scores = make_scores(width, num_experts, top_k)
        self.balance = make_balance(num_experts, top_k)
        self.register_buffer("newcomer_E", torch.zeros(num_experts))
        self._newcomers: bool | None = None
        self._num_chosen_from = num_experts
        self.register_buffer("_seen_E1", torch.zeros(num_experts + 1), persistent=False)

    @property
    def num_experts(self) -> int:
        """How many there are to choose from."""
        return len(self.newcomer_E)

    def forward(self, x_ND: Tensor, allowed_E: Tensor | None = None) -> tuple[Routing, Tensor]:
        """The choice, and the scalar to add to the task's loss. allowed_E: bool, experts that may be chosen."""
        if torch.is_autocast_enabled(x_ND.device.type):
            with torch.autocast(x_ND.device.type, enabled=False):
                return self.forward(x_ND, allowed_E)
        x_ND = x_ND.float()
        affinity_NE, score_NE = self.scores(x_ND, self._present())
        routing = self._choose(affinity_NE.detach(), score_NE, allowed_E)
        if not self.training:
            return routing, score_NE.new_zeros(())
        # Of all ranks: a balance loss that is a product of load and probability is not the sum of its ranks' own.
        seen_E1 = pad(count_choices(routing.expert_NK, self.num_experts), (0, 1), value=float(len(x_ND)))
        _sum_over_ranks(seen_E1)
        choices_E = seen_E1[:-1]
        load_E, probability_NE = choices_E / choices_E.sum().clamp_min(1.0), routing.probability_NE
        if self.has_newcomers():  # they take no part: a loss would push rows toward who cannot be chosen yet
            settled = (self.newcomer_E == 0.0).nonzero().squeeze(1)
            load_E, score_NE = load_E[settled], score_NE[:, settled]
            probability_NE = probability_NE[:, settled]
            probability_NE = probability_NE / probability_NE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        loss = self.balance.loss(load_E, probability_NE, score_NE)
        self._seen_E1 += seen_E1
        self.scores.saw(x_ND.detach(), routing.expert_NK)
        return routing, loss

    def _choose(self, affinity_NE: Tensor, score_NE: Tensor, allowed_E: Tensor | None) -> Routing:
        steer_E = self.steering()
        if steer_E is not None:
            affinity_NE = affinity_NE + steer_E
        if allowed_E is not None:
            affinity_NE = torch.where(allowed_E, affinity_NE, -torch.inf)
        num_slots = self.scores.num_slots(self.num_experts)
        top_NK, expert_NK = affinity_NE.topk(num_slots, dim=-1)
        gate_NK = score_NE.gather(1, expert_NK)
        too_few = self.has_newcomers() and self._num_chosen_from < num_slots
        partial = allowed_E is not None or not self.scores.complete or too_few
        if partial:
            taken_NK = top_NK > -torch.inf
            expert_NK, gate_NK = torch.where(taken_NK, expert_NK, -1), torch.where(taken_NK, gate_NK, 0.0)
        if self.scores.normalised:
            gate_NK = gate_NK / gate_NK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        if not self.scores.distribution:
            score_NE = score_NE / score_NE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return Routing(expert_NK, gate_NK, score_NE, partial)

    def steering(self) -> Tensor | None:
        """(E,) added to affinities for choosing: the balance's, and the handicap of new experts."""
        steer_E = self.balance.steer()
        if self.has_newcomers():
            handicap_E = torch.where(self.newcomer_E < 1.0, -_NEWCOMER_HANDICAP * self.newcomer_E, -torch.inf)
            return handicap_E if steer_E is None else steer_E + handicap_E
        return steer_E

    def has_newcomers(self) -> bool:
        """Whether some experts are new or closed."""
        # Asked of the device once after every change: a small batch is over sooner than the question is answered.
        if self._newcomers is None:
            self._num_chosen_from = int((self.newcomer_E < 1.0).sum())
            self._newcomers = bool(self.newcomer_E.any())
        return self._newcomers

    def _present(self) -> Tensor | None:
        return (1.0 - self.newcomer_E).clamp_min(0.0) if self.has_newcomers() else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._newcomers = None
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def after_step(self) -> None:
        """Once after every optimizer step, on all ranks alike: learn from the load of what was trained on."""
        choices_E, num_rows = self._seen_E1[:-1], self._seen_E1[-1]
        self.scores.settle(_sum_over_ranks)
        if choices_E.any():
            load_E = choices_E / choices_E.sum()
            settled_E = self.newcomer_E == 0.0
            # A new or closed expert counts as one with an even share: that nobody chooses it is no reason to push it.
            if settled_E.any():
                load_E = torch.where(settled_E, load_E, load_E[settled_E].mean())
            self.balance.observe(load_E / load_E.sum(), choices_E.sum() / num_rows)
            if self.has_newcomers():
                self.newcomer_E.sub_(1.0 / _NEWCOMER_STEPS).clamp_min_(0.0)
                self._newcomers = None
        self._seen_E1.zero_()

    def choices(self) -> Tensor:
        """(E,) how often every expert was chosen in training since the last step, on all ranks."""
        return self._seen_E1[:-1]

    @torch.no_grad()
    def close(self, experts: Sequence[int]) -> None:
        """Nobody chooses these until `open`; those that were closed before and are not named come back."""
        self.newcomer_E.masked_fill_(self.newcomer_E.isinf(), 0.0)
        for expert in experts:
            self.newcomer_E[expert] = torch.inf
        self._newcomers = None

    @torch.no_grad()
    def open(self) -> None:
        """Closed experts become new ones."""
        self.newcomer_E.clamp_max_(1.0)
        self._newcomers = None

    @torch.no_grad()
    def rearrange(self, experts: Sequence[int], *, newcomers: Sequence[int] = ()) -> None:
        """Experts become these old ones, in this order; one may come twice. newcomers: places that start unchosen.

        A newcomer's scores are its model's with a little noise, so that the two part ways.
        """
        index = torch.tensor(list(experts), device=self.newcomer_E.device)
        noise = torch.Generator().manual_seed(len(experts))  # the same on every rank
        for module, names in (
            (self.scores, self.scores.per_expert),
            (self.balance, self.balance.per_expert),
            (self, ("newcomer_E",)),
        ):
            for name in names:
                old = getattr(module, name)
                new = old.detach().index_select(0, index.to(old.device))
                if new.is_floating_point() and module is self.scores:
                    for place in newcomers:
                        drawn = torch.randn(new[place].shape, generator=noise).to(new)
                        new[place] += drawn * 0.1 * new.std()
                setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        self._seen_E1 = self.newcomer_E.new_zeros(len(index) + 1)
        for place in newcomers:
            self.newcomer_E[place] = 1.0
        self._newcomers = None


def count_choices(expert_NK: Tensor, num_experts: int) -> Tensor:
    """(E,) float32 how often every expert was chosen; without a look from the host."""
    flat = expert_NK.reshape(-1) + 1
    counts = torch.zeros(num_experts + 1, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones((), device=flat.device).expand(flat.shape))[1:]


def _sum_over_ranks(tensor: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
