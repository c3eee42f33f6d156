"""Train the sequence encoder on windows of histories: at each place of a window, tell what comes within the next events
from all other items.
"""

# B windows, D width

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from assay_platform.models.histories import Floats, Histories, Index
from assay_platform.models.sequence import Events, SequenceConfig, SequenceEncoder, gap_buckets, times_before
from assay_platform.training import ALONE, Checkpoint, Ranks, TrainConfig, fastest_device, fit
from torch import Tensor
from torch.nn import functional

_WINDOWS_A_STEP = 64
# Of an epoch: of more, some are drawn.
_MOST_STEPS = 400
_CELLS = 2**23  # places times items of a step's softmax


@dataclass(frozen=True, kw_only=True)
class SequenceTraining:
    """How it is trained. horizon: events among which the one to tell is drawn. asked: the part of the places asked."""

    num_epochs: int = 5
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    horizon: int = 50
    asked: float = 0.5


class _Batch(NamedTuple):
    events: Events
    row: Tensor
    place: Tensor
    target: Tensor

    def to(self, device: torch.device) -> "_Batch":
        """On another device."""
        events = Events(*(part.to(device) for part in self.events))
        return _Batch(events, *(part.to(device) for part in (self.row, self.place, self.target)))

    def share(self, ranks: Ranks) -> "_Batch":
        """Some of the windows, with what is asked of them."""
        if ranks.count == 1:
            return self
        mine = ranks.share(len(self.events.item))
        asked = (self.row >= mine.start) & (self.row < mine.stop)
        events = Events(*(part[mine] for part in self.events))
        return _Batch(events, self.row[asked] - mine.start, self.place[asked], self.target[asked])


def train_sequence(
    histories: Histories,
    graph_ID: Floats,
    config: SequenceConfig,
    training: SequenceTraining,
    *,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
    evaluate: Callable[[SequenceEncoder], float] | None = None,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
) -> SequenceEncoder:
    """graph_ID: vectors of items that it starts from. ranks: that train it together."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    encoder = SequenceEncoder(graph_ID, config)
    counts = np.bincount(histories.item, minlength=len(graph_ID))
    with torch.no_grad():
        encoder.bias_I.copy_(torch.from_numpy(0.5 * np.log1p(counts)))
    windows, device = _Windows(histories, encoder, training), fastest_device()
    encoder.to(device)

    def batches(_: int) -> Iterator[_Batch]:
        yield from windows.batches(generator)

    def loss(batch: _Batch) -> Tensor:
        item_ID, num_asked = encoder.item_vectors(), len(batch.target)
        batch = batch.share(ranks).to(device)
        out = encoder(batch.events, item_ID)
        # A gather of rows: its gradient is a sum over them, that of places by two indices takes ten times as long.
        asked = out.flatten(0, 1).index_select(0, batch.row * out.shape[1] + batch.place)
        logits = encoder.score(asked, item_ID, encoder.bias_I)
        return functional.cross_entropy(logits, batch.target, reduction="sum") / num_asked

    plan = TrainConfig(
        num_epochs=training.num_epochs, learning_rate=training.learning_rate, weight_decay=training.weight_decay
    )
    fit(
        encoder,
        batches=batches,
        num_batches=windows.num_batches,
        loss=loss,
        evaluate=None if evaluate is None else lambda: evaluate(encoder.eval()),
        config=plan,
        on_epoch=on_epoch,
        checkpoint=checkpoint,
        generators=[generator],
        ranks=ranks,
    )
    return encoder.cpu().eval()


class _Windows:
    """All windows of the histories, cut anew every epoch."""

    def __init__(self, histories: Histories, encoder: SequenceEncoder, training: SequenceTraining) -> None:
        self._histories, self._training = histories, training
        self._graph_ID, self._length = encoder.graph_ID.clone(), encoder.config.length
        user, start = histories.users(), histories.start
        self._end = start[1:][user]
        first = np.zeros(len(user), dtype=bool)
        first[start[:-1][np.diff(start) > 0]] = True
        self._gap = gap_buckets(histories.time_us, first)
        self._times = times_before(histories, len(self._graph_ID))
        length = np.diff(start)
        self.num_batches = min(_MOST_STEPS, max(1, int(np.ceil(length / self._length).sum()) // _WINDOWS_A_STEP))

    def batches(self, generator: np.random.Generator) -> Iterator[_Batch]:
        """One epoch."""
        histories, length = self._histories, self._length
        counts = np.diff(histories.start)
        # A user's first window is of any length, so that windows begin elsewhere every time.
        shift = np.where(counts > length, generator.integers(0, length, len(counts)), 0)
        number = -(-(counts + shift) // length)
        user = np.repeat(np.arange(len(counts)), number)
        nth = np.arange(len(user)) - np.repeat(np.cumsum(number) - number, number)
        begin = histories.start[user] + np.maximum(nth * length - shift[user], 0)
        end = np.minimum(histories.start[user] + (nth + 1) * length - shift[user], histories.start[user + 1])
        order = generator.permutation(len(user))
        if self.num_batches == _MOST_STEPS:
            order = order[: _MOST_STEPS * _WINDOWS_A_STEP]
        for part in np.array_split(order, self.num_batches):
            yield self._batch(user[part], begin[part], end[part], generator)

    def _batch(self, user: Index, begin: Index, end: Index, generator: np.random.Generator) -> _Batch:
        histories = self._histories
        count = end - begin
        longest = int(count.max())
        at = begin[:, None] + np.arange(longest)
        inside = at < end[:, None]
        at = np.where(inside, at, 0)
        item, gap, times = (
            torch.from_numpy(np.where(inside, values[at], 0)) for values in (histories.item, self._gap, self._times)
        )
        events = Events(item, gap, times, self._before(user, begin), torch.from_numpy(count))
        # From the place before the first event, after it, and so on; what to tell comes after that.
        last = histories.start[user + 1]
        place = np.arange(longest + 1)
        follows = begin[:, None] + place
        possible = (place <= count[:, None]) & (follows < last[:, None])
        row, asked = np.nonzero(possible & (generator.random(possible.shape) < self._training.asked))
        most = max(1, _CELLS // len(self._graph_ID))
        if len(row) > most:
            chosen = generator.choice(len(row), most, replace=False)
            row, asked = row[chosen], asked[chosen]
        first = follows[row, asked]
        ahead = np.minimum(last[row] - first, self._training.horizon)
        target = histories.item[first + (generator.random(len(row)) * ahead).astype(np.int64)]
        return _Batch(events, *(torch.from_numpy(values) for values in (row, asked, target)))

    def _before(self, user: Index, begin: Index) -> Tensor:
        """(B, D) means of the vectors of the items before."""
        graph_ID, start = self._graph_ID, self._histories.start[user]
        count = begin - start
        rows = np.repeat(np.arange(len(user)), count)
        at = np.repeat(start - (np.cumsum(count) - count), count) + np.arange(len(rows))
        before = torch.zeros(len(user), graph_ID.shape[1])
        before.index_add_(0, torch.from_numpy(rows), graph_ID[torch.from_numpy(self._histories.item[at])])
        return before / torch.from_numpy(np.maximum(count, 1)).float()[:, None]
