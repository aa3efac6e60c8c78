"""The problems of the quality table, as data.

No row has the data *and* the architecture of a family of meta-training.  The text of the test tasks comes from files
that it does not read, that of meta-validation from those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from . import models
from ._evaluation import matching
from ._training import Benchmark


def _images(name: str, build: Callable[[int], nn.Module], size: int = 14, **fields: Any) -> Benchmark:
    """Return a problem on Fashion-MNIST."""
    usual: dict[str, Any] = {"num_train": 4000, "num_steps": 500, "num_eval": 4000}
    return Benchmark(name=name, source="fashion-mnist", size=size, build=build, **(usual | fields))


def _digits(name: str, build: Callable[[int], nn.Module]) -> Benchmark:
    return Benchmark(name=name, source="digits", size=8, build=build, num_steps=400)


def _text(name: str, build: Callable[[int], nn.Module], size: int = 32, source: str = "text") -> Benchmark:
    return Benchmark(
        name=name, source=source, size=size, build=build, num_train=20_000, batch_size=16, num_steps=400, num_eval=500
    )


def _table(
    name: str, source: str, size: int, num_outputs: int, *, batch_size: int = 32, num_steps: int = 400, **shape: Any
) -> Benchmark:
    """Return a problem on a table of ``size`` features, a regression if there is one output."""
    build = partial(models.dense, num_outputs=num_outputs, **shape)
    kind: Literal["regression", "classification"] = "regression" if num_outputs == 1 else "classification"
    return Benchmark(
        name=name, source=source, size=size, build=build, batch_size=batch_size, num_steps=num_steps, kind=kind
    )


_META_TEXT = "text of meta-training"

BENCHMARKS: tuple[Benchmark, ...] = (
    _digits("digits MLP", partial(models.mlp, width=100, depth=2)),
    _digits("digits CNN", models.cnn),
    _table("tabular, 5 classes, 800 rows", "classes", 20, 5, width=64, batch_size=64, num_steps=500),
    _table("tabular, breast cancer", "breast cancer", 30, 2, width=48),
    _table("regression, friedman", "friedman", 10, 1, width=64, num_steps=600),
    _table("regression, diabetes", "diabetes", 10, 1, width=48),
    _images("MLP, 1k", partial(models.mlp, width=96), num_train=1000),
    _images("MLP 28x28, 10k", partial(models.mlp, width=128, depth=2), 28, num_train=10_000, num_steps=800),
    _images("deep MLP", partial(models.mlp, width=64, depth=6), 8, num_steps=800),
    _images("deep LayerNorm MLP", partial(models.mlp, width=64, depth=5, normalise=True), 8, num_steps=800),
    _images("sigmoid MLP", partial(models.mlp, width=64, activation=nn.Sigmoid), num_steps=800),
    _images("pre-LN residual MLP, 10 % label noise", partial(models.pre_norm_mlp, depth=4), label_noise=0.1),
    _images("CNN", partial(models.cnn, width=16)),
    _images("BatchNorm CNN", partial(models.cnn, width=12, depth=3, normalise=True), num_steps=400),
    _images("GroupNorm CNN", partial(models.cnn, width=12, depth=3, num_groups=4), num_steps=400),
    _images("BatchNorm residual net", partial(models.residual_net, width=12), num_steps=400),
    _images("row transformer", models.transformer, num_steps=400),
    _images("ViT 28x28", partial(models.vit, width=32), 28, num_steps=400),
    _images("row LSTM", partial(models.lstm, width=64)),
    _images("autoencoder", models.autoencoder, num_steps=600, kind="reconstruction"),
    _text("text transformer", models.decoder),
    _text("text GRU", models.text_gru),
)


META_BENCHMARKS: tuple[Benchmark, ...] = (
    _digits("digits MLP, GELU", partial(models.mlp, width=64, activation=nn.GELU)),
    _images("MLP, wide", partial(models.mlp, width=160, depth=2)),
    _images("MLP 28x28, 8k", partial(models.mlp, width=64, depth=3), 28, num_train=8000, num_steps=600),
    _images("deeper MLP", partial(models.mlp, width=48, depth=8), 8, num_steps=600),
    _images("sigmoid MLP 8x8", partial(models.mlp, width=96, activation=nn.Sigmoid), 8, num_steps=600),
    _images("LayerNorm MLP", partial(models.mlp, width=96, depth=3, normalise=True)),
    _images("pre-LN residual MLP 8x8", partial(models.pre_norm_mlp, width=48, depth=3), 8, label_noise=0.1),
    _images("wide CNN 8x8", partial(models.cnn, width=24), 8),
    _images("BatchNorm CNN, two layers", partial(models.cnn, width=16, normalise=True), num_steps=400),
    _images("row transformer, one layer", partial(models.transformer, width=48, depth=1), num_steps=400),
    _images("ViT 28x28, one layer", partial(models.vit, width=64, depth=1), 28, num_steps=400),
    _images("row LSTM 8x8", partial(models.lstm, width=32), 8),
    _table("tabular, 3 classes, 400 rows", "3 classes", 12, 3, width=48, depth=2),
    _table("tabular, 8 classes, 3,000 rows", "8 classes", 30, 8, width=128, depth=2, num_steps=600),
    _table("regression, linear", "linear", 15, 1, width=64, depth=2),
    _table("regression, friedman with 20 features", "friedman", 20, 1, width=96, depth=1, num_steps=600),
    _text("text transformer, one layer", partial(models.decoder, width=64, depth=1), 24, _META_TEXT),
    _text("text GRU, narrow", partial(models.text_gru, width=48), 24, _META_TEXT),
    # As wide and as deep as the test tasks.
    _images("MLP 28x28, two wide layers", partial(models.mlp, width=192, depth=2), 28, num_train=10_000, num_steps=800),
    _images("deep MLP 14x14", partial(models.mlp, width=96, depth=5), num_steps=800),
    _images("sigmoid MLP, wide", partial(models.mlp, width=160, activation=nn.Sigmoid), num_steps=800),
    _images("deep LayerNorm MLP 14x14", partial(models.mlp, width=96, depth=6, normalise=True), num_steps=800),
    _images("pre-LN residual MLP, wide", partial(models.pre_norm_mlp, width=96, depth=5), label_noise=0.1),
    _images("CNN, three layers", partial(models.cnn, width=20, depth=3)),
    _images("GroupNorm CNN, two layers", partial(models.cnn, width=16, num_groups=4), num_steps=400),
    _images("BatchNorm residual net 8x8", partial(models.residual_net, width=16, num_blocks=3), 8, num_steps=400),
    _images("row transformer, three layers", partial(models.transformer, width=48, depth=3), num_steps=400),
    _images("ViT 14x14, three layers", partial(models.vit, width=64, depth=3, patch=2), num_steps=300),
    _images("row LSTM, wide", partial(models.lstm, width=96)),
    _images("autoencoder 8x8", partial(models.autoencoder, width=64, code=8), 8, num_steps=600, kind="reconstruction"),
    _text("text transformer, three layers", partial(models.decoder, width=64, depth=3), source=_META_TEXT),
    _text("text GRU, wide", partial(models.text_gru, width=96), source=_META_TEXT),
)
"""Meta-validation: what weights and recipes are chosen by, on the ``meta`` split.  No row is one of the test tasks."""

FAST_STEPS, FAST_TRAIN = 20, 200
"""Toy sizes."""
FAST_TASKS = ("digits MLP", "tabular, breast cancer", "regression, diabetes")
"""The tasks of a fast table when none are named: those whose data come with scikit-learn."""


def choose_benchmarks(tasks: Sequence[str], split: str, *, fast: bool) -> list[Benchmark]:
    """Return the tasks of a split that have one of the texts in their names, all for none; toy sizes when ``fast``."""
    every = META_BENCHMARKS if split == "meta" else BENCHMARKS
    parts = tasks or (FAST_TASKS if fast and split == "test" else ())
    chosen = matching([one.name for one in every], parts, "task")
    kept = [one for one in every if one.name in chosen]
    return [replace(one, num_steps=FAST_STEPS, num_train=FAST_TRAIN) for one in kept] if fast else kept
