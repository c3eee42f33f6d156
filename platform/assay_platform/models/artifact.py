"""A model artifact: a folder of weights (safetensors), a typed config (JSON) and companions (JSON).

    model.safetensors   every parameter and buffer
    config.json         {"format", "kind", "config", "weights_sha256"}
    <name>.json         companions that other packages own, such as the feature plan

Loading executes no code from the artifact: JSON is parsed into frozen dataclasses, weights are read by
safetensors, and their checksum is compared first. Pickles are neither written nor read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from assay_platform.errors import ArtifactError, ConfigError
from assay_platform.storage import write_bytes, write_json

FORMAT = 3
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_artifact(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    companions: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write an artifact into `folder`, which may exist.

    kind: 'fraud' or 'recommend'. companions: file name without '.json' → JSON object.
    """
    weights = save_tensors({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    write_bytes(folder / WEIGHTS, weights)
    for name, value in companions.items():
        write_json(folder / f"{name}.json", value)
    header = {
        "format": FORMAT,
        "kind": kind,
        "config": dict(config),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    write_json(folder / CONFIG, header)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one JSON object of an artifact.

    Raises:
        ArtifactError: the file is missing or is no JSON object.
    """
    path = folder / f"{name}.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable model artifact: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_artifact(folder: Path, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors, after the checksum.

    Raises:
        ArtifactError: a file is missing or damaged, or the artifact is of another kind or format.
    """
    header = read_json(folder, "config")
    if header.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: artifact format {header.get('format')!r}; this release reads {FORMAT}")
    if header.get("kind") != kind:
        raise ArtifactError(f"{folder}: holds a {header.get('kind')!r} model; expected {kind!r}")
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder / WEIGHTS}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(weights).hexdigest() != header.get("weights_sha256"):
        raise ArtifactError(f"{folder / WEIGHTS}: the checksum differs from config.json; the file is damaged")
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / WEIGHTS}: {error}") from error
    config = header.get("config")
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder}: config.json has no 'config' object")
    return config, tensors


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy tensors into a module; every name and shape has to match."""
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except (RuntimeError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: weights do not fit the config: {error}") from error
