"""How flat the minimum is that a run has reached: the measures of :mod:`flatopt.flatness` on training images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatopt.flatness import EntropySurrogate, flatness_of, local_entropy, module_loss
from flatopt.tasks import Batch

from ._cache import Record

MEASURES = ("loss", "gradient_norm", "top_eigenvalue", "hutchinson_trace", "sam_gap", "local_entropy")
"""What :class:`Curvature` returns, by name."""

BATCH_SIZE = 200
"""Images of one term of the loss: bounds the memory of Hessian products, and with it their time on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """What is measured, and how thoroughly.

    The local entropy is given as the difference from that of a loss that is zero everywhere,

        G - d/2 ln(2 pi / gamma)  ~  -f + 1/2 g^T (H + gamma I)^-1 g - 1/2 ln det(I + H / gamma)

    so that it does not grow with the number ``d`` of parameters: 0 is the largest value where ``H >= 0`` and ``g = 0``.

    Args:
        num_examples: training images that define the loss surface.
        num_matvecs: probes of the trace, and largest number of Lanczos steps for the eigenvalue.
        gamma: inverse squared radius of the local entropy, which is left out when ``None``.
        num_probes: probes of the local entropy.
        num_lanczos: Lanczos steps per probe of the local entropy.
    """

    num_examples: int = 1000
    num_matvecs: int = 100
    gamma: float | None = None
    num_probes: int = 4
    num_lanczos: int = 6

    def __call__(
        self, model: nn.Module, train: Batch, seed: int, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    ) -> Record:
        """Return the measures of a model in evaluation mode; the probes depend on ``seed`` only."""
        parts = [tensor[: self.num_examples].split(BATCH_SIZE) for tensor in train]
        data = [Batch(*part) for part in zip(*parts, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        record: Record = flatness_of(model.eval(), loss_fn, data, num_matvecs=self.num_matvecs, generator=generator)
        if self.gamma is None:
            return record
        mean_loss, params = module_loss(model, loss_fn, data)
        entropy = local_entropy(
            mean_loss,
            params,
            EntropySurrogate(gamma=self.gamma, num_steps=1),  # the value needs no chain
            num_matvecs=self.num_probes,
            num_lanczos=self.num_lanczos,
            generator=generator,
        )
        dimension = sum(param.numel() for param in params.values())
        flat = dimension / 2 * math.log(2 * math.pi / self.gamma)
        return record | {"local_entropy": float(entropy.value.double()) - flat}
