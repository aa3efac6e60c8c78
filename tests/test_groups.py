"""Options of parameter groups: checked wherever they can change, and nothing about them is silent."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import ToyMixer
from helpers import learned, make_params, set_grads, step_with
from torch import nn

from flatopt import FlatOpt, LearnedRule
from flatopt._watch import SMALL_LR_STEPS
from flatopt.rules import Adam

BAD_OPTIONS = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"lr": float("nan")}, "Invalid learning rate: nan"),
    ({"lr": torch.tensor(-1.0)}, "Invalid learning rate: -1.0"),
    ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    ({"lr": "0.1"}, "Invalid learning rate: '0.1'"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ({"weight_decay": None}, "Invalid weight_decay value: None"),
    ({"num_steps": 0}, "Invalid num_steps value: 0"),
    ({"num_steps": -1}, "Invalid num_steps value: -1"),
    ({"num_steps": float("nan")}, "Invalid num_steps value: nan"),
    ({"seed": 2**32}, "Invalid seed value: 4294967296"),
    ({"seed": 0.5}, "Invalid seed value: 0.5"),
    ({"maximize": None}, "Invalid maximize value: None"),
    ({"maximize": "no"}, "Invalid maximize value: 'no'"),
    ({"maximize": 2}, "Invalid maximize value: 2"),
]
bad_options = pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)


@pytest.fixture
def toy() -> LearnedRule:
    return learned("toy-mixer", perturbation=0.1)


@bad_options
def test_constructor_refuses_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatOpt(make_params("network"), **{"pretrained": learned(Adam()), **options})


@bad_options
def test_a_group_refuses_options_out_of_range(options: dict[str, Any], message: str, toy: LearnedRule) -> None:
    params = make_params("network")
    with pytest.raises(ValueError, match=f"{message}.*in parameter group 0|must be 1-element"):
        FlatOpt([{"params": params[:2], **options}], pretrained=toy)
    opt = FlatOpt(params[:2], pretrained=toy)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": params[2:], **options})
    assert len(opt.param_groups) == 1


@bad_options
def test_a_loaded_group_refuses_options_out_of_range(options: dict[str, Any], message: str, toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(options)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    torch.testing.assert_close(opt.state_dict(), before, rtol=0, atol=0)


@bad_options
def test_a_step_refuses_options_written_out_of_range(options: dict[str, Any], message: str, toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt([{"params": params[:2]}, {"params": params[2:]}], pretrained=toy)
    step_with(opt, params, 0)
    before = [param.detach().clone() for param in params]
    opt.param_groups[1].update(options)
    with pytest.raises(ValueError, match=message):
        step_with(opt, params, 1)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


NUMPY = {"num_steps": np.int64(5), "seed": np.int64(5), "maximize": np.bool_(True)}


@pytest.mark.parametrize("key", ["lr", "weight_decay", "num_steps", "seed", "maximize"])
@pytest.mark.parametrize("how", ["constructor", "group", "written"])
def test_numbers_of_numpy_are_saved_as_those_of_python(key: str, how: str, toy: LearnedRule) -> None:
    value: Any = NUMPY.get(key, np.float64(0.25))
    params = make_params("network")
    if how == "constructor":
        opt = FlatOpt(params, pretrained=toy, **{key: value})
    elif how == "group":
        opt = FlatOpt([{"params": params, key: value}], pretrained=toy)
    else:
        opt = FlatOpt(params, pretrained=toy)
        opt.param_groups[0][key] = value
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0][key] == value


def test_an_unknown_length_may_be_written_as_none(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, num_steps=1)
    step_with(opt, params, 0)
    opt.param_groups[0]["num_steps"] = None
    step_with(opt, params, 1)
    assert opt.param_groups[0]["num_steps"] == float("inf")


@pytest.mark.parametrize("key", ["num_steps", "seed"])
def test_groups_that_disagree_on_what_is_common_are_told_once(key: str, toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt([{"params": params[:2]}, {"params": params[2:], key: 7}], pretrained=toy)
    with pytest.warns(UserWarning, match=f"{key} is .* in parameter group 0 and 7 in group 1") as caught:
        step_with(opt, params, 0)
        step_with(opt, params, 1)
    assert len(caught) == 1


# --- num_steps -----------------------------------------------------------------------------------------------------


def run(model: nn.Module, opt: FlatOpt, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        opt.step()


def started(num_steps: int | None, steps: int) -> tuple[nn.Module, FlatOpt]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    opt = FlatOpt(model.parameters(), num_steps=num_steps)
    run(model, opt, range(steps))
    return model, opt


def resumed(model: nn.Module, opt: FlatOpt, num_steps: int | None) -> tuple[nn.Module, FlatOpt]:
    copied = copy.deepcopy(model)
    other = FlatOpt(copied.parameters(), num_steps=num_steps)
    other.load_state_dict(opt.state_dict())
    return copied, other


@pytest.mark.parametrize("saved", [10, None])
def test_the_length_given_wins_over_the_one_saved(saved: int | None) -> None:
    model, opt = started(saved, 10)
    shown = float("inf") if saved is None else saved
    with pytest.warns(
        UserWarning, match=f"num_steps=30, given to this .* the num_steps={shown} of the state"
    ) as caught:
        copied, other = resumed(model, opt, 30)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert other.param_groups[0]["num_steps"] == 30
    before = copied.weight.detach().clone()
    run(copied, other, range(10, 30))
    assert (copied.weight - before).abs().max() > 1e-3
    opt.set_num_steps(30)
    run(model, opt, range(10, 30))
    assert torch.equal(model.weight, copied.weight)


def test_the_length_given_wins_also_after_a_state_with_the_same(toy: LearnedRule) -> None:
    """accelerate, and with it the Trainer of transformers, loads an optimizer's own state into it before all else."""
    _, saved = started(10, 3)
    other = FlatOpt(nn.Linear(4, 1).parameters(), num_steps=30, pretrained=saved.learned)
    other.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="num_steps=30, given to this optimizer, takes the place of the num_steps=10"):
        other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["num_steps"] == 30


