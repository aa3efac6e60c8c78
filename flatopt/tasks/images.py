"""Small grey-scale image data sets in three splits.

Digits come with scikit-learn.  Fashion-MNIST (Xiao et al., 2017, https://arxiv.org/abs/1708.07747) and MNIST (LeCun et
al., 1998, https://doi.org/10.1109/5.726791) are read from their four original IDX files, found in a folder or on the
Hugging Face Hub.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ._data import Data, Splits, Table, stack_splits
from ._layers import check_choice
from ._optimizee import SPLITS, Batch

DATASETS = ("digits", "fashion-mnist", "mnist")

DATA_VARIABLE, MNIST_VARIABLE = "FLATOPT_DATA", "FLATOPT_MNIST"
"""Environment variables that say where the IDX files are, in the form of the ``root`` of :func:`load_images`."""

DEBIAN_FOLDER, MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/datasets/mnist")
HUB_PREFIX = "hf://"

NUM_META = 10_000
"""Last images of the training files of both MNISTs, kept for meta-objectives."""


@dataclass(frozen=True, kw_only=True)
class Images(Data):
    """Images and their classes, or images and themselves.

    Args:
        sources: pairs of data set (a name of :func:`load_images`) and probability.
        size: height and width.
        reconstruct: the targets are the images, for autoencoders.
        standardize: see :func:`load_images`.
    """

    sources: tuple[tuple[str, float], ...] = (("fashion-mnist", 0.75), ("digits", 0.25))
    size: int = 8
    reconstruct: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        for name, _ in self.sources:
            check_choice("source", name, DATASETS)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Those of the sources."""
        return tuple(probability for _, probability in self.sources)

    @property
    def num_classes(self) -> int:
        """Ten, or 0 if the targets are images."""
        return 0 if self.reconstruct else 10

    def build(self) -> Table:
        """Return images ``[rows, size * size]``, shuffled once, so that consecutive rows are a random subset."""
        generator = torch.Generator().manual_seed(0)
        splits: list[Batch] = []
        for split in SPLITS:
            for name, _ in self.sources:
                loaded = getattr(load_images(name, self.size, standardize=self.standardize), split)
                order = torch.randperm(len(loaded.targets), generator=generator)
                splits.append(Batch(loaded.inputs.flatten(1)[order], loaded.targets[order]))
        table = stack_splits(splits, len(self.sources))
        return table._replace(targets=table.inputs) if self.reconstruct else table


def load_images(name: str, size: int, root: str | None = None, *, standardize: bool = False) -> Splits:
    """Return a data set with pixels in ``[0, 1]``, resized; repeated calls return the same tensors.

    Images are float32 ``[n, size, size]``, their labels int64 ``[n]``.
    Digits: 1,097 train, 300 meta and 400 test images, by a fixed permutation.
    Fashion-MNIST and MNIST: 50,000 train and 10,000 meta images, in the order of the training files, and 10,000 test
    images.

    Args:
        name: ``"digits"``, ``"fashion-mnist"`` or ``"mnist"``.
        size: height and width: 8, 14 or 28.
        root: for the two MNISTs, a folder with the IDX files (plain or ``.gz``), or ``hf://org/name`` or
            ``hf://org/name@revision`` for a data set repository that holds them.  Default: the environment variable
            ``FLATOPT_DATA`` (``FLATOPT_MNIST`` for MNIST), else the folder of Debian's package
            ``dataset-fashion-mnist`` (``/usr/share/datasets/mnist``).
        standardize: subtract the mean of the training pixels and divide by their standard deviation.

    Raises:
        ValueError: unknown name or size, or a file that is not the IDX file it should be.
        FileNotFoundError: no files; the message says how to get them.
        ImportError: digits without scikit-learn.
    """
    check_choice("name", name, DATASETS)
    check_choice("size", size, (8, 14, 28))
    if name == "digits":
        return _prepared(name, size, "", standardize)
    variable, folder = (MNIST_VARIABLE, MNIST_FOLDER) if name == "mnist" else (DATA_VARIABLE, DEBIAN_FOLDER)
    return _prepared(name, size, str(root or os.environ.get(variable) or folder), standardize)


