"""Multi-layer perceptrons, plain, normalised or residual."""

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
        residual: add the input of a hidden layer to its output where both have the same width.
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
    residual: bool = False
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
            update = linear(params, f"layers.{index}", hidden)
            if self.norm is not None:
                update = layer_norm(params, f"norms.{index}", update)
            update = ACTIVATIONS[self.activation](update)
            skip = self.residual and self.sizes[index] == self.sizes[index + 1]
            hidden = hidden + update if skip else update
        return linear(params, f"layers.{last}", hidden)
