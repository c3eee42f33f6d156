"""What benchmarks on a GPU share: its clock, graphs, its memory."""

from collections.abc import Callable

import torch

RUNS = 20


def timed(call: Callable[[], object], repeats: int = 1) -> list[float]:
    """Milliseconds of each run, by the GPU's clock; a run is `repeats` calls, of which it takes the mean."""
    for _ in range(3):
        call()
    out = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        out.append(begin.elapsed_time(end) / repeats)
    return out


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The same work as one graph launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_gb(call: Callable[[], object]) -> float:
    """Memory beyond what is held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9
