"""Accumulators, normalisations and embeddings that several rules share: the only copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tiny(like: Tensor) -> float:
    """Return the smallest normal number of a dtype: keeps logarithms and quotients of zero finite."""
    return torch.finfo(like.dtype).tiny


def advance_average(average: Tensor, value: Tensor, decay: float) -> Tensor:
    """Return ``decay * average + (1 - decay) * value``."""
    return torch.lerp(average, value, 1 - decay)


def debias(average: Tensor, decay: float, step: Tensor) -> Tensor:
    """Undo the pull of an average towards its zero start (Kingma and Ba, 2015, section 3)."""
    return average / (1 - decay**step)


def embed_step(step: Tensor, scales: tuple[float, ...]) -> list[Tensor]:
    """Return ``log(step)``, centred, and one soft switch ``tanh(log(step / scale))`` per scale; 0-D each."""
    log_step = step.log()
    return [(log_step - 4) / 2] + [torch.tanh(log_step - math.log(scale)) for scale in scales]


def fan_in(param: Tensor) -> int:
    """Return the number of inputs of one output: coordinates per slice of the first axis."""
    return math.prod(param.shape[1:])
