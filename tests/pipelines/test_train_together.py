"""Several processes that train one model: they learn what one learns, through the loss of a worker too."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assay_features.schema import FraudSchema, read_schema
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.prepare import Prepared
from assay_pipelines.fraud.train import DEFAULTS, FraudData, train_net
from assay_pipelines.options import RunOptions
from assay_pipelines.recommend.train import Lists, RankerTraining, train_ranker
from assay_pipelines.recommend.train_sequence import SequenceTraining, train_sequence
from assay_platform.config import Config
from assay_platform.errors import ConfigError, WorkError
from assay_platform.models.histories import DAY_US, Histories
from assay_platform.models.recommender import RankerConfig
from assay_platform.models.sequence import SequenceConfig
from assay_platform.training import ALONE, Checkpoint, Ranks, TrainConfig, Workers, fit
from assay_platform.training.workers import _check_lost, cores_each
from torch import Tensor

# Three, so that shares are of different sizes.
NUM_RANKS = 3
NUM_ITEMS = 60
FRAUD = {**DEFAULTS, "width": 16, "num_experts": 4, "dropout": 0.0, "batch_size": 100}
State = dict[str, Any]


def fraud_data(config: Config, files: tuple[Path, Path]) -> FraudData:
    """With other forms of the frauds, so that some rows of a batch stand for two."""
    table, schema_file = files
    with schema_file.open("a") as text:
        text.write("\n[constraints]\ntimes = {amount = [0.8, 1.2]}\n")
    schema = read_schema(schema_file)
    assert isinstance(schema, FraudSchema)
    options = RunOptions(
        config=config, application="fraud", data=str(table), table=table, schema=schema, schema_folder=table.parent,
        model_name="payments",
    )  # fmt: skip
    prepared = Prepared(options, Reporter())
    adversary = prepared.adversary()
    assert adversary is not None
    return replace(prepared.data, copies=adversary.copies(prepared.train, np.random.default_rng(0)))


def histories() -> Histories:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(200), 12)
    item = rng.integers(0, NUM_ITEMS, len(user))
    return Histories.of(user, item, rng.integers(0, DAY_US, len(user)), num_users=200, now_us=DAY_US)


def ranked_lists() -> list[Lists]:
    """Of two tasks, of which not every list has something wanted."""
    drawn = torch.Generator().manual_seed(0)
    config = RankerConfig()
    features = torch.randn(100, 8, len(config.features), generator=drawn)
    wanted = torch.rand(100, 8, 2, generator=drawn) < torch.tensor([0.3, 0.05])
    possible = torch.rand(100, 8, generator=drawn) < 0.9
    return [Lists(features, wanted & possible.unsqueeze(-1), possible)]


def train_all(fraud: FraudData, ranks: Ranks) -> tuple[dict[str, State], list[float]]:
    """What all that is trained together has learned, and the fraud net's validation metric."""
    trained = train_net(FRAUD, fraud, num_epochs=2, seed=0, ranks=ranks)
    backbone = replace(RankerConfig().backbone, dropout=0.0)
    ranker, _ = train_ranker(
        ranked_lists(), RankerConfig(tasks=("buy", "click"), backbone=backbone), seed=0,
        training=RankerTraining(num_epochs=2), ranks=ranks,
    )  # fmt: skip
    vectors = np.random.default_rng(1).normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    sequence = train_sequence(
        histories(), vectors, SequenceConfig(length=8, dropout=0.0), SequenceTraining(num_epochs=2), seed=0, ranks=ranks
    )
    states = {"fraud": trained.net.state_dict(), "ranker": ranker.state_dict()}
    # Not its weights: the bias of keys changes nothing, so its gradient is noise, which Adam makes steps of.
    states["sequence"] = {"users": torch.from_numpy(sequence.users(histories()))}
    return states, trained.fitted.history


