"""The data of the comparisons, in three splits: images, tables, text.

Nothing here depends on the seed of a run: which training examples are used is decided by
:func:`flatopt.evaluate._training.load_splits`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from flatopt.tasks import Batch, Splits, load_images, load_text
from flatopt.tasks.images import DATASETS

TEXT_BYTES = 8_000_000


@lru_cache(maxsize=4)
def text(size: int, *, validates: bool = False) -> Splits:
    """Return stretches of ``size`` characters of Python source, each with the next characters as targets.

    They come from the files after the ones that meta-training reads; with ``validates``, from those very files.
    """
    splits = []
    for whole, first in zip(load_text(TEXT_BYTES), load_text(), strict=True):
        windows = (first if validates else whole[len(first) :]).unfold(0, size + 1, size)
        splits.append(Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return Splits(*splits)


@lru_cache(maxsize=4)
def classes(size: int, *, num_train: int = 800, num_classes: int = 5) -> Splits:
    """Return generated tabular classification, half of the ``size`` features informative, 5 % wrong labels."""
    from sklearn.datasets import make_classification

    sizes = (num_train, 1000, 2000)
    informative = {"n_informative": size // 2, "n_redundant": size // 4, "n_classes": num_classes}
    return _table(make_classification(sum(sizes), size, **informative, flip_y=0.05, random_state=0), sizes)


@lru_cache(maxsize=4)
def bundled(size: int, *, name: str, sizes: tuple[int, ...]) -> Splits:
    """Return a table that comes with scikit-learn, cut into training, meta and test rows.

    ``breast_cancer``, the Wisconsin data: 569 rows, 30 features, two classes.  ``diabetes``: 442 rows, 10 features, a
    regression target.
    """
    from sklearn import datasets

    return _table(getattr(datasets, f"load_{name}")(return_X_y=True), sizes)


@lru_cache(maxsize=4)
def friedman(size: int) -> Splits:
    """Return Friedman's first regression problem, noise of standard deviation 2 on targets of 5, in all splits."""
    from sklearn.datasets import make_friedman1

    sizes = (400, 500, 2000)
    return _table(make_friedman1(sum(sizes), size, noise=2.0, random_state=0), sizes)


@lru_cache(maxsize=4)
def linear(size: int) -> Splits:
    """Return generated linear regression, a third of the ``size`` features informative, half of the variance noise."""
    import numpy as np
    from sklearn.datasets import make_regression

    sizes = (200, 500, 2000)
    inputs, targets = make_regression(sum(sizes), size, n_informative=size // 3, random_state=0)
    targets += targets.std() * np.random.default_rng(0).standard_normal(len(targets))
    return _table((inputs, targets), sizes)


SOURCES: dict[str, Callable[[int], Splits]] = {
    **{name: partial(load_images, name, standardize=True) for name in DATASETS},
    **{f"{name} in [0, 1]": partial(load_images, name) for name in DATASETS},
    "text": text,
    "text of meta-training": partial(text, validates=True),
    "classes": classes,
    "3 classes": partial(classes, num_train=400, num_classes=3),
    "8 classes": partial(classes, num_train=3000, num_classes=8),
    "breast cancer": partial(bundled, name="breast_cancer", sizes=(250, 119, 200)),
    "friedman": friedman,
    "linear": linear,
    "diabetes": partial(bundled, name="diabetes", sizes=(200, 92, 150)),
}
"""Loaders by name; they take the side of the images, the number of features or the length of the text."""


@lru_cache(maxsize=64)
def data_hash(source: str, size: int) -> str:
    """Return a hash of all examples of a source."""
    digest = hashlib.blake2b(digest_size=8)
    for part in SOURCES[source](size):
        for tensor in part:
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _table(arrays: tuple[Any, Any], sizes: Sequence[int]) -> Splits:
    """Shuffle and split rows; standardise features, and targets that are not labels, by the training rows."""
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    inputs, targets = (torch.from_numpy(array)[order] for array in arrays)
    std, mean = torch.std_mean(inputs[: sizes[0]], 0)
    inputs = ((inputs - mean) / std).float()
    if targets.is_floating_point():
        std, mean = torch.std_mean(targets[: sizes[0]], 0)
        targets = ((targets - mean) / std).float().unsqueeze(1)
    else:
        targets = targets.long()
    return Splits(*map(Batch, inputs.split(sizes), targets.split(sizes)))
