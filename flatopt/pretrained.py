"""Learned rules on disk: a folder {``model.safetensors``, ``config.json``, ``README.md``} and back, strictly.

``config.json`` says which rule the weights belong to and what they must look like::

    {"format_version": 1, "rule": "<name in RULES>", "hyperparameters": {<every field of the rule>},
     "weights_sha256": "<64 hex digits>", "metadata": {<anything JSON>}}

Reading trusts nothing: sizes are bounded before memory is spent, every key, type, shape and value is checked
against the rule that the folder names, and the tensors are hashed again.  A folder loads whole or not at all.
Nothing is ever pickled.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ._dataclass_json import parse_json, read, shorten
from .rules import RULES, UpdateRule, Weights

if TYPE_CHECKING:
    from .hub import PushResult

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"

# The largest learned optimizers have a few million weights; anything beyond these sizes is not one of ours.
MAX_WEIGHTS_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 2**20

_HEADER_LENGTH_BYTES = 8  # safetensors begins with the length of its JSON header, little endian


@dataclass(frozen=True, eq=False)
class LearnedRule:
    """An update rule with the weights that were learned for it.

    The weights are copied: later changes of the tensors passed in do not reach this object.

    Args:
        rule: the update rule.
        weights: float32 tensors with the names and shapes of ``rule.init_weights()``; kept contiguous on the CPU.
        card: text of ``README.md``, empty for none.
        metadata: free JSON object stored in ``config.json``, for example recipe and seeds.
        name: where it came from: a shipped name, a folder or a Hub repository; ``None`` when made in memory.
        commit: 40-digit commit of the Hub repository it came from.

    Raises:
        ValueError: if the weights do not fit the rule or are not finite.

    Example:
        >>> import tempfile
        >>> from flatopt.rules import Adam
        >>> folder = tempfile.mkdtemp()
        >>> LearnedRule(Adam(lr=3e-4), {}).save_pretrained(folder)
        >>> load_folder(folder).rule
        Adam(lr=0.0003, betas=(0.9, 0.999), eps=1e-08)
    """

    rule: UpdateRule
    weights: Weights
    card: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        weights = {key: value.detach().cpu().clone().contiguous() for key, value in self.weights.items()}
        _check_layout(self.rule, {key: (_dtype_name(value), value.shape) for key, value in weights.items()}, "weights")
        _check_finite(weights, "weights")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "metadata", copy.deepcopy(self.metadata))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder that :func:`load_folder` reads, whole or not at all.

        Everything is written and read back in a sibling folder, which then takes the place of ``folder``.

        Args:
            folder: where to write; parents are made.  An earlier folder of this format is replaced.

        Raises:
            FileExistsError: if something else than a folder of this format is there.
            ValueError: if the rule or the metadata cannot be represented in ``config.json``.
        """
        target = Path(folder).resolve()
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        aside.mkdir()
        try:
            for file_name, content in self._files().items():
                _write_durably(aside / file_name, content)
            load_folder(aside)  # what cannot be read back must not replace what can
            _sync_folder(aside)
            _swap(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _sync_folder(target.parent)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload learned optimizer",
        create_pr: bool = False,
    ) -> PushResult:
        """Publish on the Hugging Face Hub in one commit; see :func:`flatopt.hub.push_to_hub`."""
        # Imported here because hub.py imports this module, and because only this method needs the Hub.
        from .hub import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            revision=revision,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def _files(self) -> dict[str, bytes]:
        """Return the content of every file of the folder."""
        hyperparameters = {item.name: getattr(self.rule, item.name) for item in dataclasses.fields(self.rule)}
        config = {
            "format_version": FORMAT_VERSION,
            "rule": self.rule.name,
            "hyperparameters": hyperparameters,
            "weights_sha256": weights_sha256(self.weights),
            "metadata": self.metadata,
        }
        try:
            text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"hyper-parameters or metadata are not plain finite JSON: {error}") from error
        files = {CONFIG_FILE: text.encode(), WEIGHTS_FILE: safetensors.torch.save(self.weights)}
        if self.card:
            files[CARD_FILE] = self.card.encode()
        return files


