"""Files for containers, Prometheus and Grafana are what their own programs take, and speak of what there is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from assay_platform.config import load_config
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_services.gateway.choice import Region
from assay_services.gateway.metrics import RegionMetrics
from assay_services.gateway.outbox import Outbox

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PROMTOOL, HADOLINT = shutil.which("promtool"), str(Path(sys.executable).parent / "hadolint")


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed")
def test_prometheus_takes_the_rules_and_they_fire_when_they_should() -> None:
    run("promtool", "check", "rules", "rules.yml", cwd=INFRA / "prometheus")
    run("promtool", "test", "rules", "rules_test.yml", cwd=INFRA / "prometheus")


@pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed")
def test_what_the_dashboard_asks_is_asked_rightly(tmp_path: Path) -> None:
    asked = [one.replace("$__rate_interval", "5m").replace("$instance", ".*") for one in dashboard_queries()]
    rules = [{"record": f"asked:{i}", "expr": query} for i, query in enumerate(asked)]
    (tmp_path / "asked.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    run("promtool", "check", "rules", str(tmp_path / "asked.yml"))


def dashboard_queries() -> list[str]:
    panels = json.loads((INFRA / "grafana" / "dashboards" / "assay.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alerts_and_dashboard_ask_for_metrics_that_the_service_has(tmp_path: Path) -> None:
    metrics = ServiceMetrics()
    metrics.watch_tasks(tmp_path)
    metrics.watch_queues(dict)
    metrics.watch_tiers(dict)
    metrics.watch_experts(dict)
    outbox = Outbox(tmp_path / "gateway", ["a"])
    RegionMetrics(metrics.registry, {"a": Region("a")}, outbox)
    known = set(re.findall(r"# TYPE (\S+)", metrics.render().decode()))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for query in [rule["expr"] for rule in rules()] + dashboard_queries():
        for name in re.findall(r"\b(assay[\w:]*|process_\w+)\b(?=[{\[)\s]|$)", query):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in known | recorded or family in known, f"{name} in {query}"


def test_every_alert_has_a_runbook() -> None:
    headings = {
        line[4:].strip() for line in (ROOT / "docs" / "operations.md").read_text().splitlines() if line[:4] == "### "
    }
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert alerts.keys() == headings
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("name", ["Dockerfile", "gpu.Dockerfile", "mlflow.Dockerfile"])
def test_container_files_have_nothing_that_their_linter_minds(name: str) -> None:
    run(HADOLINT, str(INFRA / "container" / name))


def test_compose_names_files_and_services_that_there_are_and_shows_nothing_to_others() -> None:
    file = yaml.safe_load((INFRA / "compose.yaml").read_text())
    services = file["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= services.keys()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in file["volumes"] or (INFRA / source).exists(), volume
        if "build" in service:
            context = (INFRA / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file()
        # Passwords come from the environment; one that is written down is known to everybody.
        assert not re.search(r"(?i)(password|secret)\S*[:=] *[\w-]+$", yaml.safe_dump(service), re.MULTILINE)
    wanted = (INFRA / "container" / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", wanted, re.MULTILINE):
        assert all(f"!{one}" in ignored for one in source.split()), source


def test_the_settings_of_the_composed_service_are_settings() -> None:
    assert load_config(INFRA / "assay.toml").tracking_uri == "http://mlflow:5000"
