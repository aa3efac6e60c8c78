"""Small networks as functions of a dict of weights; features come first, ``[features, n]``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rule import Weights


def init_linear(
    name: str, num_inputs: int, num_outputs: int, generator: torch.Generator | None, *, zero: bool = False
) -> Weights:
    """Return weight ``[num_outputs, num_inputs]``, normal with variance ``1 / num_inputs`` or zero, and a zero bias."""
    weight = torch.randn(num_outputs, num_inputs, generator=generator) / num_inputs**0.5
    return {f"{name}.weight": weight * (not zero), f"{name}.bias": torch.zeros(num_outputs)}


def linear(weights: Weights, name: str, x_Fn: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return ``weight @ x + bias``, ``[outputs, n]``, with ``shift`` ``[outputs, 1 or n]`` added to the bias."""
    bias = weights[f"{name}.bias"][:, None]
    return weights[f"{name}.weight"] @ x_Fn + (bias if shift is None else bias + shift)
