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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from ...rules import Adam, Plan, State, StepContext, UpdateRule, Weights
from ...tasks import Batch, Params
from ..config import MetaTrainConfig, ObjectiveConfig
from ..inner import Inner, InnerState
from ..inner_training import Families
from ..runs import Draws, Runs, Terms, choose_runs, share_weights
from ..unroll import Unroll, propose
from ._estimator import EstimatorState, GradientEstimator, MetaGradient
from .truncated_backprop import TruncatedBackprop


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

    A state has the ``runs`` of each family as the rule takes them, and the states of their ``teachers``.

    Attributes:
        students: the same runs as the rule takes them; their objective is not used.
        teacher: a rule without learned weights, whose state starts at zero.
        coefficient: factor of the loss.
    """

    students: Families
    teacher: UpdateRule
    coefficient: float = 1.0

    def reset(self, weights: Weights, generator: torch.Generator, num_steps: int | None = None) -> InnerState:
        """Return fresh runs."""
        runs = self.students.reset(weights, generator, num_steps)
        return {"runs": runs, "teachers": {name: self._fresh_teacher(one) for name, one in runs.items()}}

    def refresh(
        self, weights: Weights, state: InnerState, generator: torch.Generator, num_steps: int | None = None
    ) -> InnerState:
        """Start the runs anew that have reached their horizon, with a teacher that knows nothing of them."""
        runs = self.students.refresh(weights, state["runs"], generator, num_steps)
        teachers = {
            name: choose_runs(one.step > 0, state["teachers"][name], self._fresh_teacher(one))
            for name, one in runs.items()
        }
        return {"runs": runs, "teachers": teachers}

    def draw(self, state: InnerState, generator: torch.Generator) -> dict[str, Draws]:
        """Draw the batches."""
        return self.students.draw(state["runs"], generator)

    def unroll(
        self, weights: Weights, state: InnerState, draws: dict[str, Draws]
    ) -> tuple[Tensor, InnerState, dict[str, float]]:
        """Return the mean imitation loss, families by their weights, and the state afterwards."""
        loss: dict[str, Tensor] = {}
        after: InnerState = {"runs": {}, "teachers": {}}
        for unroll in self.students.unrolls:
            name, off = unroll.task.name, Terms(False, False)
            weights_N = share_weights(weights, unroll.task.num_tasks)
            runs, teacher = state["runs"][name], state["teachers"][name]
            losses = []
            for index in range(unroll.truncation_length):
                drawn = draws[name].at(index, 1, off)
                labels, teacher = self._teach(unroll, runs, teacher, drawn.train)
                student, _ = unroll.step(weights_N, runs, drawn, off)
                losses.append(mismatch(labels, {key: student.params[key] - runs.params[key] for key in labels}))
                runs = student._replace(params={key: runs.params[key] + label for key, label in labels.items()})
            loss[name] = self.coefficient * torch.stack(losses).mean()
            after["runs"][name], after["teachers"][name] = runs, teacher
        return self.students.mean(loss), after, {}

    def _teach(
        self, unroll: Unroll, runs: Runs, teacher: dict[str, State], batch: Batch
    ) -> tuple[Params, dict[str, State]]:
        """Return the steps that the teacher takes, and its state after them."""

        def learn(run: Runs, batch: Batch) -> tuple[Params, dict[str, State]]:
            grads = grad(lambda params: unroll.distribution.loss(run.problem, params, batch))(run.params)
            deltas, states, _ = propose(self.teacher, {}, run, grads, StepContext(run.step + 1, run.num_steps), Plan())
            return deltas, states

        with torch.no_grad():
            return vmap(learn)(runs._replace(states=teacher, shared={}), batch)

    def _fresh_teacher(self, runs: Runs) -> dict[str, State]:
        init_state = vmap(lambda param: self.teacher.fresh_state({}, param))
        return {name: init_state(param.detach()) for name, param in runs.params.items()}


@dataclass(frozen=True, kw_only=True)
class WithImitation(GradientEstimator):
    """An estimator, some of whose updates are replaced by imitation.

    Attributes:
        estimator: of the meta-objective.
        imitations: one per teacher; each update of this kind takes one at random.
        probabilities: share of imitation by the steps of the inner runs, which a curriculum decides.
    """

    estimator: GradientEstimator
    imitations: Sequence[GradientEstimator]
    probabilities: Mapping[int | None, float]

    def prepare(self, weights: Weights) -> None:
        """Prepare the estimator of the meta-objective; imitation has nothing to prepare."""
        self.estimator.prepare(weights)

    def init(self, weights: Weights, generator: torch.Generator, num_steps: int | None = None) -> EstimatorState:
        """Return the states of all parts."""
        parts = {"objective": self.estimator, **self._named()}
        return {name: part.init(weights, generator, num_steps) for name, part in parts.items()}

    def estimate(
        self, weights: Weights, state: EstimatorState, generator: torch.Generator, num_steps: int | None = None
    ) -> tuple[MetaGradient, EstimatorState]:
        """Return the gradient of the imitation loss, with the probability of the stage, or of the meta-objective.

        The loss of an imitation update is reported among the metrics; as meta-loss it is not a number.
        """
        if float(torch.rand((), generator=generator)) >= self.probabilities[num_steps]:
            meta, after = self.estimator.estimate(weights, state["objective"], generator, num_steps)
            return meta, {**state, "objective": after}
        index = int(torch.randint(len(self.imitations), (), generator=generator))
        name, imitation = list(self._named().items())[index]
        meta, after = imitation.estimate(weights, state[name], generator, num_steps)
        metrics = meta.metrics | {"imitation": float(meta.loss)}
        return MetaGradient(meta.gradient, torch.full_like(meta.loss, math.nan), metrics), {**state, name: after}

    def _named(self) -> dict[str, GradientEstimator]:
        return {f"imitation-{index}": imitation for index, imitation in enumerate(self.imitations)}


def with_imitation(estimator: GradientEstimator, config: MetaTrainConfig, device: torch.device) -> GradientEstimator:
    """Return the estimator with the imitation that a configuration asks for, itself where it asks for none."""
    imitation, shares = config.imitation, config.imitation.probabilities
    if not any(shares):
        return estimator
    unused = ObjectiveConfig(meta_weight=0.0, meta_split=config.objective.meta_split)  # of which batches are drawn
    students = Families.from_config(replace(config, objective=unused, compile=False), device)
    imitations = [
        TruncatedBackprop(
            inner=TeacherForced(
                students=students, teacher=build_teacher(name, imitation.lr), coefficient=imitation.coefficient
            )
        )
        for name in imitation.teachers
    ]
    stages: Sequence[int | None] = config.curriculum.stages or (None,)
    probabilities = {steps: shares[min(stage, len(shares) - 1)] for stage, steps in enumerate(stages)}
    return WithImitation(estimator=estimator, imitations=imitations, probabilities=probabilities)
