"""Problems without data: quadratics with a known Hessian, and regression on a random teacher network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ._task import SPLITS, Batch, Optimizee, Params, Split, Task, mean_squared_error


@dataclass(frozen=True, kw_only=True)
class QuadraticTask(Task):
    """Minimise ``mean_i 0.5 (x - c_i)^T H (x - c_i)`` with ``c_i ~ N(0, noise_std^2 I)``.

    The eigenvalues of ``H`` are spaced evenly on a log scale from ``1 / condition_number`` to 1; its eigenvectors are
    a random rotation, or the axes.  Without noise every batch gives the same loss, whose minimum is 0 at ``x = 0``.

    Args:
        dimension: length of ``x``.
        condition_number: largest over smallest eigenvalue.
        rotate: rotate the eigenvectors.
        noise_std: standard deviation of the centres.
        batch_size: centres per batch.
        seed: seed of the rotation.

    Example:
        >>> task = QuadraticTask(dimension=3, condition_number=100.0)
        >>> torch.linalg.eigvalsh(task.hessian())
        tensor([0.0100, 0.1000, 1.0000])
    """

    dimension: int = 10
    condition_number: float = 100.0
    rotate: bool = True
    noise_std: float = 0.0
    batch_size: int = 1
    seed: int = 0

    def hessian(self) -> Tensor:
        """Return ``H``, float32 ``[dimension, dimension]``."""
        return _hessian(self.dimension, self.condition_number, self.rotate, self.seed)

    def init(self, generator: torch.Generator) -> Params:
        """Return ``{"x": x}`` with ``x ~ N(0, I)``."""
        return {"x": torch.randn(self.dimension, generator=generator)}

    def sample_batch(self, generator: torch.Generator, split: Split, batch_size: int | None = None) -> Batch:
        """Draw centres ``[B, dimension]``; the targets are the zeros that the loss compares with."""
        size = batch_size or self.batch_size
        return Batch(
            self.noise_std * torch.randn(size, self.dimension, generator=generator), torch.zeros(size, self.dimension)
        )

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``x - c``, ``[B, dimension]``."""
        return params["x"] - inputs

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean of ``0.5 (x - c)^T H (x - c)``."""
        residual = self.predict(params, batch.inputs) - batch.targets
        return 0.5 * ((residual @ self.hessian().to(residual)) * residual).sum(-1).mean()


@dataclass(frozen=True, kw_only=True)
class TeacherStudentTask(Task):
    """Regress on ``teacher(x) + noise`` for ``x ~ N(0, I)``, mean squared error.

    Args:
        model: the student.
        teacher: the network that makes the targets.
        input_size: length of ``x``.
        batch_size: examples per batch.
        num_train: size of the fixed training set.
        num_eval: size of each of the other splits, which have no noise.
        noise_std: standard deviation of the noise on the training targets.
        seed: seed of teacher and data.
    """

    model: Optimizee
    teacher: Optimizee
    input_size: int
    batch_size: int = 64
    num_train: int = 4096
    num_eval: int = 1024
    noise_std: float = 0.0
    seed: int = 0

    def init(self, generator: torch.Generator) -> Params:
        """Return fresh parameters of the student."""
        return self.model.init(generator)

    def examples(self, split: Split) -> Batch:
        """Return a whole split."""
        return _teacher_data(self)[SPLITS.index(split)]

    def sample_batch(self, generator: torch.Generator, split: Split, batch_size: int | None = None) -> Batch:
        """Draw examples with replacement: ``[B, input_size]`` and what the teacher returns."""
        inputs, targets = self.examples(split)
        chosen = torch.randint(len(inputs), (batch_size or self.batch_size,), generator=generator)
        return Batch(inputs[chosen], targets[chosen])

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return the student's values."""
        return self.model.predict(params, inputs)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean squared error."""
        return mean_squared_error(self.predict(params, batch.inputs), batch.targets)


@lru_cache(maxsize=16)
def _hessian(dimension: int, condition_number: float, rotate: bool, seed: int) -> Tensor:
    eigenvalues = torch.logspace(0, 1, dimension, base=1 / condition_number, dtype=torch.float64)
    if not rotate:
        return torch.diag(eigenvalues).float()
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64, generator=generator)).Q
    return (basis * eigenvalues @ basis.T).float()


@lru_cache(maxsize=4)
def _teacher_data(task: TeacherStudentTask) -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(task.seed)
    teacher = task.teacher.init(generator)
    batches = []
    for split in SPLITS:
        inputs = torch.randn(
            task.num_train if split == "train" else task.num_eval, task.input_size, generator=generator
        )
        targets = task.teacher.predict(teacher, inputs)
        if split == "train":
            targets = targets + task.noise_std * torch.randn(targets.shape, generator=generator)
        batches.append(Batch(inputs, targets))
    return tuple(batches)
