"""``FlatOpt`` as a ``torch.optim.Optimizer``: what the class adds to the rule, trap by trap."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import OPTIMIZEES, RULE_CASES, ToyMixer
from helpers import assert_same_state, learned, make_params, set_grads, step_with, train
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from flatopt import FlatOpt, LearnedRule
from flatopt._applied import EAGER, Sizes
from flatopt._torch import compile_errors
from flatopt.evaluate._training import build_model
from flatopt.evaluate.step_time import MODELS, peak_bytes
from flatopt.rules import Adam, RuleResult


@pytest.fixture
def toy() -> LearnedRule:
    return learned("toy-mixer", perturbation=0.1)


def snapshot(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def unchanged(tensors: list[Tensor], before: list[Tensor]) -> bool:
    return all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


# --- against torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw(maximize: bool, weight_decay: float) -> None:
    options = {"weight_decay": weight_decay, "maximize": maximize}
    ours, theirs = (make_params("network", dtype=torch.float64) for _ in range(2))
    opt = FlatOpt(ours, pretrained=learned(Adam(lr=0.02)), **options)
    oracle = torch.optim.AdamW(theirs, lr=0.02, **options)
    for seed in range(10):
        for optimizer, params in ((opt, ours), (oracle, theirs)):
            set_grads(params, seed)
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lr", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]], dtype=torch.float64)])
def test_learning_rate_may_be_a_tensor_of_one_element(lr: Tensor, toy: LearnedRule) -> None:
    runs = []
    for value in (0.3, lr):
        params = make_params("network")
        opt = FlatOpt(params, value, pretrained=toy, weight_decay=0.1)
        step_with(opt, params, 0)
        runs.append(snapshot(params))
    torch.testing.assert_close(*runs)


def test_learning_rate_is_of_the_group_and_linear(toy: LearnedRule) -> None:
    steps = {}
    for lr in (1.0, 0.25):
        params = make_params("network", dtype=torch.float64)
        before = snapshot(params)
        opt = FlatOpt([{"params": params[:2], "lr": lr}, {"params": params[2:]}], 0.5, pretrained=toy)
        step_with(opt, params, 0)
        steps[lr] = [param.detach() - old for param, old in zip(params, before, strict=True)]
    for index in range(2):
        torch.testing.assert_close(0.25 * steps[1.0][index], steps[0.25][index])
    for index in range(2, 4):
        torch.testing.assert_close(steps[1.0][index], steps[0.25][index], rtol=0, atol=0)


def flagship_step_size(param: Tensor, step: int, num_steps: float = math.inf) -> float:
    """Step size of the untrained rule, while the gradients do not shrink."""
    fan = param.shape[1:].numel() if sum(length > 1 for length in param.shape) > 1 else 64
    known = math.cos(math.pi / 2 * (step - 1) / num_steps)
    schedule = known if num_steps < math.inf else (1 + step / 100) ** -0.5
    return 0.034 / math.sqrt(max(fan, 8)) * min(step / min(30, max(15, num_steps / 5)), 1) * schedule


STEP_SIZES: dict[str, Callable[[Tensor, int, float], float]] = {
    "adam": lambda param, step, num_steps: 0.02,
    "adam-other": lambda param, step, num_steps: 0.05,
    "orthogonalized-momentum": flagship_step_size,
    "orthogonalized-momentum, strips of 3": flagship_step_size,
    "orthogonalized-momentum, none": flagship_step_size,
    "l2o-dm": lambda param, step, num_steps: 0.01,
    "rnnprop": lambda param, step, num_steps: 0.01,
    "l2o-scale-last": lambda param, step, num_steps: 1e-3 * math.exp(-1),  # log_step_offset of fresh weights
}


@pytest.mark.parametrize("name", STEP_SIZES)
@pytest.mark.parametrize("num_steps", [None, 6])
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_weight_decay_is_that_of_adamw_with_the_step_size_of_the_rule(
    name: str, num_steps: int | None, lr: float
) -> None:
    weight_decay, rule = 0.25, learned(name)
    plain, decayed = (make_params("network", dtype=torch.float64) for _ in range(2))
    opts = [
        FlatOpt(params, lr, pretrained=rule, num_steps=num_steps, weight_decay=decay)
        for params, decay in ((plain, 0.0), (decayed, weight_decay))
    ]
    for step in range(1, 4):
        with torch.no_grad():
            for one, other in zip(plain, decayed, strict=True):
                other.copy_(one)  # so that both take the same step
        for opt, params in zip(opts, (plain, decayed), strict=True):
            before = snapshot(params)
            step_with(opt, params, 5)  # always the same gradient: its size is the largest so far
        for one, other, old in zip(plain, decayed, before, strict=True):
            size = STEP_SIZES[name](old, step, num_steps or math.inf)
            torch.testing.assert_close(other - one, -lr * size * weight_decay * old, rtol=1e-6, atol=1e-12)


# --- constructor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("inf")}, "Invalid learning rate: inf"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"num_steps": 0}, "Invalid num_steps value: 0"),
        ({"pretrained": "no such weights"}, "'no such weights' is neither"),
    ],
)
def test_constructor_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatOpt(None, **{"pretrained": learned(Adam()), **options})  # type: ignore[arg-type]


def test_unknown_options_fail() -> None:
    with pytest.raises(TypeError, match="betas"):
        FlatOpt(make_params("network"), pretrained=learned(Adam()), betas=(0.9, 0.99))  # type: ignore[call-arg]


def test_constructor_is_silent_and_has_a_repr(capfd: pytest.CaptureFixture[str], toy: LearnedRule) -> None:
    opt = FlatOpt(make_params("network"), pretrained=toy, num_steps=10)
    assert capfd.readouterr() == ("", "")
    assert "num_steps: 10" in repr(opt)


def test_weights_come_from_a_folder(tmp_path: Path, toy: LearnedRule) -> None:
    adam = learned(Adam(lr=0.5))
    adam.save_pretrained(tmp_path / "adam")
    opt = FlatOpt(make_params("network"), pretrained=tmp_path / "adam")
    assert opt.learned.rule == adam.rule


def test_import_is_light() -> None:
    code = """
