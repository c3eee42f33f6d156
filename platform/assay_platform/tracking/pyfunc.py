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
            encoder = self._fraud.parts.encoder
            columns = {name: _numbers(model_input[name]) for name in encoder.numeric}
            columns |= {name: _words(model_input[name]) for name in encoder.categorical}
            return self._fraud.score(self._fraud.encode(columns)).probability
        return [
            [item for item, _ in self._recommender.recommend_known(str(user), k=10)] for user in model_input["user_id"]
        ]


def _numbers(series: "pd.Series[Any]") -> Any:
    """As numbers; what is none is missing, as it was in training."""
    import pandas as pd

    return pd.to_numeric(series, errors="coerce").to_numpy(dtype="float64", na_value=float("nan"))


def _words(series: "pd.Series[Any]") -> list[str | None]:
    """Categories as training wrote them: 3.0 as 3, True as true, no space around."""
    import pandas as pd

    def word(value: Any) -> str | None:
        if pd.isna(value):
            return None
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float):
            return str(int(value)) if value.is_integer() else repr(value)
        return str(value).strip()

    return [word(value) for value in series.tolist()]


def _load_pyfunc(path: str) -> ScoringModel:
    return ScoringModel(Path(path))
