"""The one training loop of all comparisons, and runs that are tuned and cached."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from flatopt.tasks import Batch, Splits

from ._cache import Record, RunCache
from ._code import code_hash, problem_identity
from ._data import SOURCES, data_hash
from .contestants import Contestant, Setting, neighbour
from .curvature import MEASURES, Curvature

EVALUATION_BATCH = 250
"""Images evaluated at once: twice as fast on a CPU as 1000, whose activations do not fit its caches."""

NUM_CURVE_POINTS = 40
NUM_TEST_POINTS = 10
NUM_TEST_POINT_EXAMPLES = 500
"""A curve is this many means of the batch loss, and this many looks at part of the test split."""

MAX_EXTENSIONS = 3
"""How often a grid grows by one learning rate when the best one stands at its edge."""

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A model and data to train it on.

    Args:
        name: name in tables; no part of what a run is known by in the cache.
        source: data, a key of ``SOURCES``.
        size: side of the images, number of features, or length of the text.
        build: makes the model from ``size``.
        num_train: examples to train on, ``None`` for all.
        batch_size: examples per step.
        num_steps: length of the run.
        kind: what the model is to do: name the class of its input, predict numbers, or give its input back.
        label_noise: fraction of the training examples whose class is replaced by another.
        num_eval: examples of each split that results are measured on, ``None`` for all.
    """

    name: str
    source: str
    size: int
    build: Callable[[int], nn.Module]
    num_train: int | None = None
    batch_size: int = 64
    num_steps: int = 600
    kind: Literal["classification", "regression", "reconstruction"] = "classification"
    label_noise: float = 0.0
    num_eval: int | None = None

    @property
    def loss_fn(self) -> LossFn:
        """The loss, which is also what the training minimises."""
        return cross_entropy if self.kind == "classification" else F.mse_loss

    def identity(self) -> Record:
        """Return everything about the problem that decides the result of a run."""
        return problem_identity(self) | {"data": data_hash(self.source, self.size)}


class TrainedModel(NamedTuple):
    """A model after training."""

    model: nn.Module
    losses: list[float]
    """Loss on the batch of each step, before the step."""
    seconds: float


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits ``[..., classes]``."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def load_splits(benchmark: Benchmark, seed: int) -> Splits:
    """Return the data of a benchmark; which training examples are used, and their noise, depends on ``seed``."""
    train, meta, test = SOURCES[benchmark.source](benchmark.size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.targets), generator=generator)[: benchmark.num_train]
    inputs, targets = (tensor[order] for tensor in train)
    if benchmark.label_noise:
        num_classes = int(train.targets.max()) + 1
        wrong = torch.rand(targets.shape, generator=generator) < benchmark.label_noise
        shifts = torch.randint(1, num_classes, targets.shape, generator=generator)
        targets = torch.where(wrong, (targets + shifts) % num_classes, targets)
    splits = Splits(Batch(inputs, targets), meta, test)
    if benchmark.kind == "reconstruction":
        return Splits(*(Batch(part.inputs, part.inputs.flatten(1)) for part in splits))
    return splits


def build_model(build: Callable[[int], nn.Module], size: int, seed: int) -> nn.Module:
    """Build a model whose initial weights depend on ``seed`` only; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(size)


def draw_batches(data: Batch, batch_size: int, num_steps: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield the batches of ``num_steps`` steps, drawn without replacement, epoch after epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(num_steps):
        if len(order) < min(batch_size, len(data.targets)):
            order = torch.randperm(len(data.targets), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        yield Batch(data.inputs[chosen], data.targets[chosen])


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFn = cross_entropy,
    scheduler: LRScheduler | None = None,
    after_step: Callable[[int], None] | None = None,
    averages: bool = True,
) -> TrainedModel:
    """Train a model in place, one step per batch, and leave it in evaluation mode.

    Stops at the first loss that is not finite.  The scheduler is advanced after each step, and ``after_step`` is called
    with the number of steps taken.  With ``averages``, an optimizer that keeps averages of the parameters puts them in
    their place at the end.
    """
    modes = optimizer if averages else None
    set_mode(model, modes, training=True)
    losses: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(batches, 1):
        losses.append(optimizer.step(_closure(model, optimizer, loss_fn, batch)))
        if scheduler is not None:
            scheduler.step()
        if after_step is not None:
            after_step(step)
        if not math.isfinite(losses[-1]):
            break
    seconds = time.perf_counter() - start
    set_mode(model, modes, training=False)
    return TrainedModel(model, losses, seconds)


def _closure(model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, batch: Batch) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_fn(model(batch.inputs), batch.targets)
        loss.backward()
        return loss.item()

    return closure


def set_mode(model: nn.Module, optimizer: Optimizer | None, *, training: bool) -> None:
    """Switch the model, and an optimizer that has modes of its own, as FlatOpt and the Schedule-Free ones do."""
    model.train(training)
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


@torch.no_grad()
def refresh_batch_norm(model: nn.Module, data: Batch, num_batches: int = 20, batch_size: int = 64) -> None:
    """Measure the statistics of BatchNorm anew: those of training belong to other weights when these are averages."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return
    model.train()
    for inputs in data.inputs[: num_batches * batch_size].split(batch_size):
        model(inputs)
    model.eval()


