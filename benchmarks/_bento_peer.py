"""BentoML around the same scorer, batching by itself; see `_serving_peers`."""

import os
from typing import Any

import bentoml
from _serving_peers import MOST_TOGETHER, plain, scorer


@bentoml.service(workers=1, traffic={"timeout": 30})
class Fraud:
    """One worker, as ours."""

    def __init__(self) -> None:
        self.scorer = scorer(os.environ["ASSAY_PEER_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=MOST_TOGETHER, max_latency_ms=1000)
    def score(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """An event each."""
        return plain(self.scorer.score(events, explain=True))
