"""State of a parameter: of its shape, made by the same weights, or refused."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import RULE_CASES
from helpers import assert_same_state, learned, make_params, step_with
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from flatopt import FlatOpt, LearnedRule, list_pretrained
from flatopt.rules import UpdateRule
from flatopt.rules.orthogonalized_momentum import CONSTANT_SCALE, OrthogonalizedMomentum

every_rule = pytest.mark.parametrize("name", RULE_CASES)
SHAPES = [(6, 3), (4,), (), (2, 3, 2)]


def model_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList([torch.randn(shape, generator=generator).to(dtype) for shape in shapes])


def stepped(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> tuple[list[Any], FlatOpt]:
    params = list(model_of(shapes, dtype))
    opt = FlatOpt(params, pretrained=learned(name))
    step_with(opt, params, 0)
    return params, opt


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_state_holds_scalars_and_tensors_of_the_shape_of_the_parameter(name: str, dtype: torch.dtype) -> None:
    params, opt = stepped(name, SHAPES, dtype)
    memory = set(opt.learned.rule.memory)
    for param in params:
        shape = (*param.shape, 2) if dtype.is_complex else param.shape
        for key, value in opt.state[param].items():
            if key not in memory and not key.startswith("shared.") and value.dim():
                assert value.shape[: len(shape)] == shape, key


@every_rule
def test_no_two_values_of_the_state_are_one_tensor_nor_a_weight(name: str) -> None:
    """What is changed in place would change the other; safetensors refuses to save them."""
    params, opt = stepped(name, [(4,), (6, 3), (5,)])
    held = [value for state in opt.state.values() for value in state.values()]
    places = [value.untyped_storage().data_ptr() for value in (*held, *opt.learned.weights.values(), *params)]
    assert len(set(places)) == len(places)


def test_the_default_rule_keeps_scalars_and_tensors_of_the_shape_of_the_parameter() -> None:
    params, opt = stepped("orthogonalized-momentum", SHAPES)
    assert all(value.shape in ((), param.shape) for param in params for value in opt.state[param].values())


# --- another shape -------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("other", [(8, 3), (3, 6), (18,), (6, 3, 1), (3, 3)])
def test_a_loaded_state_of_another_shape_is_refused_untouched(name: str, other: tuple[int, ...]) -> None:
    _, opt = stepped(name, [(4,), other])
    params = list(model_of([(4,), (6, 3)]))
    ours = FlatOpt(dict(bias=params[0], weight=params[1]).items(), pretrained=learned(name))
    message = rf"state '.*' of parameter 'weight' has shape \[{', '.join(map(str, other))}.*\[6, 3"
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(opt.state_dict())
    assert not ours.state
    step_with(ours, params, 0)


def cut_rows(param: nn.Parameter) -> None:
    param.data = param.data[2:].clone()


def grow(param: nn.Parameter) -> None:
    param.data = torch.cat([param.data, torch.zeros(2, 3)])


def transpose(param: nn.Parameter) -> None:
    param.data = param.data.mT.contiguous()


@every_rule
@pytest.mark.parametrize("change", [cut_rows, grow, transpose])
def test_a_parameter_that_changed_its_shape_is_refused_before_anything_moves(name: str, change: Any) -> None:
    params, opt = stepped(name, [(4,), (6, 3)])
    change(params[1])
    before = [param.detach().clone() for param in params]
    shape = ", ".join(map(str, params[1].shape))
    with pytest.raises(ValueError, match=rf"of parameter 1 of group 0 has shape \[6, 3.*needs \[{shape}"):
        step_with(opt, params, 1)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert float(opt.state[params[0]]["step"]) == 1
    del opt.state[params[1]]  # as the message says
    step_with(opt, params, 1)
    assert [float(opt.state[param]["step"]) for param in params] == [2, 1]


@every_rule
@pytest.mark.parametrize("change", [cut_rows, grow, transpose])
def test_a_gradient_of_another_shape_is_refused_before_anything_moves(name: str, change: Any) -> None:
    """A parameter that changed before the first step, with the gradient that it had."""
    params = list(model_of([(4,), (6, 3)]))
    opt = FlatOpt(params, pretrained=learned(name))
    for param in params:
        param.grad = torch.ones_like(param)
    change(params[1])
    with pytest.raises(
        ValueError, match=r"gradient of parameter 1 of group 0 has shape \[6, 3\], but the parameter \["
    ):
        opt.step()
    assert not opt.state
    step_with(opt, params, 0)


def replace_rows(opt: FlatOpt, old: nn.Parameter, change: Any, keys: Sequence[str]) -> nn.Parameter:
    """Replace a parameter by one with other rows, and change some of its state in the same way."""
    new, state = nn.Parameter(change(old.detach())), opt.state.pop(old)
    for key in keys:
        state[key] = change(state[key])
    opt.param_groups[0]["params"][0] = new
    opt.state[new] = state
    return new


def per_coordinate(opt: FlatOpt, param: nn.Parameter) -> list[str]:
    return [key for key, value in opt.state[param].items() if value.shape[: param.dim()] == param.shape]


CHANGES_OF_ROWS = [lambda value: value[3:].clone(), lambda value: torch.cat([value, torch.zeros_like(value[:4])])]


@pytest.mark.parametrize("change", CHANGES_OF_ROWS, ids=["prune", "extend"])
def test_surgery_on_one_of_two_moments_is_refused(change: Any) -> None:
    (old,), opt = stepped("adam", [(10, 3)])
    new = replace_rows(opt, old, change, ["exp_avg"])
    message = rf"state 'exp_avg_sq' of parameter 0 of group 0 has shape \[10, 3\].*\[{len(new)}, 3\]"
    with pytest.raises(ValueError, match=message):
        step_with(opt, [new], 1)


@every_rule
@pytest.mark.parametrize("change", CHANGES_OF_ROWS, ids=["prune", "extend"])
def test_surgery_is_refused_where_the_state_describes_the_whole_tensor(name: str, change: Any) -> None:
    """Pruning all that has rows is complete for the rules that keep nothing else, as it is for AdamW."""
    (old,), opt = stepped(name, [(10, 3)])
    new = replace_rows(opt, old, change, per_coordinate(opt, old))
    whole = opt.learned.rule.memory
    if whole:
        before, message = new.detach().clone(), rf"made for 30 coordinates.*\[{len(new)}, 3\]: '{whole[0]}'"
        with pytest.raises(ValueError, match=message):
            step_with(opt, [new], 1)
        other = nn.Parameter(new.detach().clone())
        with pytest.raises(ValueError, match=message):
            FlatOpt([other], pretrained=learned(name)).load_state_dict(opt.state_dict())
        assert torch.equal(new, before)
        del opt.state[new]["numel"]  # as the message says
    step_with(opt, [new], 1)
    assert float(opt.state[new]["step"]) == 2
    if whole:
        assert float(opt.state[new]["numel"]) == new.numel()


def test_rows_with_large_gradients_would_slow_the_rest_after_they_are_gone() -> None:
    """Why pruning the momentum is not enough: the largest gradient so far is one of the whole tensor."""
    rule, moved = OrthogonalizedMomentum(), {}
    weights = rule.init_weights() | {"constants.gradient_power": torch.tensor(0.9 / CONSTANT_SCALE)}
    for is_reset in (False, True):
        (old,) = model_of([(10, 3)])
        opt = FlatOpt([old], pretrained=LearnedRule(rule, weights))
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            old.grad = torch.randn(10, 3, generator=generator) * torch.tensor([100.0] * 3 + [1.0] * 7)[:, None]
            opt.step()
        new = replace_rows(opt, old, lambda value: value[3:].clone(), ["exp_avg", "param_average"])
        del opt.state[new]["numel"]
        if is_reset:
            for key in rule.memory:
                opt.state[new][key].zero_()
        for _ in range(400):
            before = new.detach().clone()
            new.grad = torch.randn(7, 3, generator=generator)
            opt.step()
        moved[is_reset] = float((new.detach() - before).norm())
    assert moved[True] > 4 * moved[False]


def test_what_another_shape_of_rule_kept_is_not_taken_over() -> None:
    """Without strips matrices keep a second moment."""
    weights = OrthogonalizedMomentum().init_weights()
    whole, opt = (
        FlatOpt(model_of([(6, 3), (4,)]), pretrained=LearnedRule(OrthogonalizedMomentum(strip_size=size), weights))
        for size in (0, 32)
    )
    step_with(whole, whole.param_groups[0]["params"], 0)
    opt.load_state_dict(whole.state_dict())
    kept = ["exp_avg_sq" in opt.state[param] for param in opt.param_groups[0]["params"]]
    assert kept == [False, True]
    step_with(opt, opt.param_groups[0]["params"], 1)


@dataclass(frozen=True, kw_only=True)
class Descent(UpdateRule):
    """Keeps nothing but the number of the step."""

    name: ClassVar[str] = "descent"

    def init_weights(self, generator=None):
        return {}

    def init_state(self, weights, param, generator=None):
        return {"step": param.new_zeros(())}

    def propose(self, weights, state, grad, param, control, facts, context):
        return {}, -0.1 * grad

    def step_size(self, weights, control_NC, context):
        return control_NC.new_full((len(control_NC),), 0.1)


def test_a_rule_may_keep_nothing_but_the_step() -> None:
    (param,) = model_of([(4,)])
    before, opt = param.detach().clone(), FlatOpt([param], pretrained=LearnedRule(Descent(), {}))
    for _ in range(3):
        param.grad = torch.ones_like(param)
        opt.step()
    torch.testing.assert_close(param.detach(), before - 0.3)
    assert float(opt.state[param]["step"]) == 3


@pytest.mark.parametrize("key", ["exp_avg", "step", "grad_rms_max"])
def test_a_state_that_lost_a_key_is_refused(key: str) -> None:
    params, opt = stepped("orthogonalized-momentum", SHAPES)
    del opt.state[params[0]][key]
    with pytest.raises(ValueError, match=f"state of parameter 0 of group 0 has no tensor '{key}'"):
        step_with(opt, params, 1)


def test_a_state_of_arrays_is_refused() -> None:
    params = make_params("network")
    opt = FlatOpt(params)
    step_with(opt, params, 0)
    state = copy.deepcopy(opt.state_dict())
    state["state"] = {
        index: {key: value.numpy() for key, value in one.items()} for index, one in state["state"].items()
    }
    with pytest.raises(
        ValueError, match="state of parameter 0 of group 0 has no tensor '.*', which the optimizer keeps"
    ):
        opt.load_state_dict(state)


def test_a_state_that_belongs_to_no_parameter_is_told() -> None:
    """As JSON and msgpack make it, whose keys are strings."""
    params = make_params("network")
    opt = FlatOpt(params)
    step_with(opt, params, 0)
    state = opt.state_dict()
    state["state"] = {str(index): one for index, one in state["state"].items()}
    with pytest.warns(UserWarning, match="belongs to '0' and others, but its groups name parameters like 0") as caught:
        FlatOpt(params).load_state_dict(state)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_step_that_a_wrapper_overwrote_is_refused() -> None:
    params, opt = stepped("orthogonalized-momentum", SHAPES)
    opt.state[params[0]]["step"] = 5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="state of parameter 0 of group 0 has no tensor 'step'"):
        step_with(opt, params, 1)
    opt.state[params[0]]["step"] = torch.tensor([5.0])
    with pytest.raises(ValueError, match=r"state 'step' of parameter 0 of group 0 has shape \[1\]"):
        step_with(opt, params, 1)


@every_rule
def test_a_wrapper_may_write_into_the_state_first(name: str) -> None:
    ends = []
    for wrapped in (False, True):
        params = make_params("network")
        opt = FlatOpt(params, pretrained=learned(name))
        if wrapped:
            for param in params:
                opt.state[param]["average"] = param.detach().clone()
            opt.state["calls"] = 3  # type: ignore[index]
            opt.state[params[0]] |= {"step": 0, "numel": 1, "num_skipped": 0}
        for seed in range(2):
            step_with(opt, params, seed)
        assert all(("average" in opt.state[param]) is wrapped for param in params)
        ends.append([param.detach() for param in params])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


# --- other weights -------------------------------------------------------------------------------------------------


def two_sets(name: str) -> tuple[LearnedRule, LearnedRule]:
    one = learned(name)
    other = {key: weight + 0.01 for key, weight in one.weights.items()}
    return (
        LearnedRule(one.rule, one.weights, name="org/one", commit="a" * 40),
        LearnedRule(one.rule, other, name="other"),
    )


@pytest.mark.parametrize("name", ["toy-mixer", "l2o-dm", "rnnprop", "l2o-scale", "orthogonalized-momentum"])
def test_the_state_of_other_weights_is_refused_untouched_and_can_be_forced(name: str) -> None:
    one, other = two_sets(name)
    params = make_params("network")
    opt = FlatOpt(params, pretrained=one)
    step_with(opt, params, 0)
    ours = FlatOpt(params, pretrained=other)
    names = rf"'org/one' at commit {'a' * 40} \(SHA-256 {one.sha256[:16]}.*not 'other' \(SHA-256 {other.sha256[:16]}"
    with pytest.raises(ValueError, match=f"{names}.*allow_other_weights=True"):
        ours.load_state_dict(opt.state_dict())
    assert not ours.state

    forced = FlatOpt(params, pretrained=other, allow_other_weights=True)
    forced.load_state_dict(opt.state_dict())
    assert_same_state(forced, opt)
    ours.load_state_dict(forced.state_dict())  # from now on it is the state of the other weights
    for copied in (copy.deepcopy(forced), pickle.loads(pickle.dumps(forced))):
        copied.load_state_dict(opt.state_dict())


def test_the_same_weights_under_another_name_go_on(tmp_path: Path) -> None:
    one, _ = two_sets("rnnprop")
    params = make_params("network")
    opt = FlatOpt(params, pretrained=one)
    step_with(opt, params, 0)
    one.save_pretrained(tmp_path / "copy")
    other = FlatOpt(params, pretrained=tmp_path / "copy")
    other.load_state_dict(opt.state_dict())
    assert_same_state(opt, other)


def test_states_without_a_record_load() -> None:
    one, other = two_sets("toy-mixer")
    params = make_params("network")
    opt = FlatOpt(params, pretrained=one)
    step_with(opt, params, 0)
    old = copy.deepcopy(opt.state_dict())
    for key in ("weights_name", "weights_sha256", "weights_commit"):
        del old["param_groups"][0][key]
    ours = FlatOpt(params, pretrained=other)
    ours.load_state_dict(old)
    assert ours.param_groups[0]["weights_sha256"] == int(other.sha256, 16)


def test_a_shipped_set_refuses_the_state_of_its_sister() -> None:
    if not {"rnnprop", "rnnprop-hessian"} <= set(list_pretrained()):
        pytest.skip("not shipped")
    params = make_params("network")
    opt = FlatOpt(params, pretrained="rnnprop")
    step_with(opt, params, 0)
    with pytest.raises(ValueError, match="made with the weights 'rnnprop'.*not 'rnnprop-hessian'"):
        FlatOpt(params, pretrained="rnnprop-hessian").load_state_dict(opt.state_dict())


def test_groups_reused_for_another_optimizer_record_its_weights() -> None:
    one, other = two_sets("toy-mixer")
    groups = [{"params": make_params("network")}]
    FlatOpt(groups, pretrained=one)
    assert FlatOpt(groups, pretrained=other).param_groups[0]["weights_sha256"] == int(other.sha256, 16)


def test_the_representation_names_rule_and_weights_and_shows_nothing_inert() -> None:
    one, _ = two_sets("toy-mixer")
    text = repr(FlatOpt(make_params("network"), pretrained=one))
    assert f"Weights: 'org/one' at commit {'a' * 40} (SHA-256 {one.sha256[:16]}...)" in text
    assert "\nRule: toy-mixer\n" in text
    assert "weights_sha256" not in text and "momentum" not in text


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_knows_its_weights(tmp_path: Path, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    one, other = two_sets("toy-mixer")

    def fresh(weights: LearnedRule, **more: Any) -> tuple[nn.Module, FlatOpt]:
        model = nn.Linear(3, 2)
        return model, FlatOpt(model.parameters(), pretrained=weights, **more)

    def load(model: nn.Module, opt: FlatOpt) -> None:
        loaded = {"opt": get_optimizer_state_dict(model, opt, options=options)}
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_optimizer_state_dict(model, opt, loaded["opt"], options=options)

    model, opt = fresh(one)
    step_with(opt, list(model.parameters()), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group
        saved = {"opt": get_optimizer_state_dict(model, opt, options=options)}
        dcp.save(saved, checkpoint_id=tmp_path)
        load(*fresh(one))
        with pytest.raises(ValueError, match="made with the weights 'org/one' at commit aaaa"):
            load(*fresh(other))
        forced_model, forced = fresh(other, allow_other_weights=True)
        load(forced_model, forced)
    assert_same_state(forced, opt)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_without_a_record_loads_in_part(tmp_path: Path, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    one, other = two_sets("toy-mixer")
    model = nn.Linear(3, 2)
    opts = [FlatOpt(model.parameters(), pretrained=weights) for weights in (one, other)]
    for opt in opts:
        step_with(opt, list(model.parameters()), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group
        old = get_optimizer_state_dict(model, opts[0], options=options)
        for values in [old] if flatten else old["param_groups"]:
            for key in [key for key in values if ".weights_" in f".{key}"]:
                del values[key]
        dcp.save({"opt": old}, checkpoint_id=tmp_path)
        loaded = {"opt": get_optimizer_state_dict(model, opts[1], options=options)}
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(loaded, checkpoint_id=tmp_path, planner=planner)
        set_optimizer_state_dict(model, opts[1], loaded["opt"], options=options)
    assert_same_state(*opts)


@pytest.mark.parametrize("step", [math.nan, math.inf, -1.0])
def test_a_state_with_a_damaged_step_is_refused(step: float) -> None:
    params = make_params("network")
    opt = FlatOpt(params)
    step_with(opt, params, 0)
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["step"].fill_(step)
    with pytest.raises(ValueError, match="steps: it is damaged"):
        opt.load_state_dict(state)