def test_without_a_length_given_the_saved_one_stays_until_another_is_loaded() -> None:
    model, opt = started(10, 3)
    copied, other = resumed(model, opt, None)
    assert other.param_groups[0]["num_steps"] == 10
    _, longer = started(20, 3)
    other.load_state_dict(longer.state_dict())
    assert other.param_groups[0]["num_steps"] == 20
    again = pickle.loads(pickle.dumps(other))
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["num_steps"] == 10


def test_a_length_that_is_said_to_be_unknown_wins_over_the_saved_one(toy: LearnedRule) -> None:
    _, saved = started(10, 3)
    other = FlatOpt(nn.Linear(4, 1).parameters(), num_steps=30, pretrained=saved.learned)
    other.set_num_steps(None)
    with pytest.warns(UserWarning, match="num_steps=inf, given to this optimizer, takes the place of the num_steps=10"):
        other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["num_steps"] == math.inf


def test_a_group_that_joins_after_a_state_was_loaded_has_its_length() -> None:
    model, opt = started(10, 3)
    _, other = resumed(model, opt, None)
    other.add_param_group({"params": nn.Parameter(torch.ones(2))})
    other.state_dict()  # would warn of two lengths
    assert other.param_groups[1]["num_steps"] == 10


@pytest.mark.parametrize("name", ["toy-mixer", "orthogonalized-momentum"])
def test_beyond_the_end_a_run_goes_on_as_with_no_length_and_says_so_once(name: str) -> None:
    ends = []
    for forget in (False, True):
        params = make_params("network")
        opt = FlatOpt(params, pretrained=learned(name, perturbation=0.1), num_steps=4)
        for seed in range(4):
            step_with(opt, params, seed)
        if forget:
            opt.set_num_steps(None)
            for seed in range(4, 30):
                step_with(opt, params, seed)
        else:
            with pytest.warns(UserWarning, match="step 5 is beyond num_steps=4: .*set_num_steps") as caught:
                for seed in range(4, 30):
                    step_with(opt, params, seed)
            assert len(caught) == 1 and caught[0].filename.endswith("helpers.py")
        ends.append([param.detach() for param in params])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_length_set_in_the_middle_reaches_the_rule_and_later_groups(toy: LearnedRule) -> None:
    seen = []

    class Spy(ToyMixer):
        def mix(self, weights, summaries_NS, memory_NM, shared, context, *, shapes):  # type: ignore[no-untyped-def]
            seen.append((float(context.step), float(context.num_steps)))
            return super().mix(weights, summaries_NS, memory_NM, shared, context, shapes=shapes)

    params = make_params("network")
    opt = FlatOpt(params[:3], pretrained=LearnedRule(Spy(), toy.weights))
    step_with(opt, params[:3], 0)
    opt.set_num_steps(20)
    opt.add_param_group({"params": params[3:]})
    assert [group["num_steps"] for group in opt.param_groups] == [20, 20]
    step_with(opt, params, 1)
    for group in opt.param_groups:
        group["num_steps"] = 30  # the same by hand
    step_with(opt, params, 2)
    assert seen == [(1.0, float("inf")), (2.0, 20.0), (3.0, 30.0)]
    with pytest.raises(ValueError, match="Invalid num_steps value: 0"):
        opt.set_num_steps(0)
    assert opt.param_groups[0]["num_steps"] == 30


