"""What every rule promises, for every row of ``RULE_CASES``."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import OPTIMIZEES, RULE_CASES
from helpers import assert_same_state, context_at, learned, make_params, set_grads, step_with, train, unroll
from torch import Tensor

from flatopt import FlatOpt, LearnedRule
from flatopt.rules import Plan, Update, apply_rule

by_rule = pytest.mark.parametrize("name", RULE_CASES)
by_optimizee = pytest.mark.parametrize("optimizee", OPTIMIZEES)


def random_grads(params: list[Tensor], num_steps: int, scale: float = 1.0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [scale * torch.randn(param.shape, generator=generator, dtype=param.dtype) for param in params]
        for _ in range(num_steps)
    ]


def random_rule(name: str, seed: int = 0) -> LearnedRule:
    return learned(name, seed, perturbation=0.1)


def weights_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in random_rule(name, seed).weights.items()}


def close(one: list[Tensor], other: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@by_rule
@by_optimizee
@pytest.mark.parametrize("num_steps", [None, 12])
def test_optimizer_takes_the_steps_of_the_rule(name: str, optimizee: str, num_steps: int | None) -> None:
    params = make_params(optimizee, dtype=torch.float64)
    # An empty tensor has no gradient that is not zero, so the optimizer leaves it out; the rule alone would count it.
    params = [param for param in params if param.numel()]
    grads_of_step = random_grads(params, 6)
    expected, states, _ = unroll(
        RULE_CASES[name].rule, weights_of(name, torch.float64), params, grads_of_step, num_steps or float("inf")
    )

    opt = FlatOpt(params, pretrained=random_rule(name), num_steps=num_steps)
    for grads in grads_of_step:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        opt.step()

    close([param.detach() for param in params], expected, rtol=1e-12, atol=1e-14)
    for param, state in zip(params, states, strict=True):
        for key, value in state.items():
            torch.testing.assert_close(opt.state[param][key], value, rtol=1e-12, atol=1e-14)


@by_rule
@by_optimizee
def test_cutting_and_packing_change_nothing(name: str, optimizee: str) -> None:
    rule, weights = RULE_CASES[name].rule, weights_of(name, torch.float64)
    params = make_params(optimizee, dtype=torch.float64)
    states, shared = [rule.fresh_state(weights, param.detach()) for param in params], rule.init_shared(weights)
    (grads,) = random_grads(params, 1)
    arguments = (rule, weights, [param.detach() for param in params], grads, states, shared)
    context = context_at(1, dtype=torch.float64)
    whole = apply_rule(*arguments, context)
    for options in ({"chunk_size": 5}, {"pack_size": 100}, {"chunk_size": 7, "pack_size": 6}):
        parts = apply_rule(*arguments, context, Plan(**options))
        close(whole.deltas, parts.deltas, rtol=1e-10, atol=1e-13)
        for one, other in zip(whole.states, parts.states, strict=True):
            close(list(one.values()), list(other.values()), rtol=1e-10, atol=1e-13)


@by_rule
@by_optimizee
def test_in_place_equals_pure(name: str, optimizee: str) -> None:
    rule, weights = RULE_CASES[name].rule, weights_of(name, torch.float64)
    params = [param.detach() for param in make_params(optimizee, dtype=torch.float64)]
    states, shared = [rule.fresh_state(weights, param) for param in params], rule.init_shared(weights)
    (grads,) = random_grads(params, 1)
    context = context_at(1, dtype=torch.float64)
    pure = apply_rule(rule, weights, params, grads, states, shared, context)
    owned = [{key: value.clone() for key, value in state.items()} for state in states]
    moved = [param.clone() for param in params]
    update = Update(torch.ones(len(params)).double(), torch.zeros(len(params)).double())
    apply_rule(rule, weights, moved, grads, owned, shared, context, Plan(update=update, chunk_size=5))
    close(moved, [param + delta for param, delta in zip(params, pure.deltas, strict=True)], rtol=1e-10, atol=1e-13)
    for one, other in zip(owned, pure.states, strict=True):
        close(list(one.values()), list(other.values()), rtol=1e-10, atol=1e-13)


@by_rule
def test_vmap_over_problems_equals_a_loop(name: str) -> None:
    rule = RULE_CASES[name].rule
    weights = [weights_of(name, torch.float64, seed) for seed in range(3)]
    problems = [[param.detach() for param in make_params("network", seed, torch.float64)] for seed in range(3)]
    grads = [[10**seed * param.cos() for param in params] for seed, params in enumerate(problems)]
    context = context_at(2, 10.0, torch.float64)

    def step(weights: dict[str, Tensor], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        states = [rule.fresh_state(weights, param) for param in params]
        return apply_rule(rule, weights, params, grads, states, rule.init_shared(weights), context).deltas

    looped = [step(*arguments) for arguments in zip(weights, problems, grads, strict=True)]
    batched = torch.vmap(step)(
        {key: torch.stack([each[key] for each in weights]) for key in weights[0]},
        [torch.stack(tensors) for tensors in zip(*problems, strict=True)],
        [torch.stack(tensors) for tensors in zip(*grads, strict=True)],
    )
    close(batched, [torch.stack(tensors) for tensors in zip(*looped, strict=True)], rtol=1e-10, atol=1e-13)


@by_rule
def test_rule_does_not_modify_what_it_is_given(name: str) -> None:
    rule, weights = RULE_CASES[name].rule, weights_of(name)
    params = [param.detach() for param in make_params("network")]
    arguments = (
        weights,
        params,
        random_grads(params, 1)[0],
        [rule.fresh_state(weights, param) for param in params],
        rule.init_shared(weights),
        context_at(1),
    )
    before = copy.deepcopy(arguments)
    apply_rule(rule, *arguments)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


@by_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resuming_in_the_middle_is_bit_exact(name: str, dtype: torch.dtype) -> None:
    def fresh() -> tuple[list[Tensor], FlatOpt]:
        params = make_params("network", dtype=dtype)
        return params, FlatOpt(params, pretrained=random_rule(name), num_steps=8, weight_decay=0.1)

    params, opt = fresh()
    for seed in range(4):
        step_with(opt, params, seed)
    file = io.BytesIO()
    torch.save({"params": params, "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed, other = fresh()
    with torch.no_grad():
        for param, value in zip(resumed, saved["params"], strict=True):
            param.copy_(value)
    other.load_state_dict(saved["opt"])
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for state in other.state.values() for value in state.values()} <= {compute, torch.int64}
    assert_same_state(opt, other)
    for seed in range(4, 8):
        step_with(opt, params, seed)
        step_with(other, resumed, seed)
    assert_same_state(opt, other)
    assert all(torch.equal(one, other) for one, other in zip(params, resumed, strict=True))


@by_rule
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_the_same_way(name: str, copier: object) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=random_rule(name), num_steps=8)
    step_with(opt, params, 0)
    copied, other = copier((params, opt))  # type: ignore[operator]
    assert other.learned.rule == opt.learned.rule
    step_with(opt, params, 1)
    assert not torch.equal(params[1], copied[1])
    step_with(other, copied, 1)
    assert_same_state(opt, other)
    assert all(torch.equal(one, other) for one, other in zip(params, copied, strict=True))


@by_rule
def test_absent_gradients_are_left_alone(name: str) -> None:
    params = make_params("network")
    params.append(torch.nn.Parameter(torch.ones(2), requires_grad=False))
    opt = FlatOpt(params, pretrained=random_rule(name))
    set_grads(params[:2], 0)
    before = [param.detach().clone() for param in params]
    opt.step()
    moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert moved == [True, True, False, False, False]
    assert [param in opt.state for param in params] == moved


@by_rule
def test_zero_learning_rate_moves_nothing(name: str) -> None:
    params = make_params("network")
    opt = FlatOpt(params, 0.0, pretrained=random_rule(name), weight_decay=0.5)
    before = [param.detach().clone() for param in params]
    for seed in range(3):
        step_with(opt, params, seed)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert all(float(opt.state[param]["step"]) == 3 for param in params)


@by_rule
def test_coordinates_without_a_gradient_do_not_move(name: str) -> None:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    opt = FlatOpt([param], pretrained=random_rule(name), num_steps=20)
    before = param.detach().clone()
    for seed in range(5):
        set_grads([param], seed)
        param.grad[1] = 0
        opt.step()
    assert torch.equal(param[1], before[1])
    assert not torch.equal(param[0], before[0])


@by_rule
@by_optimizee
def test_runs_are_deterministic(name: str, optimizee: str) -> None:
    runs = []
    for _ in range(2):
        params = make_params(optimizee)
        losses = train(FlatOpt(params, pretrained=random_rule(name), num_steps=5), params, optimizee, 5)
        runs.append((losses, [param.detach() for param in params]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, case in RULE_CASES.items() if case.descends_untrained])
@by_optimizee
def test_loss_goes_down(name: str, optimizee: str) -> None:
    params = make_params(optimizee)
    losses = train(FlatOpt(params, pretrained=learned(name), num_steps=30), params, optimizee, 30)
    assert losses[-1] < losses[0]


@by_rule
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_stay_bounded_for_any_scale_of_gradients(name: str, scale: float, dtype: torch.dtype) -> None:
    params = make_params("network", dtype=dtype)
    opt = FlatOpt(params, pretrained=random_rule(name))
    for seed in range(8):
        before = [param.detach().float() for param in params]
        step_with(opt, params, seed, min(1e3 * scale, 1e12) if seed == 5 else scale)
        for param, old in zip(params, before, strict=True):
            step = (param.detach().float() - old).abs().max()
            rounding = 2**-8 * old.abs().max() if dtype == torch.bfloat16 else 0
            assert step <= RULE_CASES[name].max_step + rounding
            assert torch.isfinite(param).all()
            for value in opt.state[param].values():
                assert torch.isfinite(value).all()


@by_rule
def test_one_element_and_huge_ratios_are_finite(name: str) -> None:
    params = [torch.nn.Parameter(torch.tensor(value)) for value in (0.0, 1e-20, 1e10)]
    opt = FlatOpt(params, pretrained=random_rule(name), num_steps=6)
    for scale in (1e-18, 1e12, 1e-18, 0.0, 1.0, 1.0):
        step_with(opt, params, 0, scale)
    assert all(torch.isfinite(param) for param in params)
