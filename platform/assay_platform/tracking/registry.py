"""Model versions and aliases in the MLflow registry, with an audited gate in front of `champion`.

Aliases are what services follow: `champion` answers requests, `challenger` is the latest version that was
trained but did not pass. A version can only become champion if it carries a gate report without a failed
check; every change of an alias is written to the audit log before it happens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from assay_platform.errors import GateRefusedError, RegistryError
from assay_platform.tracking.audit import AuditLog
from assay_platform.tracking.client import open_client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHAMPION, CHALLENGER = "champion", "challenger"
_GATE_TAG, _APPLICATION_TAG, _METRICS_TAG = "assay.gate", "assay.application", "assay.metrics"
_UNCHECKED_TAG = "assay.unchecked"


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What a candidate was checked for.

    failed: reasons why it must not serve (not calibrated, no baseline). better_than_champion: None when there
    was no champion to compare with.
    """

    metric: str
    candidate: float
    champion: float | None
    champion_version: int | None
    failed: tuple[str, ...] = ()

    @property
    def better_than_champion(self) -> bool | None:
        """Strictly better on the same validation rows."""
        return None if self.champion is None else self.candidate > self.champion

    @property
    def passed(self) -> bool:
        """May become champion without a person's decision."""
        return not self.failed and self.better_than_champion is not False

    @property
    def summary(self) -> str:
        """One line for a person."""
        if self.failed:
            return "failed: " + "; ".join(self.failed)
        if self.champion is None:
            return f"passed: first version, validation {self.metric} {self.candidate:.4f}"
        relation = "better than" if self.better_than_champion else "not better than"
        verdict = "passed" if self.better_than_champion else "not promoted"
        return (
            f"{verdict}: validation {self.metric} {self.candidate:.4f} is {relation} champion version "
            f"{self.champion_version} with {self.champion:.4f}"
        )


class VersionInfo(NamedTuple):
    """One row of `assay models`."""

    name: str
    version: int
    aliases: tuple[str, ...]
    application: str
    run_id: str
    metrics: dict[str, float]


class AliasesOf(NamedTuple):
    """Of one model: what it is for, and alias → version."""

    application: str
    aliases: dict[str, int]


