"""The compiled loops of the engine: fold events into states, read features from them, sweep a history.

Batch and stream run the very same `fold` and `read`, so their results are equal to the bit. A state is one row of
float64 whose slots `Program` describes; times are kept in the same row as int64, by a second view of its memory, since
microseconds of far years do not fit a float exactly.

Ties. A feature at time t uses events strictly earlier than t, also online, where an event of the very instant t
may have been folded already. So beside every newest tile, decay and latest value lies what it was before the entity's
newest instant; reading at exactly that instant uses those.
"""

# N events, C inputs, S slots of a state, Q queries, F features

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Slots at the start of every state, as int64.
POSITION, LAST_TIME, HEADER = 0, 1, 2
NEVER = np.iinfo(np.int64).min

# What a component accumulates over a tile.
COUNT, SUM, MIN, MAX, MOMENTS = range(5)
# What a feature reads.
(
    TILE_COUNT, TILE_SUM, TILE_MEAN, TILE_STD, TILE_MIN, TILE_MAX, TILE_RATE,
    EXACT_COUNT, EXACT_SUM, EXACT_MEAN, EXACT_STD, EXACT_MIN, EXACT_MAX, EXACT_RATE,
    LATEST, SINCE, DISTINCT, DECAY,
) = range(18)  # fmt: skip


class Program(NamedTuple):
    """Where everything lies in a state, as arrays that compiled code takes.

    groups (G, 5): width of a tile in µs, number of tiles, slot of the newest tile's number (its place in the rings
        follows), first component, one past the last.
    components (M, 4): input, kind, first slot, slots a tile (3 for MOMENTS: count, mean, M2). After the ring of tiles
        comes the newest tile as it was before the newest instant. Those of one group lie together.
    decays (D, 2): input, slot of the value, followed by the value before the newest instant. half_lives (D,): µs.
    latest (L, 3): input that says whether an event counts, input of the value or -1, first of 4 slots: time,
        value, time before, value before.
    distinct (K, 3): input, first slot, capacity; 3 slots an entry: value, last seen, seen before.
    buffers (B, 3): first slot, capacity, width; a count, then rows of time and inputs, oldest first.
    buffer_inputs (B, W): inputs kept, padded with -1.
    features (F, 5): what to read, then its arguments. scale (F,): factor of a rate.
    """

    groups: Ints
    components: Ints
    decays: Ints
    half_lives: Floats
    latest: Ints
    distinct: Ints
    buffers: Ints
    buffer_inputs: Ints
    features: Ints
    scale: Floats


