"""What the routers of a model do while it trains: numbers for MLflow, a plot, a warning when experts die out.

    with RoutingMonitor(net) as monitor:
        ...train...
        mlflow.log_metrics(monitor.metrics())      at the end of an epoch, say
    monitor.plot(Path("routing.png"))

The monitor listens to every `MoELayer` by a forward hook, in training only, and sums on the layer's own device; nothing
comes to the host before `metrics` is called.
"""

# E experts, K chosen

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from assay_platform.moe.balance import jensen_shannon_imbalance, utilisation
from assay_platform.moe.layer import LayerOutput, MoELayer
from assay_platform.moe.router import count_choices

_logger = logging.getLogger(__name__)
_COLLAPSED = 0.5  # of all experts effectively in use
_REPORTS_IN_A_ROW = 2  # the first steps of a balanced training may be uneven too


class LayerReport(NamedTuple):
    """One layer over the batches since the last report."""

    load_E: tuple[float, ...]  # fraction of choices
    utilisation: float  # effective number of busy experts / all, 0 to 1
    imbalance: float  # Jensen–Shannon divergence from an even load, nats
    entropy: float  # mean over rows of the router's entropy / ln E, 0 (certain) to 1
    overflow: float  # fraction of choices that found no place
    choices: float  # experts a row


class _Sums:
    def __init__(self, device: torch.device, num_experts: int) -> None:
        self.choices_E = torch.zeros(num_experts, device=device)
        self.entropy = torch.zeros((), device=device)
        self.num_rows, self.overflow, self.num_batches = 0, 0.0, 0

    def add(self, out: LayerOutput) -> None:
        probability_NE = out.routing.probability_NE.detach()
        self.choices_E += count_choices(out.routing.expert_NK, len(self.choices_E))
        self.entropy -= (probability_NE * probability_NE.clamp_min(1e-30).log()).sum()
        self.num_rows += len(probability_NE)
        self.overflow += out.overflow
        self.num_batches += 1

    def report(self) -> LayerReport:
        load_E = (self.choices_E / self.choices_E.sum().clamp_min(1.0)).cpu()
        most = float(torch.log(torch.tensor(float(max(2, len(load_E))))))
        return LayerReport(
            tuple(load_E.tolist()),
            utilisation(load_E),
            jensen_shannon_imbalance(load_E),
            float(self.entropy) / max(1, self.num_rows) / most,
            self.overflow / max(1, self.num_batches),
            float(self.choices_E.sum()) / max(1, self.num_rows),
        )


def _numbers(name: str, report: LayerReport) -> dict[str, float]:
    numbers = {
        f"moe.{name}.{key}": float(getattr(report, key))
        for key in ("utilisation", "imbalance", "entropy", "overflow", "choices")
    }
    return numbers | {f"moe.{name}.load.{e}": load for e, load in enumerate(report.load_E)}


class RoutingMonitor:
    """Listens to all MoE layers of a module while it is open."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = {name: m for name, m in module.named_modules() if isinstance(m, MoELayer)}
        self._sums: dict[str, _Sums] = {}
        self._hooks: list[Any] = []
        self._warned: set[str] = set()
        self.history: dict[str, list[LayerReport]] = {name: [] for name in self._layers}

    def __enter__(self) -> "RoutingMonitor":
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_hook(self._listener(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _listener(self, name: str) -> Any:
        def listen(layer: nn.Module, _: tuple[Tensor, ...], out: LayerOutput) -> None:
            if not layer.training:
                return
            assert isinstance(layer, MoELayer)
            sums = self._sums.get(name)
            if sums is None or len(sums.choices_E) != layer.num_experts:
                sums = self._sums[name] = _Sums(out.y_ND.device, layer.num_experts)
            sums.add(out)

        return listen

    def metrics(self) -> dict[str, float]:
        """Numbers since the last call, by layer, named for MLflow; a layer that has collapsed is warned of, once."""
        numbers: dict[str, float] = {}
        for name, sums in self._sums.items():
            report = sums.report()
            self.history[name].append(report)
            numbers |= _numbers(name, report)
            lately = self.history[name][-_REPORTS_IN_A_ROW:]
            collapsed = len(lately) == _REPORTS_IN_A_ROW and all(r.utilisation < _COLLAPSED for r in lately)
            if collapsed and name not in self._warned:
                self._warned.add(name)
                busiest = max(range(len(report.load_E)), key=report.load_E.__getitem__)
                _logger.warning(
                    "%s: experts collapse: %.0f %% of them are effectively in use, expert %d gets %.0f %% of the "
                    "choices; choose a router with more balance",
                    name, 100 * report.utilisation, busiest, 100 * report.load_E[busiest],
                )  # fmt: skip
        self._sums.clear()
        return numbers

    def series(self) -> dict[str, list[float]]:
        """All reports so far as one list a metric, named as in `metrics`."""
        out: dict[str, list[float]] = {}
        for name, reports in self.history.items():
            for report in reports:
                for key, value in _numbers(name, report).items():
                    out.setdefault(key, []).append(value)
        return out

    def plot(self, path: Path) -> None:
        """Load of every expert over reports, and utilisation and imbalance beside it, a row a layer, as a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        seen = {name: reports for name, reports in self.history.items() if reports}
        figure = Figure(figsize=(9, 2.6 * max(1, len(seen))), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(max(1, len(seen)), 2, squeeze=False, width_ratios=(3, 2))
        for (name, reports), (left, right) in zip(seen.items(), axes, strict=False):
            num_experts = max(len(report.load_E) for report in reports)
            loads = [[*r.load_E, *[0.0] * (num_experts - len(r.load_E))] for r in reports]
            even = 1.0 / num_experts
            image = left.imshow(
                list(zip(*loads, strict=True)), aspect="auto", origin="lower", cmap="RdBu_r", vmin=0.0, vmax=2 * even,
                extent=(0.5, len(reports) + 0.5, -0.5, num_experts - 0.5), interpolation="nearest",
            )  # fmt: skip
            figure.colorbar(image, ax=left, label="share of choices", ticks=(0.0, even, 2 * even), format="%.3f")
            left.set(title=name, xlabel="report", ylabel="expert")
            steps = range(1, len(reports) + 1)
            right.plot(steps, [r.utilisation for r in reports], color="#1b6ca8", label="utilisation")
            right.plot(steps, [r.entropy for r in reports], color="#888888", label="router entropy", linestyle="--")
            right.plot(steps, [r.imbalance for r in reports], color="#c0392b", label="imbalance (nats)")
            right.set(ylim=(0.0, 1.05), xlabel="report", title=f"{num_experts} experts")
            right.legend(loc="center right", fontsize="small")
        figure.savefig(path, dpi=120)