import sys, flatopt
heavy = ("flatopt.metatrain", "flatopt.evaluate", "flatopt.tasks", "huggingface_hub", "datasets", "sklearn",
         "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint")
print([name for name in heavy if name in sys.modules])
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positional", [True, False])
def test_closure_is_called_once_with_gradients_and_its_loss_is_returned(positional: bool, toy: LearnedRule) -> None:
    params = make_params("network")
    before = snapshot(params)
    opt = FlatOpt(params, pretrained=toy)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = OPTIMIZEES["network"].loss(params)
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        returned = opt.step(closure) if positional else opt.step(closure=closure)
    assert len(calls) == 1 and returned is calls[0]
    assert not unchanged(params, before)
    assert opt.step() is None and opt.step(None) is None


def test_gradients_are_never_modified(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, maximize=True, weight_decay=0.1)
    set_grads(params, 0)
    grads = [param.grad for param in params]
    before, versions = snapshot(grads), [grad._version for grad in grads]
    opt.step()
    assert unchanged(grads, before)
    assert [grad._version for grad in grads] == versions
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


def test_zero_gradient_history_moves_nothing(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, weight_decay=0.5)
    before = snapshot(params)
    set_grads(params, 0, scale=0.0)
    for _ in range(3):
        opt.step()
    assert unchanged(params, before)
    assert all(float(state["step"]) == 0 for state in opt.state.values())


@pytest.mark.parametrize("name", RULE_CASES)
def test_a_gradient_of_zeros_is_none(name: str) -> None:
    """Directions are brought to unit size: a momentum that only dies away would go on moving the tensor."""
    frozen, other = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    opt = FlatOpt([frozen, other], pretrained=learned(name, perturbation=0.05), weight_decay=0.1)
    for seed in range(4):
        grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        is_zero, before = seed in (1, 2), frozen.detach().clone()
        frozen.grad, other.grad = grad * (not is_zero), grad
        opt.step()
        assert torch.equal(frozen, before) == is_zero
    assert [float(opt.state[param]["step"]) for param in (frozen, other)] == [2, 4]


def test_a_late_parameter_joins_the_shared_state_wherever_it_stands(toy: LearnedRule) -> None:
    ends = []
    for order in ((0, 1, 2, 3), (3, 0, 1, 2)):  # the late one is the last, or the first of its bucket
        params = make_params("network", dtype=torch.float64)
        opt = FlatOpt([params[index] for index in order], pretrained=toy)
        for seed in range(6):
            set_grads(params, seed)
            if seed < 4:
                params[3].grad = None
            opt.step()
        ends.append(snapshot(params))
        shared = {float(state["shared.log_scale"]) for state in opt.state.values()}
        assert len(shared) == 1 and shared != {0.0}
    torch.testing.assert_close(*ends)


def test_clock_runs_for_the_whole_model(toy: LearnedRule) -> None:
    seen = []

    class Spy(ToyMixer):
        def mix(self, weights, summaries_NS, memory_NM, shared, context, *, shapes):  # type: ignore[no-untyped-def]
            seen.append((float(context.step), float(context.num_steps), len(summaries_NS)))
            return super().mix(weights, summaries_NS, memory_NM, shared, context, shapes=shapes)

    params = make_params("network")
    opt = FlatOpt(params[:3], pretrained=LearnedRule(Spy(), toy.weights), num_steps=9)
    for seed in range(2):
        step_with(opt, params[:3], seed)
    opt.add_param_group({"params": params[3:]})  # unfrozen late
    step_with(opt, params, 2)
    assert seen == [(1.0, 9.0, 3), (2.0, 9.0, 3), (3.0, 9.0, 4)]
    assert [float(opt.state[param]["step"]) for param in params] == [3, 3, 3, 1]


