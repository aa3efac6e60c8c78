"""The contract of a learned update rule.

A learned optimizer is a pure :class:`UpdateRule` plus a dict of weights.  A rule works in phases, so that whole-tensor
statistics cost one small reduction per step and large tensors can be cut in pieces:

1. ``observe``  coordinates: advance their accumulators, return a list of terms whose *sums* over a tensor describe it;
2. ``mix``      tensors: turn the sums of each tensor into a few control numbers;
3. ``propose``  coordinates: turn accumulators and control numbers into a step.

``l2o-dm`` needs no more than ``propose``, ``adam`` and ``rnnprop`` no more than ``observe`` and ``propose``.  A rule
may add

- ``prepare``, before them all: what is remembered of the earlier steps, as a few numbers per tensor;
- ``strip_rows``, ``matrix`` and ``couple``, for a rule that treats matrices as matrices: after ``observe``,
  ``matrix`` says what is cut into *strips* of so many rows (:mod:`flatopt.rules._strips`).  Their Gram matrices are
  sums over the longer axis, and ``couple`` turns those into the matrices that mix the rows of each strip.

:func:`flatopt.rules.apply_rule` drives them.  The optimizer, the meta-trainer and the benchmarks all call it.

Shape legend: ``N`` tensors, ``S`` sums per tensor, ``M`` memory per tensor, ``C`` controls per tensor, ``G`` numbers
per tensor given to ``observe``, ``K`` strips of many tensors, ``s`` rows of the largest of them, ``n`` coordinates of
one call: a tensor, a part of a large one, or several small ones side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ._average import PolynomialAverage

Weights = dict[str, Tensor]
"""Meta-parameters of a rule by name: what is learned and shipped."""

State = dict[str, Tensor]
"""Accumulators of one parameter by name, or the state that all parameters share."""


Terms = Sequence[Tensor | tuple[Tensor, Tensor] | None]
"""What is summed over the coordinates of a tensor; ``None`` stands for zeros."""


class StepContext(NamedTuple):
    """Where in the run a step is taken; 0-D float tensors, so that vmap can batch them and nothing recompiles."""

    step: Tensor
    """Number of this step, 1 at the first."""
    num_steps: Tensor
    """Length of the run, ``inf`` when unknown."""


class TensorFacts(NamedTuple):
    """What the coordinates of a call are told of their tensors; a last axis of 1 or ``n``, for broadcasting."""

    step: Tensor
    """Number of this step for the tensor: it may have joined late."""
    given: Tensor
    """What ``prepare`` returned, ``[G, ...]``."""
    coupled: Tensor
    """What ``couple`` made of ``matrix``, ``[n]``; zero for vectors; empty in ``observe``, and without strips."""


class TensorShape(NamedTuple):
    """The whole tensor as a rule sees it, also where this process holds only a shard of it."""

    num_outputs: int
    """Length of the first axis; of a vector, all of it."""
    num_inputs: int
    """Coordinates per output (fan-in); 1 for a vector."""

    @classmethod
    def of(cls, shape: Sequence[int], *, is_complex: bool = False) -> TensorShape:
        """Return what a parameter's shape means; a complex number counts as two inputs.

        A tensor with fewer than two axes longer than 1 is a vector; so is one whose first axis has length 1, and an
        empty one.

        Example:
            >>> TensorShape.of((16, 8, 3, 3)), TensorShape.of((5,)), TensorShape.of((5, 1)).is_matrix
            (TensorShape(num_outputs=16, num_inputs=72), TensorShape(num_outputs=5, num_inputs=1), False)
        """
        numbers = 1 + is_complex
        if sum(length > 1 for length in shape) < 2 or shape[0] == 1 or 0 in shape:
            return cls(math.prod(shape) * numbers, 1)
        return cls(shape[0], math.prod(shape[1:]) * numbers)

    @property
    def numel(self) -> int:
        """Real coordinates."""
        return self.num_outputs * self.num_inputs

    @property
    def is_matrix(self) -> bool:
        """Whether there is more than one input and output."""
        return self.num_inputs > 1


ROW_BLOCK = 16
"""Large strips have a multiple of so many rows, for which products of matrices are fastest."""


class StripRows(NamedTuple):
    """How many rows the strips of a rule have."""

    usual: int
    """A matrix of up to so many rows is not cut."""
    most: int
    """One of up to so many is halved.  A larger one has up to ``number`` strips of ``usual`` rows, and one that is
    too large for these 2, 4, 8, ... strips of up to so many: shards on as many devices seldom cut through a strip."""
    number: int
    """Between the two, where the strips of a half would be dear on a CPU: most strips of ``usual`` rows."""

    def of(self, short: int) -> int:
        """Return the rows of the strips of a matrix whose shorter axis is ``short``; the last may have fewer.

        More than ``usual`` are rounded up to a multiple of ``ROW_BLOCK``.

        Example:
            >>> rows = StripRows(usual=80, most=256, number=4)
            >>> [rows.of(short) for short in (20, 64, 100, 256, 320, 384, 768, 1024)]
            [20, 64, 50, 128, 80, 192, 192, 256]
        """
        number = -(-short // self.usual)
        if number > 1 and (short <= self.most or number > self.number):
            number = 2
            while short > number * self.most:
                number *= 2
        rows = -(-short // number)
        return rows if rows <= self.usual else min(-(-rows // ROW_BLOCK) * ROW_BLOCK, short)


def size_class(rows: int) -> int:
    """Return a number that strips of about one size share: those of up to 32 rows, of up to 64, 128 and so on."""
    return ((rows - 1) // 32).bit_length()


@dataclass(frozen=True, kw_only=True)
class UpdateRule(ABC):
    """A pure update rule: fields are static hyper-parameters, tensors are arguments.

    Rules are out of place, draw no random numbers outside ``init_*``, and branch on shapes only, never on
    values, so that ``torch.func.vmap`` and ``torch.compile`` accept them.  ``observe``, ``matrix`` and
    ``propose`` act on each coordinate by itself, and return no tensor of ``state``: that may be overwritten at once.

    A rule never sees the learning rate, weight decay or the sign of ``maximize``: those belong to the caller.
    """

    name: ClassVar[str]
    """Identifier in ``config.json`` and on the command line."""

    memory: ClassVar[tuple[str, ...]] = ()
    """Keys of the state that exist once per tensor, besides ``step``, which the driver advances: scalars or vectors,
    side by side the ``M`` numbers that ``mix`` returns anew.  Every other value has shape ``(*param.shape, ...)``."""

    average: ClassVar[PolynomialAverage | None] = None
    """Average of the parameters that a run of known length ends on, and that ``FlatOpt.eval`` shows; ``None`` for a
    rule whose runs end with the last parameters."""

    compressible_state: ClassVar[frozenset[str]] = frozenset()
    """Keys of the per-coordinate state that may be *kept* in ``bfloat16``; all is computed in ``float32`` at least.

    For the state of networks, most of which is replaced in each step, not for averages that advance by little."""

    vector_state: ClassVar[frozenset[str]] = frozenset()
    """Keys of the per-coordinate state that matrices do without; they are not in the ``state`` of their coordinates."""

    @property
    def strip_rows(self) -> StripRows | None:
        """How matrices are cut; ``None`` for a rule without ``matrix`` and ``couple``."""
        return None

    def unkept(self, shape: TensorShape) -> frozenset[str]:
        """Return the keys that a tensor does without; a rule without strips treats all as vectors."""
        return self.vector_state if self.strip_rows is not None and shape.is_matrix else frozenset()

    @abstractmethod
    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return fresh float32 weights on the CPU; a rule without learned weights returns an empty dict."""

    @abstractmethod
    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return the state of one parameter before its first step, ``vector_state`` included.

        The driver counts steps in ``state["step"]``; every rule starts it at zero.

        Args:
            weights: the rule's weights (some rules start from learned vectors).
            param: the whole parameter, any shape, real floating dtype; defines device and dtype.
            generator: source of the random initial values of the rules that have any.
        """

    def fresh_state(
        self,
        weights: Weights,
        param: Tensor,
        generator: torch.Generator | None = None,
        *,
        shape: TensorShape | None = None,
    ) -> State:
        """Return what is kept of :meth:`init_state`; ``shape`` is that of ``param`` by default."""
        unkept = self.unkept(shape or TensorShape.of(param.shape))
        return {key: value for key, value in self.init_state(weights, param, generator).items() if key not in unkept}

    def init_shared(self, weights: Weights) -> State:
        """Return the state that all parameters of one model share, before the first step; usually empty."""
        return {}

    def prepare(
        self, weights: Weights, steps_N: Tensor, memory_NM: Tensor, shared: State, context: StepContext
    ) -> Tensor:
        """Return ``[N, G]`` numbers for ``observe`` and ``propose``, before this step's gradients are looked at.

        Called once per step, before every ``observe``, with the step counters ``[N]`` (1 at the first step) and the
        memory of all tensors that take this step; ``G`` is 0 by default.
        """
        return memory_NM.new_zeros(memory_NM.shape[0], 0)

    def observe(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, facts: TensorFacts, context: StepContext
    ) -> tuple[State, Terms]:
        """Advance the accumulators of some coordinates by one gradient; by default there are none.

        Args:
            weights: the rule's weights.
            state: per-coordinate values ``[n, ...]``.
            grad: gradient, ``[n]``.
            param: parameter, ``[n]``.
            facts: of the tensors that the coordinates belong to.
            context: where in the run the step is taken.

        Returns:
            The per-coordinate state that changes, and terms that the caller sums over each tensor: each ``[n]``, or
            ``[k, n]`` for ``k`` of the ``S`` sums, or two ``[n]`` that stand for their product, which then need not be
            formed, or ``None`` for zeros; the list may be empty.
        """
        return {}, []

    def matrix(self, weights: Weights, state: State, grad: Tensor, facts: TensorFacts) -> Tensor:
        """Return ``[n]``, of which the strips are made.  Called twice after ``observe``, for matrices only."""
        raise NotImplementedError

    def couple(self, weights: Weights, grams_Kss: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what each strip is multiplied by, from its Gram matrix.

        Called in each step of a rule with ``strip_rows``, for all strips of about one size together: of up to 32 rows,
        64, 128 and so on.  Where there are only vectors, ``K`` is 0.

        Args:
            weights: the rule's weights.
            grams_Kss: products of each strip with its transpose, zero beyond a strip of fewer than ``s`` rows.

        Returns:
            ``[K, s, s]``, and terms ``[K]`` that are summed over the strips of each tensor and follow those of
            ``observe`` in the sums that ``mix`` sees.
        """
        raise NotImplementedError

    def mix(
        self,
        weights: Weights,
        summaries_NS: Tensor,
        memory_NM: Tensor,
        shared: State,
        context: StepContext,
        *,
        shapes: Sequence[TensorShape],
    ) -> tuple[Tensor, Tensor, State]:
        """Combine the sums of all tensors of a model.  Called once per step, after every ``observe``.

        Returns:
            ``[N, C]`` controls (``C`` may be 0), the new ``[N, M]`` memory and the new shared state.
        """
        return summaries_NS.new_zeros(summaries_NS.shape[0], 0), memory_NM, shared

    @abstractmethod
    def propose(
        self,
        weights: Weights,
        state: State,
        grad: Tensor,
        param: Tensor,
        control: Tensor,
        facts: TensorFacts,
        context: StepContext,
    ) -> tuple[State, Tensor]:
        """Return the per-coordinate state that changes now, and the step ``[n]`` to *add*.

        ``state`` is what ``observe`` left; ``control`` is what ``mix`` returned, as ``[C, 1]`` or
        ``[C, n]``.
        """

    @abstractmethod
    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return ``[N]`` scales of the step per coordinate: what AdamW calls ``lr``, for decoupled weight decay."""
