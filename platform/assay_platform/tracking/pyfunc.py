"""What MLflow calls to load one of our artifacts: `mlflow.pyfunc.load_model("models:/NAME@champion")`.

Named as `loader_module` in the MLmodel file, so MLflow unpickles nothing. Our own services load the artifact
folder directly; this is for those who use MLflow's tools.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay_platform.models.artifact import read_json

if TYPE_CHECKING:
    import pandas as pd


class ScoringModel:
    """MLflow's predict interface over an artifact."""

    def __init__(self, folder: Path) -> None:
        self._kind = read_json(folder, "config").get("kind")
        if self._kind == "fraud":
            from assay_platform.models.fraud import FraudModel

            self._fraud = FraudModel.load(folder)
        else:
            from assay_platform.models.recommender import Recommender

            self._recommender = Recommender.load(folder)

    def predict(self, model_input: "pd.DataFrame", params: dict[str, Any] | None = None) -> Any:
        """fraud: a column a feature → calibrated probabilities. recommend: `user_id` → lists of item ids."""
        if self._kind == "fraud":
            columns = {name: _column(model_input[name]) for name in self._fraud.feature_names}
            return self._fraud.score(self._fraud.encode(columns)).probability
        return [
            [item for item, _ in self._recommender.recommend_known(str(user), k=10)] for user in model_input["user_id"]
        ]


def _column(series: "pd.Series[Any]") -> Any:
    return series.where(series.notna(), None).to_numpy() if series.dtype == object else series.to_numpy()


def _load_pyfunc(path: str) -> ScoringModel:
    return ScoringModel(Path(path))