def test_after_a_new_length_the_end_is_told_again(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, num_steps=1)
    step_with(opt, params, 0)
    with pytest.warns(UserWarning, match="step 2 is beyond num_steps=1"):
        step_with(opt, params, 1)
    opt.set_num_steps(3)
    step_with(opt, params, 2)
    with pytest.warns(UserWarning, match="step 4 is beyond num_steps=3"):
        step_with(opt, params, 3)


def test_the_clock_is_that_of_the_dtype_that_has_come_farthest(toy: LearnedRule) -> None:
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = FlatOpt([early, late], pretrained=toy, num_steps=3)
    early.grad = torch.ones_like(early)
    for _ in range(3):
        opt.step()
    late.grad = torch.ones_like(late)
    with pytest.warns(UserWarning, match="step 4 is beyond num_steps=3"):
        opt.step()


def test_a_group_of_another_optimizer_brings_no_clock(toy: LearnedRule) -> None:
    first, second = make_params("network")[:2]
    other, opt = FlatOpt([first], pretrained=toy), FlatOpt([second], pretrained=toy)
    for seed in range(5):
        step_with(other, [first], seed)
    step_with(opt, [second], 0)
    opt.add_param_group(other.param_groups[0])
    step_with(opt, [first, second], 1)
    assert [group["steps_taken"] for group in opt.param_groups] == [2, 2]


def test_a_call_that_can_use_no_gradient_does_not_count(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, num_steps=2)
    set_grads(params, 0, scale=0.0)
    opt.step()
    step_with(opt, params, 1)
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    with pytest.warns(RuntimeWarning, match="holds NaN"):
        opt.step()
    step_with(opt, params, 2)  # the second: no warning that the run is over
    assert {float(state["step"]) for state in opt.state.values()} == {2.0}


# --- habits that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3), np.float32(1e-3), 1e-2, torch.tensor(1e-2)])
def test_a_learning_rate_of_adam_is_told(lr: Any, toy: LearnedRule) -> None:
    with pytest.warns(UserWarning, match=r"lr=0.0+1 .* is 1.0 as learned") as caught:
        FlatOpt(make_params("network"), lr, pretrained=toy)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_small_learning_rate_of_some_groups_is_not_told(toy: LearnedRule) -> None:
    params = make_params("network")
    FlatOpt([{"params": params[:2], "lr": 1e-4}, {"params": params[2:]}], pretrained=toy)
    FlatOpt(params, 0.02, pretrained=toy)
    FlatOpt(params, 0.0, pretrained=toy)


