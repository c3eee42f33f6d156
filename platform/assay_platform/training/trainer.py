"""One loop for every model: AdamW, warm-up then cosine, gradient clipping, early stopping on validation.

The loop knows nothing of the model: it gets batches, a loss and an evaluation as functions. The best weights
by validation are restored at the end. Several processes train one model together where they are given as `Ranks`.
Modules with state that follows training outside of gradients, such as routers, have an `after_step` method, which is
called after every optimizer step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from assay_platform.errors import ConfigError
from assay_platform.training.checkpoint import Checkpoint
from assay_platform.training.memory import keep_freed_memory
from assay_platform.training.offload import OffloadedAdamW
from assay_platform.training.ranks import ALONE, Ranks

Batch = TypeVar("Batch")
UpdateOn = Literal["device", "cpu", "cpu-late"]


class StopTraining(Exception):  # noqa: N818 - a signal, as StopIteration is
    """Raised by `on_epoch` to end training early; the best weights so far are kept."""


@runtime_checkable
class FollowsSteps(Protocol):
    """A module that learns something after every optimizer step."""

    def after_step(self) -> None:
        """Called once a step, on all ranks."""
        ...


@runtime_checkable
class IsolatesGradients(Protocol):
    """A module with parts that a batch may leave unused, although they get gradients of zeros."""

    def drop_unchosen_gradients(self) -> None:
        """Called before an optimizer step that is isolated; see `TrainConfig`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast. `patience` counts epochs without a better validation metric.

    isolated_fraction: for this part of the steps, from the first one on, what got no gradient is left alone: experts
    that no row of the batch chose keep weights and optimizer state, and an expert that was never chosen has no state.
    In the rest every weight that is trained takes each step, with a gradient of zero if it got none. Where all experts
    are chosen in each batch, the two are the same.

    update_on: where optimizer state is kept and weights are updated: `device`, the one that computes; `cpu`, so that a
    GPU has room for more than twice the weights; `cpu-late`, as that, but a step behind, so that the GPU never waits.
    """

    num_epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0
    patience: int = 4
    isolated_fraction: float = 0.0
    update_on: UpdateOn = "device"

    def __post_init__(self) -> None:
        if not 0.0 <= self.isolated_fraction <= 1.0:
            raise ConfigError(f"isolated_fraction is {self.isolated_fraction}; allowed is 0 to 1")
        if self.num_epochs < 1 or self.patience < 1:
            raise ConfigError(f"num_epochs {self.num_epochs} and patience {self.patience} must be at least 1")
        if self.update_on not in get_args(UpdateOn):
            raise ConfigError(f"update_on is {self.update_on!r}; allowed are {', '.join(get_args(UpdateOn))}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0")


class FitResult(NamedTuple):
    """What a training came to."""

    best_metric: float
    best_epoch: int  # from 1
    history: list[float]  # validation metric of each epoch


def _learning_rate_scale(step: int, num_steps: int, warmup_fraction: float) -> float:
    warmup = max(1, int(num_steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def fastest_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _optimizer(trained: list[nn.Parameter], config: TrainConfig, units: Sequence[nn.Module]) -> torch.optim.Optimizer:
    decayed, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    rate, decay = config.learning_rate, config.weight_decay
    if config.update_on == "device":
        # Fused: one pass over memory a weight instead of a dozen.
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
    return OffloadedAdamW(groups, lr=rate, weight_decay=decay, late=config.update_on == "cpu-late", units=units)


def fit(
    module: nn.Module,
    *,
    batches: Callable[[int], Iterable[Batch]],
    num_batches: int,
    loss: Callable[[Batch], Tensor],
    evaluate: Callable[[], float] | None,
    config: TrainConfig,
    on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
    units: Sequence[nn.Module] = (),
    checkpoint: Checkpoint | None = None,
    generators: Sequence[torch.Generator | np.random.Generator] = (),
    ranks: Ranks = ALONE,
) -> FitResult:
    """Train `module` in place and leave it with its best weights.

    batches: epoch → batches. num_batches: how many of them an epoch has, for the schedule. evaluate: validation
    metric, higher is better; without one the last weights stay and the metric is the epoch's number. on_epoch:
    called with (epoch from 1, metric); may raise StopTraining. units: see `OffloadedAdamW`.
    checkpoint: goes on where an earlier call stopped. generators: that batches are drawn with; torch's own is kept too.

    ranks: all call this with the same weights, the same batches and the same generators; `loss` then is of this rank's
    share of a batch, and the sum over ranks is the loss of the batch. Torch's own generator, from which dropout is
    drawn, is another on each rank. The first evaluates and keeps the checkpoint; `on_epoch` is called on all.
    """
    keep_freed_memory()
    seed = torch.initial_seed() % 2**62
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(trained, config, units)
    isolatings = [m for m in module.modules() if isinstance(m, IsolatesGradients)]
    followers = [m for m in module.modules() if isinstance(m, FollowsSteps)]
    num_steps = config.num_epochs * num_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_scale(step, num_steps, config.warmup_fraction)
    )

    def step(batch: Batch, number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()  # type: ignore[no-untyped-call]
        ranks.sum_gradients(trained)
        nn.utils.clip_grad_norm_(trained, config.clip_norm)
        if number < config.isolated_fraction * num_steps:
            for isolating in isolatings:
                isolating.drop_unchosen_gradients()
        else:
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()
        for follower in followers:
            follower.after_step()

    parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "schedule": schedule}
    drawn_from = [torch.default_generator, *_of_gpus(trained), *generators]
    # Of another kind of machine, another configuration or another version of the module: it does not fit.
    shapes = [(name, tuple(value.shape)) for name, value in module.state_dict().items()]
    form = repr((config, num_batches, len(drawn_from), shapes))
    reached = _Reached()
    kept = None if checkpoint is None else ranks.first(checkpoint.load)
    if kept is not None and kept["form"] == form:
        reached = _Reached(**kept["reached"])
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        for generator, state in zip(drawn_from, kept["generators"], strict=True):
            _set_state(generator, state)
    try:
        while not reached.ends(config):
            module.train()
            if ranks.count > 1:
                torch.manual_seed(seed + 1 + len(reached.history) * ranks.count + ranks.number)
            for batch in batches(len(reached.history) + 1):
                step(batch, reached.num_steps)
                reached.num_steps += 1
            if isinstance(optimizer, OffloadedAdamW):
                optimizer.flush()
            module.eval()
            metric = float(len(reached.history) + 1) if evaluate is None else ranks.first(evaluate)
            reached.add(metric, module, config)
            if checkpoint is not None and ranks.number == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                drawn = [_state(generator) for generator in drawn_from]
                checkpoint.save({**states, "form": form, "reached": vars(reached), "generators": drawn})
            stopped = False
            try:
                on_epoch(len(reached.history), reached.history[-1])
            except StopTraining:
                stopped = True
            if ranks.any(stopped):
                break
    finally:
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.close()
    module.load_state_dict(reached.best_state)
    return FitResult(reached.metric, reached.epoch, reached.history)


@dataclass
class _Reached:
    """How far a training is, and the best of it."""

    num_steps: int = 0
    history: list[float] = field(default_factory=list)
    metric: float = -math.inf
    epoch: int = 0
    best_state: dict[str, Any] = field(default_factory=dict)

    def ends(self, config: TrainConfig) -> bool:
        return len(self.history) >= config.num_epochs or len(self.history) - self.epoch >= config.patience

    def add(self, metric: float, module: nn.Module, config: TrainConfig) -> None:
        metric = -math.inf if math.isnan(metric) else metric  # or nothing later could be better
        self.history.append(metric)
        if metric > self.metric or not self.best_state:
            self.metric, self.epoch = metric, len(self.history)
            on_device = config.update_on == "device"
            self.best_state = {
                name: value.clone() if on_device else value.to("cpu", copy=True)
                for name, value in module.state_dict().items()
            }


def _state(generator: torch.Generator | np.random.Generator) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else dict(generator.bit_generator.state)


def _set_state(generator: torch.Generator | np.random.Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _of_gpus(weights: Sequence[Tensor]) -> list[torch.Generator]:
    numbers = sorted({weight.device.index for weight in weights if weight.is_cuda})
    return [torch.cuda.default_generators[number] for number in numbers]
