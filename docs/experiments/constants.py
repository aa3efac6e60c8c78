"""What single constants of the default rule do to held-out errors, and what a learned set does, over many families.

Candidates train the same problems on the same batches, and are judged by the error on the ``meta`` split after the last
step: the fraction of wrong classes, or the mean square, times 100, against the untrained rule.  Entries of
``docs/log.md`` of 2026-11-25 quote it.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/constants.py [known|unknown] [NUM_STEPS] [SET ...]``: ten minutes on
an idle core.  Sets are names or folders of weights, ``SET:0.7`` for weights shrunk to 0.7.  ``--fast`` takes two
families, 40 steps and three candidates.
"""

from __future__ import annotations

import math
import sys
from statistics import fmean

import torch
from torch import Tensor
from torch.func import vmap

from flatopt import load_pretrained
from flatopt.metatrain import ObjectiveConfig, TaskConfig
from flatopt.metatrain.families import FAMILIES
from flatopt.metatrain.runs import map_tree
from flatopt.metatrain.unroll import Unroll
from flatopt.rules import OrthogonalizedMomentum, Weights
from flatopt.rules.orthogonalized_momentum import CONSTANT_SCALE
from flatopt.tasks import Batch

FAST = "--fast" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
KNOWN = WORDS[0] == "known" if WORDS else True
NUM_STEPS = 40 if FAST else int(WORDS[1]) if len(WORDS) > 1 else 300
NUM_PROBLEMS, NUM_BATCHES, SEED = 6, 16, 17
NAMES = ["tabular", "mlp"] if FAST else [name for name in FAMILIES if name != "mnist-mlp"]
RULE = OrthogonalizedMomentum()
UNTRAINED = RULE.init_weights()

FACTORS = {
    "decay times 3": {"matrix_decay": 3.0, "vector_decay": 3.0},
    "decay times 1/3": {"matrix_decay": 1 / 3, "vector_decay": 1 / 3},
    "step times 2": {"matrix_step": 2.0, "vector_step": 2.0},
    "step times 1/2": {"matrix_step": 0.5, "vector_step": 0.5},
    "half the momentum rate": {"momentum": 0.5},
    "twice the momentum rate": {"momentum": 2.0},
}
POWERS = {
    "gradient power 1/2": {"gradient_power": 0.5},
    "step with signal, power 1/2": {"noise_step": 0.5},
    "step with signal, power 1": {"noise_step": 1.0},
    "decay with noise, power 1/2": {"noise_decay": 0.5},
    "decay late, power 1/2": {"late_decay": 0.5},
}
UNKNOWN = {
    f"step like (1 + t/100)^-{power}": {"anytime_power": math.log(power / 0.7)} for power in (0.35, 0.5, 1.0, 1.4)
}


def changed(constants: dict[str, float]) -> Weights:
    """Return untrained weights but for some constants, given as what is added to the exponent."""
    weights = {f"constants.{name}": torch.tensor(value / CONSTANT_SCALE) for name, value in constants.items()}
    return UNTRAINED | weights


def candidates() -> dict[str, Weights]:
    """Return what is compared; the untrained rule first."""
    found = {"untrained": UNTRAINED}
    for word in WORDS[2:]:
        name, _, factor = word.partition(":")
        learned = load_pretrained(name).weights
        found[word] = {key: float(factor or 1) * value for key, value in learned.items()}
    if len(found) > 1:
        return found
    logs = {label: {name: math.log(factor) for name, factor in one.items()} for label, one in FACTORS.items()}
    found |= {label: changed(one) for label, one in (logs | POWERS | ({} if KNOWN else UNKNOWN)).items()}
    return dict(list(found.items())[:3]) if FAST else found


@torch.no_grad()
def errors_of(name: str, weights: list[Weights]) -> Tensor:
    """Return the mean error of each candidate on the problems of a family, ``[candidates]``."""
    told = 0.0 if KNOWN else 1.0
    task = TaskConfig(name=name, min_steps=NUM_STEPS, max_steps=NUM_STEPS, unknown_horizon_probability=told)
    unroll = Unroll(
        rule=RULE,
        distribution=FAMILIES[name],
        task=task,
        objective=ObjectiveConfig(meta_weight=0.0),
        truncation_length=20,
        device=torch.device("cpu"),
    )
    copies, generator = len(weights), torch.Generator().manual_seed(SEED)
    weights_N = {
        key: torch.stack([one[key] for one in weights]).repeat_interleave(NUM_PROBLEMS, 0) for key in UNTRAINED
    }
    runs = unroll.start(weights_N, NUM_PROBLEMS, copies, generator)
    for _ in range(NUM_STEPS // unroll.truncation_length):
        runs, _ = unroll.run(weights_N, runs, copies, generator)
    first = map_tree(lambda value: value[:NUM_PROBLEMS], runs.problem)
    batches = unroll.distribution.sample_batches(first, NUM_BATCHES, "meta", generator)
    errors = []
    for inputs, targets in zip(*batches, strict=True):
        repeated = Batch(*(value.repeat(copies, *(1,) * (value.dim() - 1)) for value in (inputs, targets)))
        errors.append(vmap(unroll.distribution.error)(runs.problem, runs.params, repeated))
    return torch.stack(errors).mean(0).view(copies, NUM_PROBLEMS).mean(1)


compared = candidates()
differences: dict[str, list[float]] = {label: [] for label in compared}
print(f"{'family':16s}", *compared, sep=" | ")
for name in NAMES:
    errors = 100 * errors_of(name, list(compared.values()))
    for label, error in zip(compared, errors.tolist(), strict=True):
        differences[label].append(error - float(errors[0]))
    row = [f"{float(errors[0]):.1f}", *(f"{float(error - errors[0]):+.1f}" for error in errors[1:])]
    print(f"{name:16s}", *row, sep=" | ", flush=True)
print("mean difference:", *(f"{label} {fmean(values):+.2f}" for label, values in differences.items()), sep="\n  ")
