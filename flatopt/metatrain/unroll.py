"""Inner training as a pure function, for many runs at once.

A *run* is one optimizee being trained by a rule.  The runs of a family share one architecture and go side by side,
under ``vmap``.  One step of all of them is recorded as a flat graph of tensor operations, and compiled if asked for.
Legend: ``N`` runs, ``L`` steps of a truncation.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..flatness import FlatnessMeasure, LossFn
from ..rules import Plan, State, StepContext, UpdateRule, Weights, apply_rule, batched_phases
from ..tasks import Batch, Params, Problems, Split, TaskDistribution
from .config import FlatnessConfig, ObjectiveConfig, TaskConfig
from .objective import clip_loss, penalty, schedule_mask, step_weight, transform_loss

PACK_SIZE = 256
"""Tensors up to this size are handled side by side: fewer kernels to compile, and small ones cost no more."""

MAX_DRAWN = 50
"""Steps whose batches are held at a time: those of a truncation as long as a whole run would take gigabytes."""

Mode = Literal["plain", "recorded", "compiled"]
"""How a step is executed."""


class Runs(NamedTuple):
    """``N`` inner runs; every tensor has them on its first axis."""

    problem: Problems
    """What is trained on; its initial parameters have been moved to ``params``."""
    params: dict[str, Tensor]
    states: dict[str, State]
    shared: State
    step: Tensor
    """Steps taken, ``[N]``."""
    horizon: Tensor
    """Steps to take, ``[N]``."""
    num_steps: Tensor
    """What the rule is told of the horizon: the same, or ``inf``, ``[N]``."""
    initial_loss: Tensor
    """Loss before the first step, on its batch, ``[N]``; 0 until then."""


class Draws(NamedTuple):
    """All randomness of one truncation of ``P`` problems."""

    train: Batch
    """What is trained on, ``[L, P, ...]``."""
    meta: Batch
    """What the runs are judged on, ``[L, P, ...]``."""
    noise: dict[str, Tensor]
    """Noise of the flatness term, ``[L, perturbations, P, ...]`` by parameter; empty without one."""
    inner_noise: dict[str, Tensor]
    """The same for the flatness term of the inner loss."""


_Inputs = tuple[Batch, Batch, dict[str, Tensor], dict[str, Tensor]]
"""Batches to train on and to judge by, noise of both flatness terms: what :meth:`Unroll.step` takes last."""


class StepLosses(NamedTuple):
    """What one step tells about the runs, ``[N]`` each."""

    objective: Tensor
    train: Tensor
    """Loss before the step, without the flatness term of the inner loss."""
    meta: Tensor
    flatness: Tensor
    """The measure, 0 where its schedule is off."""


@dataclass(frozen=True, kw_only=True)
class Unroll:
    """Truncated inner training on one family of problems.

    Args:
        rule: the rule being learned.
        distribution: where problems come from.
        task: horizons, and how often the rule is told them.
        objective: what the runs are judged by.
        truncation_length: steps per truncation; horizons are multiples of it.
        device: where the runs live.
        mode: how a step is executed where nothing is differentiated: ``"plain"``, under ``vmap``; ``"recorded"`` once
            and run as a flat graph; or ``"compiled"``, that graph through ``torch.compile``.
        second_derivatives: differentiate with respect to the weights through the inner gradients too.
    """

    rule: UpdateRule
    distribution: TaskDistribution
    task: TaskConfig
    objective: ObjectiveConfig
    truncation_length: int
    device: torch.device
    mode: Mode = "recorded"
    second_derivatives: bool = False

    def start(
        self,
        weights_N: Weights,
        num_pairs: int,
        copies: int,
        generator: torch.Generator,
        num_steps: int | None = None,
    ) -> Runs:
        """Return ``copies * num_pairs`` fresh runs; copy ``c`` of problem ``i`` is run ``c * num_pairs + i``.

        Args:
            weights_N: weights of each run, ``[copies * num_pairs, ...]``.
            num_pairs: number of different problems.
            copies: runs of each problem, which share initial parameters and batches.
            generator: CPU generator.
            num_steps: horizon of all of them, drawn from the bounds of the task if ``None``.
        """
        problems = self.distribution.sample_problems(num_pairs, generator, self.device)
        bounds = (self.task.min_steps, self.task.max_steps) if num_steps is None else (num_steps, num_steps)
        shortest, longest = (bound / self.truncation_length for bound in bounds)
        draw = torch.rand(num_pairs, generator=generator)
        log_length = math.log(shortest) + draw * (math.log(longest) - math.log(shortest))
        horizon = (log_length.exp().round().clamp(min=1) * self.truncation_length).to(self.device)
        unknown = torch.rand(num_pairs, generator=generator) < self.task.unknown_horizon_probability
        told = torch.where(unknown.to(self.device), torch.full_like(horizon, math.inf), horizon)
        repeated = _map(lambda value: value.repeat(copies, *(1,) * (value.dim() - 1)), problems)
        params = repeated.params
        init_state = vmap(lambda weights, param: self.rule.init_state(weights, param))
        runs = Runs(
            problem=repeated._replace(params={}),
            params=params,
            states={name: init_state(weights_N, param) for name, param in params.items()},
            shared=vmap(self.rule.init_shared)(weights_N),
            step=torch.zeros(copies * num_pairs, device=self.device),
            horizon=horizon.repeat(copies),
            num_steps=told.repeat(copies),
            initial_loss=torch.zeros(copies * num_pairs, device=self.device),
        )
        return _map(torch.Tensor.contiguous, runs)

    def prepare(self, weights_N: Weights, num_pairs: int, copies: int) -> None:
        """Take a first step of runs that are thrown away: what is recorded and compiled for it serves all others.

        Args:
            weights_N: weights of each run.
            num_pairs: number of different problems.
            copies: runs of each problem.
        """
        generator = torch.Generator().manual_seed(0)
        runs = self.start(weights_N, num_pairs, copies, generator)
        self.unroll(weights_N, runs, self.draw(runs, copies, generator, 1), copies)

    def run(self, weights_N: Weights, runs: Runs, copies: int, generator: torch.Generator) -> tuple[Runs, StepLosses]:
        """Run one truncation, drawing for at most ``MAX_DRAWN`` steps at a time.

        Returns:
            The runs afterwards, and the losses ``[L, N]``.
        """
        parts = []
        for first in range(0, self.truncation_length, MAX_DRAWN):
            length = min(MAX_DRAWN, self.truncation_length - first)
            runs, losses = self.unroll(weights_N, runs, self.draw(runs, copies, generator, length), copies)
            parts.append(losses)
        return runs, StepLosses(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def draw(self, runs: Runs, copies: int, generator: torch.Generator, length: int | None = None) -> Draws:
        """Draw batches and noise of a truncation, or ``length`` steps of it, the same for all copies of a problem."""
        length = self.truncation_length if length is None else length
        first = _map(lambda value: value[: len(value) // copies], runs)
        train = self.distribution.sample_batches(first.problem, length, "train", generator)
        split: Split = "train" if self.objective.meta_split == "train" else "meta"
        meta = self.distribution.sample_batches(first.problem, length, split, generator)
        terms = (self.objective.flatness, self.objective.inner_flatness)
        noise, inner_noise = (self._draw_noise(term, first.params, generator, length) for term in terms)
        return Draws(train, meta, noise, inner_noise)

    def _draw_noise(
        self, term: FlatnessConfig, params: Params, generator: torch.Generator, length: int
    ) -> dict[str, Tensor]:
        measure = term.build_measure()
        if measure is None:
            return {}
        noise = [_noise(measure, params, generator) for _ in range(length)]
        return {name: torch.stack([step[name] for step in noise]) for name in noise[0]}

    def unroll(self, weights_N: Weights, runs: Runs, draws: Draws, copies: int) -> tuple[Runs, StepLosses]:
        """Run one truncation with given draws; pure, and differentiable with respect to the weights.

        Returns:
            The runs afterwards, and the losses ``[L, N]``.
        """
        # A recorded graph holds the backward pass of the inner loss as plain operations, cut off from autograd.
        differentiated = any(weight.requires_grad for weight in weights_N.values())
        steps = self._steps(runs, draws, copies)
        if not differentiated and self.mode != "plain":
            return _run_traced(weights_N, runs, steps)
        losses = []
        for variant, inputs in steps:
            runs, step_losses = variant.step(weights_N, runs, *inputs)
            losses.append(step_losses)
        return runs, _stack_losses(losses)

    def _steps(self, runs: Runs, draws: Draws, copies: int) -> Iterator[tuple[Unroll, _Inputs]]:
        """Yield what makes each step of a truncation, and what it takes besides weights and runs."""
        for index, on in enumerate(self._terms_on(runs, len(draws.train.inputs))):
            train, meta = (Batch(*(_repeat(part[index], copies) for part in batch)) for batch in draws[:2])
            noise, inner_noise = (
                {name: _repeat(value[index], copies, dim=1) for name, value in drawn.items() if is_on}
                for drawn, is_on in zip(draws[2:], on, strict=True)
            )
            yield self._variants[on], (train, meta, noise, inner_noise)

    def _terms_on(self, runs: Runs, length: int) -> list[tuple[bool, bool]]:
        """Return for each of the next steps whether any run counts the flatness terms, outer and inner."""
        taken_LN = runs.step + torch.arange(length, device=self.device).unsqueeze(1)
        on = []
        for term in (self.objective.flatness, self.objective.inner_flatness):
            if term.name is None or term.schedule == "always":
                on.append([term.name is not None] * length)
            else:
                on.append(schedule_mask(term, taken_LN, runs.horizon).any(1).tolist())
        return list(zip(*on, strict=True))

    @cached_property
    def _variants(self) -> dict[tuple[bool, bool], Unroll]:
        """Return the same inner training with and without each of the flatness terms: what is off costs nothing."""
        objective, none = self.objective, FlatnessConfig()
        named = (objective.flatness.name is not None, objective.inner_flatness.name is not None)
        variants: dict[tuple[bool, bool], Unroll] = {named: self}
        for on in ((False, False), (False, True), (True, False)):
            fewer = replace(
                objective,
                flatness=objective.flatness if on[0] else none,
                inner_flatness=objective.inner_flatness if on[1] else none,
            )
            variants.setdefault(on, replace(self, objective=fewer))
        return variants

    @cached_property
    def _traced_step(self) -> _Trace:
        return _Trace(self.step, compiled=self.mode == "compiled")

    def step(
        self,
        weights_N: Weights,
        runs: Runs,
        train: Batch,
        meta: Batch,
        noise: dict[str, Tensor],
        inner_noise: dict[str, Tensor],
    ) -> tuple[Runs, StepLosses]:
        """Take one step of all runs; pure."""
        config, rule = self.objective, self.rule
        measure, inner_measure = config.flatness.build_measure(), config.inner_flatness.build_measure()

        def learn(
            run: Runs, train: Batch, noise: dict[str, Tensor], inner_noise: dict[str, Tensor]
        ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            def loss_fn(params: dict[str, Tensor]) -> Tensor:
                return self.distribution.loss(run.problem, params, train)

            if inner_measure is None:
                grads, loss = grad_and_value(loss_fn)(run.params)
            else:
                inner_loss_fn = _regularized(loss_fn, inner_measure, config.inner_flatness, run, inner_noise)
                grads, (_, loss) = grad_and_value(inner_loss_fn, has_aux=True)(run.params)
            gap = torch.zeros_like(loss) if measure is None else measure(loss_fn, run.params, noise)
            return grads, loss, gap

        grads, train_loss, flatness = vmap(learn, in_dims=(0, 0, 1, 1))(runs, train, noise, inner_noise)
        if self.second_derivatives:
            # Where a gradient is exactly zero, as behind a dead input, so is its derivative; rules have 0 * inf there.
            grads = {name: torch.where(grad == 0, torch.zeros_like(grad), grad) for name, grad in grads.items()}
        else:
            grads = {name: grad.detach() for name, grad in grads.items()}
        step = runs.step + 1
        names = list(runs.params)
        result = apply_rule(
            rule,
            weights_N,
            [runs.params[name] for name in names],
            [grads[name] for name in names],
            [runs.states[name] for name in names],
            runs.shared,
            StepContext(step, runs.num_steps),
            Plan(pack_size=PACK_SIZE, phases=batched_phases(rule)),
        )
        params = {name: runs.params[name] + delta for name, delta in zip(names, result.deltas, strict=True)}
        states = dict(zip(names, result.states, strict=True))

        train_loss = clip_loss(train_loss, config.clip)
        flatness = penalty(config.flatness, flatness, runs.step, runs.horizon)
        initial_loss = torch.where(runs.step == 0, train_loss.detach(), runs.initial_loss)
        meta_loss = torch.zeros_like(train_loss)
        if config.meta_weight:
            meta_loss = clip_loss(vmap(self.distribution.loss)(runs.problem, params, meta), config.clip)
        value = config.train_weight * transform_loss(config, train_loss, initial_loss)
        if config.meta_weight:
            value = value + config.meta_weight * transform_loss(config, meta_loss, initial_loss)
        if config.error_weight:
            error = clip_loss(vmap(self.distribution.error)(runs.problem, params, meta), config.clip)
            value = value + config.error_weight * error
        value = value + config.flatness.coefficient * flatness
        objective = step_weight(config, step, runs.horizon, runs.num_steps) * value
        runs = runs._replace(params=params, states=states, shared=result.shared, step=step, initial_loss=initial_loss)
        # The layout of fresh and of restored runs: a step compiled for one serves all of them, to the same bits.
        runs = _map(torch.Tensor.contiguous, runs)
        return runs, StepLosses(objective, train_loss, meta_loss, flatness)


def _regularized(
    loss_fn: LossFn, measure: FlatnessMeasure, config: FlatnessConfig, run: Runs, noise: dict[str, Tensor]
) -> Callable[[Params], tuple[Tensor, Tensor]]:
    """Return the inner loss of one run with its flatness term, and the loss alone beside it."""

    def regularized(params: Params) -> tuple[Tensor, Tensor]:
        loss = loss_fn(params)
        term = penalty(config, measure(loss_fn, params, noise), run.step, run.horizon)
        return loss + config.coefficient * term, loss

    return regularized


def _run_traced(weights_N: Weights, runs: Runs, steps: Iterable[tuple[Unroll, _Inputs]]) -> tuple[Runs, StepLosses]:
    """Take steps by their graphs; weights and runs are taken apart once, not at every step."""
    fixed, (carried, form) = pytree.tree_leaves(weights_N), pytree.tree_flatten(runs)
    losses = []
    graphs: dict[int, Callable[..., list[Tensor]]] = {}
    for variant, inputs in steps:
        values = [*fixed, *carried, *pytree.tree_leaves(inputs)]
        # Of one layout in all steps: a step returns contiguous runs, and batches are slices of one draw.
        if id(variant) not in graphs:
            graphs[id(variant)] = variant._traced_step.graph(values, (weights_N, runs, *inputs))
        results = graphs[id(variant)](*values)
        carried, step_losses = results[: len(carried)], results[len(carried) :]
        losses.append(step_losses)
    return pytree.tree_unflatten(carried, form), _stack_losses(losses)


def _stack_losses(losses: Iterable[Iterable[Tensor]]) -> StepLosses:
    """Return the losses of ``L`` steps as ``[L, N]`` each."""
    return StepLosses(*(torch.stack(values) for values in zip(*losses, strict=True)))


class _Trace:
    """A step as one flat graph of its tensors, recorded when it is first asked for with such shapes.

    Recording takes seconds and removes most of a step's Python and ``vmap`` overhead.  Compiling the graph takes a
    minute or two for each family of problems.
    """

    def __init__(self, step: Callable[..., tuple[Runs, StepLosses]], *, compiled: bool):
        self.step = step
        self.compiled = compiled
        self.graphs: dict[Any, Callable[..., list[Tensor]]] = {}

    def graph(self, values: list[Tensor], arguments: tuple[Any, ...]) -> Callable[..., list[Tensor]]:
        """Return the function of the tensors of weights, runs and inputs to those of runs and losses.

        Args:
            values: these tensors.
            arguments: weights, runs and inputs, of which only the form is used.
        """
        form = pytree.tree_structure(arguments)
        key = (form, *((value.shape, value.stride(), value.dtype) for value in values))
        if key not in self.graphs:
            self.graphs[key] = self._record(values, form)
        return self.graphs[key]

    def _record(self, values: list[Tensor], form: pytree.TreeSpec) -> Callable[..., list[Tensor]]:
        def flat(*values: Tensor) -> list[Tensor]:
            weights_N, before, *inputs = pytree.tree_unflatten(list(values), form)
            after, losses = self.step(weights_N, before, *inputs)
            # In the order of `before`, so that the results can be fed back.
            return pytree.tree_leaves((merge_trees(lambda _, value: value, before, after), losses))

        recorded = make_fx(flat)(*values)
        module = torch.fx.GraphModule(recorded, fx_graph_cse(recorded.graph))
        module.graph.eliminate_dead_code()
        module.recompile()
        if self.compiled:
            # The compiler without the tracer in front of it: the graph is there, and keyed by its shapes.
            with torch.no_grad():
                compiled: Callable[..., list[Tensor]] = torch._inductor.compile(module, list(values))
                return compiled
        return module


def _repeat(value: Tensor, copies: int, dim: int = 0) -> Tensor:
    return torch.cat([value] * copies, dim) if copies > 1 else value


def _noise(measure: FlatnessMeasure, params: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw on the CPU, where the generator lives, whatever the device of the runs."""
    device = next(iter(params.values())).device
    on_cpu = {name: torch.empty_like(value, device="cpu") for name, value in params.items()}
    return {name: value.to(device) for name, value in measure.sample_noise(on_cpu, generator).items()}


