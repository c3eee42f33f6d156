"""The chart is what Helm and Kubernetes take, and the settings that it writes are what Assay reads."""

import json
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml
from assay_platform.config import load_config

INFRA = Path(__file__).parents[2] / "infra"
CHART = INFRA / "helm" / "assay"
LEAST: dict[str, Any] = {"service": {"apiKeysSecret": "assay-keys"}}
ALL: dict[str, Any] = {
    "trackingUri": "http://mlflow:5000",
    "service": {
        "apiKeysSecret": "assay-keys", "webhookSecret": "hook", "tlsSecret": "tls", "workers": 3,
        "settings": {"max_wait_ms": 100.0, "keep_decisions_days": 30.0}, "rollout": {"shadow": True},
    },
    "gateway": {"enabled": True, "regions": {"north": "http://assay:8000"}, "keySecret": "gateway"},
    "ray": {"enabled": True, "gpu": {"max": 4}},
    "monitoring": {"enabled": True},
}  # fmt: skip
# Of operators; Kubernetes itself does not know them.
OTHERS = ("RayCluster", "ServiceMonitor", "PrometheusRule")


def rendered(values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Kind and name → object."""
    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(values, name="shop", namespace="assay")
    texts = {path: text for path, text in texts.items() if path.endswith(".yaml")}
    objects = [one for text in texts.values() for one in yaml.safe_load_all(text) if one is not None]
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def pods_of(objects: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Specs of all pods, the Ray cluster's too."""
    pods = [one["spec"]["template"]["spec"] for (kind, _), one in objects.items() if kind == "StatefulSet"]
    for (kind, _), one in objects.items():
        if kind == "RayCluster":
            groups = [one["spec"]["headGroupSpec"], *one["spec"]["workerGroupSpecs"]]
            pods += [group["template"]["spec"] for group in groups]
    return pods


@pytest.mark.parametrize("values", [LEAST, ALL])
def test_helm_has_nothing_to_say_against_the_chart(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True, kube_version="v1.34.0")
    assert report["errors"] == []
    # Severity 1 is information: charts may have an icon.
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "/service/apiKeysSecret"),
        ({**LEAST, "gateway": {"enabled": True}}, "/gateway"),
        ({**LEAST, "gateway": {"regions": {"a": "no url"}}}, "/gateway/regions/a"),
        ({"service": {"apiKeysSecret": "k", "workers": 0}}, "/service/workers"),
        ({**LEAST, "servise": {}}, "servise"),
    ],
)
def test_values_that_do_not_fit_are_named(values: dict[str, Any], named: str) -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmError, match=named):
        chart.render(values, name="shop", namespace="assay")


@pytest.mark.parametrize("values", [LEAST, ALL])
@pytest.mark.parametrize("version", ["1.35", "1.37"])
def test_kubernetes_takes_every_object(values: dict[str, Any], version: str) -> None:
    objects = rendered(values)
    for (kind, _), one in objects.items():
        if kind not in OTHERS:
            kubernetes_validate.validate(one, version, strict=True)
    for spec in pods_of(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("values", [LEAST, ALL])
def test_settings_in_the_chart_are_settings(values: dict[str, Any], tmp_path: Path) -> None:
    for (kind, name), one in rendered(values).items():
        if kind == "ConfigMap":
            text = one["data"]["assay.toml"]
            for file in ("tls.crt", "tls.key"):
                (tmp_path / file).touch()
                text = text.replace(f"/etc/assay-tls/{file}", str(tmp_path / file))
            (tmp_path / "assay.toml").write_text(text)
            config = load_config(tmp_path / "assay.toml")
            if name == "shop":
                workers, wait_ms = (3, 100.0) if values is ALL else (2, 250.0)
                assert (config.service.workers, config.service.max_wait_ms) == (workers, wait_ms)
                assert config.rollout.shadow is (values is ALL)
            if name == "shop-gateway":
                assert config.gateway.regions == {"north": "http://assay:8000"}


def test_no_pod_is_root_or_writes_its_image_and_none_has_a_token_of_the_cluster() -> None:
    for spec in pods_of(rendered(ALL)):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"] + spec.get("initContainers", []):
            if container["name"] != "ray":  # it writes its logs beside itself
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_services_find_their_pods_and_pods_their_volumes() -> None:
    objects = rendered(ALL)
    for (kind, name), one in objects.items():
        if kind == "Service":
            template = objects["StatefulSet", name]["spec"]["template"]
            assert one["spec"]["selector"].items() <= template["metadata"]["labels"].items()
            (port,) = one["spec"]["ports"]
            assert port["targetPort"] in {p["name"] for c in template["spec"]["containers"] for p in c["ports"]}
        if kind == "StatefulSet":
            spec = one["spec"]["template"]["spec"]
            known = {v["name"] for v in spec["volumes"]} | {
                claim["metadata"]["name"] for claim in one["spec"]["volumeClaimTemplates"]
            }
            for container in spec["containers"] + spec["initContainers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= known


def test_alerts_on_kubernetes_are_those_of_prometheus_and_ask_for_the_same_jobs() -> None:
    objects = rendered(ALL)
    assert objects["PrometheusRule", "shop"]["spec"] == yaml.safe_load((INFRA / "prometheus" / "rules.yml").read_text())
    jobs = {one["metadata"]["labels"]["assay-job"] for (kind, _), one in objects.items() if kind == "Service"}
    assert jobs == {"assay", "assay-gateway"}
    scraped = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert {one["job_name"] for one in scraped} == jobs


def test_the_schema_of_values_is_one_and_fits_the_defaults() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values["service"]["apiKeysSecret"] = "some"
    jsonschema.validate(values, schema)
