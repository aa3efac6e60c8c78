r"""The flagship rule: a hand-designed core, a learned correction per coordinate, a learned controller per tensor.

Per coordinate, with gradient :math:`g_t`, two momenta and one second moment (all bias-corrected below)

.. math::
    m^f_t = 0.9\, m^f_{t-1} + 0.1\, g_t \qquad m^s_t = 0.98\, m^s_{t-1} + 0.02\, g_t \qquad
    v_t = 0.99\, v_{t-1} + 0.01\, g_t^2

    u^g = g_t / \sqrt{v_t} \qquad u^f = m^f_t / \sqrt{v_t} \qquad u^s = m^s_t / \sqrt{v_t}

Per tensor, the controller (two tanh layers; the second also sees the mean of the first over all tensors) maps
signal-to-noise ratios, shape and time to :math:`(\lambda, \omega, a_g, a_s, b)`, all zero at initialisation.  The step
is

.. math::
    \Delta_t = -\eta_t\, e^{\lambda}
    \Big( \frac{d}{\mathrm{rms}(d)} + \mathrm{MLP}_b(\text{7 features}) + (0.1 + \omega)\, x \Big),
    \qquad d = u^f + a_g u^g + a_s u^s,

    \eta_t = \frac{0.03\, s_t}{\sqrt{\text{fan-in} \cdot \max(1, \text{width} / 64) \cdot \max(1, \text{matrices} / 4)}}

with the schedule :math:`s_t` a linear warm-up over :math:`10 \max(1, \text{matrices} / 4)` steps times a cosine to
zero over a known horizon, or times :math:`(1 + t/\tau)^{-1/2}` when the horizon is unknown.  The width of a tensor is
its number of input channels, zero for vectors, and there are as many matrices as tensors with two axes or more: the
spectral norm of a step of low rank grows with the width, and the steps of the layers of a deep network add up.  With
zero outputs of both networks this is the core: Adam's direction at unit RMS, a step per coordinate that depends on the
shape, and nothing to tune.

A coordinate whose gradients were all exactly zero does not move.

References:
    Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980 (the direction); Metz et al., *VeLO*, 2022,
    https://arxiv.org/abs/2211.09760 and *Practical tradeoffs between memory, compute, and performance in learned
    optimizers*, 2022, https://arxiv.org/abs/2203.11860 (hierarchical per-tensor and per-coordinate networks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._features import advance_average, debiasing, embed_step, fan_in, tiny
from ._networks import coordinate_mlp, init_linear
from ._rule import State, StepContext, UpdateRule, Weights

NUM_FEATURES = 7
NUM_LAYERS = 3
NUM_TENSOR_FEATURES = 20
STEP_SCALES = (10.0, 100.0, 1000.0)
FEATURE_BOUND = 5.0
TENSOR_FEATURE_BOUND = 3.0
DIRECTION_BOUND = 6.0
MIX_FLOOR = 0.05
"""Least ratio of mean d^2 to mean (u^f)^2: opposite momenta must not be blown up to unit RMS."""


@dataclass(frozen=True, kw_only=True)
class HierarchicalMLP(UpdateRule):
    """Hand-designed core with a learned residual per coordinate and a learned controller per tensor.

    Args:
        base_step: step per coordinate, times the square root of fan-in, at the peak of the schedule of a small network.
        base_decay: decay ``omega`` is added to: not zero, where bounding it from below would stop its learning.
        vector_fan_in: fan-in assumed for parameters with fewer than two axes (biases, gains).
        min_fan_in: smaller fan-ins count as this.
        large_width: number of input channels beyond which the step shrinks with their square root once more.
        many_matrices: number of matrices beyond which the step shrinks with its square root, and the warm-up grows.
        warmup_steps: length of the linear warm-up of a network with few matrices.
        decay_steps: time scale of the decay when the horizon is unknown.
        betas: decays of the fast momentum, the slow momentum and the second moment.
        hidden: width of the two hidden layers of the per-coordinate network.
        controller_hidden: width of the two hidden layers of the controller.

    Example:
        >>> rule = HierarchicalMLP()
        >>> sum(weight.numel() for weight in rule.init_weights().values())
        1213
    """

    name: ClassVar[str] = "hierarchical-mlp"

    base_step: float = 0.03
    vector_fan_in: float = 64.0
    min_fan_in: float = 8.0
    base_decay: float = 0.1
    large_width: float = 64.0
    many_matrices: float = 4.0
    warmup_steps: float = 10.0
    decay_steps: float = 100.0
    betas: tuple[float, float, float] = (0.9, 0.98, 0.99)
    hidden: int = 8
    controller_hidden: int = 16

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return random hidden layers and zero output layers: the rule starts as its core."""
        wide = self.controller_hidden
        return {
            **init_linear("coordinate.0", NUM_FEATURES, self.hidden, generator),
            **init_linear("coordinate.1", self.hidden, self.hidden, generator),
            **init_linear("coordinate.2", self.hidden, 1, generator, zero=True),
            **init_linear("controller.0", NUM_TENSOR_FEATURES, wide, generator),
            **init_linear("controller.1", 2 * wide, wide, generator),
            **init_linear("controller.2", wide, 4 + self.hidden, generator, zero=True),
        }

    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return zero accumulators, and as memory ``[numel, fan_in, width, is_vector]``."""
        is_vector = param.dim() < 2
        width = 0 if is_vector else param.shape[1]
        fan = self.vector_fan_in if is_vector else max(fan_in(param), self.min_fan_in)
        return {
            "step": torch.zeros((), dtype=param.dtype, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_slow": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
            "memory": torch.tensor([param.numel(), fan, width, is_vector], dtype=param.dtype, device=param.device),
        }

    def prepare(
        self, weights: Weights, steps_N: Tensor, memory_NM: Tensor, shared: State, context: StepContext
    ) -> Tensor:
        """Return the bias corrections of the three averages, ``[N, 3]``."""
        return torch.stack([debiasing(decay, steps_N) for decay in self.betas], dim=-1)

    def observe(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, context: StepContext
    ) -> tuple[State, list[Tensor]]:
        """Advance the three averages; return the products whose sums are second moments of directions."""
        fast, slow, square = self.betas
        new = {
            "exp_avg": advance_average(state["exp_avg"], grad, fast),
            "exp_avg_slow": advance_average(state["exp_avg_slow"], grad, slow),
            "exp_avg_sq": advance_average(state["exp_avg_sq"], grad.square(), square),
        }
        u_g, u_f, u_s, v = _directions(new, grad, state["given"])
        products = [u_g * u_g, u_f * u_f, u_s * u_s, u_g * u_f, u_g * u_s, u_f * u_s, param * param, v, grad * grad]
        return new, products

    def mix(
        self, weights: Weights, summaries_NS: Tensor, memory_NM: Tensor, shared: State, context: StepContext
    ) -> tuple[Tensor, Tensor, State]:
        """Run the controller.

        Returns:
            ``[N, 12 + hidden]`` controls: step size, decay, a_g, a_s, 1 / rms(d), then what normalises the seven
            features, then the shifts ``b`` of the first hidden layer.
        """
        numel, fan, width, is_vector = memory_NM.unbind(-1)
        eps = tiny(summaries_NS)
        gg, ff, ss, gf, gs, fs, xx, v, grad_sq = (summaries_NS / numel.clamp(min=1)[:, None]).unbind(-1)
        log_gg, log_ff, log_ss, log_xx = ((value + eps).log() for value in (gg, ff, ss, xx))
        num_tensors = summaries_NS.shape[0]
        time = embed_step(context.step, STEP_SCALES) + self._embed_horizon(context)
        features = [
            log_gg / 2 + 0.5,
            log_ff / 2 + 1.5,
            log_ss / 2 + 2,
            gf / (gg * ff + eps).sqrt(),
            gs / (gg * ss + eps).sqrt(),
            fs / (ff * ss + eps).sqrt(),
            log_xx / 4 + 1,
            (fan.log() - 4) / 2,
            is_vector,
            ((numel + 1).log() - 7) / 3,
            *(value.to(fan).expand_as(fan) for value in time),
            (torch.full_like(fan, num_tensors).log() - 2) / 1.5,
        ]
        x = torch.stack(features, dim=-1).clamp(-TENSOR_FEATURE_BOUND, TENSOR_FEATURE_BOUND)
        x = torch.tanh(x @ weights["controller.0.weight"].T + weights["controller.0.bias"])
        x = torch.cat([x, x.mean(0).expand_as(x)], dim=-1)
        x = torch.tanh(x @ weights["controller.1.weight"].T + weights["controller.1.bias"])
        out = x @ weights["controller.2.weight"].T + weights["controller.2.bias"]

        log_step = 2 * torch.tanh(out[:, 0] / 2)
        decay = (self.base_decay + out[:, 1]).clamp(0, 1)
        a_g, a_s = out[:, 2].clamp(-2, 2), out[:, 3].clamp(-2, 2)
        dd = ff + a_g**2 * gg + a_s**2 * ss + 2 * (a_g * gf + a_s * fs + a_g * a_s * gs)
        deep = ((1 - is_vector).sum() / self.many_matrices).clamp(min=1)
        wide = (width / self.large_width).clamp(min=1)
        peak = self.base_step * (fan * wide * deep).rsqrt()
        step_size = peak * self._schedule(context, deep).to(fan) * log_step.exp()
        # Not rsqrt: its derivative at the least value overflows.
        squares = (torch.maximum(dd, MIX_FLOOR * ff), gg, ff, ss, xx, v, grad_sq)
        scales = [(value + eps).sqrt().reciprocal() for value in squares]
        control = torch.stack([step_size, decay, a_g, a_s, *scales, -(v + eps).log() / 2], dim=-1)
        return torch.cat([control, out[:, 4:].clamp(-3, 3)], dim=-1), memory_NM, shared

    def _embed_horizon(self, context: StepContext) -> list[Tensor]:
        """Return five 0-D features of the horizon, all zero when it is unknown."""
        known = torch.isfinite(context.num_steps)
        fraction = (context.step / context.num_steps).clamp(max=1)
        log_length = torch.where(known, context.num_steps, torch.ones_like(context.num_steps)).log()
        late = torch.tanh(10 * (fraction - 0.9))
        features = [torch.ones_like(fraction), 2 * fraction - 1, fraction**2, late, (log_length - 6) / 2]
        return [torch.where(known, feature, torch.zeros_like(feature)) for feature in features]

    def _schedule(self, context: StepContext, deep: Tensor) -> Tensor:
        """Return the multiplier of the step over the run, 0-D, between 0 and 1; ``deep`` times as long a warm-up."""
        warmup = (context.step / (self.warmup_steps * deep)).clamp(max=1)
        fraction = ((context.step - 1) / context.num_steps).clamp(max=1)
        cosine = (1 + torch.cos(math.pi * fraction)) / 2
        anytime = (1 + context.step / self.decay_steps).rsqrt()
        return warmup * torch.where(torch.isfinite(context.num_steps), cosine, anytime)

    def propose(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, control: Tensor, context: StepContext
    ) -> tuple[State, Tensor]:
        """Return the step: core direction plus learned residual plus decay, times the step size."""
        step_size, decay, a_g, a_s, per_d, per_g, per_f, per_s, per_x, per_v, per_grad, log_per_v = control[:12]
        u_g, u_f, u_s, v = _directions(state, grad, state["given"])
        direction = ((u_f + a_g * u_g + a_s * u_s) * per_d).clamp(-DIRECTION_BOUND, DIRECTION_BOUND)
        features = [
            u_g * per_g,
            u_f * per_f,
            u_s * per_s,
            param * per_x,
            (v + tiny(v)).log() / 2 + log_per_v,
            grad * per_grad,
            state["exp_avg_slow"] * state["given"][1] * per_v,
        ]
        bounded = [feature.clamp(-FEATURE_BOUND, FEATURE_BOUND) for feature in features]
        (residual,) = coordinate_mlp(weights, "coordinate", bounded, NUM_LAYERS, shift=control[12:])
        moved = (state["exp_avg_sq"] > 0).to(param.dtype)
        return {}, -step_size * moved * (direction + residual + decay * param)

    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return the step size of every tensor."""
        return control_NC[:, 0]


def _directions(state: State, grad: Tensor, corrections: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``u^g, u^f, u^s`` and the bias-corrected second moment."""
    fast, slow, square = corrections
    v = state["exp_avg_sq"] * square
    scale = 1 / (v.sqrt() + tiny(v) ** 0.5)
    return grad * scale, state["exp_avg"] * fast * scale, state["exp_avg_slow"] * slow * scale, v
