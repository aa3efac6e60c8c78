"""PyTorch's own expectations of an optimizer, after ``TestOptimRenewed`` of its ``test/test_optim.py``.

That file is not in the torch wheel, the database it is driven by is.  ``run_torch_suite.py`` runs the true file where
``TEST_OPTIM_PY`` names it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytest.importorskip("expecttest", reason="torch.testing._internal.common_optimizers imports it")

from run_torch_suite import INFO  # noqa: E402
from torch.testing._internal.common_optimizers import OptimizerErrorEnum  # noqa: E402

from flatopt import FlatOpt  # noqa: E402

INPUTS = {case.desc: index for index, case in enumerate(INFO.optim_inputs_func(device="cpu"))}
by_input = pytest.mark.parametrize("desc", INPUTS)


def options(desc: str) -> dict[str, Any]:
    """Return fresh constructor arguments."""
    return INFO.optim_inputs_func(device="cpu")[INPUTS[desc]].kwargs


def linear(contiguous: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Parameter, Parameter, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 5, generator=generator).to(dtype)
    bias = torch.randn(10, generator=generator).to(dtype)
    if not contiguous:
        weight, bias = torch.stack([weight, weight], -1)[..., 0], torch.stack([bias, bias], -1)[..., 0]
    assert weight.is_contiguous() is contiguous
    return Parameter(weight), Parameter(bias), torch.randn(5, generator=generator).to(dtype)


def make_closure(opt: FlatOpt, weight: Parameter, bias: Parameter, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def run(opt: FlatOpt, closure: Callable[[], Tensor], num_steps: int) -> float:
    for _ in range(num_steps):
        opt.step(closure)
    return float(closure().detach())


@pytest.mark.parametrize("index", range(len(INFO.optim_error_inputs_func("cpu", torch.float32))))
def test_errors(index: int) -> None:
    case = INFO.optim_error_inputs_func("cpu", torch.float32)[index]
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            FlatOpt(params, **kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            FlatOpt(params, **kwargs)


@by_input
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", range(len(INFO.scheduler_inputs) + 1))
def test_forloop_goes_right_direction(desc: str, contiguous: bool, schedulers: int) -> None:
    weight, bias, x = linear(contiguous)
    opt = FlatOpt([weight, bias], **options(desc))
    opt._watch.told.add("scheduler")  # FlatOpt warns of a schedule on top of num_steps, PyTorch's tests take any
    made = [make(opt) for make in ([], *INFO.scheduler_inputs)[schedulers]]
    closure = make_closure(opt, weight, bias, x)
    start = float(closure().detach())
    for _ in range(20):
        loss = float(opt.step(closure).detach())
        for scheduler in made:
            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    end = float(closure().detach())
    assert end > start if opt.defaults["maximize"] else end < start


@by_input
def test_param_group_with_lrscheduler_goes_right_direction(desc: str) -> None:
    weight, bias, x = linear()
    kwargs = options(desc)
    opt = FlatOpt([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **kwargs)
    closure = make_closure(opt, weight, bias, x)
    plateau = ReduceLROnPlateau(opt)
    start = float(closure().detach())
    for _ in range(20):
        plateau.step(float(opt.step(closure).detach()))
    end = float(closure().detach())
    assert end > start if opt.defaults["maximize"] else end < start


@by_input
@pytest.mark.parametrize("num_dims", [0, 1, 2])
def test_tensor_lr(desc: str, num_dims: int) -> None:
    ends = []
    for lr in (0.1, torch.full((1,) * num_dims, 0.1)):
        weight, bias, x = linear()
        opt = FlatOpt([weight, bias], **options(desc) | {"lr": lr})
        run(opt, make_closure(opt, weight, bias, x), 5)
        ends.append((weight.detach(), bias.detach()))
    torch.testing.assert_close(*ends)


@by_input
def test_complex(desc: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(size, dtype=torch.complex64, generator=generator) for size in ((3,), (2, 2), ())]
    # A vector of complex numbers is a vector of twice as many real ones, not a matrix.
    shapes = [each.shape + (2,) if each.dim() > 1 else (2 * each.numel(),) for each in whole]
    pairs = [Parameter(torch.view_as_real(each).reshape(shape)) for each, shape in zip(whole, shapes, strict=True)]
    params = [Parameter(each) for each in whole]
    opts = FlatOpt(params, **options(desc)), FlatOpt(pairs, **options(desc))
    for _ in range(4):
        for param, pair in zip(params, pairs, strict=True):
            param.grad = torch.randn(param.shape, dtype=torch.complex64, generator=generator)
            pair.grad = torch.view_as_real(param.grad).reshape(pair.shape)
        for opt in opts:
            opt.step()
    for param, pair in zip(params, pairs, strict=True):
        assert torch.equal(torch.view_as_real(param.detach()).reshape(pair.shape), pair)


@by_input
def test_param_groups_weight_decay(desc: str) -> None:
    ends = []
    for decay in (0.0, 0.3):
        weight, bias, x = linear()
        kwargs = options(desc) | {"weight_decay": 0.0}
        opt = FlatOpt([{"params": [weight], "weight_decay": decay}, {"params": [bias]}], **kwargs)
        make_closure(opt, weight, bias, x)()
        opt.step()
        ends.append((weight.detach().clone(), bias.detach().clone()))
    assert ends[1][0].norm() < ends[0][0].norm()
    assert torch.equal(ends[0][1], ends[1][1])


@by_input
def test_param_groups_lr(desc: str) -> None:
    weight, bias, x = linear()
    still = Parameter(torch.ones(2))
    opt = FlatOpt([{"params": [weight, bias]}, {"params": [still], "lr": 1e-28}], **options(desc))
    closure = make_closure(opt, weight, bias, x)
    start = float(closure().detach())
    for _ in range(20):
        closure()
        still.grad = torch.rand_like(still)
        opt.step()
    assert torch.equal(still, torch.ones(2))
    end = float(closure().detach())
    assert end > start if opt.defaults["maximize"] else end < start


@by_input
def test_step_is_noop_when_params_have_no_grad(desc: str) -> None:
    param = Parameter(torch.randn(3, 4, requires_grad=False))
    before = param.detach().clone()
    opt = FlatOpt([param], **options(desc))
    assert opt.step(lambda: 1) == 1
    assert torch.equal(param, before)


@by_input
@pytest.mark.parametrize("num_params", [1, 3])
def test_step_is_noop_for_zero_grads(desc: str, num_params: int) -> None:
    params = [Parameter(torch.ones(2, 3)) for _ in range(num_params)]
    opt = FlatOpt(params, **options(desc))
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert all(torch.equal(param, torch.ones(2, 3)) for param in params)


@by_input
def test_optimizer_can_be_printed(desc: str) -> None:
    assert repr(FlatOpt(linear()[:2], **options(desc))).startswith("FlatOpt (\nParameter Group 0\n")


@by_input
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("named_after", [False, True])
def test_state_dict_deterministic(desc: str, named: bool, named_after: bool) -> None:
    def make(weight: Parameter, bias: Parameter, with_names: bool) -> FlatOpt:
        params = [("weight", weight), ("bias", bias)] if with_names else [weight, bias]
        return FlatOpt(params, **options(desc))

    weight, bias, x = linear()
    opt = make(weight, bias, named)
    run(opt, make_closure(opt, weight, bias, x), 5)
    other_weight, other_bias = Parameter(weight.detach().clone()), Parameter(bias.detach().clone())
    other = make(other_weight, other_bias, named_after)
    other.load_state_dict(opt.state_dict())
    closures = make_closure(opt, weight, bias, x), make_closure(other, other_weight, other_bias, x)
    for _ in range(5):
        opt.step(closures[0])
        other.step(closures[1])
        assert torch.equal(weight, other_weight) and torch.equal(bias, other_bias)
    assert opt.state_dict()["state"].keys() == other.state_dict()["state"].keys()
    torch.testing.assert_close(opt.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)
    if named:
        assert other.param_groups[0]["param_names"] == ["weight", "bias"]


@by_input
def test_can_load_older_state_dict(desc: str) -> None:
    weight, bias, x = linear()
    opt = FlatOpt([weight, bias], **options(desc))
    closure = make_closure(opt, weight, bias, x)
    run(opt, closure, 2)
    old = copy.deepcopy(opt.state_dict())
    for group in old["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            del group[flag]
    opt.load_state_dict(old)
    opt.step(closure)


@by_input
@pytest.mark.parametrize("weights_only", [False, True])
def test_save_load_equality_with_weights_only(desc: str, weights_only: bool) -> None:
    weight, bias, x = linear()
    opt = FlatOpt([weight, bias], **options(desc))
    run(opt, make_closure(opt, weight, bias, x), 3)
    saved = opt.state_dict()
    with tempfile.TemporaryFile() as file:
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
    torch.testing.assert_close(loaded["state"], saved["state"], rtol=0, atol=0)
    assert loaded["param_groups"] == saved["param_groups"]


@by_input
def test_load_nontensor_step(desc: str) -> None:
    weight, bias, x = linear()
    opt = FlatOpt([weight, bias], **options(desc))
    closure = make_closure(opt, weight, bias, x)
    run(opt, closure, 2)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    opt.load_state_dict(saved)
    opt.step(closure)
    assert float(opt.state[weight]["step"]) == 3


@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks_and_their_order(prepend: bool) -> None:
    opt = FlatOpt(linear()[:2], **options("learned"))
    calls: list[str] = []
    handles = [
        opt.register_state_dict_pre_hook(lambda _: calls.append("pre")),
        opt.register_state_dict_post_hook(lambda _, saved: calls.append("post")),
        opt.register_load_state_dict_pre_hook(lambda _, saved: calls.append("load pre")),
        opt.register_load_state_dict_pre_hook(lambda _, saved: calls.append("load pre 2"), prepend=prepend),
        opt.register_load_state_dict_post_hook(lambda _: calls.append("load post")),
        opt.register_load_state_dict_post_hook(lambda _: calls.append("load post 2"), prepend=prepend),
    ]
    opt.load_state_dict(opt.state_dict())
    order = ["2", ""] if prepend else ["", "2"]
    assert calls == ["pre", "post"] + [f"load {when} {n}".strip() for when in ("pre", "post") for n in order]
    for handle in handles:
        handle.remove()
    opt.load_state_dict(opt.state_dict())
    assert len(calls) == 6


def test_step_all_hooks() -> None:
    weight, bias, x = linear()
    opt = FlatOpt([weight, bias], **options("learned"))
    calls: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append(0)),
        opt.register_step_pre_hook(lambda *_: calls.append(1)),
        opt.register_step_post_hook(lambda *_: calls.append(2)),
        register_optimizer_step_post_hook(lambda *_: calls.append(5)),
    ]
    opt.step(make_closure(opt, weight, bias, x))
    assert calls == [0, 1, 2, 5]
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(calls) == 4


@by_input
def test_deepcopy_copies_all_public_attrs(desc: str) -> None:
    weight, bias, x = linear()
    opt = FlatOpt([weight, bias], **options(desc))
    run(opt, make_closure(opt, weight, bias, x), 2)

    def public(obj: object) -> set[str]:
        return {key for key in obj.__dict__ if not key.startswith("_")}

    assert public(opt) == public(copy.deepcopy(opt))


@by_input
def test_non_empty_state(desc: str) -> None:
    weight, bias, x = linear()
    opt = FlatOpt([weight, bias], **options(desc))
    opt.step(make_closure(opt, weight, bias, x))
    assert len(opt.state) == 2 and all(opt.state.values())


@by_input
def test_grads_are_never_inplaced_into(desc: str) -> None:
    weight, bias, x = linear()
    opt = FlatOpt([weight, bias], **options(desc))
    make_closure(opt, weight, bias, x)()
    grads = [weight.grad.clone(), bias.grad.clone()]
    opt.step()
    assert torch.equal(weight.grad, grads[0]) and torch.equal(bias.grad, grads[1])


def test_infos_give_no_flag_of_the_implementation() -> None:
    for case in INFO.optim_inputs_func(device="cpu"):
        assert not {"foreach", "fused", "differentiable"} & case.kwargs.keys()


@pytest.mark.slow
@pytest.mark.skipif(
    "TEST_OPTIM_PY" not in os.environ, reason="TEST_OPTIM_PY does not name PyTorch's test/test_optim.py"
)
def test_the_true_file() -> None:
    runner = Path(__file__).with_name("run_torch_suite.py")
    done = subprocess.run([sys.executable, str(runner)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped")]
    assert all("GPU" in line or "cuda" in line.lower() for line in skipped), skipped


def test_warnings_are_errors_here() -> None:
    with pytest.raises(UserWarning):
        warnings.warn("this suite must see every warning", UserWarning, stacklevel=1)
