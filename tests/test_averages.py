"""Averages of the parameters: ``FlatOpt.eval`` and ``FlatOpt.train``, and how a run of known length ends."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import assert_same_state, learned, make_params, set_grads, step_with
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from flatopt import FlatOpt
from flatopt.rules import RULES, OrthogonalizedMomentum, PolynomialAverage

RULE = OrthogonalizedMomentum.average
POWER = RULE.power


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_weights_that_train_would_overwrite_are_told(dtype: torch.dtype) -> None:
    params, opt = make(dtype=dtype)
    for seed in range(3):
        step_with(opt, params, seed)
    last = values(params)
    opt.eval()
    shown = values(params)
    with torch.no_grad():
        params[1].add_(1)  # weights are loaded, say
    with pytest.warns(UserWarning, match="parameter 1 of group 0 has changed since eval") as caught:
        opt.train()
    assert same(params, last) and len(caught) == 1 and caught[0].filename == __file__
    opt.eval()
    with torch.no_grad():
        params[1].add_(1)
        params[1].copy_(shown[1])  # as a moving average that evaluates puts back what it found
    opt.train()


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


def test_autocast_casts_anew_what_changed() -> None:
    model = torch.nn.Linear(3, 2)
    opt = FlatOpt(model.parameters(), lr=100.0)  # so that half precision tells the average from the last parameters
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        step_with(opt, list(model.parameters()), seed)
    with torch.autocast("cpu"), torch.no_grad():  # one context, in which the weights are cast once
        seen = []
        for change in (opt.train, opt.eval, opt.train):
            change()
            seen.append(model(x))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


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


def mean_of(history: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return the average of the parameters after every step, as the optimizer has it."""
    average = history[0]
    for step, values in enumerate(history, 1):
        if step % RULE.stride(step) == 0:
            weight = RULE.weight(step / RULE.stride(step))
            average = [torch.lerp(one, value, weight) for one, value in zip(average, values, strict=True)]
    return average


def test_a_run_of_known_length_ends_on_its_average() -> None:
    params, opt = make(num_steps=40)
    history = []
    for seed in range(40):
        step_with(opt, params, seed)
        if seed + 1 == 38:  # the landing begins after it
            before = copy.deepcopy((params, opt))
        history.append(values(params))
    assert all(torch.equal(param, opt.state[param]["param_average"]) for param in params)
    opt.eval()
    assert same(params, history[-1])
    opt.train()
    # Once more by hand: the 39th step goes half of the way, the last one all of it.
    assert [RULE.landing_share(step, 40) for step in (38, 39, 40)] == pytest.approx([0, 0.5, 1])
    params, opt = before
    history = history[:38]
    for seed, share in ((38, 0.5), (39, 1.0)):
        opt.set_num_steps(40)
        deltas = steps_without_landing(opt, params, seed)
        history.append(deltas)
        average = mean_of(history)
        for param, value, mean in zip(params, deltas, average, strict=True):
            torch.testing.assert_close(param.detach(), torch.lerp(value, mean, share), rtol=1e-5, atol=1e-6)


def steps_without_landing(opt: FlatOpt, params: list[Tensor], seed: int) -> list[Tensor]:
    """Take a step; return where the rule alone leads, from a copy whose average is out of the way."""
    alone, other = copy.deepcopy((params, opt))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolynomialAverage, "landing_share", lambda self, step, num_steps: 0.0)
        step_with(other, alone, seed)
    step_with(opt, params, seed)
    return values(alone)


