"""Recipes: functions that return the configuration of a whole run, by name in :data:`RECIPES`."""

from __future__ import annotations

from collections.abc import Callable

from .config import EstimatorConfig, FlatnessConfig, MetaTrainConfig, ObjectiveConfig, TaskConfig


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


RECIPES: dict[str, Callable[[], MetaTrainConfig]] = {"smoke": smoke, "flat-v1": flat_v1}
"""Every recipe by the name that the command line uses."""
