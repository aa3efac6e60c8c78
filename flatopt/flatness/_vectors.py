"""Dicts of tensors as vectors of length ``d`` (the number of coordinates), and random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ._measure import Noise, Params


def num_coordinates(params: Params) -> int:
    """Return ``d``, the number of scalars in ``params``.

    Raises:
        TypeError: when ``params`` is not a dict of tensors.
        ValueError: when there is none, or a tensor is not real floating point.
    """
    if not isinstance(params, Mapping) or not all(isinstance(param, Tensor) for param in params.values()):
        raise TypeError(
            f"params must be a dict of tensors by name, not {type(params).__name__}: for a module use "
            "flatness_of(module, criterion, data), or module_loss, which returns loss_fn and params"
        )
    for name, param in params.items():
        if not param.is_floating_point():
            raise ValueError(f"parameters must be real floating point tensors, got {name!r} with dtype {param.dtype}")
    dimension = sum(param.numel() for param in params.values())
    if dimension == 0:
        raise ValueError(f"params must hold at least one scalar, got {len(params)} tensors with none")
    return dimension


def flatten(tensors: Params) -> Tensor:
    """Return the coordinates of all tensors as one vector ``[d]``."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """Return the inverse of :func:`flatten`, in the shapes and dtypes of ``like``."""
    pieces = vector.split([tensor.numel() for tensor in like.values()])
    return {
        name: piece.reshape(tensor.shape).to(tensor.dtype)
        for (name, tensor), piece in zip(like.items(), pieces, strict=True)
    }


def probes(noise: Noise) -> list[Tensor]:
    """Return the ``num_probes`` vectors ``[d]`` held by a noise dict."""
    count = next(iter(noise.values())).shape[0]
    return [flatten({name: value[index] for name, value in noise.items()}) for index in range(count)]


def gaussian(params: Params, num_probes: int, generator: torch.Generator | None) -> Noise:
    """Draw standard normal noise, ``[num_probes, *param.shape]`` per parameter."""
    return _draw(torch.randn, params, num_probes, generator)


def rademacher(params: Params, num_probes: int, generator: torch.Generator | None) -> Noise:
    """Draw independent signs, ``[num_probes, *param.shape]`` per parameter."""
    bits = _draw(partial(torch.randint, 2), params, num_probes, generator)
    return {name: value.mul_(2).sub_(1) for name, value in bits.items()}


def check_positive(**values: float) -> None:
    """Raise a ``ValueError`` that names the first value that is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def _draw(sample: Callable[..., Tensor], params: Params, num_probes: int, generator: torch.Generator | None) -> Noise:
    num_coordinates(params)
    noise = {}
    for name, param in params.items():
        # A generator only draws on its own device: the same seed serves CPU and GPU.
        device = param.device if generator is None else generator.device
        drawn = sample((num_probes, *param.shape), dtype=param.dtype, device=device, generator=generator)
        noise[name] = drawn.to(param.device)
    return noise
