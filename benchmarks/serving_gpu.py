"""Batches of the recommender's sequence model on one GPU: how busy it is, and how long callers wait.

The encoder of `models/sequence.py`, four blocks 512 wide over the latest 500 events of a user, and the best hundred of
a million items by its vectors, in float32 as it is trained. Each request is a user, who has 50 to 500 events; they come
at random moments (Poisson) at a given rate. Three ways to batch: the service's queue (`batching.py`, two threads, so
that one makes a batch ready while the GPU works on the other's), one request a call, and 32 requests a call as they
come in. For each the highest rate at which 99 of 100 requests are answered in time, how busy the GPU is there (its own
counter, and the time in which a batch was under way by events of CUDA), and what callers wait at lower rates. Answers
are compared with those that each user gets alone.

    python benchmarks/serving_gpu.py [--json] [--seconds 4] [--bound-ms 100] [--items 1000000]
"""

import argparse
import asyncio
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assay_platform.models.histories import Histories
from assay_platform.models.sequence import SequenceConfig, SequenceEncoder
from assay_services.batching import Batcher, BatchLimits, DeadlinePassedError, OverloadedError

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

WIDTH, LENGTH, BLOCKS, HEADS, BEST = 512, 500, 4, 8, 100
NUM_USERS, COMPARED = 2000, 64
FIXED = 32
DEVICE = "cuda"

User = tuple[np.ndarray, np.ndarray]


class OnGpu:
    """Users → their best items. Called by several threads, each with a stream of its own."""

    def __init__(self, num_items: int) -> None:
        generator = np.random.default_rng(0)
        vectors = generator.standard_normal((num_items, WIDTH), dtype=np.float32)
        config = SequenceConfig(length=LENGTH, num_blocks=BLOCKS, num_heads=HEADS)
        torch.manual_seed(0)
        self.encoder = SequenceEncoder(vectors, config).to(DEVICE).eval().requires_grad_(False)
        self.items = self.encoder.item_vectors().contiguous()
        self.stacked = torch.cat([self.items, self.encoder.bias_I[:, None]], dim=1).T.contiguous()
        self.begin = torch.cuda.Event(enable_timing=True)
        self.begin.record()
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._local = threading.local()

    @torch.inference_mode()
    def __call__(self, _: object, users: Sequence[User]) -> list[np.ndarray]:
        """The best items of each, best first."""
        stream = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = torch.cuda.Stream()
        # In order already, user by user and by time.
        item, at = (np.concatenate(of) for of in zip(*users, strict=True))
        start = np.concatenate([[0], np.cumsum([len(one) for one, _ in users])])
        nothing = np.ones(len(item), np.float32), np.zeros(len(users), np.int64)
        histories = Histories(start, item, at, *nothing)
        with torch.cuda.stream(stream):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            scores = self.encoder.vectors(histories, self.items) @ self.stacked
            best = scores.topk(BEST, dim=1).indices
            last.record()
            found = best.cpu().numpy()
        self.spans.append((first, last))
        return list(found)

    def busy(self, since: float, until: float) -> float:
        """Share of the time in which a batch was under way. Seconds after `begin`."""
        torch.cuda.synchronize()
        ends = sorted((self.begin.elapsed_time(a) / 1e3, self.begin.elapsed_time(b) / 1e3) for a, b in self.spans)
        total, reached = 0.0, since
        for a, b in ends:
            total += max(0.0, min(b, until) - max(a, reached))
            reached = max(reached, min(b, until))
        return total / (until - since)


def users(num_items: int) -> list[User]:
    """Made up, the same each time."""
    generator = np.random.default_rng(1)
    made = []
    for _ in range(NUM_USERS):
        length = int(generator.integers(50, LENGTH + 1))
        times = np.cumsum(generator.integers(1, 86_400, length)).astype(np.int64) * 1_000_000
        made.append((generator.integers(0, num_items, length), times))
    return made