def _compiled(function: _Function) -> _Function:
    return cast(_Function, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


@_compiled
def _empty_slots(state: Floats, kind: int, first: int, end: int) -> None:
    empty = np.inf if kind == MIN else -np.inf if kind == MAX else 0.0
    for slot in range(first, end):
        state[slot] = empty


@_compiled
def clear(groups: Ints, components: Ints, latest: Ints, distinct: Ints, state: Floats, times: Ints) -> None:
    """Make a state that of an entity never seen. times: the same memory as int64."""
    state[:] = 0.0
    times[POSITION] = -1
    times[LAST_TIME] = NEVER
    for g in range(len(groups)):
        num_tiles = groups[g, 1]
        for m in range(groups[g, 3], groups[g, 4]):
            start = components[m, 2]
            _empty_slots(state, components[m, 1], start, start + components[m, 3] * (num_tiles + 1))
    for n in range(len(latest)):
        slot = latest[n, 2]
        times[slot], times[slot + 2] = NEVER, NEVER
        state[slot + 1], state[slot + 3] = np.nan, np.nan
    for k in range(len(distinct)):
        slot = distinct[k, 1]
        for entry in range(distinct[k, 2]):
            times[slot + 3 * entry + 1], times[slot + 3 * entry + 2] = NEVER, NEVER


@_compiled
def _add_to_tile(state: Floats, kind: int, slot: int, value: float) -> None:
    if kind == COUNT:
        state[slot] += 1.0
    elif kind == SUM:
        state[slot] += value
    elif kind == MIN:
        state[slot] = min(state[slot], value)
    elif kind == MAX:
        state[slot] = max(state[slot], value)
    else:  # Welford 1962: no cancellation, whatever the mean
        count = state[slot] + 1.0
        delta = value - state[slot + 1]
        state[slot] = count
        state[slot + 1] += delta / count
        state[slot + 2] += delta * (value - state[slot + 1])


@_compiled
def _advance_group(
    groups: Ints, components: Ints, g: int, state: Floats, times: Ints, tile: int, is_first: bool
) -> None:
    """Make `tile` the newest: what leaves the rings becomes empty, what was newest is kept as 'before'."""
    num_tiles, slot = groups[g, 1], groups[g, 2]
    steps = num_tiles if is_first else min(tile - times[slot], num_tiles)
    place = times[slot + 1]
    for m in range(groups[g, 3], groups[g, 4]):
        kind, start, stride = components[m, 1], components[m, 2], components[m, 3]
        before = start + stride * num_tiles
        if steps == 0:
            for i in range(stride):
                state[before + i] = state[start + stride * place + i]
        else:
            _empty_slots(state, kind, before, before + stride)
            at = place
            for _ in range(steps):
                at = 0 if at + 1 == num_tiles else at + 1
                _empty_slots(state, kind, start + stride * at, start + stride * (at + 1))
    times[slot] = tile
    times[slot + 1] = (place + steps) % num_tiles


@_compiled
def _fold_tiles(groups: Ints, components: Ints, state: Floats, times: Ints, time_us: int, inputs: Floats) -> None:
    last = times[LAST_TIME]
    for g in range(len(groups)):
        num_tiles, slot = groups[g, 1], groups[g, 2]
        tile = time_us // groups[g, 0]
        if time_us > last:
            _advance_group(groups, components, g, state, times, tile, last == NEVER)
        age = times[slot] - tile
        if age >= num_tiles:
            continue
        place = times[slot + 1] - age
        if place < 0:
            place += num_tiles
        for m in range(groups[g, 3], groups[g, 4]):
            value = inputs[components[m, 0]]
            if not np.isnan(value):
                kind, start, stride = components[m, 1], components[m, 2], components[m, 3]
                _add_to_tile(state, kind, start + stride * place, value)
                if age == 0 and time_us < last:
                    _add_to_tile(state, kind, start + stride * num_tiles, value)


@_compiled
def _fold_decays(decays: Ints, half_lives: Floats, state: Floats, times: Ints, time_us: int, inputs: Floats) -> None:
    last = times[LAST_TIME]
    for d in range(len(decays)):
        slot = decays[d, 1]
        if time_us > last:
            if last != NEVER:
                state[slot] *= np.exp2(-float(time_us - last) / half_lives[d])
            state[slot + 1] = state[slot]
        value = inputs[decays[d, 0]]
        if np.isnan(value):
            continue
        if time_us < last:
            value *= np.exp2(-float(last - time_us) / half_lives[d])
            state[slot + 1] += value
        state[slot] += value


@_compiled
def _fold_latest(latest: Ints, state: Floats, times: Ints, time_us: int, inputs: Floats) -> None:
    for n in range(len(latest)):
        column, slot = latest[n, 1], latest[n, 2]
        if np.isnan(inputs[latest[n, 0]]):
            continue
        value = np.nan if column < 0 else inputs[column]
        if time_us > times[slot]:
            times[slot + 2], state[slot + 3] = times[slot], state[slot + 1]
            times[slot], state[slot + 1] = time_us, value
        elif time_us == times[slot]:
            state[slot + 1] = value  # of one instant, the last that arrived
        elif time_us >= times[slot + 2]:
            times[slot + 2], state[slot + 3] = time_us, value


@_compiled
def _fold_distinct(distinct: Ints, state: Floats, times: Ints, time_us: int, inputs: Floats) -> None:
    for k in range(len(distinct)):
        start, capacity = distinct[k, 1], distinct[k, 2]
        value = inputs[distinct[k, 0]]
        if np.isnan(value):
            continue
        place, oldest = -1, start
        for slot in range(start, start + 3 * capacity, 3):
            if times[slot + 1] == NEVER:
                oldest = slot  # entries fill up in order, so all that follow are free too
                break
            if state[slot] == value:
                place = slot
                break
            if times[slot + 1] < times[oldest + 1]:
                oldest = slot
        if place >= 0:
            if time_us > times[place + 1]:
                times[place + 2] = times[place + 1]
                times[place + 1] = time_us
            elif times[place + 2] < time_us < times[place + 1]:
                times[place + 2] = time_us
        elif time_us >= times[oldest + 1]:
            # The entry seen longest ago makes room, so the newest `capacity` values are known.
            state[oldest] = value
            times[oldest + 1], times[oldest + 2] = time_us, NEVER


@_compiled
def _fold_buffers(buffers: Ints, buffer_inputs: Ints, state: Floats, times: Ints, time_us: int, inputs: Floats) -> None:
    for b in range(len(buffers)):
        start, capacity, width = buffers[b, 0], buffers[b, 1], buffers[b, 2]
        counts = False
        for w in range(width - 1):
            counts = counts or not np.isnan(inputs[buffer_inputs[b, w]])
        if not counts:
            continue
        num, first = times[start], start + 1
        place = num
        while place > 0 and times[first + (place - 1) * width] > time_us:
            place -= 1
        if num == capacity:
            if place == 0:
                continue  # older than all that is kept
            place -= 1
            for slot in range(first, first + place * width):
                times[slot] = times[slot + width]
        else:
            for slot in range(first + num * width - 1, first + place * width - 1, -1):
                times[slot + width] = times[slot]
            times[start] = num + 1
        slot = first + place * width
        times[slot] = time_us
        for w in range(width - 1):
            state[slot + 1 + w] = inputs[buffer_inputs[b, w]]


@_compiled
def fold(
    groups: Ints,
    components: Ints,
    decays: Ints,
    half_lives: Floats,
    latest: Ints,
    distinct: Ints,
    buffers: Ints,
    buffer_inputs: Ints,
    state: Floats,
    times: Ints,
    time_us: int,
    inputs: Floats,
) -> None:
    """Add one event. inputs (C,): NaN where the event does not count for that input."""
    _fold_tiles(groups, components, state, times, time_us, inputs)
    _fold_decays(decays, half_lives, state, times, time_us, inputs)
    _fold_latest(latest, state, times, time_us, inputs)
    _fold_distinct(distinct, state, times, time_us, inputs)
    _fold_buffers(buffers, buffer_inputs, state, times, time_us, inputs)
    times[LAST_TIME] = max(times[LAST_TIME], time_us)


@_compiled
def _merge_moments(state: Floats, slot: int, count: float, mean: float, spread: float) -> tuple[float, float, float]:
    """Chan, Golub and LeVeque 1983: the moments of two sets together."""
    more = state[slot]
    if more == 0.0:
        return count, mean, spread
    total = count + more
    delta = state[slot + 1] - mean
    return (
        total,
        mean + delta * more / total,
        spread + state[slot + 2] + delta * delta * count * more / total,
    )


@_compiled
def _read_component(components: Ints, m: int, state: Floats, newest_slot: int, older: int, place: int,
                    num_tiles: int, totals: Floats) -> None:  # fmt: skip
    """Combine the newest tile, if newest_slot >= 0, with so many older ones: totals[m] = (value, M2)."""
    kind, start, stride = components[m, 1], components[m, 2], components[m, 3]
    total = np.inf if kind == MIN else -np.inf if kind == MAX else 0.0
    mean, spread = 0.0, 0.0
    # Older tiles lie at the end of the ring and then before `place`: two runs. Oldest first, so that the sum is the
    # same to the bit however the ring is turned, which depends on the order in which events came.
    for run in range(3):
        if run == 0:
            first, end = num_tiles - (older - min(older, place)), num_tiles
        elif run == 1:
            first, end = place - min(older, place), place
        else:
            first, end = newest_slot, newest_slot + (1 if newest_slot >= 0 else 0)
        if kind == MIN:
            for tile in range(first, end):
                total = min(total, state[start + tile])
        elif kind == MAX:
            for tile in range(first, end):
                total = max(total, state[start + tile])
        elif kind == MOMENTS:
            for tile in range(first, end):
                total, mean, spread = _merge_moments(state, start + stride * tile, total, mean, spread)
        else:
            for tile in range(first, end):
                total += state[start + tile]
    totals[m, 0], totals[m, 1] = total, spread


@_compiled
def _read_tiles(groups: Ints, components: Ints, state: Floats, times: Ints, time_us: int, totals: Floats) -> None:
    """Every component over the window that ends at time_us."""
    last = times[LAST_TIME]
    for g in range(len(groups)):
        num_tiles, slot = groups[g, 1], groups[g, 2]
        later = num_tiles if last == NEVER else time_us // groups[g, 0] - times[slot]
        # In the ring: the newest tile and num_tiles - 1 older ones. A window that ends `later` tiles after the
        # newest has lost that many of the oldest; one that ends before it has never had the newest.
        older = num_tiles - 1 - later if later >= 0 else num_tiles - 1
        newest_slot = times[slot + 1]
        if later >= num_tiles:
            newest_slot, older = -1, 0
        elif later >= 0 and time_us <= last:
            newest_slot = num_tiles  # the newest tile as it was before the newest instant
        place = times[slot + 1]
        if later < 0:
            newest_slot = -1
            skipped = min(-later - 1, older)  # tiles between the asked one and the newest
            older -= skipped
            place -= skipped
            if place < 0:
                place += num_tiles
        for m in range(groups[g, 3], groups[g, 4]):
            _read_component(components, m, state, newest_slot, older, place, num_tiles, totals)


@_compiled
def _window_start(time_us: int, window_us: int, tile_us: int) -> int:
    """First instant in the window. tile_us 0: exact edges."""
    return time_us - window_us if tile_us == 0 else time_us // tile_us * tile_us - window_us + tile_us


@_compiled
def _read_exact(
    buffers: Ints, features: Ints, f: int, state: Floats, times: Ints, time_us: int, window_us: int
) -> tuple[float, float, float, float, float]:
    """(count, sum, M2, least, greatest) of one input over [time - window, time), newest events first."""
    buffer = features[f, 1]
    start, width = buffers[buffer, 0], buffers[buffer, 2]
    offset = 1 + features[f, 2]
    count, total, mean, spread, least, greatest = 0.0, 0.0, 0.0, 0.0, np.inf, -np.inf
    first, num = start + 1, times[start]
    for row in range(num - 1, -1, -1):
        slot = first + row * width
        if times[slot] >= time_us:
            continue
        if times[slot] < time_us - window_us:
            break
        value = state[slot + offset]
        if np.isnan(value):
            continue
        count += 1.0
        total += value
        delta = value - mean
        mean += delta / count
        spread += delta * (value - mean)
        least, greatest = min(least, value), max(greatest, value)
    return count, total, spread, least, greatest


@_compiled
def _finish(kind: int, value: float, count: float, spread: float, scale: float) -> float:
    """From the parts to the aggregate: a mean of nothing, a spread of nothing, a rate over nothing are missing."""
    if kind in (TILE_MEAN, EXACT_MEAN):
        return value / count if count > 0 else np.nan
    if kind in (TILE_STD, EXACT_STD):
        return np.sqrt(spread / count) if count > 0 else np.nan
    if kind in (TILE_RATE, EXACT_RATE):
        return np.nan if count == 0 else value / count * scale
    return value if np.isfinite(value) else np.nan


@_compiled
def _read_exact_window(
    buffers: Ints, features: Ints, scale: Floats, f: int, state: Floats, times: Ints, time_us: int
) -> float:
    kind = features[f, 0]
    count, total, spread, least, greatest = _read_exact(buffers, features, f, state, times, time_us, features[f, 3])
    if kind == EXACT_RATE:
        _, count, _, _, _ = _read_exact(buffers, features, f, state, times, time_us, features[f, 4])
    elif kind == EXACT_COUNT:
        total = count
    elif kind == EXACT_MIN:
        total = least
    elif kind == EXACT_MAX:
        total = greatest
    return _finish(kind, total, count, spread, scale[f])


@_compiled
def _read_latest(latest: Ints, features: Ints, f: int, state: Floats, times: Ints, time_us: int) -> float:
    slot = latest[features[f, 1], 2]
    if times[slot] >= time_us:
        slot += 2
    seen = times[slot]
    if seen == NEVER or seen >= time_us:
        return np.nan
    window_us = features[f, 2]
    if window_us > 0 and seen < _window_start(time_us, window_us, features[f, 3]):
        return np.nan
    return float(time_us - seen) / 1e6 if features[f, 0] == SINCE else state[slot + 1]


@_compiled
def _read_distinct(distinct: Ints, features: Ints, f: int, times: Ints, time_us: int) -> float:
    k = features[f, 1]
    first, capacity = distinct[k, 1], distinct[k, 2]
    start = _window_start(time_us, features[f, 2], features[f, 3])
    num = 0.0
    for slot in range(first, first + 3 * capacity, 3):
        if times[slot + 1] == NEVER:
            break
        seen = times[slot + 1] if times[slot + 1] < time_us else times[slot + 2]
        if seen != NEVER and start <= seen < time_us:
            num += 1.0
    return num


@_compiled
def read(
    groups: Ints,
    components: Ints,
    decays: Ints,
    half_lives: Floats,
    latest: Ints,
    distinct: Ints,
    buffers: Ints,
    features: Ints,
    scale: Floats,
    state: Floats,
    times: Ints,
    time_us: int,
    totals: Floats,
    out: Floats,
) -> None:
    """Every feature (F,) at time_us, from events strictly earlier. totals (M, 2): scratch.

    A time before the entity's newest instant is answered as well as the state can: exact if no event lies between,
    else within one tile.
    """
    last = times[LAST_TIME]
    _read_tiles(groups, components, state, times, time_us, totals)
    for f in range(len(features)):
        kind, which = features[f, 0], features[f, 1]
        if kind == DECAY:
            slot = decays[which, 1]
            if last == NEVER:
                out[f] = 0.0
            else:
                value = state[slot] if time_us > last else state[slot + 1]
                out[f] = value * np.exp2(-float(time_us - last) / half_lives[which])
        elif kind == DISTINCT:
            out[f] = _read_distinct(distinct, features, f, times, time_us)
        elif kind >= LATEST:
            out[f] = _read_latest(latest, features, f, state, times, time_us)
        elif kind >= EXACT_COUNT:
            out[f] = _read_exact_window(buffers, features, scale, f, state, times, time_us)
        else:
            count = totals[features[f, 2], 0] if kind in (TILE_MEAN, TILE_RATE) else totals[which, 0]
            out[f] = _finish(kind, totals[which, 0], count, totals[which, 1], scale[f])


# What Python calls takes the arrays one by one: a named tuple as an argument costs 50 µs of type checks a call.


@_compiled
def _clear_all(
    groups: Ints, components: Ints, decays: Ints, half_lives: Floats, latest: Ints, distinct: Ints, buffers: Ints,
    buffer_inputs: Ints, features: Ints, scale: Floats, states: Floats, times: Ints,
) -> None:  # fmt: skip
    for i in range(len(states)):
        clear(groups, components, latest, distinct, states[i], times[i])


@_compiled
def _fold_all(
    groups: Ints, components: Ints, decays: Ints, half_lives: Floats, latest: Ints, distinct: Ints, buffers: Ints,
    buffer_inputs: Ints, features: Ints, scale: Floats, states: Floats, times: Ints,
    rows: Ints, time_us: Ints, positions: Ints, inputs: Floats,
) -> int:  # fmt: skip
    num_new = 0
    for i in range(len(rows)):
        row = rows[i]
        if positions[i] >= 0:
            if positions[i] <= times[row, POSITION]:
                continue
            times[row, POSITION] = positions[i]
        fold(
            groups,
            components,
            decays,
            half_lives,
            latest,
            distinct,
            buffers,
            buffer_inputs,
            states[row],
            times[row],
            time_us[i],
            inputs[i],
        )
        num_new += 1
    return num_new


@_compiled
def _read_all(
    groups: Ints, components: Ints, decays: Ints, half_lives: Floats, latest: Ints, distinct: Ints, buffers: Ints,
    buffer_inputs: Ints, features: Ints, scale: Floats, states: Floats, times: Ints, time_us: Ints, out: Floats,
) -> None:  # fmt: skip
    totals = np.empty((len(components) + 1, 2))
    for i in range(len(states)):
        read(
            groups,
            components,
            decays,
            half_lives,
            latest,
            distinct,
            buffers,
            features,
            scale,
            states[i],
            times[i],
            time_us[i],
            totals,
            out[i],
        )


@_compiled
def _sweep(
    groups: Ints, components: Ints, decays: Ints, half_lives: Floats, latest: Ints, distinct: Ints, buffers: Ints,
    buffer_inputs: Ints, features: Ints, scale: Floats, first: int, end: int,
    event_bounds: Ints, event_order: Ints, event_us: Ints, inputs: Floats,
    query_bounds: Ints, query_order: Ints, query_us: Ints, state: Floats, times: Ints, out: Floats, states: Floats,
) -> None:  # fmt: skip
    totals = np.empty((len(components) + 1, 2))
    for entity in range(first, end):
        clear(groups, components, latest, distinct, state, times)
        event, last_event = event_bounds[entity], event_bounds[entity + 1]
        for query in range(query_bounds[entity], query_bounds[entity + 1]):
            asked = query_order[query]
            moment = query_us[asked]
            while event < last_event and event_us[event_order[event]] < moment:
                row = event_order[event]
                fold(
                    groups,
                    components,
                    decays,
                    half_lives,
                    latest,
                    distinct,
                    buffers,
                    buffer_inputs,
                    state,
                    times,
                    event_us[row],
                    inputs[row],
                )
                event += 1
            read(
                groups,
                components,
                decays,
                half_lives,
                latest,
                distinct,
                buffers,
                features,
                scale,
                state,
                times,
                moment,
                totals,
                out[asked],
            )
        if entity < len(states):
            while event < last_event:
                row = event_order[event]
                fold(
                    groups,
                    components,
                    decays,
                    half_lives,
                    latest,
                    distinct,
                    buffers,
                    buffer_inputs,
                    state,
                    times,
                    event_us[row],
                    inputs[row],
                )
                event += 1
            states[entity] = state


def clear_all(program: Program, states: Floats) -> None:
    """Make every state (N, S) that of an entity never seen."""
    _clear_all(*program, states, states.view(np.int64))


def fold_all(program: Program, states: Floats, rows: Ints, time_us: Ints, positions: Ints, inputs: Floats) -> int:
    """Add N events, in order, to the states of their rows; returns how many were new.

    positions (N,): ascending places in the event log; a state that has seen a place skips it, so a replay after a
    crash counts nothing twice. Negative: not from a log.
    """
    return _fold_all(*program, states, states.view(np.int64), rows, time_us, positions, inputs)


def read_all(program: Program, states: Floats, time_us: Ints, out: Floats) -> None:
    """Features (N, F) of N states, each at its own time."""
    _read_all(*program, states, states.view(np.int64), time_us, out)


class Replay(NamedTuple):
    """Events and queries, each ordered by (entity, time).

    event_bounds (V + 1,) into event_order, which lists rows of the events; query_bounds, query_order likewise.
    """

    event_bounds: Ints
    event_order: Ints
    event_us: Ints
    inputs: Floats
    query_bounds: Ints
    query_order: Ints
    query_us: Ints


def sweep(program: Program, first: int, end: int, replay: Replay, scratch: Floats, out: Floats, states: Floats) -> None:
    """Replay entities `first` to `end`: before each query, fold all events strictly earlier, then read.

    scratch (S,): a state to work in. out (Q, F). states: where final states of the first entities go; may be empty.
    """
    _sweep(*program, first, end, *replay, scratch, scratch.view(np.int64), out, states)
