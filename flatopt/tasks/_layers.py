"""Layers as functions on a dict of parameters; plain arithmetic, so that ``vmap`` batches them cheaply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._optimizee import Params

Activation = Literal["relu", "tanh", "sigmoid", "gelu"]
Init = Literal["torch", "he", "small"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    """Draw from ``U(-bound, bound)``."""
    return torch.empty(*shape, device=generator.device).uniform_(-bound, bound, generator=generator)


def normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """Draw from ``N(0, std^2)``."""
    return torch.empty(*shape, device=generator.device).normal_(0.0, std, generator=generator)


def init_affine(params: Params, name: str, shape: Sequence[int], generator: torch.Generator, init: Init) -> None:
    """Add a linear or convolutional layer with weight ``[out, in, *kernel]``.

    ``torch``: weight and bias from ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, the default of ``torch.nn`` layers.
    ``he``: weight from ``N(0, 2/fan_in)``, zero bias (He et al., 2015, https://arxiv.org/abs/1502.01852).
    ``small``: both from ``N(0, 0.01^2)`` whatever the width, as published learned optimizers were trained on.
    """
    fan_in = math.prod(shape[1:])
    if init == "he":
        params[f"{name}.weight"] = normal(shape, math.sqrt(2 / fan_in), generator)
        params[f"{name}.bias"] = torch.zeros(shape[0], device=generator.device)
    elif init == "small":
        params[f"{name}.weight"] = normal(shape, 0.01, generator)
        params[f"{name}.bias"] = normal(shape[:1], 0.01, generator)
    else:
        params[f"{name}.weight"] = uniform(shape, 1 / math.sqrt(fan_in), generator)
        params[f"{name}.bias"] = uniform(shape[:1], 1 / math.sqrt(fan_in), generator)


def init_norm(params: Params, name: str, width: int, generator: torch.Generator) -> None:
    """Add weight one and bias zero."""
    params[f"{name}.weight"] = torch.ones(width, device=generator.device)
    params[f"{name}.bias"] = torch.zeros(width, device=generator.device)


def matmul(inputs: Tensor, matrix: Tensor) -> Tensor:
    """Return ``inputs @ matrix`` for ``[..., in]`` and ``[in, out]``."""
    # Flat on purpose: under vmap, a matmul of more dimensions copies the matrix once per example.
    return (inputs.reshape(-1, matrix.shape[0]) @ matrix).reshape(*inputs.shape[:-1], matrix.shape[1])


def linear(params: Params, name: str, inputs: Tensor) -> Tensor:
    """Return ``inputs @ weight.T + bias`` for ``[..., in]``."""
    return matmul(inputs, params[f"{name}.weight"].T) + params[f"{name}.bias"]


def layer_norm(params: Params, name: str, inputs: Tensor) -> Tensor:
    """Normalise over the last axis, then scale and shift (Ba et al., 2016, https://arxiv.org/abs/1607.06450)."""
    return _standardize(inputs, (-1,)) * params[f"{name}.weight"] + params[f"{name}.bias"]


def group_norm(params: Params, name: str, inputs: Tensor, num_groups: int) -> Tensor:
    """Normalise ``[B, H, W, C]`` per example over pixels and groups of channels, then scale and shift.

    Reference: Wu and He, 2018, https://arxiv.org/abs/1803.08494
    """
    batch, height, width, channels = inputs.shape
    grouped = inputs.reshape(batch, height * width, num_groups, channels // num_groups)
    normalised = _standardize(grouped, (1, 3)).reshape(inputs.shape)
    return normalised * params[f"{name}.weight"] + params[f"{name}.bias"]


def batch_norm(params: Params, name: str, inputs: Tensor) -> Tensor:
    """Normalise ``[..., C]`` over all axes but the last, then scale and shift; always by what this batch shows.

    Reference: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167
    """
    normalised = _standardize(inputs, tuple(range(inputs.dim() - 1)))
    return normalised * params[f"{name}.weight"] + params[f"{name}.bias"]


def _standardize(inputs: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Give the elements along ``axes`` a mean of zero and a variance of one."""
    centred = inputs - inputs.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + 1e-5)


def embed(params: Params, name: str, indices: Tensor) -> Tensor:
    """Return the rows of ``weight`` at int64 ``[...]``."""
    table = params[f"{name}.weight"]
    # A product with one-hot vectors: the backward pass of an embedding lookup is a scatter, slow under vmap.
    # Compared by hand, because vmap does not accept F.one_hot.
    one_hot = indices.unsqueeze(-1) == torch.arange(table.shape[0], device=indices.device)
    return matmul(one_hot.to(table.dtype), table)
