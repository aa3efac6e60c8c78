"""The folder of a learned rule {``model.safetensors``, ``config.json``, ``README.md``, ``training.json``}, strictly.

``config.json`` says which rule the weights belong to and what they must look like::

    {"format_version": 1, "rule": "<name in RULES>", "hyperparameters": {<every field of the rule>},
     "weights_sha256": "<64 hex digits>", "metadata": {<anything JSON>},
     "card_sha256": "<64 hex digits, or null without a card>"}

The last is of ``README.md`` as it was written, so that an edited one is never replaced.  ``README.md`` and
``training.json`` (free JSON: how the weights were made) may be missing.  Reading trusts nothing: no link leads out of
the folder, sizes are bounded before memory is spent, every key, type and shape is checked against the rule that the
folder names, and the tensors are hashed again.  Writing is durable, and whole or not at all.  Nothing is ever pickled.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ._dataclass_json import at_least, parse_json, read, shorten
from ._extensions import extend
from .rules import RULES, UpdateRule, Weights

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, TRAINING_FILE = "model.safetensors", "config.json", "README.md", "training.json"
FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, TRAINING_FILE)

# The largest learned optimizers have a few million weights; anything beyond these sizes is not one of ours.
MAX_WEIGHTS_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 2**20

_HEADER_LENGTH_BYTES = 8  # safetensors begins with the length of its JSON header, little endian


class Content(NamedTuple):
    """What a folder holds."""

    rule: UpdateRule
    weights: Weights
    card: str
    metadata: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What ``config.json`` says, checked as far as that is possible without knowing the rule."""

    format_version: Annotated[int, at_least(1)]
    rule: str
    hyperparameters: dict[str, Any]
    weights_sha256: str
    metadata: dict[str, Any]
    card_sha256: str | None = None

    def build_rule(self) -> UpdateRule:
        """Return the rule with its hyper-parameters; ``ValueError`` if it is unknown or one of them does not fit."""
        if self.rule not in RULES:
            extend({"RULES": RULES})
        if self.rule not in RULES:
            raise ValueError(
                f"rule {shorten(self.rule)} is unknown; known are {', '.join(sorted(RULES))}, and what is put into "
                "flatopt.rules.RULES by its name"
            )
        return read(self.hyperparameters, RULES[self.rule], "hyperparameters", complete=True)


# --- reading -------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Content:
    """Read a folder; the caller checks whether the weights are finite.

    Raises:
        FileNotFoundError: if the folder or one of its two required files does not exist.
        ValueError: if anything in it is not exactly as it should be; the message names the file and the field.
    """
    config = read_config(folder / CONFIG_FILE)
    try:
        rule = config.build_rule()
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    weights = _read_weights(folder / WEIGHTS_FILE, rule, config.weights_sha256)
    card_path, training_path = folder / CARD_FILE, folder / TRAINING_FILE
    card = _read_text(card_path) if card_path.exists() else ""
    training = parse_json(_read_text(training_path), training_path) if training_path.exists() else {}
    return Content(rule, weights, card, config.metadata, read(training, dict[str, Any], str(training_path)))


