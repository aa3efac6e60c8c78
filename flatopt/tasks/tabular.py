"""Generated tables: many small data sets for classification or regression, each a source of its own.

Legend: ``R`` rows, ``F`` features, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._data import Data, Table, stack_splits
from ._optimizee import Batch

NUM_HELD_OUT = 1000
"""Rows of the splits ``meta`` and ``test``, each."""


@dataclass(frozen=True, kw_only=True)
class Tabular(Data):
    """Data sets with standardised features of several kinds, some of them irrelevant.

    Classes come from a random network, sampled at a random temperature, or are mixtures of Gaussian clusters; they
    overlap in all splits.  Values come from a random network, a sum of functions of one or two features, or a quotient
    of products; they are standardised, and only those of ``train`` have noise.

    Args:
        num_features: ``F``; of these 3 to all but one decide the target.
        num_classes: ``C``, or 0 for regression.
        num_sets: number of data sets.
        num_train: rows of the training split of each.
        noise_range: bounds of the noise of values, in standard deviations; log-uniform.
        seed: seed of everything.

    Example:
        >>> data = Tabular(num_features=8, num_classes=3, num_sets=2, num_train=500)
        >>> batch = data.gather(data.table(), torch.arange(500))
        >>> batch.inputs.shape, batch.targets.unique()
        (torch.Size([500, 8]), tensor([0, 1, 2]))
    """

    num_features: int
    num_classes: int = 0
    num_sets: int = 64
    num_train: int = 5000
    noise_range: tuple[float, float] = (0.1, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_features < 4:
            raise ValueError(f"num_features must be at least 4, not {self.num_features}")
        if self.num_classes == 1:
            raise ValueError("num_classes must be 0 or at least 2, not 1")

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Equal ones."""
        return (1 / self.num_sets,) * self.num_sets

    def build(self) -> Table:
        """Return features ``[rows, F]`` and classes ``[rows]`` or values ``[rows, 1]``."""
        generator = torch.Generator().manual_seed(self.seed)
        make = self._classification if self.num_classes else self._regression
        sets = [make(generator) for _ in range(self.num_sets)]
        sizes = (self.num_train, NUM_HELD_OUT, NUM_HELD_OUT)
        parts = [zip(inputs.split(sizes), targets.split(sizes), strict=True) for inputs, targets in sets]
        return stack_splits([Batch(*part) for split in zip(*parts, strict=True) for part in split], self.num_sets)

    def _classification(self, generator: torch.Generator) -> Batch:
        num_rows, num_classes = self.num_train + 2 * NUM_HELD_OUT, self.num_classes
        num_relevant = _integer(3, self.num_features - 1, generator)
        if _uniform(0, 1, generator) < 0.5:
            relevant = _features(num_rows, num_relevant, generator)
            logits = _teacher(relevant, num_classes, generator) + 0.5 * torch.randn(num_classes, generator=generator)
            temperature = math.exp(_uniform(math.log(0.03), math.log(0.6), generator))
            gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log()
            targets = (logits + temperature * gumbel).argmax(-1)
        else:
            num_clusters = num_classes * _integer(1, 3, generator)
            weights = torch.rand(num_clusters, generator=generator) + 0.2
            cluster = torch.multinomial(weights, num_rows, replacement=True, generator=generator)
            # Centres of neighbours are sqrt(2) * spread apart in each direction, whatever the number of features.
            spread = _uniform(2, 5, generator) / math.sqrt(num_relevant)
            centres = spread * torch.randn(num_clusters, num_relevant, generator=generator)
            relevant = centres[cluster] + torch.randn(num_rows, num_relevant, generator=generator)
            targets = cluster % num_classes
        return Batch(self._with_irrelevant(relevant, generator), targets)

    def _regression(self, generator: torch.Generator) -> Batch:
        num_rows = self.num_train + 2 * NUM_HELD_OUT
        relevant = _features(num_rows, _integer(3, self.num_features - 1, generator), generator)
        function = FUNCTIONS[_integer(0, len(FUNCTIONS) - 1, generator)]
        values = function(relevant, generator)
        values = (values - values.mean()) / values.std()
        low, high = map(math.log, self.noise_range)
        noise_scale = math.exp(_uniform(low, high, generator))
        noise = noise_scale * torch.randn(self.num_train, generator=generator)
        values[: self.num_train] += noise
        # As users do: by what the training split shows, noise included.
        train = values[: self.num_train]
        values = (values - train.mean()) / train.std()
        return Batch(self._with_irrelevant(relevant, generator), values.unsqueeze(-1))

    def _with_irrelevant(self, relevant: Tensor, generator: torch.Generator) -> Tensor:
        """Return standardised features ``[R, F]`` in random order, the others of them drawn like the relevant ones."""
        num_rows, num_relevant = relevant.shape
        others = _features(num_rows, self.num_features - num_relevant, generator)
        features = torch.cat([relevant, others], -1)[:, torch.randperm(self.num_features, generator=generator)]
        train = features[: self.num_train]
        return ((features - train.mean(0)) / train.std(0)).clamp(-8, 8)


