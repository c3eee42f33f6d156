"""From an event to the score that it changes, over HTTP, while 200 other events a second come in.

A small fraud model is trained on synthetic payments in a home of its own and served by `assay serve` on loopback. Four
senders keep to a fixed rate; another client sends an event of a probe card and asks for that card's score until the
score differs from the one before. Client and server share the machine's cores.

    assay bench features_freshness [--json]
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

RATE, NUM_SENDERS, NUM_PROBES, NUM_CARDS, NUM_ROWS = 200, 4, 200, 300, 6_000
START = 1_700_000_000

SCHEMA = """
kind = "fraud"
[columns]
id = "id"
timestamp = "time"
label = "fraud"
amount = "amount"
entities = ["card", "store"]
numeric = ["amount"]
categorical = ["provider"]
"""


def table() -> pd.DataFrame:
    """Fraud comes in bursts: a card's third payment within an hour is likelier to be fraud."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "id": [f"t{i}" for i in range(NUM_ROWS)],
            "time": START + np.sort(rng.integers(0, 3 * 86_400, NUM_ROWS)),
            "amount": rng.lognormal(3.0, 1.0, NUM_ROWS).round(2),
            "card": [f"c{k}" for k in rng.zipf(1.3, NUM_ROWS) % NUM_CARDS],
            "store": [f"s{k}" for k in rng.integers(0, 30, NUM_ROWS)],
            "provider": rng.choice(["alpha", "beta"], NUM_ROWS),
        }
    )
    hour = frame.groupby("card")["time"].transform(
        lambda t: pd.Series(np.arange(len(t)) - np.searchsorted(t, t - 3600), t.index)
    )
    chance = np.where(hour >= 2, 0.3, 0.02) * np.where(frame["amount"] > 30, 2, 1)
    return frame.assign(fraud=(rng.random(NUM_ROWS) < np.minimum(chance, 1)).astype(int))


def payment(card: str, name: str, second: float) -> dict[str, Any]:
    """One event."""
    return {"id": name, "time": START + 3 * 86_400 + second, "amount": 50.0, "card": card, "store": "s1",
            "provider": "alpha", "fraud": 0}  # fmt: skip


def main() -> None:
    """Train, serve, measure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table().to_csv(folder / "payments.csv", index=False)
        (folder / "payments.toml").write_text(SCHEMA)
        environment = {**os.environ, "ASSAY_HOME": str(folder / "home")}
        command = [sys.executable, "-m", "assay_pipelines.cli", "run", "fraud", "--data", str(folder / "payments.csv"),
                   "--schema", str(folder / "payments.toml"), "--budget", "10"]  # fmt: skip
        subprocess.run(command, env=environment, check=True, capture_output=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        service = subprocess.Popen([sys.executable, "-m", "assay_services", "--port", str(port)], env=environment)
        try:
            finish("features_freshness", measure(f"http://127.0.0.1:{port}"))
        finally:
            service.terminate()
            service.wait(timeout=30)


def measure(url: str) -> list[dict[str, Any]]:
    """Probe after probe under load."""
    wait_until_ready(url)
    stop, sent = threading.Event(), [0] * NUM_SENDERS

    def load(sender: int) -> None:
        rng = np.random.default_rng(sender)
        began = time.perf_counter()
        with httpx.Client(base_url=url, timeout=30) as client:
            while not stop.is_set():
                seconds = sent[sender] * NUM_SENDERS / RATE
                time.sleep(max(0.0, began + seconds - time.perf_counter()))
                event = payment(f"c{rng.integers(0, NUM_CARDS)}", f"load{sender}-{sent[sender]}", seconds)
                client.post("/v1/events", json={"events": [event]}).raise_for_status()
                sent[sender] += 1

    threads = [threading.Thread(target=load, args=(k,), daemon=True) for k in range(NUM_SENDERS)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    fresh, posts, unchanged = [], [], 0
    began_all, sent_before = time.perf_counter(), sum(sent)
    with httpx.Client(base_url=url, timeout=30) as client:

        def score(card: str) -> float:
            body = {"events": [payment(card, "probe", 3600.0)], "explain": False}
            return float(client.post("/v1/fraud/score", json=body).json()["scores"][0]["score"])

        for i in range(NUM_PROBES):
            card = f"probe{i % 20}"
            before = score(card)
            event = payment(card, f"p{i}", 60.0 + i)
            began = time.perf_counter()
            client.post("/v1/events", json={"events": [event]}).raise_for_status()
            posts.append((time.perf_counter() - began) * 1e3)
            while score(card) == before:
                if time.perf_counter() - began > 2:
                    unchanged += 1
                    break
            fresh.append((time.perf_counter() - began) * 1e3)
    rate = (sum(sent) - sent_before) / (time.perf_counter() - began_all)
    stop.set()
    for thread in threads:
        thread.join(timeout=10)
    assert unchanged <= NUM_PROBES // 20, f"{unchanged} of {NUM_PROBES} events changed no score"
    return [
        row("event to changed score, p50", float(np.median(fresh)), "ms", runs=NUM_PROBES),
        row("event to changed score, p99", float(np.quantile(fresh, 0.99)), "ms", limit=100.0, limit_name="target",
            runs=NUM_PROBES),
        row("POST /v1/events, p50", float(np.median(posts)), "ms", runs=NUM_PROBES),
        row("events a second beside", rate, "events/s", limit=float(RATE), limit_name="asked", higher_is_better=True),
        row("events whose score stayed equal", unchanged, "events", limit=0, limit_name="none", runs=NUM_PROBES),
    ]  # fmt: skip


def wait_until_ready(url: str) -> None:
    """Until a model answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise TimeoutError("the service did not come up")


if __name__ == "__main__":
    main()
