"""What longer steps do to accuracy and flatness, with nothing learned anew: plain sets with ``FlatOpt(..., lr=...)``.

Trains the networks that sets are selected by, five seeds each.  Results: ``docs/results/search.md``.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/longer_steps.py``; finished runs are kept in ``runs/eval/rates``.
``--fast`` trains the digits networks alone, a tenth of the steps, two seeds, and keeps its runs apart.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from flatopt.evaluate import RunCache, reproduction
from flatopt.evaluate.contestants import learned_contestant

FAST = "--fast" in sys.argv
OUT = Path("runs/eval/rates-fast" if FAST else "runs/eval/rates")
RATES = {"rnnprop": (1.0, 1.4, 2.0), "l2o-scale": (0.7, 1.0, 1.4)}

num_seeds, cache = 2 if FAST else 5, RunCache(OUT / "runs.sqlite3")
curvature = reproduction.FAST_CURVATURE if FAST else reproduction.CURVATURE
optimizees = reproduction.selection_optimizees("fashion-mnist")
if FAST:
    optimizees = [replace(one, num_steps=one.num_steps // 10) for one in optimizees if one.source.startswith("digits")]
for name, rates in RATES.items():
    plain = learned_contestant(name, reproduction.load_sets([name])[name], horizon_known=True)
    for rate in rates:
        contestant = replace(plain, lrs=(rate,))
        records = [reproduction.compare(one, contestant, num_seeds, "meta", curvature, cache) for one in optimizees]
        accuracy = 100 * fmean(value for record in records for value in record["accuracy"])
        eigenvalue = fmean(value for record in records for value in record["log_top_eigenvalue"])
        print(f"{name}, lr {rate}: accuracy {accuracy:.2f} %, ln top eigenvalue {eigenvalue:.2f}")
