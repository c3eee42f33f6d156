"""Deployment settings: `assay.toml` → frozen dataclasses.

Looked up in this order: the file that ASSAY_CONFIG names, `./assay.toml`, the defaults. ASSAY_HOME overrides
where state lives. Variants of a *model* are Python values and live beside the model, not here.
"""

import os
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from assay_platform.errors import ConfigError


def _xdg(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / fallback)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where Assay keeps its files.

    home: registry, MLflow runs, feature repositories, audit log. Losing it loses history.
    cache: downloaded data, converted once. Safe to delete.
    """

    home: Path = field(
        default_factory=lambda: Path(os.environ.get("ASSAY_HOME") or _xdg("XDG_DATA_HOME", ".local/share") / "assay")
    )
    cache: Path = field(default_factory=lambda: _xdg("XDG_CACHE_HOME", ".cache") / "assay")

    @property
    def data(self) -> Path:
        """Downloaded data sets as Parquet."""
        return self.cache / "data"

    @property
    def feature_repositories(self) -> Path:
        """One Feast repository a model name."""
        return self.home / "feast"

    @property
    def searches(self) -> Path:
        """Journals of searches that have a name."""
        return self.home / "searches"

    @property
    def training(self) -> Path:
        """Where workers that train together keep how far they are."""
        return self.home / "training"

    @property
    def tasks(self) -> Path:
        """What tasks run in which process, and how long they take."""
        return self.home / "tasks"

    @property
    def gateway(self) -> Path:
        """Writes that the gateway has yet to bring to some regions."""
        return self.home / "gateway"

    @property
    def audit_log(self) -> Path:
        """Append-only log of promotions and rollbacks."""
        return self.home / "audit.jsonl"

    @property
    def api_keys(self) -> Path:
        """Hashed API keys of the scoring service."""
        return self.home / "api_keys.json"


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """MLflow: an empty URI means SQLite and plain files under the home folder."""

    uri: str = ""


@dataclass(frozen=True, kw_only=True)
class Service:
    """Limits of the scoring service.

    max_batch_ms: what one call of a model may take, so that those who come next wait no longer. max_wait_ms: a request
    that would have to wait longer is refused. workers: processes that hold models. tls_certificate, tls_key: PEM files.
    max_models: in memory of a process beside those that it follows, for requests that name one. keep_decisions_days:
    after which what was decided of an event is forgotten. log: for people, or a JSON object a line. traces: URL of an
    OpenTelemetry collector that takes OTLP over HTTP; none by default.
    trace_share: of requests whose callers are not traced themselves.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    tls_certificate: str = ""
    tls_key: str = ""
    max_body_bytes: int = 4 * 1024 * 1024
    max_batch: int = 1000
    max_requests_per_s: float = 5000.0
    max_batch_ms: float = 50.0
    max_wait_ms: float = 250.0
    poll_registry_s: float = 1.0
    max_models: int = 4
    keep_decisions_days: float = 400.0
    log: Literal["text", "json"] = "text"
    traces: str = ""
    trace_share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"service.port is {self.port}; allowed are 0 (any free port) to 65535")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("service.tls_certificate and service.tls_key go together: one of them is missing")
        for name in ("tls_certificate", "tls_key"):
            if getattr(self, name) and not Path(getattr(self, name)).is_file():
                raise ConfigError(f"service.{name} is {getattr(self, name)!r}; there is no such file")
        if self.log not in ("text", "json"):
            raise ConfigError(f"service.log is {self.log!r}; allowed are text and json")
        if self.traces and not re.fullmatch(r"https?://\S+", self.traces):
            raise ConfigError(f"service.traces is {self.traces!r}; expected a URL such as http://HOST:4318/v1/traces")
        if not 0 <= self.trace_share <= 1:
            raise ConfigError(f"service.trace_share is {self.trace_share}; allowed are 0 to 1")
        above_0 = (
            "workers",
            "max_body_bytes", "max_batch", "max_requests_per_s", "max_batch_ms", "max_wait_ms", "poll_registry_s",
            "max_models", "keep_decisions_days",
        )  # fmt: skip
        for name in above_0:
            if getattr(self, name) <= 0:
                raise ConfigError(f"service.{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many replicas `assay serve --ray` has.

    min_replicas: 0 lets the last one go after zero_s without a request; the next request waits until one is there.
    max_replicas: 0 for as many as cores, less one. utilisation: of what a replica can answer, wanted. call_ms, row_ms:
    what a call of the model takes, and more for each request in it (`assay_batch_seconds` over `assay_batch_requests`).
    start_s: until a replica that is asked for answers. hold_s: one that was not needed for so long goes.
    own_replicas: names of models that each have replicas of their own, as many as their own load needs; other models
    share theirs.
    """

    min_replicas: int = 1
    max_replicas: int = 0
    utilisation: float = 0.9
    call_ms: float = 7.0
    row_ms: float = 0.4
    start_s: float = 15.0
    hold_s: float = 60.0
    zero_s: float = 600.0
    own_replicas: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) and name for name in self.own_replicas):
            raise ConfigError(f"scaling.own_replicas is {self.own_replicas}; expected names of models")
        for name in ("utilisation", "call_ms", "row_ms"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"scaling.{name} is {getattr(self, name)}; it must be above 0")
        if self.min_replicas < 0 or self.max_replicas < 0:
            raise ConfigError("scaling.min_replicas and scaling.max_replicas must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a new version comes to answer.

    rehearse: it answers the newest requests aside first, and does not take over if it refuses one of them, if more than
    max_changed of its decisions or max_moved of its scores (to another band of risk) differ from those of the version
    that answers, or if it takes more than max_slowdown times as long. watch_s: for so long after a swap a version that
    fails more than max_failed of its requests, or moves scores, is taken back. canary_share: of requests that the
    challenger answers. shadow: it is asked all of them aside.
    """

    rehearse: bool = True
    max_changed: float = 0.1
    max_moved: float = 0.4
    max_slowdown: float = 3.0
    watch_s: float = 300.0
    max_failed: float = 0.05
    canary_share: float = 0.0
    shadow: bool = False

    def __post_init__(self) -> None:
        for name in ("max_changed", "max_moved", "max_failed", "canary_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rollout.{name} is {getattr(self, name)}; allowed are 0 to 1")
        if self.max_slowdown <= 0 or self.watch_s < 0:
            raise ConfigError("rollout.max_slowdown must be above 0, rollout.watch_s 0 or more")


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """What `assay gateway` stands in front of.

    regions: name → URL of a service. probe_s: how often each is asked whether it is there. patience_s: one that leaves
    two questions unanswered for so long is gone, and what it was answering goes to another. max_lag_s: one that other
    regions' events reach later than this gets no requests as long as there is another.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    regions: dict[str, str] = field(default_factory=dict)
    probe_s: float = 0.1
    patience_s: float = 0.3
    max_lag_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"gateway.port is {self.port}; allowed are 0 (any free port) to 65535")
        for name, url in self.regions.items():
            if not re.fullmatch(r"[\w-]{1,40}", name, re.ASCII):
                raise ConfigError(f"gateway.regions: {name!r}; a name is letters, digits, _ and -")
            if not isinstance(url, str) or not re.fullmatch(r"https?://[^/\s?#@]+/?", url):
                raise ConfigError(f"gateway.regions.{name} is {url!r}; expected http://HOST:PORT or https://HOST:PORT")
        for name in ("probe_s", "patience_s", "max_lag_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"gateway.{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one deployment."""

    paths: Paths = field(default_factory=Paths)
    tracking: Tracking = field(default_factory=Tracking)
    service: Service = field(default_factory=Service)
    rollout: Rollout = field(default_factory=Rollout)
    scaling: Scaling = field(default_factory=Scaling)
    gateway: Gateway = field(default_factory=Gateway)

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking and registry URI."""
        return self.tracking.uri or f"sqlite:///{self.paths.home / 'mlflow.db'}"


_SECTIONS: dict[str, type[Any]] = {"paths": Paths, "tracking": Tracking, "service": Service, "rollout": Rollout,
                                   "scaling": Scaling, "gateway": Gateway}  # fmt: skip


def load_config(path: Path | None = None) -> Config:
    """Read the settings; without a file every setting has its default.

    Raises:
        ConfigError: the named file is missing, is no TOML, or has an unknown or ill-typed setting.
    """
    named = path or (Path(os.environ["ASSAY_CONFIG"]) if os.environ.get("ASSAY_CONFIG") else None)
    if named is None and not Path("assay.toml").is_file():
        return Config()
    file = named or Path("assay.toml")
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not valid TOML: {error}") from error
    sections: dict[str, Any] = {}
    for name, table in document.items():
        if name not in _SECTIONS or not isinstance(table, dict):
            raise ConfigError(f"{file}: unknown section [{name}]; allowed are {', '.join(_SECTIONS)}")
        sections[name] = _section(file, name, table)
    return Config(**sections)


def _section(file: Path, name: str, table: dict[str, Any]) -> object:
    kinds = {f.name: type(getattr(_SECTIONS[name](), f.name)) for f in fields(_SECTIONS[name])}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in kinds:
            raise ConfigError(f"{file}: unknown setting {name}.{key}; allowed are {', '.join(kinds)}")
        kind = kinds[key]
        wanted: tuple[type, ...] = (int, float) if kind is float else (str,) if issubclass(kind, Path) else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise ConfigError(f"{file}: {name}.{key} is {value!r}; expected {wanted[0].__name__}")
        values[key] = Path(str(value)).expanduser() if issubclass(kind, Path) else kind(value)
    return _SECTIONS[name](**values)
