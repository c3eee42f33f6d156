"""The cluster files are what Ray and Kubernetes take, and keep what `docs/compute.md` promises."""

import json
import os
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra" / "ray"
FILE = FOLDER / "cluster.yaml"
# A folder with the definitions of KubeRay's resources, which its operator's Helm chart has.
DEFINITIONS = os.environ.get("KUBERAY_CRDS", "")


def test_the_cluster_file_fits_the_schema_of_ray() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load(FILE.read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))


def test_nodes_ask_for_the_token_and_the_job_server_stays_on_loopback() -> None:
    config = yaml.safe_load(FILE.read_text())
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert all("RAY_AUTH_MODE=token" in command for command in (head, worker))
    assert "--dashboard-host=127.0.0.1" in head
    token = "~/.ray/auth_token"  # noqa: S105 - where it lies
    assert config["file_mounts"][token] == token


def on_kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    """The volume and the cluster of the chart."""
    values = {"service": {"apiKeysSecret": "keys"}, "ray": {"enabled": True, "gpu": {"max": 4}}}
    with helm_python.Chart.load(FOLDER.parent / "helm" / "assay") as chart:
        text = chart.render(values, name="shop", namespace="assay")["assay/templates/ray.yaml"]
    volume, cluster = yaml.safe_load_all(text)
    return volume, cluster


def groups() -> list[dict[str, Any]]:
    spec = on_kubernetes()[1]["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_volume_and_pods_fit_the_schemas_of_kubernetes() -> None:
    volume, _ = on_kubernetes()
    kubernetes_validate.validate(volume, "1.34", strict=True)
    for group in groups():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)


def test_ray_reads_from_the_cluster_what_its_nodes_have() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    _, cluster = on_kubernetes()
    cluster["metadata"]["namespace"] = "assay"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0  # the head runs no tasks
    assert types["cpu"]["resources"]["CPU"] == 8
    assert (types["gpu"]["resources"]["GPU"], types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (1, 0, 4)


def test_pods_are_no_root_and_see_one_home_and_the_cluster_asks_for_a_token() -> None:
    volume, cluster = on_kubernetes()
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    for group in groups():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert {"name": "ASSAY_HOME", "value": container["volumeMounts"][0]["mountPath"]} in container["env"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]


@pytest.mark.skipif(not DEFINITIONS, reason="KUBERAY_CRDS names no folder with KubeRay's definitions")
def test_the_cluster_fits_the_definition_of_kuberay() -> None:
    definition = yaml.safe_load((Path(DEFINITIONS) / "ray.io_rayclusters.yaml").read_text())
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1"]
    jsonschema.validate(on_kubernetes()[1], _closed(schema))


def _closed(schema: Any) -> Any:
    """Nothing beside what is defined, as a server refuses unknown fields."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        free = {"apiVersion", "kind", "metadata"} & set(
            schema["properties"]
        ) or "x-kubernetes-preserve-unknown-fields" in schema
        closed |= {} if free else {"additionalProperties": False}
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    return closed
