"""The sequence encoder: causal attention over a user's events, in the order in which they happened.

Blocks of self-attention as in SASRec (Kang and McAuley, arXiv:1808.09781), normalised before each part. What goes in of
an event: its item, the time since the event before, and how often the user took that item already. Items have the
graph's vectors plus a part of their own that starts at zero, for input and output alike, so that an item which training
never saw has a place too. Attention is local, over the latest events; one more place holds the mean of all before
them. It learns to tell what the user takes within the next events, not the very next alone (Pancha et al.,
'PinnerFormer', arXiv:2205.04507).
"""

# B users, L events looked at, I items, D width

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from assay_platform.models.histories import Floats, Histories, Index

_GAPS_S = (1.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86_400.0, 3 * 86_400.0, 7 * 86_400.0, 14 * 86_400.0, 30 * 86_400.0)
_MOST_TIMES = 7


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Shape of a sequence encoder. length: L."""

    length: int = 100
    num_blocks: int = 2
    num_heads: int = 2
    dropout: float = 0.3


class Events(NamedTuple):
    """The latest events of users, left-aligned. item, gap, times (B, L): buckets; 0 beyond a user's `length` (B,).

    before (B, D): the mean vector of the items before them.
    """

    item: Tensor
    gap: Tensor
    times: Tensor
    before: Tensor
    length: Tensor


def gap_buckets(time_us: Index, another_user: NDArray[np.bool_]) -> Index:
    """(E,) of the time since the event before; the last bucket where there is none."""
    since_s = np.diff(time_us, prepend=time_us[:1]) / 1e6
    bucket = np.searchsorted(_GAPS_S, since_s, side="right")
    return np.where(another_user, len(_GAPS_S) + 1, bucket).astype(np.int64)


def times_before(histories: Histories, num_items: int) -> Index:
    """(E,) how often the user took the item before, up to 7."""
    key = histories.users() * num_items + histories.item
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    before = np.empty(len(key), dtype=np.int64)
    before[order] = np.arange(len(key)) - np.searchsorted(ordered, ordered, side="left")
    return np.minimum(before, _MOST_TIMES)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.before_attention, self.before_net = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        heads = self.project(self.before_attention(x_BLD)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BLD = x_BLD + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = x_BLD + self.dropout(self.net(self.before_net(x_BLD)))
        return out


class SequenceEncoder(nn.Module):
    """Users' vectors from their events; items' from the graph's."""

    graph_ID: Tensor

    def __init__(self, graph_ID: Floats, config: SequenceConfig) -> None:
        super().__init__()
        self.config = config
        num_items, width = graph_ID.shape
        size = np.linalg.norm(graph_ID, axis=1).mean() + 1e-9
        self.register_buffer("graph_ID", torch.from_numpy(np.asarray(graph_ID / size, dtype=np.float32)))
        self.own_ID = nn.Parameter(torch.zeros(num_items, width))
        self.gap = nn.Embedding(len(_GAPS_S) + 2, width)
        self.times = nn.Embedding(_MOST_TIMES + 1, width)
        self.place = nn.Embedding(config.length + 1, width)
        self.before = nn.Linear(width, width)
        self.blocks = nn.ModuleList(_Block(width, config.num_heads, config.dropout) for _ in range(config.num_blocks))
        self.last = nn.LayerNorm(width)
        self.bias_I = nn.Parameter(torch.zeros(num_items))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(config.dropout)
        for table in (self.gap, self.times, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def item_vectors(self) -> Tensor:
        """(I, D)."""
        return self.graph_ID + self.own_ID

    def forward(self, events: Events, item_ID: Tensor) -> Tensor:
        """(B, L + 1, D): the vector of a user who has taken so many of the events."""
        x_BLD = functional.embedding(events.item, item_ID) + self.gap(events.gap) + self.times(events.times)
        x_BLD = torch.cat([self.before(events.before)[:, None], x_BLD], dim=1)
        x_BLD = self.dropout(x_BLD + self.place.weight[: x_BLD.shape[1]])
        for block in self.blocks:
            x_BLD = block(x_BLD)
        out: Tensor = self.last(x_BLD)
        return out

    def score(self, user_ND: Tensor, item_ID: Tensor, bias: Tensor) -> Tensor:
        """Logits (N, I)."""
        return user_ND @ item_ID.T * self.log_scale.exp() + bias

    @torch.inference_mode()
    def users(self, histories: Histories) -> Floats:
        """(N, D + 1) vectors of users, 1 behind them: their products with `stacked` vectors of items are scores."""
        return np.asarray(self.vectors(histories, self.item_vectors()).numpy())

    @torch.inference_mode()
    def vectors(self, histories: Histories, item_ID: Tensor) -> Tensor:
        """What `users` returns, where the encoder is. item_ID: `item_vectors`, which are worth keeping on a GPU."""
        events = latest(histories, self.graph_ID, self.config.length)
        rows = torch.arange(histories.num_users, device=events.length.device)
        out = self(events, item_ID)[rows, events.length]
        return functional.pad(out * self.log_scale.exp(), (0, 1), value=1.0)

    @torch.inference_mode()
    def stacked(self) -> Floats:
        """(I, D + 1)."""
        return np.asarray(torch.cat([self.item_vectors(), self.bias_I[:, None]], dim=1).numpy())

    def without(self, items: NDArray[np.bool_]) -> "SequenceEncoder":
        """As if some items (I,) were new: see `extended`."""
        other = SequenceEncoder(np.zeros_like(self.graph_ID.numpy()), self.config)
        other.load_state_dict(self.state_dict())
        chosen = torch.from_numpy(items)
        with torch.no_grad():
            for held in (other.graph_ID, other.own_ID):
                held[chosen] = held[~chosen].mean(0)
            other.bias_I[chosen] = 0.0
        return other.eval().requires_grad_(False)

    def extended(self, num: int) -> "SequenceEncoder":
        """With more items, of which it says as much as of the mean item."""
        longer = SequenceEncoder(np.zeros((len(self.bias_I) + num, self.graph_ID.shape[1]), np.float32), self.config)
        state = self.state_dict()
        for name, start in (("graph_ID", self.graph_ID.mean(0)), ("own_ID", self.own_ID.mean(0))):
            state[name] = torch.cat([state[name], start.detach().expand(num, -1)])
        state["bias_I"] = torch.cat([state["bias_I"], torch.zeros(num)])
        longer.load_state_dict(state)
        return longer.eval().requires_grad_(False)


def latest(histories: Histories, graph_ID: Tensor, length: int) -> Events:
    """What the encoder looks at of every user, where the graph's vectors are."""
    device = graph_ID.device
    num_users, start = histories.num_users, histories.start
    user, count = histories.users(), np.diff(histories.start)
    another = np.zeros(len(user), dtype=bool)
    another[start[:-1][count > 0]] = True
    gap, times = gap_buckets(histories.time_us, another), times_before(histories, len(graph_ID))
    kept = np.minimum(count, length)
    longest = int(kept.max(initial=0))
    place = np.arange(len(user)) - (start[1:] - kept)[user]
    inside = place >= 0
    shape = (num_users, longest)
    parts = []
    for values in (histories.item, gap, times):
        padded = np.zeros(shape, dtype=np.int64)
        padded[user[inside], place[inside]] = values[inside]
        parts.append(torch.from_numpy(padded).to(device))
    before = torch.zeros(num_users, graph_ID.shape[1], device=device)
    earlier = ~inside
    if earlier.any():
        whose, what = (torch.from_numpy(of[earlier]).to(device) for of in (user, histories.item))
        before.index_add_(0, whose, graph_ID[what])
        before /= torch.from_numpy(np.maximum(count - kept, 1)).to(device).float()[:, None]
    return Events(parts[0], parts[1], parts[2], before, torch.from_numpy(kept).to(device))
