r"""The flagship rule: momentum made orthogonal strip by strip, under a small learned controller of each tensor.

Per coordinate, with gradient :math:`g_t`,

.. math::
    m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \qquad
    u_t = m_t / \sqrt{v_t}.

A matrix ``[outputs, inputs]``, of :math:`(1 - \mu)\, m_t + \mu\, g_t`, is cut along its shorter axis into strips
:math:`X`: one of up to 80 rows, two up to 256 rows, four up to 320; beyond, two, four, eight, ... of up to 256 each
(:class:`flatopt.rules.StripRows`).  Each is replaced by nearly the closest matrix with orthonormal rows, its polar
factor :math:`(X X^\top)^{-1/2} X`, by three Newton-Schulz iterations on the Gram matrix alone, which is small:

.. math::
    A_0 = X X^\top / \lVert X X^\top \rVert_F \qquad Q_i = a_i + b_i A_i + c_i A_i^2 \qquad
    A_{i+1} = Q_i A_i Q_i \qquad \bar X = \sqrt{n}\, Q_2 Q_1 Q_0 X / \lVert X X^\top \rVert_F^{1/2}.

With :math:`n`, the length of the longer axis, :math:`\bar X` has a root mean square of about 1 where the momentum has
full rank, and a smaller one where it has not: no direction gets longer than it is in a matrix of full rank.

The step of a matrix :math:`x` is

.. math::
    \Delta_t = -\eta_t\, e^{\lambda} ( \bar X + e^{\omega} \sigma_t^{-h} s_t^{-l} \rho_t^{-g} r_t^{-k} x ), \qquad
    \eta_t = \frac{0.034\, s_t\, \rho_t^{\,q} \sigma_t^{\,p}}{\sqrt{\max(\text{inputs}, 8)\, \max(K / 4, 1)}}

with :math:`\bar X` clipped to :math:`\pm 5`.  A vector has :math:`u_t` over its root mean square in its place.
:math:`K` is the number of strips of a matrix: where they share directions, their steps add up.  The schedule
:math:`s_t` is a warm-up over 30 steps (over a fifth of a shorter known run, but at least 15), times a power, 1 before
learning, of :math:`\cos(\pi (t - 1) / 2T)` where the length :math:`T` of the run is known and at most 800, and
:math:`(1 + t/100)^{-0.5}` elsewhere; this power is learned too and stays below 1, so that no run ends by itself.
There step and decay have one more learned factor each.  :math:`\rho_t` is the root mean square of the gradient over its
largest so far: it falls as training data are learned by heart.  :math:`\sigma_t` is 6 times the root mean square of the
momentum over that of the gradient.  That ratio is the size of Adam's step: 1 for a gradient without noise, near 1/6 in
most runs.  :math:`r_t` tells what is large, as gains and embeddings are: half the root mean square of the tensor times
:math:`\sqrt{\text{inputs}}`, but at least 1.  Steps may shrink with noise and gradient; decay may grow with noise, with
what is learned by heart, and late, and spare what is large.  Their powers :math:`q, p, h, l, g, k` are
``gradient_power, noise_step, noise_decay, late_decay, gradient_decay, size_decay`` below; they see
:math:`s_t \ge 0.05`, :math:`0.3 \le \sigma_t \le 120`, :math:`r_t \le 20` and, in the decay, :math:`\rho_t \ge 0.05`.

The controller is linear: from what the tensor's own sums, its shape and the time tell
(:meth:`OrthogonalizedMomentum.mix` lists it) it finds :math:`\lambda, \omega` and the :math:`\mu` of the next step,
with weights for matrices and others for vectors.  No tensor knows of another.  The constants above are learned too,
each as the logarithm of a factor, and the powers.  Zero weights leave the constants as above, and all else is zero
then: the untrained rule.  A coordinate whose momentum squared is zero does not move, as where no gradient ever was; one
that is not finite stays.  State: of matrices the momentum alone, of vectors both moments, four numbers per tensor, and
the average of the parameters.

References:
    Jordan et al., *Muon*, 2024, https://kellerjordan.github.io/posts/muon/ (orthogonalised momentum);
    Amsel et al., *The Polar Express*, 2025, https://arxiv.org/abs/2505.16932 (the coefficients of the iterations);
    Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980 (vectors);
    Metz et al., *Practical tradeoffs between memory, compute, and performance in learned optimizers*, 2022,
    https://arxiv.org/abs/2203.11860 (a network per tensor that sees statistics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ._average import PolynomialAverage
from ._features import constant_columns, debiasing, embed_horizon, embed_step, tiny
from ._networks import init_linear, linear
from ._rule import State, StepContext, StripRows, TensorFacts, TensorShape, Terms, UpdateRule, Weights
from ._strips import Strips

NEWTON_SCHULZ = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
"""``a, b, c`` of each iteration (after Amsel et al.), the best for what the one before leaves: together they bring
singular values from 0.01 to 1 as near to 1 as three polynomials of fifth degree can, 0.73 to 1.27."""

CONSTANTS = (
    "matrix_step",
    "vector_step",
    "matrix_decay",
    "vector_decay",
    "momentum",
    "second_moment",
    "momentum_mix",
    "warmup",
    "cosine_power",
    "anytime_step",
    "anytime_power",
    "anytime_decay",
    "gradient_power",
    "noise_step",
    "noise_decay",
    "late_decay",
    "gradient_decay",
    "size_decay",
)
"""The constants of the rule that are learned, each 0 at the start; see :func:`_factors`."""

CONSTANT_SCALE = 4.0
"""What their weights are multiplied by: an evolution strategy perturbs all weights alike, and these matter more."""

NUM_FEATURES = 17  # five of the sums, three of the shape, four of the step, five of the length of the run
STEP_SCALES = (10.0, 100.0, 1000.0)
FEATURE_BOUND = 3.0  # where features, and the logarithms that powers see, are clipped
DIRECTION_BOUND = 5.0  # where directions are clipped, in root mean squares
MIN_SCHEDULE = 0.05  # the least that the decay sees
LONGEST_KNOWN = 800  # steps of the longest run whose schedule follows its length, as many as in meta-training
USUAL_SIGNAL = 1 / 6  # root mean square of the momentum over that of the gradient, in most runs
LARGE_SIZE = 2.0  # root mean square times the root of the inputs from which on a tensor is large
FREE_STRIPS = 4  # more shorten the step: steps of strips add up in a direction that they share


class _Measured(NamedTuple):
    """What the sums of every tensor tell, ``[N]`` each, features ``[5, N]``; logarithms are of sigma, rho and r."""

    features: Tensor
    log_signal: Tensor
    log_ratio: Tensor
    log_size: Tensor
    grad_square: Tensor
    rms_max: Tensor
    per_direction: Tensor


@dataclass(frozen=True, kw_only=True)
class OrthogonalizedMomentum(UpdateRule):
    """Muon strip by strip for matrices, Adam for vectors, and a learned controller per tensor.

    Args:
        base_step: step per coordinate, times the square root of the inputs, at the peak of the schedule.
        vector_inputs: inputs assumed for vectors (biases, gains).
        min_inputs: fewer inputs count as this.
        base_decay: decay of the parameters, as a multiple of the step.
        strip_size: most rows of a matrix that is not cut, and of four strips; 0: matrices are like vectors, as in Adam.
        max_strip_size: most rows of a matrix that is halved, and of a strip of one that is too large for four.
        betas: decays of the momentum and of the second moment, before learning.
        momentum_mix: share of the gradient in what is orthogonalised (Nesterov), before learning.
        warmup_steps: length of the linear warm-up, before learning; as little as half of it in a short run.
        decay_steps: time scale of the decay of the step where the length of the run is unknown, or above 800.
        anytime_power: power of that decay, before learning.

    Raises:
        ValueError: for a value out of bounds.

    Example:
        >>> rule = OrthogonalizedMomentum()
        >>> sum(weight.numel() for weight in rule.init_weights().values())
        108
    """

    name: ClassVar[str] = "orthogonalized-momentum"
    memory: ClassVar[tuple[str, ...]] = ("grad_square", "grad_rms_max", "log_momentum_mix")
    vector_state: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq"})
    average: ClassVar[PolynomialAverage] = PolynomialAverage(power=8.0)

    base_step: float = 0.034
    vector_inputs: float = 64.0
    min_inputs: float = 8.0
    base_decay: float = 1.0
    strip_size: int = 80
    max_strip_size: int = 256
    betas: tuple[float, float] = (0.9, 0.99)
    momentum_mix: float = 0.1
    warmup_steps: float = 30.0
    decay_steps: float = 100.0
    anytime_power: float = 0.5

    def __post_init__(self) -> None:
        values = vars(self)
        positive = ("base_step", "vector_inputs", "min_inputs", "warmup_steps", "decay_steps")
        bounds = {name: (values[name] > 0, "positive") for name in positive}
        bounds |= {name: (values[name] >= 0, "0 or more") for name in ("base_decay", "strip_size", "max_strip_size")}
        bounds["betas"] = all(0 <= beta < 1 for beta in self.betas), "in [0, 1)"
        bounds["momentum_mix"] = 0 <= self.momentum_mix <= 1, "in [0, 1]"
        bounds["anytime_power"] = 0 < self.anytime_power < 1, "between 0 and 1"
        for name, (is_inside, where) in bounds.items():
            if not is_inside:
                raise ValueError(f"{name} must be {where}, not {values[name]}")

    @property
    def strip_rows(self) -> StripRows | None:
        """One strip of ``strip_size`` rows, a halved matrix of ``max_strip_size``, or more strips."""
        most = max(self.strip_size, self.max_strip_size)
        return StripRows(self.strip_size, most, FREE_STRIPS) if self.strip_size else None

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return zeros: the untrained rule."""
        return {
            **{f"constants.{name}": torch.zeros(()) for name in CONSTANTS},
            **init_linear("matrices", NUM_FEATURES, 3, generator, zero=True),
            **init_linear("vectors", NUM_FEATURES, 2, generator, zero=True),
        }

    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return zero accumulators."""
        scalar = torch.zeros((), dtype=param.dtype, device=param.device)
        return {
            "step": scalar,
            **{key: scalar.clone() for key in self.memory},
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }

    def prepare(
        self, weights: Weights, steps_N: Tensor, memory_NM: Tensor, shared: State, context: StepContext
    ) -> Tensor:
        """Return the share of the gradient in what is orthogonalised, and in both moments, ``[N, 3]``."""
        factors = _factors(weights)
        mix = self.momentum_mix * factors["momentum_mix"] * memory_NM[:, 2].exp()
        return torch.stack([mix, *self._rates(factors).unsqueeze(-1).expand(-1, len(mix))], -1).clamp(max=1)

    def observe(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, facts: TensorFacts, context: StepContext
    ) -> tuple[State, Terms]:
        """Advance the moments; return the squares and products whose means are features and norms."""
        m = torch.lerp(state["exp_avg"], grad, facts.given[1])
        products = [(m, m), (grad, grad), (grad, m), (param, param)]
        if "exp_avg_sq" not in state:  # a matrix
            return {"exp_avg": m}, [*products, None]
        v = torch.lerp(state["exp_avg_sq"], grad.square(), facts.given[2])
        u = _adam(m, v)
        return {"exp_avg": m, "exp_avg_sq": v}, [*products, (u, u)]

    def matrix(self, weights: Weights, state: State, grad: Tensor, facts: TensorFacts) -> Tensor:
        """Return the momentum with a share of the gradient."""
        return torch.lerp(state["exp_avg"], grad, facts.given[0])

    def couple(self, weights: Weights, grams_Kss: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what each strip is multiplied by, and its effective rank, ``trace(G)^2 / trace(G^2)``."""
        floor = tiny(grams_Kss) ** 0.75  # of a strip of zeros, whose derivatives have to be finite
        trace_K = grams_Kss.diagonal(dim1=-2, dim2=-1).sum(-1)
        relative = grams_Kss / trace_K.clamp(min=floor)[:, None, None]  # whose squares neither overflow nor vanish
        norm_K = torch.linalg.vector_norm(relative, dim=(-2, -1)).clamp(min=grams_Kss.shape[-1] ** -0.5 / 2)
        gram = relative / norm_K[:, None, None]
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = polynomial = gram
        for iteration, (a, b, c) in enumerate(NEWTON_SCHULZ):
            if iteration:
                gram = polynomial.bmm(gram).bmm(polynomial)
            polynomial = torch.baddbmm(torch.add(a * identity, gram, alpha=b), gram, gram, alpha=c)
            factor = polynomial.bmm(factor) if iteration else polynomial
        scale_K = (trace_K * norm_K).clamp(min=floor).rsqrt()
        return factor * scale_K[:, None, None], [(trace_K > 0) / norm_K.square()]

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
        """Run the controller of every tensor.

        It sees the noise of the gradient, its cosine with the momentum, its size over its largest so far, the rank of
        the strips, the size of the parameter, inputs, outputs, coordinates, and the time, as a fraction too if known.

        Returns:
            ``[N, 3]`` controls: what multiplies the direction and the parameter, and the step.
        """
        factors = _factors(weights)
        known = (context.step <= context.num_steps) & (context.num_steps <= LONGEST_KNOWN)
        columns = _columns(tuple(shapes), self.strip_rows, self.min_inputs, self.vector_inputs)
        table_FN = constant_columns(columns, summaries_NS)
        fan, is_matrix, crowding = table_FN[2:5]
        seen = self._measure(summaries_NS, memory_NM, table_FN, self._rates(factors), context)
        in_run = torch.stack([*embed_step(context.step, STEP_SCALES), *embed_horizon(*context, known)]).to(fan)
        features_FN = torch.cat([seen.features, table_FN[5:], in_run.unsqueeze(-1).expand(-1, len(fan))])
        log_step, log_decay, log_mix = _control(weights, features_FN, is_matrix)

        def of_kind(name: str) -> Tensor:
            return torch.where(is_matrix > 0, factors[f"matrix_{name}"], factors[f"vector_{name}"])

        def power(name: str) -> Tensor:
            return CONSTANT_SCALE * weights[f"constants.{name}"]

        schedule = self._schedule(factors, context, known)
        peak = self.base_step * schedule * of_kind("step")
        growth = power("gradient_power") * seen.log_ratio + power("noise_step") * seen.log_signal
        step_size = peak * (fan * crowding).rsqrt() * (growth + log_step).exp()
        shrinkage = power("noise_decay") * seen.log_signal + power("size_decay") * seen.log_size
        shrinkage = shrinkage + power("late_decay") * schedule.clamp(min=MIN_SCHEDULE).log()
        shrinkage = shrinkage + power("gradient_decay") * seen.log_ratio.clamp(min=-FEATURE_BOUND)
        decay = self.base_decay * of_kind("decay") * torch.where(known, 1.0, factors["anytime_decay"])
        decay = decay * (log_decay - shrinkage).exp()
        control = torch.stack([seen.per_direction, decay, step_size], -1)
        return control, torch.stack([seen.grad_square, seen.rms_max, log_mix], -1), shared

    def _measure(
        self, summaries_NS: Tensor, memory_NM: Tensor, table_FN: Tensor, rates: Tensor, context: StepContext
    ) -> _Measured:
        """Return what the sums of every tensor tell."""
        eps, (per_numel, per_polar, fan, is_matrix) = tiny(summaries_NS), table_FN[:4].unbind()
        sums = (summaries_NS.mT * per_numel).unbind()
        mm, gg, gm, xx, uu = sums[:5]
        rank = sums[5] if self.strip_size else torch.zeros_like(uu)
        correction_m, correction_v = debiasing(1 - rates, context.step).unbind()
        v = torch.lerp(memory_NM[:, 0], gg, rates[1])
        rms = (v * correction_v + eps).sqrt()
        rms_max = torch.maximum(memory_NM[:, 1], rms)
        log_ratio = (rms / rms_max).log()
        noise = correction_m.square() / (2 * correction_m - 1)  # brings the momentum of noise alone to its size at last
        log_adam = ((mm + eps) / (v + eps) * (noise / correction_v)).log() / 2
        log_signal = log_adam.clamp(-FEATURE_BOUND, FEATURE_BOUND) - math.log(USUAL_SIGNAL)
        log_rms = (xx.nan_to_num() * fan + eps).log() / 2
        features = [
            log_adam + 1,
            gm / (gg * mm + eps).sqrt(),
            log_ratio + 1,
            2 * rank * per_polar.square() - is_matrix,
            log_rms / 2 + 0.5,
        ]
        per_direction = torch.where(is_matrix > 0, per_polar, uu.clamp(min=eps**0.5).rsqrt())
        log_size = (log_rms - math.log(LARGE_SIZE)).clamp(0, FEATURE_BOUND)
        return _Measured(torch.stack(features), log_signal, log_ratio, log_size, v, rms_max, per_direction)

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
        """Return the step: the direction of unit size plus decay, times the step size."""
        per_direction, decay, step_size = control.unbind()
        m = state["exp_avg"]
        direction = _adam(m, state["exp_avg_sq"]) if "exp_avg_sq" in state else facts.coupled
        direction = (direction * per_direction).clamp(-DIRECTION_BOUND, DIRECTION_BOUND)
        limit = torch.finfo(param.dtype).max ** 0.5  # infinite minus infinite would not be what it was
        return {}, torch.addcmul(direction, param.clamp(-limit, limit), decay) * (m.square().sign() * -step_size)

    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return the step size of every tensor."""
        return control_NC[:, 2]

    def _rates(self, factors: dict[str, Tensor]) -> Tensor:
        """Return the share of the gradient in the momentum, and of its square in the second moment, ``[2]``."""
        momentum, square = self.betas
        rates = [(1 - momentum) * factors["momentum"], (1 - square) * factors["second_moment"]]
        return torch.stack(rates).clamp(max=1)

    def _schedule(self, factors: dict[str, Tensor], context: StepContext, known: Tensor) -> Tensor:
        """Return the multiplier of the step over the run, 0-D; before learning at most 1."""
        longest = self.warmup_steps * factors["warmup"]
        warmup = torch.minimum(longest, torch.maximum(longest / 2, context.num_steps / 5))  # shorter in a short run
        warmup = (context.step / warmup).clamp(max=1)
        fraction = ((context.step - 1) / context.num_steps).clamp(max=1)
        cosine = torch.cos(math.pi / 2 * fraction).clamp(min=1e-3) ** factors["cosine_power"]
        odds = self.anytime_power * factors["anytime_power"]
        power = odds / (1 - self.anytime_power + odds)  # below 1: a run without an end goes on for ever
        anytime = factors["anytime_step"] * (1 + context.step / self.decay_steps) ** -power
        return warmup * torch.where(known, cosine, anytime)


@lru_cache(maxsize=64)
def _columns(
    shapes: tuple[TensorShape, ...], rows: StripRows | None, min_inputs: float, vector_inputs: float
) -> list[tuple[float, ...]]:
    """Return of each tensor 1 / size, root of the longer axis (0: vector), fan, is_matrix, crowding; three features."""
    columns = []
    for shape in shapes:
        strips = Strips.of(shape, rows)
        is_matrix, crowding = float(strips is not None), max((strips.number if strips else 0) / FREE_STRIPS, 1)
        numel, short = max(shape.numel, 1), max(min(shape.num_inputs, shape.num_outputs), 1)
        fan = max(shape.num_inputs, min_inputs) if shape.is_matrix else vector_inputs
        features = [
            (math.log(fan) - 4) / 2,
            (math.log(shape.num_outputs + 1) - 4) / 2,
            (math.log(shape.numel + 1) - 7) / 3,
        ]
        columns.append((1 / numel, is_matrix * math.sqrt(numel / short), fan, is_matrix, crowding, *features))
    return columns


def _factors(weights: Weights) -> dict[str, Tensor]:
    """Return the learned factors of all constants, 1 before learning; those of the six powers are not used."""
    logs = torch.stack([weights[f"constants.{name}"] for name in CONSTANTS])
    return dict(zip(CONSTANTS, (CONSTANT_SCALE * logs).exp().unbind(), strict=True))


def _control(weights: Weights, features_FN: Tensor, is_matrix: Tensor) -> list[Tensor]:
    """Return ``log_step, log_decay, log_mix`` of every tensor, ``[N]`` each."""
    x_FN = features_FN.clamp(-FEATURE_BOUND, FEATURE_BOUND)
    outputs_3N = linear(weights, "matrices", x_FN)
    outputs_3N = torch.where(is_matrix > 0, outputs_3N, torch.cat([linear(weights, "vectors", x_FN), outputs_3N[2:]]))
    return list((2 * torch.tanh(outputs_3N / 2)).unbind())


def _adam(m: Tensor, v: Tensor) -> Tensor:
    """Return Adam's direction but for a factor common to a tensor."""
    return m * v.clamp(min=tiny(v)).rsqrt()
