"""Small convolutional networks without convolutions: strided slices and one matrix product per layer.

A convolution whose kernels differ between the problems of a ``vmap`` becomes a grouped convolution, and its backward
pass is slow on CPUs; a batched matrix product is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import batch_norm, check_choice, group_norm, init_affine, init_norm, linear, matmul
from ._optimizee import Optimizee, Params


@dataclass(frozen=True, kw_only=True)
class CNN(Optimizee):
    """3x3 convolutions (``conv, norm, ReLU``), each halving the image, then one linear layer on all features.

    Args:
        channels: output channels of each convolution.
        image_size: height and width of the input.
        num_classes: number of outputs.
        norm: ``"group"`` or ``"batch"`` for GroupNorm or BatchNorm after each convolution, or ``None``.
        num_groups: groups of GroupNorm; divides every entry of ``channels``.

    Example:
        >>> model = CNN(channels=(8, 16), image_size=8)
        >>> params = model.init(torch.Generator().manual_seed(0))
        >>> tuple(params["convs.1.weight"].shape), tuple(params["head.weight"].shape)
        ((16, 8, 3, 3), (10, 64))
    """

    channels: tuple[int, ...]
    image_size: int
    num_classes: int = 10
    norm: Literal["group", "batch"] | None = None
    num_groups: int = 4

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, (None, "group", "batch"))
        if self.norm == "group" and any(width % self.num_groups for width in self.channels):
            raise ValueError(f"num_groups={self.num_groups} must divide all of channels={self.channels}")

    def init(self, generator: torch.Generator) -> Params:
        """Return ``convs.i.{weight,bias}``, ``norms.i.{weight,bias}`` with ``norm``, and ``head.{weight,bias}``."""
        params: Params = {}
        size, fan_in = self.image_size, 1
        for index, width in enumerate(self.channels):
            init_affine(params, f"convs.{index}", (width, fan_in, 3, 3), generator, "torch")
            if self.norm is not None:
                init_norm(params, f"norms.{index}", width, generator)
            size, fan_in = (size + 1) // 2, width
        init_affine(params, "head", (self.num_classes, size * size * fan_in), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, num_classes]`` for inputs that reshape to ``[B, image_size, image_size]``."""
        hidden = inputs.reshape(inputs.shape[0], self.image_size, self.image_size, 1)
        for index in range(len(self.channels)):
            hidden = conv3x3(hidden, params[f"convs.{index}.weight"]) + params[f"convs.{index}.bias"]
            if self.norm == "batch":
                hidden = batch_norm(params, f"norms.{index}", hidden)
            elif self.norm == "group":
                hidden = group_norm(params, f"norms.{index}", hidden, self.num_groups)
            hidden = torch.relu(hidden)
        return linear(params, "head", hidden.reshape(hidden.shape[0], -1))


def conv3x3(inputs: Tensor, weight: Tensor) -> Tensor:
    """Convolve ``[B, H, W, in]`` with ``[out, in, 3, 3]``, stride 2, padding 1: ``[B, ceil(H / 2), ceil(W / 2), out]``.

    Equal to ``F.conv2d(..., stride=2, padding=1)`` up to the position of the channel axis.
    """
    _, height, width, _ = inputs.shape
    padded = F.pad(inputs, (0, 0, 1, 1, 1, 1))
    shifted = [
        padded[:, row : row + height : 2, column : column + width : 2] for row in range(3) for column in range(3)
    ]
    kernel = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return matmul(torch.cat(shifted, -1), kernel)
