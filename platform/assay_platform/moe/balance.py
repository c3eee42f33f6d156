"""What keeps experts evenly busy: five ways that a router can be given, and how uneven a load is.

A balance does one or both of two things: `steer` the choice (a number per expert added to its affinity, for choosing
only, never for the gates), and add a `loss`. It learns from the load of a step in `observe`, which is called once
after every optimizer step with the load of all ranks, so that its state is the same on each. Its state is buffers and
so part of every checkpoint.

    NoBalance         nothing: the baseline
    AuxiliaryLoss     E · Σ_e f_e · p_e                       Fedus et al., arXiv:2101.03961, equation 4
    SelectionBias     b_e += rate · sign(mean load - load_e)   Wang et al., arXiv:2408.15664, algorithm 1
    LoadFactor        b_e = -strength · (λ_e - 1), λ = load / mean load, smoothed over steps
    LoadForecast      the same with the λ that a recurrent net expects of the next step
    SparsityControl   for ReLU gates: an L1 loss weighted by load, its weight steered to k experts a row
                      (Wang et al., ReMoE, arXiv:2412.14711, equations 7 to 9)
"""

# N rows, E experts, K chosen, W steps of history, S state width of the forecast

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn


class Balance(nn.Module):
    """The contract. Tensors named in `per_expert` have E as their first dimension and follow when experts change."""

    per_expert: tuple[str, ...] = ()

    def steer(self) -> Tensor | None:
        """(E,) added to affinities for choosing; None for nothing."""
        return None

    def loss(self, load_E: Tensor, probability_NE: Tensor, score_NE: Tensor) -> Tensor:
        """Scalar, added to the task's loss as it is.

        load_E: fraction of choices. probability_NE: normalised scores. score_NE: raw scores.
        """
        return probability_NE.new_zeros(())

    @abstractmethod
    def observe(self, load_E: Tensor, choices_a_row: Tensor) -> None:
        """Learn from a step: the fraction of choices that experts got, and how many choices a row had on average."""


class NoBalance(Balance):
    """Experts that win early win more."""

    def observe(self, load_E: Tensor, choices_a_row: Tensor) -> None:
        """Nothing to learn."""


class AuxiliaryLoss(Balance):
    """Gradient through the mean probability alone; `weight` when balanced, up to E · `weight` when collapsed."""

    def __init__(self, num_experts: int, top_k: int, weight: float = 0.01) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, load_E: Tensor, probability_NE: Tensor, score_NE: Tensor) -> Tensor:
        """Switch Transformers' loss."""
        return self.weight * len(load_E) * (load_E * probability_NE.mean(dim=0)).sum()

    def observe(self, load_E: Tensor, choices_a_row: Tensor) -> None:
        """Nothing to learn."""


class SelectionBias(Balance):
    """Loss-free: an expert with more than its share gets a little harder to choose, whatever the excess."""

    per_expert = ("bias_E",)
    bias_E: Tensor

    def __init__(self, num_experts: int, top_k: int, rate: float = 0.003) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def steer(self) -> Tensor:
        """The bias."""
        return self.bias_E

    def observe(self, load_E: Tensor, choices_a_row: Tensor) -> None:
        """One step of the bias."""
        self.bias_E += self.rate * torch.sign(load_E.mean() - load_E)


class LoadFactor(Balance):
    """Proportional feedback of λ, a running mean over about 1 / (1 - smoothing) steps."""

    per_expert: tuple[str, ...] = ("factor_E",)
    factor_E: Tensor

    def __init__(self, num_experts: int, top_k: int, strength: float = 2.0, smoothing: float = 0.95) -> None:
        super().__init__()
        self.strength, self.smoothing = strength, smoothing
        self.register_buffer("factor_E", torch.ones(num_experts))

    def steer(self) -> Tensor:
        """Against the excess."""
        return -self.strength * (self.factor_E - 1.0)

    def observe(self, load_E: Tensor, choices_a_row: Tensor) -> None:
        """One step of the running mean."""
        self.factor_E.lerp_(load_E * len(load_E), 1.0 - self.smoothing)