def load_folder(folder: str | os.PathLike[str]) -> LearnedRule:
    """Read a folder written by :meth:`LearnedRule.save_pretrained`.

    Args:
        folder: holds ``model.safetensors``, ``config.json`` and, optionally, ``README.md``; other files are ignored.

    Returns:
        The learned rule, with ``name`` set to the folder.

    Raises:
        FileNotFoundError: if the folder or one of its two required files does not exist.
        ValueError: if anything in it is not exactly as it should be; the message names the file and the field.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG_FILE)
    weights = _read_weights(folder / WEIGHTS_FILE, config.rule, config.weights_sha256)
    card_path = folder / CARD_FILE
    card = _decode_text(read_bounded(card_path, MAX_TEXT_BYTES), card_path) if card_path.exists() else ""
    return LearnedRule(config.rule, weights, card, config.metadata, name=str(folder))


class Config(NamedTuple):
    """What ``config.json`` says."""

    rule: UpdateRule
    weights_sha256: str
    metadata: dict[str, Any]


def read_config(path: Path) -> Config:
    """Read and check a ``config.json``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a field is missing, unknown, of the wrong type, or from a newer format.
    """
    config = parse_json(_decode_text(read_bounded(path, MAX_TEXT_BYTES), path), path)
    if not isinstance(config, dict) or "format_version" not in config:
        raise ValueError(f"{path}: no 'format_version': this is not the configuration of a flatopt rule")
    version = config["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: 'format_version' must be a positive integer, got {shorten(version)}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: 'format_version' is {version}, this flatopt reads up to {FORMAT_VERSION}: upgrade it"
        )
    expected = {"format_version": int, "rule": str, "hyperparameters": dict, "weights_sha256": str, "metadata": dict}
    _check_keys(config, expected, str(path))
    for key, kind in expected.items():
        if not isinstance(config[key], kind):
            raise ValueError(f"{path}: {key!r} must be {kind.__name__}, got {shorten(config[key])}")
    rule = _build_rule(config["rule"], config["hyperparameters"], path)
    return Config(rule, config["weights_sha256"], config["metadata"])


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
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    return digest.hexdigest()


def list_pretrained() -> list[str]:
    """Return the names of the learned rules that come with the package, sorted.

    Example:
        >>> isinstance(list_pretrained(), list)
        True
    """
    root = _shipped_root()
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}")) if root.is_dir() else []


def shipped_folder(name: str) -> Path:
    """Return the folder of a learned rule that comes with the package.

    Raises:
        ValueError: if ``name`` is not one of :func:`list_pretrained`.
    """
    if name not in list_pretrained():
        raise ValueError(f"no shipped weights are called {name!r}; there are: {', '.join(list_pretrained()) or 'none'}")
    return _shipped_root() / name


def _shipped_root() -> Path:
    """Return the folder of shipped weights: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_pretrained"
    return installed if installed.is_dir() else package.parent / "pretrained"


# --- reading -------------------------------------------------------------------------------------------------------


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file that has at most ``limit`` of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: larger than {limit} bytes")
    return content


