"""The contract of a flatness measure: randomness in one method, mathematics in the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters by name."""

Noise = dict[str, Tensor]
"""Random numbers by parameter name, ``[num_probes, *param.shape]`` each; empty when a measure needs none."""

LossFn = Callable[[Params], Tensor]
"""A function of the parameters with a 0-D value."""


@dataclass(frozen=True, kw_only=True)
class FlatnessMeasure(ABC):
    """A scalar that says how sharp a loss is around ``params``: the smaller, the flatter.

    Fields are static hyper-parameters.  :meth:`sample_noise` draws every random number, so that calling a measure is a
    pure function.  It runs under ``torch.func.vmap``: for parameters with a leading task axis, sample the noise from
    these stacked parameters and map over ``in_dims=(0, 1)``, because noise has its probe axis in front.

    Derivatives inside a measure are taken with ``torch.func``, hence the loss function may itself call ``torch.func``
    (an unrolled training, say) but must not contain ``torch.utils.checkpoint``.  The value can be differentiated from
    outside, by ``torch.autograd`` or ``torch.func``, as far as the docstring of the measure says.
    """

    has_value: ClassVar[bool] = True
    """Whether the value means something, else the gradient alone does: then evolution strategies cannot use it."""
    as_penalty: ClassVar[Mapping[str, Any]] = {}
    """Fields that must have these values in a penalty of meta-training, with the reason where they are set."""

    def sample_noise(self, params: Params, generator: torch.Generator | None = None) -> Noise:
        """Draw the randomness of one evaluation, by default none; called once before every call of the measure.

        Args:
            params: parameters, for names, shapes, dtypes and devices only.
            generator: source of randomness, on any device; the global one if ``None``.
        """
        return {}

    @abstractmethod
    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return the measure, 0-D.

        Args:
            loss_fn: twice differentiable function of the parameters, 0-D value.
            params: where to measure.
            noise: a result of :meth:`sample_noise`.
        """
