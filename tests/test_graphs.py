"""Steps on a GPU that are launched together as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from helpers import assert_same_state, learned, set_grads, step_with
from torch import Tensor

from flatopt import FlatOpt
from flatopt import _graphs as graphs
from flatopt._graphs import CALLS_BEFORE, MOST_CAPTURES, USEFUL_CALLS, Relaunched

SHAPES = [(300, 200), (40, 300), (64, 64), (64, 64), (9, 3, 5, 5), (300,), (7,), (1, 5), (), (0, 4), (2000, 700)]


class Recorded:
    """Stands in for captured kernels where there is no GPU."""

    def __init__(self, function, values, *, is_warm):
        assert is_warm
        self.function, self.num_calls = function, 0

    def __call__(self, *values):
        self.num_calls += 1
        return self.function(*values)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LaunchedTogether", Recorded)


def double(value: Tensor) -> list[Tensor]:
    return [2 * value]


def test_alike_calls_are_captured_and_others_are_not(without_gpu: None) -> None:
    call, one = Relaunched(), torch.ones(())
    for _ in range(CALLS_BEFORE):
        assert call("a", double, [one])[0] == 2
        assert call.together is None
    for _ in range(3):
        assert call("a", double, [one])[0] == 2
    together = call.together
    assert isinstance(together, Recorded) and together.num_calls == 3
    assert call("b", double, [one])[0] == 2 and together.num_calls == 3
    assert call("a", double, [one])[0] == 2 and together.num_calls == 4  # kept for when it comes back


def test_what_changes_all_the_time_is_given_up(without_gpu: None) -> None:
    call = Relaunched()
    for kind in range(2 * MOST_CAPTURES):
        for _ in range(CALLS_BEFORE + 2):
            assert call(kind, double, [torch.ones(())])[0] == 2
        assert (call.together is not None) == (kind < MOST_CAPTURES)


def test_what_changes_now_and_then_is_captured_again(without_gpu: None) -> None:
    call = Relaunched()
    for kind in range(2 * MOST_CAPTURES):
        for _ in range(CALLS_BEFORE + USEFUL_CALLS):
            assert call(kind, double, [torch.ones(())])[0] == 2
        assert call.captured == kind


def test_without_graphs_the_step_goes_on(without_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(graphs, "LaunchedTogether", fail)
    call = Relaunched()
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs: operation not permitted$") as caught:
        results = [call("a", double, [torch.ones(())])[0] for _ in range(CALLS_BEFORE + 5)]
    assert results == [2] * len(results) and len(caught) == 1


def on_gpu(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).cuda() for shape in shapes]
    values.append(torch.randn(30, 20, generator=generator, dtype=torch.float64).to(dtype).cuda().mT)
    return [torch.nn.Parameter(value) for value in values]


def captures(opt: FlatOpt) -> list[int]:
    """Return how often steps were captured, of what is launched together."""
    return [each.num_captures for each in opt._applied._relaunched.values() if each.together is not None]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:the gradient of parameter 2", "ignore:lr falls although num_steps is known")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("num_steps", [None, 44])
def test_a_captured_step_is_the_plain_one_to_the_bit(dtype: torch.dtype, num_steps: int | None) -> None:
    options = {"pretrained": learned("orthogonalized-momentum", perturbation=0.1), "weight_decay": 0.1}
    plain, fast = (on_gpu(dtype) for _ in range(2))
    opt = FlatOpt(plain, num_steps=num_steps, **options, compile=False)
    other = FlatOpt(fast, num_steps=num_steps, **options)
    for step in range(44):
        for optimizer, params in ((opt, plain), (other, fast)):
            optimizer.param_groups[0]["lr"] = 1 / (1 + step)
            set_grads(params, step)
            if step == 20:
                params[1].grad = None
            if step == 24:
                params[2].grad[0, 0] = math.nan
            if step == 28:
                optimizer.load_state_dict(optimizer.state_dict())
            if step == 34:
                optimizer.eval()
                optimizer.train()
            optimizer.step()
    for one, two in zip(plain, fast, strict=True):
        assert torch.equal(one, two) and not torch.isnan(one).any()
    assert_same_state(opt, other)
    assert captures(other) == [2] and not captures(opt)  # again after the state was loaded


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adam", "rnnprop", "l2o-scale"])
def test_other_rules_are_captured_too(name: str) -> None:
    plain, fast = (on_gpu(torch.float32, SHAPES[1:-1]) for _ in range(2))
    rule = learned(name, perturbation=0.1)
    opt, other = FlatOpt(plain, pretrained=rule, compile=False), FlatOpt(fast, pretrained=rule)
    for step in range(12):
        step_with(opt, plain, step)
        step_with(other, fast, step)
    for one, two in zip(plain, fast, strict=True):
        assert torch.equal(one, two)
    assert captures(other) == [1]


@pytest.mark.gpu
def test_what_cannot_be_captured_goes_on_kernel_by_kernel() -> None:
    plain, fast = (on_gpu(torch.float32, SHAPES[1:-1]) for _ in range(2))
    rule = learned("toy-mixer", perturbation=0.1)  # brings numbers to the GPU in every step
    opt, other = FlatOpt(plain, pretrained=rule, compile=False), FlatOpt(fast, pretrained=rule)
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs") as caught:
        for step in range(12):
            step_with(opt, plain, step)
            step_with(other, fast, step)
    assert len(caught) == 1 and not captures(other)
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.rand(1, device="cuda") < 1
    for one, two in zip(plain, fast, strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize(("limit", "by_default"), [(2**20, [1]), (2**16, [])])
def test_graphs_are_the_default_up_to_a_size_and_for_several_tensors(
    limit: int, by_default: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatopt._applied.MOST_BYTES_COPIED", limit)
    params = [torch.nn.Parameter(torch.ones(100, 100).cuda()) for _ in range(3)]
    made = FlatOpt(params), FlatOpt(params, compile=True), FlatOpt(params, compile=False), FlatOpt(params[:1])
    for optimizer in made:
        for step in range(6):
            step_with(optimizer, params, step)
    assert [captures(optimizer) for optimizer in made] == [by_default, [1], [], []]


@pytest.mark.gpu
def test_large_and_small_tensors_on_a_gpu_are_those_of_a_cpu() -> None:
    there = on_gpu(torch.float64, [*SHAPES, (5000, 1000)])
    here = [torch.nn.Parameter(param.detach().cpu()) for param in there]
    one, other = FlatOpt(here), FlatOpt(there)
    for step in range(4):
        step_with(one, here, step)
        step_with(other, there, step)
    for on_cpu, param in zip(here, there, strict=True):
        torch.testing.assert_close(param.cpu(), on_cpu, rtol=1e-9, atol=1e-10)


@pytest.mark.gpu
def test_autograd_knows_that_parameters_changed() -> None:
    params = [torch.nn.Parameter(torch.ones(3, 3, device="cuda")) for _ in range(2)]
    opt = FlatOpt(params)
    for step in range(6):
        loss = (params[0] @ params[1]).sum()
        step_with(opt, params, step)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert captures(opt) == [1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_of_two_gpus_has_a_graph_of_its_own() -> None:
    here = [
        torch.nn.Parameter(param.detach().to(f"cuda:{index % 2}")) for index, param in enumerate(on_gpu(torch.float32))
    ]
    plain = [torch.nn.Parameter(param.detach().clone()) for param in here]
    opt, other = FlatOpt(plain, compile=False), FlatOpt(here)
    for step in range(10):
        step_with(opt, plain, step)
        step_with(other, here, step)
    for one, two in zip(plain, here, strict=True):
        assert torch.equal(one, two)
    assert captures(other) == [1, 1]


@pytest.mark.gpu
def test_gradients_are_not_kept_alive() -> None:
    params = [torch.nn.Parameter(torch.ones(1000, 1000, device="cuda"))]
    opt = FlatOpt(params, compile=True)
    for step in range(6):
        step_with(opt, params, step)
    before = torch.cuda.memory_allocated()
    params[0].grad = None
    assert torch.cuda.memory_allocated() <= before - 4e6


@pytest.mark.gpu
def test_a_model_is_trained_while_other_threads_load_data() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1)).cuda()
    inputs = torch.randn(512, 20)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    opt, losses = FlatOpt(model.parameters()), []
    for _ in range(8):
        for batch, targets in torch.utils.data.DataLoader(data, 64, shuffle=True, pin_memory=True, num_workers=1):
            opt.zero_grad()
            loss = (model(batch.cuda(non_blocking=True)) - targets.cuda(non_blocking=True)).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert captures(opt) == [1] and losses[-1] < losses[0] / 20
