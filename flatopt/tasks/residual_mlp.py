"""A residual multi-layer perceptron with normalised branches: the feed-forward half of a transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._layers import ACTIVATIONS, Activation, check_choice, init_affine, init_norm, layer_norm, linear
from ._optimizee import Optimizee, Params


@dataclass(frozen=True, kw_only=True)
class ResidualMLP(Optimizee):
    """``h <- W x``, then blocks ``h <- h + W_2 activation(W_1 norm(h))``, then ``W norm(h)``; LayerNorm.

    Args:
        num_inputs: features.
        width: channels of ``h``.
        num_blocks: blocks.
        num_outputs: outputs.
        expansion: hidden units of a block, in multiples of ``width``.
        activation: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"gelu"``.

    Example:
        >>> model = ResidualMLP(num_inputs=64, width=16, num_blocks=2)
        >>> model.predict(model.init(torch.Generator().manual_seed(0)), torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    num_inputs: int
    width: int
    num_blocks: int
    num_outputs: int = 10
    expansion: int = 2
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, tuple(ACTIVATIONS))

    def init(self, generator: torch.Generator) -> Params:
        """Return ``stem``, ``blocks.i.{norm,linear1,linear2}``, ``norm`` and ``head``, weight and bias each."""
        params: Params = {}
        init_affine(params, "stem", (self.width, self.num_inputs), generator, "torch")
        for index in range(self.num_blocks):
            name = f"blocks.{index}"
            init_norm(params, f"{name}.norm", self.width, generator)
            init_affine(params, f"{name}.linear1", (self.expansion * self.width, self.width), generator, "torch")
            init_affine(params, f"{name}.linear2", (self.width, self.expansion * self.width), generator, "torch")
        init_norm(params, "norm", self.width, generator)
        init_affine(params, "head", (self.num_outputs, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, num_outputs]`` for inputs that flatten to ``[B, num_inputs]``."""
        hidden = linear(params, "stem", inputs.reshape(inputs.shape[0], self.num_inputs))
        for index in range(self.num_blocks):
            name = f"blocks.{index}"
            branch = linear(params, f"{name}.linear1", layer_norm(params, f"{name}.norm", hidden))
            hidden = hidden + linear(params, f"{name}.linear2", ACTIVATIONS[self.activation](branch))
        return linear(params, "head", layer_norm(params, "norm", hidden))
