"""A request names its model by its path: /models/NAME/v1/… is /v1/… of that model.

Without a name it means the model that the service follows. What stands outermost takes the name off, so that keys,
rates, queues and routes see one path for all models.
"""

from typing import Any
from urllib.parse import quote

_PREFIX = "/models/"


def named_in(path: str) -> tuple[str, str]:
    """The name, empty without one, and the path without it."""
    name, slash, rest = path.removeprefix(_PREFIX).partition("/") if path.startswith(_PREFIX) else ("", "", "")
    return (name, "/" + rest) if name and slash else ("", path)


def model_of(scope: dict[str, Any]) -> str:
    """The model that a request names; empty where it names none."""
    name: str = scope.get("state", {}).get("model", "")
    return name


class NamedByPath:
    """ASGI middleware. scope["state"]["model"] is the name; scope["raw_path"] stays what the caller sent."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and scope["path"].startswith(_PREFIX):
            name, path = named_in(scope["path"])
            if name:
                sent = scope.get("raw_path") or quote(scope["path"]).encode()
                scope = {**scope, "path": path, "raw_path": sent, "state": {**scope.get("state", {}), "model": name}}
        await self._app(scope, receive, send)
