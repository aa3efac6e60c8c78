"""Strips of more rows in wide matrices: what 32 costs where a matrix has many of them.

A decoder of width 256 and depth 3 on characters of the standard library's source, windows of 128, 16 to a batch, 400
steps, length told.  The default rule with strips of 32 rows and more, up to the whole matrix, at ``lr`` 1 and 2; steps
are shortened by how many strips there are, so whole matrices take the longest.  Tuned Muon is beside it.  Printed is
the loss on the ``meta`` files in nats per character.  The entry of ``docs/log.md`` of 2026-11-27 on GPUs quotes it.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/strip_sizes.py [SIZE ...] [--seed=1]``: about three minutes for each
size and each rate on a core, ``0`` for Muon.  ``--fast`` takes a tiny network, three steps and two sizes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from flatopt import LearnedRule
from flatopt.evaluate._training import Benchmark, results
from flatopt.evaluate.contestants import Contestant, Setting, default_rule, learned_contestant, muon
from flatopt.evaluate.models import decoder

FAST = "--fast" in sys.argv
WORDS = [int(word) for word in sys.argv[1:] if not word.startswith("--")]
SEED = next((int(word.partition("=")[2]) for word in sys.argv if word.startswith("--seed=")), 0)
SIZES = WORDS or ([0, 32] if FAST else [0, 32, 64, 128, 256])
SHAPE = {"width": 16, "depth": 1} if FAST else {"width": 256, "depth": 3}
RUN: dict[str, Any] = {"num_steps": 3} if FAST else {"num_steps": 400}

benchmark = Benchmark(
    name="text",
    source="text of meta-training",
    size=16 if FAST else 128,
    num_train=None,
    build=partial(decoder, **SHAPE),
    batch_size=16,
    num_eval=16 if FAST else 400,
    **RUN,
)


def contestants(size: int) -> list[tuple[Contestant, Setting]]:
    """Return the runs of one size of strips."""
    if not size:
        tuned = Contestant(name="Muon", build=muon, lrs=(3e-3, 1e-2, 3e-2), cosines=(True,))
        return [(tuned, setting) for setting in tuned.settings()]
    learned = default_rule()
    rule = replace(learned.rule, strip_size=size)  # type: ignore[call-arg]
    one = learned_contestant(f"strips of {size}", LearnedRule(rule, learned.weights), horizon_known=True)
    return [(one, Setting(lr)) for lr in (1.0, 2.0)]


for size in SIZES:
    for contestant, setting in contestants(size):
        loss = results(benchmark, contestant, setting, SEED)["meta_loss"]
        assert math.isfinite(loss)
        print(f"{contestant.name}, lr {setting}: {loss:.3f}", flush=True)
