"""Samples of a graph that is too large to run over at once: some users, their items, and what these are joined with.

The graph stays in the memory of the host; what the encoder runs over grows with the sample alone (Hamilton, Ying and
Leskovec, 'Inductive Representation Learning on Large Graphs', arXiv:1706.02216). Of a long row a part is drawn and
weighed for what it stands for, so that sums over neighbours are right on average.
"""

# U users, I items, E pairs of users and items, B users of a sample, S items of a sample, N rows

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from assay_platform.kernels.sparse_numba import sample_rows
from assay_platform.models.graph import Adjacency, Hop, ItemGraph, Subgraph, scale, torch_csr
from assay_platform.models.histories import Flags, Floats, Index


class Sample(NamedTuple):
    """graph: to run the encoder over. items (S,): whose vectors come out; the first `told_apart` of them are those that
    users' items are told apart from. wanted, hidden: (user, item) places among these of the edges taken out, and kept.
    """

    graph: Subgraph
    items: Index
    told_apart: int
    wanted: tuple[Index, Index]
    hidden: tuple[Index, Index]


class GraphSampler:
    """Draws samples. fanout: the most neighbours of a row. num_layers: of the encoder."""

    def __init__(self, graph: ItemGraph, *, num_layers: int, fanout: int) -> None:
        self._graph, self._num_layers, self._fanout = graph, num_layers, fanout
        self._present = np.ones(len(graph.user), dtype=bool)
        self._degrees = [_Degrees(r.other_degree.copy(), r.item_degree.copy()) for r in graph.relations]

    def draw(
        self,
        users: Index,
        fraction: float,
        num_drawn: int,
        generator: np.random.Generator,
        device: torch.device | None = None,
    ) -> Sample:
        """Mask a fraction of the edges of some users (B,), everywhere in the graph. num_drawn: items drawn at random,
        from which those of the masked edges are told apart.
        """
        graph = self._graph
        edge, row = ranges(graph.relations[0].other_start, users)
        drop = generator.random(len(edge)) < fraction
        dropped = edge[drop]
        self._take_out(dropped, -1)
        try:
            drawn = generator.integers(0, graph.num_items, num_drawn)
            told_apart = np.unique(np.concatenate([graph.item[dropped], drawn]))
            items = _first(told_apart, graph.item[edge], graph.num_items)
            place = np.full(graph.num_items, -1, dtype=np.int64)
            place[items] = np.arange(len(items))
            kept = edge[~drop]
            of_users = self._of_users(users, kept, row[~drop], place, len(items))
            reached, rounds = items, []
            for _ in range(self._num_layers - 1):
                reached, hops = self._round(reached, generator)
                rounds.append([_on(hop, device) for hop in hops])
        finally:
            self._take_out(dropped, 1)
        among = place[graph.item[edge]] < len(told_apart)
        wanted, hidden = ((row[part], place[graph.item[edge[part]]]) for part in (drop, among & ~drop))
        part = Subgraph(torch.from_numpy(reached).to(device), rounds[::-1], _moved(of_users, device))
        return Sample(part, items, len(told_apart), wanted, hidden)

    def _take_out(self, edges: Index, by: int) -> None:
        self._present[edges] = by > 0
        for relation, degrees in zip(self._graph.relations[:2], self._degrees[:2], strict=True):
            np.add.at(degrees.other, relation.other[edges], by)
            np.add.at(degrees.item, relation.item[edges], by)

    def _of_users(self, users: Index, edge: Index, row: Index, place: Index, num_items: int) -> Adjacency:
        degrees = self._degrees[0]
        item = self._graph.item[edge]
        value = scale(degrees.other[users])[row] * scale(degrees.item[item])
        return _both_ways(row, place[item], value, len(users), num_items)

    def _round(self, items: Index, generator: np.random.Generator) -> tuple[Index, list[Hop]]:
        """Items to begin with so that vectors of these come out, and the hops between."""
        found = []
        for number, (relation, degrees) in enumerate(zip(self._graph.relations, self._degrees, strict=True)):
            present = self._present if number < 2 else None
            row, at, stands_for = self._sampled(relation.item_start, items, generator)
            pair = relation.by_item[at]
            row, pair, stands_for = _there(present, row, pair, stands_for)
            other, column = np.unique(relation.other[pair], return_inverse=True)
            value = stands_for * scale(degrees.other[other])[column] * scale(degrees.item[items])[row]
            back = _both_ways(column, row, value, len(other), len(items))
            row, pair, stands_for = self._sampled(relation.other_start, other, generator)
            row, pair, stands_for = _there(present, row, pair, stands_for)
            reached = relation.item[pair]
            value = stands_for * scale(degrees.other[other])[row] * scale(degrees.item[reached])
            found.append((row, reached, value, len(other), back))
        wider = _first(items, np.concatenate([reached for _, reached, *_ in found]), self._graph.num_items)
        place = np.full(self._graph.num_items, -1, dtype=np.int64)
        place[wider] = np.arange(len(wider))
        hops = [
            Hop(_both_ways(row, place[reached], value, num_others, len(wider)), back)
            for row, reached, value, num_others, back in found
        ]
        return wider, hops

    def _sampled(self, start: Index, rows: Index, generator: np.random.Generator) -> tuple[Index, Index, Floats]:
        """(row, place, of how many) of neighbours."""
        length = np.minimum(start[rows + 1] - start[rows], self._fanout)
        out_start = np.concatenate([[0], np.cumsum(length)])
        at, stands_for = np.empty(out_start[-1], dtype=np.int64), np.empty(out_start[-1], dtype=np.float32)
        sample_rows(start, rows, self._fanout, generator.integers(2**62), out_start, at, stands_for)
        return np.repeat(np.arange(len(rows)), length), at, stands_for


class _Degrees(NamedTuple):
    other: Index
    item: Index


def ranges(start: Index, rows: Index) -> tuple[Index, Index]:
    """Places of all entries of some rows, and the place of the row of each. start: where a row's entries begin."""
    length = start[rows + 1] - start[rows]
    row = np.repeat(np.arange(len(rows)), length)
    begin = np.cumsum(length) - length
    return np.arange(len(row)) + (start[rows] - begin)[row], row


def _first(items: Index, more: Index, num_items: int) -> Index:
    """These, in their order, then what else there is."""
    others = np.zeros(num_items, dtype=bool)
    others[more] = True
    others[items] = False
    return np.concatenate([items, np.flatnonzero(others)])


def _there(present: Flags | None, row: Index, pair: Index, stands_for: Floats) -> tuple[Index, Index, Floats]:
    if present is None:
        return row, pair, stands_for
    kept = present[pair]
    return row[kept], pair[kept], stands_for[kept]


def _both_ways(other: Index, item: Index, value: Floats, num_others: int, num_items: int) -> Adjacency:
    matrix = sp.csr_matrix((value, (other, item)), (num_others, num_items))
    turned = matrix.tocsc()
    return Adjacency(
        torch_csr(matrix.indptr, matrix.indices, matrix.data, num_items),
        torch_csr(turned.indptr, turned.indices, turned.data, num_others),
    )


def _moved(adjacency: Adjacency, device: torch.device | None) -> Adjacency:
    return Adjacency(*(matrix.to(device) for matrix in adjacency))


def _on(hop: Hop, device: torch.device | None) -> Hop:
    return Hop(*(_moved(adjacency, device) for adjacency in hop))
