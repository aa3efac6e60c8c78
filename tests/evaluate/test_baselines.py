from __future__ import annotations

import pytest
import torch
from torch import nn

from flatopt.evaluate.baselines import SAM, MuonWithAdamW
from flatopt.evaluate.contestants import REFERENCE, Setting, baselines, neighbour


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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
def test_muon_with_adamw_is_each_of_them_on_its_own_parameters() -> None:
    def model() -> nn.Sequential:
        generator = torch.Generator().manual_seed(0)
        made = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
        for param in made.parameters():
            param.data.normal_(generator=generator)
        return made

    joint, apart = model(), model()
    inputs = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    optimizer = MuonWithAdamW(joint.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    others = [param for param in apart.parameters() if param.dim() != 2]
    parts = [
        torch.optim.Muon([apart[2].weight], 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, 0.01, weight_decay=0.1),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(part, 4) for part in parts]

    def closure() -> float:
        optimizer.zero_grad()
        joint(inputs).square().mean().backward()
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
        schedule.step()
        apart.zero_grad()
        apart(inputs).square().mean().backward()
        for one in (*parts, *schedules):
            one.step()
    for one, two in zip(joint.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_reference_is_a_part_of_adam_so_that_their_runs_are_shared() -> None:
    families = {one.name: one for one in baselines()}
    reference, adam = families[REFERENCE], families["Adam"]
    assert reference.identity() == adam.identity()
    assert set(reference.settings()) == {one for one in adam.settings() if one.cosine}


def test_a_neighbour_and_back_is_the_same_setting() -> None:
    for family in baselines():
        assert len(family.lrs) >= 5
        for setting in family.settings():
            assert neighbour(neighbour(setting, up=True), up=False) == setting
    assert neighbour(Setting(1.0, True), up=True) == Setting(3.0, True)