def test_the_average_takes_in_fewer_steps_as_the_run_goes_on() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = FlatOpt([param])
    history = []
    for seed in range(1100):
        step_with(opt, [param], seed)
        history.append(values([param]))
    assert [RULE.stride(step) for step in (1, 255, 256, 511, 512, 1024)] == [1, 1, 2, 2, 4, 8]
    torch.testing.assert_close(opt.state[param]["param_average"], mean_of(history)[0])
    # It stands for the mean over every step.
    every = [(index + 1.0) ** POWER for index in range(len(history))]
    whole = sum(weight / sum(every) * step[0].double() for weight, step in zip(every, history, strict=True))
    steps = torch.stack([step[0] for step in history[-100:]])
    torch.testing.assert_close(opt.state[param]["param_average"].double(), whole, rtol=0, atol=float(steps.std()) / 5)


@pytest.mark.parametrize("num_steps", [None, 1000])
@pytest.mark.parametrize("first", [300, 960])
def test_a_parameter_that_learns_after_all_others_has_an_average_of_its_own(first: int, num_steps: int | None) -> None:
    """The clock of the run goes on, and its average counts its own steps."""
    early, late = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    opt = FlatOpt([early, late], num_steps=num_steps)
    for seed in range(first):
        step_with(opt, [early], seed)
    early.grad, history = None, []
    for _ in range(40):
        late.grad = torch.ones(2, 2)
        opt.step()
        history.append(values([late]))
    assert history[-1][0].max() < 0.9  # nothing pulls it back
    if first + len(history) == num_steps:
        assert torch.equal(opt.state[late]["param_average"], late)
    else:
        torch.testing.assert_close(opt.state[late]["param_average"], mean_of(history)[0])


@pytest.mark.parametrize("turns", [[[0], [1]] * 50, [[0]] * 40 + [[1]] * 30 + [[0, 1]] * 30])
def test_a_run_whose_parts_take_turns_ends_on_its_averages(turns: list[list[int]]) -> None:
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    opt = FlatOpt(params, num_steps=len(turns))
    for seed, own in enumerate(turns):
        opt.zero_grad()
        step_with(opt, [params[index] for index in own], seed)
    assert opt.param_groups[0]["steps_taken"] == len(turns) > opt.state[params[0]]["step"]
    for index in turns[-1]:
        assert torch.equal(opt.state[params[index]]["param_average"], params[index])
    with pytest.warns(UserWarning, match=f"step {len(turns) + 1} is beyond num_steps={len(turns)}"):
        step_with(opt, params, 0)


def test_a_step_without_any_group_does_nothing() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    del opt.param_groups[0]
    opt.step()


def test_a_run_that_starts_anew_counts_from_its_first_step() -> None:
    params, opt = make()
    start = copy.deepcopy(opt.state_dict())
    for seed in range(3):
        step_with(opt, params, seed)
    for begin in (opt.state.clear, partial(opt.load_state_dict, start)):
        begin()
        for seed in (1, 2):
            step_with(opt, params, seed)
            assert opt.param_groups[0]["steps_taken"] == seed


def test_a_parameter_that_joins_late_is_not_shown_as_it_was() -> None:
    early, late = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    opt = FlatOpt([early, late])
    for seed in range(600):
        step_with(opt, [early], seed)
    step_with(opt, [early, late], 600)
    assert torch.equal(opt.state[late]["param_average"], late) and not torch.equal(late, torch.ones(2, 2))


def test_a_parameter_that_another_one_replaced_is_left_alone() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    params[0].data, params[0].grad = torch.ones(7), None
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    before = values(params[1:])
    opt.step()
    assert not any(torch.equal(param, old) for param, old in zip(params[1:], before, strict=True))


def test_a_parameter_without_a_gradient_does_not_land() -> None:
    params, opt = make(num_steps=20)
    for seed in range(19):
        step_with(opt, params, seed)
    last = params[0].detach().clone()
    set_grads(params, 19)
    params[0].grad = None
    opt.step()
    assert torch.equal(params[0], last)
    assert torch.equal(params[1], opt.state[params[1]]["param_average"])


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_group_without_a_learning_rate_does_not_land(lr: float | Tensor) -> None:
    params = make_params("network")
    opt = FlatOpt([{"params": params[:1]}, {"params": params[1:]}], num_steps=10)
    for seed in range(9):
        step_with(opt, params, seed)
    opt.param_groups[0]["lr"] = lr
    last = values(params)
    step_with(opt, params, 9)
    assert torch.equal(params[0], last[0])
    assert torch.equal(params[1], opt.state[params[1]]["param_average"])