def _decode_text(content: bytes, path: Path) -> str:
    """Decode UTF-8, naming the file when that fails."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _build_rule(name: str, hyperparameters: dict[str, Any], path: Path) -> UpdateRule:
    """Make the rule that a configuration names."""
    if name not in RULES:
        raise ValueError(f"{path}: 'rule' {shorten(name)} is unknown; known rules: {', '.join(sorted(RULES))}")
    try:
        return read(hyperparameters, RULES[name], "hyperparameters", complete=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(path: Path, rule: UpdateRule, sha256: str) -> Weights:
    """Read the tensors of a rule; the header is checked before any tensor is made."""
    content = read_bounded(path, MAX_WEIGHTS_BYTES)
    length = int.from_bytes(content[:_HEADER_LENGTH_BYTES], "little")
    if len(content) < _HEADER_LENGTH_BYTES or length > min(MAX_TEXT_BYTES, len(content) - _HEADER_LENGTH_BYTES):
        raise ValueError(f"{path}: header: truncated, or longer than {MAX_TEXT_BYTES} bytes")
    header = _decode_text(content[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length], path)
    _check_layout(rule, _parse_layout(header, path), str(path))
    try:
        weights = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: header: {error}") from error
    _check_finite(weights, str(path))
    if weights_sha256(weights) != sha256:
        raise ValueError(f"{path}: the tensors do not have the 'weights_sha256' of {CONFIG_FILE}: one of them changed")
    return weights


def _parse_layout(header: str, path: Path) -> dict[str, tuple[Any, Any]]:
    """Return dtype and shape of every tensor that a safetensors header declares."""
    entries = parse_json(header, f"{path}: header")
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: header: not a JSON object")
    entries.pop("__metadata__", None)
    layout = {}
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise ValueError(f"{path}: header: {shorten(key)} does not describe a tensor")
        layout[key] = (entry.get("dtype"), entry["shape"])
    return layout


# --- checks shared by reading and making ---------------------------------------------------------------------------


def _check_layout(rule: UpdateRule, layout: Mapping[str, tuple[Any, Iterable[Any]]], where: str) -> None:
    """Raise unless names, dtypes and shapes are those of the rule."""
    try:
        expected = _expected_shapes(rule)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{where}: no weights have the 'hyperparameters' of {rule}: {error}") from error
    _check_keys(layout, expected, where)
    for key, (dtype, shape) in layout.items():
        if dtype != "F32":
            raise ValueError(f"{where}: {key!r} must be float32, got {shorten(dtype)}")
        if list(shape) != list(expected[key]):
            raise ValueError(f"{where}: {key!r} must have shape {list(expected[key])}, got {shorten(list(shape))}")


@lru_cache(maxsize=64)
def _expected_shapes(rule: UpdateRule) -> dict[str, torch.Size]:
    """Return the shapes of the weights of a rule; cached because operations without memory are slow."""
    generator = torch.Generator()  # its own: the global one belongs to the user
    with torch.device("meta"):  # shapes without memory, however large a hostile file says they are
        return {key: value.shape for key, value in rule.init_weights(generator).items()}


def _check_finite(weights: Weights, where: str) -> None:
    """Raise if a tensor holds NaN or inf."""
    for key, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {key!r} holds values that are not finite")


def _check_keys(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Raise unless both hold the same keys."""
    found, expected = set(found), set(expected)
    problems = [f"missing {key!r}" for key in sorted(expected - found)]
    problems += [f"unexpected {shorten(key)}" for key in sorted(found - expected)]
    if problems:
        raise ValueError(f"{where}: {', '.join(problems[:8])}")


def _dtype_name(tensor: Tensor) -> str:
    """Return a dtype as safetensors spells float32, others as torch does."""
    return "F32" if tensor.dtype == torch.float32 else str(tensor.dtype)


# --- writing -------------------------------------------------------------------------------------------------------


def _check_replaceable(target: Path) -> None:
    """Raise unless ``target`` is free, empty, or a folder of this format with nothing else inside."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder")
    names = {path.name for path in target.iterdir()}
    foreign = sorted(names - {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE})
    if foreign:
        raise FileExistsError(f"{target} holds {foreign[0]!r}, which is not part of a saved rule: not replacing it")
    if names:
        try:
            read_config(target / CONFIG_FILE)
        except (FileNotFoundError, ValueError) as error:
            raise FileExistsError(f"{target} is not a saved rule, not replacing it: {error}") from error


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
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
