"""Text for next-character prediction: the source code of Python's standard library, found on every machine."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._task import Batch, ClassificationTask, Params, Split
from .transformer import Transformer

VOCAB_SIZE = 96
"""0 for any other byte, 1 for a newline, 2 to 95 for the bytes from space to ``}``."""

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


class TextSplits(NamedTuple):
    """Tokens of three disjoint sets of files, int64 ``[n]`` each."""

    train: Tensor
    meta: Tensor
    test: Tensor


@dataclass(frozen=True, kw_only=True)
class TextTask(ClassificationTask):
    """Next-character prediction on the standard library's source.

    Args:
        model: the optimizee; its ``context_length`` is the length of the sequences.
        batch_size: sequences per batch.
        num_train: characters of the training text that are used, all when ``None``.
    """

    model: Transformer
    batch_size: int = 16
    num_train: int | None = None

    def init(self, generator: torch.Generator) -> Params:
        """Return fresh parameters of the model."""
        return self.model.init(generator)

    def sample_batch(self, generator: torch.Generator, split: Split, batch_size: int | None = None) -> Batch:
        """Draw sequences ``[B, T]`` that start anywhere, and the same shifted by one as targets."""
        text = getattr(load_text(), split)
        if split == "train":
            text = text[: self.num_train]
        windows = text.unfold(0, self.model.context_length + 1, 1)
        chosen = windows[torch.randint(windows.shape[0], (batch_size or self.batch_size,), generator=generator)]
        return Batch(chosen[:, :-1], chosen[:, 1:])

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return next-character logits ``[B, T, K]``."""
        return self.model.predict(params, inputs)


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
