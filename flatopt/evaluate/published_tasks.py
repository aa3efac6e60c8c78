"""The problems of the reproduction: they start as published, on images in ``[0, 1]``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from . import models
from ._training import Benchmark

NUM_TRAIN = 4000
"""Training images: 500 steps then are 16 epochs; the reference's 10,000 steps on 55,000 images are 23."""

DATA_NAMES = {"fashion-mnist": "Fashion-MNIST", "mnist": "MNIST"}


def optimizees(data: str) -> list[Benchmark]:
    """Return the networks of the results, which meta-training has not seen, on images of ``data`` and on digits."""
    problem = partial(_problem, data, size=28, num_train=NUM_TRAIN)
    digits = partial(_problem, "digits", num_steps=200)
    deep_mlp = partial(models.mlp, width=20, depth=2, activation=nn.Sigmoid)
    return [
        problem("ReLU MLP", partial(models.mlp, width=20), num_steps=500),
        problem("deep sigmoid MLP", deep_mlp, num_steps=500),
        # A step costs 60 ms on one core: half as many, on half as many images.
        problem("BatchNorm CNN", models.published_cnn, num_steps=250, num_train=NUM_TRAIN // 2),
        problem("plain CNN", models.published_plain_cnn, num_steps=500),
        digits("digits MLP", partial(models.mlp, width=20)),
        digits("digits CNN", models.cnn),
    ]


def selection_optimizees(data: str) -> list[Benchmark]:
    """Return networks to choose coefficients and sets by: none of meta-training, none of the results."""
    problem = partial(_problem, data, size=28, num_train=NUM_TRAIN, num_steps=300)
    digits = partial(_problem, "digits", num_steps=200)
    return [
        problem("tanh MLP", partial(models.mlp, width=32, activation=nn.Tanh)),
        problem("deep ReLU MLP", partial(models.mlp, width=24, depth=2)),
        problem("CNN 14x14", partial(models.cnn, width=8), size=14),
        digits("digits sigmoid MLP", partial(models.mlp, width=32, activation=nn.Sigmoid)),
        digits("digits LayerNorm MLP", partial(models.mlp, width=24, depth=2, normalise=True)),
    ]


def _problem(
    source: str,
    name: str,
    build: Callable[[int], nn.Module],
    *,
    num_steps: int,
    num_train: int | None = None,
    size: int = 8,
) -> Benchmark:
    """Return a problem that starts as published: pixels in ``[0, 1]``, layers from ``N(0, 0.01^2)``, batches of 128."""
    return Benchmark(
        name=name if source == "digits" else f"{name}, {DATA_NAMES[source]}",
        source=f"{source} in [0, 1]",
        size=size,
        num_train=num_train,
        build=partial(models.small_start, build=build),
        batch_size=128,
        num_steps=num_steps,
    )
