r"""L2O-Scale: recurrent networks per coordinate, per tensor and for the whole model, each informed by the next.

Per coordinate, with decays :math:`d^i_1, d^s` that the network chose one step before and
:math:`d^i_{j+1} = \sqrt{d^i_j}`, at four time scales :math:`j`

.. math::
    A_j \leftarrow d^i_j A_j + (1 - d^i_j)\, g \qquad
    M_j \leftarrow d^s M_j + (1 - d^s) (A_j^2 + 10^{-12}) \qquad
    s_j = \mathrm{asinh}\, \frac{A_j}{\sqrt{M_j + 10^{-16}}}

    x = \big( s_1 .. s_4,\ s_1 s_2, s_2 s_3, s_3 s_4,\ \ln M_j - \overline{\ln M},\ \ell - \bar\ell \big)

where :math:`\ell` is the coordinate's log learning rate and :math:`\bar\ell` its mean over all coordinates of all
tensors.  Three levels of GRUs share what they know; each reads the states above it *before* this step

.. math::
    h \leftarrow \mathrm{GRU}_0(x, h;\ \text{bias from } q, r) \qquad
    q \leftarrow \mathrm{GRU}_1(\overline{(h, x)}, q;\ \text{bias from } r) \qquad
    r \leftarrow \mathrm{GRU}_2(\bar q, r)

and the step and the next learning rate are

.. math::
    e = w_h^\top h + w_s^\top s \qquad \ell' = \mathrm{clip}(\ell + w_\ell^\top h + b_\ell) \qquad
    \Delta = -e^{\ell' + c}\, \frac{e}{\mathrm{rms}(e)} \qquad \ell \leftarrow \mu \ell + (1 - \mu) \ell'

Means, and the root mean square over a tensor, all come after :math:`h`; what precedes it (:math:`\bar\ell` and the
biases) follows from the memory of the step before.  So one reduction per step is enough.

References:
    Wichrowska et al., *Learned Optimizers that Scale and Generalize*, 2017, https://arxiv.org/abs/1703.04813
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ._networks import gru, init_gru, init_linear, linear
from ._rule import State, StepContext, TensorFacts, TensorShape, UpdateRule, Weights

NUM_SCALES = 4
NUM_FEATURES = 3 * NUM_SCALES
COORDINATE_HIDDEN, TENSOR_HIDDEN, GLOBAL_HIDDEN = 10, 20, 20
MIN_LOG_LR = -33.0
MEAN_SQUARE_FLOOR = 1e-12
EPS = 1e-16


@dataclass(frozen=True, kw_only=True)
class L2OScale(UpdateRule):
    """The hierarchical recurrent optimizer, which chooses its own learning rate for every coordinate.

    Memory: 21 floats of state per coordinate, 10.5 times Adam's, and 22 per tensor; as 16
    with ``FlatOpt(..., state_dtype=torch.bfloat16)``.

    A coordinate whose gradients were all exactly zero does not move; in the reference it may.

    Args:
        min_lr: lower end of the initial learning rates.
        max_lr: upper end of the initial learning rates.
        max_log_lr: bound of the logarithm of a learning rate.
        global_pool: what the network of the whole model sees of the tensors: the ``"mean"`` of their states, or the
            ``"last"`` one, as the reference code does.

    Example:
        >>> rule = L2OScale()
        >>> sum(weight.numel() for weight in rule.init_weights().values())
        8349
    """

    name: ClassVar[str] = "l2o-scale"
    memory: ClassVar[tuple[str, ...]] = ("memory",)
    compressible_state: ClassVar[frozenset[str]] = frozenset({"hidden"})

    min_lr: float = 1e-6
    max_lr: float = 1e-2
    max_log_lr: float = 33.0
    global_pool: Literal["mean", "last"] = "mean"

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return random weights: steps roughly along the gradient, with learning rates that stay as they are."""

        def start(size: int) -> Tensor:
            return 2 * torch.rand(size, generator=generator) - 1

        def row(size: int, mean: float, std: float) -> Tensor:
            return mean + std * torch.randn(1, size, generator=generator)

        level_0, level_1, level_2 = COORDINATE_HIDDEN, TENSOR_HIDDEN, GLOBAL_HIDDEN
        return {
            "coordinate.start": start(level_0),
            "tensor.start": start(level_1),
            "global.start": start(level_2),
            **init_gru("coordinate", NUM_FEATURES, level_0, generator),
            **init_gru("tensor", level_0 + NUM_FEATURES, level_1, generator),
            **init_gru("global", level_1, level_2, generator),
            **init_linear("tensor_to_coordinate", level_1, 3 * level_0, generator, scale=0.5),
            **init_linear("global_to_coordinate", level_2, 3 * level_0, generator, scale=0.5),
            **init_linear("global_to_tensor", level_2, 3 * level_1, generator, scale=0.5),
            "direction.weight": row(level_0, 0.0, 0.5 / level_0**0.5),
            "shortcut.weight": row(NUM_SCALES, 1 / NUM_SCALES, 0.1 / NUM_SCALES**0.5),
            **init_linear("scale_decay", level_0, 1, generator, scale=0.5, bias=3.2),
            **init_linear("input_decay", level_0, 1, generator, scale=0.5, bias=2.2),
            **init_linear("learning_rate", level_0, 1, generator, zero=True),
            "lr_momentum_logit": torch.full((), 3.2),
            "log_step_offset": torch.full((), -1.0),
        }

    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return the learned start, zero accumulators, and the initial learning rates.

        Their logarithms are a uniform number per coordinate plus one per tensor, in all between those of ``min_lr``
        and ``max_lr``; without a generator every one is the middle, 1e-4 by default.

        ``memory`` is ``[numel, sum of log_lr, state of the tensor's network]``.
        """
        low, high = math.log(self.min_lr) / 2, math.log(self.max_lr) / 2
        facts = torch.zeros(2, dtype=param.dtype, device=param.device)
        facts[0] = param.numel()
        if generator is None:
            middle = min(max(low + high, MIN_LOG_LR), self.max_log_lr)
            log_lr = torch.full_like(param, middle)
            facts[1] = param.numel() * middle  # not log_lr.sum(): of a sharded tensor it would be a part
        else:
            uniform = torch.rand(param.numel() + 1, generator=generator, device=generator.device, dtype=param.dtype)
            drawn = low + (high - low) * uniform.to(param.device)
            log_lr = (drawn[1:] + drawn[0]).clamp(MIN_LOG_LR, self.max_log_lr).reshape(param.shape)
            facts[1] = log_lr.sum()
        return {
            "step": torch.zeros((), dtype=param.dtype, device=param.device),
            "hidden": torch.zeros_like(param).unsqueeze(-1) + weights["coordinate.start"],
            "scale_decay": torch.zeros_like(param),
            "input_decay": torch.zeros_like(param),
            "log_lr": log_lr,
            "grad_average": _per_scale(param),
            "mean_square": _per_scale(param),
            "memory": torch.cat([facts, weights["tensor.start"]]),
        }

    def init_shared(self, weights: Weights) -> State:
        """Return the learned start of the network of the whole model."""
        return {"hidden": weights["global.start"].clone()}

    def prepare(
        self, weights: Weights, steps_N: Tensor, memory_NM: Tensor, shared: State, context: StepContext
    ) -> Tensor:
        """Return the mean of ``log_lr`` over the model, and the shifts of the biases per tensor, ``[N, 1 + 30]``."""
        numel, sum_log_lr = memory_NM[:, 0], memory_NM[:, 1]
        mean_log_lr = sum_log_lr.sum() / numel.sum().clamp(min=1)
        shift = linear(weights, "tensor_to_coordinate", memory_NM[:, 2:].mT)
        shift = shift + linear(weights, "global_to_coordinate", shared["hidden"][:, None])
        return torch.cat([mean_log_lr.expand(len(memory_NM), 1), shift.mT], dim=1)

    def observe(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, facts: TensorFacts, context: StepContext
    ) -> tuple[State, list[Tensor]]:
        """Advance accumulators and network; return sums of squared direction, step, ``log_lr``, ``h`` and ``x``."""
        # Both decays start at zero, so the first step forgets the zero start.
        decays = [state["input_decay"]]
        while len(decays) < NUM_SCALES:
            decays.append(decays[-1].sqrt())
        decay_Jn = torch.stack(decays)
        average_Jn = (1 - decay_Jn) * grad + decay_Jn * state["grad_average"].mT
        decay = state["scale_decay"]
        square_Jn = (1 - decay) * (average_Jn.square() + MEAN_SQUARE_FLOOR) + decay * state["mean_square"].mT

        scaled_Jn = _scale_gradients(average_Jn, square_Jn)
        log_Jn = (square_Jn + EPS).log()
        centred_Jn = log_Jn - log_Jn.mean(0)
        relative_lr = (state["log_lr"] - facts.given[0]).unsqueeze(0)
        x_Fn = torch.cat([scaled_Jn, scaled_Jn[:-1] * scaled_Jn[1:], centred_Jn, relative_lr])
        hidden_Hn = gru(weights, "coordinate", x_Fn, state["hidden"].mT, facts.given[1:])

        new = {
            "hidden": hidden_Hn.mT,
            "scale_decay": linear(weights, "scale_decay", hidden_Hn)[0].sigmoid(),
            "input_decay": linear(weights, "input_decay", hidden_Hn)[0].sigmoid(),
            "grad_average": average_Jn.mT,
            "mean_square": square_Jn.mT,
        }
        step, log_lr = self._learning_rate(weights, hidden_Hn, state["log_lr"])
        direction = _direction(weights, hidden_Hn, scaled_Jn)
        return new, [direction.square(), step, log_lr, hidden_Hn, x_Fn]

    def _learning_rate(self, weights: Weights, hidden_Hn: Tensor, log_lr: Tensor) -> tuple[Tensor, Tensor]:
        """Return the learning rate of this step, and the smoothed logarithm that is kept."""
        wanted = log_lr + linear(weights, "learning_rate", hidden_Hn)[0]
        # Clipped in value, not in gradient: a learning rate at its bound must be able to come back.
        wanted = wanted + (wanted.clamp(MIN_LOG_LR, self.max_log_lr) - wanted).detach()
        momentum = weights["lr_momentum_logit"].sigmoid()
        return (wanted + weights["log_step_offset"]).exp(), momentum * log_lr + (1 - momentum) * wanted

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
        """Advance the networks of the tensors and of the model.

        Returns:
            ``[N, 2]`` controls: ``1 / rms(e)``, and the mean step for weight decay.
        """
        numel, _, hidden_NH = memory_NM.split([1, 1, TENSOR_HIDDEN], dim=1)
        means = summaries_NS / numel.clamp(min=1)
        above = shared["hidden"][:, None]
        shift = linear(weights, "global_to_tensor", above)
        hidden_HN = gru(weights, "tensor", means[:, 3:].mT, hidden_NH.mT, shift)
        pooled = hidden_HN.mean(1, keepdim=True) if self.global_pool == "mean" else hidden_HN[:, -1:]
        shared = {"hidden": gru(weights, "global", pooled, above)[:, 0]}
        control = torch.stack([(means[:, 0] + EPS).rsqrt(), means[:, 1]], dim=1)
        return control, torch.cat([numel, summaries_NS[:, 2:3], hidden_HN.mT], dim=1), shared

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
        """Return the next learning rate and the step along the normalised direction."""
        hidden_Hn, average_Jn = state["hidden"].mT, state["grad_average"].mT
        step, log_lr = self._learning_rate(weights, hidden_Hn, state["log_lr"])
        direction = _direction(weights, hidden_Hn, _scale_gradients(average_Jn, state["mean_square"].mT))
        moved = (average_Jn != 0).any(0)
        return {"log_lr": log_lr}, -step * moved * direction * control[0]

    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return the mean of ``exp(l' + c)`` over every tensor."""
        return control_NC[:, 1]


def _per_scale(param: Tensor) -> Tensor:
    """Return zeros for every coordinate and time scale."""
    return torch.zeros_like(param).unsqueeze(-1).repeat(*(1,) * param.dim(), NUM_SCALES)


def _scale_gradients(average_Jn: Tensor, square_Jn: Tensor) -> Tensor:
    """Return ``s``; torch's asinh is accurate for large negative numbers too, a plain logarithm is not."""
    return torch.asinh(average_Jn * (square_Jn + EPS).rsqrt())


def _direction(weights: Weights, hidden_Hn: Tensor, scaled_Jn: Tensor) -> Tensor:
    """Return ``e``."""
    return (weights["direction.weight"] @ hidden_Hn + weights["shortcut.weight"] @ scaled_Jn)[0]
