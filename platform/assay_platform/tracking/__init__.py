"""MLflow: runs, model versions, aliases; and the append-only log of who promoted what."""

from assay_platform.tracking.audit import AuditLog
from assay_platform.tracking.registry import CHALLENGER, CHAMPION, AliasesOf, GateReport, ModelRegistry
from assay_platform.tracking.runs import RunLog

__all__ = ["CHALLENGER", "CHAMPION", "AliasesOf", "AuditLog", "GateReport", "ModelRegistry", "RunLog"]
