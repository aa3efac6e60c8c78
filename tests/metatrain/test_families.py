"""Every family of inner problems can be drawn, differentiated under vmap, and learned."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_map

from flatopt.metatrain.families import FAMILIES
from flatopt.tasks import Batch, Problems, Text

every_family = pytest.mark.parametrize("name", FAMILIES)
NUM_STEPS = 32


class Drawn(NamedTuple):
    problems: Problems
    train: Batch
    meta: Batch


def draw(name: str, seed: int = 0) -> Drawn:
    generator = torch.Generator().manual_seed(seed)
    problems = FAMILIES[name].sample_problems(2, generator)
    batches = [FAMILIES[name].sample_batches(problems, NUM_STEPS, split, generator) for split in ("train", "meta")]
    return Drawn(problems, *batches)


drawn = lru_cache(draw)


def first(batches: Batch) -> Batch:
    return Batch(*(part[0] for part in batches))


@every_family
def test_a_vmapped_gradient_is_finite_and_moves_every_tensor_and_equals_a_loop(name: str) -> None:
    problems, train, _ = drawn(name)
    step = grad_and_value(lambda params, problem, batch: FAMILIES[name].loss(problem, params, batch))
    grads, losses = vmap(step)(problems.params, problems, first(train))
    for grad in grads.values():
        assert grad.isfinite().all()
        assert (grad.flatten(1).norm(dim=1) > 0).all()
    for index in range(2):
        one = tree_map(lambda value, index=index: value[index], (problems.params, problems, first(train)))
        expected, loss = step(*one)
        torch.testing.assert_close(losses[index], loss)
        for key, grad in grads.items():
            torch.testing.assert_close(grad[index], expected[key], rtol=1e-3, atol=1e-5)


@every_family
def test_steps_along_the_sign_of_the_gradient_lower_loss_and_error_on_held_out_data(name: str) -> None:
    problems, train, meta = drawn(name)
    family, params = FAMILIES[name], problems.params
    gradient = vmap(torch.func.grad(lambda params, problem, batch: family.loss(problem, params, batch)))
    step_size = 0.01 if name != "mnist-mlp" else 0.003
    for index in range(NUM_STEPS):
        grads = gradient(params, problems, Batch(*(part[index] for part in train)))
        scale = step_size * (1 - index / NUM_STEPS)
        params = {key: value - scale * grads[key].sign() for key, value in params.items()}
    whole = Batch(*(part.transpose(0, 1).flatten(1, 2) for part in meta))
    before, after = (
        [vmap(measure)(problems, values, whole).mean() for measure in (family.loss, family.error)]
        for values in (problems.params, params)
    )
    assert after[0] < 0.96 * before[0], (before, after)
    assert after[1] < before[1], (before, after)


@every_family
def test_a_family_is_decided_by_the_generator(name: str) -> None:
    torch.testing.assert_close(draw(name), drawn(name), rtol=0, atol=0)


# The text of both splits is of different files, but has windows of 16 characters in common.
@pytest.mark.parametrize("name", [name for name in FAMILIES if not isinstance(FAMILIES[name].data, Text)])
def test_training_and_held_out_examples_are_different(name: str) -> None:
    _, train, meta = drawn(name)
    for index in range(2):
        seen, held_out = (
            {tuple(row) for row in part.inputs[:, index].flatten(0, 1).tolist()} for part in (train, meta)
        )
        # Fashion-MNIST has some images twice.
        assert len(held_out & seen) <= 0.01 * len(held_out)
