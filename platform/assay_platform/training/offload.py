"""AdamW on the CPU for weights on a GPU: the GPU holds weights and gradients, the host the optimizer's state.

Gradients go down and weights come up on streams of their own, part by part, while the GPU computes (ZeRO-Offload,
Ren et al. 2021, section 4). Exactly: the next forward pass waits for a part of the weights when it comes to it. Late:
the update of a step is used a step later, so that it has a whole step's time (their "one-step delayed parameter
update"); what is learned differs a little. With weights on the CPU it is AdamW as torch does it.

Not covered: several GPUs (torch shards and offloads there: `fully_shard(offload_policy=CPUOffloadPolicy())`), weights
of another type than what is updated.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from assay_platform.errors import ConfigError

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class _Host:
    """A weight as the host keeps it."""

    def __init__(self, weight: Tensor) -> None:
        pinned = weight.is_cuda
        self.weight = torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)
        self.gradient = torch.empty_like(self.weight, pin_memory=pinned)
        self.mean, self.square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.step = torch.zeros(())


class _Part:
    """Weights that move together. up: done where the event is over and `updated` is set."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.host = {weight: _Host(weight) for weight in weights}
        self.updated = threading.Event()
        self.updated.set()
        self.learned: list[Tensor] = []  # those that had a gradient in the last step
        on_gpu = any(weight.is_cuda for weight in weights)
        self.down, self.up = (torch.cuda.Event() if on_gpu else None for _ in range(2))  # type: ignore[no-untyped-call]


class OffloadedAdamW(torch.optim.Optimizer):
    """An optimizer for `fit`; `flush` before the weights are read, `close` at the end."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        late: bool = False,
        units: Sequence[nn.Module] = (),
    ) -> None:
        """units: modules in the order of their use, whose weights are used in calls of them alone: those may still be
        on their way while others compute. All other weights are there when `step` returns.
        """
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._late = late
        weights = [weight for group in self.param_groups for weight in group["params"]]
        of_units = [[w for w in unit.parameters() if w.requires_grad] for unit in units]
        elsewhere = {id(weight) for part in of_units for weight in part}
        self._rest = _Part([weight for weight in weights if id(weight) not in elsewhere])
        parts = [_Part(part) for part in of_units]
        self._parts = [self._rest, *parts]
        self._hooks = [
            unit.register_forward_pre_hook(lambda *_, part=part: self._arrived(part))
            for unit, part in zip(units, parts, strict=True)
        ]
        self._gpu = next((weight.device for weight in weights if weight.is_cuda), None)
        if self._gpu is not None:
            self._down, self._up = (torch.cuda.Stream(self._gpu) for _ in range(2))  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adamw")
        self._update: Future[None] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Begin the update; returns before it is done."""
        del closure
        if self._update is not None:
            self._update.result()  # of the step before
        options = {w: group for group in self.param_groups for w in group["params"]}
        chosen = {w: (group["lr"], group["weight_decay"]) for w, group in options.items()}
        if self._gpu is not None:
            computed = torch.cuda.current_stream(self._gpu).record_event()
            self._down.wait_event(computed)
            self._up.wait_event(computed)
        if self._late:
            for part in self._parts:
                self._send(part)  # the update of the step before
        for part in self._parts:
            self._fetch(part)
            part.updated.clear()
        self._update = self._thread.submit(self._all_parts, chosen)
        if self._late:
            for part in self._parts:
                part.updated.set()  # what is waited for is the step before
        self._arrived(self._rest)

    def state_dict(self) -> dict[str, Any]:
        """Of a flushed one."""
        hosts = [[h.mean, h.square, h.step] for part in self._parts for h in part.host.values()]
        return {"hosts": hosts, "lr": [group["lr"] for group in self.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Beside the weights that belong to it, which have to be there already."""
        hosts = [(weight, host) for part in self._parts for weight, host in part.host.items()]
        for (weight, host), (mean, square, step) in zip(hosts, state_dict["hosts"], strict=True):
            host.weight.copy_(weight.detach())
            for kept, loaded in ((host.mean, mean), (host.square, square), (host.step, step)):
                kept.copy_(loaded)
        for group, lr in zip(self.param_groups, state_dict["lr"], strict=True):
            group["lr"] = lr

    def flush(self) -> None:
        """Wait until the weights are those after the last step."""
        if self._update is None:
            return
        self._update.result()
        self._update = None
        if self._gpu is not None:
            self._up.wait_stream(torch.cuda.current_stream(self._gpu))  # what computes with the weights of before
        for part in self._parts:
            if self._late:
                self._send(part)
            self._arrived(part)

    def close(self) -> None:
        """Let go of the modules; after `flush`, or where a training was given up."""
        for hook in self._hooks:
            hook.remove()
        self._thread.shutdown()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lets go of gradients; zeroes would be written over what is on its way to the host.

        Raises:
            ConfigError: set_to_none is False.
        """
        if not set_to_none:
            raise ConfigError("gradients of an update on the CPU cannot be zeroed in place; leave set_to_none=True")
        super().zero_grad(set_to_none=True)

    def _arrived(self, part: _Part) -> None:
        part.updated.wait()
        if self._update is not None and self._update.done():
            self._update.result()  # says what went wrong
        if part.up is not None:
            torch.cuda.current_stream(self._gpu).wait_event(part.up)

    def _fetch(self, part: _Part) -> None:
        part.learned = [weight for weight in part.host if weight.grad is not None]
        if part.down is None:
            for weight in part.learned:
                part.host[weight].gradient.copy_(_gradient(weight))
            return
        with torch.cuda.stream(self._down):
            for weight in part.learned:
                gradient = _gradient(weight)
                part.host[weight].gradient.copy_(gradient, non_blocking=True)
                gradient.record_stream(self._down)
            part.down.record(self._down)

    @torch.no_grad()
    def _send(self, part: _Part) -> None:
        if part.up is None:
            for weight, host in part.host.items():
                weight.copy_(host.weight)
            return
        with torch.cuda.stream(self._up):
            for weight, host in part.host.items():
                weight.copy_(host.weight, non_blocking=True)
            part.up.record(self._up)

    def _all_parts(self, chosen: Mapping[Tensor, tuple[float, float]]) -> None:
        """In a thread of its own."""
        try:
            for part in self._parts:
                if part.down is not None and part.up is not None:
                    part.down.synchronize()
                    part.up.synchronize()  # what is sent must not change meanwhile
                _adamw(part, chosen)
                if not self._late:
                    self._send(part)
                    part.updated.set()
        finally:
            for part in self._parts:
                part.updated.set()


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


@torch.no_grad()
def _adamw(part: _Part, chosen: Mapping[Tensor, tuple[float, float]]) -> None:
    for lr, weight_decay in dict.fromkeys(chosen[weight] for weight in part.learned):
        hosts = [part.host[weight] for weight in part.learned if chosen[weight] == (lr, weight_decay)]
        adamw(
            [host.weight for host in hosts],
            [host.gradient for host in hosts],
            [host.mean for host in hosts],
            [host.square for host in hosts],
            [],
            [host.step for host in hosts],
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=_EPSILON,
            maximize=False,
        )
