"""What a step costs: time and memory of FlatOpt and of AdamW, measured in turn in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from flatopt.optimizer import FlatOpt

from . import models
from ._report import Record, Report
from ._training import Options, build_model

MODELS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "MLP 64-32-10": (8, partial(models.mlp, width=32)),
    "CNN 16-16, 28x28": (28, partial(models.cnn, width=16)),
    "residual net, 28x28": (28, partial(models.residual_net, width=32, num_blocks=4)),
    "transformer, width 128, depth 4": (28, partial(models.transformer, width=128, depth=4)),
    "MLP 784-1024-1024-10": (28, partial(models.mlp, width=1024, depth=2)),
}
"""Image size and builder by name."""

BATCH_SIZE = 64


def report(options: Options) -> Report:
    """Measure the step of FlatOpt, as it is by default, against ``torch.optim.AdamW``, as it is by default."""
    chosen = dict(list(MODELS.items())[:1]) if options.fast else MODELS
    num_rounds = 2 if options.fast else 3 * options.num_seeds
    records = [
        _measure(name, size, build, options.pretrained, num_rounds)
        for name, (size, build) in tqdm(chosen.items(), desc="step-time", unit="model")
    ]
    return Report(
        title="Time and memory of one optimizer step on the CPU",
        header=[
            "model",
            "parameters",
            "AdamW ms",
            "FlatOpt ms",
            "ratio",
            "ratio with gradients",
            "state AdamW",
            "state FlatOpt",
            "peak AdamW",
            "peak FlatOpt",
        ],
        rows=[_row(record) for record in records],
        records=records,
        draw=lambda figure: _draw(figure, records),
        note=f"Median over {num_rounds} rounds, in turn, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}. "
        f"With gradients: forward and backward pass at batch size {BATCH_SIZE} added to both. State: floats per "
        "parameter kept between steps. Peak: floats per parameter allocated within a step, beyond the state.",
    )


def _measure(name: str, size: int, build: Callable[[int], nn.Module], pretrained: str, num_rounds: int) -> Record:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH_SIZE, size, size, generator=generator)
    targets = torch.randint(models.NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    reference, model = build_model(build, size, 0), build_model(build, size, 0)
    optimizers: list[Optimizer] = [
        AdamW(reference.parameters(), lr=1e-4),
        FlatOpt(model.parameters(), pretrained=pretrained),
    ]
    for network in (reference, model):
        _gradients(network, inputs, targets)
    for optimizer in optimizers:  # the first steps make the state, and compile
        for _ in range(3):
            optimizer.step()
    rounds = [[_milliseconds(optimizer.step) for optimizer in optimizers] for _ in range(num_rounds)]
    num_params = sum(param.numel() for param in model.parameters())
    record: Record = {"model": name, "num_params": num_params}
    for index, key in enumerate(("adamw", "flatopt")):
        record[f"{key}_ms"] = median(times[index] for times in rounds)
        record[f"{key}_state_floats"] = _state_bytes(optimizers[index]) / 4 / num_params
        record[f"{key}_peak_floats"] = peak_bytes(optimizers[index].step) / 4 / num_params
    record["gradient_ms"] = _milliseconds(lambda: _gradients(model, inputs, targets))
    record["ratio"] = median(flat / adamw for adamw, flat in rounds)
    return record


def _gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()


def _milliseconds(call: Callable[[], object], min_seconds: float = 0.05) -> float:
    """Return the time of one call, averaged over as many as fill ``min_seconds``."""
    count, start = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= min_seconds:
            return 1e3 * elapsed / count


def _state_bytes(optimizer: Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in values)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most CPU memory that tensors allocated within a call held at one time.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000) + 1) >= 8000
        True
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's own log lines go to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _row(record: Record) -> list[str]:
    whole = (record["flatopt_ms"] + record["gradient_ms"]) / (record["adamw_ms"] + record["gradient_ms"])
    return [
        record["model"],
        f"{record['num_params']:,}",
        f"{record['adamw_ms']:.2f}",
        f"{record['flatopt_ms']:.2f}",
        f"{record['ratio']:.1f}",
        f"{whole:.2f}",
        f"{record['adamw_state_floats']:.1f}",
        f"{record['flatopt_state_floats']:.1f}",
        f"{record['adamw_peak_floats']:.1f}",
        f"{record['flatopt_peak_floats']:.1f}",
    ]


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    """Draw the parts of a training step as stacked bars, two per model."""
    axes = figure.subplots()
    for index, key in enumerate(("adamw", "flatopt")):
        where = [position + 0.4 * index - 0.2 for position in range(len(records))]
        gradients = [record["gradient_ms"] for record in records]
        label = "forward and backward" if index == 0 else None
        axes.bar(where, gradients, width=0.35, color="0.8", label=label)
        steps = [record[f"{key}_ms"] for record in records]
        axes.bar(where, steps, width=0.35, bottom=gradients, color=f"C{index}", label=("AdamW", "FlatOpt")[index])
    axes.set_xticks(range(len(records)), [record["model"] for record in records], rotation=15, ha="right", fontsize=8)
    axes.set_ylabel("milliseconds per training step")
    axes.legend()
