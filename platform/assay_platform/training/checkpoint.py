"""Where a training stands, kept after every epoch, so that one that was killed goes on as if it had not been.

A file of tensors and plain values, written whole or not at all and read without unpickling objects. It belongs to one
training: another identity (data, hyperparameters, seed) starts from the beginning.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from assay_platform.storage.files import atomic_file

_FORMAT = 1


class Checkpoint:
    """One training's file."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace what was kept before.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        with atomic_file(self._path) as part:
            torch.save({"format": _FORMAT, "identity": self._identity, "state": dict(state)}, part)

    def load(self) -> dict[str, Any] | None:
        """What was kept; None: nothing, or of another training, or a file that is damaged."""
        # A damaged file fails in as many ways as there are bytes; the training is then as one without it.
        with contextlib.suppress(Exception):
            kept = torch.load(self._path, map_location="cpu", weights_only=True)
            if (kept["format"], kept["identity"]) == (_FORMAT, self._identity):
                state: dict[str, Any] = kept["state"]
                return state
        return None