class ModelRegistry:
    """Versions, aliases and their history."""

    def __init__(self, tracking_uri: str, audit: AuditLog) -> None:
        self._client = open_client(tracking_uri)
        self._audit = audit

    def register(
        self,
        name: str,
        *,
        application: str,
        run_id: str,
        folder: Path,
        signature: "ModelSignature",
        gate: GateReport,
        metrics: Mapping[str, float],
        requirements: Sequence[str],
    ) -> int:
        """Log an artifact folder to the run and register it; returns the new version's number."""
        import mlflow
        from mlflow.exceptions import MlflowException

        if self._find_model(name) is None:
            self._client.create_registered_model(name, tags={_APPLICATION_TAG: application})
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            logged = mlflow.pyfunc.log_model(
                name=application,
                loader_module="assay_platform.tracking.pyfunc",
                data_path=str(folder),
                signature=signature,
                pip_requirements=list(requirements),
            )
        tags = {
            _APPLICATION_TAG: application,
            _GATE_TAG: json.dumps(asdict(gate)),
            _METRICS_TAG: json.dumps(dict(metrics)),
        }
        try:
            created = self._client.create_model_version(
                name, source=logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id
            )
        except MlflowException as error:
            raise RegistryError(f"{name}: the version could not be registered: {error}") from error
        return int(created.version)

    def version_of(self, name: str, alias: str = CHAMPION) -> int | None:
        """The version that an alias points to, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self._client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def aliases(self) -> dict[str, AliasesOf]:
        """Model name → where its aliases point, of all models in few requests."""
        found: dict[str, AliasesOf] = {}
        token = None
        while True:
            page = self._client.search_registered_models(max_results=1000, page_token=token)
            for model in page:
                aliases = {alias: int(version) for alias, version in model.aliases.items()}
                found[model.name] = AliasesOf(model.tags.get(_APPLICATION_TAG, ""), aliases)
            token = page.token
            if not token:
                return found

    def application_of(self, name: str) -> str | None:
        """What a model is for; None where there is no such model."""
        model = self._find_model(name)
        return None if model is None else str(model.tags.get(_APPLICATION_TAG, ""))

    def recorded_validation(self, name: str, version: int, fingerprint: str) -> float | None:
        """A version's own validation metric, if its run was on the data with this fingerprint."""
        run_id = self._version(name, version).run_id
        if not run_id or self._client.get_run(run_id).data.tags.get("assay.data_sha256") != fingerprint:
            return None
        return self.gate_of(name, version).candidate

    def download(self, name: str, version: int) -> Path:
        """Local folder of a version's artifact."""
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        self._version(name, version)
        try:
            folder = Path(download_artifacts(artifact_uri=f"models:/{name}/{version}"))
        except (MlflowException, OSError) as error:
            raise RegistryError(f"{name} version {version}: artifacts cannot be read: {error}") from error
        # MLflow keeps our folder, under the name that it had, beside its MLmodel file.
        inner = [path.parent for path in folder.glob("*/config.json")] + [
            path.parent for path in folder.glob("data/*/config.json")
        ]
        if not inner:
            raise RegistryError(f"{name} version {version}: holds no Assay artifact")
        return inner[0]

    def gate_of(self, name: str, version: int) -> GateReport:
        """The gate report that a version was registered with.

        Raises:
            GateRefusedError: it carries none.
        """
        tag = self._version(name, version).tags.get(_GATE_TAG)
        if tag is None:
            raise GateRefusedError(f"{name} version {version} carries no gate report; register it with `assay run`")
        document = json.loads(tag)
        return GateReport(**{**document, "failed": tuple(document["failed"])})

    def promote(
        self,
        name: str,
        version: int,
        *,
        alias: str = CHAMPION,
        reason: str,
        unchecked: bool = False,
        actor: str | None = None,
    ) -> GateReport:
        """Point an alias at a version; services that follow it switch within seconds.

        For `champion` the version's gate report must have no failed check. Whether it beat the champion of its
        day is recorded, not enforced: a person may prefer an older version.

        unchecked: services take it without a rehearsal. actor: who wants it, if not the user of this process.

        Raises:
            RegistryError: the model or version does not exist.
            GateRefusedError: the version failed a check.
        """
        gate = self.gate_of(name, version)
        if alias == CHAMPION and gate.failed:
            raise GateRefusedError(f"{name} version {version} did not pass the gate: {gate.summary}")
        before = self.version_of(name, alias)
        self._audit.append(
            "promote",
            actor=actor,
            model=name,
            alias=alias,
            version=version,
            from_version=before,
            reason=reason,
            gate=gate.summary,
            **({"unchecked": True} if unchecked else {}),
        )
        self._client.set_model_version_tag(name, str(version), _UNCHECKED_TAG, str(unchecked).lower())
        self._client.set_registered_model_alias(name, alias, str(version))
        if alias == CHAMPION and self.version_of(name, CHALLENGER) == version:
            self._client.delete_registered_model_alias(name, CHALLENGER)
        return gate

    def challenge(self, name: str, version: int) -> None:
        """Mark a version that was trained but not promoted."""
        before = self.version_of(name, CHALLENGER)
        self._audit.append("challenge", model=name, alias=CHALLENGER, version=version, from_version=before)
        self._client.set_registered_model_alias(name, CHALLENGER, str(version))

    def is_unchecked(self, name: str, version: int) -> bool:
        """Whether whoever promoted a version wants no rehearsal of it."""
        return bool(self._version(name, version).tags.get(_UNCHECKED_TAG) == "true")

    def replace(self, name: str, wrong: int, right: int, *, reason: str) -> None:
        """Point `champion` back from one version to another, unless it points elsewhere by now.

        Raises:
            RegistryError: it does.
        """
        current = self.version_of(name)
        if current != wrong:
            raise RegistryError(f"{name}: champion is version {current} and not {wrong} any more")
        self._audit.append("rollback", model=name, alias=CHAMPION, version=right, from_version=wrong, reason=reason)
        self._client.set_registered_model_alias(name, CHAMPION, str(right))

    def rollback(self, name: str, *, reason: str = "", actor: str | None = None) -> tuple[int, int]:
        """Point `champion` back at the version before; returns (from, to). Repeated, it goes further back.

        Raises:
            RegistryError: there is no champion, or it has no predecessor.
        """
        current = self.version_of(name)
        if current is None:
            raise RegistryError(f"{name!r} has no champion to roll back from; see `assay models`")
        history: list[int] = []
        for entry in self._audit.entries():
            if entry.get("model") != name or entry.get("alias") != CHAMPION:
                continue
            if entry["action"] == "promote":
                history.append(int(entry["version"]))
            elif entry["action"] == "rollback" and history:
                history.pop()
        while history and history[-1] == current:
            history.pop()
        if not history:
            raise RegistryError(f"{name!r} version {current} is the first champion; there is nothing to roll back to")
        target = history[-1]
        self._version(name, target)
        self._audit.append(
            "rollback", actor=actor, model=name, alias=CHAMPION, version=target, from_version=current, reason=reason
        )
        self._client.set_registered_model_alias(name, CHAMPION, str(target))
        return current, target

    def versions(self) -> list[VersionInfo]:
        """Every version of every model, newest first within a model.

        Raises:
            RegistryError: the registry cannot be read.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self._versions()
        except MlflowException as error:
            raise RegistryError(f"the registry cannot be read: {error}") from error

    def _versions(self) -> list[VersionInfo]:
        rows: list[VersionInfo] = []
        for model in self._client.search_registered_models(max_results=1000):
            aliases: dict[int, list[str]] = {}
            for alias, number in model.aliases.items():
                aliases.setdefault(int(number), []).append(alias)
            found = self._client.search_model_versions(f"name = '{model.name}'", max_results=1000)
            rows += [
                VersionInfo(
                    name=model.name,
                    version=int(v.version),
                    aliases=tuple(sorted(aliases.get(int(v.version), ()))),
                    application=v.tags.get(_APPLICATION_TAG, ""),
                    run_id=v.run_id or "",
                    metrics=json.loads(v.tags.get(_METRICS_TAG, "{}")),
                )
                for v in sorted(found, key=lambda v: -int(v.version))
            ]
        return rows

    def newest_champion(self, application: str) -> str | None:
        """Name of the application's model whose champion alias was set last, or None."""
        names = {
            model.name
            for model in self._client.search_registered_models(max_results=1000)
            if model.tags.get(_APPLICATION_TAG) == application and CHAMPION in model.aliases
        }
        ordered = [e["model"] for e in self._audit.entries() if e.get("alias") == CHAMPION and e.get("model") in names]
        return ordered[-1] if ordered else next(iter(sorted(names)), None)

    def _find_model(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _version(self, name: str, version: int) -> "ModelVersion":
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version(name, str(version))
        except MlflowException as error:
            raise RegistryError(f"model {name!r} has no version {version}; see `assay models`") from error