def _rank(number: int, folder: str, fraud: FraudData) -> None:
    group = {"init_method": f"file://{folder}/sync", "rank": number, "world_size": NUM_RANKS}
    torch.distributed.init_process_group("gloo", **group)
    torch.set_num_threads(1)
    torch.save(train_all(fraud, Ranks.here()), Path(folder) / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(300)
def test_ranks_learn_what_one_process_learns(
    config: Config, tmp_path: Path, fraud_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fraud = fraud_data(config, fraud_files)
    # More threads than cores wait for one another by spinning.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), fraud), nprocs=NUM_RANKS)
    expected, history = train_all(fraud, ALONE)
    for number in range(NUM_RANKS):
        states, of_rank = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert of_rank == pytest.approx(history, abs=1e-4)
        for name, state in states.items():
            assert state.keys() == expected[name].keys()
            for key, value in state.items():
                torch.testing.assert_close(value, expected[name][key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


def test_shares_are_all_rows_once() -> None:
    for num_rows in (3, 7, 100):
        rows = [n for number in range(3) for n in range(num_rows)[Ranks(number, 3).share(num_rows)]]
        assert rows == list(range(num_rows))
    assert range(5)[ALONE.share(5)] == range(5)
    with pytest.raises(ConfigError, match="2 rows cannot be divided among 3 workers"):
        Ranks(0, 3).share(2)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "expected"),
    [([2], 2, 1), ([2], 1, 2), ([16, 16], 2, 16), ([16, 16], 3, 8), ([2, 6], 2, 3), ([0, 4], 4, 1)],
)
def test_cores_are_shared_as_far_as_nodes_can_hold(nodes: list[int], num_workers: int, expected: int) -> None:
    assert cores_each(nodes, num_workers) == expected


def test_a_cluster_that_is_too_small_is_named() -> None:
    with pytest.raises(ConfigError, match="5 workers need a core each; the cluster has 4"):
        cores_each([2, 2], 5)


# -------------------------------------------------------------------------------------------------- on Ray


def line(rows: Tensor, killed: Path, on_epoch: Any, checkpoint: Checkpoint | None, ranks: Ranks = ALONE) -> Any:
    """A line through points; the second worker dies once, where `killed` does not exist."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(rows.shape[1], 1))
    generator = torch.Generator().manual_seed(1)

    def wrong(part: Tensor) -> Tensor:
        error: Tensor = (net(rows[part]).squeeze(1) - rows[part].sum(1)).square().sum()
        return error

    def done(epoch: int, metric: float) -> None:
        on_epoch(epoch, metric)
        if epoch == 3 and ranks.number == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return net, fit(
        net,
        batches=lambda _: torch.randperm(len(rows), generator=generator).split(16),
        num_batches=len(rows) // 16,
        loss=lambda part: wrong(part[ranks.share(len(part))]) / len(part),
        evaluate=lambda: -float(wrong(torch.arange(len(rows))).detach()),
        config=TrainConfig(num_epochs=6, learning_rate=0.1),
        on_epoch=done,
        checkpoint=checkpoint,
        generators=[generator],
        ranks=ranks,
    )


def failing(data: int, on_epoch: Any, checkpoint: Any, ranks: Ranks) -> None:
    raise ValueError(f"{data} is not a table")


class LostError(Exception):
    """As Ray's kinds are told: by the module that they are of."""

    __module__ = "ray.train"


def test_what_the_training_itself_fails_with_is_not_taken_for_a_loss() -> None:
    for causes in (
        [LostError()],
        [RuntimeError("connection closed"), LostError()],
        [RuntimeError("connection closed")],
    ):
        _check_lost(causes, 2)
    with pytest.raises(WorkError, match="RuntimeError: out of memory"):
        _check_lost([RuntimeError("out of memory"), RuntimeError("out of memory")], 2)
    with pytest.raises(WorkError, match="KeyError"):
        _check_lost([KeyError("x"), LostError()], 2)
    with pytest.raises(ConfigError, match="two rows"):
        _check_lost([RuntimeError("connection closed"), ConfigError("two rows")], 2)


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_training_goes_on_when_a_worker_dies(ray_session: str, tmp_path: Path) -> None:
    rows, killed = torch.randn(64, 4, generator=torch.Generator().manual_seed(2)), tmp_path / "killed"
    workers, told = Workers(num=2, folder=tmp_path / "training"), []
    net, result = workers.train(line, {"rows": rows, "killed": killed}, on_epoch=lambda *epoch: told.append(epoch))
    expected, of_one = line(rows, killed, lambda *_: None, None)
    assert killed.exists()
    assert result.history == pytest.approx(of_one.history, rel=1e-4)
    assert [epoch for epoch, _ in told] == [1, 2, 3, 4, 5, 6], "none was trained twice"
    for weight, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other)
    assert not list((tmp_path / "training").iterdir()), "nothing is left behind"
    with pytest.raises(WorkError, match="failed: ValueError: 7 is not a table"):
        workers.train(failing, {"data": 7})
    with pytest.raises(ConfigError, match="the cluster has 2"):
        replace(workers, num=3).train(line, {"rows": rows, "killed": killed})
