"""Raw events → features → search → models → registry → REST answers, as a user's own tables go through it."""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import ray
import torch
from assay_features.feast.repository import FeatureRepository
from assay_features.schema import read_schema
from assay_pipelines.cli import main
from assay_pipelines.console import Reporter
from assay_pipelines.options import RunOptions, RunReport
from assay_pipelines.skew import run_skew
from assay_pipelines.tracking import open_registry
from assay_pipelines.wiring import run_application
from assay_platform.config import Config, Paths
from assay_platform.errors import InputError, WorkError
from assay_platform.models.artifact import read_json
from assay_platform.models.fraud import FraudModel
from assay_platform.tracking import AuditLog
from assay_platform.tracking.client import open_client
from assay_platform.tracking.records import DecisionRecords
from assay_services.fraud import FraudScorer
from assay_services.schemas import ModelRef

pytestmark = [pytest.mark.ray, pytest.mark.services]

FRAUD_METRICS = {
    "auc",
    "average_precision",
    "recall_at_fpr_0.003",
    "precision_at_fpr_0.003",
    "prevalence",
    "brier",
    "ece",
}
RECOMMEND_METRICS = {"ndcg_at_10", "recall_at_10", "recall_at_20", "coverage", "diversity", "novelty"}


def options(config: Config, application: str, files: tuple[Path, Path], **changes: Any) -> RunOptions:
    table, schema = files
    return replace(
        RunOptions(
            config=config, application=application, data=str(table), table=table, schema=read_schema(schema),
            schema_folder=schema.parent, model_name=f"{application}-own", budget_s=120.0, max_trials=2,
        ),
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("journey")
    return Config(paths=Paths(home=folder / "home", cache=folder / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("tables", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    folder = tmp_path_factory.mktemp("tables")
    tables.fraud_frame().to_csv(folder / "payments.csv", index=False)
    (folder / "payments.toml").write_text(tables.REPORTED_SCHEMA)
    tables.interactions_frame().to_csv(folder / "clicks.csv", index=False)
    items = {"item_id": [f"i{i}" for i in range(60)], "title": [f"Item {i}" for i in range(60)]}
    pd.DataFrame({**items, "genre": [f"taste{i % 4}" for i in range(60)]}).to_csv(folder / "items.csv", index=False)
    (folder / "clicks.toml").write_text(tables.RECOMMEND_SCHEMA)
    return {
        "fraud": (folder / "payments.csv", folder / "payments.toml"),
        "recommend": (folder / "clicks.csv", folder / "clicks.toml"),
    }


@pytest.fixture(scope="module")
def fraud_report(home: Config, files: dict[str, tuple[Path, Path]], ray_session: str) -> RunReport:
    return run_application(options(home, "fraud", files["fraud"]), Reporter())


@pytest.fixture(scope="module")
def recommend_report(home: Config, files: dict[str, tuple[Path, Path]], ray_session: str) -> RunReport:
    return run_application(options(home, "recommend", files["recommend"]), Reporter())


def test_a_fraud_run_reports_the_contract_and_learned_the_signal(fraud_report: RunReport) -> None:
    report = fraud_report.to_dict()
    assert report["model"] == {"name": "fraud-own", "version": 1, "alias": "champion"}
    assert report["metrics"].keys() >= FRAUD_METRICS
    assert report["baselines"]["lightgbm"].keys() >= FRAUD_METRICS
    assert report["timings_s"].keys() >= {"features", "tune", "train"}
    assert report["metrics"]["auc"] > 0.7
    json.dumps(report, allow_nan=False)


def test_a_recommend_run_reports_the_contract_and_beats_popularity(recommend_report: RunReport) -> None:
    report = recommend_report.to_dict()
    assert report["model"] == {"name": "recommend-own", "version": 1, "alias": "champion"}
    assert report["metrics"].keys() >= RECOMMEND_METRICS
    assert report["metrics"]["ndcg_at_10"] > report["baselines"]["popularity"]["ndcg_at_10"]
    json.dumps(report, allow_nan=False)


def test_the_run_trials_and_fingerprint_are_in_mlflow(home: Config, fraud_report: RunReport) -> None:
    client = open_client(home.tracking_uri)
    run = client.get_run(fraud_report.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.tags["assay.data_sha256"]) > 64
    assert run.data.metrics["lightgbm.auc"] == fraud_report.baselines["lightgbm"]["auc"]
    parent = f"tags.mlflow.parentRunId = '{fraud_report.mlflow_run_id}'"
    assert len(client.search_runs([run.info.experiment_id], parent)) == 2


def test_the_model_loads_with_mlflow_and_pickles_refused(home: Config, fraud_report: RunReport) -> None:
    import mlflow

    open_client(home.tracking_uri)
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    model = mlflow.pyfunc.load_model("models:/fraud-own@champion")
    names = [column.name for column in model.metadata.get_input_schema().inputs]
    kinds = {c.name: c.type.name for c in model.metadata.get_input_schema().inputs}
    frame = pd.DataFrame({n: ["alpha"] if kinds[n] == "string" else [1.0] for n in names})
    assert 0 < float(model.predict(frame)[0]) < 1


# Before any service takes events that the table does not have.
def test_features_that_were_served_otherwise_than_batch_computes_them_are_named(
    fraud_report: RunReport, home: Config, files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    shutil.copytree(home.paths.home, tmp_path / "home")
    config = Config(paths=Paths(home=tmp_path / "home", cache=tmp_path / "cache"))
    registry, name = open_registry(config), "fraud-own"
    repository = FeatureRepository(config.paths.feature_repositories / name)
    records = DecisionRecords(config.paths.feature_repositories / name / "records")
    version = registry.version_of(name)
    assert version is not None
    scorer = FraudScorer.load(registry.download(name, version), repository, records)
    table = pd.read_csv(files["fraud"][0])
    more = table.tail(40).assign(
        transaction_id=[f"skew{i}" for i in range(40)], datetime=table["datetime"].max() + 60 * np.arange(1, 41)
    )
    more["card_id"] = more["card_id"].where(np.arange(40) != 30, more["card_id"].iloc[20])
    rows = json.loads(more.drop(columns="fraud").to_json(orient="records"))
    (tmp_path / "later").mkdir()
    for i, row in enumerate(rows):
        scorer.score([row], explain=False, keep_as=ModelRef(name=name, version=version))
        if i != 20:  # one is lost on its way to the features
            scorer.add(scorer.parse_events([row]))
    records.close()  # one process opens a store once
    pd.concat([table, more]).to_csv(tmp_path / "later.csv", index=False)
    asked = options(config, "fraud", (tmp_path / "later.csv", files["fraud"][1]))
    asked = replace(asked, model_name=name)
    call = argparse.Namespace(rows=20, tolerance=1e-9)
    with pytest.raises(WorkError, match="served otherwise"):
        run_skew(asked, call, Reporter())
    assert scorer.look()
    found, alarms = scorer.seen()
    assert {one.kind for one in found} == {one.kind for one in alarms} == {"cells"}
    assert all(one.value in {row["transaction_id"] for row in rows[21:]} for one in found)
    assert any("served" in one.text and "batch" in one.text for one in found)
    # The first half met no fault.
    records = DecisionRecords(config.paths.feature_repositories / name / "records")
    records.erase(lambda record: record["event"]["transaction_id"] in {row["transaction_id"] for row in rows[20:]})
    records.close()
    assert run_skew(asked, call, Reporter()) == 0
    assert scorer.look()
    assert scorer.seen() == ([], [])
    repository.close()


@contextmanager
def serving(
    home: Path, *options: str, models: int = 2, **more: str
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """`assay serve` until the block ends, with so many models loaded. more: of its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "ASSAY_HOME": str(home), **more}
    command = [sys.executable, "-m", "assay_services", "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                try:
                    if len(client.get("/v1/models").json()["models"]) == models:
                        break
                except (httpx.HTTPError, ValueError):
                    pass  # it is being started; Ray Serve says so in words
                time.sleep(0.1)
            yield client, process
    finally:
        process.send_signal(signal.SIGTERM)
        ended = process.wait(timeout=30)
    assert ended in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def service(home: Config, fraud_report: RunReport, recommend_report: RunReport) -> Iterator[httpx.Client]:
    with serving(home.paths.home) as (client, _):
        yield client


def payment(files: dict[str, tuple[Path, Path]], **changes: Any) -> dict[str, Any]:
    row = pd.read_csv(files["fraud"][0]).iloc[-1].to_dict()
    row = {k: (None if isinstance(v, float) and np.isnan(v) else v) for k, v in row.items()}
    return {**row, "datetime": int(row["datetime"]) + 60, **changes}


def test_scores_decisions_and_reasons_add_up(service: httpx.Client, files: dict[str, tuple[Path, Path]]) -> None:
    events = [
        payment(files),
        payment(files, card_id="c1", amount=500, provider="gamma"),
        payment(files, provider="new"),
    ]
    body = service.post("/v1/fraud/score", json={"events": events, "explain": True}).json()
    assert body["model"] == {"name": "fraud-own", "version": 1}
    plain = service.post("/v1/fraud/score", json={"events": events}).json()["scores"]
    for result, same in zip(body["scores"], plain, strict=True):
        log_odds = result["base"] + sum(reason["contribution"] for reason in result["reasons"])
        assert 1 / (1 + np.exp(-log_odds)) == pytest.approx(result["score"], abs=1e-6)
        assert result["score"] == pytest.approx(same["score"], abs=1e-5)
        if result["score"] >= result["threshold"]:
            assert result["decision"] == "decline"
        else:
            assert result["decision"] in ("approve", "review")
    assert body["scores"][0]["id"] == payment(files)["transaction_id"]
    assert body["scores"][1]["score"] > body["scores"][0]["score"] or body["scores"][0]["score"] > 0.1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"amount": "much"}, "events[0].amount"),
        ({"datetime": "yesterday"}, "events[0].datetime"),
        ({"card_id": "9" * 300}, "events[0].card_id"),
        ({"card_id": [1]}, "events[0].card_id"),
        ({"datetime": None}, "events[0].datetime"),
        ({"amount": 10**400}, "events[0].amount"),
    ],
)
def test_a_value_that_does_not_fit_is_named(
    service: httpx.Client, files: dict[str, tuple[Path, Path]], change: dict[str, Any], named: str
) -> None:
    response = service.post("/v1/fraud/score", json={"events": [payment(files, **change)]})
    assert response.status_code == 422
    assert named in response.json()["detail"]


def test_infinity_and_a_missing_column_are_named(service: httpx.Client, files: dict[str, tuple[Path, Path]]) -> None:
    record = payment(files)
    del record["amount"]
    assert "events[0].amount" in service.post("/v1/fraud/score", json={"events": [record]}).json()["detail"]
    raw = json.dumps({"events": [payment(files, amount=float("inf"))]})
    headers = {"content-type": "application/json"}
    response = service.post("/v1/fraud/score", content=raw, headers=headers)
    assert response.status_code == 422
    assert "finite" in response.json()["detail"]


def test_an_event_changes_the_features_within_500_ms(
    service: httpx.Client, files: dict[str, tuple[Path, Path]]
) -> None:
    def count(card: str) -> float:
        scored = service.post("/v1/fraud/score", json={"events": [payment(files, card_id=card)], "explain": True})
        reasons = {r["feature"]: r["value"] for r in scored.json()["scores"][0]["reasons"]}
        return float(scored.json()["scores"][0]["score"]), reasons  # type: ignore[return-value]

    before = count("fresh-card")
    began = time.perf_counter()
    for offset in range(5):
        moment = int(payment(files)["datetime"]) - 30 + offset
        sent = payment(files, transaction_id=f"new{offset}", card_id="fresh-card", amount=900, datetime=moment)
        answer = service.post("/v1/events", json={"events": [sent]})
        assert answer.status_code == 202
        assert answer.json()["accepted"] == {"fraud": 1}
    elapsed_s = time.perf_counter() - began
    assert elapsed_s / 5 < 0.5
    again = service.post("/v1/events", json={"events": [sent]}).json()
    assert (again["accepted"], again["duplicates"]) == ({"fraud": 0}, {"fraud": [0]})
    assert count("fresh-card") != before


def test_a_reported_fraud_changes_the_score_of_what_it_has_in_common_and_is_on_record(
    service: httpx.Client, files: dict[str, tuple[Path, Path]]
) -> None:
    moment = int(payment(files)["datetime"])

    def sent(name: str, offset: int) -> dict[str, Any]:
        # A card of its own with enough payments that are old enough to be judged.
        return payment(files, transaction_id=name, card_id="mule", datetime=moment + offset)

    paid = [sent(f"mule{i}", 120 + i) for i in range(4)]
    assert service.post("/v1/events", json={"events": paid}).json()["accepted"] == {"fraud": 4}
    later = sent("mule-later", 90_000)
    name = next(
        key for key in _record(service, later)["decision"]["features"]
        if key.startswith("card_id__fraud__sum__30d__over")
    )  # fmt: skip
    assert _record(service, later)["decision"]["features"][name] == 0.0
    reported = {"id": "mule1", "fraud": True, "reported_at": moment + 80_000}
    body = {"labels": [reported, {"id": "nobody knows", "fraud": True}]}
    assert service.post("/v1/labels", json=body).json() == {"accepted": 1, "duplicates": [], "unknown": [1], "late": []}
    record = _record(service, later)
    assert record["decision"]["features"][name] == pytest.approx(0.25)
    assert record["decision"]["model"]["name"] == "fraud-own"
    assert record["event"]["card_id"] == "mule"
    assert service.get("/v1/fraud/decisions/mule1").json()["label"] == {"fraud": True, "reported_at": moment + 80_000.0}
    again = service.post("/v1/labels", json={"labels": [reported]}).json()
    assert again == {"accepted": 0, "duplicates": [0], "unknown": [], "late": []}
    stale = {"id": "mule2", "fraud": True, "reported_at": moment - 10 * 86_400}
    assert service.post("/v1/labels", json={"labels": [stale]}).json()["late"] == [0]
    assert _record(service, later)["decision"]["features"][name] == pytest.approx(0.25)
    # An event that was never seen here can come along with its label.
    unseen = {"id": "elsewhere", "fraud": True, "reported_at": moment + 81_000, "event": sent("elsewhere", 50)}
    assert service.post("/v1/labels", json={"labels": [unseen]}).json()["accepted"] == 1
    assert _record(service, later)["decision"]["features"][name] == pytest.approx(0.5)
    assert service.get("/v1/fraud/decisions/nothing").status_code == 404


def test_a_refusal_says_what_would_have_been_approved(
    service: httpx.Client, files: dict[str, tuple[Path, Path]]
) -> None:
    risky = payment(files, transaction_id="refused", card_id="c1", amount=70, provider="gamma")
    body = {"events": [risky, payment(files, amount=5, provider="alpha")], "counterfactual": True, "explain": True}
    refused, fine = service.post("/v1/fraud/score", json=body).json()["scores"]
    assert fine["decision"] == "approve"
    assert fine["counterfactual"] is None
    assert refused["decision"] != "approve"
    found = refused["counterfactual"]
    assert found is not None
    assert found["text"].startswith("would have been approved if ")
    changed = {change["feature"]: change["would_be"] for change in found["changes"]}
    assert "country" not in changed, "immutable"
    again = service.post("/v1/fraud/score", json={"events": [{**risky, **changed}]}).json()["scores"][0]
    assert again["decision"] == "approve"
    assert again["score"] == pytest.approx(found["score"], abs=1e-6)
    many = {"events": [risky] * 11, "counterfactual": True}
    assert "at most 10 in one request" in service.post("/v1/fraud/score", json=many).json()["detail"]


def test_an_auditor_makes_the_decision_again(
    service: httpx.Client, home: Config, files: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ASSAY_HOME", str(home.paths.home))
    made = _record(service, payment(files, transaction_id="to audit", provider=None, lat=None))["decision"]
    time.sleep(1.0)  # until it is on disk

    def replay(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["replay", *arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    code, out, err = replay("fraud-own", "to audit", "--json")
    assert code == 0, err
    replayed = json.loads(out.splitlines()[-1])["replayed"]
    assert replayed["agrees"]
    total = replayed["base"] + sum(replayed["contributions"].values())
    assert 1 / (1 + np.exp(-total)) == pytest.approx(made["score"], abs=1e-6)
    code, out, _ = replay("fraud-own", "to audit")
    assert code == 0
    assert f"{made['decision']} by fraud-own version {made['model']['version']}" in out
    assert replay("fraud-own", "nobody")[0] == 2
    assert replay("no-such-model", "x")[0] == 2


def _record(service: httpx.Client, event: dict[str, Any]) -> dict[str, Any]:
    service.post("/v1/fraud/score", json={"events": [event]}).raise_for_status()
    record: dict[str, Any] = service.get(f"/v1/fraud/decisions/{event['transaction_id']}").json()
    return record


@pytest.mark.parametrize(
    ("label", "named"),
    [
        ({"id": "x"}, "labels.0.fraud"),
        ({"id": "x", "fraud": True, "event": {}}, "labels[0].event.datetime"),
        ({"id": " ", "fraud": True}, "labels[0].id"),
        ({"id": "9" * 300, "fraud": True}, "labels[0].id"),
        ({"id": "mule0", "fraud": True, "reported_at": "soon"}, "labels[0].reported_at"),
    ],
)
def test_a_label_that_does_not_fit_is_named(service: httpx.Client, label: dict[str, Any], named: str) -> None:
    response = service.post("/v1/labels", json={"labels": [label]})
    assert response.status_code == 422
    assert named in response.json()["detail"]


def test_recommendations_for_known_new_and_just_seen_users(service: httpx.Client) -> None:
    known = service.post("/v1/recommend", json={"user_id": "u1", "k": 5}).json()
    assert not known["cold_start"]
    assert len(known["items"]) == 5
    assert all(item["title"].startswith("Item ") and item["reason"] for item in known["items"])
    assert [i["score"] for i in known["items"]] == sorted((i["score"] for i in known["items"]), reverse=True)
    assert service.post("/v1/recommend", json={"user_id": "nobody", "k": 5}).json()["cold_start"]
    seen = [f"i{4 * k + 1}" for k in range(6)]  # taste 1
    events = [
        {"user_id": "newcomer", "item_id": i, "timestamp": 1_790_000_000 + n, "rating": 5} for n, i in enumerate(seen)
    ]
    assert service.post("/v1/events", json={"events": events}).json()["accepted"] == {"recommend": 6}
    after = service.post("/v1/recommend", json={"user_id": "newcomer", "k": 5}).json()
    assert not after["cold_start"]
    items = [item["item_id"] for item in after["items"]]
    assert not set(items) & set(seen)
    assert sum(int(item[1:]) % 4 == 1 for item in items) >= 3
    everything = service.post("/v1/recommend", json={"user_id": "newcomer", "k": 1000, "exclude_seen": False}).json()
    assert len(everything["items"]) == 60


def test_a_request_may_leave_items_out_and_ask_for_some_alone(service: httpx.Client) -> None:
    plain = service.post("/v1/recommend", json={"user_id": "u1", "k": 5}).json()
    first = plain["items"][0]["item_id"]
    context = {"exclude": [first, "never heard of"], "only": {"genre": ["taste2", "taste3"]}}
    for user in ("u1", "nobody at all"):
        found = service.post("/v1/recommend", json={"user_id": user, "k": 30, "context": context}).json()["items"]
        assert found
        assert first not in {item["item_id"] for item in found}
        assert {int(item["item_id"][1:]) % 4 for item in found} == {2, 3}
    for context, named in (
        ({"only": {"colour": "red"}}, "known are genre"), ({"only": {"genre": "taste9"}}, "'taste9'"),
        ({"exclude": "i1"}, "context.exclude"), ({"only": ["genre"]}, "context.only"),
    ):  # fmt: skip
        refused = service.post("/v1/recommend", json={"user_id": "u1", "context": context})
        assert refused.status_code == 422
        assert named in refused.json()["detail"]


def test_a_new_item_with_a_title_is_recommendable_at_once(service: httpx.Client) -> None:
    new = [{"item_id": f"new{taste}", "title": f"Item new {taste}", "genre": [f"taste{taste}"]} for taste in range(4)]
    body = {"items": new}
    assert service.post("/v1/items", json=body).json() == {"accepted": 4, "known": []}
    assert service.post("/v1/items", json=body).json() == {"accepted": 0, "known": [0, 1, 2, 3]}
    everything = service.post("/v1/recommend", json={"user_id": "u1", "k": 1000, "exclude_seen": False}).json()["items"]
    place = {item["item_id"]: n for n, item in enumerate(everything)}
    assert len(everything) == 64
    assert [place[f"new{taste}"] for taste in range(4)].index(min(place[f"new{t}"] for t in range(4))) == 1, "u1's"
    asked = {"user_id": "u1", "context": {"only": {"genre": "taste2"}}, "k": 100}
    found = service.post("/v1/recommend", json=asked).json()["items"]
    assert {"new2"} == {item["item_id"] for item in found if item["item_id"].startswith("new")}
    event = {"user_id": "somebody", "item_id": "new3", "timestamp": 1_790_000_100, "rating": 5}
    assert service.post("/v1/events", json={"events": [event]}).json()["accepted"] == {"recommend": 1}
    assert not service.post("/v1/recommend", json={"user_id": "somebody", "k": 5}).json()["cold_start"]
    for bad, named in (
        ({"item_id": "x", "colour": "red"}, "items[0].colour"), ({"title": "x"}, "items[0].item_id: is missing"),
        ({"item_id": "x", "title": {"a": 1}}, "items[0].title"),
    ):  # fmt: skip
        refused = service.post("/v1/items", json={"items": [bad]})
        assert refused.status_code == 422
        assert named in refused.json()["detail"]


def test_events_that_fit_no_model_are_refused_and_change_nothing(service: httpx.Client) -> None:
    response = service.post("/v1/events", json={"events": [{"colour": "red"}]})
    assert response.status_code == 422
    assert "fraud" in response.json()["detail"]
    assert "recommend" in response.json()["detail"]


def test_promote_and_rollback_under_load_fail_no_request(
    service: httpx.Client, home: Config, files: dict[str, tuple[Path, Path]], ray_session: str
) -> None:
    second = run_application(options(home, "fraud", files["fraud"], seed=7), Reporter())
    assert second.version == 2
    base_url, stop = str(service.base_url), threading.Event()
    statuses: list[int] = []
    versions: list[int] = []

    def load() -> None:
        with httpx.Client(base_url=base_url, timeout=30) as client:
            while not stop.is_set():
                response = client.post("/v1/fraud/score", json={"events": [payment(files)]})
                statuses.append(response.status_code)
                versions.append(response.json().get("model", {}).get("version", -1))

    def wait_for(version: int) -> None:
        deadline = time.monotonic() + 30
        while versions[-1:] != [version]:
            assert time.monotonic() < deadline, f"version {version} never answered"
            time.sleep(0.05)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    registry = open_registry(home)
    try:
        start = registry.version_of("fraud-own")
        other = 1 if start == 2 else 2
        registry.promote("fraud-own", other, reason="journey")
        wait_for(other)
        assert registry.rollback("fraud-own") == (other, start)
        wait_for(int(start or 0))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert set(versions) == {1, 2}


def test_operators_move_aliases_over_rest_and_the_log_has_why(service: httpx.Client, home: Config) -> None:
    registry = open_registry(home)
    before = registry.version_of("fraud-own")
    other = 1 if before == 2 else 2
    body = {"version": other, "reason": "asked for over REST", "unchecked": True}
    moved = service.post("/v1/admin/models/fraud-own/promote", json=body).json()
    assert (moved["from_version"], moved["version"]) == (before, other)

    def answering() -> int:
        return int(
            next(m for m in service.get("/v1/models").json()["models"] if m["application"] == "fraud")["version"]
        )

    deadline = time.monotonic() + 30
    while answering() != other:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    back = service.post("/v1/admin/models/fraud-own/rollback", json={"reason": "and back"}).json()
    assert back["version"] == before
    entries = [entry for entry in AuditLog(home.paths.audit_log).entries() if entry["model"] == "fraud-own"]
    assert [e["reason"] for e in entries if e["action"] in ("promote", "rollback")][-2:] == [body["reason"], "and back"]
    assert any(entry["action"] == "swap" and entry["version"] == other for entry in entries)
    while answering() != before:
        assert time.monotonic() < deadline + 30
        time.sleep(0.1)


def test_requests_that_come_at_once_get_what_each_would_get_alone(
    service: httpx.Client, files: dict[str, tuple[Path, Path]]
) -> None:
    rows = pd.read_csv(files["fraud"][0]).tail(40).to_dict("records")
    events = [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in rows]
    # The same card a moment later, what it has spent more by the first one's amount: as if it followed that one.
    follows = [{**e, "datetime": e["datetime"] + 1, "spent": round(e["spent"] + e["amount"], 2)} for e in events]
    asked: list[dict[str, Any]] = [*events, *follows, {**events[0], "amount": "much"}]

    def score(event: dict[str, Any]) -> tuple[int, Any]:
        answer = service.post("/v1/fraud/score", json={"events": [event], "explain": True})
        return answer.status_code, answer.json().get("scores")

    def batches() -> float:
        counted = re.findall(r'assay_batch_requests_count{application="fraud".*} (.+)', service.get("/metrics").text)
        return sum(map(float, counted))

    alone = [score(event) for event in asked]
    before = batches()
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(score, asked))
    assert batches() - before < 0.8 * len(asked), "they were not scored together, so nothing was compared"
    assert [status for status, _ in together] == [200] * 80 + [422]
    for (_, mine), (_, expected) in zip(together[:80], alone[:80], strict=True):
        assert mine[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-6)
        assert mine[0]["decision"] == expected[0]["decision"]
        for reason, same in zip(mine[0]["reasons"], expected[0]["reasons"], strict=True):
            assert reason["contribution"] == pytest.approx(same["contribution"], abs=1e-4)


def test_events_that_are_unlike_those_of_training_raise_an_alarm_that_names_the_column(
    service: httpx.Client, files: dict[str, tuple[Path, Path]]
) -> None:
    def told() -> dict[str, Any]:
        body: dict[str, Any] = service.get("/v1/drift").json()
        return body

    def look(factor: float) -> dict[str, Any]:
        """Score a window of the newest events, amounts times so much."""
        windows = told()["windows"]
        rows = pd.read_csv(files["fraud"][0]).tail(told()["window_rows"]).to_dict("records")
        events = [
            {
                k: None if isinstance(v, float) and np.isnan(v) else v * factor if k == "amount" else v
                for k, v in r.items()
            }
            for r in rows
        ]
        service.post("/v1/fraud/score", json={"events": events}).raise_for_status()
        deadline = time.monotonic() + 20
        while told()["windows"] == windows:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return told()

    for _ in range(2):  # what other tests have sent goes first
        look(1.0)
    first, second = look(100.0), look(100.0)
    assert "amount" in {one["column"] for one in first["findings"]}
    assert "amount" not in {one["column"] for one in first["alarms"]}
    [alarm] = [one for one in second["alarms"] if one["column"] == "amount"]
    assert alarm["text"].startswith("amount: ")
    alarms = re.findall(r"assay_drift_alarm\{(.*)\}", service.get("/metrics").text)
    assert any('column="amount"' in one and 'model="fraud-own"' in one for one in alarms)


def test_interactions_that_are_unlike_those_of_training_raise_an_alarm_too(
    service: httpx.Client, files: dict[str, tuple[Path, Path]]
) -> None:
    table = pd.read_csv(files["recommend"][0])

    def told() -> dict[str, Any]:
        body: dict[str, Any] = service.get("/v1/drift", params={"application": "recommend"}).json()
        return body

    def look(again: int, item: str) -> dict[str, Any]:
        """Users who were not there take what was taken, under other ids if so wanted."""
        windows = told()["windows"]
        newest = table.tail(told()["window_rows"])
        events = [
            {**row, "user_id": f"{row['user_id']}-{again}", "item_id": item + row["item_id"], "timestamp": time.time()}
            for row in newest.to_dict("records")
        ]
        for start in range(0, len(events), 500):
            sent = {"events": events[start : start + 500], "application": "recommend"}
            service.post("/v1/events", json=sent).raise_for_status()
        deadline = time.monotonic() + 20
        while told()["windows"] == windows:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return told()

    assert told()["model"]["name"] == "recommend-own"
    look(0, "")
    assert "item_id" not in {one["column"] for one in look(1, "")["findings"]}
    first, second = look(2, "sku-"), look(3, "sku-")
    assert "item_id" in {one["column"] for one in first["findings"]}
    assert "item_id" in {one["column"] for one in second["alarms"]}
    assert first["label_windows"] == 0


def test_events_sent_again_with_their_idempotency_key_count_once(
    service: httpx.Client, files: dict[str, tuple[Path, Path]]
) -> None:
    sent = payment(files, card_id="again and again")
    del sent["transaction_id"]
    call = {"json": {"events": [sent, sent]}, "headers": {"Idempotency-Key": "order 17"}}
    first = service.post("/v1/events", **call)
    again = service.post("/v1/events", **call)
    assert first.json()["accepted"] == {"fraud": 2}
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"


def test_a_worker_that_is_killed_loses_nothing_and_another_writes_on(
    home: Config, files: dict[str, tuple[Path, Path]], fraud_report: RunReport, tmp_path: Path
) -> None:
    shutil.copytree(home.paths.home, tmp_path / "home")
    with serving(tmp_path / "home", "--workers", "2", models=2) as (client, _):

        def workers() -> set[str]:
            """Those that hold models."""
            return set(re.findall(r'assay_model_version\{.*worker="(\d+)"', client.get("/metrics").text))

        def send(name: str) -> httpx.Response:
            """As a caller that sends the same again when nobody answers."""
            body = {"events": [payment(files, transaction_id=name, card_id=f"card {name}")], "application": "fraud"}
            for _ in range(100):
                with suppress(httpx.TransportError):
                    answer = client.post("/v1/events", json=body, headers={"Idempotency-Key": name})
                    if answer.status_code != 503:
                        return answer
                time.sleep(0.05)
            raise AssertionError("nobody takes events")

        deadline = time.monotonic() + 60
        while len(workers()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for i in range(20):
            # Whichever process is asked, the one that writes has it.
            assert send(f"before {i}").json()["accepted"] == {"fraud": 1}
        writer = int((tmp_path / "home" / "writer.lock").read_text())
        assert str(writer) in workers()
        os.kill(writer, signal.SIGKILL)
        began = time.monotonic()
        for _ in range(20):
            answer = client.post("/v1/fraud/score", json={"events": [payment(files)]})
            assert answer.status_code == 200, "whoever asks for a score does not notice"
        for i in range(20):
            assert sum(send(f"after {i}").json()["accepted"].values()) in (0, 1)
        assert time.monotonic() - began < 10
        assert int((tmp_path / "home" / "writer.lock").read_text()) != writer
        for i in range(20):
            for when in ("before", "after"):
                body = {"events": [payment(files, transaction_id=f"{when} {i}")], "application": "fraud"}
                assert client.post("/v1/events", json=body).json()["duplicates"] == {"fraud": [0]}, "it is in the log"
        while len(workers()) < 2 or str(writer) in workers():
            assert time.monotonic() < deadline + 60, "the worker was not started again"
            time.sleep(0.5)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "assay-probe"], check=False, capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", "assay-probe"], check=True)
    return made


@pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces need root and iproute2")
def test_a_lost_region_costs_no_answer_and_regions_come_to_know_the_same(
    fraud_report: RunReport, home: Config, files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    events = json.loads(pd.read_csv(files["fraud"][0]).drop(columns="fraud").tail(40).to_json(orient="records"))
    keys = ["card_id", "store_id", "provider"]
    table = {"events": events, "keys": keys, "totals": ["spent"], "id": "transaction_id", "timestamp": "datetime"}
    (tmp_path / "events.json").write_text(json.dumps(table))
    benchmark = Path(__file__).parents[2] / "benchmarks" / "serving_regions.py"
    ran = subprocess.run(
        [sys.executable, benchmark, "--json", "--model", "fraud-own", "--losses", "2", "--seconds", "1", "--rate", "20",
         "--pause", "1", "--regions", "near", "far", "--events", tmp_path / "events.json"],
        env={**os.environ, "ASSAY_HOME": str(home.paths.home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    rows = {row["case"]: row for row in json.loads(ran.stdout.splitlines()[-1])["rows"]}
    for case in (
        "failed while regions were drained and came back",
        "requests failed, none sent again by callers",
        "wrong scores",
        "sessions that did not read what they wrote",
        "acknowledged events that a region does not know",
        "payments that regions score differently afterwards",
    ):
        assert rows[case]["ours"] == 0, rows[case]
    # Within a second, or a little more where tests share the cores.
    assert rows["longest time without a good answer when the nearest is lost"]["ours"] < 2
    # There and back.
    assert [rows[f"{name}: p50 of a score through the gateway"]["ours"] > ms for name, ms in
            (("near", 4), ("far", 90))] == [True] * 2  # fmt: skip


def test_a_taken_port_is_said(service: httpx.Client, home: Config) -> None:
    port = str(service.base_url.port)
    environment = {**os.environ, "ASSAY_HOME": str(home.paths.home)}
    command = [sys.executable, "-m", "assay_services", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_run_as_a_ray_job(
    ray_session: str, home: Config, files: dict[str, tuple[Path, Path]], fraud_report: RunReport
) -> None:
    table, schema = files["fraud"]
    command = [sys.executable, "-m", "assay_pipelines.cli", "run", "fraud", "--data", str(table)]
    command += ["--schema", str(schema), "--name", "fraud-job", "--budget", "8", "--json", "--submit", ray_session]
    command += ["--workers", "2"]
    environment = {**os.environ, "ASSAY_HOME": str(home.paths.home)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(lines[-1])["model"] == {"name": "fraud-job", "version": 1, "alias": "champion"}
    assert open_registry(home).version_of("fraud-job") == 1


def test_the_champion_recalibrates_and_learns_on_from_what_the_table_has_since(
    home: Config, files: dict[str, tuple[Path, Path]], ray_session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a name of its own, so that the service's champion stays what it is."""
    own = options(home, "fraud", files["fraud"], model_name="fraud-learning", num_held_back=900)
    run_application(own, Reporter())
    registry = open_registry(home)
    before = read_json(registry.download("fraud-learning", 1), "features")

    first = FraudModel.load(registry.download("fraud-learning", 1))
    drifted = first.changed(calibration=replace(first.calibration, intercept=first.calibration.intercept + 2.0))
    with monkeypatch.context() as patch:
        patch.setattr("assay_pipelines.fraud.update.FraudModel.load", lambda _: drifted)
        moved = run_application(replace(own, num_held_back=0, recalibrate=True), Reporter())
    assert moved.alias == "champion"
    assert moved.metrics["ece"] < moved.baselines["champion"]["ece"] / 2
    second = FraudModel.load(registry.download("fraud-learning", 2))
    assert second.calibration.intercept < drifted.calibration.intercept - 1.0
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.parts.net.state_dict().values(), second.parts.net.state_dict().values(), strict=True)
    )
    assert read_json(registry.download("fraud-learning", 2), "features") == before
    steady = run_application(replace(own, num_held_back=0, recalibrate=True), Reporter())
    assert steady.alias == "challenger"
    assert "no drift" in steady.gate

    report = run_application(replace(own, num_held_back=0, update=True), Reporter()).to_dict()
    assert report["model"]["version"] == 4
    assert report["baselines"].keys() == {"champion"}
    after = read_json(registry.download("fraud-learning", 4), "features")
    assert after["learned_until_us"] > before["learned_until_us"]
    assert after["plan"] == before["plan"]
    models = [FraudModel.load(registry.download("fraud-learning", number)) for number in (2, 4)]
    sizes = [0 if model.parts.trees is None else len(model.parts.trees) for model in models]
    assert sizes[1] > sizes[0] or sizes == [0, 0]
    assert models[0].feature_names == models[1].feature_names
    registry.promote("fraud-learning", 4, reason="test")
    with pytest.raises(InputError, match=r"has learned until .* needs at least 10"):
        run_application(replace(own, num_held_back=0, update=True), Reporter())
    anew = run_application(replace(own, num_held_back=0), Reporter())
    assert "a person has to decide" in anew.gate
    assert anew.alias == "challenger"
    with pytest.raises(InputError, match="no champion to learn on"):
        run_application(replace(own, model_name="fraud-nobody", update=True), Reporter())


def test_what_is_kept_of_a_card_is_forgotten_when_asked_to(
    service: httpx.Client, home: Config, files: dict[str, tuple[Path, Path]]
) -> None:
    for name, card in (("forget 1", "leaver"), ("forget 2", "leaver"), ("keep", "stayer")):
        _record(service, payment(files, transaction_id=name, card_id=card))
    moments = [{"events": [payment(files, card_id=card)], "explain": False} for card in ("leaver", "nobody knows")]
    events = [payment(files, transaction_id=f"paid {i}", card_id="leaver") for i in range(3)]
    moments[0]["events"][0]["datetime"] = moments[1]["events"][0]["datetime"] = events[0]["datetime"] + 60
    service.post("/v1/events", json={"events": events, "application": "fraud"})

    def scores() -> list[float]:
        return [service.post("/v1/fraud/score", json=body).json()["scores"][0]["score"] for body in moments]

    body = {"column": "card_id", "value": "leaver", "reason": "asked for in letter 12"}
    assert service.post("/v1/admin/erase", json=body).json() == {"erased": 5}
    for name in ("forget 1", "forget 2"):
        assert service.get(f"/v1/fraud/decisions/{name}").status_code == 404
    assert service.get("/v1/fraud/decisions/keep").status_code == 200
    newest = service.get("/v1/fraud/decisions").json()["decisions"]
    assert "leaver" not in {one["event"]["card_id"] for one in newest}
    known, unknown = scores()
    assert known == unknown, "to a score it was never seen"
    entry = list(AuditLog(home.paths.audit_log).entries())[-1]
    assert (entry["action"], entry["records"], entry["reason"]) == ("erase", 5, "asked for in letter 12")
    assert "leaver" not in json.dumps(entry)
    assert "names nobody" in service.post("/v1/admin/erase", json={**body, "column": "amount"}).json()["detail"]


def test_labels_are_counted_with_what_was_decided(service: httpx.Client, files: dict[str, tuple[Path, Path]]) -> None:
    def judged() -> float:
        text = service.get("/metrics").text
        return sum(map(float, re.findall(r'assay_fraud_judged_total{.*fraud="true".*} (.+)', text)))

    before = judged()
    made = _record(service, payment(files, transaction_id="judged"))["decision"]
    label = {"id": "judged", "fraud": True, "reported_at": made["decided_at"]}
    for _ in range(2):  # the same label twice is one
        assert service.post("/v1/labels", json={"labels": [label]}).status_code == 202
    assert judged() == before + 1


def test_slow_and_half_open_callers_hold_up_nobody(service: httpx.Client, files: dict[str, tuple[Path, Path]]) -> None:
    content = json.dumps({"events": [payment(files)]}).encode()
    head = f"POST /v1/fraud/score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    where = ("127.0.0.1", service.base_url.port)
    idle = [socket.create_connection(where) for _ in range(50)]
    stuck = [socket.create_connection(where) for _ in range(50)]
    for one in stuck:
        one.sendall(head + content[:10])  # and never the rest
    gone = [socket.create_connection(where) for _ in range(20)]
    for one in gone:
        one.sendall(head + content)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()  # a reset, without waiting for the answer
    began = time.monotonic()
    for _ in range(20):
        assert service.post("/v1/fraud/score", content=content).status_code == 200
    assert time.monotonic() - began < 5
    slow = socket.create_connection(where)
    for i in range(0, len(head + content), 40):
        slow.sendall((head + content)[i : i + 40])
        time.sleep(0.01)
    assert slow.recv(100).startswith(b"HTTP/1.1 200")
    for one in (*idle, *stuck, slow):
        one.close()


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not there")
def test_a_clock_that_jumps_changes_no_score_and_forgets_nothing(
    home: Config, files: dict[str, tuple[Path, Path]], fraud_report: RunReport, tmp_path: Path
) -> None:
    shutil.copytree(home.paths.home, tmp_path / "home")
    (tmp_path / "assay.toml").write_text("[service]\npoll_registry_s = 0.05\n")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    with serving(
        tmp_path / "home", models=1, ASSAY_CONFIG=str(tmp_path / "assay.toml"), LD_PRELOAD=str(FAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1",
    ) as (client, _):  # fmt: skip

        def score(name: str, **changes: Any) -> float:
            answer = client.post("/v1/fraud/score", json={"events": [payment(files, transaction_id=name, **changes)]})
            assert answer.status_code == 200, answer.text
            return float(answer.json()["scores"][0]["score"])

        before = score("before")
        real_now = time.time()
        event = payment(files, transaction_id="now", datetime=real_now, card_id="now")
        now = {"events": [event], "application": "fraud"}
        for i, jump in enumerate(("+2d", "-2d", "+3y", "+0")):
            clock.write_text(jump)
            assert score(f"after {jump}") == pytest.approx(before, abs=1e-9)
            known = client.get(f"/v1/fraud/decisions/after {jump}").json()["decision"]["decided_at"]
            moved_d = (known - real_now) / 86_400
            assert moved_d == pytest.approx({"+2d": 2, "-2d": -2, "+3y": 3 * 365, "+0": 0}[jump], abs=0.1), "it jumped"
            event = payment(files, transaction_id=f"event {i}", card_id=f"clock {i}")
            answer = client.post("/v1/events", json={"events": [event], "application": "fraud"})
            assert answer.json()["accepted"] == {"fraud": 1}
            if jump == "-2d":
                # An event of now is ahead of a clock that is two days late; it is refused, and nothing of it is kept.
                assert client.post("/v1/events", json=now).status_code == 422
            time.sleep(1.5)  # in which old decisions are looked for twice
            assert client.get("/v1/fraud/decisions/before").status_code == 200, "it is not old"
        for i in range(4):
            event = payment(files, transaction_id=f"event {i}", card_id=f"clock {i}")
            answer = client.post("/v1/events", json={"events": [event], "application": "fraud"})
            assert answer.json()["duplicates"] == {"fraud": [0]}
        assert client.post("/v1/events", json=now).json()["accepted"] == {"fraud": 1}


def same_again(config: Config, name: str) -> int:
    """One more version, the same as the champion."""
    client = open_client(config.tracking_uri)
    first = client.get_model_version(name, str(open_registry(config).version_of(name)))
    made = client.create_model_version(name, first.source, first.run_id, tags=first.tags, model_id=first.model_id)
    return int(made.version)


def copied(config: Config, name: str, copy: str, kind: str) -> None:
    """A model of another name with the same champion."""
    client = open_client(config.tracking_uri)
    first = client.get_model_version(name, str(open_registry(config).version_of(name)))
    client.create_registered_model(copy, tags={"assay.application": kind})
    client.create_model_version(copy, first.source, first.run_id, tags=first.tags, model_id=first.model_id)
    open_registry(config).promote(copy, 1, reason="a copy")


@pytest.fixture
def own_home(home: Config, fraud_report: RunReport, recommend_report: RunReport, tmp_path: Path) -> Config:
    """A copy of what was trained, for tests that change what others rely on."""
    shutil.copytree(home.paths.home, tmp_path / "home")
    return Config(paths=Paths(home=tmp_path / "home", cache=home.paths.cache))


def test_requests_name_other_models_by_their_path_and_each_keeps_to_itself(
    own_home: Config, files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    config = own_home
    for name, copy, kind in (
        ("fraud-own", "cards", "fraud"), ("fraud-own", "claims", "fraud"), ("recommend-own", "shop", "recommend"),
    ):  # fmt: skip
        copied(config, name, copy, kind)
    settings = tmp_path / "assay.toml"
    settings.write_text("[service]\nmax_models = 2\nworkers = 2\npoll_registry_s = 0.2\n")
    options = ("--fraud", "fraud-own", "--recommend", "recommend-own")
    with serving(config.paths.home, *options, ASSAY_CONFIG=str(settings)) as (client, _):

        def scored(prefix: str, **changes: Any) -> dict[str, Any]:
            body = {"events": [payment(files, **changes)], "explain": True}
            answer = client.post(f"{prefix}/v1/fraud/score", json=body)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        with ThreadPoolExecutor(8) as pool:  # all of them wait for the same reading, in both processes
            at_once = list(pool.map(lambda i: scored("/models/cards", transaction_id=f"c{i}"), range(8)))
        assert {str(one["model"]) for one in at_once} == {str({"name": "cards", "version": 1})}
        [score] = at_once[0]["scores"]
        logit = score["base"] + sum(reason["contribution"] for reason in score["reasons"])
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(score["score"], abs=1e-6)
        assert scored("")["model"]["name"] == scored("/models/fraud-own")["model"]["name"] == "fraud-own"
        assert client.post("/models/fraud-own/v1/recommend", json={"user_id": "u1"}).status_code == 404
        assert [one["name"] for one in client.get("/models/fraud-own/v1/models").json()["models"]] == ["fraud-own"]

        # What one model is told, the others do not know.
        event = payment(files, transaction_id="for cards alone")
        sent = client.post("/models/cards/v1/events", json={"events": [event]})
        assert (sent.status_code, sent.json()["accepted"]) == (202, {"fraud": 1})
        again = {"events": [event], "application": "fraud"}
        assert client.post("/models/cards/v1/events", json=again).json()["duplicates"] == {"fraud": [0]}
        assert client.post("/v1/events", json=again).json()["accepted"] == {"fraud": 1}
        deadline = time.monotonic() + 10  # until the process that decided has written it
        while (kept := client.get("/models/cards/v1/fraud/decisions/c0")).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert kept.json()["decision"]["model"]["name"] == "cards"
        assert client.get("/v1/fraud/decisions/c0").status_code == 404

        # A third one takes the place of the least used; the one that went comes back when it is asked for.
        listed = client.post("/models/shop/v1/recommend", json={"user_id": "u1", "k": 3})
        assert (listed.json()["model"]["name"], len(listed.json()["items"])) == ("shop", 3)
        wrong = client.post("/models/shop/v1/fraud/score", json={"events": [event]})
        assert (wrong.status_code, "recommend" in wrong.json()["detail"]) == (404, True)
        assert scored("/models/claims")["model"]["name"] == "claims"
        assert scored("/models/cards")["model"]["name"] == "cards"
        for _ in range(4):  # both processes
            assert len(client.get("/v1/models").json()["models"]) <= 4

        # Versions are followed, also of those.
        version = same_again(config, "cards")
        open_registry(config).promote("cards", version, reason="newer")
        deadline = time.monotonic() + 30
        while scored("/models/cards")["model"]["version"] != version:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        nobody = client.post("/models/nobody/v1/fraud/score", json={"events": [event]})
        assert (nobody.status_code, "nobody" in nobody.json()["detail"]) == (404, True)


def test_behind_ray_serve_models_share_replicas_or_have_their_own(
    own_home: Config, files: dict[str, tuple[Path, Path]], ray_session: str, tmp_path: Path
) -> None:
    config = own_home
    for copy in ("cards", "claims", "transfers"):
        copied(config, "fraud-own", copy, "fraud")
    settings = tmp_path / "assay.toml"
    settings.write_text('[service]\nmax_models = 1\n[scaling]\nmax_replicas = 1\nown_replicas = ["claims"]\n')
    options = ("--ray", "--fraud", "fraud-own", "--recommend", "nothing")
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with serving(config.paths.home, *options, models=1, ASSAY_CONFIG=str(settings), **cluster) as (client, _):

        def names(prefix: str) -> list[str]:
            return [one["name"] for one in client.get(f"{prefix}/v1/models").json()["models"]]

        def answers(prefix: str, **headers: str) -> str:
            body = {"events": [payment(files)]}
            answer = client.post(f"{prefix}/v1/fraud/score", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["model"]["name"])

        deadline = time.monotonic() + 60
        while client.get("/models/claims/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert names("/models/claims") == [answers("/models/claims")] == ["claims"]
        assert answers("") == "fraud-own"
        for name in ("cards", "transfers", "cards"):
            assert answers(f"/models/{name}", serve_multiplexed_model_id=name) == name
            assert names("") == ["fraud-own", name], "one at a time, and not that of replicas of its own"
        assert client.post("/models/nobody/v1/fraud/score", json={"events": [{}]}).status_code == 404


def test_without_its_registry_a_service_goes_on_and_a_poisoned_version_changes_nothing(
    own_home: Config, files: dict[str, tuple[Path, Path]]
) -> None:
    config = own_home
    with serving(config.paths.home, "--fraud", "fraud-own") as (client, _):

        def scores() -> float:
            answer = client.post("/v1/fraud/score", json={"events": [payment(files)]})
            assert answer.status_code == 200
            return float(answer.json()["scores"][0]["score"])

        before = scores()
        # A registry that is no database any more.
        store = config.paths.home / "mlflow.db"
        kept = store.read_bytes()
        store.write_bytes(b"not a database" * 100)
        time.sleep(2.5)  # two looks at it
        assert scores() == pytest.approx(before, abs=1e-6)
        away = client.get("/v1/registry")
        assert (away.status_code, away.headers["retry-after"]) == (503, "5")
        sent = {"events": [payment(files, transaction_id="while it was away")], "application": "fraud"}
        assert client.post("/v1/events", json=sent).json()["accepted"] == {"fraud": 1}
        store.write_bytes(kept)
        assert client.get("/v1/registry").status_code == 200
        # A disk that takes nothing more.
        scorer = int((config.paths.home / "writer.lock").read_text())
        free = resource.prlimit(scorer, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        refused = {"events": [payment(files, transaction_id="disk full")], "application": "fraud"}
        answer = client.post("/v1/events", json=refused)
        assert answer.status_code == 503, "what is not safe is not acknowledged"
        assert scores() == pytest.approx(before, abs=1e-6)
        resource.prlimit(scorer, resource.RLIMIT_FSIZE, free)
        assert client.post("/v1/events", json=refused).json()["accepted"] == {"fraud": 1}
        assert client.post("/v1/events", json=sent).json()["duplicates"] == {"fraud": [0]}
        # A version whose weights somebody has changed after they were registered.
        registry = open_registry(config)
        now, other = registry.version_of("fraud-own"), same_again(config, "fraud-own")
        [weights] = registry.download("fraud-own", other).glob("*.safetensors")
        whole = weights.read_bytes()
        poisoned = bytearray(whole)
        poisoned[-8:] = b"\xff" * 8
        weights.write_bytes(poisoned)
        registry.promote("fraud-own", other, reason="poisoned", unchecked=True)
        deadline = time.monotonic() + 20
        while 'outcome="failed"' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        weights.write_bytes(whole)  # the copied registry's artifacts are those of the first
        assert client.get("/v1/models").json()["models"][0]["version"] == now
        assert scores() == pytest.approx(before, abs=1e-6)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a screen."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=quiet)
        yield running
        running.close()


@pytest.mark.browser
def test_the_console_shows_what_happens_and_moves_an_alias(
    service: httpx.Client, home: Config, files: dict[str, tuple[Path, Path]], browser: Any
) -> None:
    named = "<img src=x onerror=alert(1)>"
    _record(service, payment(files, transaction_id=named))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    assert page.goto(f"{service.base_url}/").url.endswith("/console")
    page.get_by_text("answers", exact=True).wait_for()
    page.get_by_text(named).first.wait_for()  # as text, whatever it would be as HTML
    page.get_by_role("button", name="Ask").click()
    page.locator("#answer .badge").wait_for()
    assert "fraud-own" in page.locator("#answer").inner_text()
    page.get_by_label("Recommend to a user").check()
    page.get_by_label("How many").fill("3")
    page.get_by_role("button", name="Ask").click()
    page.locator("#answer ol > li").first.wait_for()
    assert page.locator("#answer ol > li").count() == 3

    # By the keyboard alone: to the button, reason, and away with Enter.
    before, wanted = open_registry(home).version_of("fraud-own"), same_again(home, "fraud-own")
    page.get_by_role("button", name=f"Promote fraud-own version {wanted}", exact=True).focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.get_by_label("Reason, for the audit log").press_sequentially("from the console")
    page.get_by_label("without a rehearsal").check()
    page.get_by_role("button", name="Change").press("Enter")
    page.locator("tr", has_text=re.compile(rf"fraud-own\s*{wanted}\s*champion")).wait_for()
    assert open_registry(home).version_of("fraud-own") == wanted != before
    assert next(
        reversed([e["reason"] for e in AuditLog(home.paths.audit_log).entries() if e["action"] == "promote"])
    ) == ("from the console")
    assert wrong == []
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1280, "dark")])
def test_the_console_fits_a_phone_and_both_themes_can_be_read(
    service: httpx.Client, browser: Any, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(f"{service.base_url}/console")
    page.get_by_text("answers", exact=True).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing has to be pushed sideways"
    # WCAG 2 wants a contrast of 4.5 between text and what is behind it.
    contrast = """(names) => {
      const probe = document.createElement('span'); document.body.append(probe);
      const light = (name) => {
        probe.style.color = `var(${name})`;
        const [r, g, b] = getComputedStyle(probe).color.match(/[0-9]+/g).map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      return names.map(([text, behind]) => {
        const [a, b] = [light(text), light(behind)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      });
    }"""
    pairs = [["--text", "--card"], ["--muted", "--card"], ["--muted", "--page"], ["--accent", "--card"],
             ["--good", "--good-back"], ["--warn", "--warn-back"], ["--bad", "--bad-back"]]  # fmt: skip
    assert min(page.evaluate(contrast, pairs)) >= 4.5
    page.get_by_role("button", name="Light theme" if scheme == "dark" else "Dark theme").click()
    assert min(page.evaluate(contrast, pairs)) >= 4.5
    page.close()


def test_whatever_the_openapi_allows_has_an_answer_that_it_foresees(service: httpx.Client) -> None:
    """Last of all: some of what is sent is taken in."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import CHECKS

    schema = schemathesis.openapi.from_url(f"{service.base_url}/openapi.json")
    # What an event has to have is the model's schema, which the service's does not know.
    unforeseen = [check for check in CHECKS.get_all() if getattr(check, "__name__", "") == "positive_data_acceptance"]
    asked: set[tuple[str, str]] = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == "/metrics":
            continue

        @settings(max_examples=30, deadline=None, database=None, derandomize=True,
                  suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])  # fmt: skip
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            asked.add((case.method, case.path))
            case.call_and_validate(excluded_checks=unforeseen)

        ask()
    assert len(asked) > 12
    assert service.get("/healthz").status_code == 200
