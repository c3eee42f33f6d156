"""`python -m assay_services.gateway`: what `assay gateway` becomes."""

import argparse
import os
import sys
from contextlib import suppress
from dataclasses import replace

import uvicorn
from assay_platform.config import Config, load_config
from assay_platform.errors import ConfigError
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.tracking import AuditLog

from assay_services.auth import KeyStore
from assay_services.exits import exit_code
from assay_services.gateway.gateway import Gateway
from assay_services.gateway.outbox import Outbox
from assay_services.limits import Gatekeeper
from assay_services.listening import bind, refuse_to_be_open
from assay_services.logs import log_to_stderr
from assay_services.named_models import NamedByPath
from assay_services.tracing import Tracing


def main() -> int:
    """Parse, check, stand in front of regions; returns the exit code."""
    parser = argparse.ArgumentParser(prog="assay gateway")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    call = parser.parse_args()
    return exit_code(lambda: _run(call))


def _run(call: argparse.Namespace) -> None:
    config = load_config()
    log_to_stderr(config.service.log)
    chosen = {name: value for name, value in vars(call).items() if value is not None}
    with suppress(KeyboardInterrupt):
        run(replace(config, gateway=replace(config.gateway, **chosen)))


def run(config: Config) -> None:
    """Until SIGINT or SIGTERM.

    Raises:
        ConfigError: no regions, or nowhere to listen.
        StorageError: another gateway uses this home folder.
    """
    settings, service = config.gateway, config.service
    if not settings.regions:
        raise ConfigError('no regions: name them in assay.toml, [gateway] regions = { north = "http://10.0.1.2:8000" }')
    keys = KeyStore(config.paths.api_keys)
    refuse_to_be_open(settings.host, keys)
    listener = bind(settings.host, settings.port)
    metrics = ServiceMetrics()
    gateway = Gateway(
        settings, Outbox(config.paths.gateway, list(settings.regions)), metrics, AuditLog(config.paths.audit_log),
        key=os.environ.get("ASSAY_GATEWAY_KEY", ""),
    )  # fmt: skip
    tracing = Tracing(gateway, endpoint=service.traces, share=service.trace_share, service="assay-gateway")
    gatekeeper = Gatekeeper(
        tracing, keys=keys, metrics=metrics, max_body_bytes=service.max_body_bytes,
        max_requests_per_s=service.max_requests_per_s,
    )  # fmt: skip
    app = NamedByPath(gatekeeper)
    scheme = "https" if service.tls_certificate else "http"
    sys.stdout.write(
        f"Gateway on {scheme}://{settings.host}:{listener.getsockname()[1]} in front of {', '.join(settings.regions)}"
        "  regions: /v1/gateway  (Ctrl-C stops it)\n"
    )
    sys.stdout.flush()
    server = uvicorn.Server(uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=10, server_header=False,
        proxy_headers=False, ssl_certfile=service.tls_certificate or None, ssl_keyfile=service.tls_key or None,
    ))  # fmt: skip
    try:
        server.run(sockets=[listener])
    finally:
        tracing.close()


if __name__ == "__main__":
    sys.exit(main())
