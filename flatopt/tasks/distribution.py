"""Randomised problems on one architecture, many at once: what vectorised meta-training draws from.

A problem is a row of plain tensors.  Nothing about it is stored by example: its training subset, its noisy labels and
its batches are computed from indices, so one gather serves all problems and steps of a truncation.

Legend: ``N`` problems, ``L`` batches, ``B`` examples of a batch, ``K`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._data import Data, Table
from ._optimizee import SPLITS, Batch, Optimizee, Params, Split, accuracy, cross_entropy, mean_squared_error
from .images import Images

LABEL_SEED_BOUND = 2**31


class Problems(NamedTuple):
    """``N`` problems; every tensor has them on its first axis, or none of it for a single problem under ``vmap``."""

    params: Params
    """Initial parameters, ``[N, ...]`` each, as the optimizee holds them (already divided by ``param_scales``)."""
    param_scales: Params
    """What the loss multiplies each parameter by, ``[N, ...]`` each; empty without reparametrisation."""
    source: Tensor
    """Index of the data source, int64 ``[N]``."""
    num_train: Tensor
    """Size of the training subset, int64 ``[N]``."""
    offset: Tensor
    """Where the subset starts in the shuffled training data, int64 ``[N]``."""
    input_scale: Tensor
    """What images are multiplied by, ``[N]``."""
    label_permutation: Tensor
    """Class that replaces each class, int64 ``[N, K]``."""
    label_noise: Tensor
    """Fraction of the training examples with a wrong label, ``[N]``."""
    noise_seed: Tensor
    """Seed of the wrong labels, int64 ``[N]``."""
    batch_size: Tensor
    """Different examples of a training batch, at most, int64 ``[N]``."""


@dataclass(frozen=True, kw_only=True)
class TaskDistribution:
    """A distribution over problems that share one architecture, so that ``vmap`` can run many of them at once.

    Targets that are classes are predicted by logits, with the cross-entropy as loss; targets that are values have the
    mean squared error.

    Args:
        model: the optimizee.
        data: the examples.
        batch_size: examples per batch.
        min_batch_size: a problem has training batches of ``batch_size`` examples or a half, a quarter, ... of them, not
            fewer than this, each repeated, which leaves the mean as it is; ``None`` for ``batch_size`` always.
        num_train_range: bounds of the log-uniform size of the training set (examples or characters), which is a run
            of consecutive examples of the data from a random start.
        input_scale_range: bounds of the log-uniform factor on inputs that are not tokens.
        init_scale_range: bounds of the log-uniform factor on the initial weights, one per problem; leaves alone
            biases, norms and embeddings.
        label_noise_probability: fraction of the problems with wrong labels, where there are classes.
        label_noise_range: bounds of the fraction of their training examples with a wrong label, the same at every
            visit.
        label_permutation: rename the classes at random, where there are any.
        reparametrization_range: bounds of a log-uniform ``c`` per coordinate: the optimizee holds ``params / c`` and
            its loss uses ``c * params``, which changes the units of the parameters and not the function.  It is the
            random scaling of Lv et al., 2017, https://arxiv.org/abs/1703.03633.

    Example:
        >>> from flatopt.tasks import MLP, Images
        >>> digits = Images(sources=(("digits", 1.0),))
        >>> distribution = TaskDistribution(model=MLP(sizes=(64, 32, 10)), data=digits)
        >>> generator = torch.Generator().manual_seed(0)
        >>> problems = distribution.sample_problems(4, generator)
        >>> batches = distribution.sample_batches(problems, 20, "train", generator)
        >>> batches.inputs.shape, batches.targets.shape
        (torch.Size([20, 4, 64, 64]), torch.Size([20, 4, 64]))
        >>> first = Batch(batches.inputs[0], batches.targets[0])
        >>> torch.func.vmap(distribution.loss)(problems, problems.params, first).shape
        torch.Size([4])
    """

    model: Optimizee
    data: Data = Images()
    batch_size: int = 64
    min_batch_size: int | None = None
    num_train_range: tuple[int, int] = (500, 40_000)
    input_scale_range: tuple[float, float] = (0.5, 2.0)
    init_scale_range: tuple[float, float] = (1 / 3, 3.0)
    label_noise_probability: float = 0.125
    label_noise_range: tuple[float, float] = (0.1, 0.2)
    label_permutation: bool = True
    reparametrization_range: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("num_train_range", "input_scale_range", "init_scale_range", "reparametrization_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two increasing positive numbers, not {(low, high)}")
        smallest = self.min_batch_size
        if smallest is not None and not 1 <= smallest <= self.batch_size:
            raise ValueError(f"min_batch_size must be from 1 to batch_size={self.batch_size}, not {smallest}")
        if not 0 <= self.label_noise_probability <= 1:
            raise ValueError(f"label_noise_probability must lie in [0, 1], not {self.label_noise_probability}")
        low, high = self.label_noise_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"label_noise_range must be two increasing numbers in [0, 1], not {(low, high)}")

    def sample_problems(
        self, num_problems: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Problems:
        """Draw ``N`` fresh problems with a CPU generator; what is drawn does not depend on ``device``."""
        sizes, num_classes = self.data.table().sizes[0], self.data.num_classes
        shape = (num_problems,)
        probabilities = torch.tensor(self.data.probabilities)
        source = torch.multinomial(probabilities, num_problems, replacement=True, generator=generator)
        num_train = _log_uniform(shape, self.num_train_range, generator).round().long().minimum(sizes[source])
        input_scale = _log_uniform(shape, self.input_scale_range, generator)
        init_scale = _log_uniform(shape, self.init_scale_range, generator)
        label_noise = self._label_noise(torch.rand(shape, generator=generator))
        # The order of random numbers is a permutation; batched, unlike randperm.
        order = torch.rand(num_problems, num_classes, generator=generator).argsort(-1)
        identity = torch.arange(num_classes).repeat(num_problems, 1)
        offset = torch.randint(LABEL_SEED_BOUND, shape, generator=generator) % sizes[source]
        noise_seed = torch.randint(LABEL_SEED_BOUND, shape, generator=generator)

        drawn = [self.model.init(generator) for _ in range(num_problems)]
        params = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
        for name, value in params.items():
            if value.dim() > 2 and "embedding" not in name:
                value.mul_(init_scale.view(-1, *(1,) * (value.dim() - 1)))
        param_scales: Params = {}
        if self.reparametrization_range != (1.0, 1.0):
            for name, value in params.items():
                param_scales[name] = _log_uniform(value.shape, self.reparametrization_range, generator)
            params = {name: value / param_scales[name] for name, value in params.items()}

        # Drawn last, and only if asked for: what is drawn without does not change.
        batch_size = torch.full(shape, self.batch_size)
        if self.min_batch_size is not None:
            num_sizes = 1 + int(math.log2(self.batch_size / self.min_batch_size))
            batch_size = batch_size >> torch.randint(num_sizes, shape, generator=generator)

        return Problems(
            params={name: value.to(device) for name, value in params.items()},
            param_scales={name: value.to(device) for name, value in param_scales.items()},
            source=source.to(device),
            num_train=num_train.to(device),
            offset=offset.to(device),
            input_scale=input_scale.to(device),
            label_permutation=(order if self.label_permutation else identity).to(device),
            label_noise=label_noise.to(device),
            noise_seed=noise_seed.to(device),
            batch_size=batch_size.to(device),
        )

    def sample_batches(self, problems: Problems, num_batches: int, split: Split, generator: torch.Generator) -> Batch:
        """Draw batches of every problem, with replacement, in one gather.

        Args:
            problems: ``N`` problems, on the device where the batches should be.
            num_batches: ``L``.
            split: subset and label noise apply to ``"train"`` only.
            generator: CPU generator.

        Returns:
            Inputs ``[L, N, B, ...]``, and classes ``[L, N, B]`` (of text: ``[L, N, B, T]``) or values
            ``[L, N, B, ...]``.
        """
        num_problems, num_classes = len(problems.source), self.data.num_classes
        table = self.data.table(problems.source.device)
        drawn = torch.randint(LABEL_SEED_BOUND, (num_batches, num_problems, self.batch_size), generator=generator)
        drawn = drawn.to(problems.source.device)
        if split == "train" and self.min_batch_size is not None:
            different = torch.arange(self.batch_size, device=drawn.device) % problems.batch_size.view(-1, 1)
            drawn = drawn.gather(-1, different.expand_as(drawn))
        rows = self._rows(table, problems, split, drawn)
        inputs, targets = self.data.gather(table, rows)
        if inputs.is_floating_point():
            inputs.mul_(problems.input_scale.view(-1, *(1,) * (inputs.dim() - 2)))
        if num_classes and split == "train" and self.label_noise_probability > 0:
            targets = _with_noise(targets, rows, problems, num_classes)
        if num_classes and self.label_permutation:
            first = torch.arange(0, num_problems * num_classes, num_classes, device=rows.device)
            renamed = targets + first.view(-1, *(1,) * (targets.dim() - 2))
            targets = problems.label_permutation.view(-1).index_select(0, renamed.reshape(-1)).view(targets.shape)
        return Batch(inputs, targets)

    def loss(self, problem: Problems, params: Params, batch: Batch) -> Tensor:
        """Return the 0-D loss of ONE problem, a mean over the batch; call it under ``vmap`` for many."""
        criterion = cross_entropy if self.data.num_classes else mean_squared_error
        return criterion(self.predict(problem, params, batch.inputs), batch.targets)

    def error(self, problem: Problems, params: Params, batch: Batch) -> Tensor:
        """Return the 0-D fraction of wrong classes, or mean squared error, of ONE problem."""
        if not self.data.num_classes:
            return self.loss(problem, params, batch)
        return 1 - accuracy(self.predict(problem, params, batch.inputs), batch.targets)

    def predict(self, problem: Problems, params: Params, inputs: Tensor) -> Tensor:
        """Return the logits or values of ONE problem, with its parameters as the optimizee holds them."""
        if problem.param_scales:
            params = {name: value * problem.param_scales[name] for name, value in params.items()}
        return self.model.predict(params, inputs)

    def _label_noise(self, draw: Tensor) -> Tensor:
        """Return the fraction of wrong labels: one uniform number says whether there are any, and how many."""
        low, high = self.label_noise_range
        position = draw / max(self.label_noise_probability, 1e-12)  # uniform in [0, 1) where there are any
        return torch.where(draw < self.label_noise_probability, low + (high - low) * position, 0.0)

    def _rows(self, table: Table, problems: Problems, split: Split, drawn: Tensor) -> Tensor:
        """Turn large random integers ``[L, N, B]`` into row numbers of the table."""
        index = SPLITS.index(split)
        sizes = table.sizes[index][problems.source].view(-1, 1)
        starts = table.starts[index][problems.source].view(-1, 1)
        if split != "train":
            return drawn.remainder_(sizes).add_(starts)
        inside = drawn.remainder_(problems.num_train.view(-1, 1)).add_(problems.offset.view(-1, 1))
        return inside.remainder_(sizes).add_(starts)


def _with_noise(targets: Tensor, rows: Tensor, problems: Problems, num_classes: int) -> Tensor:
    """Replace some targets by another class, decided by a hash of where they stand and the problem's seed."""
    if targets.dim() > rows.dim():  # a window of text: the target of its first character stands in the next row
        rows = rows.unsqueeze(-1) + torch.arange(1, targets.shape[-1] + 1, device=rows.device)
    shape = (-1, *(1,) * (targets.dim() - 2))
    bits = _hash(rows + problems.noise_seed.view(shape))
    wrong = (bits >> 8) * 2.0**-24 < problems.label_noise.view(shape)
    shift = 1 + ((bits & 255) * (num_classes - 1) >> 8)
    return torch.where(wrong, (targets + shift) % num_classes, targets)


def _hash(values: Tensor) -> Tensor:
    """Mix int64 values into 32 uniform bits: the finaliser of MurmurHash3 (Appleby, 2011)."""
    low = 0xFFFFFFFF
    bits = (values * 0x9E3779B1) & low
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & low
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & low
    return bits ^ (bits >> 16)


def _log_uniform(shape: Sequence[int], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw values whose logarithm is uniform between those of the bounds."""
    low, high = math.log(bounds[0]), math.log(bounds[1])
    return torch.rand(*shape, generator=generator).mul_(high - low).add_(low).exp_()