class LoadForecast(LoadFactor):
    """λ of the next step, expected by a GRU that all experts share and that learns beside the model, a step at a time.

    It says how the next load differs from the load now, so it starts as 'same as now'; it steers only while its running
    squared error is below that of 'same as now', and the running mean of `LoadFactor` steers else. Its weights are
    buffers, not parameters: the model's optimizer, weight decay and gradient clipping do not touch them.
    """

    per_expert = ("factor_E", "history_EW", "forecast_E")
    history_EW: Tensor  # λ of the last steps, the newest last
    forecast_E: Tensor
    weights: Tensor  # of the GRU and its read-out, flat
    moments: Tensor  # Adam's two
    errors: Tensor  # running squared error of the forecast and of 'same as now', and how many steps made them

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        strength: float = 2.0,
        smoothing: float = 0.95,
        window: int = 8,
        state_width: int = 8,
    ) -> None:
        super().__init__(num_experts, top_k, strength, smoothing)
        self._sizes = [3 * state_width, 3 * state_width * state_width, 3 * state_width, 3 * state_width, state_width]
        # A generator of its own: the same start on every rank and in every run.
        weights = torch.randn(sum(self._sizes), generator=torch.Generator().manual_seed(0)) / math.sqrt(state_width)
        weights[-state_width:] = 0.0  # the read-out: no difference
        self.register_buffer("weights", weights)
        self.register_buffer("moments", torch.zeros(2, sum(self._sizes)))
        self.register_buffer("errors", torch.zeros(3))
        self.register_buffer("history_EW", torch.ones(num_experts, window))
        self.register_buffer("forecast_E", torch.ones(num_experts))

    @property
    def active(self) -> bool:
        """Whether the forecast has been better than 'same as now' for long enough."""
        return bool(self._active())

    def _active(self) -> Tensor:
        return (self.errors[2] >= 50) & (self.errors[0] < self.errors[1])

    def steer(self) -> Tensor:
        """Against the running mean as it will be after the next step.

        Steering against the forecast itself would make the load swing, the forecast learn the swing, and stay right.
        """
        ahead_E = self.factor_E.lerp(self.forecast_E, 1.0 - self.smoothing)
        return -self.strength * (torch.where(self._active(), ahead_E, self.factor_E) - 1.0)

    def observe(self, load_E: Tensor, choices_a_row: Tensor) -> None:
        """Judge the last forecast, learn from it, make the next."""
        super().observe(load_E, choices_a_row)
        now_E = load_E * len(load_E)
        forecast_error = (self.forecast_E - now_E).square().mean()
        same_error = (self.history_EW[:, -1] - now_E).square().mean()
        self.errors[2] += 1.0
        self.errors[:2].lerp_(torch.stack([forecast_error, same_error]), 1.0 / self.errors[2].clamp_max(50.0))
        with torch.enable_grad():
            weights = self.weights.clone().requires_grad_()
            error = (self._predict(weights) - now_E).square().mean()
            (gradient,) = torch.autograd.grad(error, weights)
        step = self.errors[2]
        self.moments[0].lerp_(gradient, 0.1)
        self.moments[1].lerp_(gradient.square(), 0.01)
        scale = (self.moments[1] / (1 - torch.pow(0.99, step))).sqrt() + 1e-8
        self.weights -= 0.01 * self.moments[0] / (1 - torch.pow(0.9, step)) / scale
        self.history_EW.copy_(torch.cat([self.history_EW[:, 1:], now_E.unsqueeze(1)], dim=1))
        self.forecast_E.copy_(self._predict(self.weights).clamp_min(0.0))

    def _predict(self, weights: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, w_out = torch.split(weights, self._sizes)
        width = len(w_out)
        state_ES = weights.new_zeros(self.history_EW.shape[0], width)
        for step in range(self.history_EW.shape[1]):
            inputs_E1 = self.history_EW[:, step : step + 1] - 1.0
            state_ES = torch.gru_cell(inputs_E1, state_ES, w_ih.view(-1, 1), w_hh.view(-1, width), b_ih, b_hh)
        predicted: Tensor = self.history_EW[:, -1] + state_ES @ w_out
        return predicted


class SparsityControl(Balance):
    """Keeps about K of E ReLU gates open. The L1 weight grows by `factor` a step while more are, else shrinks."""

    weight: Tensor

    def __init__(self, num_experts: int, top_k: int, weight: float = 1e-4, factor: float = 1.05) -> None:
        super().__init__()
        self.top_k, self.factor = top_k, factor
        self.register_buffer("weight", torch.tensor(weight))

    def loss(self, load_E: Tensor, probability_NE: Tensor, score_NE: Tensor) -> Tensor:
        """L1 of the gates, those of busy experts counting more."""
        return self.weight.clone() * len(load_E) * (load_E * score_NE.mean(dim=0)).sum()

    def observe(self, load_E: Tensor, choices_a_row: Tensor) -> None:
        """One step of the weight."""
        self.weight.mul_(torch.where(choices_a_row > self.top_k, self.factor, 1.0 / self.factor)).clamp_(1e-8, 1e2)


def jensen_shannon_imbalance(load_E: Tensor) -> float:
    """Jensen–Shannon divergence (nats, 0 to ln 2) between the load and the uniform distribution."""
    uniform = torch.full_like(load_E, 1.0 / load_E.numel())
    middle = (load_E + uniform) / 2

    def kl(p: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p.clamp_min(1e-30) / middle).log(), 0.0).sum()

    return float((kl(load_E) + kl(uniform)) / 2)


def utilisation(load_E: Tensor) -> float:
    """Effective number of busy experts, the exponential of the load's entropy, as a fraction of all (0 to 1)."""
    entropy = -(load_E * load_E.clamp_min(1e-30).log()).sum()
    return float(entropy.exp() / load_E.numel()) if float(load_E.sum()) > 0 else 0.0