def replace_runs(old: Runs, new: Runs, where: Tensor) -> Runs:
    """Return ``old`` with the runs ``where`` (int64 indices) taken from ``new``, one after another."""
    return merge_trees(lambda a, b: a.index_copy(0, where, b.to(a)), old, new)


def can_compile(device: torch.device) -> bool:
    """Return whether ``torch.compile`` has what it needs here: a C++ compiler, or a GPU."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "cl"))


def flatten_tree(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dicts and named tuples by ``/``-joined names."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    items = _items(tree)
    return {key: value for name in items for key, value in flatten_tree(items[name], f"{prefix}/{name}").items()}


def restore_runs(flat: Mapping[str, Tensor], prefix: str = "") -> Runs:
    """Undo :func:`flatten_tree` for :class:`Runs`."""
    tree: dict[str, Any] = {"problem": {"params": {}, "param_scales": {}}, "params": {}, "states": {}, "shared": {}}
    _nest(flat, prefix, tree)
    return Runs(**{**tree, "problem": Problems(**tree["problem"])})


def restore_draws(flat: Mapping[str, Tensor], prefix: str = "") -> Draws:
    """Undo :func:`flatten_tree` for :class:`Draws`."""
    tree: dict[str, Any] = {"noise": {}, "inner_noise": {}}
    _nest(flat, prefix, tree)
    return Draws(Batch(**tree["train"]), Batch(**tree["meta"]), tree["noise"], tree["inner_noise"])


def _nest(flat: Mapping[str, Tensor], prefix: str, tree: dict[str, Any]) -> None:
    """Put the tensors whose names begin with ``prefix/`` into nested dicts."""
    for name, value in flat.items():
        if name.startswith(f"{prefix}/"):
            *path, last = name.removeprefix(f"{prefix}/").split("/")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value


def _items(tree: Any) -> Mapping[str, Any]:
    """Return the children of a dict or named tuple by name."""
    items: Mapping[str, Any] = tree if isinstance(tree, Mapping) else tree._asdict()
    return items


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of nested dicts and named tuples."""
    return merge_trees(lambda value, _: function(value), tree, tree)


def merge_trees(function: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    """Apply a function to every pair of tensors of two trees of the same form."""
    if isinstance(first, Tensor):
        return function(first, second)
    ones, others = _items(first), _items(second)
    merged = {name: merge_trees(function, ones[name], others[name]) for name in ones}
    return merged if isinstance(first, Mapping) else type(first)(**merged)