@pytest.mark.parametrize(
    ("make", "is_told"),
    [
        (lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6), True),
        (lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=6), True),
        (lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(step / 2, (6 - step) / 4)), True),
        (lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 3)), False),
        (lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0), False),
    ],
)
@pytest.mark.parametrize("num_steps", [6, None])
def test_a_decaying_schedule_on_top_of_a_known_length_is_told_once(
    make: Any, is_told: bool, num_steps: int | None, toy: LearnedRule
) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, num_steps=num_steps)
    scheduler = make(opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(6):
            step_with(opt, params, seed)
            scheduler.step()
    told = [warning for warning in caught if "lr falls although num_steps" in str(warning.message)]
    assert len(told) == (is_told and num_steps is not None)
    assert len(caught) == len(told)


@pytest.mark.parametrize(("num_steps", "is_told"), [(10, True), (None, False)])
def test_a_rate_lowered_by_hand_is_told_like_that_of_a_scheduler(
    num_steps: int | None, is_told: bool, toy: LearnedRule
) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, num_steps=num_steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            step_with(opt, params, seed)
            opt.param_groups[0]["lr"] /= 2  # as ReduceLROnPlateau does, which leaves no other trace
    assert [str(warning.message)[:27] for warning in caught] == ["lr falls although num_steps"] * is_told


def test_a_rate_that_a_search_tried_before_the_run_is_not_told(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, num_steps=10)
    fresh = copy.deepcopy(opt.state_dict())
    opt.param_groups[0]["lr"] = 10.0
    step_with(opt, params, 0)
    opt.load_state_dict(fresh)
    step_with(opt, params, 1)  # without a warning that lr falls


def write_lr_by_hand(opt: FlatOpt) -> Any:
    def write() -> None:
        opt.param_groups[0]["lr"] = 6e-4

    write()
    return write


@pytest.mark.parametrize(
    ("make", "is_told"),
    [
        (lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-3, total_steps=200).step, True),
        (lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, base_lr=1e-4, max_lr=1e-3).step, True),
        (write_lr_by_hand, True),
        (lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 50_000).step, False),
        (lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=20_000).step, False),
    ],
    ids=["one cycle", "cyclic", "by hand", "long warm-up", "one cycle to 1"],
)
def test_a_schedule_written_for_adam_is_told_once_no_warm_up_explains_it(
    make: Any, is_told: bool, toy: LearnedRule
) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    schedule = make(opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(SMALL_LR_STEPS + 2):
            step_with(opt, params, seed)
            schedule()
    assert ["a learning rate of Adam's" in str(warning.message) for warning in caught] == [True] * is_told


@pytest.mark.parametrize("option", [{"betas": (0.9, 0.95)}, {"eps": 1e-6}, {"pretrained": "rnnprop"}])
@pytest.mark.parametrize("is_added", [False, True])
def test_options_without_effect_in_a_group_are_told(option: dict[str, Any], is_added: bool, toy: LearnedRule) -> None:
    first, *others = make_params("network")
    group = {"params": others, **option}
    opt = FlatOpt([first], pretrained=toy)
    with pytest.warns(
        UserWarning, match=rf"groups have {next(iter(option))}, which FlatOpt does not look at"
    ) as caught:
        _ = opt.add_param_group(group) if is_added else FlatOpt([group], pretrained=toy)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_options_of_schedulers_and_wrappers_in_a_group_are_not_told(toy: LearnedRule) -> None:
    opt = FlatOpt([{"params": make_params("network"), "lr_scale": 0.5, "amsgrad": False}], pretrained=toy)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=20)
    FlatOpt(opt.param_groups, pretrained=toy)


def test_a_length_that_a_reused_group_brings_is_told(toy: LearnedRule) -> None:
    """Torch writes what an optimizer is given into the dicts that it is made from."""
    groups = [{"params": make_params("network")}]
    FlatOpt(groups, num_steps=20, pretrained=toy)
    with pytest.warns(UserWarning, match=r"group 0 has num_steps=20 .* takes the place of num_steps=40") as caught:
        FlatOpt(groups, num_steps=40, pretrained=toy)
    assert len(caught) == 1 and caught[0].filename == __file__
    FlatOpt(groups, num_steps=20, pretrained=toy)
    FlatOpt(groups, pretrained=toy)