def test_sparse_gradients_are_refused_before_anything_changes(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    set_grads(params, 0)
    params[-2].grad = params[-2].grad.to_sparse()
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()
    assert unchanged(params, before) and not opt.state


def test_integer_parameters_are_refused_only_with_a_gradient(toy: LearnedRule) -> None:
    frozen = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    params = [*make_params("network"), frozen]
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params[:-1], 0)  # quantised frozen layers come with model.parameters()
    frozen.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="torch.int64"):
        opt.step()


@pytest.mark.parametrize("name", ["adam", "toy-mixer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layout_of_memory_does_not_matter(name: str, dtype: torch.dtype) -> None:
    def run(strided: bool) -> list[Tensor]:
        image, matrix = make_params("network", dtype=dtype)[:2]
        image = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        if strided:
            image = image.to(memory_format=torch.channels_last)
            matrix = matrix.detach().mT.contiguous().mT
        params = [torch.nn.Parameter(image), torch.nn.Parameter(matrix.detach())]
        assert params[1].is_contiguous() is not strided
        opt = FlatOpt(params, pretrained=learned(name, perturbation=0.1), weight_decay=0.1)
        for seed in range(3):
            set_grads(params, seed)
            if strided:
                params[0].grad = params[0].grad.to(memory_format=torch.channels_last)
                assert not params[0].is_contiguous()
            opt.step()
        assert all(value.is_contiguous() for state in opt.state.values() for value in state.values())
        return params

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["adam", "toy-mixer"])
def test_complex_parameters_are_pairs(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.complex64, generator=generator))
    pairs = torch.nn.Parameter(torch.view_as_real(whole.detach()).clone())
    opts = [FlatOpt([param], pretrained=learned(name, perturbation=0.1), weight_decay=0.1) for param in (whole, pairs)]
    for step in range(4):
        grad = torch.randn(3, 2, dtype=torch.complex64, generator=generator)
        whole.grad = grad.conj() if step == 2 else grad  # a lazy conjugate has no real view
        pairs.grad = torch.view_as_real(whole.grad.resolve_conj())
        for opt in opts:
            opt.step()
        opts[0].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    assert torch.equal(torch.view_as_real(whole.detach()), pairs)


def test_dtypes_may_be_mixed(toy: LearnedRule) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 6).to(dtype)) for dtype in dtypes]
    opt = FlatOpt(params, pretrained=toy)
    before = snapshot(params)
    for seed in range(3):
        step_with(opt, params, seed)
    for param, old in zip(params, before, strict=True):
        assert param.dtype == old.dtype and not torch.equal(param, old)
        wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
        assert {value.dtype for key, value in opt.state[param].items() if key != "num_skipped"} == {wanted}


def test_half_parameters_are_rounded_once() -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, -3.0]).bfloat16())
    opt = FlatOpt([param], pretrained=learned(Adam(lr=0.02)), weight_decay=0.3)
    param.grad = torch.tensor([1.0, -1.0]).bfloat16()
    opt.step()
    expected = torch.tensor([1.0, -3.0]) * (1 - 0.02 * 0.3) + torch.tensor([-0.02, 0.02])
    assert torch.equal(param.detach(), expected.bfloat16())


def test_autocast_does_not_reach_the_rule(toy: LearnedRule) -> None:
    runs = []
    for enabled in (False, True):
        params = make_params("network")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            step_with(FlatOpt(params, pretrained=toy), params, 0)
        runs.append(snapshot(params))
    assert unchanged(*runs)


def test_large_tensors_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch, toy: LearnedRule) -> None:
    runs = []
    for size in (None, 5):
        if size:
            monkeypatch.setattr("flatopt._applied.EAGER", Sizes(chunk=size, pack=0))
        params = make_params("network", dtype=torch.float64)
        opt = FlatOpt(params, pretrained=toy)
        for seed in range(3):
            step_with(opt, params, seed)
        runs.append(snapshot(params))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