def _features(num_rows: int, num_features: int, generator: torch.Generator) -> Tensor:
    """Draw features ``[R, F]`` of unit scale: correlated normal ones, some of them made uniform, binary or skewed."""
    values = torch.randn(num_rows, num_features, generator=generator)
    mixing = torch.randn(num_features, num_features, generator=generator) / math.sqrt(num_features)
    values = values + _uniform(0, 1, generator) * values @ mixing
    values = values / values.std(0)
    kind = torch.rand(num_features, generator=generator)
    uniform = math.sqrt(3) * torch.erf(values / math.sqrt(2))
    skewed = (torch.exp(0.8 * values) - math.exp(0.32)) / 1.3
    return torch.where(
        kind < 0.15, values.sign(), torch.where(kind < 0.4, uniform, torch.where(kind < 0.5, skewed, values))
    )


def _teacher(features: Tensor, num_outputs: int, generator: torch.Generator) -> Tensor:
    """Return the outputs ``[R, num_outputs]``, of unit scale, of a random network with one or two tanh layers."""
    hidden = features
    gain = _uniform(0.7, 2, generator)
    for width in [_integer(4, 32, generator) for _ in range(_integer(1, 2, generator))]:
        matrix = torch.randn(hidden.shape[-1], width, generator=generator) / math.sqrt(hidden.shape[-1])
        hidden = torch.tanh(gain * hidden @ matrix + 0.5 * torch.randn(width, generator=generator))
    outputs = hidden @ torch.randn(hidden.shape[-1], num_outputs, generator=generator)
    return (outputs - outputs.mean(0)) / outputs.std()


def _sum_of_terms(features: Tensor, generator: torch.Generator) -> Tensor:
    """Return the sum ``[R]`` of a random function of each feature and of some products of two."""
    terms = torch.stack([features, features.square(), features.abs(), torch.sin(2 * features), features.relu()])
    chosen = torch.randint(len(terms), (features.shape[-1],), generator=generator)
    each = terms[chosen, :, torch.arange(features.shape[-1])].T
    products = features * features.roll(1, -1)
    weights = torch.randn(2, features.shape[-1], generator=generator)
    few = torch.rand(features.shape[-1], generator=generator) < 0.3
    return each @ weights[0] + products @ (weights[1] * few)


def _quotient(features: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``sqrt(a^2 + (b c - 1 / (b d))^2)``, ``[R]``, of positive sums of features: Friedman's second problem."""
    directions = torch.randn(features.shape[-1], 4, generator=generator) / math.sqrt(features.shape[-1])
    first, second, third, fourth = (0.2 + torch.sigmoid(2 * features @ directions)).unbind(-1)
    return torch.sqrt(first.square() + (second * third - 0.3 / (second * fourth)).square())


FUNCTIONS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    lambda features, generator: _teacher(features, 1, generator)[:, 0],
    _sum_of_terms,
    _quotient,
)
"""What makes the values of a regression of its features ``[R, F]``."""


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Draw one of ``low, ..., high``."""
    return int(torch.randint(low, high + 1, (), generator=generator))