def read_idx(path: Path, num_dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzip by its ending, into a uint8 tensor of ``num_dims`` dimensions.

    Raises:
        ValueError: another magic number, or more or fewer bytes than the header says; names the file.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from error
    magic = bytes([0, 0, 8, num_dims])
    start = 4 + 4 * num_dims
    if content[:4] != magic or len(content) < start:
        raise ValueError(f"{path}: not an IDX file of {num_dims}-dimensional bytes (starts with {content[:4].hex()!r})")
    shape = [int.from_bytes(content[4 + 4 * dim : 8 + 4 * dim], "big") for dim in range(num_dims)]
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path}: header says {math.prod(shape)} bytes of data, the file has {len(content) - start}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize ``[n, height, width]`` to ``[n, size, size]``: area average to shrink, bilinear to enlarge."""
    if images.shape[-1] == size:
        return images
    mode = "area" if images.shape[-1] > size else "bilinear"
    return F.interpolate(images.unsqueeze(1), (size, size), mode=mode).squeeze(1)


@lru_cache(maxsize=16)
def _prepared(name: str, size: int, root: str, standardize: bool) -> Splits:
    raw = _digits() if name == "digits" else _idx_images(name, root)
    splits = Splits(*(Batch(resize(inputs, size), targets) for inputs, targets in raw))
    if not standardize:
        return splits
    std, mean = torch.std_mean(splits.train.inputs)
    return Splits(*(Batch((inputs - mean) / std, targets) for inputs, targets in splits))


def _digits() -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install scikit-learn", name="sklearn") from error
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(pixels).float().reshape(-1, 8, 8)[order] / 16
    targets = torch.from_numpy(labels).long()[order]
    sizes = [1097, 300, 400]
    return Splits(*map(Batch, inputs.split(sizes), targets.split(sizes)))


def _idx_images(name: str, root: str) -> Splits:
    train, test = (
        Batch(
            read_idx(_find(name, root, f"{part}-images-idx3-ubyte"), 3).float() / 255,
            read_idx(_find(name, root, f"{part}-labels-idx1-ubyte"), 1).long(),
        )
        for part in ("train", "t10k")
    )
    for inputs, targets in (train, test):
        if len(inputs) != len(targets):
            raise ValueError(f"{root}: {len(inputs)} images but {len(targets)} labels")
    split = len(train.targets) - NUM_META
    if split <= 0:
        raise ValueError(f"{root}: {len(train.targets)} training images, more than {NUM_META} are needed")
    return Splits(Batch(*(x[:split] for x in train)), Batch(*(x[split:] for x in train)), test)


def _find(dataset: str, root: str, name: str) -> Path:
    """Return the path of one of the four files, fetched if the root is on the Hub."""
    if root.startswith(HUB_PREFIX):
        return _download(root.removeprefix(HUB_PREFIX), f"{name}.gz")
    for file in (Path(root) / name, Path(root) / f"{name}.gz"):
        if file.is_file():
            return file
    missing = f"no {name} or {name}.gz in {root}."
    repository = f"or name there a data set repository that holds them as {HUB_PREFIX}org/name."
    if dataset == "mnist":
        named = f"Name the folder that holds its four IDX files in {MNIST_VARIABLE}"
        raise FileNotFoundError(f"MNIST: {missing} {named}, {repository}")
    raise FileNotFoundError(
        f"Fashion-MNIST: {missing} Install Debian's package dataset-fashion-mnist, or download the four IDX files of "
        f"https://github.com/zalandoresearch/fashion-mnist and name their folder in {DATA_VARIABLE}, {repository}"
    )


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo_id, _, revision = repository.partition("@")
    return Path(hf_hub_download(repo_id, name, repo_type="dataset", revision=revision or None))
