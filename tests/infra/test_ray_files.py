"""The cluster file is what Ray takes, and keeps what `docs/compute.md` promises."""

import json
from pathlib import Path

import jsonschema
import yaml

FILE = Path(__file__).parents[2] / "infra" / "ray" / "cluster.yaml"


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