def test_the_average_goes_on_whatever_is_known_of_the_length() -> None:
    params, opt = make()
    history = []
    for seed, num_steps in enumerate([None, None, 40, 40, None, 40, None]):
        opt.set_num_steps(num_steps)
        step_with(opt, params, seed)
        history.append(values(params))
    opt.eval()
    for param, mean in zip(params, mean_of(history), strict=True):
        torch.testing.assert_close(param.detach(), mean)


def test_a_run_goes_on_from_its_average_when_its_length_is_over() -> None:
    params, opt = make(num_steps=3)
    for seed in range(3):
        step_with(opt, params, seed)
    landed = values(params)
    with pytest.warns(UserWarning, match="beyond num_steps=3"):
        step_with(opt, params, 3)
    last = values(params)
    assert not same(params, landed)
    opt.eval()
    for param, one, other in zip(params, landed, last, strict=True):
        torch.testing.assert_close(param.detach(), torch.lerp(one, other, RULE.weight(4.0)))


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


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("is_ready", [False, True])
def test_a_distributed_checkpoint_of_averages_is_read_after_eval(is_ready: bool, tmp_path: Path) -> None:
    params, opt = make()
    others, fresh_opt = make()
    model, fresh = torch.nn.ParameterList(params), torch.nn.ParameterList(others)
    for seed in range(3):
        step_with(opt, params, seed)
    opt.eval()
    dcp.save({"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    if is_ready:
        get_optimizer_state_dict(fresh, fresh_opt)
        fresh_opt.eval()
    state = {"model": fresh.state_dict(), "opt": get_optimizer_state_dict(fresh, fresh_opt)}
    dcp.load(state, checkpoint_id=tmp_path)
    if not is_ready:
        with pytest.raises(ValueError, match=r"to read this one, call get_optimizer_state_dict\(model, optimizer\)"):
            set_optimizer_state_dict(fresh, fresh_opt, state["opt"])
        return
    set_optimizer_state_dict(fresh, fresh_opt, state["opt"])
    for one, its in ((opt, model), (fresh_opt, fresh)):
        one.train()
        step_with(one, list(its), 3)
    assert same(list(fresh), params)


def test_parameters_that_share_their_storage_come_back() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    tied = torch.nn.Parameter(torch.empty(3, 3))
    tied.data = weight.data.t()
    with pytest.warns(UserWarning, match="parameter 0 of group 0 and parameter 1 of group 0 share their memory"):
        opt = FlatOpt([weight, tied])
    for seed in range(3):
        step_with(opt, [weight, tied], seed)
    (last,) = values([weight])
    opt.eval()
    assert not torch.equal(weight, last)
    opt.train()
    assert torch.equal(weight, last) and torch.equal(tied, last.t())


def test_one_optimizer_does_not_take_the_average_of_another_for_the_parameter() -> None:
    params = make_params("network")
    opt, other = FlatOpt(params), FlatOpt(params[:1])
    for seed in range(3):
        step_with(opt, params, seed)
        other.step()
    last = values(params)
    opt.eval()
    shown = values(params)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 holds the average .* another optimizer"):
        other.eval()
    assert same(params, shown) and "param_iterate" not in other.state[params[0]]
    opt.train()
    assert same(params, last)
    other.eval()
    other.train()
    assert same(params, last)
    opt.eval()
    del opt  # which can no longer take it back
    gc.collect()
    other.eval()


def test_an_optimizer_goes_on_from_the_average_that_an_earlier_one_shows() -> None:
    params = make_params("network")
    first, second = FlatOpt(params), FlatOpt(params[1:])
    for seed in range(3):
        step_with(first, params, seed)
    kept = values(params[:1])
    first.eval()
    for seed in range(3):
        step_with(second, params, seed)
    last = values(params)
    second.eval()
    second.train()
    assert same(params, last)
    first.train()  # puts back what the second has not trained
    assert same(params[1:], last[1:]) and same(params[:1], kept)
    step_with(first, params, 0)


@pytest.mark.parametrize("how", ["copy", "pickle", "load"])
def test_an_optimizer_goes_on_from_the_average_that_a_copy_or_a_loaded_state_shows(how: str) -> None:
    params, first = make()
    for seed in range(3):
        step_with(first, params, seed)
    first.eval()
    if how == "load":
        state = copy.deepcopy(first.state_dict())
        first = FlatOpt(params)
        first.load_state_dict(state)
    else:
        params, first = copy.deepcopy((params, first)) if how == "copy" else pickle.loads(pickle.dumps((params, first)))
    second = FlatOpt(params)
    for seed in range(3):
        step_with(second, params, seed)
    last = values(params)
    first.train()  # which has nothing to put back any more
    assert same(params, last)


def test_a_step_that_moves_nothing_takes_nothing_from_an_earlier_optimizer() -> None:
    params, first = make()
    for seed in range(3):
        step_with(first, params, seed)
    last = values(params)
    first.eval()
    first.zero_grad()
    second = FlatOpt(params)
    get_optimizer_state_dict(torch.nn.ParameterList(params), second)  # which takes a step with gradients of zeros
    params[0].grad = torch.full_like(params[0], float("nan"))
    with pytest.warns(RuntimeWarning, match="holds NaN"):
        second.step()
    params[0].grad = torch.ones_like(params[0]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        second.step()
    first.train()
    assert same(params, last)


def test_models_may_be_trained_in_threads() -> None:
    weights, failed = learned(OrthogonalizedMomentum()), []

    def train() -> None:
        try:
            for _ in range(200):
                param = torch.nn.Parameter(torch.ones(2, 2))
                opt = FlatOpt([param], pretrained=weights)
                step_with(opt, [param], 0)
                opt.eval()
                kept.append(opt)
        except RuntimeError as error:
            failed.append(error)

    kept: list[FlatOpt] = []
    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(kept) == 800


@pytest.mark.parametrize("shown", [False, True])
def test_a_state_that_somebody_holds_does_not_change_with_the_exchange(shown: bool) -> None:
    params, opt = make()
    step_with(opt, params, 0)
    if shown:
        opt.eval()
    state = opt.state_dict()
    expected = copy.deepcopy(state)
    opt.train() if shown else opt.eval()
    torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)
    assert state["param_groups"] == expected["param_groups"]
    FlatOpt(make_params("network")).load_state_dict(state)


def test_a_state_that_lies_about_what_the_parameters_hold_is_refused() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    opt.eval()
    state = opt.state_dict()
    state["param_groups"][0]["shows_averages"] = 0
    with pytest.raises(ValueError, match="changed by optimizer.eval"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("call", ["eval", "train"])
def test_a_parameter_that_changed_its_shape_is_refused_before_anything_moves(call: str) -> None:
    params, opt = make()
    step_with(opt, params, 0)
    if call == "train":
        opt.eval()
    params[-1].data = torch.zeros(7, 7)
    before = values(params)
    with pytest.raises(ValueError, match=r"has shape .* but the parameter needs \[7, 7\]"):
        getattr(opt, call)()
    assert same(params, before)
    assert all(("param_iterate" in state) == (call == "train") for state in opt.state.values())


def test_a_closure_that_shows_averages_is_refused() -> None:
    params, opt = make()
    step_with(opt, params, 0)
    last = values(params)
    with pytest.raises(RuntimeError, match="call optimizer.train"):
        opt.step(opt.eval)
    opt.train()
    assert same(params, last)
