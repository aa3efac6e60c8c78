"""Inner training as a pure function, for many runs at once.

A *run* is one optimizee being trained by a rule.  The runs of a family share one architecture and go side by side,
under ``vmap``.  One step of all of them is recorded as a flat graph of tensor operations, and compiled if asked for.
Legend: ``N`` runs, ``L`` steps of a truncation.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..flatness import FlatnessMeasure, LossFn
from ..rules import Plan, State, StepContext, UpdateRule, Weights, apply_rule, batched_phases
from ..tasks import Batch, Params, Split, TaskDistribution
from ._record import Recorder
from .config import FlatnessConfig, ObjectiveConfig, TaskConfig
from .objective import clip_loss, penalty, schedule_mask, step_weight, transform_loss
from .runs import Draws, Runs, StepLosses, Terms, join_losses, map_tree, stack_losses

PACK_SIZE = 256
"""Tensors up to this size are handled side by side: fewer kernels to compile, and small ones cost no more."""

MAX_DRAWN = 50
"""Steps whose batches are held at a time: those of a truncation as long as a whole run would take gigabytes."""

Mode = Literal["plain", "recorded", "compiled"]
"""How a step is executed."""


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
        num_problems: int,
        copies: int,
        generator: torch.Generator,
        num_steps: int | None = None,
    ) -> Runs:
        """Return ``copies * num_problems`` fresh runs; copy ``c`` of problem ``i`` is run ``c * num_problems + i``.

        Args:
            weights_N: weights of each run, ``[copies * num_problems, ...]``.
            num_problems: number of different problems.
            copies: runs of each problem, which share initial parameters and batches.
            generator: CPU generator.
            num_steps: horizon of all of them, drawn from the bounds of the task if ``None``.
        """
        problems = self.distribution.sample_problems(num_problems, generator, self.device)
        bounds = (self.task.min_steps, self.task.max_steps) if num_steps is None else (num_steps, num_steps)
        shortest, longest = (bound / self.truncation_length for bound in bounds)
        draw = torch.rand(num_problems, generator=generator)
        log_length = math.log(shortest) + draw * (math.log(longest) - math.log(shortest))
        horizon = (log_length.exp().round().clamp(min=1) * self.truncation_length).to(self.device)
        unknown = torch.rand(num_problems, generator=generator) < self.task.unknown_horizon_probability
        told = torch.where(unknown.to(self.device), torch.full_like(horizon, math.inf), horizon)
        repeated = map_tree(lambda value: value.repeat(copies, *(1,) * (value.dim() - 1)), problems)
        params = repeated.params
        init_state = vmap(self.rule.fresh_state)
        runs = Runs(
            problem=repeated._replace(params={}),
            params=params,
            states={name: init_state(weights_N, param) for name, param in params.items()},
            shared=vmap(self.rule.init_shared)(weights_N),
            step=torch.zeros(copies * num_problems, device=self.device),
            horizon=horizon.repeat(copies),
            num_steps=told.repeat(copies),
            initial_loss=torch.zeros(copies * num_problems, device=self.device),
            average={name: param.clone() for name, param in params.items()} if self.rule.average else {},
        )
        return map_tree(torch.Tensor.contiguous, runs)

    def prepare(self, weights_N: Weights, num_problems: int, copies: int) -> None:
        """Take a first step of runs that are thrown away: what is recorded and compiled for it serves all others."""
        generator = torch.Generator().manual_seed(0)
        runs = self.start(weights_N, num_problems, copies, generator)
        self.unroll(weights_N, runs, self.draw(runs, copies, generator, 1), copies)

    def run(self, weights_N: Weights, runs: Runs, copies: int, generator: torch.Generator) -> tuple[Runs, StepLosses]:
        """Run one truncation, drawing for at most ``MAX_DRAWN`` steps at a time; the losses are ``[L, N]``."""
        parts = []
        for length in self.lengths():
            runs, losses = self.unroll(weights_N, runs, self.draw(runs, copies, generator, length), copies)
            parts.append(losses)
        return runs, join_losses(parts)

    def lengths(self) -> list[int]:
        """Return the steps that are drawn for at a time; they add up to a truncation."""
        whole, rest = divmod(self.truncation_length, MAX_DRAWN)
        return [MAX_DRAWN] * whole + [rest] * (rest > 0)

    def draw(self, runs: Runs, copies: int, generator: torch.Generator, length: int | None = None) -> Draws:
        """Draw batches and noise of a truncation, or ``length`` steps of it, the same for all copies of a problem."""
        length = self.truncation_length if length is None else length
        first = map_tree(lambda value: value[: len(value) // copies], runs)
        train = self.distribution.sample_batches(first.problem, length, "train", generator)
        split: Split = "train" if self.objective.meta_split == "train" else "meta"
        meta = self.distribution.sample_batches(first.problem, length, split, generator)
        terms = (self.objective.flatness, self.objective.inner_flatness)
        noise, inner_noise = (_draw_noise(term, length, first.params, generator) for term in terms)
        return Draws(train, meta, noise, inner_noise)

    def unroll(self, weights_N: Weights, runs: Runs, draws: Draws, copies: int) -> tuple[Runs, StepLosses]:
        """Run the steps of given draws; pure, and differentiable in the weights; the losses are ``[L, N]``."""
        # A recorded graph holds the backward pass of the inner loss as plain operations, cut off from autograd.
        differentiated = any(weight.requires_grad for weight in weights_N.values())
        terms = self._terms_on(runs, len(draws.train.inputs))
        steps = ((draws.at(index, copies, on), on) for index, on in enumerate(terms))
        if not differentiated and self.mode != "plain":
            return self._recorder.run(weights_N, runs, steps)
        losses = []
        for drawn, on in steps:
            runs, step_losses = self.step(weights_N, runs, drawn, on)
            losses.append(step_losses)
        return runs, stack_losses(losses)

    def _terms_on(self, runs: Runs, length: int) -> list[Terms]:
        """Return for each of the next steps whether any run counts the flatness terms, outer and inner."""
        taken_LN = runs.step + torch.arange(length, device=self.device).unsqueeze(1)
        on = []
        for term in (self.objective.flatness, self.objective.inner_flatness):
            if term.name is None or term.schedule == "always":
                on.append([term.name is not None] * length)
            else:
                on.append(schedule_mask(term, taken_LN, runs.horizon).any(1).tolist())
        return [Terms(*both) for both in zip(*on, strict=True)]

    @cached_property
    def _recorder(self) -> Recorder:
        return Recorder(self.step, compiled=self.mode == "compiled")

    def step(self, weights_N: Weights, runs: Runs, draws: Draws, terms: Terms) -> tuple[Runs, StepLosses]:
        """Take one step of all runs; pure."""
        train_loss, flatness, grads = self._learn(runs, draws, terms)
        initial_loss = torch.where(runs.step == 0, train_loss.detach(), runs.initial_loss)
        runs, step = runs._replace(initial_loss=initial_loss), runs.step + 1
        plan = Plan(pack_size=PACK_SIZE, phases=batched_phases(self.rule))
        deltas, states, shared = propose(self.rule, weights_N, runs, grads, StepContext(step, runs.num_steps), plan)
        params = {name: param + deltas[name] for name, param in runs.params.items()}
        average = {}
        if self.rule.average is not None:  # of every step: strides and landing only make that cheap, and usable
            weight_N = self.rule.average.weight(step)
            average = {name: vmap(torch.lerp)(runs.average[name], value, weight_N) for name, value in params.items()}
        runs = runs._replace(params=params, states=states, shared=shared, step=step, average=average)
        losses = self._judge(runs, draws.meta, train_loss, flatness)
        # The layout of fresh and of restored runs: a step compiled for one serves all of them, to the same bits.
        return map_tree(torch.Tensor.contiguous, runs), losses

    def _learn(self, runs: Runs, draws: Draws, terms: Terms) -> tuple[Tensor, Tensor, Params]:
        """Return the losses before the step, their flatness, and the gradients that the rule sees."""
        config = self.objective
        measure = config.flatness.build_measure() if terms.flatness else None
        inner_measure = config.inner_flatness.build_measure() if terms.inner_flatness else None

        def learn(
            run: Runs, result: Params, train: Batch, noise: Params, inner_noise: Params
        ) -> tuple[Params, Tensor, Tensor]:
            def loss_fn(params: Params) -> Tensor:
                return self.distribution.loss(run.problem, params, train)

            if inner_measure is None:
                grads, loss = grad_and_value(loss_fn)(run.params)
            else:
                inner_loss_fn = _regularized(loss_fn, inner_measure, config.inner_flatness, run, inner_noise)
                grads, (_, loss) = grad_and_value(inner_loss_fn, has_aux=True)(run.params)
            gap = torch.zeros_like(loss) if measure is None else measure(loss_fn, result, noise)
            return grads, loss, gap

        in_dims = (0, 0, 0, 1, 1)
        drawn = (draws.train, draws.noise, draws.inner_noise)
        grads, loss, gap = vmap(learn, in_dims=in_dims)(runs, _results(runs), *drawn)
        if self.second_derivatives:
            # Where a gradient is exactly zero, as behind a dead input, so is its derivative; rules have 0 * inf there.
            grads = {name: torch.where(grad == 0, torch.zeros_like(grad), grad) for name, grad in grads.items()}
        else:
            grads = {name: grad.detach() for name, grad in grads.items()}
        flatness = gap if measure is None else penalty(config.flatness, gap, runs.step, runs.horizon)
        return clip_loss(loss, config.clip), flatness, grads

    def _judge(self, runs: Runs, meta: Batch, train_loss: Tensor, flatness: Tensor) -> StepLosses:
        """Return the losses of the step that has led to ``runs``."""
        config, initial_loss, params = self.objective, runs.initial_loss, _results(runs)
        value = config.train_weight * transform_loss(config, train_loss, initial_loss)
        meta_loss = torch.zeros_like(train_loss)
        if config.meta_weight:
            meta_loss = clip_loss(vmap(self.distribution.loss)(runs.problem, params, meta), config.clip)
            value = value + config.meta_weight * transform_loss(config, meta_loss, initial_loss)
        if config.error_weight:
            error = clip_loss(vmap(self.distribution.error)(runs.problem, params, meta), config.clip)
            value = value + config.error_weight * error
        value = value + config.flatness.coefficient * flatness
        objective = step_weight(config, runs.step, runs.horizon) * value
        return StepLosses(objective, train_loss, meta_loss, flatness)


def propose(
    rule: UpdateRule, weights: Weights, runs: Runs, grads: Params, context: StepContext, plan: Plan
) -> tuple[Params, dict[str, State], State]:
    """Return the steps that a rule proposes, its states and its shared state after them; pure."""
    names = list(runs.params)
    params, states = list(runs.params.values()), [runs.states[name] for name in names]
    result = apply_rule(rule, weights, params, [grads[name] for name in names], states, runs.shared, context, plan)
    return dict(zip(names, result.deltas, strict=True)), dict(zip(names, result.states, strict=True)), result.shared


def _results(runs: Runs) -> Params:
    """Return what the runs would end with now: the averages, if there are any."""
    return runs.average or runs.params


def _draw_noise(term: FlatnessConfig, length: int, params: Params, generator: torch.Generator) -> Params:
    """Draw the noise of ``length`` steps where the runs are: on a GPU, by a generator that the given one seeds."""
    measure = term.build_measure()
    if measure is None:
        return {}
    device = next(iter(params.values())).device
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    drawn = [measure.sample_noise(params, generator) for _ in range(length)]
    return {name: torch.stack([step[name] for step in drawn]) for name in drawn[0]}


def _regularized(
    loss_fn: LossFn, measure: FlatnessMeasure, config: FlatnessConfig, run: Runs, noise: dict[str, Tensor]
) -> Callable[[Params], tuple[Tensor, Tensor]]:
    """Return the inner loss of one run with its flatness term, and the loss alone beside it."""

    def regularized(params: Params) -> tuple[Tensor, Tensor]:
        loss = loss_fn(params)
        term = penalty(config, measure(loss_fn, params, noise), run.step, run.horizon)
        return loss + config.coefficient * term, loss

    return regularized


def can_compile(device: torch.device) -> bool:
    """Return whether ``torch.compile`` has what it needs here: a C++ compiler, or a GPU."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "cl"))
