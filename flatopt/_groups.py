"""What the options and the parameters of a group may be; checked wherever they can change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._abstract import is_abstract
from ._dtensor import is_dtensor

_FLATTENED = ("_fsdp_flattened", "_is_flat_param", "_param_infos", "ds_id")
"""Marks that wrappers leave on parameters whose shape they take: FSDP1 of torch and of fairscale, DeepSpeed ZeRO-3."""

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: 0.0 <= value < math.inf, "must be finite and >= 0"),
    "weight_decay": (lambda value: 0.0 <= value < math.inf, "must be finite and >= 0"),
    "num_steps": (
        lambda value: value is not True and value >= 1 and (value == math.inf or value % 1 == 0),
        "must be an integer >= 1, or None",
    ),
    "seed": (lambda value: isinstance(value, int) and 0 <= value < 2**32, "must be in [0, 2^32)"),
    "maximize": (lambda value: value in (False, True), "must be True or False"),
}


def check_options(options: dict[str, Any], where: str = "") -> None:
    """Check options in place: numbers of other libraries become those of Python, an unknown ``num_steps`` infinite.

    A tensor is looked at only where that costs no synchronisation with a device.

    Args:
        options: some or all of ``lr``, ``weight_decay``, ``num_steps``, ``seed``, ``maximize``; others are left alone.
        where: end of the error message, such as ``" in parameter group 1"``.

    Raises:
        ValueError: if one is out of range.

    Example:
        >>> check_options({"weight_decay": -1.0}, " in parameter group 1")
        Traceback (most recent call last):
        ...
        ValueError: Invalid weight_decay value: -1.0 in parameter group 1, must be finite and >= 0
    """
    for key, (is_valid, expected) in _CHECKS.items():
        if key not in options:
            continue
        value = options[key]
        if type(value) not in (float, int, bool):
            value = options[key] = _plain(key, value)
            if isinstance(value, Tensor) and (value.device.type != "cpu" or is_abstract(value)):
                continue
            if not isinstance(value, Real | Tensor):
                raise ValueError(f"Invalid {_title(key)}: {value!r}{where}, {expected}")
        if not is_valid(value):
            raise ValueError(f"Invalid {_title(key)}: {value}{where}, {expected}")


def _title(key: str) -> str:
    return "learning rate" if key == "lr" else f"{key} value"


def _plain(key: str, value: Any) -> Any:
    """Return an option as Python's own number, which every way of saving takes, or as the tensor it is."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element")
        return value if key in ("lr", "weight_decay") else value.item()
    if value is None and key == "num_steps":
        return math.inf
    if key == "maximize":
        return bool(value) if value in (False, True) else value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def highest_lr(groups: Iterable[dict[str, Any]]) -> float | None:
    """Return the highest learning rate, ``None`` where reading one needs a device or there is none."""
    lrs = [group["lr"] for group in groups]
    if any(isinstance(lr, Tensor) and (lr.device.type != "cpu" or is_abstract(lr)) for lr in lrs):
        return None
    return max(map(float, lrs), default=None)


def check_gradient(param: Tensor, grad: Tensor, groups: Iterable[dict[str, Any]]) -> None:
    """Raise unless a parameter can be optimized with this gradient."""
    if grad.layout != torch.strided:
        raise RuntimeError("FlatOpt does not support sparse gradients, use sparse=False or SparseAdam")
    if not (param.is_floating_point() or param.is_complex()):
        raise TypeError(f"FlatOpt cannot optimize a parameter of dtype {param.dtype}")
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {name_of(param, groups)} has shape {list(grad.shape)}, but the parameter "
            f"{list(param.shape)}: clear gradients when a parameter changes its shape"
        )


def refuse_flattened(param: Tensor, groups: Sequence[dict[str, Any]], longest: float) -> None:
    """Raise ``RuntimeError`` if a wrapper has taken the shape of a parameter, or put a flat buffer in its place.

    A vector longer than the ``longest`` that once stood beside matrices is such a buffer if no matrix is left.
    """
    is_buffer = not is_lazy(param) and param.numel() > longest and not has_matrices(groups)
    if is_buffer or any(hasattr(param, mark) for mark in _FLATTENED):
        raise RuntimeError(
            f"{name_of(param, groups)} is flattened, as by FSDP1 or DeepSpeed ZeRO, and FlatOpt needs the shapes of "
            "matrices: shard with FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def has_matrices(groups: Iterable[dict[str, Any]]) -> bool:
    """Return whether any parameter has two axes; one of a lazy module has none yet."""
    return any(not is_lazy(param) and param.dim() > 1 for group in groups for param in group["params"])


def sharing_memory(groups: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor] | None:
    """Return two parameters that are views of the same memory, as a matrix and its transpose."""
    seen: dict[tuple[torch.device, int, int], Tensor] = {}
    for param in (param for group in groups for param in group["params"]):
        if is_lazy(param) or is_abstract(param) or is_dtensor(param) or not param.numel():
            continue
        other = seen.setdefault((param.device, param.data_ptr(), param.numel()), param)
        if other is not param:
            return other, param
    return None


def longest_vector(groups: Sequence[dict[str, Any]]) -> float:
    """Return the coordinates of the longest vector beside matrices; infinite where there are no matrices."""
    sizes = (param.numel() for group in groups for param in group["params"] if not is_lazy(param) and param.dim() < 2)
    return max(sizes, default=0) if has_matrices(groups) else math.inf


def name_of(param: Tensor, groups: Iterable[dict[str, Any]]) -> str:
    """Return how messages call a parameter."""
    for group_index, group in enumerate(groups):
        for index, other in enumerate(group["params"]):
            if other is param:
                names = group.get("param_names") or []
                is_named = index < len(names)  # or was appended to the list by hand
                return f"parameter {names[index]!r}" if is_named else f"parameter {index} of group {group_index}"
    return "a parameter of no group"
