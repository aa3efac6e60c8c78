"""Flatness of a minimum, for any model: curvature, local entropy and sharpness of a function of parameters.

For a ``torch.nn.Module``, :func:`flatness_of` measures all at once, and :func:`module_loss` makes what each measure
takes: ``loss_fn``, a function from a dict of tensors to a 0-D tensor, and ``params``, the dict where to measure.  The
classes are the same measures as penalties, with their randomness as an argument, normalised so that coefficients carry
over between sizes of model.

Example:
    >>> import torch
    >>> from flatopt import flatness
    >>> def loss_fn(params):
    ...     return 0.5 * (torch.tensor([1.0, 10.0]) * params["x"].square()).sum()
    >>> flatness.top_eigenvalue(loss_fn, {"x": torch.ones(2)}).round(decimals=3)
    tensor(10.)
    >>> flatness.hutchinson_trace(loss_fn, {"x": torch.ones(2)})
    tensor(11.)
"""

from ._curvature import MeanLoss as MeanLoss
from ._curvature import hvp as hvp
from ._measure import FlatnessMeasure as FlatnessMeasure
from ._measure import LossFn as LossFn
from ._measure import Noise as Noise
from ._measure import Params as Params
from .eigenvalue import TopEigenvalue as TopEigenvalue
from .eigenvalue import top_eigenvalue as top_eigenvalue
from .entropy import EntropySurrogate as EntropySurrogate
from .entropy import LocalEntropy as LocalEntropy
from .entropy import entropy_surrogate as entropy_surrogate
from .entropy import local_entropy as local_entropy
from .gradient import GradientNorm as GradientNorm
from .gradient import gradient_norm as gradient_norm
from .module import flatness_of as flatness_of
from .module import module_loss as module_loss
from .perturbation import PerturbationGap as PerturbationGap
from .perturbation import SamGap as SamGap
from .perturbation import sam_gap as sam_gap
from .spectrum import Quadrature as Quadrature
from .spectrum import SpectralDensity as SpectralDensity
from .spectrum import SpectralPenalty as SpectralPenalty
from .spectrum import plot_spectral_density as plot_spectral_density
from .spectrum import spectral_density as spectral_density
from .spectrum import spectral_quadrature as spectral_quadrature
from .trace import HutchinsonTrace as HutchinsonTrace
from .trace import SquaredTrace as SquaredTrace
from .trace import hutchinson_trace as hutchinson_trace

MEASURES: dict[str, type[FlatnessMeasure]] = {
    "top-eigenvalue": TopEigenvalue,
    "trace": HutchinsonTrace,
    "squared-trace": SquaredTrace,
    "spectral-quadrature": SpectralPenalty,
    "local-entropy": EntropySurrogate,
    "gradient-norm": GradientNorm,
    "sam-gap": SamGap,
    "perturbation-gap": PerturbationGap,
}
"""Every measure by the name that configurations of meta-training use."""
