"""Training of `EmbeddingTable`: a small network predicts the label from the value's vector and the row's numbers.

Entity embeddings (Guo and Berkhahn 2016), with two changes that keep a model which trains on them honest.

*A prior.* A vector is the shared one plus an offset with a Gaussian prior, so that few rows move it little. Values seen
fewer than `min_count` times, never, or missing have the shared one alone.

*By time.* A vector that has seen the labels of the very rows a model trains on knows them by heart, and the model would
trust it too much. So the training period is cut into blocks, and a row is given what was learned from the blocks
before its own (ordered target statistics, Prokhorenkova et al. 2018, for vectors); all later rows are given what was
learned from the whole period. The network is trained once, on all of it, and then only the offsets anew for each
block, so that a direction means the same in all of them.
"""

# N rows, V values, W width of a vector, K numbers of the context, H hidden units

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from assay_platform.errors import ConfigError, DataError
from numpy.typing import NDArray
from torch import Tensor, nn

from assay_features.embeddings import EmbeddingTable, Floats, Times
from assay_features.events import Keys

_HIDDEN = 32


@dataclass(frozen=True, kw_only=True)
class EmbeddingTraining:
    """How a table is trained.

    prior: precision of the offsets' prior; an offset of length 1 costs prior / 2 of log-likelihood. num_blocks: of the
    training period, with equally many rows; num_epochs of the network, num_block_epochs of the offsets in each.
    shared_share: of rows, each epoch, that see the shared vector instead of their own, so that it means 'any value'.
    """

    width: int = 8
    min_count: int = 10
    num_epochs: int = 10
    num_blocks: int = 5
    num_block_epochs: int = 4
    batch_size: int = 1024
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    prior: float = 10.0
    shared_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "min_count", "num_epochs", "num_blocks", "num_block_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed}; allowed are 0 to {2**31 - 1}")


def train_embedding(
    column: str,
    keys: Keys,
    time_us: Times,
    context_NK: Floats,
    labels: NDArray[np.bool_],
    training: EmbeddingTraining = EmbeddingTraining(),
    on_progress: Callable[[float, str], None] = lambda share, note: None,
) -> EmbeddingTable:
    """Learn vectors of a key column from rows of the training period alone, in order of time.

    context_NK: numbers of the rows; missing ones become the column's mean. Same seed and rows, same table.

    Raises:
        DataError: no value is frequent enough, or the labels are of one class.
    """
    if labels.all() or not labels.any():
        raise DataError(f"embedding of {column!r}: all {len(labels)} labels are the same")
    counts = pd.Series(keys).value_counts()
    kept = counts.index[counts >= training.min_count]
    if not len(kept):
        raise DataError(
            f"embedding of {column!r}: no value occurs {training.min_count} times; the commonest does "
            f"{int(counts.iloc[0]) if len(counts) else 0} times"
        )
    values = tuple(sorted(str(value) for value in kept))
    code = pd.Index(list(values), dtype=object).get_indexer(pd.Index(keys))
    rows = _Rows(
        torch.from_numpy(np.where(code < 0, len(values), code).astype(np.int64)),
        _standardised(context_NK),
        torch.from_numpy(labels.astype(np.float32)),
    )
    cuts = np.linspace(0, len(labels), training.num_blocks + 1).astype(int)[:-1]
    since_us = np.append(time_us[cuts], time_us[-1] + 1)
    # Rows of one instant lie on the same side of a cut, so that none learns from itself.
    seen = np.searchsorted(time_us, since_us)
    total = training.num_epochs * len(labels) + training.num_block_epochs * int(seen.sum())
    generator = torch.Generator().manual_seed(training.seed)
    network = _Network(len(values), context_NK.shape[1], training.width, generator)
    done = 0

    def fit(num_rows: int, num_epochs: int, shared_share: float) -> None:
        nonlocal done
        for _ in range(num_epochs):
            _epoch(network, optimizer, rows, num_rows, shared_share, training, generator)
            done += num_rows
            on_progress(done / total, "")

    with _one_thread():
        optimizer = _optimizer(network, training)
        fit(len(labels), training.num_epochs, training.shared_share)
        network.requires_grad_(False)
        nn.init.zeros_(network.offsets.weight).requires_grad_(True)
        vectors = []
        for num_rows in seen:
            optimizer = _optimizer(network, training)
            fit(int(num_rows), training.num_block_epochs, 0.0)
            vectors.append((network.shared_W + network.offsets.weight).detach().numpy().copy())
    return EmbeddingTable(column, values, np.stack(vectors), since_us)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that a digest does not depend on the number of cores; for tensors so small also faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Rows(NamedTuple):
    code_N: Tensor  # V for values without an offset
    context_NK: Tensor
    target_N: Tensor


class _Network(nn.Module):
    """(codes, context) → logits. The offset of code V is zero and stays so."""

    def __init__(self, num_values: int, num_context: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shared_W = nn.Parameter(torch.zeros(width))
        self.offsets = nn.Embedding(num_values + 1, width, padding_idx=num_values)
        self.hidden = nn.Linear(width + num_context, _HIDDEN)
        self.logit = nn.Linear(_HIDDEN, 1)
        for weight, spread in (
            (self.offsets.weight, 0.1),
            (self.hidden.weight, (width + num_context) ** -0.5),
            (self.logit.weight, _HIDDEN**-0.5),
        ):
            nn.init.normal_(weight, std=spread, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.logit.bias)
        nn.init.zeros_(self.offsets.weight.data[num_values])

    def forward(self, code_N: Tensor, context_NK: Tensor) -> Tensor:
        vector_NW = self.shared_W + self.offsets(code_N)
        logit_N1: Tensor = self.logit(torch.relu(self.hidden(torch.cat([vector_NW, context_NK], dim=1))))
        return logit_N1.squeeze(1)


def _optimizer(network: _Network, training: EmbeddingTraining) -> torch.optim.Optimizer:
    """Adam over what is to be learned; offsets have their prior in the loss, where it weighs as the rows do."""
    offsets = network.offsets.weight
    others = [p for p in network.parameters() if p is not offsets and p.requires_grad]
    groups = [{"params": [offsets], "weight_decay": 0.0}, {"params": others, "weight_decay": training.weight_decay}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=training.learning_rate)


def _epoch(
    network: _Network,
    optimizer: torch.optim.Optimizer,
    rows: _Rows,
    num_rows: int,
    shared_share: float,
    training: EmbeddingTraining,
    generator: torch.Generator,
) -> None:
    """One pass over the first so many rows."""
    shared = network.offsets.num_embeddings - 1
    loss_of = nn.BCEWithLogitsLoss()
    for batch in torch.split(torch.randperm(num_rows, generator=generator), training.batch_size):
        if not len(batch):
            continue
        code = rows.code_N[batch]
        if shared_share:
            code = code.masked_fill(torch.rand(len(batch), generator=generator) < shared_share, shared)
        penalty = training.prior / (2 * num_rows) * network.offsets.weight.square().sum()
        loss = loss_of(network(code, rows.context_NK[batch]), rows.target_N[batch]) + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _standardised(context_NK: Floats) -> Tensor:
    filled = np.where(np.isfinite(context_NK), context_NK, np.nan)
    if not filled.size:
        return torch.zeros(filled.shape)
    with np.errstate(all="ignore"):
        mean, spread = np.nan_to_num(np.nanmean(filled, axis=0)), np.nan_to_num(np.nanstd(filled, axis=0))
    scaled = (np.where(np.isnan(filled), mean, filled) - mean) / np.where(spread > 0, spread, 1.0)
    return torch.from_numpy(np.clip(scaled, -5, 5).astype(np.float32))
