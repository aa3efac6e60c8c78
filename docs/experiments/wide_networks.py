"""What shorter steps do for wide matrices: the default rule with and without the bound on strips that add up.

Networks of widths 256 and 512, wider than any of the benchmark, on Fashion-MNIST reduced to 14 x 14 pixels: 4,000
training images (2,000 for the transformer), batches of 64, 250 steps (120).  Printed is the accuracy on the ``meta``
split, mean and standard deviation over seeds, with the length of the run told and not.  The entry of ``docs/log.md`` of
2026-11-26 on the end of a run quotes it.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/wide_networks.py [NUM_SEEDS]``: five minutes on an idle core with
three seeds.  ``--fast`` takes one narrow network, a few steps and one seed.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any

from flatopt.evaluate._training import Benchmark, results
from flatopt.evaluate.contestants import default_rule, learned_contestant
from flatopt.evaluate.robustness import ARCHITECTURES
from flatopt.rules import orthogonalized_momentum

FAST = "--fast" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
NUM_SEEDS = 1 if FAST else int(WORDS[0]) if WORDS else 3

COMMON = Benchmark(name="", source="fashion-mnist", size=14, num_train=4000, build=ARCHITECTURES["MLP"], num_eval=1000)
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "MLP, 2 x 512": ("MLP", {"width": 512, "depth": 2, "normalise": False}, {"num_steps": 250}),
    "normalised MLP, 3 x 512": ("MLP", {"width": 512, "depth": 3, "normalise": True}, {"num_steps": 250}),
    "MLP, 4 x 256": ("MLP", {"width": 256, "depth": 4, "normalise": False}, {"num_steps": 250}),
    "normalised transformer, 2 x 256": (
        "transformer",
        {"width": 256, "depth": 2, "normalise": True},
        {"num_steps": 120, "num_train": 2000},
    ),
}
if FAST:
    narrow = {"width": 16, "depth": 1, "normalise": False}
    NETWORKS = {"MLP": ("MLP", narrow, {"source": "digits", "size": 8, "num_steps": 5, "num_train": 200})}

for bound in (orthogonalized_momentum.FREE_STRIPS, math.inf):
    orthogonalized_momentum.FREE_STRIPS = bound  # type: ignore[assignment]
    for name, (architecture, shape, run) in NETWORKS.items():
        benchmark = replace(COMMON, name=name, build=partial(ARCHITECTURES[architecture], **shape), **run)
        for told in (True, False):
            contestant = learned_contestant("FlatOpt", default_rule(), horizon_known=told)
            setting = contestant.settings()[0]
            scores = [100 * results(benchmark, contestant, setting, seed)["meta_score"] for seed in range(NUM_SEEDS)]
            how = f"bound of {bound:g} strips, length {'told' if told else 'not told'}"
            print(f"{name}, {how}: {fmean(scores):.1f} ± {pstdev(scores):.1f}", flush=True)
