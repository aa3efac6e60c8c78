"""What a run of meta-training carries from update to update, and checkpoints of it: complete, atomic, without pickle.

A checkpoint is a folder ``update-00000120`` with ``state.safetensors`` (every tensor, by its path in the state),
``run.json`` (configuration and what its names stand for, counters, form of the state) and ``manifest.json`` (size and
SHA-256 of both).  It is written aside as ``.writing-...``, flushed to disk and renamed, so that a folder of its final
name is whole unless the disk itself failed; :func:`latest` checks the manifest and passes over what is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .._dataclass_json import parse_json, read
from .._folder import sync_folder, write_durably
from ..rules import Weights
from ..tasks import Problems
from ._saved import check_config, check_definitions, check_rule, definitions
from .config import MetaTrainConfig
from .curriculum import Progress
from .runs import Runs, map_tree

FORMAT_VERSION = 6
WRITING = ".writing-"
"""Prefix of what is not finished; may be removed by anyone who knows that no run is writing."""

_NAME = re.compile("update-[0-9]{8}")

NAMED_TUPLES: dict[str, Any] = {kind.__name__: kind for kind in (Runs, Problems)}
"""The named tuples that a state may contain."""

_TREES = ("weights", "average", "best", "optimizer", "estimator", "generator")
_COUNTERS = ("update", "seconds", "num_dropped", "smoothed_loss", "best_validation", "sessions")
_LOGGER = logging.getLogger(__name__)


class UnknownConfigurationError(ValueError):
    """A checkpoint is whole, but of a rule, a family, a measure or an option that is not known here, or is another."""


@dataclass(kw_only=True)
class RunState:
    """Everything a run needs to go on bit for bit, and to say where it comes from."""

    config: MetaTrainConfig
    weights: Weights
    average: Weights = field(default_factory=dict)
    """Moving average of the weights, empty where none is kept."""
    best: Weights = field(default_factory=dict)
    """Weights of the lowest validation loss, empty before the first validation."""
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """State of the meta-optimizer by weight and key."""
    estimator: Any = None
    """State of the estimator, a tree; ``None`` until the first inner runs are there."""
    generator: Tensor
    """State of the source of all randomness."""
    update: int = 0
    """Meta-updates done."""
    seconds: float = 0.0
    """Wall-clock seconds so far, all sessions together."""
    num_dropped: int = 0
    """Meta-gradients that were not finite and were dropped."""
    smoothed_loss: float | None = None
    """Moving average of the meta-loss."""
    best_validation: dict[str, Any] | None = None
    """Lowest validation loss so far: ``update`` and ``loss``, and ``num_steps`` of its runs in a curriculum."""
    progress: Progress = field(default_factory=Progress)
    """Where in the curriculum the run is."""
    sessions: list[dict[str, Any]] = field(default_factory=list)
    """Where and how each session of the run was started."""

    @classmethod
    def fresh(cls, config: MetaTrainConfig) -> RunState:
        """Return the state before anything is done, on the CPU.

        Raises:
            ValueError: if there is nothing to learn, or what is learned could not be saved.
        """
        check_config(config)
        generator = torch.Generator().manual_seed(config.seed)
        rule = config.build_rule()
        weights = rule.init_weights(generator)
        if not weights:
            raise ValueError(f"rule={config.rule} has no weights to learn")
        check_rule(rule, weights)
        average = {name: value.clone() for name, value in weights.items()} if config.ema_decay > 0 else {}
        return cls(config=config, weights=weights, average=average, generator=generator.get_state())

    @property
    def candidate(self) -> Weights:
        """What is validated: the moving average, where there is one."""
        return self.average or self.weights

    @property
    def shipped_weights(self) -> Weights:
        """The weights to export: the best by validation, else the moving average, where there are such."""
        return self.best or self.candidate

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end."""
        return self.update >= self.config.num_updates or self.progress.finished

    @property
    def num_steps(self) -> int | None:
        """Steps of the inner runs in this stage of a curriculum, ``None`` without one."""
        stages = self.config.curriculum.stages
        return stages[self.progress.stage] if stages else None

    def to(self, device: torch.device) -> RunState:
        """Return a copy on a device; the generator's stays on the CPU, the meta-optimizer moves its own."""
        trees = {name: getattr(self, name) for name in ("weights", "average", "best", "estimator")}
        trees = {name: tree for name, tree in trees.items() if tree is not None}
        moved: dict[str, Any] = map_tree(lambda value: value.detach().to(device, copy=True), trees)
        return replace(self, **moved)

    def before_update(self) -> RunState:
        """Return the same state in tensors that an update leaves alone; it changes these three in place."""
        weights, average, optimizer = map_tree(torch.clone, (self.weights, self.average, self.optimizer))
        return replace(self, weights=weights, average=average, optimizer=optimizer)


