"""Randomised problems on one architecture, many at once: what vectorised meta-training draws from.

A problem is a row of plain tensors.  Nothing about it is stored by example: its training subset, its noisy labels and
its batches are computed from indices, so one gather serves all problems and steps of a truncation.

Legend: ``N`` problems, ``L`` batches, ``B`` examples of a batch, ``K`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._layers import check_choice
from ._task import SPLITS, Batch, Optimizee, Params, Split, accuracy, cross_entropy
from .images import DATASETS, load_images
from .text import VOCAB_SIZE, load_text
from .transformer import Transformer

LABEL_SEED_BOUND = 2**31


class Problems(NamedTuple):
    """``N`` problems; every tensor has them on its first axis, or none of it for a single problem under ``vmap``."""

    params: Params
    """Initial parameters, ``[N, ...]`` each, as the optimizee holds them (already divided by ``param_scales``)."""
    param_scales: Params
    """What the loss multiplies each parameter by, ``[N]`` each, or ``[N, ...]`` for a factor per coordinate; empty
    without reparametrisation."""
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


@dataclass(frozen=True, kw_only=True)
class TaskDistribution:
    """A distribution over problems that share one architecture, so that ``vmap`` can run many of them at once.

    Args:
        model: the optimizee.
        sources: pairs of data source and probability.  Sources are ``"digits"`` and ``"fashion-mnist"``, in any mix,
            or ``"text"`` alone, which needs a :class:`Transformer`.
        size: height and width of the images.
        batch_size: examples per batch.
        num_train_range: bounds of the log-uniform size of the training subset (images or characters), which is a run
            of consecutive examples of the shuffled data from a random start (of the unshuffled text).
        input_scale_range: bounds of the log-uniform factor on images.
        init_scale_range: bounds of the log-uniform factor on the initial weights, one per problem; leaves alone
            biases, norms and embeddings.
        label_noise_probability: fraction of the problems with wrong labels.
        label_noise: in those, fraction of the training examples with a wrong label, the same at every visit.
        label_permutation: rename the classes at random.
        reparametrization_range: bounds of a log-uniform ``c`` per tensor: the optimizee holds ``params / c`` and its
            loss uses ``c * params``, which changes the units of the parameters and not the function.
        reparametrization: a ``c`` for each ``"tensor"``, or for each ``"coordinate"``: the random scaling of Lv et al.,
            2017, https://arxiv.org/abs/1703.03633.
        standardize: see :func:`load_images`.
        root: see :func:`load_images`.

    Example:
        >>> from flatopt.tasks import MLP
        >>> distribution = TaskDistribution(model=MLP(sizes=(64, 32, 10)), sources=(("digits", 1.0),))
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
    sources: tuple[tuple[str, float], ...] = (("fashion-mnist", 0.75), ("digits", 0.25))
    size: int = 8
    batch_size: int = 64
    num_train_range: tuple[int, int] = (500, 40_000)
    input_scale_range: tuple[float, float] = (0.5, 2.0)
    init_scale_range: tuple[float, float] = (1 / 3, 3.0)
    label_noise_probability: float = 0.125
    label_noise: float = 0.1
    label_permutation: bool = True
    reparametrization_range: tuple[float, float] = (1.0, 1.0)
    reparametrization: Literal["tensor", "coordinate"] = "tensor"
    standardize: bool = False
    root: str | None = None

    def __post_init__(self) -> None:
        for name, _ in self.sources:
            check_choice("source", name, (*DATASETS, "text"))
        if self.is_text and (len(self.sources) > 1 or not isinstance(self.model, Transformer)):
            raise ValueError("the source 'text' goes alone and needs a Transformer")
        check_choice("reparametrization", self.reparametrization, ("tensor", "coordinate"))
        for name in ("num_train_range", "input_scale_range", "init_scale_range", "reparametrization_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two increasing positive numbers, not {(low, high)}")
        for name in ("label_noise_probability", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")

    @property
    def is_text(self) -> bool:
        """Whether the data are sequences of tokens."""
        return any(name == "text" for name, _ in self.sources)

    @property
    def num_classes(self) -> int:
        """Number of classes, ``K``."""
        return VOCAB_SIZE if self.is_text else 10

    def sample_problems(
        self, num_problems: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Problems:
        """Draw fresh problems.

        Args:
            num_problems: ``N``.
            generator: CPU generator; what is drawn does not depend on ``device``.
            device: where the tensors go.
        """
        sizes = self._table("cpu").sizes[0]
        shape = (num_problems,)
        probabilities = torch.tensor([probability for _, probability in self.sources])
        source = torch.multinomial(probabilities, num_problems, replacement=True, generator=generator)
        num_train = _log_uniform(shape, self.num_train_range, generator).round().long().minimum(sizes[source])
        input_scale = _log_uniform(shape, self.input_scale_range, generator)
        init_scale = _log_uniform(shape, self.init_scale_range, generator)
        noisy = torch.rand(shape, generator=generator) < self.label_noise_probability
        # The order of random numbers is a permutation; batched, unlike randperm.
        order = torch.rand(num_problems, self.num_classes, generator=generator).argsort(-1)
        identity = torch.arange(self.num_classes).repeat(num_problems, 1)
        offset = torch.randint(LABEL_SEED_BOUND, shape, generator=generator) % sizes[source]
        noise_seed = torch.randint(LABEL_SEED_BOUND, shape, generator=generator)

        drawn = [self.model.init(generator) for _ in range(num_problems)]
        params = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
        for name, value in params.items():
            if value.dim() > 2 and "embedding" not in name:
                value.mul_(_like_rows(init_scale, value))
        param_scales: Params = {}
        if self.reparametrization_range != (1.0, 1.0):
            param_scales = {
                name: _log_uniform(
                    shape if self.reparametrization == "tensor" else value.shape,
                    self.reparametrization_range,
                    generator,
                )
                for name, value in params.items()
            }
            params = {name: value / _like_rows(param_scales[name], value) for name, value in params.items()}

        return Problems(
            params={name: value.to(device) for name, value in params.items()},
            param_scales={name: value.to(device) for name, value in param_scales.items()},
            source=source.to(device),
            num_train=num_train.to(device),
            offset=offset.to(device),
            input_scale=input_scale.to(device),
            label_permutation=(order if self.label_permutation else identity).to(device),
            label_noise=(self.label_noise * noisy).to(device),
            noise_seed=noise_seed.to(device),
        )

    def sample_batches(self, problems: Problems, num_batches: int, split: Split, generator: torch.Generator) -> Batch:
        """Draw batches of every problem, with replacement, in one gather.

        Args:
            problems: ``N`` problems, on the device where the batches should be.
            num_batches: ``L``.
            split: subset and label noise apply to ``"train"`` only.
            generator: CPU generator.

        Returns:
            Images ``[L, N, B, size * size]`` and classes ``[L, N, B]``, or tokens ``[L, N, B, T]`` twice.
        """
        num_problems = len(problems.source)
        table = self._table(str(problems.source.device))
        drawn = torch.randint(LABEL_SEED_BOUND, (num_batches, num_problems, self.batch_size), generator=generator)
        rows = self._rows(table, problems, split, drawn.to(problems.source.device))
        if self.is_text:
            windows = table.inputs.unfold(0, table.width, 1)[rows].long()
            inputs, targets = windows[..., :-1], windows[..., 1:]
            examples = rows.unsqueeze(-1) + torch.arange(1, table.width, device=rows.device)
        else:
            inputs = table.inputs.index_select(0, rows.view(-1)).view(*rows.shape, -1)
            inputs.mul_(problems.input_scale.view(-1, 1, 1))
            targets = table.targets.index_select(0, rows.view(-1)).view_as(rows)
            examples = rows
        if split == "train" and self.label_noise_probability > 0:
            targets = _with_noise(targets, examples, problems, self.num_classes)
        if self.label_permutation:
            first = torch.arange(0, num_problems * self.num_classes, self.num_classes, device=rows.device)
            renamed = targets + first.view(-1, *(1,) * (targets.dim() - 2))
            targets = problems.label_permutation.view(-1).index_select(0, renamed.reshape(-1)).view(targets.shape)
        return Batch(inputs, targets)

    def loss(self, problem: Problems, params: Params, batch: Batch) -> Tensor:
        """Return the 0-D mean cross-entropy of ONE problem; call it under ``vmap`` for many."""
        return cross_entropy(self.predict(problem, params, batch.inputs), batch.targets)

    def accuracy(self, problem: Problems, params: Params, batch: Batch) -> Tensor:
        """Return the 0-D fraction of right predictions of ONE problem; call it under ``vmap`` for many."""
        return accuracy(self.predict(problem, params, batch.inputs), batch.targets)

    def predict(self, problem: Problems, params: Params, inputs: Tensor) -> Tensor:
        """Return the logits of ONE problem, with its parameters as the optimizee holds them."""
        if problem.param_scales:
            params = {name: value * problem.param_scales[name] for name, value in params.items()}
        return self.model.predict(params, inputs)

    def _table(self, device: str) -> _Table:
        names = tuple(name for name, _ in self.sources)
        if isinstance(self.model, Transformer) and self.is_text:
            return _text_table(self.model.context_length, device)
        return _image_table(names, self.size, self.root, self.standardize, device)

    def _rows(self, table: _Table, problems: Problems, split: Split, drawn: Tensor) -> Tensor:
        """Turn large random integers ``[L, N, B]`` into row numbers of the table."""
        index = SPLITS.index(split)
        sizes = table.sizes[index][problems.source].view(-1, 1)
        starts = table.starts[index][problems.source].view(-1, 1)
        if split != "train":
            return drawn.remainder_(sizes).add_(starts)
        inside = drawn.remainder_(problems.num_train.view(-1, 1)).add_(problems.offset.view(-1, 1))
        return inside.remainder_(sizes).add_(starts)


class _Table(NamedTuple):
    """All splits of all sources, one after another."""

    inputs: Tensor
    """Images ``[rows, size * size]``, or uint8 tokens ``[rows]``."""
    targets: Tensor
    """Classes ``[rows]``; nothing for text."""
    starts: Tensor
    """First row of each split and source, ``[splits, sources]``."""
    sizes: Tensor
    """Number of examples of each split and source, ``[splits, sources]``."""
    width: int
    """Rows that one example takes."""


@lru_cache(maxsize=8)
def _image_table(names: tuple[str, ...], size: int, root: str | None, standardize: bool, device: str) -> _Table:
    generator = torch.Generator().manual_seed(0)
    splits: Sequence[Batch] = [
        getattr(load_images(name, size, root, standardize=standardize), split) for split in SPLITS for name in names
    ]
    # Shuffled once, so that consecutive rows are a random subset.
    orders = [torch.randperm(len(split.targets), generator=generator) for split in splits]
    inputs = torch.cat([split.inputs.flatten(1)[order] for split, order in zip(splits, orders, strict=True)])
    targets = torch.cat([split.targets[order] for split, order in zip(splits, orders, strict=True)])
    sizes = torch.tensor([len(order) for order in orders])
    starts = (sizes.cumsum(0) - sizes).view(len(SPLITS), -1)
    sizes = sizes.view(len(SPLITS), -1)
    return _Table(inputs.to(device), targets.to(device), starts.to(device), sizes.to(device), 1)


@lru_cache(maxsize=4)
def _text_table(context_length: int, device: str) -> _Table:
    splits = load_text()
    lengths = torch.tensor([len(split) for split in splits]).view(-1, 1)
    tokens = torch.cat(splits).to(torch.uint8)
    starts = lengths.cumsum(0) - lengths
    sizes = lengths - context_length
    nothing = torch.empty(0, dtype=torch.int64)
    return _Table(tokens.to(device), nothing.to(device), starts.to(device), sizes.to(device), context_length + 1)


def _with_noise(targets: Tensor, examples: Tensor, problems: Problems, num_classes: int) -> Tensor:
    """Replace some targets by another class, decided by a hash of the example and the problem's seed."""
    shape = (-1, *(1,) * (targets.dim() - 2))
    bits = _hash(examples + problems.noise_seed.view(shape))
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


def _like_rows(scale: Tensor, value: Tensor) -> Tensor:
    """View ``[N]`` so that it multiplies the rows of ``[N, ...]``; what has that shape already stays."""
    return scale if scale.shape == value.shape else scale.view(-1, *(1,) * (value.dim() - 1))
