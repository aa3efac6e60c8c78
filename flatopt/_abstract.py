"""Tensors that have a shape and no values: on the device ``meta``, or made in a ``FakeTensorMode``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._torch import is_fake, without_modes


def is_abstract(tensor: Tensor) -> bool:
    """Tell if a tensor has no values."""
    return tensor.device.type == "meta" or is_fake(tensor)


@contextmanager
def real_tensors() -> Iterator[None]:
    """Make tensors with values, on the CPU by default, whatever mode or default device is set outside."""
    with without_modes(), torch.device("cpu"):
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the dtypes of the tensors; there is no autocast on ``meta``."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