def save(state: RunState, folder: Path) -> Path:
    """Write a checkpoint into ``folder``, atomically, and remove all others but the one before it; return its path.

    The tensors of the state may be on any device.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if created:
        sync_folder(folder.parent)
    for leftover in folder.glob(f"{WRITING}*"):
        shutil.rmtree(leftover)

    final = folder / f"update-{state.update:08d}"
    writing = folder / f"{WRITING}{final.name}"
    writing.mkdir()
    manifest = {}
    for name, content in _serialize(state).items():
        write_durably(writing / name, content)
        manifest[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_durably(writing / "manifest.json", json.dumps(manifest, indent=2).encode())
    sync_folder(writing)
    if final.exists():  # what latest() passed over, or this same update written twice
        shutil.rmtree(final)
    writing.rename(final)
    sync_folder(folder)

    paths = checkpoints(folder)
    place = paths.index(final)
    # Those of later updates are damaged, else the run would have gone on from them.
    for path in paths[:place] + paths[place + 2 :]:
        shutil.rmtree(path)
    return final


def load(path: Path) -> RunState:
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
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version!r} is not {FORMAT_VERSION}")
    try:
        tensors = safetensors.torch.load(contents["state.safetensors"])
    except SafetensorError as error:
        raise ValueError(f"{path / 'state.safetensors'}: {error}") from None
    values: dict[str, Any] = {key: record[key] for key in _COUNTERS}
    values |= _restore(record["form"], "", tensors)
    try:
        config = MetaTrainConfig.from_json(json.dumps(record["config"]))
        check_definitions(config, record["definitions"])
    except ValueError as error:
        message = f"{path} is whole, but its configuration cannot be used here: {error}"
        raise UnknownConfigurationError(f"{message} (what is not part of flatopt needs --import MODULE)") from None
    return RunState(config=config, progress=Progress(**record["progress"]), **values)


def latest(folder: Path) -> RunState | None:
    """Return the newest whole checkpoint in ``folder``, ``None`` where there is none; damaged ones are reported.

    One whose configuration cannot be used here is not passed over: ``UnknownConfigurationError``.
    """
    for path in checkpoints(folder):
        try:
            return load(path)
        except UnknownConfigurationError:
            raise
        except ValueError as error:
            _LOGGER.warning("passed over a checkpoint that is not whole: %s", error)
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, whole or not, the newest first; what has another name is the user's own."""
    found = [path for path in folder.glob("update-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, reverse=True)


def _serialize(state: RunState) -> dict[str, bytes]:
    tensors: dict[str, Tensor] = {}
    form = _flatten({name: getattr(state, name) for name in _TREES}, "", tensors)
    record = {
        "format_version": FORMAT_VERSION,
        **{key: getattr(state, key) for key in _COUNTERS},
        "progress": state.progress._asdict(),
        "config": json.loads(state.config.to_json()),
        "definitions": definitions(state.config),
        # safetensors sorts by dtype and name; sums over the weights depend on their order.
        "form": form,
    }
    return {
        "state.safetensors": safetensors.torch.save(tensors),
        "run.json": json.dumps(record, indent=2, allow_nan=False).encode(),
    }


def _flatten(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a tree into a dict by their paths, and return its form as JSON values.

    A tensor is 0, nothing is null, a dict is an object, and a named tuple is a list of its type's name and an object.

    Example:
        >>> tensors = {}
        >>> _flatten({"a": {"b": torch.ones(1), "c": None}}, "", tensors), tensors
        ({'a': {'b': 0, 'c': None}}, {'a/b': tensor([1.])})
    """
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        assert path not in tensors, path
        # A copy: tensors that share storage cannot be saved.
        tensors[path] = torch.empty(tree.shape, dtype=tree.dtype).copy_(tree.detach())
        return 0
    if isinstance(tree, Mapping):
        return {name: _flatten(part, f"{path}/{name}" if path else name, tensors) for name, part in tree.items()}
    kind = type(tree).__name__
    assert NAMED_TUPLES.get(kind) is type(tree), f"{kind} cannot be saved"
    return [kind, _flatten(tree._asdict(), path, tensors)]


def _restore(form: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`_flatten`."""
    if form is None:
        return None
    if form == 0:
        return tensors[path]
    if isinstance(form, list):
        kind, fields = form
        return NAMED_TUPLES[kind](**_restore(fields, path, tensors))
    return {name: _restore(part, f"{path}/{name}" if path else name, tensors) for name, part in form.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    return read(parse_json(content, path), dict[str, Any], str(path))
