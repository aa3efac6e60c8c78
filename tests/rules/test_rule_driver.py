"""``apply_rule`` against the three phases called by hand on whole tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from cases import RULE_CASES, ToyMixer
from helpers import context_at, learned
from torch import Tensor

from flatopt.rules import Phases, RuleResult, State, StepContext, UpdateRule, Weights, apply_rule, observe_phase
from flatopt.rules._rule import plain_phases

SHAPES: list[tuple[int, ...]] = [(4, 5), (), (3,), (0,), (2, 2, 2), (1,)]
RULES = pytest.mark.parametrize("name", ["toy-mixer", "hierarchical-mlp", "l2o-scale"])


class Model(NamedTuple):
    rule: UpdateRule
    weights: Weights
    params: list[Tensor]
    states: list[State]
    shared: State


def make_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    rule = RULE_CASES[name].rule
    weights = {key: value.double() for key, value in learned(name, seed, perturbation=0.3).weights.items()}
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    states = [rule.init_state(weights, param.double()) for param in params]
    return Model(rule, weights, params, states, rule.init_shared(weights))


def make_grads(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def step_by_hand(model: Model, grads: Sequence[Tensor], context: StepContext) -> RuleResult:
    """Call the phases on flat tensors, one at a time."""
    rule, weights = model.rule, model.weights
    memory = torch.stack([state["memory"] for state in model.states])
    steps = torch.stack([state["step"] + 1 for state in model.states])
    given = rule.prepare(weights, steps, memory, model.shared, context)
    observed, sums = [], []
    for index, (param, grad, state) in enumerate(zip(model.params, grads, model.states, strict=True)):
        flat = {
            key: value.reshape(param.numel(), *value.shape[param.dim() :])
            for key, value in state.items()
            if key not in rule.tensor_state
        }
        constants = {"step": state["step"].view(1) + 1, "given": given[index][:, None]}
        new, terms = rule.observe(weights, flat | constants, grad.reshape(-1), param.reshape(-1), context)
        observed.append({**flat, **new, **constants})
        sums.append(torch.cat([grad.new_zeros(0), *(torch.atleast_1d(term.sum(-1)) for term in terms)]))
    controls, memory, shared = rule.mix(weights, torch.stack(sums), memory, model.shared, context)
    deltas, states = [], []
    for index, (param, grad) in enumerate(zip(model.params, grads, strict=True)):
        new, delta = rule.propose(
            weights, observed[index], grad.reshape(-1), param.reshape(-1), controls[index][:, None], context
        )
        deltas.append(delta.view(param.shape))
        final = {**observed[index], **new, "memory": memory[index]}
        states.append({key: final[key].view(old.shape) for key, old in model.states[index].items()})
    return RuleResult(deltas, states, shared)


def assert_close(one: RuleResult, other: RuleResult, *, deltas: bool = True) -> None:
    for a, b in zip(one if deltas else one[1:], other if deltas else other[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def forward(model: Model, result: RuleResult) -> Model:
    params = [param + delta for param, delta in zip(model.params, result.deltas, strict=True)]
    return model._replace(params=params, states=result.states, shared=result.shared)


OPTIONS = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 7},
    {"pack_size": 4},
    {"pack_size": 100},
    {"chunk_size": 6, "pack_size": 8},
    {"chunk_size": 3, "pack_size": 8},
]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


@RULES
@by_options
def test_driver_calls_the_phases_whatever_it_cuts_and_packs(name, options):
    model = make_model(name)
    for step in range(1, 4):
        context, grads = context_at(step, 5, torch.float64), make_grads(step)
        expected = step_by_hand(model, grads, context)
        actual = apply_rule(*model[:3], grads, *model[3:], context, **options)
        assert_close(actual, expected)
        model = forward(model, expected)


@RULES
@by_options
def test_emitting_is_the_same_in_place(name, options):
    model, pure = make_model(name), make_model(name)
    for step in range(1, 4):
        context, grads = context_at(step, 5, torch.float64), make_grads(step)
        expected = step_by_hand(pure, grads, context)
        deltas = [torch.full_like(param, math.nan) for param in model.params]
        sizes: dict[int, Tensor] = {}

        def emit(index: int, where: slice, delta: Tensor, step_size: Tensor, deltas=deltas, sizes=sizes) -> None:
            deltas[index].view(-1)[where] = delta
            sizes[index] = step_size

        storage = [{key: value.data_ptr() for key, value in state.items()} for state in model.states]
        result = apply_rule(*model[:3], grads, *model[3:], context, emit=emit, **options)
        assert result.deltas == []
        assert_close(result, expected, deltas=False)
        torch.testing.assert_close(deltas, expected.deltas, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(model.states, expected.states, rtol=1e-9, atol=1e-12)
        assert storage == [{key: value.data_ptr() for key, value in state.items()} for state in model.states]
        assert len({float(size) for size in sizes.values()}) > 1 and all(size.dim() == 0 for size in sizes.values())
        pure = forward(pure, expected)
        for param, delta in zip(model.params, deltas, strict=True):
            param.add_(delta)
        model = model._replace(shared=result.shared)


@RULES
@pytest.mark.parametrize("pack_size", [0, 100])
def test_a_batch_of_models_is_each_of_them(name, pack_size):
    models = [make_model(name, seed) for seed in range(3)]
    rule = models[0].rule
    horizons = torch.tensor([5.0, math.inf, 9.0], dtype=torch.float64)

    def observe(weights, state, grad, param, context, total):
        return torch.vmap(partial(observe_phase, rule, total=total))(weights, state, grad, param, context)

    phases = Phases(observe, *map(torch.vmap, (rule.prepare, rule.mix, rule.propose)), batch_dims=1)

    def stack(trees):
        if isinstance(trees[0], Tensor):
            return torch.stack(trees)
        if isinstance(trees[0], dict):
            return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
        return [stack(list(each)) for each in zip(*trees, strict=True)]

    batch = [stack([model[index] for model in models]) for index in range(1, 5)]
    for step in range(1, 4):
        grads = [make_grads(10 * step + seed) for seed in range(3)]
        now = torch.full((3,), float(step), dtype=torch.float64)
        weights, params, states, shared = batch
        result = apply_rule(
            rule,
            weights,
            params,
            stack(grads),
            states,
            shared,
            StepContext(now, horizons),
            pack_size=pack_size,
            phases=phases,
        )
        each = [
            step_by_hand(model, grads[index], StepContext(now[index], horizons[index]))
            for index, model in enumerate(models)
        ]
        assert_close(result, RuleResult(*(stack([one[index] for one in each]) for index in range(3))))
        models = [forward(model, one) for model, one in zip(models, each, strict=True)]
        batch = [
            weights,
            [param + delta for param, delta in zip(params, result.deltas, strict=True)],
            result.states,
            result.shared,
        ]


def test_sums_of_shards_make_the_step_of_the_whole():
    rule = ToyMixer()
    whole = make_model("toy-mixer")
    context, grads = context_at(1, dtype=torch.float64), make_grads(0)
    expected = apply_rule(*whole[:3], grads, *whole[3:], context)
    halves = [slice(0, 2), slice(2, 4)]
    shards = [
        ([whole.params[0][half].contiguous()], [grads[0][half].contiguous()], whole.states[0], half) for half in halves
    ]

    def cut(state: State, half: slice) -> State:
        return {key: value if key in rule.tensor_state else value[half] for key, value in state.items()}

    alone = apply_rule(rule, whole.weights, whole.params[:1], grads[:1], whole.states[:1], whole.shared, context)
    seen: list[Tensor] = []
    for params, part, state, half in shards:
        apply_rule(
            rule, whole.weights, params, part, [cut(state, half)], whole.shared, context,
            all_reduce=lambda summaries: seen.append(summaries) or summaries,
        )  # fmt: skip
    assert [tuple(summaries.shape) for summaries in seen] == [(1, 3), (1, 3)]
    total = seen[0] + seen[1]
    for params, part, state, half in shards:
        result = apply_rule(
            rule, whole.weights, params, part, [cut(state, half)], whole.shared, context, all_reduce=lambda _: total
        )
        torch.testing.assert_close(result.deltas[0], alone.deltas[0][half], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(alone.deltas[0], expected.deltas[0], rtol=1e-3)  # the other tensors have their say


@RULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_on_in_float32(name, dtype):
    model = make_model(name, dtype=dtype)
    weights = {key: value.float() for key, value in model.weights.items()}
    wide = [param.float() for param in model.params]
    states = [model.rule.init_state(weights, param) for param in wide]
    shared, context, grads = model.rule.init_shared(weights), context_at(1), [grad.to(dtype) for grad in make_grads(0)]
    half = apply_rule(model.rule, weights, model.params, grads, states, shared, context)
    full = apply_rule(model.rule, weights, wide, [grad.float() for grad in grads], states, shared, context)
    assert {delta.dtype for delta in half.deltas} == {torch.float32}
    for one, other in zip(half, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_calls_are_as_few_as_cutting_and_packing_allow():
    model = make_model("toy-mixer")
    sizes = [math.prod(shape) for shape in SHAPES]  # 20, 1, 3, 0, 8, 1
    calls: list[int] = []

    def observe(weights, state, grad, param, context, total):
        calls.append(grad.numel())
        return observe_phase(model.rule, weights, state, grad, param, context, total)

    phases = plain_phases(model.rule)._replace(observe=observe)
    for options, expected in (
        ({}, sizes),
        ({"pack_size": 8}, [13, 20]),
        ({"chunk_size": 8}, [8, 8, 4, 1, 3, 0, 8, 1]),
        ({"pack_size": 8, "chunk_size": 10}, [4, 9, 10, 10]),
    ):
        calls.clear()
        context = context_at(1, dtype=torch.float64)
        apply_rule(*model[:3], make_grads(0), *model[3:], context, phases=phases, **options)
        assert sorted(calls) == sorted(expected)
