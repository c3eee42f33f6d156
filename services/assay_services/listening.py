"""Where a process listens: on loopback unless there are keys that others need."""

import ipaddress
import socket
from typing import TYPE_CHECKING

from assay_platform.errors import ConfigError

if TYPE_CHECKING:
    from assay_services.auth import KeyStore


def refuse_to_be_open(host: str, keys: "KeyStore") -> None:
    """Others may not come in as long as nobody needs a key.

    Raises:
        ConfigError: the host is not loopback, and there are no keys.
    """
    if not _is_loopback(host) and not keys:
        raise ConfigError(
            f"--host {host} is open to others, but there is no API key; make one with `assay serve --new-key NAME`"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: somebody else does, or there is no such address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(4096)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from error
    return listener


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