class FixedBatches:
    """So many requests a call, whatever that takes."""

    def __init__(self, work: OnGpu, size: int) -> None:
        self._work, self._size = work, size
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(2)]
        self._collecting = threading.Lock()
        for thread in self._threads:
            thread.start()

    async def submit(self, job: User, *, rows: int) -> np.ndarray:
        """The answer."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[np.ndarray] = loop.create_future()
        self._waiting.put((job, loop, future))
        return await future

    def close(self) -> None:
        """Whoever waits for company waits in vain."""
        for _ in range(2 * self._size):
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._collecting:
                taken = [self._waiting.get() for _ in range(self._size)]
            if None in taken:
                return
            answers = self._work(None, [job for job, *_ in taken])
            for (_, loop, future), answer in zip(taken, answers, strict=True):
                with suppress(RuntimeError):  # of a loop that has ended, and with it whoever waited
                    loop.call_soon_threadsafe(lambda f=future, a=answer: f.done() or f.set_result(a))


def make(kind: str, work: OnGpu, bound_s: float) -> Any:
    """A way to batch."""
    if kind == "ours":
        # A request waits for what is under way, for its own batch to be made ready, and for its batch.
        limits = BatchLimits(max_batch_s=0.3 * bound_s, max_wait_s=0.6 * bound_s)
        return Batcher(work, limits, name="gpu", num_threads=2)
    return FixedBatches(work, 1 if kind == "one" else FIXED)


async def offered(batches: Any, asked: list[User], rate: float, seconds: float) -> tuple[np.ndarray, int]:
    """Seconds of each answer from when it was due, and how many were refused or never came."""
    generator = np.random.default_rng(2)
    due = np.cumsum(generator.exponential(1 / rate, int(rate * seconds)))
    taken: list[float] = []
    failed = 0
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(at: float, user: User) -> None:
        nonlocal failed
        try:
            await asyncio.wait_for(batches.submit(user, rows=1), 2.0)
            taken.append(loop.time() - began - at)
        except (OverloadedError, DeadlinePassedError, TimeoutError):
            failed += 1

    tasks = []
    for i, at in enumerate(due.tolist()):
        wait = began + at - loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(at, asked[i % len(asked)])))
        if i % 16 == 0:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return np.array(taken), failed


class Counter:
    """The GPU's own: the share of time with a kernel at work, sampled."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._handle, self._read = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml.nvmlDeviceGetUtilizationRates
        self.seen: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Mean since a second after the start, of 1."""
        self._stop.set()
        self._thread.join()
        return float(np.mean(self.seen[10:] or [0])) / 100

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.seen.append(self._read(self._handle).gpu)


def at_rate(kind: str, work: OnGpu, asked: list[User], rate: float, call: argparse.Namespace) -> dict[str, float]:
    """What was seen."""
    batches = make(kind, work, call.bound_ms / 1e3)
    asyncio.run(offered(batches, asked, min(rate, 200.0), 1.0))  # to warm up, and to learn what calls take
    work.spans.clear()
    gc.collect()
    gc.disable()
    counter, began = Counter(), torch.cuda.Event(enable_timing=True)
    began.record()
    before = time.perf_counter()
    taken, failed = asyncio.run(offered(batches, asked, rate, call.seconds))
    seconds = time.perf_counter() - before
    utilisation = counter.stop()
    gc.enable()
    torch.cuda.synchronize()
    since = work.begin.elapsed_time(began) / 1e3
    calls = len(work.spans)
    busy = work.busy(since, since + seconds)
    batches.close()
    late = failed + int((taken > call.bound_ms / 1e3).sum())
    quantiles = np.quantile(taken, [0.5, 0.99]) * 1e3 if len(taken) else [np.inf, np.inf]
    seen = {
        "rate": rate, "in_time": 1 - late / max(1, len(taken) + failed), "p50_ms": float(quantiles[0]),
        "p99_ms": float(quantiles[1]), "utilisation": utilisation, "busy": busy, "batch": len(taken) / max(1, calls),
        "failed": failed,
    }  # fmt: skip
    print(kind, {name: round(value, 3) for name, value in seen.items()}, file=sys.stderr, flush=True)
    return seen


def best_rate(kind: str, seen_at: Callable[[str, float], dict[str, float]], rates: list[float]) -> dict[str, float]:
    """The highest with 99 of 100 in time, by halving among the given rates."""
    low, high, best = 0, len(rates) - 1, None
    while low <= high:
        middle = (low + high) // 2
        seen = seen_at(kind, rates[middle])
        if seen["in_time"] >= 0.99:
            low, best = middle + 1, seen
        else:
            high = middle - 1
    return best or {"rate": 0.0, "utilisation": 0.0, "busy": 0.0, "p99_ms": float("inf"), "batch": 0.0}


def main() -> None:
    """Compare, then search rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--bound-ms", type=float, default=100.0)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    work, asked = OnGpu(call.items), users(call.items)
    # As the service does: the collector, looking through what stays, would stop everybody for a tenth of a second.
    gc.freeze()
    together = work(None, asked[:COMPARED])
    overlap = [len(set(work(None, [asked[i]])[0]) & set(together[i])) / BEST for i in range(COMPARED)]
    costs = {}
    for size in (1, 8, FIXED, 64, 128, 256):
        for _ in range(2):
            began = time.perf_counter()
            work(None, asked[:size])
            costs[size] = time.perf_counter() - began
    full = 256 / costs[256]
    print("a call of so many takes ms", {n: round(1e3 * s, 2) for n, s in costs.items()}, file=sys.stderr, flush=True)
    rates = [full * f for f in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, *np.arange(0.7, 1.65, 0.05).tolist())]

    def seen_at(kind: str, rate: float) -> dict[str, float]:
        return at_rate(kind, work, asked, rate, call)

    best = {kind: best_rate(kind, seen_at, rates) for kind in ("ours", "one", "fixed")}
    low = {kind: seen_at(kind, 0.1 * full) for kind in ("ours", "one", "fixed")}
    ours, peers = best["ours"], {"one": "one a call", "fixed": f"{FIXED} a call"}
    rows = [row("best items of a user alone and in a batch: same", float(np.mean(overlap)), "share")]
    for kind, name in peers.items():
        rows += [
            row(f"requests a second in time, beside {name}", ours["rate"], "1/s", peer=best[kind]["rate"],
                peer_name=name, limit=full, limit_name="calls of 256", higher_is_better=True),
            row(f"GPU busy there (its counter), beside {name}", ours["utilisation"], "share",
                peer=best[kind]["utilisation"], peer_name=name, limit=0.85, limit_name="target", higher_is_better=True),
            row(f"p99 at a tenth of the load, beside {name}", low["ours"]["p99_ms"], "ms", peer=low[kind]["p99_ms"],
                peer_name=name, limit=call.bound_ms, limit_name="bound"),
        ]  # fmt: skip
    rows.append(row("GPU with a batch under way, at the best rate", ours["busy"], "share", p99_ms=ours["p99_ms"],
                    batch=round(ours["batch"], 1)))  # fmt: skip
    finish("serving_gpu", rows, device=torch.cuda.get_device_name(0))


if __name__ == "__main__":
    main()
