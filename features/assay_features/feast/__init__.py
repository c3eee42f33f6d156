"""Definitions behind Feast: a columnar offline store, and the repository of one model's features.

Importing `feast` takes seconds, so nothing here is imported by `assay --help` or by the package above.
"""

# Feast's metrics module sets PROMETHEUS_MULTIPROCESS_DIR when it is imported, which turns every Prometheus metric of
# the process into a file shared by name. The mode is fixed when prometheus_client is imported, so that comes first.
import prometheus_client as _prometheus_client  # noqa: F401
