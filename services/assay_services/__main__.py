"""`python -m assay_services`: what `assay serve` becomes."""

import argparse
import os
import sys
from dataclasses import replace

from assay_platform.config import Config, Service, load_config

from assay_services.exits import exit_code
from assay_services.listening import bind, refuse_to_be_open
from assay_services.logs import log_to_stderr


def main() -> int:
    """Parse, check, serve; returns the exit code."""
    parser = argparse.ArgumentParser(prog="assay serve")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--fraud")
    parser.add_argument("--recommend")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--new-key")
    call = parser.parse_args()
    return exit_code(lambda: _run(call))


def _run(call: argparse.Namespace) -> None:
    config = load_config()
    log_to_stderr(config.service.log)
    chosen = {"host": call.host, "port": call.port, "workers": call.workers}
    service = replace(config.service, **{k: v for k, v in chosen.items() if v is not None})
    config = replace(config, service=service)
    if call.new_key:
        _new_key(config, call.new_key)
    else:
        _serve(config, service, call)


def _new_key(config: Config, who: str) -> None:
    from assay_services.auth import KeyStore

    key = KeyStore(config.paths.api_keys).create(who)
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"key for {who!r}; it is not shown again. A running service knows it within a second.\n")


def _serve(config: Config, service: Service, call: argparse.Namespace) -> None:
    from assay_services.auth import KeyStore

    refuse_to_be_open(service.host, KeyStore(config.paths.api_keys))
    listener = bind(service.host, service.port)
    port = listener.getsockname()[1]
    if call.ray:
        from assay_services.deployment import run_on_ray

        listener.close()
        run_on_ray(config, host=service.host, port=port, fraud=call.fraud, recommend=call.recommend)
        return
    # Requests run side by side in threads, and one core each beats many cores for a batch of one: libraries that start
    # threads of their own for a small product make the slowest of a hundred lists five times slower.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    # Threads that are done sleep instead of keeping a core busy, which the next request needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A registry that is away is asked again at every look. MLflow's own patience, minutes of it, would hold up the end
    # of a process and hide for long that the registry is back.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # libuv sleeps after each connection that it accepts, so that others get some; only the front accepts here.
    os.environ.setdefault("UV_TCP_SINGLE_ACCEPT", "0")
    from assay_services.supervisor import serve

    scheme = "https" if service.tls_certificate else "http"
    sys.stdout.write(f"Assay answers on {scheme}://{service.host}:{port}  docs: /docs  (Ctrl-C stops it)\n")
    sys.stdout.flush()
    serve(config, listener, fraud=call.fraud, recommend=call.recommend)


if __name__ == "__main__":
    sys.exit(main())
