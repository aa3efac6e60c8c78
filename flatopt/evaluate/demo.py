"""A CNN on handwritten digits, trained with Adam and with FlatOpt from the same seeds: ``make demo``.

Run as ``python -m flatopt demo --out demo-output``; writes ``table.md``, ``results.json`` and ``figure.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from flatopt import flatness
from flatopt._checks import check_folder
from flatopt.optimizer import FlatOpt
from flatopt.pretrained import load_pretrained
from flatopt.tasks import Batch, Splits, load_images

from ._cache import Record
from ._evaluation import integer, one_line, progress
from ._figures import smooth
from ._report import Figure, Report, mean_pm_std, write_report
from ._training import build_model, draw_batches, measure, train
from .contestants import default_name

BATCH_SIZE = 64

Build = Callable[[Iterable[Tensor]], Optimizer]
"""Makes the optimizer of a model's parameters."""


def digits_cnn(size: int) -> nn.Sequential:
    """Build two convolutions with pooling and one linear layer, for images ``[batch, size, size]``."""
    first = [nn.Unflatten(1, (1, size)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(32 * (size // 4) ** 2, 10))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the table, and save table, results and figure."""
    parser = argparse.ArgumentParser(prog="python -m flatopt demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of table and figure")
    parser.add_argument("--seeds", type=integer, default=5, help="runs per optimizer (default: 5)")
    parser.add_argument("--steps", type=integer, default=600, help="steps per run (default: 600)")
    parser.add_argument("--pretrained", default=default_name(), help="weights of FlatOpt: name, folder or Hub id")
    chosen = parser.parse_args(arguments)
    with one_line("flatopt demo", "nothing was written"):
        learned = load_pretrained(chosen.pretrained)
        check_folder(chosen.out)  # what cannot be done is said before anything trains
        optimizers: dict[str, Build] = {
            "torch.optim.Adam(lr=1e-3)": lambda params: Adam(params, lr=1e-3),
            "flatopt.FlatOpt": lambda params: FlatOpt(params, pretrained=learned),
        }
        print(write_report(report(optimizers, chosen.seeds, chosen.steps), chosen.out))
    print(f"Figure: {chosen.out / 'figure.png'}")


def report(optimizers: dict[str, Build], num_seeds: int, num_steps: int) -> Report:
    """Train with each optimizer and each seed, which sets initial weights and batches, and measure the minima."""
    data = load_images("digits", 8)
    records = []
    for name, build in optimizers.items():
        runs = [run(name, build, data, seed, num_steps) for seed in range(num_seeds)]
        records.append({"optimizer": name} | {key: [result[key] for result in runs] for key in runs[0]})
    return Report(
        title="CNN on handwritten digits",
        header=["optimizer", "test accuracy %", "test loss", "seconds", "top Hessian eigenvalue"],
        rows=[_row(record) for record in records],
        records=records,
        draw=lambda figure: _draw(figure, records),
        note=f"Mean ± standard deviation over {num_seeds} seeds, {num_steps} steps at batch size {BATCH_SIZE}, "
        f"{torch.get_num_threads()} thread(s). Eigenvalue: of the training loss, at the end; lower is flatter.",
    )


def run(name: str, build: Build, data: Splits, seed: int, steps: int) -> Record:
    """Train one model, with a progress bar, and return what the table and the figure need."""
    model = build_model(digits_cnn, 8, seed)
    batches = draw_batches(data.train, BATCH_SIZE, steps, torch.Generator().manual_seed(seed))
    trained = train(model, build(model.parameters()), progress(batches, f"{name}, seed {seed}", steps))
    loss, accuracy = measure(model, data.test)
    return {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "seconds": trained.seconds,
        "top_eigenvalue": top_eigenvalue(model, data.train, seed),
        "losses": trained.losses,
    }


def top_eigenvalue(model: nn.Module, data: Batch, seed: int) -> float:
    """Return the largest eigenvalue of the Hessian of the mean loss on ``data``."""
    loss_fn, params = flatness.module_loss(model.eval(), F.cross_entropy, data)
    generator = torch.Generator().manual_seed(seed)
    return float(flatness.top_eigenvalue(loss_fn, params, which="algebraic", generator=generator))


def _row(record: Record) -> list[str]:
    return [
        record["optimizer"],
        mean_pm_std(record["test_accuracy"], scale=100),
        mean_pm_std(record["test_loss"], digits=4),
        mean_pm_std(record["seconds"]),
        mean_pm_std(record["top_eigenvalue"], digits=3),
    ]


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    """Draw the training curves, and accuracy against curvature."""
    curves, minima = figure.subplots(1, 2)
    for index, record in enumerate(records):
        colour = f"C{index}"
        runs = [smooth(losses, 10) for losses in record["losses"]]
        for losses in runs:
            curves.plot(losses, color=colour, alpha=0.25, linewidth=0.8)
        mean = [fmean(values) for values in zip(*runs, strict=False)]
        curves.plot(mean, color=colour, label=record["optimizer"])
        accuracies = [100 * value for value in record["test_accuracy"]]
        minima.plot(record["top_eigenvalue"], accuracies, ".", color=colour, alpha=0.5)
        minima.plot(fmean(record["top_eigenvalue"]), fmean(accuracies), "o", color=colour, label=record["optimizer"])
    curves.set(xlabel="step", ylabel="training loss (mean of 10 steps)", yscale="log", title="Training")
    minima.set(
        xlabel="top Hessian eigenvalue", ylabel="test accuracy %", title="Minima reached: flatter is to the left"
    )
    curves.legend()
