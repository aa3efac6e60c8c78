"""Recipes: functions that return the configuration of a whole run, by name in :data:`RECIPES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .config import (
    CurriculumConfig,
    EstimatorConfig,
    FlatnessConfig,
    ImitationConfig,
    MetaTrainConfig,
    ObjectiveConfig,
    TaskConfig,
    ValidationConfig,
)


def smoke() -> MetaTrainConfig:
    """Return a whole run with several checkpoints in seconds, on generated tables: to see that everything works."""
    return MetaTrainConfig(
        recipe="smoke",
        rule="orthogonalized-momentum",
        estimator=EstimatorConfig(truncation_length=5),
        tasks=(TaskConfig(name="tabular", num_tasks=2, min_steps=10, max_steps=40),),
        num_updates=40,
        warmup_updates=5,
        ema_decay=0.9,
        checkpoint_every=10,
        log_every=1,
    )


_FLAT_V2_FAMILIES = (
    # Name, problems, steps, weight.  Most neighbours are of different kinds: a table, an image net and a sequence, say.
    ("tabular", 32, 800, 1.0),
    ("mlp-deep", 20, 600, 1.0),
    ("lstm", 16, 400, 1.0),
    ("transformer", 10, 400, 1.0),
    ("regression", 32, 500, 0.5),
    ("mlp-wide", 10, 600, 1.0),
    ("vit", 10, 400, 1.0),
    ("cnn-groupnorm", 8, 400, 1.0),
    ("tabular-binary", 32, 400, 1.0),
    ("mlp-layernorm", 20, 600, 1.0),
    ("gru-text", 12, 400, 1.0),
    ("cnn", 12, 500, 1.0),
    ("regression-few", 32, 400, 0.5),
    ("mlp-gelu", 24, 600, 1.0),
    ("gru", 16, 300, 1.0),
    ("mlp-preln", 16, 400, 1.0),
    ("tabular-wide", 16, 400, 1.0),
    ("autoencoder", 20, 500, 1.0),
    ("cnn-batchnorm", 10, 400, 1.0),
    ("mlp-deeper", 20, 300, 1.0),
    ("regression-noisy", 32, 300, 0.5),
    ("mlp-sigmoid", 24, 800, 1.0),
    ("mlp-tanh", 12, 200, 1.0),
    ("mlp-wider", 6, 200, 1.0),
)


def flat_v2() -> MetaTrainConfig:
    """Return the run behind the shipped weights ``flat-v2``: some thirty minutes on a core.

    An evolution strategy over whole runs, three families of problems at a time.  A run is judged by the average of its
    parameters at the end: by the error, which is what users look at, a little by the logarithm of the loss, and by how
    much the training loss rises when the parameters are perturbed.  What is learned is by which power the step follows
    the noise, by which the decay spares what is large, and a factor of both where the length of the run is not known
    (docs/log.md).
    """
    only = tuple(f"constants.{name}" for name in ("noise_step", "size_decay", "anytime_step", "anytime_decay"))
    tasks = tuple(
        TaskConfig(
            name=name,
            num_tasks=num_tasks,
            min_steps=num_steps,
            max_steps=num_steps,
            truncation_length=num_steps,
            unknown_horizon_probability=0.5,
            weight=weight,
        )
        for name, num_tasks, num_steps, weight in _FLAT_V2_FAMILIES
    )
    return MetaTrainConfig(
        recipe="flat-v2",
        seed=1,  # of 0 and 1 the better on meta-validation
        rule="orthogonalized-momentum",
        estimator=EstimatorConfig(std=0.1, families_per_update=3, only=only),
        tasks=tasks,
        objective=ObjectiveConfig(
            meta_weight=0.05,
            error_weight=1.0,
            transform="log",
            base_weight=0.1,
            final_weight=9.0,
            final_power=8.0,
            flatness=FlatnessConfig(
                name="perturbation-gap",
                coefficient=0.3,
                options={"radius": 0.1},
                schedule="last",
                fraction=0.25,
                signed=True,
                clip=6.0,
            ),
        ),
        num_updates=16,
        meta_lr=0.08,
        warmup_updates=2,
        max_grad_norm=1.0,
        ema_decay=0.9,
        checkpoint_every=4,
        log_every=1,
    )


def l2o_dm() -> MetaTrainConfig:
    """Return L2O-DM without a regularizer."""
    return _published("l2o-dm", imitation=(0.5, 0.3), meta_lr=5e-3)


def l2o_dm_hessian() -> MetaTrainConfig:
    """Return L2O-DM with the top Hessian eigenvalue."""
    return _regularized(l2o_dm(), "top-eigenvalue", 0.05, num_iterations=5)


def l2o_dm_entropy() -> MetaTrainConfig:
    """Return L2O-DM with a narrow local entropy: at temperature 1 the chain would leave so sharp a valley."""
    return _regularized(l2o_dm(), "local-entropy", 4.0, gamma=1.0, num_steps=5, step_size=0.1, temperature=1e-6)


def rnnprop() -> MetaTrainConfig:
    """Return RNNProp without a regularizer."""
    return _published("rnnprop", imitation=(0.5, 0.3), meta_lr=5e-3)


def rnnprop_hessian() -> MetaTrainConfig:
    """Return RNNProp with the top Hessian eigenvalue."""
    return _regularized(rnnprop(), "top-eigenvalue", 0.01, num_iterations=5)


def rnnprop_entropy() -> MetaTrainConfig:
    """Return RNNProp with a wide local entropy, 0.2 around each coordinate: a weak pull, hence a long chain."""
    return _regularized(
        rnnprop(), "local-entropy", 100.0, gamma=0.03, num_steps=60, step_size=0.5, temperature=0.001, antithetic=True
    )


def l2o_scale() -> MetaTrainConfig:
    """Return L2O-Scale without a regularizer: logarithmic objective, initial learning rates of 3e-3.

    From the published 1e-4, the middle of 1e-6 and 1e-2, the rule learned in so few updates to raise its learning
    rates, and did not stop after the length of its training runs (docs/meta-training.md).
    """
    config = _published("l2o-scale", imitation=(0.3,), meta_lr=2e-3)
    return replace(
        config,
        rule_options={"min_lr": 1e-3, "max_lr": 1e-2, "max_log_lr": 0.0},
        objective=replace(config.objective, transform="log"),
    )


def l2o_scale_hessian() -> MetaTrainConfig:
    """Return L2O-Scale with the top Hessian eigenvalue."""
    return _regularized(l2o_scale(), "top-eigenvalue", 0.03, num_iterations=5)


def l2o_scale_entropy() -> MetaTrainConfig:
    """Return L2O-Scale with a wide local entropy: warm chains, in pairs because one would drown in its noise."""
    return _regularized(
        l2o_scale(), "local-entropy", 8.0, gamma=1.0, num_steps=5, step_size=0.1, temperature=0.05, antithetic=True
    )


def _published(rule: str, *, imitation: tuple[float, ...], meta_lr: float) -> MetaTrainConfig:
    """Return the enhanced training of a published rule on the 784-20-10 net: curriculum, imitation, held-out selection.

    The objective is the training loss after each step.  A run of minutes where the published ones took hours.  What
    makes up for it: imitation from the first stage on, in more updates; a high learning rate with a moving average of
    the weights; and a bound on the norm of the meta-gradient below what it usually is, so that updates of both kinds
    have the same norm.
    """
    return MetaTrainConfig(
        recipe=rule,
        rule=rule,
        estimator=EstimatorConfig(name="truncated-backprop", truncation_length=20),
        tasks=(
            TaskConfig(name="mnist-mlp", num_tasks=1, min_steps=100, max_steps=100, unknown_horizon_probability=1.0),
        ),
        objective=ObjectiveConfig(meta_split="train", base_weight=1.0, final_weight=0.0, clip=100.0),
        curriculum=CurriculumConfig(stages=(100, 200, 500), min_num_eval=3),
        # The loss is measured in units of the teacher's step: one Adam serves both kinds of updates.
        imitation=ImitationConfig(probabilities=imitation, lr=0.01, coefficient=1e4),
        validation=ValidationConfig(num_tasks=2),
        num_updates=700,
        meta_lr=meta_lr,
        meta_lr_final_fraction=0.1,
        max_grad_norm=0.01,
        ema_decay=0.95,
        validate_every=50,
        checkpoint_every=50,
    )


def _regularized(plain: MetaTrainConfig, measure: str, coefficient: float, **options: Any) -> MetaTrainConfig:
    """Return the same training with a penalty at every other step, for half of the cost."""
    flatness = FlatnessConfig(name=measure, coefficient=coefficient, options=options, schedule="every", every=2)
    suffix = {"top-eigenvalue": "hessian", "local-entropy": "entropy"}[measure]
    return replace(plain, recipe=f"{plain.recipe}-{suffix}", objective=replace(plain.objective, flatness=flatness))


RECIPES: dict[str, Callable[[], MetaTrainConfig]] = {
    "smoke": smoke,
    "flat-v2": flat_v2,
    "l2o-dm": l2o_dm,
    "l2o-dm-hessian": l2o_dm_hessian,
    "l2o-dm-entropy": l2o_dm_entropy,
    "rnnprop": rnnprop,
    "rnnprop-hessian": rnnprop_hessian,
    "rnnprop-entropy": rnnprop_entropy,
    "l2o-scale": l2o_scale,
    "l2o-scale-hessian": l2o_scale_hessian,
    "l2o-scale-entropy": l2o_scale_entropy,
}
"""Every recipe by the name that the command line uses.  Coefficients are those of the shipped sets."""
