"""The default rule with other constants, set by hand or learned, on the tasks of meta-validation.

Each candidate trains the 32 tasks of ``flatopt-eval quality --split meta``, with the length of the run told and not,
and is judged on the ``meta`` split against the untrained rule: mean and standard deviation over tasks, of the score and
of the logarithm of the loss.  Log entries of 2026-11-26 and -27 quote it, with standard errors; some of their
candidates were options of the rule of their time.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/meta_validation.py [SET ...]``: three minutes per candidate on an
idle core.  Sets are names or folders of weights.  ``--fast`` takes two tasks and two candidates, cut short.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from statistics import fmean

import torch

from flatopt import LearnedRule, load_pretrained
from flatopt.evaluate._report import mean_pm_std
from flatopt.evaluate._training import Benchmark, results
from flatopt.evaluate.benchmarks import META_BENCHMARKS
from flatopt.evaluate.contestants import learned_contestant
from flatopt.rules import OrthogonalizedMomentum
from flatopt.rules.orthogonalized_momentum import CONSTANT_SCALE

FAST = "--fast" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
SEEDS = (0,) if FAST else (0, 1)
RULE = OrthogonalizedMomentum()
UNTRAINED = RULE.init_weights(torch.Generator().manual_seed(0))

LOGARITHMS = {
    "decay times 1/2": {"matrix_decay": -0.7, "vector_decay": -0.7},
    "decay times 1/2 where the length is not told": {"anytime_decay": -0.7},
    "decay times 1/2, and more as the gradient shrinks, power 0.7": {
        "matrix_decay": -0.7,
        "vector_decay": -0.7,
        "gradient_decay": 0.7,
    },
    "decay times 1/2, and more as the gradient shrinks, power 1.2": {
        "matrix_decay": -0.7,
        "vector_decay": -0.7,
        "gradient_decay": 1.2,
    },
    "decay late, power 1/2": {"late_decay": 0.5},
    "decay with noise, power 0.3": {"noise_decay": 0.3},
    "without a known length steps shrink with the power 0.7": {"anytime_power": 0.847},
    "without a known length steps shrink with the power 0.3": {"anytime_power": -0.847},
    "without a known length steps twice as long": {"anytime_step": 0.7},
    "steps shrink with the noise, power 1/2": {"noise_step": 0.5},
    "steps shrink with the noise, power 1": {"noise_step": 1.0},
    "steps shrink with the noise, power 1, all a fifth longer": {
        "noise_step": 1.0,
        "matrix_step": 0.2,
        "vector_step": 0.2,
    },
    "steps shrink with the noise, power 2": {"noise_step": 2.0},
    "decay spares what is large, power 1": {"size_decay": 1.0},
    "decay spares what is large, and steps shrink with the noise, power 1": {"size_decay": 1.0, "noise_step": 1.0},
}
"""What is added to the exponents of factors, and to powers."""

RULES = {
    "strips of at most 32 rows": replace(RULE, strip_size=32, max_strip_size=32),
    "strips of 128 rows": replace(RULE, strip_size=128),
    "a warm-up of 10 steps": replace(RULE, warmup_steps=10.0),
    "steps shorter by 1.12": replace(RULE, base_step=0.03),
}
"""Other cores."""


def candidates() -> dict[str, LearnedRule]:
    """Return the untrained rule, and what is compared with it."""
    found = {"untrained": LearnedRule(RULE, UNTRAINED)}
    if WORDS:
        return found | {word: load_pretrained(word) for word in WORDS}
    for label, constants in LOGARITHMS.items():
        weights = {f"constants.{name}": torch.tensor(value / CONSTANT_SCALE) for name, value in constants.items()}
        found[label] = LearnedRule(RULE, UNTRAINED | weights)
    found |= {label: LearnedRule(rule, UNTRAINED) for label, rule in RULES.items()}
    return dict(list(found.items())[:2]) if FAST else found


def outcome(benchmark: Benchmark, learned: LearnedRule, *, horizon_known: bool) -> tuple[float, float]:
    """Return the mean score on the ``meta`` split, times 100, and the mean logarithm of the loss there."""
    contestant = learned_contestant("candidate", learned, horizon_known=horizon_known)
    (setting,) = contestant.settings()
    runs = [results(benchmark, contestant, setting, seed) for seed in SEEDS]
    return 100 * fmean(run["meta_score"] for run in runs), fmean(math.log(run["meta_loss"]) for run in runs)


tasks = list(META_BENCHMARKS)
if FAST:
    cut = replace(tasks[0], num_steps=3, num_train=100)
    tasks = [cut, next(one for one in tasks if one.kind == "regression")]
    tasks[1] = replace(tasks[1], num_steps=3)
before: dict[tuple[str, bool], tuple[float, float]] = {}
for label, learned in candidates().items():
    for known in (True, False):
        differences: dict[str, list[float]] = {"classification": [], "regression": [], "all": [], "ln loss": []}
        for task in tasks:
            found = outcome(task, learned, horizon_known=known)
            score, loss = (
                one - other for one, other in zip(found, before.setdefault((task.name, known), found), strict=True)
            )
            for kind, value in ((task.kind, score), ("all", score), ("ln loss", loss)):
                differences[kind].append(value)
        told = "told" if known else "not told"
        words = [f"{kind} {mean_pm_std(values, digits=3)} over {len(values)}" for kind, values in differences.items()]
        print(f"{label}, length {told}: {', '.join(words)} tasks", flush=True)
