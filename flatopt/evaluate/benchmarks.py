"""The problems of the comparisons, as data.

``(seen)`` marks an architecture on data that meta-training uses too; all others are new to the shipped weights.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from . import models
from ._training import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        name="MLP 8x8, 1k (seen)", source="fashion-mnist", size=8, num_train=1000, build=partial(models.mlp, width=32)
    ),
    Benchmark(
        name="deep MLP 8x8, 4k",
        source="fashion-mnist",
        size=8,
        num_train=4000,
        build=partial(models.mlp, width=64, depth=5),
        num_steps=1000,
    ),
    Benchmark(
        name="deep LayerNorm MLP 8x8, 4k",
        source="fashion-mnist",
        size=8,
        num_train=4000,
        build=partial(models.mlp, width=64, depth=5, normalise=True),
        num_steps=1000,
    ),
    Benchmark(
        name="sigmoid MLP 14x14, 4k",
        source="fashion-mnist",
        size=14,
        num_train=4000,
        build=partial(models.mlp, width=64, activation=nn.Sigmoid),
        num_steps=1000,
    ),
    Benchmark(
        name="MLP 28x28, 10k",
        source="fashion-mnist",
        size=28,
        num_train=10_000,
        build=partial(models.mlp, width=128, depth=2),
        num_steps=1000,
    ),
    Benchmark(
        name="CNN 14x14, 4k",
        source="fashion-mnist",
        size=14,
        num_train=4000,
        build=partial(models.cnn, width=16),
        num_steps=1000,
    ),
    Benchmark(
        name="BatchNorm CNN 14x14, 4k",
        source="fashion-mnist",
        size=14,
        num_train=4000,
        build=partial(models.cnn, width=16, depth=3, normalise=True),
    ),
    Benchmark(
        name="residual net 14x14, 4k", source="fashion-mnist", size=14, num_train=4000, build=models.residual_net
    ),
    Benchmark(
        name="transformer 14x14, 4k",
        source="fashion-mnist",
        size=14,
        num_train=4000,
        build=models.transformer,
        num_steps=1000,
    ),
    Benchmark(
        name="LSTM 14x14, 4k",
        source="fashion-mnist",
        size=14,
        num_train=4000,
        build=partial(models.lstm, width=64),
        num_steps=1000,
    ),
    Benchmark(name="digits MLP (seen)", source="digits", size=8, num_train=None, build=partial(models.mlp, width=32)),
    Benchmark(name="digits CNN", source="digits", size=8, num_train=None, build=models.cnn),
)

META_BENCHMARKS: tuple[Benchmark, ...] = tuple(
    Benchmark(name=name, source="fashion-mnist", size=size, num_train=num_train, build=build, num_steps=400)
    for name, size, num_train, build in (
        ("MLP 8x8 w32", 8, 1000, partial(models.mlp, width=32)),
        ("LN MLP 8x8 d4", 8, 4000, partial(models.mlp, width=32, depth=4, normalise=True)),
        ("deep MLP 8x8 d4", 8, 4000, partial(models.mlp, width=32, depth=4)),
        ("CNN 8x8 w12", 8, 4000, partial(models.cnn, width=12)),
        ("LSTM 8x8", 8, 4000, partial(models.lstm, width=24)),
        ("MLP 14x14 w64", 14, 4000, partial(models.mlp, width=64)),
        ("transformer 8x8", 8, 4000, partial(models.transformer, width=16)),
    )
)
"""Meta-validation: what weights and recipes are chosen by, on the ``meta`` split."""

FAST_BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(name="toy MLP", source="digits", size=8, num_train=200, build=partial(models.mlp, width=8), num_steps=20),
    Benchmark(
        name="toy BatchNorm CNN",
        source="digits",
        size=8,
        num_train=200,
        build=partial(models.cnn, width=4, normalise=True),
        num_steps=20,
    ),
)