# --- gradients that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_unusable_gradient_counts_as_none(bad: float, toy: LearnedRule) -> None:
    runs = []
    for spoil in (False, True):
        params = make_params("network")
        opt = FlatOpt(params, pretrained=toy, weight_decay=0.1)
        step_with(opt, params, 0)
        set_grads(params, 1)
        if spoil:
            params[1].grad.view(-1)[3] = bad
            with pytest.warns(RuntimeWarning, match="parameter 1 of group 0 holds NaN"):
                opt.step()
            assert int(opt.state[params[1]].pop("num_skipped")) == 1
        else:
            params[1].grad = None
            opt.step()
            opt.state[params[1]].pop("num_skipped")
        for param in params:
            opt.state[param].setdefault("num_skipped", torch.zeros((), dtype=torch.int64))
        step_with(opt, params, 2)
        runs.append((snapshot(params), opt))
    assert unchanged(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_of_a_usable_gradient_is_where_1e8_squares_still_add_up(dtype: torch.dtype) -> None:
    bound = math.sqrt(torch.finfo(dtype).max) * 1e-4
    for factor, is_usable in ((0.99, True), (1.01, False)):
        param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        opt = FlatOpt([param], pretrained=learned(Adam()))
        param.grad = torch.tensor([0.0, -factor * bound, 1.0], dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
        assert float(opt.state[param]["step"]) == is_usable
        assert int(opt.state[param]["num_skipped"]) == (not is_usable)


def test_warning_comes_once_and_names_the_parameter(toy: LearnedRule) -> None:
    model = torch.nn.Linear(2, 2)
    opt = FlatOpt(model.named_parameters(), pretrained=toy)
    before = snapshot(list(model.parameters()))
    for param in model.parameters():
        param.grad = torch.full_like(param, float("nan"))
    with pytest.warns(RuntimeWarning, match="parameter 'weight'") as caught:
        opt.step()
    assert len(caught) == 1 and caught[0].filename == __file__
    opt.step()
    assert [int(state["num_skipped"]) for state in opt.state.values()] == [2, 2]
    assert unchanged(list(model.parameters()), before)
    for state in opt.state.values():
        assert all(torch.isfinite(value).all() for value in state.values())


# --- copies, checkpoints (design.md section 5, traps 1 to 5) -------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_keep_what_is_not_in_the_state_dict(copier, toy: LearnedRule) -> None:  # type: ignore[no-untyped-def]
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    copied = copier(opt)
    assert copied.learned.rule == toy.rule
    assert {key for key in vars(opt) if not key.startswith("__")} <= vars(copied).keys() | {
        "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured",
    }
    own = copied.param_groups[0]["params"]
    step_with(copied, own, 1)
    step_with(opt, params, 1)
    assert unchanged(own, params)


def test_torch_save_of_the_optimizer(tmp_path: Path, toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    torch.save(opt, tmp_path / "opt.pt")
    loaded = torch.load(tmp_path / "opt.pt", weights_only=False)
    assert_same_state(opt, loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loaded_state_keeps_its_precision_and_is_not_shared(dtype: torch.dtype, toy: LearnedRule) -> None:
    params = make_params("network", dtype=dtype)
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    other = FlatOpt(make_params("network", dtype=dtype), pretrained=toy)
    other.load_state_dict(opt.state_dict())
    assert_same_state(opt, other)  # in-process, same dtype, other storage


def test_state_follows_the_parameter_dtype_it_is_loaded_into(toy: LearnedRule) -> None:
    params = make_params("network", dtype=torch.float32)
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    others = make_params("network", dtype=torch.float64)
    other = FlatOpt(others, pretrained=toy)
    other.load_state_dict(opt.state_dict())
    step_with(other, others, 1)
    assert other.state[others[0]]["exp_avg"].dtype == torch.float64


def test_user_hooks_see_the_restored_state_and_may_replace_the_dict(toy: LearnedRule) -> None:
    params = make_params("network", dtype=torch.bfloat16)
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    saved = opt.state_dict()
    replaced = copy.deepcopy(saved)
    replaced["state"][0]["exp_avg"] += 1

    other = FlatOpt(make_params("network", dtype=torch.bfloat16), pretrained=toy)
    seen = []
    other.register_load_state_dict_pre_hook(lambda opt, state_dict: replaced)
    other.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state_dict()["state"][0]["exp_avg"].clone()))
    other.load_state_dict(saved)
    assert torch.equal(seen[0], replaced["state"][0]["exp_avg"])
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_older_state_dicts_load(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy, num_steps=7)
    step_with(opt, params, 0)
    old = copy.deepcopy(opt.state_dict())
    for key in ("num_steps", "maximize", "momentum"):
        del old["param_groups"][0][key]
    for state in old["state"].values():
        del state["num_skipped"]
        state["step"] = float(state["step"])  # as the very old optimizers of torch kept it
    other = FlatOpt(params, pretrained=toy, num_steps=7)
    other.load_state_dict(old)
    assert_same_state(opt, other)
    assert other.param_groups[0]["num_steps"] == 7


def test_state_of_another_optimizer_is_refused_untouched(toy: LearnedRule) -> None:
    params = make_params("network")
    adam = torch.optim.Adam(params)
    step_with(adam, params, 0)  # type: ignore[arg-type]
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="has no 'memory': it was saved by another optimizer or rule than 'toy-mixer'"):
        opt.load_state_dict(adam.state_dict())
    torch.testing.assert_close(opt.state_dict(), before, rtol=0, atol=0)
    assert not opt._optimizer_load_state_dict_pre_hooks


def test_state_dict_holds_only_tensors_and_numbers(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    saved = opt.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert all(isinstance(value, Tensor) for state in saved["state"].values() for value in state.values())
    group = saved["param_groups"][0]
    assert all(isinstance(value, int | float) for key, value in group.items() if key != "params")


def test_reading_the_distributed_state_dict_changes_nothing(toy: LearnedRule) -> None:
    runs = []
    for read in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        opt = FlatOpt(model.parameters(), pretrained=toy, weight_decay=0.5)
        params = list(model.parameters())
        before = snapshot(params)
        if read:
            get_optimizer_state_dict(model, opt)  # steps a fresh optimizer with lr=0 and zero gradients
            assert unchanged(params, before)
        step_with(opt, params, 0)
        runs.append((snapshot(params), opt))
    assert unchanged(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_checkpoint_round_trip(tmp_path: Path, flatten: bool, dtype: torch.dtype, toy: LearnedRule) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def fresh() -> tuple[torch.nn.Module, FlatOpt]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
        return model, FlatOpt(model.parameters(), pretrained=toy, num_steps=20)

    def save(state_dict: dict[str, object]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is no process group
            dcp.save(state_dict, checkpoint_id=tmp_path)

    def load(state_dict: dict[str, object]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state_dict, checkpoint_id=tmp_path)

    model, opt = fresh()
    for seed in range(3):
        step_with(opt, list(model.parameters()), seed)
    save({"opt": get_optimizer_state_dict(model, opt, options=options)})

    other_model, other = fresh()
    other_model.load_state_dict(model.state_dict())
    loaded = get_optimizer_state_dict(other_model, other, options=options)
    load({"opt": loaded})
    set_optimizer_state_dict(other_model, other, loaded, options=options)
    assert_same_state(opt, other)
    for optimizer, module in ((opt, model), (other, other_model)):
        step_with(optimizer, list(module.parameters()), 3)
    assert unchanged(list(model.parameters()), list(other_model.parameters()))


# --- state in bfloat16, seeded initial state -----------------------------------------------------------------------

HALF = {"state_dtype": torch.bfloat16}
half_rules = pytest.mark.parametrize("name", ["l2o-dm", "rnnprop", "l2o-scale"])


@half_rules
def test_only_compressible_state_is_kept_in_half(name: str) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=learned(name), **HALF)
    step_with(opt, params, 0)
    compressible = opt.learned.rule.compressible_state
    assert compressible and not compressible & {"step", "memory"}
    for state in opt.state.values():
        for key, value in state.items():
            if key != "num_skipped":
                assert value.dtype == (torch.bfloat16 if key in compressible else torch.float32), key


@half_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_run_with_state_in_half_resumes_bit_for_bit(name: str, dtype: torch.dtype, how: str) -> None:
    params = make_params("network", dtype=dtype)
    opt = FlatOpt(params, pretrained=learned(name), **HALF)
    for seed in range(3):
        step_with(opt, params, seed)
    if how == "state_dict":
        others = [torch.nn.Parameter(param.detach().clone()) for param in params]
        other = FlatOpt(others, pretrained=learned(name), **HALF)
        other.load_state_dict(opt.state_dict())
    else:
        other = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
        others = other.param_groups[0]["params"]
    assert_same_state(opt, other)
    for seed in range(3, 6):
        step_with(opt, params, seed)
        step_with(other, others, seed)
    assert unchanged(params, others)
    assert_same_state(opt, other)


@half_rules
def test_state_in_half_changes_the_path_by_little(name: str) -> None:
    paths = {}
    for state_dtype in (None, torch.bfloat16):
        params = make_params("network")
        start = snapshot(params)
        opt = FlatOpt(params, pretrained=learned(name), state_dtype=state_dtype)
        train(opt, params, "network", 50)
        paths[state_dtype] = torch.cat([(a - b).detach().flatten() for a, b in zip(params, start, strict=True)])
    deviation = (paths[torch.bfloat16] - paths[None]).norm() / paths[None].norm()
    assert 0 < deviation < 0.03


def test_state_in_half_trains_as_well() -> None:
    losses = {}
    for state_dtype in (None, torch.bfloat16):
        params = make_params("network")
        rule = learned("l2o-scale-last")  # the only one of these that goes downhill untrained
        losses[state_dtype] = train(FlatOpt(params, pretrained=rule, state_dtype=state_dtype), params, "network", 200)
    assert losses[None][-1] < 0.6 * losses[None][0]
    assert losses[torch.bfloat16][-1] == pytest.approx(losses[None][-1], rel=0.02)


@half_rules
def test_cutting_does_not_change_a_run_with_state_in_half(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for size in (None, 5):
        if size:
            monkeypatch.setattr("flatopt._applied.EAGER", Sizes(chunk=size, pack=0))
        params = make_params("network", dtype=torch.float64)
        opt = FlatOpt(params, pretrained=learned(name), **HALF)
        for seed in range(3):
            step_with(opt, params, seed)
        runs.append(snapshot(params))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_memory_of_a_step_does_not_grow_with_what_is_kept_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatopt._applied.EAGER", EAGER._replace(chunk=1000))
    param = torch.nn.Parameter(torch.zeros(40_000))
    opt = FlatOpt([param], pretrained=learned("l2o-dm"), **HALF)
    step_with(opt, [param], 0)
    whole_state = 80 * 4 * param.numel()  # of which a copy in float32 would be this large
    assert peak_bytes(opt.step) < whole_state / 4


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_makes_and_loads_state_in_half(copier: Callable[[FlatOpt], FlatOpt]) -> None:
    params = make_params("network")
    copied = copier(FlatOpt(params, pretrained=learned("l2o-dm"), **HALF))
    own = copied.param_groups[0]["params"]
    step_with(copied, own[:2], 0)
    whole = FlatOpt(params, pretrained=learned("l2o-dm"))
    step_with(whole, params, 0)
    assert copied.state[own[0]]["cell_0"].dtype == torch.bfloat16  # made after the copy
    copied.load_state_dict(whole.state_dict())
    assert copied.state[own[3]]["cell_0"].dtype == torch.bfloat16  # loaded after the copy


def test_state_changes_its_precision_when_loaded_elsewhere() -> None:
    params = make_params("network")
    whole, half = (FlatOpt(params, pretrained=learned("l2o-dm"), **options) for options in ({}, HALF))
    step_with(whole, params, 0)
    half.load_state_dict(whole.state_dict())
    assert half.state[params[0]]["cell_0"].dtype == torch.bfloat16
    whole.load_state_dict(half.state_dict())
    assert whole.state[params[0]]["cell_0"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("l2o-dm", {"state_dtype": torch.float16}, "Invalid state_dtype value: torch.float16"),
        ("adam", {"state_dtype": torch.bfloat16}, "all state of 'adam' needs full precision"),
        ("adam", {"seed": -1}, "Invalid seed value: -1"),
    ],
)
def test_state_options_are_checked(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatOpt(make_params("network"), pretrained=learned(name), **options)  # type: ignore[arg-type]


def initial_learning_rates(seed: int, order: tuple[int, ...] = (0, 1, 2, 3)) -> list[Tensor]:
    """Return the random part of the initial state, made for some parameters before others."""
    params = make_params("network")
    opt = FlatOpt(params, 0.0, pretrained=learned("l2o-scale"), seed=seed)
    for index in order:
        for param in params:
            param.grad = None
        set_grads(params[index : index + 1], 0)
        opt.step()
    return [opt.state[param]["log_lr"] for param in params]


def test_initial_learning_rates_depend_on_the_seed_and_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def stay(*arguments: Any) -> RuleResult:
        return RuleResult([], [], arguments[5])

    monkeypatch.setattr("flatopt._applied.apply_rule", stay)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = initial_learning_rates(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert unchanged(initial_learning_rates(seed=1, order=(2, 0, 3, 1)), first)
    other = initial_learning_rates(seed=2)
    for one in first:  # nor does a tensor start as another one of a neighbouring seed
        for two in other:
            shorter = min(one.numel(), two.numel())
            assert not torch.equal(one.flatten()[:shorter], two.flatten()[:shorter])
    assert torch.cat([value.flatten() for value in first]).unique().numel() > 100  # every coordinate has its own


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_parameter_unfrozen_after_resuming_starts_as_it_would_have(how: str) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=learned("l2o-scale"), seed=3)
    step_with(opt, params[:2], 0)
    if how == "state_dict":
        others = [torch.nn.Parameter(param.detach().clone()) for param in params]
        other = FlatOpt(others, pretrained=learned("l2o-scale"))
        other.load_state_dict(opt.state_dict())
    else:
        other = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
        others = other.param_groups[0]["params"]
    step_with(opt, params, 1)
    step_with(other, others, 1)
    assert_same_state(opt, other)
    assert unchanged(params, others)


# --- many optimizers for one model ----------------------------------------------------------------------------------

TENSOR_LOCAL = ["adam", "orthogonalized-momentum", "orthogonalized-momentum, strips of 3", "l2o-dm", "rnnprop"]


def deep_net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Linear(4, 16)]
    for _ in range(6):
        layers += [torch.nn.Tanh(), torch.nn.Linear(16, 16)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 1)).double()


@pytest.mark.parametrize("name", TENSOR_LOCAL)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("num_steps", [None, 30])
def test_one_optimizer_per_parameter_or_stage_equals_one_for_all(name: str, size: int, num_steps: int | None) -> None:
    """Fused backward, layer groups, pipeline stages: no tensor knows of another."""
    rule, options = learned(name, perturbation=0.05), {"num_steps": num_steps, "weight_decay": 0.1}
    whole, cut = deep_net(), deep_net()
    opt = FlatOpt(whole.parameters(), pretrained=rule, **options)
    params = list(cut.parameters())
    parts = [FlatOpt(params[at : at + size], pretrained=rule, **options) for at in range(0, len(params), size)]
    for step in range(25):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for model, opts in ((whole, [opt]), (cut, parts)):
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            for each in opts:
                each.step()
                each.zero_grad()
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --- what works on any optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.7, total_steps=10),
        lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, base_lr=0.1, max_lr=0.7, step_size_up=3),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10),
        lambda opt: torch.optim.lr_scheduler.LinearLR(opt),
    ],
    ids=["OneCycleLR", "CyclicLR", "CosineAnnealingLR", "LinearLR"],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_drive_the_learning_rate_and_nothing_else(make, tensor_lr: bool, toy: LearnedRule) -> None:  # type: ignore[no-untyped-def]
    scheduled, by_hand = (make_params("network") for _ in range(2))
    opt = FlatOpt(scheduled, torch.tensor(0.5) if tensor_lr else 0.5, pretrained=toy)
    other = FlatOpt(by_hand, 0.5, pretrained=toy)
    scheduler = make(opt)
    for seed in range(5):
        other.param_groups[0]["lr"] = float(opt.param_groups[0]["lr"])
        step_with(opt, scheduled, seed)
        step_with(other, by_hand, seed)
        scheduler.step()
    torch.testing.assert_close(scheduled, by_hand)


