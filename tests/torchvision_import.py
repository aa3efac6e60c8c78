"""How a torchvision that was built for another torch can be imported."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch


@cache
def make_torchvision_importable() -> None:
    """Declare what stops its import: that on PyPI is compiled for CUDA, and does not load beside a torch without.

    Lightning, transformers and timm import it where it is installed; none of them calls its operators here.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
