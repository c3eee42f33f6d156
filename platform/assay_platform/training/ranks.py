"""Which share of every batch is this process's, where several train one model together.

Every rank holds all weights, draws the same batches, and computes with its share of the rows; gradients are summed, so
that each takes the step that one process would have taken with the whole batch (synchronous data-parallel training,
Li et al., 'PyTorch Distributed', VLDB 2020, section 2.2). Shares are summed and not averaged: they need not be of one
size, and a loss that divides by something of the whole batch stays what it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from assay_platform.errors import ConfigError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """number: of this process, from 0. count: how many there are, in torch's default process group."""

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> "Ranks":
        """Those of the process group that this process is in."""
        group = torch.distributed
        if not (group.is_available() and group.is_initialized()):
            return ALONE
        return cls(group.get_rank(), group.get_world_size())

    def share(self, num_rows: int) -> slice:
        """The rows of a batch that this rank computes with.

        Raises:
            ConfigError: there are fewer rows than ranks.
        """
        if num_rows < self.count:
            raise ConfigError(f"a batch of {num_rows} rows cannot be divided among {self.count} workers; take fewer")
        return slice(num_rows * self.number // self.count, num_rows * (self.number + 1) // self.count)

    def first(self, value: Callable[[], Value]) -> Value:
        """What the first rank computes, on all of them."""
        if self.count == 1:
            return value()
        held: list[Any] = [value() if self.number == 0 else None]
        torch.distributed.broadcast_object_list(held)
        computed: Value = held[0]
        return computed

    def any(self, mine: bool) -> bool:
        """Whether it is so on one of the ranks."""
        if self.count == 1:
            return mine
        held: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(held, mine)
        return any(held)

    @torch.no_grad()
    def sum_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """In place, in one message for each type of weights. A weight that got none on any rank keeps none."""
        if self.count == 1:
            return
        kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for weight in weights:
            kinds.setdefault((weight.device, weight.dtype), []).append(weight)
        for (device, dtype), alike in kinds.items():
            known = torch.tensor([float(weight.grad is not None) for weight in alike], device=device, dtype=dtype)
            message = torch.cat([*(_gradient(weight).reshape(-1) for weight in alike), known])
            torch.distributed.all_reduce(message)
            *gradients, known = torch.split(message, [*(weight.numel() for weight in alike), len(alike)])
            for weight, gradient, is_known in zip(alike, gradients, known.tolist(), strict=True):
                weight.grad = gradient.view_as(weight) if is_known else None


ALONE = Ranks()


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
