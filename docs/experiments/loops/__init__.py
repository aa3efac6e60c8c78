"""Problems of kinds that neither meta-training nor ``flatopt-eval quality`` has.

Each is a ``make`` of ``flatopt-eval compare``: a function of a seed, which decides initial weights and batches, and of
the split that results are measured on, ``meta`` to choose settings by, or ``test``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatopt.evaluate._training import draw_batches
from flatopt.evaluate.compare import Problem
from flatopt.tasks import Batch

FAST = "--fast" in sys.argv
SEED_OF_DATA = 1_000
NUM_TEST_BATCHES = 2 if FAST else 8


def generator(seed: int) -> torch.Generator:
    """Return a source of random numbers."""
    return torch.Generator().manual_seed(seed)


def endless(data: Batch, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches drawn without replacement, epoch after epoch."""
    return draw_batches(data, batch_size, sys.maxsize, generator(seed))


def made(make: Callable[[torch.Generator], Batch], seed: int) -> Iterator[Batch]:
    """Yield batches that are made anew, each by ``make``."""
    random = generator(seed)
    while True:
        yield make(random)


def of_split(make: Callable[[torch.Generator], Batch], split: str) -> list[Batch]:
    """Return what results are measured on where batches are made: others for each split."""
    random = generator(SEED_OF_DATA + (split == "test"))
    return [make(random) for _ in range(NUM_TEST_BATCHES)]


def pieces(data: Batch, batch_size: int = 250) -> list[Batch]:
    """Return all of some data in batches of the same size."""
    inputs, targets = (part[: len(part) // batch_size * batch_size].split(batch_size) for part in data)
    return [Batch(*pair) for pair in zip(inputs, targets, strict=True)]


def table(
    inputs: Tensor,
    targets: Tensor,
    num_train: int,
    split: str,
    batch_size: int,
    seed: int,
) -> tuple[Iterator[Batch], list[Batch]]:
    """Return batches of the first rows to train on, and of half of the others to measure on."""
    half = (len(targets) - num_train) // 2
    start = num_train + half * (split == "test")
    train, rest = slice(0, num_train), slice(start, start + half)
    return endless(Batch(inputs[train], targets[train]), batch_size, seed), pieces(Batch(inputs[rest], targets[rest]))


def classify(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return the cross-entropy, and the error in per cent."""
    outputs = model(batch.inputs)
    wrong = (outputs.argmax(-1) != batch.targets).float().mean()
    return F.cross_entropy(outputs, batch.targets), {"error": 100 * float(wrong)}


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(model(batch.inputs), batch.targets)


def likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of tokens, in nats each."""
    return F.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten())


def loss_of(problem: Problem, batch: Batch) -> Tensor:
    """Return the loss alone."""
    found = problem.loss_fn(problem.model, batch)
    return found[0] if isinstance(found, tuple) else found


def pretrain(problem: Problem, num_steps: int, lr: float = 3e-3) -> dict[str, Tensor]:
    """Train with AdamW and a cosine; return the weights."""
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batches: Iterable[Batch] = (batch for batch, _ in zip(problem.train, range(5 if FAST else num_steps), strict=False))
    for batch in batches:
        optimizer.zero_grad()
        loss_of(problem, batch).backward()
        optimizer.step()
        schedule.step()
    return {name: value.clone() for name, value in problem.model.state_dict().items()}
