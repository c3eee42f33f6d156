"""A day of traffic replayed against scaling rules: replicas, their use, and requests that waited too long.

Simulated, second by second, since no machine here has thirty cores: replicas answer in batches as `scaling` models
them, with what calls were measured to take; one that is asked for answers after 15 seconds. The traffic is that of the
payments of IEEE-CIS, minute by minute, scaled to a peak of so many requests a second, arrivals drawn at random
(Poisson), with four bursts of 1.6 times the load a day that build up within a minute. Sides: as many replicas as the
day needs at its worst, all day; Ray Serve's own policy (its code), with the target, out of seven, that needed the
fewest replica-hours on the day before without more requests late than fixed; ours with its defaults, which were chosen
on the first day. Every number is of the days after. Late: waited longer than 250 ms.

    assay bench serving_day [--json] [--peak 50000] [--days 5]
"""

import argparse
import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row, spread

DAY_S, DECIDE_S, LATE_S, BURST, NUM_BURSTS = 86_400, 5, 0.25, 1.6, 4
TARGETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
MOST = 200


@dataclass
class Seen:
    """What a side did with a day. late: share of the requests. peak_use: of what replicas could do, in the busiest
    hour. most: replicas.
    """

    replica_hours: float
    late: float
    peak_use: float
    most: int


