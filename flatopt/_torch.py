"""What is taken from torch under private names, besides its tracer and compiler (``metatrain/_record.py``).

Another version of torch is checked here first.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # noqa: F401
from torch.utils._python_dispatch import _disable_current_modes as without_modes  # noqa: F401

disable_dynamo = torch._disable_dynamo
"""Break the graph of a compiled caller; the public ``torch.compiler.disable`` would import the compiler."""

foreach_copy_ = torch._foreach_copy_
"""Copy a list of tensors onto another one, on a GPU in a few kernels."""

foreach_lerp_ = torch._foreach_lerp_
"""Move a list of tensors towards another one by one weight, on a GPU in a few kernels."""

foreach_norm = torch._foreach_norm
"""Return the norm of each tensor of a list, on a GPU in a few kernels."""


def is_fake(tensor: Tensor) -> bool:
    """Tell if a tensor was made in a ``FakeTensorMode``, which takes no tensors from outside."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def fsdp_modules() -> list[Any]:
    """Return all modules that FSDP2 has sharded in this process."""
    states, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("_composable_state", "fsdp"))
    if states is None or fsdp is None:
        return []
    return [module for module in list(states._module_state_mapping) if isinstance(module, fsdp.FSDPModule)]


def compile_errors() -> tuple[type[Exception], ...]:
    """Return what the call of a compiled function raises, before anything runs, if it cannot be compiled."""
    exc = torch._dynamo.exc  # loaded by torch.compile
    limits = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")  # its name today, and before: no TorchDynamoException
    return exc.TorchDynamoException, *(getattr(exc, name) for name in limits if hasattr(exc, name))
