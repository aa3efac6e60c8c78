"""Where the default rule diverges, and what mends it: a wide transformer without normalisation, at a batch of 8.

The configuration is one of ``flatopt-eval robustness``, trained for more steps than there: width 512, depth 4, digits
of 8 x 8 pixels, one seed.  Printed is the mean loss of ten steps at a time.  Entries of ``docs/log.md`` of
2026-11-26 and -27 quote it, each with the rule of its time.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/divergence.py [NUM_STEPS]``: ten minutes on an idle core, most of
them for whole matrices as one strip.  ``--fast`` takes a width of 16 and 20 steps.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from statistics import fmean

from flatopt import LearnedRule, load_pretrained
from flatopt.evaluate._training import Benchmark, train_benchmark
from flatopt.evaluate.contestants import Contestant, Setting, baselines, default_name, learned_contestant, untrained
from flatopt.evaluate.robustness import ARCHITECTURES

FAST = "--fast" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
NUM_STEPS = 20 if FAST else int(WORDS[0]) if WORDS else 120
WIDTH = 16 if FAST else 512
LEARNED = load_pretrained(default_name())
WHOLE = LearnedRule(replace(LEARNED.rule, strip_size=WIDTH), LEARNED.weights)  # type: ignore[call-arg]
ADAM = baselines()[0]


def flatopt(learned: LearnedRule, *, told: bool) -> Contestant:
    """Return FlatOpt as a contestant."""
    return learned_contestant("FlatOpt", learned, horizon_known=told)


ROWS: dict[str, tuple[Contestant, Setting]] = {
    "FlatOpt, length told": (flatopt(LEARNED, told=True), Setting(1.0)),
    "FlatOpt, not told": (flatopt(LEARNED, told=False), Setting(1.0)),
    "FlatOpt, told, lr 0.1": (flatopt(LEARNED, told=True), Setting(0.1)),
    "FlatOpt, not told, lr 0.1": (flatopt(LEARNED, told=False), Setting(0.1)),
    "untrained, told": (flatopt(untrained(LEARNED), told=True), Setting(1.0)),
    "Adam, 1e-3, cosine": (ADAM, Setting(1e-3, cosine=True)),
    "Adam, 3e-3, cosine": (ADAM, Setting(3e-3, cosine=True)),
    "FlatOpt, told, whole matrices": (flatopt(WHOLE, told=True), Setting(1.0)),
    "FlatOpt, not told, whole matrices": (flatopt(WHOLE, told=False), Setting(1.0)),
}

BENCHMARK = Benchmark(
    name="plain transformer",
    source="digits",
    size=8,
    num_train=None,
    build=partial(ARCHITECTURES["transformer"], width=WIDTH, depth=4, normalise=False),
    batch_size=8,
    num_steps=NUM_STEPS,
)

for label, (contestant, setting) in ROWS.items():
    losses = train_benchmark(BENCHMARK, contestant, setting, 0).trained.losses
    starts = range(0, len(losses) - 9, max(10, NUM_STEPS // 6))
    means = [fmean(losses[start : start + 10]) for start in starts]
    print(f"{label}: {', '.join(f'{mean:.3g}' if math.isfinite(mean) else 'infinite' for mean in means)}", flush=True)
