"""``apply_rule`` against the three phases called by hand on whole tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from cases import RULE_CASES
from helpers import context_at, learned
from torch import Tensor

from flatopt.rules import (
    Adam,
    Plan,
    RuleResult,
    State,
    StepContext,
    Strips,
    TensorFacts,
    TensorShape,
    Update,
    UpdateRule,
    Weights,
    apply_rule,
    batched_phases,
    plain_phases,
)

SHAPES: list[tuple[int, ...]] = [(4, 5), (), (3,), (0,), (2, 2, 2), (1,), (5, 4), (4, 5), (2, 0), (33, 34)]
"""The last has a strip of 33 rows, which is a batch of its own."""
NAMES = [
    "toy-mixer",
    "orthogonalized-momentum",
    "orthogonalized-momentum, strips of 3",
    "l2o-scale",
]
RULES = pytest.mark.parametrize("name", NAMES)


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
    states = [rule.fresh_state(weights, param.double()) for param in params]
    return Model(rule, weights, params, states, rule.init_shared(weights))


def make_grads(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def couple_by_hand(rule: UpdateRule, weights: Weights, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix with its strips coupled, and the sums over them, strip by strip."""
    strips = Strips.of(TensorShape.of(matrix.shape), rule.strip_rows)
    oriented = matrix.flatten(1).T if strips.is_tall else matrix.flatten(1)
    rows, terms = [], []
    for strip in oriented.split(strips.size):
        factor, term = rule.couple(weights, (strip @ strip.T)[None])
        rows.append(factor[0] @ strip)
        terms.append(torch.cat(term))
    coupled = torch.cat(rows)
    return (coupled.T if strips.is_tall else coupled).reshape(-1), torch.stack(terms).sum(0)


def step_by_hand(model: Model, grads: Sequence[Tensor], context: StepContext) -> RuleResult:
    """Call the phases on flat tensors, one at a time."""
    rule, weights = model.rule, model.weights
    rows = [[state[key].reshape(-1) for key in rule.memory] for state in model.states]
    memory = torch.stack([torch.cat(row) for row in rows])
    steps = torch.stack([state["step"] + 1 for state in model.states])
    given = rule.prepare(weights, steps, memory, model.shared, context)
    shapes = [TensorShape.of(param.shape) for param in model.params]
    observed, sums, facts = [], [], []
    for index, (param, grad, state) in enumerate(zip(model.params, grads, model.states, strict=True)):
        flat = {
            key: value.reshape(param.numel(), *value.shape[param.dim() :])
            for key, value in state.items()
            if key not in ("step", *rule.memory)
        }
        known = TensorFacts(steps[index].view(1), given[index][:, None], param.new_zeros(0))
        new, terms = rule.observe(weights, flat, grad.reshape(-1), param.reshape(-1), known, context)
        terms = [0 * grad.reshape(-1) if term is None else term for term in terms]
        terms = [term if isinstance(term, Tensor) else term[0] * term[1] for term in terms]
        observed.append({**flat, **new})
        more = rule.couple(weights, grad.new_zeros(1, 1, 1))[1] if rule.strip_rows is not None else []
        known, more = known._replace(coupled=torch.zeros_like(grad).reshape(-1)), [0 * term.sum() for term in more]
        if rule.strip_rows is not None and shapes[index].is_matrix and param.numel():
            matrix = rule.matrix(weights, observed[-1], grad.reshape(-1), known).view(param.shape)
            coupled, totals = couple_by_hand(rule, weights, matrix)
            known, more = known._replace(coupled=coupled), list(totals)
        facts.append(known)
        of_terms = [torch.atleast_1d(term.sum(-1)) for term in terms]
        sums.append(torch.cat([grad.new_zeros(0), *of_terms, *(total.view(1) for total in more)]))
    controls, memory, shared = rule.mix(weights, torch.stack(sums), memory, model.shared, context, shapes=shapes)
    deltas, states = [], []
    for index, (param, grad) in enumerate(zip(model.params, grads, strict=True)):
        flat, before = param.reshape(-1), observed[index]
        new, delta = rule.propose(
            weights, before, grad.reshape(-1), flat, controls[index][:, None], facts[index], context
        )
        deltas.append(delta.view(param.shape))
        final = {**before, **new, "step": steps[index]}
        sizes = [model.states[index][key].numel() for key in rule.memory]
        final |= dict(zip(rule.memory, memory[index].split(sizes), strict=True))
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
        actual = apply_rule(*model[:3], grads, *model[3:], context, Plan(**options))
        assert_close(actual, expected)
        model = forward(model, expected)


