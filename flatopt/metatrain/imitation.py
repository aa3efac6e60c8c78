r"""Imitation: the rule learns the steps that a known optimizer takes.

A teacher trains the inner problem along :math:`x_{t+1} = x_t + \Delta^*_t`.  The rule sees the same parameters and
gradients, with a state of its own, and never influences where the run goes (teacher forcing).  With :math:`d`
coordinates and :math:`T` steps its loss is

.. math::
    \frac{c}{T} \sum_t \frac{1}{2 d} \| \Delta^*_t - \Delta_t \|^2

The gradient is that of truncated backpropagation.  Updates of this kind take the place of some of the others, at
random; both kinds keep runs of their own, so that each sees whole runs from start to horizon.

Reference: Chen et al., *Training Stronger Baselines for Learning to Optimize*, 2020, https://arxiv.org/abs/2010.09089
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..rules import Adam, State, StepContext, UpdateRule, Weights, apply_rule
from ..tasks import Batch, Params
from .config import FlatnessConfig, ImitationConfig, MetaTrainConfig
from .estimators._estimator import STAGE, EstimatorState, GradientEstimator, MetaGradient
from .estimators._runs import InnerRuns, build_unrolls, repeat
from .estimators.truncated_backprop import Draws, Inner, InnerState, TruncatedBackprop
from .unroll import Runs, Unroll, flatten_tree, restore_draws, restore_runs

PREFIX = "imitation"


def build_teacher(name: str, lr: float) -> UpdateRule:
    """Return the rule that a configuration names."""
    # RMSProp with the bias correction of Adam, which published teachers lack: it only matters in the first steps.
    return Adam(lr=lr, betas=(0.9, 0.999) if name == "adam" else (0.0, 0.9))


def mismatch(labels: Params, deltas: Params) -> Tensor:
    """Return ``||labels - deltas||^2 / (2 d)`` over all coordinates of all runs, 0-D.

    Example:
        >>> mismatch({"x": torch.tensor([[1.0, 3.0]])}, {"x": torch.tensor([[1.0, 1.0]])})
        tensor(1.)
    """
    squares = torch.stack([(label - deltas[name]).square().sum() for name, label in labels.items()])
    return 0.5 * squares.sum() / sum(label.numel() for label in labels.values())


@dataclass(frozen=True, kw_only=True)
class TeacherForced(Inner):
    """Runs along the steps of a teacher.

    Attributes:
        students: the same runs as the rule takes them; their objective is not used.
        teacher: a rule without learned weights, whose state starts at zero.
        coefficient: factor of the loss.
    """

    students: InnerRuns
    teacher: UpdateRule
    coefficient: float = 1.0

    def reset(self, weights: Weights, generator: torch.Generator) -> InnerState:
        """Return fresh runs."""
        return self._with_fresh_teachers(self.students.reset(weights, generator))

    def refresh(self, weights: Weights, state: InnerState, generator: torch.Generator) -> InnerState:
        """Start the runs anew that have reached their horizon, with a teacher that knows nothing of them."""
        return self._with_fresh_teachers(self.students.refresh(weights, state, generator))

    def draw(self, state: InnerState, generator: torch.Generator) -> Draws:
        """Draw the batches."""
        return self.students.draw(state, generator)

    def unroll(self, weights: Weights, state: InnerState, draws: Draws) -> tuple[Tensor, InnerState, dict[str, float]]:
        """Return the mean imitation loss, families by their weights, and the state afterwards."""
        total_weight = sum(unroll.task.weight for unroll in self.students.unrolls)
        loss = next(iter(weights.values())).new_zeros(())
        new_state = dict(state)
        for unroll in self.students.unrolls:
            name = unroll.task.name
            weights_N = repeat(weights, unroll.task.num_tasks)
            runs, batches = restore_runs(state, name), restore_draws(draws, name).train
            teacher = _teacher_state(state, name, runs)
            losses = []
            for inputs, targets in zip(*batches, strict=True):
                batch = Batch(inputs, targets)
                labels, teacher = self._teach(unroll, runs, teacher, batch)
                after, _ = unroll.step(weights_N, runs, batch, batch, {}, {})
                losses.append(mismatch(labels, {key: after.params[key] - runs.params[key] for key in labels}))
                runs = after._replace(params={key: runs.params[key] + label for key, label in labels.items()})
            share = unroll.task.weight / total_weight
            loss = loss + share * self.coefficient * torch.stack(losses).mean()
            new_state.update(flatten_tree(runs, name))
            new_state.update(flatten_tree(teacher, _teacher_prefix(name)))
        return loss, new_state, {}

    def _teach(
        self, unroll: Unroll, runs: Runs, teacher: dict[str, State], batch: Batch
    ) -> tuple[Params, dict[str, State]]:
        """Return the steps that the teacher takes, and its state after them."""
        names = list(runs.params)

        def learn(run: Runs, states: list[State], batch: Batch) -> tuple[list[Tensor], list[State]]:
            grads = grad(lambda params: unroll.distribution.loss(run.problem, params, batch))(run.params)
            result = apply_rule(
                self.teacher,
                {},
                [run.params[name] for name in names],
                [grads[name] for name in names],
                states,
                {},
                StepContext(run.step + 1, run.num_steps),
            )
            return result.deltas, result.states

        with torch.no_grad():
            deltas, states = vmap(learn)(_inputs(runs), [teacher[name] for name in names], batch)
        return dict(zip(names, deltas, strict=True)), dict(zip(names, states, strict=True))

    def _with_fresh_teachers(self, state: InnerState) -> InnerState:
        """Return the state with that of the teacher set to zero wherever a run is at its start."""
        state = dict(state)
        for unroll in self.students.unrolls:
            runs = restore_runs(state, unroll.task.name)
            fresh = {
                name: vmap(lambda param: self.teacher.init_state({}, param))(param.detach())
                for name, param in runs.params.items()
            }
            for key, value in flatten_tree(fresh, _teacher_prefix(unroll.task.name)).items():
                started = (runs.step > 0).view(-1, *(1,) * (value.dim() - 1))
                state[key] = torch.where(started, state.get(key, value), value)
        return state


@dataclass(frozen=True, kw_only=True)
class WithImitation(GradientEstimator):
    """An estimator, some of whose updates are replaced by imitation.

    Attributes:
        estimator: of the meta-objective.
        imitations: one per teacher; each update of this kind takes one at random.
        probabilities: share of imitation in each stage of the curriculum, the last repeated.
    """

    estimator: GradientEstimator
    imitations: Sequence[GradientEstimator]
    probabilities: Sequence[float]

    def prepare(self, weights: Weights) -> None:
        """Prepare the estimator of the meta-objective; imitation has nothing to prepare."""
        self.estimator.prepare(weights)

    def init(self, weights: Weights, generator: torch.Generator) -> EstimatorState:
        """Return the states of all parts."""
        state = dict(self.estimator.init(weights, generator))
        for index, imitation in enumerate(self.imitations):
            state.update(_add_prefix(imitation.init(weights, generator), index))
        return state

    def estimate(
        self, weights: Weights, state: EstimatorState, generator: torch.Generator
    ) -> tuple[MetaGradient, EstimatorState]:
        """Return the gradient of the imitation loss, with the probability of the stage, or of the meta-objective.

        The loss of an imitation update is reported among the metrics; as meta-loss it is not a number.
        """
        stage = int(state[STAGE]) if STAGE in state else 0
        probability = self.probabilities[min(stage, len(self.probabilities) - 1)]
        if float(torch.rand((), generator=generator)) >= probability:
            own = {key: value for key, value in state.items() if not key.startswith(f"{PREFIX}/")}
            meta, own = self.estimator.estimate(weights, own, generator)
            return meta, state | own
        index = int(torch.randint(len(self.imitations), (), generator=generator))
        begin = f"{PREFIX}/{index}/"
        own = {key.removeprefix(begin): value for key, value in state.items() if key.startswith(begin)}
        common = {key: state[key] for key in state if key.startswith(f"{STAGE}")}
        meta, own = self.imitations[index].estimate(weights, own | common, generator)
        metrics = meta.metrics | {"imitation": float(meta.loss)}
        own = {key: value for key, value in own.items() if key not in common}
        return MetaGradient(meta.gradient, torch.full_like(meta.loss, math.nan), metrics), state | _add_prefix(
            own, index
        )


def with_imitation(
    estimator: GradientEstimator, config: MetaTrainConfig, rule: UpdateRule, device: torch.device
) -> GradientEstimator:
    """Return the estimator with the imitation that a configuration asks for, itself where it asks for none."""
    imitation: ImitationConfig = config.imitation
    if not any(imitation.probabilities):
        return estimator
    unused = replace(
        config.objective, train_weight=0.0, meta_weight=0.0, flatness=FlatnessConfig(), inner_flatness=FlatnessConfig()
    )
    students = InnerRuns(unrolls=build_unrolls(replace(config, objective=unused, compile=False), rule, device))
    imitations = [
        TruncatedBackprop(
            inner=TeacherForced(
                students=students, teacher=build_teacher(name, imitation.lr), coefficient=imitation.coefficient
            )
        )
        for name in imitation.teachers
    ]
    return WithImitation(estimator=estimator, imitations=imitations, probabilities=imitation.probabilities)


def _add_prefix(state: EstimatorState, index: int) -> EstimatorState:
    return {f"{PREFIX}/{index}/{key}": value for key, value in state.items()}


def _teacher_prefix(family: str) -> str:
    return f"teacher/{family}"


def _teacher_state(state: InnerState, family: str, runs: Runs) -> dict[str, State]:
    """Undo ``flatten_tree`` for the states of the teacher."""
    states: dict[str, State] = {}
    for name in runs.params:
        begin = f"{_teacher_prefix(family)}/{name}/"
        states[name] = {key.removeprefix(begin): value for key, value in state.items() if key.startswith(begin)}
    return states


def _inputs(runs: Runs) -> Runs:
    """Return the runs without the states of the student, which the teacher does not see."""
    return runs._replace(states={}, shared={})
