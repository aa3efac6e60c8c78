from __future__ import annotations

import torch

from flatopt.evaluate.baselines import BASELINES, SAM


def test_sam_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    lr, rho, momentum = 0.1, 0.3, 0.9
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    start = torch.randn(6, dtype=torch.float64, generator=generator)

    def loss_of(vector: torch.Tensor) -> torch.Tensor:
        return (matrix @ vector).square().sum().log1p()

    def gradient(vector: torch.Tensor) -> torch.Tensor:
        leaf = vector.clone().requires_grad_()
        return torch.autograd.grad(loss_of(leaf), leaf)[0]

    # Two tensors, so that a norm per tensor in place of the joint norm would show.
    params = [part.clone().requires_grad_() for part in start.split([2, 4])]
    optimizer = SAM(params, lr, rho=rho, momentum=momentum)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(torch.cat(params))
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    expected, buffer = start.clone(), torch.zeros_like(start)
    for step in range(4):
        at_start = loss_of(expected).item()
        ascent = gradient(expected)
        buffer = momentum * buffer + gradient(expected + rho * ascent / ascent.norm())
        expected = expected - lr * buffer
        assert optimizer.step(closure) == calls[2 * step]
        torch.testing.assert_close(torch.tensor(calls[2 * step]), torch.tensor(at_start))
        torch.testing.assert_close(torch.cat(params).detach(), expected, rtol=1e-9, atol=1e-9)
    assert len(calls) == 8


def test_sam_leaves_parameters_without_gradient_alone() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = SAM([used, unused], 0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert unused.tolist() == [1.0, 1.0]
    assert used[0].item() < 1.0


def test_baselines_have_grids_wide_enough_to_bracket_an_optimum() -> None:
    for baseline in BASELINES:
        assert len(baseline.lrs) >= 5
        assert max(baseline.lrs) / min(baseline.lrs) >= 100
        assert list(baseline.lrs) == sorted(baseline.lrs)
