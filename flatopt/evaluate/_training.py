"""The one training loop of all comparisons, and runs that are tuned and cached."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from flatopt.tasks import Batch, ImageSplits, accuracy, load_images

from ._report import Record, RunCache
from .baselines import Contestant
from .curvature import MEASURES, Curvature

NUM_TUNING_SEEDS = 2
"""Seeds that choose a learning rate; the first seeds of the comparison, whose runs are then used again."""

EVALUATION_BATCH = 250
"""Images evaluated at once: twice as fast on a CPU as 1000, whose activations do not fit its caches."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every subcommand takes.

    Args:
        num_seeds: runs per cell of a table.
        fast: toy sizes, to see a subcommand work; the numbers mean nothing.
        pretrained: weights of FlatOpt: shipped name, folder or Hub id.
        cache: file of finished runs.
        split: ``"test"``, or ``"meta"`` to choose by; the optimizees of ``reproduction`` depend on it.
        tasks: parts of the names of the benchmarks to run; all by default.
        optimizers: names of the optimizers to run, without what follows a comma; all by default.
        sets: learned weights to compare, names or folders (``reproduction`` only).
        data: ``"fashion-mnist"`` or ``"mnist"`` (``reproduction`` only).
        learned_only: leave the baselines out (``reproduction`` only).
    """

    num_seeds: int = 5
    fast: bool = False
    pretrained: str = "flat-v2"
    cache: RunCache
    split: str = "test"
    tasks: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    data: str = "fashion-mnist"
    learned_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A model and data to train it on.

    Args:
        name: name in tables and in the cache.
        source: data, a name of :func:`flatopt.tasks.load_images`.
        size: images are ``size x size``.
        num_train: examples to train on, ``None`` for all.
        build: makes the model from the image size.
        batch_size: examples per step.
        num_steps: length of the run.
        standardize: see :func:`flatopt.tasks.load_images`.
    """

    name: str
    source: str
    size: int
    num_train: int | None
    build: Callable[[int], nn.Module]
    batch_size: int = 64
    num_steps: int = 600
    standardize: bool = True


class TrainedModel(NamedTuple):
    """A model after training."""

    model: nn.Module
    losses: list[float]
    """Loss on the batch of each step, before the step."""
    seconds: float


def load_splits(benchmark: Benchmark, seed: int) -> ImageSplits:
    """Return the data of a benchmark; which training images are used depends on ``seed``."""
    splits = load_images(benchmark.source, benchmark.size, standardize=benchmark.standardize)
    order = torch.randperm(len(splits.train.targets), generator=torch.Generator().manual_seed(seed))
    return splits._replace(train=Batch(*(tensor[order[: benchmark.num_train]] for tensor in splits.train)))


def build_model(build: Callable[[int], nn.Module], size: int, seed: int) -> nn.Module:
    """Build a model whose initial weights depend on ``seed`` only; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(size)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    data: Batch,
    *,
    batch_size: int,
    num_steps: int,
    generator: torch.Generator,
    cosine: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> TrainedModel:
    """Train a classifier on batches drawn without replacement, epoch after epoch.

    Stops at the first loss that is not finite.

    Args:
        model: the model; trained in place.
        optimizer: optimizer of its parameters.
        data: examples to train on.
        batch_size: examples per step.
        num_steps: number of steps.
        generator: source of the order of the examples.
        cosine: take the learning rate to zero along a cosine.
        after_step: called with the number of steps taken, after each.
    """
    scheduler = CosineAnnealingLR(optimizer, T_max=num_steps) if cosine else None
    model.train()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.long)
    start = time.perf_counter()
    for step in range(num_steps):
        if len(order) < min(batch_size, len(data.targets)):
            order = torch.randperm(len(data.targets), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        closure = _closure(model, optimizer, data.inputs[chosen], data.targets[chosen])
        losses.append(optimizer.step(closure))
        if scheduler is not None:
            scheduler.step()
        if after_step is not None:
            after_step(step + 1)
        if not math.isfinite(losses[-1]):
            break
    return TrainedModel(model, losses, time.perf_counter() - start)


def _closure(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss.item()

    return closure


@torch.no_grad()
def measure(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy of a model in evaluation mode; ``inf`` and 0 when it is broken."""
    model.eval()
    logits = torch.cat([model(inputs) for inputs in data.inputs.split(EVALUATION_BATCH)])
    loss = float(F.cross_entropy(logits, data.targets))
    if not math.isfinite(loss):
        return math.inf, 0.0
    return loss, float(accuracy(logits, data.targets))


def train_benchmark(
    benchmark: Benchmark, contestant: Contestant, lr: float, seed: int
) -> tuple[TrainedModel, ImageSplits]:
    """Train the model of a benchmark; data subset, initial weights and batches depend on ``seed`` only."""
    splits = load_splits(benchmark, seed)
    model = build_model(benchmark.build, benchmark.size, seed)
    with warnings.catch_warnings():
        # A learning rate of the grid may diverge; FlatOpt warns about gradients that are not finite.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        trained = train(
            model,
            contestant.build(model.parameters(), lr, benchmark.num_steps, seed),
            splits.train,
            batch_size=benchmark.batch_size,
            num_steps=benchmark.num_steps,
            generator=torch.Generator().manual_seed(seed),
            cosine=contestant.cosine,
        )
    return trained, splits


def run(
    benchmark: Benchmark,
    contestant: Contestant,
    lr: float,
    seed: int,
    cache: RunCache,
    curvature: Curvature | None = None,
) -> Record:
    """Return losses and accuracies on all splits at the end of one run, from the cache when it is there.

    With ``curvature`` also what it measures on the training images; NaN where the loss is not finite.
    """

    def compute() -> Record:
        trained, splits = train_benchmark(benchmark, contestant, lr, seed)
        record: Record = {"seconds": trained.seconds}
        for split, examples in splits._asdict().items():
            record[f"{split}_loss"], record[f"{split}_accuracy"] = measure(trained.model, examples)
        if curvature is not None:
            finite = math.isfinite(record["train_loss"])
            record |= curvature(trained.model, splits.train, seed) if finite else dict.fromkeys(MEASURES, math.nan)
        return record

    key = run_key(benchmark, contestant, lr, seed)
    return cache.get(key if curvature is None else {"curvature": asdict(curvature)} | key, compute)


def run_key(benchmark: Benchmark, contestant: Contestant, lr: float, seed: int) -> Record:
    """Return what decides the result of a run."""
    return {
        "benchmark": benchmark.name,
        "num_train": benchmark.num_train,
        "batch_size": benchmark.batch_size,
        "num_steps": benchmark.num_steps,
        "optimizer": contestant.name,
        "identity": contestant.identity,
        "lr": lr,
        "seed": seed,
    }


def tuned_lr(benchmark: Benchmark, contestant: Contestant, num_seeds: int, cache: RunCache) -> float:
    """Return the learning rate with the best mean accuracy on the ``meta`` split, never on ``test``."""
    if len(contestant.lrs) == 1:
        return contestant.lrs[0]

    def score(lr: float) -> tuple[float, float]:
        runs = [run(benchmark, contestant, lr, seed, cache) for seed in range(min(num_seeds, NUM_TUNING_SEEDS))]
        return sum(record["meta_accuracy"] for record in runs), -sum(record["meta_loss"] for record in runs)

    return max(contestant.lrs, key=score)
