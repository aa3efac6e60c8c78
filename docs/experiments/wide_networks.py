"""How many rows the strips of a matrix should have, in networks wider than any of the benchmark.

Networks of widths 256 to 1024: on Fashion-MNIST reduced to 14 x 14 pixels, and on characters of the standard library's
source.  The default rule with strips of at most 32, 64 and 128 rows, and as it is: strips of 128 rows at width 256, of
192 at 384 and 768, of 256 at 512 and 1024.  Printed is the score on the ``meta`` split (accuracy in per cent), mean and
standard deviation over seeds, and the mean logarithm of the loss, with the length of the run told and not.  Entries
of ``docs/log.md`` of 2026-11-27 on strips quote it.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/wide_networks.py [ROWS ...] [--seeds=3] [--only=NAME]``: an hour on
an idle core for each number of rows with three seeds, ``0`` for the rule as it is.  ``--only`` takes the networks with
this in their name, ``--fast`` one tiny network, a few steps, one seed and two sizes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from statistics import fmean, pstdev

from flatopt import LearnedRule, load_pretrained
from flatopt.evaluate import models
from flatopt.evaluate._training import Benchmark, results
from flatopt.evaluate.contestants import default_name, learned_contestant

FAST = "--fast" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
OPTIONS = dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
NUM_SEEDS = int(OPTIONS.get("--seeds", 1 if FAST else 3))
ROWS = [int(word) for word in WORDS] or ([2, 0] if FAST else [32, 64, 128, 0])

IMAGES = Benchmark(name="", source="fashion-mnist", size=14, num_train=4000, build=models.mlp, num_eval=1000)
TEXT = Benchmark(
    name="",
    source="text of meta-training",
    size=64,
    num_train=None,
    build=models.decoder,
    batch_size=16,
    num_steps=250,
    num_eval=300,
)
NETWORKS = {
    "MLP, 2 x 512": replace(IMAGES, build=partial(models.mlp, width=512, depth=2), num_steps=250),
    "normalised MLP, 3 x 512": replace(
        IMAGES, build=partial(models.mlp, width=512, depth=3, normalise=True), num_steps=250
    ),
    "MLP, 4 x 256": replace(IMAGES, build=partial(models.mlp, width=256, depth=4), num_steps=400),
    "ViT, 2 x 256": replace(IMAGES, build=partial(models.vit, width=256, depth=2), num_steps=150, num_train=2000),
    "text GRU, 256": replace(TEXT, build=partial(models.text_gru, width=256), size=32, num_steps=300),
    "text decoder, 2 x 256": replace(TEXT, build=partial(models.decoder, width=256, depth=2)),
    "text decoder, 2 x 384": replace(TEXT, build=partial(models.decoder, width=384, depth=2)),
    "text decoder, 1 x 768": replace(TEXT, build=partial(models.decoder, width=768, depth=1), num_steps=200),
    "MLP, 2 x 1024": replace(IMAGES, build=partial(models.mlp, width=1024, depth=2), num_steps=200),
}
if FAST:
    tiny = replace(IMAGES, source="digits", size=8, num_train=200, build=partial(models.mlp, width=16), num_steps=5)
    NETWORKS = {"MLP": tiny}
NETWORKS = {name: network for name, network in NETWORKS.items() if OPTIONS.get("--only", "") in name}

learned = load_pretrained(default_name())
for rows in ROWS:
    one_size = replace(learned.rule, strip_size=rows, max_strip_size=rows) if rows else learned.rule  # type: ignore[call-arg]
    for name, network in NETWORKS.items():
        for told in (True, False):
            contestant = learned_contestant("FlatOpt", LearnedRule(one_size, learned.weights), horizon_known=told)
            (setting,) = contestant.settings()
            runs = [results(replace(network, name=name), contestant, setting, seed) for seed in range(NUM_SEEDS)]
            scores = [100 * run["meta_score"] for run in runs]
            ln_loss = fmean(math.log(run["meta_loss"]) for run in runs)
            how = f"{f'strips of {rows}' if rows else 'as it is'}, length {'told' if told else 'not told'}"
            print(f"{name}, {how}: {fmean(scores):.2f} ± {pstdev(scores):.2f}, ln loss {ln_loss:.3f}", flush=True)
