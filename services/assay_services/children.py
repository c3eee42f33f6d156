"""What the processes of a service run. Imports what they need when they are started."""

import signal
import socket
import threading
from functools import partial
from pathlib import Path
from typing import Any

from assay_platform.config import Config

from assay_services.logs import log_to_stderr

_BACKLOG = 4096


def run_front(config: Config, listener: socket.socket, folder: Path, name: str) -> None:
    """Speak HTTP until SIGINT or SIGTERM."""
    import uvicorn

    from assay_services.flood import FloodProtocol
    from assay_services.front import Front
    from assay_services.supervisor import end_with_parent

    log_to_stderr(config.service.log)
    end_with_parent()
    service = config.service
    front = Front(config, folder, name)
    protocol: Any = partial(FloodProtocol, refuse=front.refuse)
    settings = uvicorn.Config(
        front,
        http=protocol,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        server_header=False,
        # Nobody asks where a request came from.
        proxy_headers=False,
        backlog=_BACKLOG,
        ssl_certfile=service.tls_certificate or None,
        ssl_keyfile=service.tls_key or None,
    )
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    except KeyboardInterrupt:
        return


def run_board_writer(config: Config, front: Path) -> None:
    """Look at the registry for those that score, until SIGTERM. front: the socket that gives batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    from assay_platform.tracking import AuditLog, ModelRegistry

    from assay_services.alias_board import board_of, keep_up_to_date
    from assay_services.supervisor import end_with_parent

    log_to_stderr(config.service.log)
    end_with_parent()

    def registry() -> ModelRegistry:
        return ModelRegistry(config.tracking_uri, AuditLog(config.paths.audit_log))

    # A registry that hangs does not hold up the end.
    looks = partial(keep_up_to_date, board_of(front), registry, poll_s=config.service.poll_registry_s)
    threading.Thread(target=looks, name="assay-board", daemon=True).start()
    signal.sigwait({signal.SIGTERM})


def run_scorer(config: Config, front: Path, fraud: str | None, recommend: str | None) -> None:
    """Score until SIGTERM. front: the socket that gives batches."""
    # The front answers who waits first; whoever supervises then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    import torch

    from assay_services.scorer import Scorer
    from assay_services.supervisor import end_with_parent

    log_to_stderr(config.service.log)
    end_with_parent()
    torch.set_num_threads(1)
    scorer = Scorer(config, front, fraud=fraud, recommend=recommend)
    scorer.start()
    signal.sigwait({signal.SIGTERM})
    scorer.stop()
