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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rules import Weights
from ._log import Log, track
from ._session import describe_session
from ._stop import StopOnSignal, Stopped
from .checkpoint import WRITING, Checkpoint, latest, save
from .config import MetaTrainConfig
from .curriculum import Progress, Verdict, decide, train_steps, validation_steps
from .estimators import EstimatorState, GradientEstimator, MetaGradient, build_estimator, enter_stage
from .families import check_families
from .meta_optimizer import build_meta_optimizer

SMOOTHING = 0.98
"""Decay of the moving average of the meta-loss that is shown and logged."""

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
        config: everything that decides what is computed; on resuming, it must be that of the run.
        out: folder of the run, empty or absent unless resuming.
        device: where to compute.
        estimator: replaces the one that ``config.estimator`` names.
        resume: go on from the last whole checkpoint in ``out``.
        validate: loss of weights, called every ``config.validate_every`` updates with their moving average, or the
            weights where none is kept; it must not depend on when it is called.  Replaces the one that ``config``
            describes.
        command: how the run was started, for the record.

    Returns:
        The weights to ship, on the CPU: the best by validation if there was one, else their moving average if
        ``config.ema_decay`` is positive, else the last ones.

    Raises:
        ValueError: for an ``out`` that is not empty, or holds no whole checkpoint or another run when resuming, and
            for a device or an estimator that does not exist.
        TrainingInterrupted: after SIGINT or SIGTERM.
    """
    out = Path(out)
    device = _check_device(device)
    checkpoint = load_run(out) if resume else None
    if checkpoint is None:
        check_unused(out)
    elif checkpoint.config.to_json() != config.to_json():
        raise ValueError(f"{out} holds a run of another configuration: resume it with its own")
    if estimator is None:
        check_families(task.name for task in config.tasks)
    run = _Run(config, device, checkpoint)
    print(_describe_run(run, device, out), file=sys.stderr)
    with StopOnSignal() as stop:
        if estimator is None:
            estimator = build_estimator(config, config.build_rule(), device, track)
        if validate is None and config.validate_every:
            # Imported here: the inner problems behind it need data.
            from .validation import build_validation

            validate = build_validation(config, config.build_rule(), device)
        run.begin_session(describe_session(device, command))
        if checkpoint is None:
            save(run.checkpoint(), out / "checkpoints")
        try:
            with stop.at_once():
                run.prepare(estimator)
        except Stopped:
            raise stop.interruption(run.update) from None
        with Log(config, out, run) as log:
            _loop(out, run, log, stop, validate)
    return {name: weight.cpu() for name, weight in run.shipped_weights.items()}


def load_run(out: Path) -> Checkpoint:
    """Return the last whole checkpoint of the run in ``out``.

    Raises:
        ValueError: if there is none.
    """
    checkpoint = latest(out / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"no whole checkpoint in {out / 'checkpoints'}: nothing to go on from")
    return checkpoint


def check_unused(out: Path) -> None:
    """Raise ``ValueError`` unless a new run may start in ``out``."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")
    # A run killed before its first checkpoint leaves an unfinished one, which is nothing.
    used = [path for path in out.rglob("*") if path.is_file() and not path.parent.name.startswith(WRITING)]
    if used:
        raise ValueError(f"{out} is not empty: choose another folder, or go on with: flatopt-train resume {out}")


