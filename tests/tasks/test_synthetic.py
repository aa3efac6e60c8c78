"""Synthetic problems against their closed forms."""

from __future__ import annotations

import pytest
import torch

from flatopt.tasks import MLP, QuadraticTask, TeacherStudentTask


@pytest.mark.parametrize("rotate", [False, True])
def test_the_hessian_has_the_stated_spectrum(rotate: bool, generator: torch.Generator) -> None:
    task = QuadraticTask(dimension=5, condition_number=1000.0, rotate=rotate)
    hessian = task.hessian()
    eigenvalues = torch.linalg.eigvalsh(hessian.double())
    torch.testing.assert_close(eigenvalues, torch.logspace(-3, 0, 5, dtype=torch.float64), rtol=1e-3, atol=1e-6)
    assert (hessian - torch.diag(hessian.diagonal())).abs().max().gt(1e-3) == rotate
    batch = task.sample_batch(generator, "train")
    # Reverse over reverse: forward mode compiles decompositions with the deprecated torch.jit.
    twice = torch.func.jacrev(torch.func.jacrev(lambda x: task.loss({"x": x}, batch)))
    measured = twice(torch.randn(5, generator=generator))
    torch.testing.assert_close(measured, hessian, rtol=1e-4, atol=1e-6)


def test_noise_adds_its_closed_form_to_the_loss(generator: torch.Generator) -> None:
    task = QuadraticTask(dimension=4, condition_number=10.0, noise_std=0.5)
    params = task.init(generator)
    batch = task.sample_batch(generator, "train", 20_000)
    expected = 0.5 * params["x"] @ task.hessian() @ params["x"] + 0.5 * 0.25 * task.hessian().trace()
    assert task.loss(params, batch).item() == pytest.approx(expected.item(), rel=0.03)


def test_a_student_that_is_the_teacher_has_no_loss_but_the_noise() -> None:
    model = MLP(sizes=(3, 4, 1), activation="tanh")
    task = TeacherStudentTask(model=model, teacher=model, input_size=3, noise_std=0.1, seed=5)
    teacher = model.init(torch.Generator().manual_seed(5))
    assert task.loss(teacher, task.examples("test")) == 0
    assert task.loss(teacher, task.examples("train")).item() == pytest.approx(0.01, rel=0.1)


def test_teacher_data_are_fixed_and_disjoint(generator: torch.Generator) -> None:
    model = MLP(sizes=(3, 4, 1))
    task = TeacherStudentTask(model=model, teacher=model, input_size=3, num_train=50, num_eval=20)
    parts = [{tuple(row) for row in task.examples(split).inputs.tolist()} for split in ("train", "meta", "test")]
    assert [len(part) for part in parts] == [50, 20, 20]
    assert len(set.union(*parts)) == 90
    batch = task.sample_batch(generator, "train", 30)
    assert {tuple(row) for row in batch.inputs.tolist()} <= parts[0]