def test_plateau_scheduler_takes_the_returned_loss(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0, threshold_mode="abs")

    def closure() -> float:
        opt.zero_grad()
        loss = OPTIMIZEES["network"].loss(params)
        loss.backward()
        return loss.item()

    for _ in range(3):
        scheduler.step(opt.step(closure))
    assert opt.param_groups[0]["lr"] < 0.2


def test_named_parameters_are_accepted_and_kept(toy: LearnedRule) -> None:
    model = torch.nn.Linear(2, 2)
    opt = FlatOpt(model.named_parameters(), pretrained=toy)
    step_with(opt, list(model.parameters()), 0)
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = FlatOpt(model.parameters(), pretrained=toy)
    other.load_state_dict(opt.state_dict())
    assert_same_state(opt, other)


def test_step_hooks_fire(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    step_with(opt, params, 0)
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow: bool, toy: LearnedRule) -> None:
    scaled, plain = (make_params("network") for _ in range(2))
    opt, other = (FlatOpt(params, pretrained=toy) for params in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = snapshot(scaled)
    scaler.scale(OPTIMIZEES["network"].loss(scaled)).backward()
    OPTIMIZEES["network"].loss(plain).backward()
    if overflow:
        scaled[0].grad.fill_(float("inf"))
    scaler.step(opt)
    scaler.update()
    other.step()
    assert unchanged(scaled, before) is overflow
    if not overflow:
        torch.testing.assert_close(scaled, plain)


def test_gradient_accumulation_equals_the_sum(toy: LearnedRule) -> None:
    once, twice = (make_params("network", dtype=torch.float64) for _ in range(2))
    (2 * OPTIMIZEES["network"].loss(once)).backward()
    for _ in range(2):
        OPTIMIZEES["network"].loss(twice).backward()
    for params in (once, twice):
        FlatOpt(params, pretrained=toy).step()
    torch.testing.assert_close(once, twice)


def test_a_lazy_module_may_get_its_shapes_after_the_optimizer_is_made(toy: LearnedRule) -> None:
    ends = []
    for is_lazy in (False, True):
        torch.manual_seed(0)
        model = torch.nn.LazyLinear(2)
        opt = FlatOpt(model.parameters(), pretrained=toy) if is_lazy else None
        model(torch.ones(3, 4))
        opt = opt or FlatOpt(model.parameters(), pretrained=toy)
        step_with(opt, list(model.parameters()), 0)
        ends.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_parameters_may_be_replaced_by_moved_ones(toy: LearnedRule) -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=toy)
    step_with(opt, params, 0)
    with torch.no_grad():
        for param in params:
            param.data = param.data.clone()  # what module.to() does
    step_with(opt, params, 1)
    assert all(float(opt.state[param]["step"]) == 2 for param in params)


