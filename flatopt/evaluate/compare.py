"""FlatOpt against Adam on a model and data of one's own: ``flatopt-eval compare my_module:make``.

``make(seed)`` returns what is to be trained, as four things:

    def make(seed: int):
        torch.manual_seed(seed)
        model = MyNetwork()
        train = DataLoader(..., shuffle=True)           # or any iterable of batches; it is read again when it ends
        test = DataLoader(...)                          # what the final loss is measured on
        def loss_fn(model, batch):                      # mean loss of a batch, 0-D
            inputs, targets = batch
            return F.cross_entropy(model(inputs), targets)
        return model, train, test, loss_fn

``loss_fn`` may return ``(loss, metrics)`` with a dictionary of further numbers, such as the accuracy: they stand in the
table beside the loss.  ``optimizer``, ``losses``, ``seconds`` and ``test_loss`` are names of the table itself.  Adam is
run at each of ``--lrs`` with a cosine schedule; the best one is chosen *by the loss on the test data themselves*, which
favours Adam.  FlatOpt knows the number of steps, and nothing is tuned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from flatopt._extensions import import_here, where
from flatopt._torch import pytree
from flatopt.optimizer import FlatOpt

from ._cache import Record, RunCache
from ._evaluation import Evaluation, option, progress
from ._figures import smooth
from ._report import Figure, Report, mean_pm_std
from .contestants import default_name

FAST_STEPS = 10

OWN_COLUMNS = ("optimizer", "losses", "seconds", "test_loss")
"""What the table measures itself: no names of metrics."""


class Problem(NamedTuple):
    """What ``make`` returns."""

    model: nn.Module
    train: Iterable[Any]
    test: Iterable[Any]
    loss_fn: Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Compare(Evaluation):
    """FlatOpt against Adam on one's own model and data."""

    summary = "FlatOpt against Adam on your own model and data"

    make: str = field(metadata={"help": "function that makes them of a seed, as module:function", "positional": True})
    seeds: int = option(3, "runs per optimizer")
    steps: int = option(500, "steps per run")
    lrs: tuple[str, ...] = option(("3e-4", "1e-3", "3e-3", "1e-2"), "learning rates of Adam")
    pretrained: str = option(default_name(), "weights of FlatOpt: name, folder or Hub id")

    def report(self, cache: RunCache) -> Report:
        """Train with every optimizer and seed; nothing is kept, since the code of the problem is not known here."""
        make = load_function(self.make)
        num_steps = FAST_STEPS if self.fast else self.steps
        optimizers: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
            f"Adam, lr {lr:g}": partial(Adam, lr=lr) for lr in map(_learning_rate, self.lrs)
        }
        optimizers["FlatOpt"] = partial(FlatOpt, pretrained=self.pretrained, num_steps=num_steps)
        work = [(optimizer, seed) for optimizer in optimizers for seed in range(self.seeds)]
        runs: dict[str, list[Record]] = {}
        for optimizer, seed in progress(work, lambda one: f"{one[0]}, seed {one[1]}"):
            problem = make_problem(make, seed)
            runs.setdefault(optimizer, []).append(
                train(problem, optimizers[optimizer], num_steps, optimizer != "FlatOpt")
            )
        records: list[Record] = [
            {"optimizer": optimizer} | {key: [one[key] for one in own] for key in own[0]}
            for optimizer, own in runs.items()
        ]
        best = min(records[:-1], key=lambda record: _order(fmean(record["test_loss"])))["optimizer"]
        metrics = [key for key in records[0] if key not in OWN_COLUMNS]
        return Report(
            title=f"FlatOpt and Adam on {self.make}",
            header=["optimizer", "test loss", *metrics, "last training loss", "seconds"],
            rows=[_row(record, metrics, best) for record in records],
            records=records,
            draw=lambda figure: _draw(figure, records, best),
            note=f"Mean ± standard deviation over {self.seeds} seeds, {num_steps} steps. Adam: cosine schedule; the "
            "best learning rate (*) is that with the lowest test loss. FlatOpt: nothing tuned.",
        )


