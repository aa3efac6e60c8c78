"""A small vision transformer: attention between the patches of an image.

Reference: Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._layers import init_affine, init_norm, layer_norm, linear, normal
from ._optimizee import Optimizee, Params
from .transformer import apply_block, init_block


@dataclass(frozen=True, kw_only=True)
class VisionTransformer(Optimizee):
    """Linear embedding of square patches, learned positions, pre-LN blocks, and a linear head on the mean.

    Args:
        image_size: height and width; a multiple of ``patch_size``.
        patch_size: height and width of a patch.
        width: channels; a multiple of ``num_heads``.
        num_heads: attention heads.
        num_layers: blocks.
        num_classes: number of outputs.

    Example:
        >>> model = VisionTransformer(image_size=8, patch_size=2, width=16, num_heads=2, num_layers=1)
        >>> model.predict(model.init(torch.Generator().manual_seed(0)), torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    image_size: int
    patch_size: int
    width: int
    num_heads: int
    num_layers: int
    num_classes: int = 10

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")

    def init(self, generator: torch.Generator) -> Params:
        """Return ``stem``, ``position_embedding``, ``layers.i.*`` blocks, ``norm`` and ``head``."""
        params: Params = {}
        init_affine(params, "stem", (self.width, self.patch_size**2), generator, "torch")
        num_patches = (self.image_size // self.patch_size) ** 2
        params["position_embedding.weight"] = normal((num_patches, self.width), 0.02, generator)
        for index in range(self.num_layers):
            init_block(params, f"layers.{index}", self.width, generator)
        init_norm(params, "norm", self.width, generator)
        init_affine(params, "head", (self.num_classes, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, num_classes]`` for inputs that reshape to ``[B, image_size, image_size]``."""
        patch, side = self.patch_size, self.image_size // self.patch_size
        cut = inputs.reshape(inputs.shape[0], side, patch, side, patch).transpose(2, 3)
        hidden = linear(params, "stem", cut.reshape(inputs.shape[0], side**2, patch**2))
        hidden = hidden + params["position_embedding.weight"]
        for index in range(self.num_layers):
            hidden = apply_block(params, f"layers.{index}", hidden, self.num_heads, causal=False)
        return linear(params, "head", layer_norm(params, "norm", hidden).mean(1))
