"""What a run tells: ``metrics.jsonl``, TensorBoard, and progress on standard error."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from .checkpoint import RunState

SECONDS_BETWEEN_LINES = 30.0
"""Time between progress lines where standard error is not a terminal."""


def track(names: Sequence[str], doing: str) -> Iterator[str]:
    """Yield names, and show which one is being worked on: on a bar, or in lines where there is no terminal."""
    next_line = time.monotonic()
    with _open_bar(len(names), 0, "family", doing) as bar:
        for index, name in enumerate(names):
            bar.set_postfix_str(name)
            if bar.disable and time.monotonic() >= next_line:
                next_line = time.monotonic() + SECONDS_BETWEEN_LINES
                print(f"{doing}: {name} ({index + 1} of {len(names)})", file=sys.stderr)
            yield name
            bar.update(1)


class Log(AbstractContextManager["Log"]):
    """Metrics to ``metrics.jsonl`` and TensorBoard, progress to standard error."""

    def __init__(self, out: Path, state: RunState):
        self._state, self._config = state, state.config
        self._board: Any = None
        if state.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=state.update + 1)
        self._path = out / "metrics.jsonl"
        self._file = _open_metrics(self._path, state.update)
        self._bar = _open_bar(state.config.num_updates, state.update, "update")
        self._first_update, self._started = state.update, time.monotonic()
        self._next_line = self._started

    def write(self, metrics: dict[str, Any]) -> None:
        update = metrics["update"]
        if update % self._config.log_every == 0 or update == self._config.num_updates or "validation_loss" in metrics:
            self._file.write(json.dumps({key: _finite(value) for key, value in metrics.items()}) + "\n")
            self._file.flush()
            if self._board is not None:
                for key, value in metrics.items():
                    if key != "update" and value is not None:
                        self._board.add_scalar(key, value, update)
        self._bar.update(1)
        self._bar.set_postfix_str(f"meta-loss {loss_text(metrics['smoothed_loss'])}", refresh=False)
        if self._bar.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self._print_line(metrics)

    def _print_line(self, metrics: dict[str, Any]) -> None:
        update, total = metrics["update"], self._config.num_updates
        rate = (update - self._first_update) / max(1e-9, time.monotonic() - self._started)
        left = timedelta(seconds=round((total - update) / rate))
        loss = loss_text(metrics["smoothed_loss"])
        print(f"update {update}/{total}  meta-loss {loss}  {rate:.2f} updates/s  ETA {left}", file=sys.stderr)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._bar.close()
        if error is None:
            print(self._summary(), file=sys.stderr)

    def _summary(self) -> str:
        """Return the last line of a run: how long it took, where the meta-loss began and where it ended."""
        state = self._state
        summary = f"{state.update} of {self._config.num_updates} updates in {timedelta(seconds=round(state.seconds))}"
        losses = [row["loss"] for row in read_metrics(self._path) if row["loss"] is not None]
        if losses:
            quarter = math.ceil(len(losses) / 4)  # single updates are noisy
            summary += f", meta-loss {loss_text(fmean(losses[:quarter]))} in the first quarter, "
            summary += f"{loss_text(fmean(losses[-quarter:]))} in the last (mean of the objective: lower is better)"
        if state.progress.finished:
            summary += ", ended by validation"
        if state.num_dropped:
            summary += f", {state.num_dropped} meta-gradients were not finite and were dropped"
        return summary


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log but those that are damaged; none where there is no file."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        if isinstance(metrics, dict) and {"update", "loss"} <= metrics.keys():
            lines.append(metrics)
    return lines


def _open_metrics(path: Path, update: int) -> Any:
    """Open the metrics for appending, without what was logged after the checkpoint, and damaged lines."""
    kept = [line for line in read_metrics(path) if line["update"] <= update]
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
    aside.replace(path)
    return path.open("a")


def check_tensorboard() -> None:
    """Raise ``ValueError`` unless TensorBoard events can be written."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard=true needs the package: pip install tensorboard")


def _open_bar(total: int, initial: int, unit: str, doing: str | None = None) -> Any:
    """Open a progress bar, one that does nothing where there is no terminal."""
    from tqdm import tqdm  # here: --help needs no extra

    return tqdm(total=total, initial=initial, unit=unit, desc=doing, dynamic_ncols=True, smoothing=0.05, disable=None)


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say by null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loss_text(value: float | None) -> str:
    """Return a meta-loss for people."""
    return "none" if value is None else f"{value:.4f}"
