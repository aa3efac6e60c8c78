"""Multi-layer perceptrons: a plain stack of layers, and blocks with normalised branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._layers import ACTIVATIONS, Activation, Init, check_choice, init_affine, init_norm, layer_norm, linear
from ._optimizee import Optimizee, Params


@dataclass(frozen=True, kw_only=True)
class MLP(Optimizee):
    """A stack of linear layers: ``h <- activation(norm(W h + b))``, no activation after the last.

    Args:
        sizes: input, hidden and output widths, such as ``(64, 32, 10)``.
        activation: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"gelu"``.
        norm: ``"layer"`` for LayerNorm before each activation, or ``None``.
        initialization: ``"torch"`` (the default of ``nn.Linear``), ``"he"`` or ``"small"`` (``N(0, 0.01^2)``).

    Example:
        >>> model = MLP(sizes=(64, 32, 10))
        >>> params = model.init(torch.Generator().manual_seed(0))
        >>> {name: tuple(value.shape) for name, value in params.items()}
        {'layers.0.weight': (32, 64), 'layers.0.bias': (32,), 'layers.1.weight': (10, 32), 'layers.1.bias': (10,)}
        >>> model.predict(params, torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])
    """

    sizes: tuple[int, ...]
    activation: Activation = "relu"
    norm: Literal["layer"] | None = None
    initialization: Init = "torch"

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("norm", self.norm, (None, "layer"))
        check_choice("initialization", self.initialization, ("torch", "he", "small"))

    def init(self, generator: torch.Generator) -> Params:
        """Return ``layers.i.{weight,bias}`` and, with ``norm``, ``norms.i.{weight,bias}``."""
        params: Params = {}
        for index, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            init_affine(params, f"layers.{index}", (fan_out, fan_in), generator, self.initialization)
            if self.norm is not None and index < len(self.sizes) - 2:
                init_norm(params, f"norms.{index}", fan_out, generator)
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, sizes[-1]]`` for inputs that flatten to ``[B, sizes[0]]``."""
        hidden = inputs.reshape(inputs.shape[0], self.sizes[0])
        last = len(self.sizes) - 2
        for index in range(last):
            hidden = linear(params, f"layers.{index}", hidden)
            if self.norm is not None:
                hidden = layer_norm(params, f"norms.{index}", hidden)
            hidden = ACTIVATIONS[self.activation](hidden)
        return linear(params, f"layers.{last}", hidden)


@dataclass(frozen=True, kw_only=True)
class ResidualMLP(Optimizee):
    """``h <- W x``, blocks ``h <- h + W_2 gelu(W_1 norm(h))``, then ``W norm(h)``; LayerNorm.

    A block is the feed-forward half of a transformer's, with ``2 * width`` hidden units.

    Args:
        num_inputs: features.
        width: channels of ``h``.
        num_blocks: blocks.
        num_outputs: outputs.

    Example:
        >>> model = ResidualMLP(num_inputs=64, width=16, num_blocks=2)
        >>> model.predict(model.init(torch.Generator().manual_seed(0)), torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    num_inputs: int
    width: int
    num_blocks: int
    num_outputs: int = 10

    def init(self, generator: torch.Generator) -> Params:
        """Return ``stem``, ``blocks.i.{norm,linear1,linear2}``, ``norm`` and ``head``, weight and bias each."""
        params: Params = {}
        init_affine(params, "stem", (self.width, self.num_inputs), generator, "torch")
        for index in range(self.num_blocks):
            name = f"blocks.{index}"
            init_norm(params, f"{name}.norm", self.width, generator)
            init_affine(params, f"{name}.linear1", (2 * self.width, self.width), generator, "torch")
            init_affine(params, f"{name}.linear2", (self.width, 2 * self.width), generator, "torch")
        init_norm(params, "norm", self.width, generator)
        init_affine(params, "head", (self.num_outputs, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, num_outputs]`` for inputs that flatten to ``[B, num_inputs]``."""
        hidden = linear(params, "stem", inputs.reshape(inputs.shape[0], self.num_inputs))
        for index in range(self.num_blocks):
            name = f"blocks.{index}"
            branch = linear(params, f"{name}.linear1", layer_norm(params, f"{name}.norm", hidden))
            hidden = hidden + linear(params, f"{name}.linear2", ACTIVATIONS["gelu"](branch))
        return linear(params, "head", layer_norm(params, "norm", hidden))
