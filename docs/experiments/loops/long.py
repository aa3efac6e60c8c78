"""Runs ten times as long as those of the benchmark, on data sets that are large beside the networks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from flatopt.evaluate import models
from flatopt.evaluate.compare import Problem
from flatopt.tasks import load_text

from . import likelihood, made, of_split
from .pictures import classification
from .sequences import windows

ALL = 60_000
"""More than there are images in any split."""


def _on_all_images(seed: int, split: str, model: nn.Module) -> Problem:
    return classification(nn.Sequential(nn.Flatten(1, 2), model), split, seed, ALL, ALL)


def perceptron(seed: int, split: str = "test") -> Problem:
    """Return a multi-layer perceptron on all images."""
    torch.manual_seed(seed)
    return _on_all_images(seed, split, models.mlp(14, width=128, depth=2))


def convolutions(seed: int, split: str = "test") -> Problem:
    """Return a CNN with BatchNorm on all images."""
    torch.manual_seed(seed)
    return _on_all_images(seed, split, models.cnn(14, width=24, depth=3, normalise=True))


_source = lru_cache(maxsize=1)(load_text)


def characters(seed: int, split: str = "test") -> Problem:
    """Return a causal transformer on characters of Python source."""
    torch.manual_seed(seed)
    train = made(lambda random: windows(_source().train, 16, random), seed)
    measured = of_split(lambda random: windows(getattr(_source(), split), 60, random), split)
    return Problem(models.decoder(64, width=64, depth=2), train, measured, likelihood)
