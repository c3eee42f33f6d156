"""Several processes that train one model: they learn what one learns."""

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
from assay_platform.models.histories import DAY_US, Histories
from assay_platform.models.recommender import RankerConfig
from assay_platform.models.sequence import SequenceConfig
from assay_platform.training import ALONE, Ranks

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
