"""Averages of the parameters: ``FlatOpt.eval`` and ``FlatOpt.train``, where the length of the run is not known."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Sequence

import pytest
import torch
from helpers import assert_same_state, learned, make_params, set_grads, step_with
from torch import Tensor

from flatopt import FlatOpt
from flatopt.rules import RULES, OrthogonalizedMomentum, average_weight

POWER = OrthogonalizedMomentum.average_power


def make(num_steps: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], FlatOpt]:
    params = make_params("network", dtype=dtype)
    return params, FlatOpt(params, num_steps=num_steps)


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def same(params: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(param, other) for param, other in zip(params, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eval_shows_the_mean_of_all_steps_with_polynomial_weights_and_train_takes_it_back(dtype: torch.dtype) -> None:
    params, opt = make(dtype=dtype)
    history = []
    for seed in range(12):
        step_with(opt, params, seed)
        history.append(values(params))
    opt.eval()
    # Unrolled: the parameters of step i weigh w_i, times what all later steps leave of it.
    shares = torch.ones(len(history), dtype=torch.float64)
    for index in range(len(history)):
        weight = (POWER + 1) / (POWER + index + 1)
        shares[:index] *= 1 - weight
        shares[index] = weight
    assert shares.sum() == pytest.approx(1)
    assert shares[11] / shares[5] == pytest.approx(math.comb(19, 8) / math.comb(13, 8))  # about (12 / 6)^8
    for index, param in enumerate(params):
        expected = sum(share * step[index].double() for share, step in zip(shares, history, strict=True))
        torch.testing.assert_close(param.detach(), expected.to(dtype), rtol=1e-5, atol=1e-6)
    assert not same(params, history[-1])
    opt.train()
    assert same(params, history[-1])


def test_both_may_be_called_at_any_time_and_twice() -> None:
    params, opt = make()
    before = values(params)
    for call in (opt.train, opt.eval, opt.eval, opt.train):  # there is no average yet
        call()
    assert same(params, before) and not opt.state
    for seed in range(3):
        step_with(opt, params, seed)
    last = values(params)
    opt.eval()
    shown = values(params)
    opt.eval()
    assert same(params, shown) and not same(params, last)
    opt.train()
    opt.train()
    assert same(params, last)


def test_looking_at_the_averages_does_not_change_the_run() -> None:
    (params, opt), (others, other) = make(), make()
    for seed in range(6):
        for one, its_params in ((opt, params), (other, others)):
            step_with(one, its_params, seed)
        other.eval()
        other.train()
    assert same(params, others)
    assert_same_state(opt, other)


def test_a_wrapper_may_keep_what_it_likes_in_the_state() -> None:
    params, opt = make()
    opt.state["calls"] = 3  # type: ignore[index]
    step_with(opt, params, 0)
    opt.eval()
    opt.train()


def test_a_step_on_averages_is_refused_and_changes_nothing() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    step_with(opt, params, 1)
    opt.eval()
    before, state = values(params), copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before"):
        step_with(opt, params, 2)
    assert same(params, before)
    for index, saved in state["state"].items():
        assert all(torch.equal(value, opt.state_dict()["state"][index][key]) for key, value in saved.items())
    opt.train()
    step_with(opt, params, 2)


def test_a_known_length_needs_no_average() -> None:
    params, opt = make(num_steps=3)
    for seed in range(3):
        step_with(opt, params, seed)
    last = values(params)
    opt.eval()
    assert same(params, last) and all("param_average" not in state for state in opt.state.values())


def test_averages_follow_what_is_known_of_the_length() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    step_with(opt, params, 1)
    assert all("param_average" in state for state in opt.state.values())
    opt.set_num_steps(3)
    step_with(opt, params, 2)
    assert all("param_average" not in state for state in opt.state.values())
    with pytest.warns(UserWarning, match="beyond num_steps=3"):
        step_with(opt, params, 3)
    expected = values(params)  # a new average, from where the run stands
    for seed in (4, 5):
        step_with(opt, params, seed)
        expected = [
            torch.lerp(one, param, average_weight(POWER, seed + 1))
            for one, param in zip(expected, values(params), strict=True)
        ]
    opt.eval()
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value)


@pytest.mark.parametrize("name", sorted(RULES.keys() - {OrthogonalizedMomentum.name}))
def test_published_rules_keep_none(name: str) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=learned(RULES[name]()))
    step_with(opt, params, 0)
    step_with(opt, params, 1)
    last = values(params)
    opt.eval()
    assert same(params, last) and all("param_average" not in state for state in opt.state.values())


def test_what_is_not_finite_stays_and_spreads_nowhere() -> None:
    param = torch.nn.Parameter(torch.ones(4, 4))
    with torch.no_grad():
        param[0, 0], param[1, 1] = -math.inf, math.nan
    opt = FlatOpt([param])
    for seed in range(3):
        set_grads([param], seed)
        param.grad[0, 0] = param.grad[1, 1] = 0.0
        opt.step()
    last = param.detach().clone()
    opt.eval()
    finite = param.isfinite()
    assert torch.equal(param[finite], opt.state[param]["param_average"][finite]) and not torch.equal(param, last)
    assert param[0, 0] == -math.inf and param[1, 1].isnan() and int(param.isfinite().sum()) == 14
    opt.train()
    torch.testing.assert_close(param.detach(), last, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_averages_are_kept_in_the_dtype_of_the_state(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.zeros(4, 6, dtype=dtype))
    opt = FlatOpt([param])
    for seed in range(4):
        set_grads([param], seed)
        opt.step()
    assert opt.state[param]["param_average"].dtype == torch.float32
    last = param.detach().clone()
    opt.eval()
    assert param.dtype == dtype and not torch.equal(param, last)
    opt.train()
    assert torch.equal(param, last)


@pytest.mark.parametrize("shows_averages", [False, True])
@pytest.mark.parametrize("num_steps", [None, 20])
def test_a_checkpoint_goes_on_exactly_whichever_stands_in_the_model(
    shows_averages: bool, num_steps: int | None
) -> None:
    params, opt = make(num_steps)
    for seed in range(4):
        step_with(opt, params, seed)
    if shows_averages:
        opt.eval()
    buffer = io.BytesIO()
    torch.save({"model": values(params), "optimizer": opt.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    others, other = make(num_steps)
    with torch.no_grad():
        for param, value in zip(others, saved["model"], strict=True):
            param.copy_(value)
    other.load_state_dict(saved["optimizer"])
    for one, its_params in ((opt, params), (other, others)):
        one.train()
        step_with(one, its_params, 4)
    assert same(params, others)
    assert_same_state(opt, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_know_what_stands_in_the_parameters(copied) -> None:
    params, opt = make()
    step_with(opt, params, 0)
    step_with(opt, params, 1)
    opt.eval()
    other = copied(opt)
    opt.train()
    other.train()
    assert same(params, other.param_groups[0]["params"])


def test_a_state_without_an_average_is_taken_and_one_of_another_shape_is_refused() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    state = copy.deepcopy(opt.state_dict())
    del state["state"][0]["param_average"]
    opt.load_state_dict(state)
    step_with(opt, params, 1)
    assert torch.equal(opt.state[params[0]]["param_average"], params[0])  # it begins where the run stands
    state["state"][0]["param_average"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"state 'param_average' of parameter 0 of group 0 has shape \[7\]"):
        opt.load_state_dict(state)


def test_a_parameter_that_no_longer_learns_is_shown_as_it_is() -> None:
    params, opt = make()
    for seed in range(60):
        step_with(opt, params, seed)
    frozen = params[0].detach().clone()
    for seed in range(60, 600):
        set_grads(params, seed)
        params[0].grad = None
        opt.step()
    opt.eval()
    torch.testing.assert_close(params[0].detach(), frozen)
    assert not torch.equal(params[1], opt.state[params[1]]["param_iterate"])


def test_a_length_that_becomes_known_ends_all_averages_at_once() -> None:
    params, opt = make()
    for seed in range(3):
        step_with(opt, params, seed)
    last = values(params)
    opt.set_num_steps(9)
    opt.eval()
    assert same(params, last)
    for group in opt.param_groups:
        group["num_steps"] = None
    step_with(opt, params, 3)
    for group in opt.param_groups:
        group["num_steps"] = 9
    set_grads(params, 4)
    params[0].grad = None
    opt.step()
    assert all("param_average" not in state for state in opt.state.values())


def test_no_closure_runs_on_averages() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    opt.eval()
    added = torch.nn.Parameter(torch.ones(3, 3))
    opt.add_param_group({"params": [added]})
    with pytest.raises(RuntimeError, match="hold averages"):
        opt.step(lambda: pytest.fail("called"))


def test_a_state_of_averages_without_the_parameters_is_refused() -> None:
    """As distributed checkpoints make it, which load only what a fresh state has."""
    params, opt = make()
    step_with(opt, params, 0)
    opt.eval()
    state = copy.deepcopy(opt.state_dict())
    for one in state["state"].values():
        del one["param_iterate"]
    _, other = make()
    with pytest.raises(ValueError, match=r"save distributed checkpoints after optimizer.train\(\)"):
        other.load_state_dict(state)
    assert not other.state
