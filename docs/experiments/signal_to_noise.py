"""The signal-to-noise ratio of one meta-update by the size of the perturbations: which ``estimator.std`` to train with.

Updates of the recipe ``flat-v2`` are estimated at the untrained weights: four families at a time, whole runs cut to
NUM_STEPS, the same problems, batches and directions for each size.  The ratio is that of
``flatopt.metatrain.estimators.persistent_es``: 0 in the mean where there is only noise.  With it stands the meta-loss,
which shows what the perturbations cost.  Entries of ``docs/log.md`` of 2026-11-26 quote it.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/signal_to_noise.py [NUM_STEPS] [PATTERN]``: some minutes on an idle
core.  PATTERN says which weights are perturbed, ``constants.*`` by default, ``*`` for all.  ``--fast`` takes two
families, 20 steps and two sizes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from statistics import fmean, stdev

import torch

from flatopt.metatrain import RECIPES
from flatopt.metatrain.estimators import build_estimator

FAST = "--fast" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
NUM_STEPS = 20 if FAST else int(WORDS[0]) if WORDS else 200
PATTERN = WORDS[1] if len(WORDS) > 1 else "constants.*"
STDS = (0.05, 0.2) if FAST else (0.025, 0.05, 0.1, 0.2, 0.4)
SEED = 23

recipe = RECIPES["flat-v2"]()
names = ["tabular", "regression"] if FAST else [task.name for task in recipe.tasks]
tasks = [
    replace(task, min_steps=NUM_STEPS, max_steps=NUM_STEPS, truncation_length=NUM_STEPS)
    for task in recipe.tasks
    if task.name in names
]
per_update = 1 if FAST else 4
config = replace(
    recipe,
    tasks=tuple(tasks),
    estimator=replace(recipe.estimator, only=(PATTERN,), families_per_update=per_update),
)
estimator = build_estimator(config, torch.device("cpu"))
weights = config.build_rule().init_weights()

print("std", "meta-loss", "signal to noise of each update", "mean", sep=" | ")
for std in STDS:
    generator = torch.Generator().manual_seed(SEED)
    sized = replace(estimator, std=std)
    state, losses, ratios = sized.init(weights, generator), [], []
    for _ in range(len(tasks) // per_update):
        found, state = sized.estimate(weights, state, generator)
        losses.append(float(found.loss))
        ratios.append(found.metrics["snr"])
    mean = f"{fmean(ratios):.2f} ± {stdev(ratios) / len(ratios) ** 0.5:.2f}"
    print(std, f"{fmean(losses):.4f}", " ".join(f"{ratio:.2f}" for ratio in ratios), mean, sep=" | ", flush=True)