# --- compile -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-mixer", "orthogonalized-momentum"])
def test_compiled_equals_eager_and_compiles_once(name: str) -> None:
    torch._dynamo.reset()
    eager, compiled = (make_params("network") for _ in range(2))
    options = {"pretrained": learned(name, perturbation=0.1), "num_steps": 20, "weight_decay": 0.1}
    opt, fast = FlatOpt(eager, **options), FlatOpt(compiled, **options, compile=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", message="FlatOpt goes on without")
        for seed in range(6):
            for optimizer, params in ((opt, eager), (fast, compiled)):
                optimizer.param_groups[0]["lr"] = (1 + seed) / 6
                step_with(optimizer, params, seed)
            if seed == 0:
                graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs > 0
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_several_compiled_optimizers_stay_compiled() -> None:
    """torch compiles a function eight times at most, and one optimizer takes up to four for each phase."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", message="FlatOpt goes on without")
        for size, build in MODELS.values():
            params = list(build_model(build, size, 0).parameters())
            opt = FlatOpt(params, compile=True)
            for seed in range(2):
                step_with(opt, params, seed)


def test_two_dtypes_stay_below_the_limit_of_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and vectors have other states: each kind is compiled by itself."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    shapes = [(300, 400), (40, 5), (8, 9), (7,), (9000,), (1100, 300), ()]
    params = [
        torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
        for shape in shapes
    ]
    opt = FlatOpt(params, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatOpt goes on without")
        for seed in range(3):
            step_with(opt, params, seed)


def test_without_a_compiler_the_step_is_eager(monkeypatch: pytest.MonkeyPatch, toy: LearnedRule) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=broken, **options))
    eager, params = (make_params("network") for _ in range(2))
    opt, other = FlatOpt(eager, pretrained=toy), FlatOpt(params, pretrained=toy, compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for seed in range(2):
            step_with(opt, eager, seed)
            step_with(other, params, seed)
    assert [str(each.message)[:38] for each in caught] == ["FlatOpt goes on without torch.compile:"]
    assert Path(caught[0].filename).name == "helpers.py"  # where the step is called
    assert unchanged(params, eager)


def test_the_limit_of_recompilations_is_known_by_its_earlier_name(monkeypatch: pytest.MonkeyPatch) -> None:
    exc = importlib.import_module("torch._dynamo.exc")
    error = exc.FailOnRecompileLimitHit
    monkeypatch.setattr(exc, "FailOnCacheLimitHit", error, raising=False)
    assert error in compile_errors()
    monkeypatch.delattr(exc, "FailOnRecompileLimitHit")
    assert error in compile_errors()


def test_beyond_the_limit_of_recompilations_the_step_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    eager, params = (make_params("network") for _ in range(2))
    wide = [torch.nn.Parameter(param.detach().double()) for param in params]
    opt, other = (
        FlatOpt(eager, pretrained=learned("orthogonalized-momentum")),
        FlatOpt([*params, *wide], pretrained=learned("orthogonalized-momentum"), compile=True),
    )
    limited = torch._dynamo.config.patch(cache_size_limit=1)  # the name that torch 2.6 knows, too
    with limited, pytest.warns(RuntimeWarning, match="FlatOpt goes on without torch.compile"):
        for seed in range(2):
            step_with(opt, eager, seed)
            set_grads(wide, seed)
            step_with(other, params, seed)
    for one, two in zip(eager, params, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


# --- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adam", "toy-mixer", "orthogonalized-momentum"])
def test_gpu_equals_cpu_and_devices_may_be_mixed(name: str) -> None:
    on_cpu = make_params("network")
    on_gpu = [torch.nn.Parameter(param.detach().cuda()) for param in on_cpu]
    opt = FlatOpt(on_cpu, pretrained=learned(name, perturbation=0.1), weight_decay=0.1)
    other = FlatOpt(on_gpu, torch.tensor(1.0), pretrained=learned(name, perturbation=0.1), weight_decay=0.1)
    for seed in range(5):
        step_with(opt, on_cpu, seed)
        step_with(other, on_gpu, seed)
    for one, two in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-4, atol=1e-5)

    mixed = FlatOpt([on_cpu[0], on_gpu[1]], pretrained=learned(name, perturbation=0.1))  # mixes within each device
    step_with(mixed, [on_cpu[0], on_gpu[1]], 0)
    moved = [torch.nn.Parameter(param.detach().cuda()) for param in on_cpu]
    loaded = FlatOpt(moved, pretrained=learned(name, perturbation=0.1))
    loaded.load_state_dict(opt.state_dict())
    assert {value.device.type for state in loaded.state.values() for value in state.values()} == {"cuda"}
    step_with(loaded, moved, 5)


def test_training_goes_down(toy: LearnedRule) -> None:
    params = make_params("network")
    losses = train(FlatOpt(params, pretrained=learned("toy-mixer")), params, "network", 20)
    assert losses[-1] < 0.5 * losses[0]
