"""Whether a device that a command names can be used."""

from __future__ import annotations

import torch


def check_device(device: str | torch.device) -> torch.device:
    """Return the device; ``ValueError`` if it cannot be used."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: it computes no values")
    return device
