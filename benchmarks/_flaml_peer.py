"""FLAML's BlendSearch on a recorded surface or a formula, in an interpreter that has flaml; see `search_regret.py`.

python _flaml_peer.py NAME TRIALS SEED GOAL        # prints the metric of every trial as JSON
"""

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "platform"))
sys.path.insert(0, str(Path(__file__).parent))
from _surfaces import surfaces
from assay_platform.tuning.space import Dimension, OneOf, Real


def main() -> None:
    """One search."""
    from flaml import BlendSearch, tune

    logging.disable(logging.WARNING)
    name, num, seed, goal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    surface, values = surfaces(name)[name], []

    def of(dimension: Dimension) -> Any:
        if isinstance(dimension, OneOf):
            return tune.choice(list(dimension.values))
        if isinstance(dimension, Real):
            return (tune.loguniform if dimension.log else tune.uniform)(dimension.low, dimension.high)
        return (tune.lograndint if dimension.log else tune.randint)(dimension.low, dimension.high + 1)

    class Reached(Exception):  # noqa: N818 - no error
        pass

    def evaluate(config: dict[str, Any]) -> dict[str, float]:
        values.append(surface.curve({n: config[n] for n in surface.space})[-1])
        if values[-1] >= goal:
            raise Reached
        return {"metric": values[-1]}

    searcher = BlendSearch(
        metric="metric", mode="max", space={n: of(d) for n, d in surface.space.items()}, seed=seed,
        points_to_evaluate=[dict(surface.defaults)],
    )  # fmt: skip
    with contextlib.suppress(Reached):
        tune.run(evaluate, search_alg=searcher, num_samples=num, verbose=0, use_ray=False)
    print(json.dumps(values))


if __name__ == "__main__":
    main()
