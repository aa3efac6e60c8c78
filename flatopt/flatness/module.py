"""Flatness of a ``torch.nn.Module`` on data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._curvature import MeanLoss
from ._measure import LossFn, Params
from .eigenvalue import top_eigenvalue
from .gradient import gradient_norm
from .perturbation import sam_gap
from .trace import hutchinson_trace

Batch = tuple[Tensor, Tensor] | list[Tensor]
"""Inputs and targets, with examples along the first axis."""

Criterion = Callable[[Tensor, Tensor], Tensor]
"""``criterion(outputs, targets)``: the mean loss of a batch, 0-D."""


def module_loss(module: nn.Module, criterion: Criterion, data: Batch | Iterable[Batch]) -> tuple[MeanLoss, Params]:
    """Return the mean loss of a module over data as a function of its trainable parameters, and these parameters.

    The module runs in the mode it is in: call ``module.eval()`` first to measure the trained function, since
    BatchNorm in training mode makes the loss a function of how the data are batched, and dropout makes it random.
    Neither parameters nor buffers of the module are changed.  Frozen parameters and buffers are constants.  Attention
    and LSTMs run in kernels that have second derivatives.

    Args:
        module: any module with one input.
        criterion: mean loss of a batch given outputs and targets, such as ``torch.nn.functional.cross_entropy``.
        data: one ``(inputs, targets)`` batch, or an iterable of batches such as a ``DataLoader``, which is read once
            and kept, so that each evaluation sees the same data; batches count by their number of examples.

    Returns:
        ``(loss_fn, params)`` for any function of this package; ``params`` are detached and share the module's memory.

    Raises:
        TypeError: one of the arguments is something else.
        ValueError: the module has no trainable parameter, or one in half precision; the data hold no batch, an empty
            one or something else than ``(inputs, targets)``; or the criterion sums over several batches.

    Example:
        >>> module = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(module.weight)
        >>> data = (torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]]))
        >>> loss_fn, params = module_loss(module, nn.functional.mse_loss, data)
        >>> loss_fn(params)
        tensor(9.)
        >>> hutchinson_trace(loss_fn, params, num_matvecs=2) >= 0
        tensor(True)
    """
    given: tuple[Any, ...] = (module, criterion, data)
    if not isinstance(given[0], nn.Module) or not callable(given[1]) or not isinstance(given[2], Iterable):
        kinds = ", ".join(type(argument).__name__ for argument in given)
        raise TypeError(f"expected a module, a criterion and data, in this order, not {kinds}")
    params = {name: param.detach() for name, param in module.named_parameters() if param.requires_grad}
    if not params:
        raise ValueError("module must have at least one parameter that requires a gradient")
    if any(param.dtype in (torch.float16, torch.bfloat16) for param in params.values()):
        raise ValueError("half precision is too coarse for flatness: measure copy.deepcopy(module).float()")
    batches = [data] if isinstance(data, (tuple, list)) and data and isinstance(data[0], Tensor) else list(data)
    if not batches:
        raise ValueError("data must hold at least one batch")
    for batch in batches:
        if isinstance(batch, Tensor) or not isinstance(batch, Sequence) or len(batch) != 2:
            raise ValueError(f"a batch of data must be (inputs, targets), not {type(batch).__name__}")
    sizes = [len(inputs) for inputs, _ in batches]
    if 0 in sizes:
        raise ValueError("a batch of data must hold at least one example")
    if len(batches) > 1 and _reduction(criterion) == "sum":
        raise ValueError("batches are averaged, so the criterion must be a mean: leave reduction='sum' out")
    terms = [_batch_loss(module, criterion, inputs, targets) for inputs, targets in batches]
    return MeanLoss(terms=terms, weights=[size / sum(sizes) for size in sizes]), params


def flatness_of(
    module: nn.Module,
    criterion: Criterion,
    data: Batch | Iterable[Batch],
    *,
    num_matvecs: int = 20,
    rho: float = 0.05,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Measure the loss and the flatness of a module at its present parameters.

    Args:
        module: see :func:`module_loss`.
        criterion: see :func:`module_loss`.
        data: see :func:`module_loss`.
        num_matvecs: probes for the trace, and largest number of Lanczos steps for the eigenvalue.
        rho: radius of ``sam_gap``.
        generator: source of the probes.

    Returns:
        ``loss``, ``gradient_norm``, ``top_eigenvalue`` (algebraic), ``hutchinson_trace`` and ``sam_gap``.

    Example:
        >>> data = (torch.eye(2), torch.tensor([0, 1]))
        >>> sorted(flatness_of(nn.Linear(2, 2), nn.functional.cross_entropy, data))
        ['gradient_norm', 'hutchinson_trace', 'loss', 'sam_gap', 'top_eigenvalue']
    """
    loss_fn, params = module_loss(module, criterion, data)
    with torch.no_grad():
        values = {
            "loss": loss_fn(params),
            "gradient_norm": gradient_norm(loss_fn, params),
            "top_eigenvalue": top_eigenvalue(
                loss_fn, params, num_iterations=num_matvecs, which="algebraic", generator=generator
            ),
            "hutchinson_trace": hutchinson_trace(loss_fn, params, num_matvecs=num_matvecs, generator=generator),
            "sam_gap": sam_gap(loss_fn, params, rho=rho),
        }
    return {name: float(value) for name, value in values.items()}


def _reduction(criterion: Criterion) -> str | None:
    """Return the reduction of a loss of torch, also of one in a ``partial``, as far as it can be told."""
    return getattr(criterion, "reduction", getattr(criterion, "keywords", {}).get("reduction"))


@contextmanager
def _twice_differentiable(has_lstm: bool) -> Iterator[None]:
    """Leave out the kernels without second derivatives: fused attention, and oneDNN's LSTM on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # oneDNN's switch warns where there is no Intel GPU
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False) if has_lstm else nullcontext():
            yield


def _batch_loss(module: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor) -> LossFn:
    has_lstm = any(isinstance(part, nn.LSTM) for part in module.modules())

    def loss_fn(params: Params) -> Tensor:
        device = next(iter(params.values())).device
        frozen = {name: param.detach() for name, param in module.named_parameters() if name not in params}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}  # training mode writes to them
        with _twice_differentiable(has_lstm):
            outputs = torch.func.functional_call(module, {**frozen, **buffers, **params}, (inputs.to(device),))
        return criterion(outputs, targets.to(device))

    return loss_fn