@torch.no_grad()
def measure(model: nn.Module, data: Batch, loss_fn: LossFn = cross_entropy) -> tuple[float, float]:
    """Return mean loss and score of a model in evaluation mode.

    The score is the accuracy, or minus the loss for anything but cross-entropy.  A broken model has a loss of ``inf``,
    and the score of constant predictions: 0, or -1 for standardised targets.
    """
    classifies = loss_fn is cross_entropy
    model.eval()
    outputs = torch.cat([model(inputs) for inputs in data.inputs.split(EVALUATION_BATCH)])
    loss = float(loss_fn(outputs, data.targets))
    if not math.isfinite(loss):
        return math.inf, 0.0 if classifies else -1.0
    return loss, float((outputs.argmax(-1) == data.targets).float().mean()) if classifies else -loss


class FinishedRun(NamedTuple):
    """A run with what it was made of."""

    trained: TrainedModel
    splits: Splits
    test_curve: list[tuple[int, float]]
    """Steps taken, and the score on part of the test split then."""


def train_benchmark(benchmark: Benchmark, contestant: Contestant, setting: Setting, seed: int) -> FinishedRun:
    """Train the model of a benchmark; data, initial weights and batches depend on ``seed`` only."""
    splits = load_splits(benchmark, seed)
    model = build_model(benchmark.build, benchmark.size, seed)
    optimizer = contestant.build(model.parameters(), setting.lr, benchmark.num_steps, seed, **dict(setting.options))
    modes = optimizer if contestant.averages else None
    scheduler = CosineAnnealingLR(optimizer, T_max=benchmark.num_steps) if setting.cosine else None
    generator = torch.Generator().manual_seed(seed)
    batches = draw_batches(splits.train, benchmark.batch_size, benchmark.num_steps, generator)
    part = Batch(*(tensor[:NUM_TEST_POINT_EXAMPLES] for tensor in splits.test))
    every = max(1, benchmark.num_steps // NUM_TEST_POINTS)
    test_curve: list[tuple[int, float]] = []

    def look(step: int) -> None:
        if step % every == 0:
            set_mode(model, modes, training=False)
            test_curve.append((step, measure(model, part, benchmark.loss_fn)[1]))
            set_mode(model, modes, training=True)

    with warnings.catch_warnings():
        # A learning rate of the grid may diverge; FlatOpt warns about gradients that are not finite.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        trained = train(
            model,
            optimizer,
            batches,
            loss_fn=benchmark.loss_fn,
            scheduler=scheduler,
            after_step=look,
            averages=contestant.averages,
        )
    if contestant.averages:
        refresh_batch_norm(model, splits.train)
    return FinishedRun(trained, splits, test_curve)


def run(
    benchmark: Benchmark,
    contestant: Contestant,
    setting: Setting,
    seed: int,
    cache: RunCache,
    curvature: Curvature | None = None,
) -> Record:
    """Return losses and scores on all splits at the end of one run, from the cache when it is there.

    With ``curvature`` also what it measures on the training examples; NaN where the loss is not finite.
    """
    key = run_key(benchmark, contestant, setting, seed)
    if curvature is not None:
        key["curvature"] = asdict(curvature) | {"code": code_hash(Curvature, room="flatopt")}
    return cache.get(key, lambda: results(benchmark, contestant, setting, seed, curvature))


def results(
    benchmark: Benchmark, contestant: Contestant, setting: Setting, seed: int, curvature: Curvature | None = None
) -> Record:
    """Train, and return what the tables and figures need."""
    (model, losses, seconds), splits, test_curve = train_benchmark(benchmark, contestant, setting, seed)
    window = max(1, benchmark.num_steps // NUM_CURVE_POINTS)
    record: Record = {
        "seconds": seconds,
        "initial_loss": losses[0],
        "curve": [fmean(losses[start : start + window]) for start in range(0, len(losses), window)],
        "test_curve": test_curve,
        "torch": torch.__version__,
    }
    for split, examples in splits._asdict().items():
        part = Batch(*(tensor[: benchmark.num_eval] for tensor in examples))
        record[f"{split}_loss"], record[f"{split}_score"] = measure(model, part, benchmark.loss_fn)
    if curvature is None:
        return record
    finite = math.isfinite(record["train_loss"])
    nothing = dict.fromkeys(MEASURES, math.nan)
    return record | (curvature(model, splits.train, seed, benchmark.loss_fn) if finite else nothing)


def run_key(benchmark: Benchmark, contestant: Contestant, setting: Setting, seed: int) -> Record:
    """Return everything that decides the result of a run: also the data, and the code of model, optimizer, training."""
    return {
        "benchmark": benchmark.identity(),
        "optimizer": contestant.identity(),
        "setting": setting._asdict(),
        "seed": seed,
        "code": code_hash(results),
    }


def tuned(benchmark: Benchmark, contestant: Contestant, num_seeds: int, cache: RunCache) -> Setting:
    """Return the setting with the best mean score on the ``meta`` split; ties go to the lower loss."""

    def worth(setting: Setting) -> tuple[float, float]:
        runs = [run(benchmark, contestant, setting, seed, cache) for seed in range(num_seeds)]
        return sum(record["meta_score"] for record in runs), -sum(record["meta_loss"] for record in runs)

    return best_setting(contestant, worth)


def best_setting(contestant: Contestant, worth: Callable[[Setting], tuple[float, ...]]) -> Setting:
    """Return the setting that is worth most; none is tried where there is only one.

    Where the best learning rate stands at the edge of those tried with the same schedule and options, the next one
    beyond is tried too.
    """
    pending = contestant.settings()
    if len(pending) == 1:
        return pending[0]
    found: dict[Setting, tuple[float, ...]] = {}
    for _ in range(1 + MAX_EXTENSIONS):
        found |= {setting: worth(setting) for setting in pending}
        best = max(found, key=lambda setting: found[setting])
        around = [neighbour(best, up=up) for up in (False, True)] if contestant.extends else []
        pending = [setting for setting in around if setting not in found]
        if not pending:
            break
    return best