def days_of(peak: float, num: int) -> list[np.ndarray]:
    """Requests in each second, of days that follow one another."""
    from assay_pipelines.datasets.catalogue import EVENTS, get_dataset
    from assay_platform.config import load_config

    folder = get_dataset("ieee-cis", load_config().paths.data)
    seconds = pd.read_parquet(folder / EVENTS, columns=["TransactionDT"])["TransactionDT"].to_numpy()
    first = int(seconds.min()) // DAY_S + 30
    days = []
    for number in range(num):
        rng = np.random.default_rng(number)
        of_day = seconds[(seconds // DAY_S) == first + number] % DAY_S
        minutes = np.bincount(of_day // 60, minlength=DAY_S // 60).astype(float)
        kernel = np.hanning(61)
        smooth = np.convolve(np.concatenate([minutes[-30:], minutes, minutes[:30]]), kernel / kernel.sum(), "valid")
        rate = np.interp(np.arange(DAY_S), 60.0 * np.arange(len(smooth)), smooth)
        rate *= peak / rate.max()
        for begin in rng.integers(0, DAY_S - 600, NUM_BURSTS):
            shape = np.interp(np.arange(300), [0, 60, 240, 300], [1.0, BURST, BURST, 1.0])
            rate[begin : begin + 300] *= shape
        days.append(rng.poisson(rate).astype(float))
    return days


def replay(day: np.ndarray, rule: Any, decide: Callable[[Any, float, int, int], int], start: int) -> Seen:
    """decide: now, what is under way, replicas that answer, replicas that were asked for → wanted."""
    ready, waiting, asked = start, 0.0, deque[int]()
    late = hours = 0.0
    used, had, most = np.zeros(24), np.zeros(24), start
    for second, coming in enumerate(day):
        while asked and asked[0] <= second:
            asked.popleft()
            ready += 1
        can = ready * rule.capacity
        if not ready or waiting / can > LATE_S:
            late += coming
        served = min(waiting + coming, can)
        waiting += coming - served
        hour = second * 24 // DAY_S
        used[hour] += served
        had[hour] += (ready + len(asked)) * rule.capacity
        hours += (ready + len(asked)) / 3600.0
        if second % DECIDE_S == 0:
            rate = min(coming, 0.999 * can)
            each = rate / ready if ready else 0.0
            under_way = waiting + (ready * 1.5 * rule.fixed_s * each / (1 - rule.a_row_s * each) if ready else coming)
            wanted = decide(float(second), under_way, ready, ready + len(asked))
            while ready + len(asked) > wanted and asked:
                asked.pop()
            ready = min(ready, wanted)
            asked.extend([second + math.ceil(rule.start_s)] * (wanted - ready - len(asked)))
            most = max(most, wanted)
    busiest = int(used.argmax())
    return Seen(hours, late / day.sum(), used[busiest] / had[busiest], most)


def ours(rule: Any) -> Callable[[float, float, int, int], int]:
    """The rule with what it has seen."""
    from assay_services.scaling import Load

    seen: deque[Any] = deque()

    def decide(now: float, under_way: float, ready: int, _: int) -> int:
        seen.append(Load(now, under_way, ready))
        while seen[0].at_s < now - rule.memory_s:
            seen.popleft()
        return int(rule.wanted(list(seen)))

    return decide


def of_ray(target: float) -> Callable[[float, float, int, int], int]:
    """Ray Serve's default policy, with its default delays and factors."""
    from ray.serve.autoscaling_policy import default_autoscaling_policy
    from ray.serve.config import AutoscalingConfig

    config = AutoscalingConfig(min_replicas=1, max_replicas=MOST, target_ongoing_requests=target)
    state: dict[str, Any] = {}

    def decide(now: float, under_way: float, ready: int, asked: int) -> int:
        nonlocal state
        context = SimpleNamespace(
            total_num_requests=under_way, current_num_replicas=max(1, ready), target_num_replicas=asked,
            capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=MOST, config=config, policy_state=state,
            current_time=now, running_replicas=[None] * max(1, ready), total_queued_requests=0.0,
        )  # fmt: skip
        wanted, state = default_autoscaling_policy(context)
        return max(1, min(MOST, int(wanted)))

    return decide


def fixed(day: np.ndarray, rule: Any) -> tuple[int, Seen]:
    """As few as the day can do with, none late."""
    for number in range(max(1, math.floor(day.mean() / rule.capacity)), MOST):
        seen = replay(day, rule, lambda *_, number=number: number, number)
        if seen.late == 0.0:
            return number, seen
    raise SystemExit("no number of replicas is enough")


def main() -> None:
    """Choose on a day, replay the next one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=50_000.0)
    parser.add_argument("--days", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    from assay_services.scaling import ScalingRule

    rule = ScalingRule(max_replicas=MOST)
    days = days_of(call.peak, call.days + 1)
    found: dict[str, list[Seen]] = {"ours": [], "fixed": [], "ray": []}
    for before, day in pairwise(days):
        number, with_fixed = fixed(day, rule)
        allowed = replay(before, rule, lambda *_, number=number: number, number).late
        tried = {target: replay(before, rule, of_ray(target), number) for target in TARGETS}
        fit = {t: s for t, s in tried.items() if s.late <= allowed} or {min(tried, key=lambda t: tried[t].late): None}
        target = min(fit, key=lambda t: tried[t].replica_hours)
        found["fixed"].append(with_fixed)
        found["ours"].append(replay(day, rule, ours(rule), rule.replicas_for(day[:60].mean())))
        found["ray"].append(replay(day, rule, of_ray(target), rule.replicas_for(day[:60].mean())))
        for name, seen in found.items():
            print(name, seen[-1], f"target {target}" if name == "ray" else "", flush=True)
    saved = [1 - a.replica_hours / b.replica_hours for a, b in zip(found["ours"], found["fixed"], strict=True)]
    theirs = [1 - a.replica_hours / b.replica_hours for a, b in zip(found["ray"], found["fixed"], strict=True)]
    late, late_of_ray = [1e6 * s.late for s in found["ours"]], [1e6 * s.late for s in found["ray"]]
    use, use_of_ray = [s.peak_use for s in found["ours"]], [s.peak_use for s in found["ray"]]
    more: dict[str, Any] = {"peer_name": "Ray Serve's policy", "runs": call.days}
    finish("serving_day", [
        row("replica-hours saved, of fixed", median(saved), "", peer=median(theirs), limit=0.65, limit_name="target",
            higher_is_better=True, spread=spread(saved), **more),
        row("use of replicas in the busiest hour", median(use), "", peer=median(use_of_ray), limit=0.9,
            limit_name="target", higher_is_better=True, spread=spread(use), **more),
        row("requests late, of a million", median(late), "", peer=median(late_of_ray), limit=0.0, limit_name="fixed",
            **more),
        row("fixed: use in the busiest hour", median([s.peak_use for s in found["fixed"]]), "", runs=call.days),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
