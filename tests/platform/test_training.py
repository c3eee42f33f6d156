"""The training loop keeps the best weights and can be stopped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assay_platform.errors import ConfigError
from assay_platform.training import Checkpoint, FitResult, StopTraining, TrainConfig, UpdateOn, fit
from assay_platform.training.offload import OffloadedAdamW


def run(metrics: list[float], *, patience: int = 10, stop_at: int = 0) -> tuple[torch.nn.Linear, object, list[float]]:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    weights: list[float] = []

    def evaluate() -> float:
        weights.append(net.weight[0, 0].item())
        return metrics[len(weights) - 1]

    def on_epoch(epoch: int, _: float) -> None:
        if epoch == stop_at:
            raise StopTraining

    result = fit(
        net,
        batches=lambda _: [torch.ones(4, 2)] * 3,
        num_batches=3,
        loss=lambda x: net(x).square().mean(),
        evaluate=evaluate,
        config=TrainConfig(num_epochs=len(metrics), patience=patience),
        on_epoch=on_epoch,
    )
    return net, result, weights


def test_the_best_epoch_is_restored() -> None:
    net, result, weights = run([0.1, 0.9, 0.2])
    assert result.best_epoch == 2  # type: ignore[attr-defined]
    assert net.weight[0, 0].item() == weights[1]


def test_patience_ends_training_early() -> None:
    _, result, _ = run([0.9, 0.1, 0.1, 0.1, 0.1], patience=2)
    assert len(result.history) == 3  # type: ignore[attr-defined]


def test_a_stop_signal_keeps_what_was_learned() -> None:
    net, _, weights = run([0.1, 0.2, 0.3], stop_at=2)
    assert net.weight[0, 0].item() == weights[1]


def test_a_wrong_learning_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig(learning_rate=0.0)


class _Two(torch.nn.Module):
    """Two 'experts', of which a batch chooses some, and a follower of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)])
        self.steps = 0

    def after_step(self) -> None:
        self.steps += 1


def _trained(isolated_fraction: float, chosen: list[list[int]]) -> _Two:
    net = _Two()

    def loss(experts: list[int]) -> torch.Tensor:
        return torch.stack([net.experts[e].square().sum() for e in experts]).sum()

    fit(
        net,
        batches=lambda _: chosen,
        num_batches=len(chosen),
        loss=loss,
        evaluate=None,
        config=TrainConfig(num_epochs=1, learning_rate=0.1, isolated_fraction=isolated_fraction),
    )
    assert net.steps == len(chosen)
    return net


def test_isolated_training_leaves_what_was_not_chosen_alone() -> None:
    net = _trained(1.0, [[0], [0], [0]])
    assert torch.equal(net.experts[1], torch.ones(2, 2))
    assert not torch.equal(net.experts[0], torch.ones(2, 2))
    everything = _trained(0.0, [[0], [0], [0]])
    assert not torch.equal(everything.experts[1], torch.ones(2, 2))  # weight decay takes every step
    opened = _trained(0.5, [[0], [0], [0], [0]])
    assert not torch.equal(opened.experts[1], torch.ones(2, 2))


def test_isolated_training_is_exactly_the_same_where_all_are_chosen() -> None:
    a, b = _trained(1.0, [[0, 1], [1, 0], [0, 1]]), _trained(0.0, [[0, 1], [1, 0], [0, 1]])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_an_isolated_fraction_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"isolated_fraction is 1\.5"):
        TrainConfig(isolated_fraction=1.5)