def read_config(path: Path) -> Config:
    """Read and check a ``config.json``; errors as in :func:`read_folder`."""
    data = parse_json(_read_text(path), path)
    if not isinstance(data, dict) or "format_version" not in data:
        raise ValueError(f"{path}: no 'format_version': this is not the configuration of a flatopt rule")
    version = data["format_version"]
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version}, this flatopt reads up to {FORMAT_VERSION}: upgrade it")
    try:
        return read(data, Config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file that has at most ``limit`` of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: larger than {limit} bytes")
    return content


def _read_own(path: Path, limit: int) -> bytes:
    """Return the bytes of a file of a folder; a link to elsewhere is refused, as a stranger may have put it there."""
    folder, file = path.parent.resolve(), Path(os.path.realpath(path))
    is_snapshot = folder.parent.name == "snapshots"  # whose files are links, in the cache of huggingface_hub
    if not (file.is_relative_to(folder) or is_snapshot and file.is_relative_to(folder.parents[1] / "blobs")):
        raise ValueError(f"{path}: a link to a file outside of its folder: put the file itself there")
    return read_bounded(path, limit)


def _read_text(path: Path) -> str:
    """Read a text file of bounded size, naming it when it is not UTF-8."""
    try:
        return _read_own(path, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _read_weights(path: Path, rule: UpdateRule, sha256: str) -> Weights:
    """Read the tensors of a rule; names, dtypes and shapes are checked before any tensor is made."""
    content = _read_own(path, MAX_WEIGHTS_BYTES)
    try:
        entries = dict(safetensors.deserialize(content))
        _check_layout(rule, {key: (entry["dtype"], entry["shape"]) for key, entry in entries.items()}, str(path))
        weights = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    if weights_sha256(weights) != sha256:
        raise ValueError(f"{path}: the tensors do not have the 'weights_sha256' of {CONFIG_FILE}: one of them changed")
    return weights


# --- checks shared by reading and making ---------------------------------------------------------------------------


def check_weights(rule: UpdateRule, weights: Weights) -> None:
    """Raise ``ValueError`` unless the tensors are those of the rule, float32 and finite."""
    _check_layout(rule, {key: (_dtype_name(value), value.shape) for key, value in weights.items()}, "weights")
    for key, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights: {key!r} holds values that are not finite")


def _check_layout(rule: UpdateRule, layout: Mapping[str, tuple[Any, Iterable[Any]]], where: str) -> None:
    """Raise unless names, dtypes and shapes are those of the rule."""
    try:
        expected = _expected_shapes(_Hashable(json.dumps(asdict(rule), default=repr), type(rule), rule))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: no weights have the 'hyperparameters' of {rule}: {error}") from error
    problems = [f"missing {key!r}" for key in sorted(expected.keys() - layout.keys())]
    problems += [f"unexpected {shorten(key)}" for key in sorted(layout.keys() - expected.keys())]
    if problems:
        raise ValueError(f"{where}: {', '.join(problems[:8])}")
    for key, (dtype, shape) in layout.items():
        if dtype != "F32":
            raise ValueError(f"{where}: {key!r} must be float32, got {shorten(dtype)}")
        if list(shape) != list(expected[key]):
            raise ValueError(f"{where}: {key!r} must have shape {list(expected[key])}, got {shorten(list(shape))}")


@dataclass(frozen=True)
class _Hashable:
    """A rule as a key: one with a hyper-parameter that can be changed has no hash of its own."""

    hyperparameters: str
    kind: type[UpdateRule]
    rule: UpdateRule = field(compare=False)


@lru_cache(maxsize=64)
def _expected_shapes(key: _Hashable) -> dict[str, torch.Size]:
    """Return the shapes of the weights of a rule; cached because operations without memory are slow."""
    generator = torch.Generator()  # its own: the global one belongs to the user
    with torch.device("meta"):  # shapes without memory, however large a hostile file says they are
        return {name: value.shape for name, value in key.rule.init_weights(generator).items()}


def _dtype_name(tensor: Tensor) -> str:
    """Return a dtype as safetensors spells float32, others as torch does."""
    return "F32" if tensor.dtype == torch.float32 else str(tensor.dtype)


def weights_sha256(weights: Weights) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of contiguous CPU tensors, in order of their names.

    Example:
        >>> weights_sha256({"bias": torch.zeros(2)})[:16]
        '3d42bd366604237d'
    """
    digest = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key]
        # One JSON line per tensor: no two different sets of tensors can give the same stream of bytes.
        digest.update(json.dumps([key, _dtype_name(tensor), list(tensor.shape)]).encode() + b"\n")
        digest.update(_bytes(tensor))
    return digest.hexdigest()


# --- writing -------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, content: Content, check: Callable[[Path], Any]) -> None:
    """Write the folder that :func:`read_folder` reads; see :meth:`flatopt.LearnedRule.save_pretrained`.

    Everything is written in a sibling folder, which takes the place of ``folder`` once ``check`` has read it.  Without
    card or training, those files are left out.
    """
    target = folder.resolve()
    _check_replaceable(target)
    card_sha256 = _written_card(target, content.card.encode())
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        for name, data in _serialize(content, card_sha256).items():
            write_durably(aside / name, data)
        check(aside)
        sync_folder(aside)
        _swap(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.parent)


def _serialize(content: Content, card_sha256: str | None) -> dict[str, bytes]:
    config = Config(
        format_version=FORMAT_VERSION,
        rule=content.rule.name,
        hyperparameters=asdict(content.rule),
        weights_sha256=weights_sha256(content.weights),
        metadata=content.metadata,
        card_sha256=card_sha256,
    )
    files = {CONFIG_FILE: _to_json(vars(config)), WEIGHTS_FILE: _to_safetensors(content.weights)}
    if content.card:
        files[CARD_FILE] = content.card.encode()
    if content.training:
        files[TRAINING_FILE] = _to_json(content.training)
    return files


def _to_safetensors(weights: Weights) -> bytes:
    """Return float32 tensors in the format of safetensors; its own writer would need numpy."""
    header: dict[str, Any] = {}
    content = b""
    for key in sorted(weights):
        data = _bytes(weights[key])
        offsets = [len(content), len(content) + len(data)]
        header[key] = {"dtype": "F32", "shape": list(weights[key].shape), "data_offsets": offsets}
        content += data
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_LENGTH_BYTES)  # so that the data are aligned
    return len(text).to_bytes(_HEADER_LENGTH_BYTES, "little") + text + content


def _bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a contiguous tensor on the CPU."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _to_json(data: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"hyper-parameters or metadata are not plain finite JSON: {error}") from error


def _check_replaceable(target: Path) -> None:
    """Raise unless ``target`` is free, empty, or a folder of this format with nothing else inside."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder")
    names = {path.name for path in target.iterdir()}
    foreign = sorted(names - {*FILES})
    if foreign:
        raise FileExistsError(f"{target} holds {foreign[0]!r}, which is not part of a saved rule: not replacing it")
    if names:
        try:
            read_config(target / CONFIG_FILE)
        except (FileNotFoundError, ValueError) as error:
            raise FileExistsError(f"{target} is not a saved rule, not replacing it: {error}") from error


def _written_card(target: Path, card: bytes) -> str | None:
    """Return the digest of a card to be written; raise where it would replace one that somebody has edited."""
    digest, path = hashlib.sha256(card).hexdigest() if card else None, target / CARD_FILE
    if not path.exists():
        return digest
    written, there = read_config(target / CONFIG_FILE).card_sha256, _read_own(path, MAX_TEXT_BYTES)
    if hashlib.sha256(there).hexdigest() == written:
        return digest
    if there != card:
        raise FileExistsError(f"{path} was edited, not replacing it: move it elsewhere, or save in another folder")
    return written  # loaded and saved again, it is still the edited one


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on the disk, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(aside: Path, target: Path) -> None:
    """Put ``aside`` in the place of ``target``.

    Two renames, because no portable call exchanges two folders: a crash between them leaves no ``target``, with the
    old folder whole under its ``.old`` name beside it.
    """
    if not target.exists():
        os.rename(aside, target)
        return
    old = aside.with_name(aside.name + ".old")
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)