def learning_rate(config: MetaTrainConfig, update: int) -> float:
    """Return the meta-learning rate of update ``update`` (from 0): linear warm-up, then a cosine.

    Example:
        >>> from flatopt.metatrain.config import TaskConfig
        >>> config = MetaTrainConfig(
        ...     recipe="", rule="adam", tasks=(TaskConfig(name="mlp"),), num_updates=6, warmup_updates=2, meta_lr=1.0
        ... )
        >>> [round(learning_rate(config, update), 3) for update in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if update < config.warmup_updates:
        return config.meta_lr * (update + 1) / config.warmup_updates
    length = config.schedule_updates or config.num_updates
    fraction = min(1.0, (update - config.warmup_updates) / max(1, length - config.warmup_updates))
    final = config.meta_lr_final_fraction
    return config.meta_lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction)))


class _Run:
    """What a run carries from update to update."""

    def __init__(
        self,
        config: MetaTrainConfig,
        device: torch.device,
        checkpoint: Checkpoint | None,
    ):
        self.config = config
        self.generator = torch.Generator()
        self.estimator_state: EstimatorState = {}
        if checkpoint is None:
            self.update, self.seconds, self.num_dropped = 0, 0.0, 0
            self.smoothed_loss: float | None = None
            self.best_validation: dict[str, Any] | None = None
            self.best: Weights = {}
            self.progress = Progress()
            self.generator.manual_seed(config.seed)
            self.weights = _move(config.build_rule().init_weights(self.generator), device)
            self.average = _move(self.weights, device) if config.ema_decay > 0 else {}
            self.optimizer = build_meta_optimizer(config.meta_optimizer, list(self.weights.values()))
            self.sessions: list[dict[str, Any]] = []
        else:
            self.update, self.seconds = checkpoint.update, checkpoint.seconds
            self.num_dropped, self.smoothed_loss = checkpoint.num_dropped, checkpoint.smoothed_loss
            self.best_validation, self.progress = checkpoint.best_validation, Progress(**checkpoint.progress)
            self.best = _move(checkpoint.best, device)
            self.generator.set_state(checkpoint.generator["main"])
            self.weights = _move(checkpoint.weights, device)
            self.average = _move(checkpoint.average, device)
            self.optimizer = build_meta_optimizer(config.meta_optimizer, list(self.weights.values()))
            self._load_optimizer(checkpoint.optimizer)
            self.estimator_state = _move(checkpoint.estimator, device)
            self.sessions = checkpoint.sessions
        self._started = time.monotonic() - self.seconds

    def begin_session(self, session: dict[str, Any]) -> None:
        """Note where and how the run goes on from here."""
        self.sessions = [*self.sessions, {**session, "first_update": self.update}]

    def prepare(self, estimator: GradientEstimator) -> None:
        """Do what takes long before the first update of a session: compile, and start the inner runs of a new run."""
        self.estimator = estimator
        estimator.prepare(_copy(self.weights))
        if self.update == 0 and not self.estimator_state:
            self.estimator_state = estimator.init(_copy(self.weights), self.generator)
            self._enter_stage()

    @property
    def shipped_weights(self) -> Weights:
        return self.best or self.candidate

    @property
    def candidate(self) -> Weights:
        """What is validated."""
        return self.average or self.weights

    @property
    def is_done(self) -> bool:
        return self.update >= self.config.num_updates or self.progress.finished

    def validate(self, validate: Validate) -> dict[str, Any]:
        """Validate, then keep the weights, go back to the best ones and lengthen the runs, or end; return metrics."""
        before, verdict = self.progress.stage, self._measure(validate, self.candidate)
        loss = verdict.loss
        best_loss = None if self.best_validation is None else self.best_validation["loss"]
        self.progress, decision = decide(self.config, self.progress, loss, best_loss)
        if decision == "keep":
            self.best = _copy(self.candidate)
            self._note_best(self.update, loss)
        elif decision == "advance":
            for weights in (self.weights, self.average):
                for name, value in weights.items():
                    value.copy_(self.best[name])
            self._enter_stage()
            if self.best_validation is not None and self.progress.stage != before:
                self._note_best(self.best_validation["update"], self._measure(validate, self.best).loss)
        families = {f"validation/{name}": value for name, value in verdict.families.items()}
        return {"validation_stage": before, "validation_loss": loss, **families}

    def _measure(self, validate: Validate, weights: Weights) -> Verdict:
        return validate(_copy(weights), validation_steps(self.config.curriculum, self.progress.stage))

    def _note_best(self, update: int, loss: float) -> None:
        """Remember the best loss; one that is not finite, which only a longer run can give, is beaten by any other."""
        self.best_validation = {"update": update, "loss": loss if math.isfinite(loss) else None}
        if self.config.curriculum.stages:
            steps = validation_steps(self.config.curriculum, self.progress.stage)
            self.best_validation |= {"stage": self.progress.stage, "num_steps": steps}

    def _enter_stage(self) -> None:
        stage = self.progress.stage
        if self.config.curriculum.stages:
            steps = train_steps(self.config.curriculum, stage)
            self.estimator_state = enter_stage(self.estimator_state, stage, steps)

    def step(self) -> dict[str, Any]:
        """Do one meta-update and return its metrics."""
        meta, self.estimator_state = self.estimator.estimate(self.weights, self.estimator_state, self.generator)
        norm = float(_norm(meta))
        lr = learning_rate(self.config, self.update)
        if math.isfinite(norm):
            self._apply(meta.gradient, norm, lr)
        else:
            self.num_dropped += 1
        loss = float(meta.loss)
        if math.isfinite(loss):
            last = loss if self.smoothed_loss is None else self.smoothed_loss
            self.smoothed_loss = SMOOTHING * last + (1 - SMOOTHING) * loss
        self.update += 1
        self.seconds = time.monotonic() - self._started
        return {
            "update": self.update,
            "loss": loss,
            "smoothed_loss": self.smoothed_loss,
            "gradient_norm": norm,
            "lr": lr,
            "num_dropped": self.num_dropped,
            "seconds": round(self.seconds, 3),
            **meta.metrics,
        }

    def _apply(self, gradient: Weights, norm: float, lr: float) -> None:
        limit = self.config.max_grad_norm
        scale = 1.0 if limit is None or norm <= limit else limit / norm
        for name, weight in self.weights.items():
            weight.grad = gradient[name].detach().to(weight) * scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        # Early averages forget the start faster: min(decay, (1 + t) / (10 + t)).
        decay = min(self.config.ema_decay, (1 + self.update) / (10 + self.update))
        for name, value in self.average.items():
            value.lerp_(self.weights[name], 1 - decay)

    def _load_optimizer(self, values: dict[str, Tensor]) -> None:
        state = self.optimizer.state_dict()
        for name_and_key, value in values.items():
            name, _, key = name_and_key.rpartition("/")
            state["state"].setdefault(list(self.weights).index(name), {})[key] = value
        self.optimizer.load_state_dict(state)

    def checkpoint(self) -> Checkpoint:
        """Return everything, to be saved at once: the tensors are not copied."""
        return Checkpoint(
            config=self.config,
            update=self.update,
            seconds=self.seconds,
            num_dropped=self.num_dropped,
            smoothed_loss=self.smoothed_loss,
            best_validation=self.best_validation,
            progress=self.progress._asdict(),
            sessions=self.sessions,
            weights=self.weights,
            average=self.average,
            best=self.best,
            optimizer={
                f"{name}/{key}": value
                for name, weight in self.weights.items()
                for key, value in self.optimizer.state[weight].items()
            },
            estimator=self.estimator_state,
            generator={"main": self.generator.get_state()},
        )


def _loop(out: Path, run: _Run, log: Log, stop: StopOnSignal, validate: Validate | None) -> None:
    """Update until the end or a signal, which takes an update back that it meets; the last one done is always saved."""
    config, saved_update, saved_time = run.config, run.update, time.monotonic()
    while not run.is_done and stop.signal_number is None:
        before = run.checkpoint().copy()
        try:
            with stop.at_once():
                metrics = run.step()
                if validate is not None and config.validate_every and run.update % config.validate_every == 0:
                    metrics |= run.validate(validate)
        except Stopped:
            if before.update != saved_update:
                save(before, out / "checkpoints")
            raise stop.interruption(before.update) from None
        log.write(metrics)
        due = config.checkpoint_every and run.update % config.checkpoint_every == 0
        if due or time.monotonic() - saved_time >= config.checkpoint_every_seconds:
            save(run.checkpoint(), out / "checkpoints")
            saved_update, saved_time = run.update, time.monotonic()
    if saved_update != run.update:
        save(run.checkpoint(), out / "checkpoints")
    if not run.is_done:
        raise stop.interruption(run.update)


def _describe_run(run: _Run, device: torch.device, out: Path) -> str:
    """Return the first line of a run."""
    config, num_weights = run.config, sum(weight.numel() for weight in run.weights.values())
    families = ", ".join(task.name for task in config.tasks)
    updates = f"{run.update} of {config.num_updates} updates done" if run.update else f"{config.num_updates} updates"
    return (
        f"{config.recipe}: {num_weights:,} weights of {config.rule}, {updates}, {device}, in {out}; tasks: {families}"
    )


def _norm(meta: MetaGradient) -> Tensor:
    """Return the Euclidean norm over all weights, in double: a float32 sum of squares overflows at 1e19."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in meta.gradient.values()]
    return torch.linalg.vector_norm(torch.stack(norms))


def _move(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy tensors to a device."""
    return {name: value.detach().to(device, copy=True) for name, value in tensors.items()}


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def _check_device(device: str | torch.device) -> torch.device:
    """Return the device; ``ValueError`` if it cannot be used."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
