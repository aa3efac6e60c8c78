"""Checkpoints of a meta-training run: complete, atomic, without pickle.

A checkpoint is a folder ``update-00000120`` with ``state.safetensors`` (every tensor, by ``group/name``),
``run.json`` (configuration, counters, order of the tensors) and ``manifest.json`` (size and SHA-256 of both).
It is written aside as ``.writing-...``, flushed to disk and renamed, so that a folder of its final name is whole unless
the disk itself failed; :func:`latest` checks the manifest and passes over what is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .._folder import sync_folder, write_durably
from ..rules import Weights
from .config import MetaTrainConfig

FORMAT_VERSION = 2
WRITING = ".writing-"
"""Prefix of what is not finished; may be removed by anyone who knows that no run is writing."""

_GROUPS = ("weights", "average", "best", "optimizer", "estimator", "generator")
_COUNTERS = ("update", "seconds", "num_dropped", "smoothed_loss", "best_validation", "progress", "sessions")
_LOGGER = logging.getLogger(__name__)


class UnknownConfigurationError(ValueError):
    """A checkpoint is whole, but of a rule or an option that is not known here."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a run needs to go on bit for bit, and to say where it comes from."""

    config: MetaTrainConfig
    update: int
    """Meta-updates done."""
    seconds: float
    """Wall-clock seconds so far, all sessions together."""
    num_dropped: int
    """Meta-gradients that were not finite and were dropped."""
    smoothed_loss: float | None
    """Moving average of the meta-loss."""
    best_validation: dict[str, Any] | None
    """Lowest validation loss so far: ``update`` and ``loss``, and ``num_steps`` of its runs in a curriculum."""
    progress: dict[str, Any]
    """Where in the curriculum the run is: the fields of :class:`~flatopt.metatrain.curriculum.Progress`."""
    sessions: list[dict[str, Any]]
    """Where and how each session of the run was started."""
    weights: Weights
    average: Weights
    """Moving average of the weights, empty where none is kept."""
    best: Weights
    """Weights of the lowest validation loss, empty before the first validation."""
    optimizer: dict[str, Tensor]
    """State of the meta-optimizer by ``weight/key``."""
    estimator: dict[str, Tensor]
    """State of the estimator."""
    generator: dict[str, Tensor]
    """States of the random number generators by name."""

    @property
    def shipped_weights(self) -> Weights:
        """The weights to export: the best by validation, else the moving average, where there are such."""
        return self.best or self.average or self.weights

    def copy(self) -> Checkpoint:
        """Return the same values in tensors that an update does not change; it changes these three in place."""
        weights, average, optimizer = (
            {name: value.clone() for name, value in group.items()}
            for group in (self.weights, self.average, self.optimizer)
        )
        return replace(self, weights=weights, average=average, optimizer=optimizer)


def save(checkpoint: Checkpoint, folder: Path, *, keep: int = 2) -> Path:
    """Write a checkpoint into ``folder``, atomically, and remove the old ones.

    Args:
        checkpoint: what to write; its tensors may be on any device.
        folder: the folder of the run's checkpoints, created where missing.
        keep: number of checkpoints left afterwards, this one included.

    Returns:
        The path of the new checkpoint.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if created:
        sync_folder(folder.parent)
    for leftover in folder.glob(f"{WRITING}*"):
        shutil.rmtree(leftover)

    final = folder / f"update-{checkpoint.update:08d}"
    writing = folder / f"{WRITING}{final.name}"
    writing.mkdir()
    manifest = {}
    for name, content in _serialize(checkpoint).items():
        write_durably(writing / name, content)
        manifest[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_durably(writing / "manifest.json", json.dumps(manifest, indent=2).encode())
    sync_folder(writing)
    if final.exists():  # what latest() passed over, or this same update written twice
        shutil.rmtree(final)
    writing.rename(final)
    sync_folder(folder)

    paths = list(_newest_first(folder))
    # Those of later updates are damaged, else the run would have gone on from them.
    later = paths[: paths.index(final)]
    for path in later + paths[len(later) + keep :]:
        shutil.rmtree(path)
    return final


def load(path: Path) -> Checkpoint:
    """Read one checkpoint, onto the CPU.

    Raises:
        UnknownConfigurationError: if its configuration cannot be used here.
        ValueError: if it is not whole; the message names the file.
    """
    manifest = _parse(path / "manifest.json", _read(path / "manifest.json"))
    contents = {}
    for name in ("state.safetensors", "run.json"):
        contents[name] = _read(path / name)
        expected = manifest.get(name)
        actual = {"size": len(contents[name]), "sha256": hashlib.sha256(contents[name]).hexdigest()}
        if expected != actual:
            raise ValueError(f"{path / name} is damaged: the manifest says {expected}, the file is {actual}")
    record = _parse(path / "run.json", contents["run.json"])
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {record.get('format_version')!r} is not {FORMAT_VERSION}")
    try:
        tensors = safetensors.torch.load(contents["state.safetensors"])
    except SafetensorError as error:
        raise ValueError(f"{path / 'state.safetensors'}: {error}") from None
    values: dict[str, Any] = {key: record[key] for key in _COUNTERS}
    for group in _GROUPS:
        values[group] = {name: tensors[f"{group}/{name}"] for name in record["tensors"][group]}
    try:
        config = MetaTrainConfig.from_json(json.dumps(record["config"]))
    except ValueError as error:
        message = f"{path} is whole, but its configuration cannot be used here: {error}"
        raise UnknownConfigurationError(f"{message} (what is not part of flatopt needs --import MODULE)") from None
    return Checkpoint(config=config, **values)


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint in ``folder``, ``None`` where there is none; damaged ones are reported.

    Raises:
        UnknownConfigurationError: if the configuration of that checkpoint cannot be used here.
    """
    for path in _newest_first(folder):
        try:
            return load(path)
        except UnknownConfigurationError:
            raise
        except ValueError as error:
            _LOGGER.warning("passed over a checkpoint that is not whole: %s", error)
    return None


def _serialize(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the contents of the files by name."""
    groups: dict[str, dict[str, Tensor]] = {group: getattr(checkpoint, group) for group in _GROUPS}
    tensors = {
        # A copy each: tensors that share storage cannot be saved.
        f"{group}/{name}": torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        for group, values in groups.items()
        for name, value in values.items()
    }
    record = {
        "format_version": FORMAT_VERSION,
        **{key: getattr(checkpoint, key) for key in _COUNTERS},
        "config": json.loads(checkpoint.config.to_json()),
        # safetensors sorts by dtype and name; sums over the weights depend on their order.
        "tensors": {group: list(values) for group, values in groups.items()},
    }
    return {
        "state.safetensors": safetensors.torch.save(tensors),
        "run.json": json.dumps(record, indent=2, allow_nan=False).encode(),
    }


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("update-*"), reverse=True))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold an object")
    return value