def load_function(name: str) -> Callable[[int], Any]:
    """Return the function that ``module:function`` names; modules are looked for in the current folder too.

    Raises:
        ValueError: not of this form, no such module, one that cannot be imported, or no such function.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise ValueError(f"name the function as module:function, not {name!r}")
    made = getattr(import_here(module_name, name), function, None)
    if not callable(made):
        raise ValueError(f"{module_name} has no function {function!r}")
    return made


def make_problem(make: Callable[[int], Any], seed: int) -> Problem:
    """Return what ``make`` returns; ``ValueError`` if it fails, or returns anything but the four parts of a problem."""
    try:
        made = make(seed)
    except Exception as error:
        raise ValueError(f"make({seed}) failed: {where(error)}") from error
    is_problem = isinstance(made, Sequence) and len(made) == len(Problem._fields)
    if not is_problem or not isinstance(made[0], nn.Module) or not callable(made[3]):
        kinds = ", ".join(type(part).__name__ for part in made) if is_problem else type(made).__name__
        raise ValueError(f"make({seed}) must return (model, train, test, loss_fn), not {kinds}")
    return Problem(*made)


def train(problem: Problem, build: Callable[[Iterable[Tensor]], Optimizer], num_steps: int, cosine: bool) -> Record:
    """Train, and return the losses of the steps and the mean loss and metrics over the test batches."""
    model = problem.model
    optimizer = build(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, num_steps) if cosine else None
    batches = _endless(problem.train)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = _loss_and_metrics(problem, next(batches))[0]
        if not loss.requires_grad:
            raise ValueError("loss_fn must return a loss that depends on the parameters of the model")
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - start
    return {"losses": losses, "seconds": seconds, **measure(problem)}


@torch.no_grad()
def measure(problem: Problem) -> Record:
    """Return the mean over the test data of the loss and of every metric; batches count by their examples."""
    problem.model.eval()
    values: dict[str, list[float]] = {}
    sizes: list[int] = []
    for batch in problem.test:
        loss, metrics = _loss_and_metrics(problem, batch)
        sizes.append(_size(batch))
        for key, value in {"test_loss": float(loss), **metrics}.items():
            values.setdefault(key, []).append(value)
    if not values:
        raise ValueError("the test data hold no batch")
    total = sum(sizes)
    return {
        key: sum(size * value for size, value in zip(sizes, own, strict=True)) / total for key, own in values.items()
    }


def _size(batch: Any) -> int:
    """Return the length of the first tensor of a batch, and 1 where there is none."""
    return next((len(part) for part in pytree.tree_leaves(batch) if isinstance(part, Tensor) and part.dim()), 1)


def _loss_and_metrics(problem: Problem, batch: Any) -> tuple[Tensor, dict[str, float]]:
    """Return a batch's loss, with its graph, and metrics; ``ValueError`` if ``loss_fn`` does not give them."""
    try:
        returned = problem.loss_fn(problem.model, batch)
    except Exception as error:
        raise ValueError(f"loss_fn failed: {where(error)}") from error
    try:
        loss, metrics = returned if isinstance(returned, tuple) else (returned, {})
        numbers = {str(key): float(value) for key, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):  # not two, no dictionary, not numbers
        loss, numbers = None, {}
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        raise ValueError("loss_fn must return a 0-D tensor, or (0-D tensor, dictionary of numbers)")
    for key in OWN_COLUMNS:
        if key in numbers:
            raise ValueError(f"loss_fn: no metric may be called {key!r}, which is a column of the table itself")
    return loss, numbers


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("the training data hold no batch, or can be read only once")


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"--lrs must be numbers, not {text!r}") from None
    if not 0 < value < math.inf:
        raise ValueError(f"--lrs must be above 0, not {text}")
    return value


def _order(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _row(record: Record, metrics: Sequence[str], best: str) -> list[str]:
    last = [fmean(losses[-max(1, len(losses) // 20) :]) for losses in record["losses"]]
    name = record["optimizer"] + (" *" if record["optimizer"] == best else "")
    cells = [mean_pm_std(record[key], digits=4) for key in ("test_loss", *metrics)]
    return [name, *cells, mean_pm_std(last, digits=4), mean_pm_std(record["seconds"])]


def _draw(figure: Figure, records: Sequence[Record], best: str) -> None:
    """Draw the training losses, the mean of a twentieth of the steps; FlatOpt and the best Adam stand out."""
    axes = figure.subplots()
    for record in records:
        chosen = record["optimizer"] in (best, "FlatOpt")
        colour = {"FlatOpt": "C1", best: "C0"}.get(record["optimizer"], "0.75")
        mean = [fmean(values) for values in zip(*record["losses"], strict=True)]
        width, order = (2, 3) if chosen else (1, 1)
        smoothed = smooth(mean, max(1, len(mean) // 20))
        axes.plot(smoothed, color=colour, label=record["optimizer"], linewidth=width, zorder=order)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(fontsize=8)
