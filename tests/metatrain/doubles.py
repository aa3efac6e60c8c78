"""Inner training in float64, and differences of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flatopt.metatrain.estimators import Inner
from flatopt.metatrain.runs import map_tree
from flatopt.rules import Weights


def in_double(tree):
    return map_tree(lambda value: value.double() if value.is_floating_point() else value, tree)


@dataclass(frozen=True, kw_only=True)
class InDouble(Inner):
    """Problems and data are float32; differences need more."""

    inner: Inner

    def reset(self, weights, generator, num_steps=None):
        return in_double(self.inner.reset(weights, generator, num_steps))

    def refresh(self, weights, state, generator, num_steps=None):
        return self.inner.refresh(weights, state, generator, num_steps)

    def draw(self, state, generator):
        return in_double(self.inner.draw(state, generator))

    def unroll(self, weights, state, draws):
        return self.inner.unroll(weights, state, draws)


def as_leaves(weights: Weights) -> Weights:
    """Weights that are differentiated are not worth seconds of recording a step."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def slope(function: Callable[[Weights], Tensor], weights: Weights, direction: Weights, width: float = 1e-5) -> Tensor:
    """Central difference."""
    plus, minus = (
        function({name: value + shift * direction[name] for name, value in weights.items()})
        for shift in (width, -width)
    )
    return (plus - minus) / (2 * width)
