"""What a search remembers on disk: its identity, each trial when it begins and when it ends. One line of JSON each.

Lines are appended and on disk before the search goes on, so that whoever kills it loses what ran, and nothing that
ended. A line that was cut off in the middle is the last one and does not count.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay_platform.errors import ConfigError, StorageError


class Journal:
    """A file; None: nothing is remembered. One search at a time."""

    def __init__(self, path: Path | None, identity: Mapping[str, str]) -> None:
        """Raises:
        ConfigError: the file is of a search with another identity.
        StorageError: it cannot be read or written.
        """
        self._path = path
        self.begun: dict[int, dict[str, Any]] = {}
        self.ended: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text() if path.is_file() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                os.truncate(path, len(whole.encode()))
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._append({"search": dict(identity)})
            return
        held = lines[0].get("search", {})
        if held != identity:
            differs = ", ".join(sorted(name for name in {*held, *identity} if held.get(name) != identity.get(name)))
            raise ConfigError(f"{path} is of another search: {differs} differ; give this one another name")
        for line in lines[1:]:
            kept = self.begun if line["event"] == "begun" else self.ended
            kept[line["trial"]] = line["record"]

    def begin(self, trial: int, record: Mapping[str, Any]) -> None:
        """A trial starts."""
        self._append({"event": "begun", "trial": trial, "record": dict(record)})

    def end(self, trial: int, record: Mapping[str, Any]) -> None:
        """A trial ended."""
        self._append({"event": "ended", "trial": trial, "record": dict(record)})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self._path}: {error.strerror}") from error