def test_an_empty_state_of_another_optimizer_is_told(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    with pytest.warns(UserWarning, match="empty state of another optimizer .* lr=0.001") as caught:
        opt.load_state_dict(torch.optim.AdamW(params).state_dict())
    assert len(caught) == 1 and caught[0].filename == __file__
    opt.load_state_dict(FlatOpt(params, pretrained=toy).state_dict())
    step_with(opt, params, 0)


# --- flattened parameters ------------------------------------------------------------------------------------------


class Flattened(nn.Parameter):
    """As the wrappers mark them."""

    _fsdp_flattened = True


def test_marked_parameters_are_refused_when_added_or_first_used(toy: LearnedRule) -> None:
    params = make_params("network")
    marked = Flattened(torch.ones(6))
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is flattened.*FSDP2 \(torch.dist"):
        FlatOpt([marked], pretrained=toy)
    opt = FlatOpt(params, pretrained=toy)
    with pytest.raises(RuntimeError, match="FSDP2"):
        opt.add_param_group({"params": marked})
    assert len(opt.param_groups) == 1
    params[1]._fsdp_flattened = True  # wrapped after the optimizer was made
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 is flattened"):
        step_with(opt, params, 0)
    assert not opt.state


@pytest.mark.parametrize("how", ["new", "pickle"])
def test_flat_buffers_in_the_place_of_matrices_are_refused(how: str, toy: LearnedRule) -> None:
    """What DeepSpeed's ZeRO 1 and 2 do."""
    params = make_params("network")
    opt = FlatOpt([{"params": params[:2]}, {"params": params[2:]}], pretrained=toy)
    if how == "pickle":
        opt = pickle.loads(pickle.dumps(opt))
    for group in opt.param_groups:
        flat = torch.cat([param.detach().flatten() for param in group["params"]])
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    with pytest.raises(RuntimeError, match="is flattened.*FSDP2"):
        opt.step()


def test_biases_are_stepped_when_the_matrices_leave_the_optimizer(toy: LearnedRule) -> None:
    params = make_params("network")
    vectors, matrices = ([param for param in params if (param.dim() < 2) is short] for short in (True, False))
    opt = FlatOpt([{"params": matrices}, {"params": vectors}], pretrained=toy)
    del opt.param_groups[0]
    step_with(opt, vectors, 0)
    assert all(float(opt.state[param]["step"]) == 1 for param in vectors)


def test_half_precision_copies_in_the_place_of_parameters_are_not_flattened(toy: LearnedRule) -> None:
    params = make_params("network", dtype=torch.bfloat16)
    opt = FlatOpt(params, pretrained=toy)
    opt.param_groups[0]["params"] = copies = [nn.Parameter(param.detach().float()) for param in params]
    step_with(opt, copies, 0)
    assert all(float(opt.state[param]["step"]) == 1 for param in copies)


def test_a_lone_vector_as_long_as_a_model_is_told_once() -> None:
    """A flat buffer that was there before the optimizer, as Apex makes one: nothing but its length tells."""
    with pytest.warns(UserWarning, match=r"vector of 1,048,576 coordinates.*FSDP2") as caught:
        opt = FlatOpt([nn.Parameter(torch.ones(2**20)), nn.Parameter(torch.ones(3))])
    step_with(opt, opt.param_groups[0]["params"], 0)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_stack_of_matrices_in_one_parameter_is_told(toy: LearnedRule) -> None:
    experts = nn.Parameter(torch.ones(8, 32, 16))
    with pytest.warns(UserWarning, match=r"parameter 1 of group 0 has shape \[8, 32, 16\] and is taken as one matrix"):
        FlatOpt([nn.Parameter(torch.ones(3)), experts])
    FlatOpt([experts], pretrained=toy)  # a rule that looks at coordinates one by one
    for shape in ((64, 32, 15), (1, 196, 64), (64, 3, 16, 16)):  # convolutions, positions
        FlatOpt([nn.Parameter(torch.ones(shape))])


def test_what_is_added_is_looked_at_like_what_was_there() -> None:
    matrix = nn.Parameter(torch.ones(32, 16))
    opt = FlatOpt([matrix])
    with pytest.warns(UserWarning, match=r"parameter 0 of group 1 has shape \[8, 32, 16\] and is taken as one matrix"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(8, 32, 16))]})
    with pytest.warns(UserWarning, match="parameter 0 of group 0 and parameter 0 of group 2 share their memory"):
        opt.add_param_group({"params": [nn.Parameter(matrix.detach().t())]})
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def test_a_parameter_appended_to_those_with_names_has_a_number() -> None:
    opt = FlatOpt([("matrix", nn.Parameter(torch.ones(3, 2)))])
    opt.param_groups[0]["params"].append(added := nn.Parameter(torch.ones(2)))
    added.grad = torch.full_like(added, float("nan"))
    with pytest.warns(RuntimeWarning, match="gradient of parameter 1 of group 0 holds NaN"):
        opt.step()


def test_vectors_that_are_no_flattened_model_are_not_told(toy: LearnedRule) -> None:
    FlatOpt([nn.Parameter(torch.ones(2**20 - 1))])
    FlatOpt([nn.Parameter(torch.ones(2**20)), nn.Parameter(torch.ones(2, 2))])
    FlatOpt([nn.Parameter(torch.ones(2**20))], pretrained=toy)  # a rule that looks at coordinates one by one