def trained(update_on: str, device: str = "cpu", *, isolated: float = 0.0) -> list[torch.Tensor]:
    """The weights after three epochs of a net of two units, one of them left out by every second batch."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    head = torch.nn.Linear(4, 1)
    net = torch.nn.ModuleList([first, second, head]).to(device)
    batches = [(torch.randn(8, 4).to(device), number) for number in range(6)]

    def loss(batch: tuple[torch.Tensor, int]) -> torch.Tensor:
        x, number = batch
        hidden = first(x).tanh()
        hidden = second(hidden).tanh() if number % 2 else hidden
        found: torch.Tensor = (head(hidden) - x.sum(1, keepdim=True)).square().mean()
        return found

    config = TrainConfig(
        num_epochs=3, learning_rate=0.05, weight_decay=0.1, isolated_fraction=isolated, update_on=update_on
    )  # type: ignore[arg-type]
    fit(net, batches=lambda _: batches, num_batches=6, loss=loss, evaluate=None, config=config, units=[first, second])
    return [weight.detach().cpu().clone() for weight in net.parameters()]


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


@pytest.mark.parametrize("isolated", [0.0, 1.0])
@pytest.mark.parametrize("device", DEVICES)
def test_an_update_on_the_cpu_is_the_same_update(device: str, isolated: float) -> None:
    for ours, theirs in zip(
        trained("cpu", device, isolated=isolated), trained("device", device, isolated=isolated), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class _LateAdamW(torch.optim.AdamW):
    """The oracle: the update of a step is applied to the weights that its successor started from."""

    def __init__(self, weights: list[torch.nn.Parameter], **how: float) -> None:
        super().__init__(weights, **how)  # type: ignore[arg-type]
        self.weights = weights
        self.newest = [weight.detach().clone() for weight in weights]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        shown = [weight.detach().clone() for weight in self.newest]
        for weight, newest in zip(self.weights, self.newest, strict=True):
            weight.data.copy_(newest)
        super().step()
        self.newest = [weight.detach().clone() for weight in self.weights]
        for weight, old in zip(self.weights, shown, strict=True):
            weight.data.copy_(old)


@pytest.mark.parametrize("device", DEVICES)
def test_a_late_update_is_one_step_behind_and_flushed_at_the_end(device: str) -> None:
    def weights_of(late: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).to(device)
        held = list(net.parameters())
        how = {"lr": 0.1, "weight_decay": 0.01}
        optimizer = (
            OffloadedAdamW([{"params": held}], **how, late=True, units=[net[0]]) if late else _LateAdamW(held, **how)
        )
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.ones(2, 3, device=device)).square().sum().backward()
            optimizer.step()
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.flush()
            optimizer.close()
            return [weight.detach().cpu() for weight in held]
        return [weight.cpu() for weight in optimizer.newest]

    for ours, theirs in zip(weights_of(late=True), weights_of(late=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_unknown_place_of_the_update_is_refused() -> None:
    with pytest.raises(ConfigError, match="update_on is 'moon'; allowed are device, cpu, cpu-late"):
        TrainConfig(update_on="moon")  # type: ignore[arg-type]


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("update_on", ["device", "cpu", "cpu-late"])
@pytest.mark.parametrize("killed_at", [1, 2, 4])
def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(
    tmp_path: Path, update_on: UpdateOn, killed_at: int
) -> None:
    def train(checkpoint: Checkpoint | None, killed: int = 0) -> tuple[list[torch.Tensor], FitResult]:
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        rows = torch.randn(32, 4)

        def on_epoch(epoch: int, _: float) -> None:
            if epoch == killed:
                raise _KilledError

        result = fit(
            net,
            batches=lambda _: torch.randperm(32, generator=generator).split(8),
            num_batches=4,
            loss=lambda part: (net(rows[part]) - rows[part].sum(1, keepdim=True)).square().mean(),
            evaluate=lambda: -(net(rows) - rows.sum(1, keepdim=True)).square().mean().item(),
            config=TrainConfig(num_epochs=5, learning_rate=0.05, update_on=update_on),
            on_epoch=on_epoch,
            checkpoint=checkpoint,
            generators=[generator],
        )
        return [weight.detach().clone() for weight in net.parameters()], result

    path = tmp_path / "net.pt"
    with pytest.raises(_KilledError):
        train(Checkpoint(path, "this"), killed_at)
    whole, expected = train(None)
    for identity in ("this", "this", "another"):  # again when it was done; and one that is none of ours
        resumed, result = train(Checkpoint(path, identity))
        assert result == expected
        for one, other in zip(resumed, whole, strict=True):
            # Late updates are flushed where a checkpoint is made, which is after each epoch in both.
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a checkpoint"])
def test_a_damaged_checkpoint_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    assert Checkpoint(path, "this").load() is None
    assert Checkpoint(tmp_path / "absent", "this").load() is None


def test_a_checkpoint_of_another_form_is_none(tmp_path: Path) -> None:
    def train(width: int, generators: int, num_epochs: int = 2) -> FitResult:
        torch.manual_seed(0)
        net = torch.nn.Linear(width, 1)
        return fit(
            net,
            batches=lambda _: [torch.ones(4, width)],
            num_batches=1,
            loss=lambda x: net(x).square().mean(),
            evaluate=None,
            config=TrainConfig(num_epochs=num_epochs),
            checkpoint=Checkpoint(tmp_path / "net.pt", "same"),
            generators=[torch.Generator()] * generators,
        )

    assert all(len(train(*form).history) == 2 for form in ((2, 0), (3, 0), (3, 2), (3, 0)))
    assert len(train(3, 0, num_epochs=5).history) == 5


def test_what_a_step_frees_stays_with_the_process() -> None:
    # In a process of its own: it cannot be taken back.
    code = """
import resource, torch
from assay_platform.training.memory import keep_freed_memory
def faults(rounds=40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        parts = [torch.ones(1 << 20) for _ in range(4)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.ones(1)
given_back = faults()
kept = keep_freed_memory()
faults(2)
print(int(kept), given_back, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, given_back, after = (int(number) for number in done.stdout.split())
    if not kept:
        pytest.skip("another C library")
    assert after < given_back / 10
