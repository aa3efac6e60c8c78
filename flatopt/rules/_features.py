"""Accumulators, normalisations and embeddings that several rules share: the only copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .._torch import is_fake, without_modes
from ._rule import State


def constant_columns(columns: Sequence[tuple[float, ...]], like: Tensor) -> Tensor:
    """Return numbers known on the host, ``[F, N]`` for ``N`` columns, where another tensor is and in its dtype.

    Each column is brought to a GPU once, which waits for it, and kept for good: captured kernels read it there.
    """
    if like.is_cuda and not is_fake(like):
        return torch.stack([_on_gpu(column, like.device, like.dtype) for column in columns], -1)
    return torch.tensor(list(zip(*columns, strict=True)), dtype=like.dtype, device=like.device)


@cache
def _on_gpu(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with without_modes(), torch.inference_mode(False):  # whoever asks first, it is a tensor like any other
        return torch.tensor(values, dtype=dtype, device=device)


def tiny(like: Tensor) -> float:
    """Return the smallest normal number of a dtype: keeps logarithms and quotients of zero finite."""
    return torch.finfo(like.dtype).tiny


def advance_average(average: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    """Return ``decay * average + (1 - decay) * value``."""
    return torch.lerp(average, value, 1 - decay)


def advance_moments(state: State, grad: Tensor, beta1: float | Tensor, beta2: float | Tensor) -> State:
    """Return the new ``exp_avg`` and ``exp_avg_sq``: averages of the gradient and of its square."""
    return {
        "exp_avg": advance_average(state["exp_avg"], grad, beta1),
        "exp_avg_sq": advance_average(state["exp_avg_sq"], grad.square(), beta2),
    }


def debias(average: Tensor, decay: float, step: Tensor) -> Tensor:
    """Undo the pull of an average towards its zero start (Kingma and Ba, 2015, section 3)."""
    return average * debiasing(decay, step)


def debiasing(decay: float | Tensor, step: Tensor) -> Tensor:
    """Return ``1 / (1 - decay^step)``, what :func:`debias` multiplies by."""
    return 1 / (1 - decay**step)


def embed_step(step: Tensor, scales: tuple[float, ...]) -> list[Tensor]:
    """Return ``log(step)``, centred, and one soft switch ``tanh(log(step / scale))`` per scale; 0-D each."""
    log_step = step.log()
    return [(log_step - 4) / 2] + [torch.tanh(log_step - math.log(scale)) for scale in scales]


def embed_horizon(step: Tensor, num_steps: Tensor, known: Tensor) -> list[Tensor]:
    """Return five 0-D features of the length of the run, all zero where it is not ``known``."""
    length = torch.where(known, num_steps, 1.0)
    fraction = (step / length).clamp(max=1)
    late = torch.tanh(10 * (fraction - 0.9))
    features = [torch.ones_like(fraction), 2 * fraction - 1, fraction.square(), late, (length.log() - 6) / 2]
    return list((torch.stack(features) * known).unbind())


def log_sign(grad: Tensor, exponent: float = 5.0) -> Tensor:
    """Return logarithmic size and clipped value of a gradient, ``[2, n]`` (after Andrychowicz et al., 2016).

    They are ``max(log(|g| + eps) / exponent, -1)`` and ``clip(g * e^exponent, -1, 1)``, with float32's epsilon.
    """
    size = (grad.abs() + torch.finfo(torch.float32).eps).log() / exponent
    return torch.stack([size.clamp(min=-1), (grad * math.exp(exponent)).clamp(-1, 1)])
