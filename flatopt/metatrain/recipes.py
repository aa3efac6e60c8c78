"""Recipes: functions that return the configuration of a whole run, by name in :data:`RECIPES`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    """Return a whole run with several checkpoints in under a minute: to see that everything works."""
    return MetaTrainConfig(
        recipe="smoke",
        rule="hierarchical-mlp",
        estimator=EstimatorConfig(truncation_length=5),
        tasks=(TaskConfig(name="mlp", num_tasks=2, min_steps=10, max_steps=40),),
        num_updates=40,
        warmup_updates=5,
        ema_decay=0.9,
        checkpoint_every=10,
        log_every=1,
    )


def flat_v1() -> MetaTrainConfig:
    """Return the run behind the shipped weights ``flat-v1``: 44 minutes on one core.

    It was to be 4,000 updates long and was stopped before the end of its cosine.
    """
    return MetaTrainConfig(
        recipe="flat-v1",
        rule="hierarchical-mlp",
        estimator=EstimatorConfig(truncation_length=20, std=0.01, families_per_update=1),
        tasks=(
            TaskConfig(name="mlp", num_tasks=32, min_steps=100, max_steps=1500),
            TaskConfig(name="mlp-layernorm", num_tasks=14, min_steps=100, max_steps=800),
            TaskConfig(name="cnn", num_tasks=14, min_steps=100, max_steps=600),
            TaskConfig(name="mlp-deep", num_tasks=14, min_steps=100, max_steps=800),
            TaskConfig(name="lstm", num_tasks=12, min_steps=100, max_steps=600),
            TaskConfig(name="mlp-residual", num_tasks=14, min_steps=100, max_steps=600),
            TaskConfig(name="transformer", num_tasks=6, min_steps=100, max_steps=500),
        ),
        objective=ObjectiveConfig(
            base_weight=0.1,
            final_weight=3.0,
            final_power=4.0,
            flatness=FlatnessConfig(
                name="perturbation-gap", coefficient=0.3, options={"radius": 0.1}, signed=True, clip=6.0
            ),
        ),
        num_updates=2_739,
        schedule_updates=4_000,
        meta_lr=1e-3,
        warmup_updates=50,
        max_grad_norm=1.0,
        ema_decay=0.99,
        checkpoint_every=200,
    )


PENALTIES = {
    "": FlatnessConfig(),
    # One product for the value, five without a graph for the vector; at the end of a run, where the minimum is.
    "hessian": FlatnessConfig(
        name="top-eigenvalue", coefficient=0.01, options={"num_iterations": 5}, schedule="every", every=2
    ),
    "entropy": FlatnessConfig(
        name="local-entropy",
        coefficient=0.1,
        options={"gamma": 1.0, "num_steps": 5, "step_size": 0.1, "temperature": 1e-6},
        schedule="every",
        every=2,
    ),
}
"""The penalties of the published rules by the end of the recipe's name."""

IMITATION = {"l2o-dm": (0.0, 0.1, 0.3), "rnnprop": (0.3,), "l2o-scale": (0.1,)}
"""Share of imitation in each stage, by rule."""


def published(rule: str, penalty: str = "") -> MetaTrainConfig:
    """Return the enhanced training of a published rule on the 784-20-10 net: curriculum, imitation, held-out selection.

    The objective is the training loss after each step, its logarithm for L2O-Scale, and a penalty on sharpness if any.

    Args:
        rule: ``l2o-dm``, ``rnnprop`` or ``l2o-scale``.
        penalty: a key of ``PENALTIES``: none, ``hessian`` or ``entropy``.
    """
    return MetaTrainConfig(
        recipe=f"{rule}-{penalty}" if penalty else rule,
        rule=rule,
        estimator=EstimatorConfig(name="truncated-backprop", truncation_length=20),
        tasks=(
            TaskConfig(name="mnist-mlp", num_tasks=1, min_steps=100, max_steps=100, unknown_horizon_probability=1.0),
        ),
        objective=ObjectiveConfig(
            meta_split="train",
            transform="log" if rule == "l2o-scale" else "none",
            base_weight=1.0,
            final_weight=0.0,
            flatness=PENALTIES[penalty],
            clip=100.0,
        ),
        curriculum=CurriculumConfig(stages=(100, 200, 500), min_num_eval=3),
        # The loss is measured in units of the teacher's step: one Adam serves both kinds of updates.
        imitation=ImitationConfig(probabilities=IMITATION[rule], lr=0.01, coefficient=1e4),
        validation=ValidationConfig(num_tasks=2),
        num_updates=800,
        meta_lr=1e-3,
        meta_lr_final_fraction=0.1,
        max_grad_norm=1.0,
        validate_every=50,
        checkpoint_every=50,
    )


RECIPES: dict[str, Callable[[], MetaTrainConfig]] = {
    "smoke": smoke,
    "flat-v1": flat_v1,
    **{
        f"{rule}-{penalty}" if penalty else rule: partial(published, rule, penalty)
        for rule in IMITATION
        for penalty in PENALTIES
    },
}
"""Every recipe by the name that the command line uses."""
