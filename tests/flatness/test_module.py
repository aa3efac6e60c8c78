from __future__ import annotations

from functools import partial

import pytest
import torch
from flatness.problems import explicit_hessian, flat, generator, like
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flatopt import flatness


def images():
    g = generator()
    return torch.randn(10, 1, 6, 6, dtype=torch.float64, generator=g), torch.randint(3, (10,), generator=g)


def small_cnn():
    """A convolution (frozen bias), BatchNorm with non-trivial statistics, and a head."""
    g = generator(1)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten())
    module.append(nn.Linear(8, 3)).double()
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, dtype=torch.float64, generator=g))
        module[1].running_mean.fill_(0.3)
        module[1].running_var.fill_(1.7)
    module[0].bias.requires_grad_(False)
    return module.eval()


def test_loss_over_a_loader_is_the_mean_over_examples_with_a_ragged_last_batch():
    module, (inputs, targets) = small_cnn(), images()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    whole_fn, params = flatness.module_loss(module, F.cross_entropy, (inputs, targets))
    split_fn, _ = flatness.module_loss(module, F.cross_entropy, loader)
    expected = F.cross_entropy(module(inputs), targets).detach()
    torch.testing.assert_close(whole_fn(params), expected)
    torch.testing.assert_close(split_fn(params), expected)
    vector = like(torch.randn(flat(params).numel(), dtype=torch.float64, generator=generator()), params)
    torch.testing.assert_close(flatness.hvp(split_fn, params, vector), flatness.hvp(whole_fn, params, vector))


def test_only_trainable_parameters_are_measured_and_the_module_is_left_alone():
    module, data = small_cnn(), images()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loss_fn, params = flatness.module_loss(module, F.cross_entropy, data)
    assert set(params) == {name for name, _ in module.named_parameters()} - {"0.bias"}
    flatness.top_eigenvalue(loss_fn, params, num_iterations=3)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert all(param.grad is None for param in module.parameters())


def test_evaluation_mode_uses_running_statistics_and_training_mode_keeps_them():
    module, data = small_cnn(), images()
    loss_fn, params = flatness.module_loss(module, F.cross_entropy, data)
    evaluated = flatness.gradient_norm(loss_fn, params)
    module.train()
    trained = flatness.gradient_norm(loss_fn, params)
    assert not torch.isclose(evaluated, trained)
    assert (module[1].running_mean == 0.3).all() and module[1].num_batches_tracked == 0
    module.eval()
    assert torch.equal(flatness.gradient_norm(loss_fn, params), evaluated)


def test_flatness_of_agrees_with_the_explicit_hessian():
    module, data = small_cnn(), images()
    report = flatness.flatness_of(
        module, F.cross_entropy, DataLoader(TensorDataset(*data), 4), num_matvecs=60, generator=generator()
    )
    loss_fn, params = flatness.module_loss(module, F.cross_entropy, data)
    hessian = explicit_hessian(loss_fn, params)
    assert report["top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)
    spread = (2 * (hessian - hessian.diag().diag()).square().sum() / 60).sqrt()
    assert abs(report["hutchinson_trace"] - float(hessian.trace())) < 4 * float(spread)
    assert report["loss"] == pytest.approx(float(loss_fn(params)))
    assert report["gradient_norm"] == pytest.approx(float(flatness.gradient_norm(loss_fn, params)))
    assert report["sam_gap"] == pytest.approx(float(flatness.sam_gap(loss_fn, params)))


def test_tied_weights_count_once():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    module[2].weight = module[0].weight
    loss_fn, params = flatness.module_loss(module, F.mse_loss, (torch.eye(3), torch.eye(3)))
    assert list(params) == ["0.weight"]
    (expected,) = torch.autograd.grad(F.mse_loss(module(torch.eye(3)), torch.eye(3)), module[0].weight)
    torch.testing.assert_close(flatness.gradient_norm(loss_fn, params), expected.norm())


def test_parameterless_modules_and_empty_data_are_errors():
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient"):
        flatness.module_loss(nn.ReLU(), F.mse_loss, (torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match="at least one batch"):
        flatness.module_loss(nn.Linear(1, 1), F.mse_loss, [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by an import of curvlinops
def test_curvlinops_agrees_on_products_trace_and_eigenvalue():
    curvlinops = pytest.importorskip("curvlinops")
    module, (inputs, targets) = small_cnn(), images()
    batches = [(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]
    trainable = [param for param in module.parameters() if param.requires_grad]
    oracle = curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), trainable, batches)
    loss_fn, params = flatness.module_loss(module, F.cross_entropy, batches)
    vector = torch.randn(flat(params).numel(), dtype=torch.float64, generator=generator())
    torch.testing.assert_close(flat(flatness.hvp(loss_fn, params, like(vector, params))), oracle @ vector)

    dense = oracle @ torch.eye(len(vector), dtype=torch.float64)
    values = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(flatness.top_eigenvalue(loss_fn, params, tol=0.0), values[values.abs().argmax()])
    measure = flatness.HutchinsonTrace(num_matvecs=40)
    estimates = [measure(loss_fn, params, measure.sample_noise(params, generator(3))) * len(vector)]
    torch.manual_seed(0)
    estimates.append(curvlinops.hutchinson_trace(oracle, 40))
    spread = (2 * (dense - dense.diag().diag()).square().sum() / 40).sqrt()
    assert (estimates[0] - estimates[1]).abs() < 4 * 2**0.5 * spread


class LastState(nn.Module):
    """An LSTM and what it ends on."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 3, batch_first=True)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        return self.recurrent(sequence)[0][:, -1]


@pytest.mark.parametrize(
    "module", [LastState(), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)], ids=["lstm", "attention"]
)
def test_modules_whose_fast_kernels_have_no_second_derivatives_are_measured(module):
    module = module.eval()
    inputs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        targets = module(inputs) + 1
    measured = flatness.flatness_of(module, F.mse_loss, (inputs, targets), num_matvecs=4)
    assert measured["loss"] == pytest.approx(1.0, rel=1e-4) and measured["top_eigenvalue"] > 0


def test_what_has_no_meaningful_mean_is_refused():
    module, data = nn.Linear(2, 1), (torch.ones(3, 2), torch.ones(3, 1))
    for criterion in (nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum")):
        flatness.module_loss(module, criterion, data)
        with pytest.raises(ValueError, match="batches are averaged"):
            flatness.module_loss(module, criterion, [data, data])
    with pytest.raises(ValueError, match="at least one example"):
        flatness.module_loss(module, F.mse_loss, [data, (torch.ones(0, 2), torch.ones(0, 1))])
    with pytest.raises(ValueError, match="half precision is too coarse"):
        flatness.module_loss(module.bfloat16(), F.mse_loss, data)