@RULES
@by_options
def test_updating_is_the_same_in_place(name, options):
    model, pure = make_model(name), make_model(name)
    count = len(model.params)
    update = Update(torch.linspace(0.5, 2, count).double(), torch.linspace(0, 1, count).double())
    sizes: list[Tensor] = []

    class Recorded(type(model.rule)):
        def step_size(self, *arguments):
            sizes.append(super().step_size(*arguments))
            return sizes[-1]

    rule = Recorded(**vars(model.rule))
    for step in range(1, 4):
        context, grads = context_at(step, 5, torch.float64), make_grads(step)
        expected = step_by_hand(pure, grads, context)
        storage = [{key: value.data_ptr() for key, value in state.items()} for state in model.states]
        result = apply_rule(rule, *model[1:3], grads, *model[3:], context, Plan(update=update, **options))
        assert result.deltas == []
        assert_close(result, expected, deltas=False)
        params = [
            param * (1 - lr * size * decay) + lr * delta
            for param, delta, lr, decay, size in zip(pure.params, expected.deltas, *update, sizes[-1], strict=True)
        ]
        torch.testing.assert_close(model.params, params, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(model.states, expected.states, rtol=1e-9, atol=1e-12)
        assert storage == [{key: value.data_ptr() for key, value in state.items()} for state in model.states]
        pure = pure._replace(params=params, states=expected.states, shared=expected.shared)
        model = model._replace(shared=result.shared)


class Anchored(Adam):
    """Keeps what it is given, and steps from what it kept a moment ago."""

    def init_state(self, weights, param, generator=None):
        return super().init_state(weights, param) | {"anchor": param + 1, "last": torch.zeros_like(param)}

    def observe(self, weights, state, grad, param, facts, context):
        return {"anchor": param}, []

    def propose(self, weights, state, grad, param, control, facts, context):
        return {"last": param}, state["anchor"] - grad


@by_options
@pytest.mark.parametrize("in_phases", [True, False])
def test_a_rule_may_keep_its_arguments(options, in_phases, monkeypatch):
    monkeypatch.setattr("flatopt.rules._stores.WRITES_ARE_KEPT", in_phases)
    params, grads = make_model("toy-mixer").params, make_grads(1)
    states = [Anchored().init_state({}, param) for param in params]
    plan = Plan(update=Update(torch.ones(len(params)).double(), None), **options)
    before = [param.clone() for param in params]
    apply_rule(Anchored(), {}, params, grads, states, {}, context_at(1, dtype=torch.float64), plan)
    for param, grad, old, state in zip(params, grads, before, states, strict=True):
        assert torch.equal(state["anchor"], old) and torch.equal(state["last"], old)
        torch.testing.assert_close(param, old + (old - grad))


@RULES
@pytest.mark.parametrize("pack_size", [0, 100])
def test_a_batch_of_models_is_each_of_them(name, pack_size):
    models = [make_model(name, seed) for seed in range(3)]
    rule = models[0].rule
    horizons = torch.tensor([5.0, math.inf, 9.0], dtype=torch.float64)

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
            Plan(pack_size=pack_size, phases=batched_phases(rule)),
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


@pytest.mark.parametrize(
    "name, cuts",
    [
        ("toy-mixer", [((4, 5), 0, 1)]),
        ("l2o-scale", [((4, 5), 1, 3)]),
        ("orthogonalized-momentum", [((5, 4), 0, 2)]),  # tall, along the sums
        ("orthogonalized-momentum", [((4, 5), 1, 3)]),  # wide, along the sums
        ("orthogonalized-momentum, strips of 3", [((6, 7), 0, 3)]),  # wide, between its strips
        ("orthogonalized-momentum, strips of 3", [((9, 6), 1, 3)]),  # tall, between its strips
        # Strips of 4, 64, 192 and 75 rows, four batches of them.
        ("orthogonalized-momentum", [((4, 5), 1, 3), ((128, 130), 0, 64), ((390, 384), 1, 192), ((300, 310), 1, 7)]),
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 12_000])
def test_shards_make_the_step_of_the_whole(name, cuts, chunk_size):
    """``cuts`` has, for each tensor, its shape, the axis along which it is cut in two, and where."""
    rule, weights, _, _, shared = make_model(name)
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape, _, _ in cuts]
    params, grads = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    states = [rule.init_state(weights, param) for param in params]
    context = context_at(1, dtype=torch.float64)
    alone = apply_rule(rule, weights, params, grads, states, shared, context)

    def first_strip(shape: tuple[int, ...], axis: int, at: int) -> int:
        cut = Strips.of(TensorShape.of(shape), rule.strip_rows)
        if cut is None or cut.is_tall == (axis == 0):
            return 0  # along the sums
        assert at % cut.size == 0
        return at // cut.size

    def shard(index: int, reduce) -> RuleResult:
        def parts(values: list[Tensor]) -> list[Tensor]:
            return [
                value.split([at, shape[axis] - at], axis)[index].contiguous()
                for value, (shape, axis, at) in zip(values, cuts, strict=True)
            ]

        kept = ("step", *rule.memory)
        values = {key: [state[key] for state in states] for key in states[0]}
        columns = {key: column if key in kept else parts(column) for key, column in values.items()}
        cut_states = [{key: column[tensor] for key, column in columns.items()} for tensor in range(len(cuts))]
        firsts = [first_strip(*cut) if index else 0 for cut in cuts]
        shapes = [TensorShape.of(shape) for shape, _, _ in cuts]
        plan = Plan(shapes=shapes, first_strips=firsts, reduce=reduce, chunk_size=chunk_size)
        return apply_rule(rule, weights, parts(params), parts(grads), cut_states, shared, context, plan)

    seen: list[list[Tensor]] = []
    for index in range(2):
        shard(index, lambda values: seen.append(values) or values)
    total = [one + other for one, other in zip(*seen, strict=True)]
    results = [shard(index, lambda _: total) for index in range(2)]
    for tensor, (_, axis, _) in enumerate(cuts):
        whole = torch.cat([result.deltas[tensor] for result in results], axis)
        torch.testing.assert_close(whole, alone.deltas[tensor], rtol=1e-9, atol=1e-12)
    alone_in_shard = shard(0, None).deltas
    for one, other in zip(alone_in_shard, results[0].deltas, strict=True):
        assert not torch.allclose(one, other, rtol=1e-3)  # the other has its say


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
    calls: list[int] = []

    plain = plain_phases(model.rule)

    def observe(total, in_place, weights, part, *others):
        calls.append(part.grad.numel())
        return plain.observe(total, in_place, weights, part, *others)

    phases = plain._replace(observe=observe)
    for options, expected in (
        ({}, [0, 1, 1, 3, 8, 20, 20, 20, 1122]),  # both empty tensors in one
        ({"pack_size": 8}, [13, 20, 20, 20, 1122]),
        ({"chunk_size": 8}, [0, 1, 1, 3, 8, *[8, 8, 4] * 3, *[8] * 140, 2]),
        ({"pack_size": 8, "chunk_size": 10}, [3, *[10] * 7, *[10] * 112, 2]),
    ):
        calls.clear()
        context = context_at(1, dtype=torch.float64)
        apply_rule(*model[:3], make_grads(0), *model[3:], context, Plan(phases=phases, **options))
        assert sorted(calls) == sorted(expected)


@pytest.mark.parametrize(("chunk_size", "expected"), [(None, [6]), (600, [2, 2, 2]), (100, [1] * 6)])
def test_gram_matrices_are_coupled_in_batches_no_larger_than_a_chunk(chunk_size, expected):
    rule = learned("orthogonalized-momentum").rule
    params = [torch.randn(16, 16, generator=torch.Generator().manual_seed(index)) for index in range(6)]
    states = [rule.init_state({}, param) for param in params]
    plain, calls = plain_phases(rule), []

    def couple(weights, grams):
        calls.append(len(grams))
        return plain.couple(weights, grams)

    plan = Plan(phases=plain._replace(couple=couple), chunk_size=chunk_size)
    apply_rule(rule, rule.init_weights(), params, params, states, {}, context_at(1), plan)
    assert calls == expected
