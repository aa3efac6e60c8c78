"""Text for next-character prediction: the source code of Python's standard library, found on every machine."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._data import Data, Table
from ._optimizee import Batch

VOCAB_SIZE = 96
"""0 for any other byte, 1 for a newline, 2 to 95 for the bytes from space to ``}``."""

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


class TextSplits(NamedTuple):
    """Tokens of three disjoint sets of files, int64 ``[n]`` each."""

    train: Tensor
    meta: Tensor
    test: Tensor


@dataclass(frozen=True, kw_only=True)
class Text(Data):
    """Windows of characters, and the same shifted by one as targets.

    A training set is a run of consecutive characters.

    Args:
        context_length: characters of a window.
    """

    context_length: int

    @property
    def probabilities(self) -> tuple[float, ...]:
        """One source."""
        return (1.0,)

    @property
    def num_classes(self) -> int:
        """Size of the alphabet."""
        return VOCAB_SIZE

    def build(self) -> Table:
        """Return the tokens, uint8 ``[rows]``; a window may begin at any but the last of a split."""
        splits = load_text()
        lengths = torch.tensor([len(split) for split in splits]).view(-1, 1)
        tokens = torch.cat(splits).to(torch.uint8)
        return Table(tokens, tokens[1:], lengths.cumsum(0) - lengths, lengths - self.context_length)

    def gather(self, table: Table, rows: Tensor) -> Batch:
        """Return the windows that begin at rows ``[...]`` and at the next ones, int64 ``[..., context_length]``."""
        inputs, targets = (part.unfold(0, self.context_length, 1)[rows].long() for part in (table[0], table[1]))
        return Batch(inputs, targets)


@lru_cache(maxsize=2)
def load_text(num_bytes: int = 4_000_000) -> TextSplits:
    """Read the first ``num_bytes`` of the standard library's modules, in the order of their paths.

    Of every ten files one goes to test, one to meta and eight to train, so no file is in two splits.

    Raises:
        FileNotFoundError: this Python has no source files.
    """
    files = _source_files(Path(sysconfig.get_path("stdlib")))
    parts: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
    remaining = num_bytes
    for index, file in enumerate(files):
        if remaining <= 0:
            break
        content = file.read_bytes()[:remaining]
        remaining -= len(content)
        parts[{0: 2, 1: 1}.get(index % 10, 0)].append(content)
    train, meta, test = (encode(b"\n".join(part)) for part in parts)
    return TextSplits(train, meta, test)


def encode(content: bytes) -> Tensor:
    """Return the tokens of some bytes, int64 ``[len(content)]``.

    Example:
        >>> encode(b"a }" + bytes([10, 200]))
        tensor([67,  2, 95,  1,  0])
    """
    table = torch.zeros(256, dtype=torch.int64)
    table[10] = 1
    table[32:126] = torch.arange(2, VOCAB_SIZE)
    return table[torch.frombuffer(bytearray(content), dtype=torch.uint8).long()]


def _source_files(folder: Path) -> list[Path]:
    found = [file for file in folder.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(file.relative_to(folder).parts)]
    if len(found) < 10:
        raise FileNotFoundError(f"no Python source files of the standard library in {folder}")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())
