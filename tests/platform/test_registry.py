"""Versions, aliases, gate and audit log on a real MLflow store."""

import json
from pathlib import Path

import pytest
from assay_platform.config import Config
from assay_platform.errors import GateRefusedError, RegistryError
from assay_platform.models.artifact import save_artifact
from assay_platform.tracking import AuditLog, GateReport, ModelRegistry, RunLog


def report(candidate: float = 0.5, *, failed: tuple[str, ...] = (), champion: float | None = None) -> GateReport:
    return GateReport(metric="ap", candidate=candidate, champion=champion, champion_version=None, failed=failed)


@pytest.fixture
def audit(config: Config) -> AuditLog:
    return AuditLog(config.paths.audit_log)


@pytest.fixture
def registry(config: Config, audit: AuditLog) -> ModelRegistry:
    return ModelRegistry(config.tracking_uri, audit)


def register(registry: ModelRegistry, config: Config, folder: Path, gate: GateReport) -> int:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    source = folder / "assay-model"
    save_artifact(source, kind="fraud", config={}, tensors={}, companions={})
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.double, "x")]), outputs=Schema([ColSpec(DataType.double, "p")])
    )
    with RunLog(config.tracking_uri, config.paths.home / "artifacts").run(
        "assay-test", {"assay.data_sha256": "abc"}
    ) as run:
        return registry.register(
            "model", application="fraud", run_id=run.run_id, folder=source, signature=signature, gate=gate,
            metrics={"auc": 0.9}, requirements=["numpy"],
        )  # fmt: skip


def test_promotion_rollback_and_their_log(
    registry: ModelRegistry, config: Config, audit: AuditLog, tmp_path: Path
) -> None:
    first, second = (register(registry, config, tmp_path, report(c)) for c in (0.5, 0.6))
    assert registry.version_of("model") is None
    assert registry.newest_champion("fraud") is None
    registry.promote("model", first, reason="first")
    registry.challenge("model", second)
    registry.promote("model", second, reason="second")
    assert registry.version_of("model") == second
    assert registry.version_of("model", "challenger") is None
    assert registry.newest_champion("fraud") == "model"
    assert registry.rollback("model") == (second, first)
    assert registry.version_of("model") == first
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.rollback("model")
    assert [e["action"] for e in audit.entries()] == ["promote", "challenge", "promote", "rollback"]
    assert audit.verify() == 4
    assert registry.recorded_validation("model", second, "abc") == 0.6
    assert registry.recorded_validation("model", second, "other data") is None
    assert (registry.download("model", first) / "config.json").is_file()
    assert [(v.version, v.aliases) for v in registry.versions()] == [(second, ()), (first, ("champion",))]


def test_a_failed_check_bars_the_way_to_champion_but_not_to_other_aliases(
    registry: ModelRegistry, config: Config, tmp_path: Path
) -> None:
    version = register(registry, config, tmp_path, report(failed=("not calibrated",)))
    with pytest.raises(GateRefusedError, match="not calibrated"):
        registry.promote("model", version, reason="")
    registry.promote("model", version, alias="trial", reason="")
    assert registry.version_of("model", "trial") == version
    assert registry.version_of("model") is None


def test_unknown_models_and_versions_are_named(registry: ModelRegistry) -> None:
    with pytest.raises(RegistryError, match="'nothing' has no version 7"):
        registry.promote("nothing", 7, reason="")
    with pytest.raises(RegistryError, match="'nothing' has no champion"):
        registry.rollback("nothing")


def test_a_tampered_log_is_noticed(audit: AuditLog, config: Config) -> None:
    for number in range(3):
        audit.append("promote", version=number)
    lines = config.paths.audit_log.read_text().splitlines()
    changed = json.dumps({**json.loads(lines[1]), "version": 99}, sort_keys=True)
    config.paths.audit_log.write_text("\n".join([lines[0], changed, lines[2]]) + "\n")
    with pytest.raises(RegistryError, match="line 3"):
        audit.verify()
    config.paths.audit_log.write_text("\n".join([lines[0], lines[2]]) + "\n")
    with pytest.raises(RegistryError, match="line 2"):
        audit.verify()


def test_pickled_models_are_refused(config: Config, tmp_path: Path) -> None:
    import mlflow
    from assay_platform.tracking.client import configure_mlflow
    from sklearn.linear_model import LogisticRegression

    configure_mlflow()
    mlflow.sklearn.save_model(
        LogisticRegression().fit([[0], [1]], [0, 1]), str(tmp_path / "p"), serialization_format="cloudpickle"
    )
    with pytest.raises(mlflow.exceptions.MlflowException, match=r"(?i)pickle"):
        mlflow.sklearn.load_model(str(tmp_path / "p"))
