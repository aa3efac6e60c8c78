"""The meta-training loop: estimate a meta-gradient, clip it, step the meta-optimizer, validate, log, checkpoint.

    g <- estimator(w);   g <- g min(1, max_grad_norm / ||g||);   w <- Adam(w, g, lr(update))
    average <- lerp(average, w, 1 - decay)

Every so many updates the average, or w without one, is validated; :mod:`flatopt.metatrain.curriculum` says what then.

A run is a function of its configuration.  It may be stopped at any moment, SIGKILL included, and goes on from its last
whole checkpoint to the very bits that it would have reached uninterrupted (on the same machine and thread count).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_folder
from ..rules import Weights
from ._lock import LOCK, locked
from ._log import Log, check_tensorboard, track
from ._ranks import Ranks, job, joined, own_device
from ._saved import check_config
from ._session import describe_session
from ._stop import StopOnSignal, TrainingInterrupted
from .checkpoint import WRITING, RunState, latest, save
from .config import MetaTrainConfig
from .curriculum import Verdict, decide, validation_steps
from .estimators import GradientEstimator, build_estimator, untracked
from .families import check_families
from .meta_optimizer import build_meta_optimizer, learning_rate, optimizer_state
from .validation import build_validation

SMOOTHING = 0.98
"""Decay of the moving average of the meta-loss that is shown and logged."""

ADJUSTABLE = (
    "num_updates",
    "schedule_updates",
    "meta_lr",
    "meta_lr_final_fraction",
    "max_grad_norm",
    "checkpoint_every",
    "checkpoint_every_seconds",
    "log_every",
    "compile",
    "tensorboard",
)
"""What may be changed on resuming: a longer run, another end of its schedule, how it is computed and logged."""

Validate = Callable[[Weights, int | None], Verdict]
"""``validate(weights, num_steps)``: the loss of weights; ``num_steps`` is ``None`` without a curriculum."""


def train(
    config: MetaTrainConfig,
    out: Path,
    *,
    device: str | torch.device = "cpu",
    estimator: GradientEstimator | None = None,
    resume: bool = False,
    validate: Validate | None = None,
    command: str = "flatopt.metatrain.train",
) -> Weights:
    """Run meta-training to its end, from the start or from the last whole checkpoint.

    Writes ``checkpoints/`` and ``metrics.jsonl`` (and ``tensorboard/`` if asked for) into ``out``.  The first SIGINT or
    SIGTERM takes the current update back and writes a checkpoint; the second ends the process at once.

    Args:
        config: everything that decides what is computed; on resuming, that of the run, except for ``ADJUSTABLE``.
        out: folder of the run, empty or absent unless resuming, or started anew by the ``torchrun`` that began the run.
        device: where to compute.
        estimator: replaces the one that ``config.estimator`` names.
        resume: go on from the last whole checkpoint in ``out``.
        validate: loss of weights, called every ``config.validate_every`` updates with their moving average, or the
            weights where none is kept; it must not depend on when it is called.  Replaces that of ``config``.
        command: how the run was started, for the record.

    Returns:
        The weights to ship, on the CPU: the best by validation if there was one, else their moving average if
        ``config.ema_decay`` is positive, else the last ones.

    Raises:
        ValueError: for an ``out`` that is in use, not empty, or when resuming without a whole checkpoint of this run;
            for what could not be saved; for a device or an estimator that does not exist.
        TrainingInterrupted: after SIGINT or SIGTERM.
        RuntimeError: if one of several processes is gone.
    """
    out = Path(out)
    if config.tensorboard:
        check_tensorboard()
    if estimator is None:
        check_families(config)
    device = check_device(own_device(device))
    with joined(device) as ranks, ExitStack() as held:
        state = ranks.share(lambda: held.enter_context(_begin(config, out, ranks, resume=resume)))
        is_new = not state.sessions
        if ranks.is_main:
            print(describe_run(state, device, out, ranks.size), file=sys.stderr)
        if state.is_done:
            return state.shipped_weights
        with StopOnSignal() as stop:
            estimator = estimator or build_estimator(config, device, track if ranks.is_main else untracked, ranks)
            if validate is None and config.validate_every:
                validate = build_validation(config, device, ranks)
            state.sessions = [*state.sessions, {**describe_session(device, command), "first_update": state.update}]
            run = _Run(state.to(device), estimator, validate, ranks)
            if is_new:
                run.save(state, out)
            stop.at_once(run.prepare, run.state.update)
            with Log(out, run.state) if ranks.is_main else nullcontext() as log:
                _loop(out, run, log, stop)
        return {name: weight.cpu() for name, weight in run.state.shipped_weights.items()}


@contextmanager
def _begin(config: MetaTrainConfig, out: Path, ranks: Ranks, *, resume: bool) -> Iterator[RunState]:
    """Hold the folder of a run, and give the state that it begins or goes on with, on the CPU."""
    if ranks.size > 1 and config.estimator.name == "truncated-backprop":
        raise ValueError("estimator.name=truncated-backprop is not shared among processes: start one")
    find = partial(_find, config, out, resume=resume or _is_restart(out))
    find()  # refuses before anything is made, the lock included
    with locked(out):
        yield find()  # now that nobody else writes


def _find(config: MetaTrainConfig, out: Path, *, resume: bool) -> RunState:
    """Return the state that a run goes on with, or begins with."""
    if not resume:
        check_unused(out)
        return RunState.fresh(config)
    check_config(config)
    state = load_run(out)
    _check_resumable(state, config, out)
    state.config = config
    return state


def _is_restart(out: Path) -> bool:
    """Return whether ``torchrun``, after the loss of a process, gives the command that began the run in ``out``."""
    if job() is None or not (out / "checkpoints").is_dir():
        return False
    state = latest(out / "checkpoints")
    return state is not None and state.sessions[-1].get("torchrun") == job()


def load_run(out: Path) -> RunState:
    """Return the state of the run in ``out`` at its last whole checkpoint, on the CPU; ``ValueError`` without one."""
    state = latest(out / "checkpoints")
    if state is None:
        raise ValueError(f"no whole checkpoint in {out / 'checkpoints'}: nothing to go on from")
    return state


def check_unused(out: Path) -> None:
    """Raise ``ValueError`` unless a new run may start in ``out``."""
    check_folder(out)
    # A run killed before its first checkpoint leaves an unfinished one, which is nothing.
    files = (path for path in out.rglob("*") if path.is_file() and path != out / LOCK)
    used = [path for path in files if not path.parent.name.startswith(WRITING)]
    if used:
        raise ValueError(f"{out} is not empty: choose another folder, or go on with: flatopt-train resume {out}")


class _Run:
    """A state, and what works on it: its tensors are changed in place by the meta-optimizer alone."""

    def __init__(self, state: RunState, estimator: GradientEstimator, validate: Validate | None, ranks: Ranks):
        self.state, self.config, self.ranks = state, state.config, ranks
        self.estimator, self._validate = estimator, validate
        self.generator = torch.Generator()
        self.generator.set_state(state.generator)
        self.optimizer = build_meta_optimizer(state.weights, state.optimizer)
        state.optimizer = optimizer_state(self.optimizer, state.weights)
        self._started = time.monotonic() - state.seconds

    def prepare(self) -> None:
        """Do what takes long before the first update of a session: compile, and start the inner runs of a new run."""
        state = self.state
        self.estimator.prepare(_copy(state.weights))
        if state.estimator is None:
            state.estimator = self.estimator.init(_copy(state.weights), self.generator, state.num_steps)
            state.generator = self.generator.get_state()

    def save(self, state: RunState, out: Path) -> None:
        """Write a checkpoint, by one of the processes."""
        if self.ranks.is_main:
            save(state, out / "checkpoints")

    def update(self) -> dict[str, Any]:
        """Do one meta-update, and the validation that is due after it; return the metrics of both."""
        state = self.state
        meta, state.estimator = self.estimator.estimate(state.weights, state.estimator, self.generator, state.num_steps)
        # All processes have the same gradient, to rounding if they are not of one kind: they all take the same step.
        gradient = {name: value / self.ranks.size for name, value in self.ranks.sum(meta.gradient).items()}
        norm, loss = float(_norm(gradient)), float(meta.loss)
        lr = learning_rate(self.config, state.update)
        if math.isfinite(norm):
            self._apply(gradient, norm, lr)
        else:
            state.num_dropped += 1
        if math.isfinite(loss):
            last = loss if state.smoothed_loss is None else state.smoothed_loss
            state.smoothed_loss = SMOOTHING * last + (1 - SMOOTHING) * loss
        state.generator = self.generator.get_state()
        state.update += 1
        state.seconds = time.monotonic() - self._started
        return {
            "update": state.update,
            "loss": loss,
            "smoothed_loss": state.smoothed_loss,
            "gradient_norm": norm,
            "lr": lr,
            "num_dropped": state.num_dropped,
            "seconds": round(state.seconds, 3),
            **meta.metrics,
            **self._validate_if_due(),
        }

    def _apply(self, gradient: Weights, norm: float, lr: float) -> None:
        """Clip the gradient, step the meta-optimizer, move the average."""
        state, limit = self.state, self.config.max_grad_norm
        scale = 1.0 if limit is None or norm <= limit else limit / norm
        for name, weight in state.weights.items():
            weight.grad = gradient[name].detach().to(weight) * scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        state.optimizer = optimizer_state(self.optimizer, state.weights)
        # Early averages forget the start faster: min(decay, (1 + t) / (10 + t)).
        decay = min(self.config.ema_decay, (1 + state.update) / (10 + state.update))
        for name, value in state.average.items():
            value.lerp_(state.weights[name], 1 - decay)

    def _validate_if_due(self) -> dict[str, Any]:
        """Validate, then keep the weights, go back to the best ones and lengthen the runs, or end; return metrics."""
        state = self.state
        if self._validate is None or not self.config.validate_every or state.update % self.config.validate_every:
            return {}
        stage, verdict = state.progress.stage, self._measure(state.candidate)
        best_loss = None if state.best_validation is None else state.best_validation["loss"]
        state.progress, decision = decide(self.config, state.progress, verdict.loss, best_loss)
        if decision == "keep":
            state.best = _copy(state.candidate)
            self._note_best(state.update, verdict.loss)
        elif decision == "advance":
            for weights in (state.weights, state.average):
                for name, value in weights.items():
                    value.copy_(state.best[name])
            if state.best_validation is not None and state.progress.stage != stage:
                self._note_best(state.best_validation["update"], self._measure(state.best).loss)
        families = {f"validation/{name}": value for name, value in verdict.families.items()}
        return {"validation_stage": stage, "validation_loss": verdict.loss, **families}

    def _measure(self, weights: Weights) -> Verdict:
        assert self._validate is not None
        return self._validate(_copy(weights), validation_steps(self.config.curriculum, self.state.progress.stage))

    def _note_best(self, update: int, loss: float) -> None:
        """Remember the best loss; one that is not finite, which only a longer run can give, is beaten by any other."""
        best: dict[str, Any] = {"update": update, "loss": loss if math.isfinite(loss) else None}
        if self.config.curriculum.stages:
            stage = self.state.progress.stage
            best |= {"stage": stage, "num_steps": validation_steps(self.config.curriculum, stage)}
        self.state.best_validation = best


def _loop(out: Path, run: _Run, log: Log | None, stop: StopOnSignal) -> None:
    """Update until the end or a signal, which takes an update back that it meets; the last one done is always saved."""
    state, config = run.state, run.config
    saved_update, saved_time = state.update, time.monotonic()
    while not state.is_done and stop.signal_number is None:
        before = state.before_update()
        try:
            metrics = stop.at_once(run.update, before.update)
        except TrainingInterrupted:
            if before.update != saved_update:
                run.save(before, out)
            raise
        if log is not None:
            log.write(metrics)
        due = config.checkpoint_every and state.update % config.checkpoint_every == 0
        if due or time.monotonic() - saved_time >= config.checkpoint_every_seconds:
            run.save(state, out)
            saved_update, saved_time = state.update, time.monotonic()
    if saved_update != state.update:
        run.save(state, out)
    if stop.signal_number is not None and not state.is_done:
        raise TrainingInterrupted(stop.signal_number, state.update)


def _check_resumable(state: RunState, config: MetaTrainConfig, out: Path) -> None:
    """Raise ``ValueError`` unless the run can go on with a configuration."""
    kept = replace(config, **{key: getattr(state.config, key) for key in ADJUSTABLE})
    if config.num_updates < state.update:
        raise ValueError(f"num_updates must be at least {state.update}, which are done, not {config.num_updates}")
    if state.config.to_json() != kept.to_json():
        raise ValueError(f"{out} holds a run of another configuration: only {', '.join(ADJUSTABLE)} may be changed")


def describe_run(state: RunState, device: torch.device, out: Path, num_processes: int = 1) -> str:
    """Return the first line of a run."""
    config, num_weights = state.config, sum(weight.numel() for weight in state.weights.values())
    families = ", ".join(task.name for task in config.tasks)
    updates = (
        f"{state.update} of {config.num_updates} updates done" if state.update else f"{config.num_updates} updates"
    )
    if state.progress.finished:
        updates += ", ended by validation"
    where = str(device) if num_processes == 1 else f"{num_processes} processes, {device.type}"
    return f"{config.recipe}: {num_weights:,} weights of {config.rule}, {updates}, {where}, in {out}; tasks: {families}"


def _norm(gradient: Weights) -> Tensor:
    """Return the Euclidean norm over all weights, in double: a float32 sum of squares overflows at 1e19."""
    norms = [torch.linalg.vector_norm(value, dtype=torch.float64) for value in gradient.values()]
    return torch.linalg.vector_norm(torch.stack(norms))


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
