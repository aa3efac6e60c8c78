"""What a step costs: time and memory of FlatOpt, plain and compiled, and of AdamW, in turn in one process."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from flatopt._checks import check_device
from flatopt.optimizer import FlatOpt

from . import models
from ._cache import Record, RunCache
from ._evaluation import Evaluation, option, progress
from ._report import Figure, Report
from ._training import build_model
from .contestants import default_name

MODELS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "MLP 64-32-10": (8, partial(models.mlp, width=32)),
    "CNN 16-16, 28x28": (28, partial(models.cnn, width=16)),
    "residual net, 28x28": (28, partial(models.residual_net, width=32, num_blocks=4)),
    "transformer, width 128, depth 4": (28, partial(models.transformer, width=128, depth=4)),
    "transformer, width 320, depth 6": (28, partial(models.transformer, width=320, depth=6)),
    "MLP 784-1024-1024-10": (28, partial(models.mlp, width=1024, depth=2)),
}
"""Image size and builder by name."""

LARGE_MODELS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "transformer, width 768, depth 12": (28, partial(models.transformer, width=768, depth=12)),
}
"""More of them on a GPU."""

BATCH_SIZE = 64

STEPS_TAKEN = 1024
"""Steps that the runs are made to look like: a long run takes few of them into its average."""


@dataclass(frozen=True, kw_only=True)
class StepTime(Evaluation):
    """Time and memory of one step."""

    summary = "time and memory of one step against AdamW"

    pretrained: str = option(default_name(), "weights of FlatOpt: name, folder or Hub id")
    device: str = option("cpu", "where to measure, for example cuda")

    def report(self, cache: RunCache) -> Report:
        """Measure the step of FlatOpt, eager and with ``compile=True``, against ``torch.optim.AdamW``."""
        kinds: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
            # Steps of no length: a batch learned by heart has gradients of zeros, which FlatOpt passes over.
            "AdamW": partial(AdamW, lr=0.0),
            "FlatOpt": partial(FlatOpt, lr=0.0, pretrained=self.pretrained, compile=False),
        }
        device = check_device(self.device)
        on_gpu = device.type == "cuda"
        if on_gpu or (not self.fast and shutil.which("g++")):
            kinds["compiled"] = partial(FlatOpt, lr=0.0, pretrained=self.pretrained, compile=True)
        chosen = MODELS | LARGE_MODELS if on_gpu else MODELS
        chosen = dict(list(chosen.items())[:1]) if self.fast else chosen
        num_rounds = 2 if self.fast else 3 * self.seeds
        records = [
            _measure(name, size, build, kinds, num_rounds, device)
            for name, (size, build) in progress(chosen.items(), "step-time")
        ]
        where = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} thread(s)"
        return Report(
            title=f"Time and memory of one optimizer step on the {'GPU' if on_gpu else 'CPU'}",
            header=[
                "model",
                "parameters",
                *(f"{kind} ms" for kind in kinds),
                *(f"{what}, {kind}" for kind in list(kinds)[1:] for what in ("ratio", "ratio with gradients")),
                *(f"{what} {kind}" for what in ("state", "peak") for kind in kinds),
            ],
            rows=[_row(record, list(kinds)) for record in records],
            records=records,
            draw=lambda figure: _draw(figure, records, list(kinds)),
            note=f"Median over {num_rounds} rounds, in turn, {where}, torch {torch.__version__}, from step "
            f"{STEPS_TAKEN} on. FlatOpt: compile=False. Compiled: compile=True, on a GPU a CUDA graph, which is the "
            "default of such models there. Ratios are to AdamW. With gradients: of a whole training step, at batch "
            f"size {BATCH_SIZE}. State: floats per parameter kept between steps. Peak: floats per parameter allocated "
            "within a step, beyond the state.",
        )


def _measure(
    name: str,
    size: int,
    build: Callable[[int], nn.Module],
    kinds: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]],
    num_rounds: int,
    device: torch.device,
) -> Record:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH_SIZE, size, size, generator=generator).to(device)
    targets = torch.randint(models.NUM_CLASSES, (BATCH_SIZE,), generator=generator).to(device)
    optimizers: list[Optimizer] = []
    steps: list[Callable[[], object]] = []
    for make in kinds.values():
        model = build_model(build, size, 0).to(device)
        optimizers.append(make(model.parameters()))
        steps.append(partial(_train, model, optimizers[-1], inputs, targets))
        for _ in range(6):  # the first steps make the state, and compile
            steps[-1]()
        for state in optimizers[-1].state.values():
            state["step"].fill_(STEPS_TAKEN)
    rounds = [[_milliseconds(optimizer.step, device) for optimizer in optimizers] for _ in range(num_rounds)]
    whole_rounds = [[_milliseconds(step, device) for step in steps] for _ in range(num_rounds)]
    num_params = sum(param.numel() for param in model.parameters())
    record: Record = {"model": name, "num_params": num_params}
    for index, (kind, optimizer) in enumerate(zip(kinds, optimizers, strict=True)):
        record[kind] = {
            "ms": median(times[index] for times in rounds),
            "ratio": median(times[index] / times[0] for times in rounds),
            "whole_ratio": median(times[index] / times[0] for times in whole_rounds),
            "state": _state_bytes(optimizer) / 4 / num_params,
            "peak": peak_bytes(optimizer.step, device) / 4 / num_params,
        }
    return record


def _train(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, averaged over as many as fill 50 ms."""
    _wait(device)
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < 0.05:
        call()
        count += 1
    _wait(device)
    return 1e3 * (time.perf_counter() - start) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state_bytes(optimizer: Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in values)


def peak_bytes(call: Callable[[], object], device: torch.device | None = None) -> int:
    """Return the most memory, of the CPU by default, that tensors allocated within a call held at one time.

    A CUDA graph allocates nothing when it is launched: what it holds all the time is not seen.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000) + 1) >= 8000
        True
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's own log lines go to stderr
    gc.collect()  # what it frees within the call would be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _row(record: Record, kinds: Sequence[str]) -> list[str]:
    ratios = [record[kind][which] for kind in kinds[1:] for which in ("ratio", "whole_ratio")]
    return [
        record["model"],
        f"{record['num_params']:,}",
        *(f"{record[kind]['ms']:.2f}" for kind in kinds),
        *(f"{ratio:.1f}" for ratio in ratios),
        *(f"{record[kind][what]:.1f}" for what in ("state", "peak") for kind in kinds),
    ]


def _draw(figure: Figure, records: Sequence[Record], kinds: Sequence[str]) -> None:
    """Draw a step of each optimizer, alone and with the gradients, as multiples of AdamW's."""
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"ratio": "the optimizer's step alone", "whole_ratio": "a whole training step at batch size 64"}
    for axes, (which, title) in zip(panels, titles.items(), strict=True):
        for index, kind in enumerate(kinds):
            heights = [row + 0.27 * (index - (len(kinds) - 1) / 2) for row in range(len(records))]
            multiples = [record[kind][which] for record in records]
            bars = axes.barh(heights, multiples, height=0.25, color=f"C{index}", label=kind)
            axes.bar_label(bars, fmt=" %.1f", fontsize=8)
        axes.set(title=title, xlabel=f"times {kinds[0]}'s")
        axes.margins(x=0.12)
    names = [f"{record['model']}\n{record['num_params']:,} parameters" for record in records]
    panels[0].set_yticks(range(len(records)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds), fontsize=9)
