"""Devices that can less than a CPU, other default devices, tensors without values, numbers that are not finite."""

from __future__ import annotations

import pytest
import torch
from cases import RULE_CASES
from helpers import learned, make_params, set_grads, step_with
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatopt import FlatOpt, list_pretrained

RULES = [name for name in RULE_CASES if name != "toy-mixer"]  # whose features are of all axes, and of bare squares

every_rule = pytest.mark.parametrize("name", RULE_CASES)
real_rule = pytest.mark.parametrize("name", RULES)
shipped = pytest.mark.parametrize("name", list_pretrained())


class WithoutFloat64(TorchDispatchMode):
    """A device such as MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} makes {value.dtype}, which this device does not have")
        return result


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_step_needs_no_float64(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,), ())]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    with WithoutFloat64():
        opt = FlatOpt(params, pretrained=learned(name), num_steps=20, weight_decay=0.1)
        for _ in range(12):
            opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.step()
        with pytest.raises(TypeError, match="does not have"):
            torch.zeros(1, dtype=torch.float64)


@shipped
@pytest.mark.parametrize("late", [False, True])
def test_the_default_device_does_not_matter(name: str, late: bool) -> None:
    ends = []
    for device in ("cpu", "meta"):
        params = make_params("network")
        opt = FlatOpt(params, pretrained=name) if late else None
        with torch.device(device):
            opt = opt or FlatOpt(params, pretrained=name)
            for seed in range(3):
                with torch.device("cpu"):
                    set_grads(params, seed)
                opt.step()
            opt.load_state_dict(opt.state_dict())
            opt.step()
        ends.append([param.detach() for param in params])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@every_rule
def test_a_step_on_the_meta_device_makes_state_without_values(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1)).to("meta")
    opt = FlatOpt(model.parameters(), torch.tensor(0.5, device="meta"), pretrained=learned(name), num_steps=9)
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(2, 4, device="meta")).sum().backward()
        opt.step()
    for param in model.parameters():
        assert all(value.device.type == "meta" for value in opt.state[param].values())
        assert param.device.type == "meta"


@every_rule
@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_on_fake_tensors_makes_fake_state_and_leaves_no_trace(name: str, by_name: bool) -> None:
    real = make_params("network")
    rule = learned(name)
    opt = FlatOpt(real, pretrained=rule)
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(param.shape)) for param in real]
        fake = FlatOpt(params, pretrained="l2o-scale" if by_name else rule)
        for param in params:
            param.grad = torch.ones_like(param)
        for _ in range(2):
            fake.step()
    assert all(isinstance(value, FakeTensor) for state in fake.state.values() for value in state.values())
    step_with(opt, real, 0)
    assert not any(isinstance(value, FakeTensor) for state in opt.state.values() for value in state.values())


def test_the_same_optimizer_may_see_fake_and_real_parameters() -> None:
    params = make_params("network")
    opt = FlatOpt(params, pretrained=learned("orthogonalized-momentum"))
    with FakeTensorMode():
        fake = [nn.Parameter(torch.randn(param.shape)) for param in params]
        opt.param_groups[0]["params"] = fake
        for param in fake:
            param.grad = torch.ones_like(param)
        opt.step()
    opt.param_groups[0]["params"] = params
    opt.state.clear()
    step_with(opt, params, 0)
    assert all(torch.isfinite(param).all() for param in params)


# --- what is not finite ----------------------------------------------------------------------------------------------


@real_rule
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("where", ["coordinate", "row", "all"])
def test_a_coordinate_that_is_not_finite_stays_where_it_is(
    name: str, value: float, weight_decay: float, where: str
) -> None:
    """A mask of -inf under a softmax, or a row that is never read; its gradient is exactly zero."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (5, 3), (7,))]
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[{"coordinate": (2, 1), "row": 2, "all": ...}[where]] = True
    with torch.no_grad():
        params[0][mask] = value
    start = [param.detach().clone() for param in params]
    opt = FlatOpt(params, pretrained=learned(name, perturbation=0.05), weight_decay=weight_decay)
    for seed in range(13):
        set_grads(params, seed)
        params[0].grad[mask] = 0.0
        opt.step()
    stayed = params[0].detach()[mask]
    assert bool((stayed.isnan() if value != value else stayed == value).all())
    assert all(torch.isfinite(param.detach()[~mask] if param is params[0] else param).all() for param in params)
    moved = [(param.detach() - old)[torch.isfinite(old)] for param, old in zip(params, start, strict=True)]
    assert all((move != 0).all() for move in moved)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@every_rule
def test_a_gradient_may_have_another_dtype_than_its_parameter(name: str) -> None:
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch gives a gradient the dtype of its parameter")
    ends = []
    for dtype in (torch.float32, torch.float64):
        params = make_params("network")
        opt = FlatOpt(params, pretrained=learned(name, perturbation=0.1))
        for seed in range(3):
            for param in params:
                param.grad_dtype = None
            set_grads(params, seed)
            for param in params:
                param.grad = param.grad.to(dtype)
            opt.step()
        ends.append([param.detach() for param in params])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@real_rule
@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (6, 1, 1), (1, 1, 6)])
def test_axes_of_length_one_make_no_matrix(name: str, shape: tuple[int, ...]) -> None:
    """The gains of ``weight_norm`` are ``(n, 1)``."""
    ends = []
    for size in ((6,), shape):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.randn(6, generator=generator).reshape(size))
        opt = FlatOpt([param], pretrained=learned(name, perturbation=0.1))
        for _ in range(12):
            param.grad = torch.randn(6, generator=generator).reshape(size)
            opt.step()
        ends.append(param.detach().flatten())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@real_rule
def test_a_complex_vector_is_a_vector(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(5, dtype=torch.complex64, generator=generator))
    flat = nn.Parameter(torch.view_as_real(whole.detach()).flatten().clone())
    opts = [FlatOpt([param], pretrained=learned(name, perturbation=0.1)) for param in (whole, flat)]
    for _ in range(12):
        whole.grad = torch.randn(5, dtype=torch.complex64, generator=generator)
        flat.grad = torch.view_as_real(whole.grad).flatten()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()).flatten(), flat.detach(), rtol=1e-6, atol=1e-7)
