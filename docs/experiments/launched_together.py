"""How long a step of meta-training takes as it is, under ``vmap``, and as its recorded graph, on a device.

On a GPU the kernels of the graph are launched together.  ``docs/meta-training.md`` quotes it.

Run as ``python docs/experiments/launched_together.py [DEVICE] [FAMILY ...]``: a minute on a GPU (the default, where
there is one).  ``--fast`` takes one family and few problems.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import torch

from flatopt.metatrain.inner_training import Families
from flatopt.metatrain.recipes import flat_v2
from flatopt.metatrain.runs import map_tree, share_weights
from flatopt.metatrain.unroll import Unroll
from flatopt.rules import Weights

FAST = "--fast" in sys.argv
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
DEVICE = torch.device(WORDS[0] if WORDS else "cuda" if torch.cuda.is_available() else "cpu")
NAMES = WORDS[1:] or ["tabular", "cnn-groupnorm", "gru-text", "vit", "mlp-wider"]
NUM_PAIRS, NUM_STEPS = (2, 2) if FAST else (48, 20)


def seconds_per_step(unroll: Unroll, weights: Weights) -> tuple[float, torch.Tensor]:
    """Return the time of a step after a first one, and the losses, to compare."""
    generator = torch.Generator().manual_seed(0)
    weights_N = map_tree(torch.Tensor.contiguous, share_weights(weights, 2 * NUM_PAIRS))
    runs = unroll.start(weights_N, NUM_PAIRS, 2, generator)
    draws = unroll.draw(runs, 2, generator, NUM_STEPS)
    unroll.unroll(weights_N, runs, map_tree(lambda value: value[:1], draws), 2)
    wait()
    start = time.perf_counter()
    _, losses = unroll.unroll(weights_N, runs, draws, 2)
    wait()
    return (time.perf_counter() - start) / NUM_STEPS, losses.train


def wait() -> None:
    """Wait for a GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


config = flat_v2()
weights = {name: weight.to(DEVICE) for name, weight in config.build_rule().init_weights().items()}
families = Families.from_config(config, DEVICE).select(NAMES[:1] if FAST else NAMES)
where = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "CPU"
print(f"{where}, torch {torch.__version__}, {2 * NUM_PAIRS} runs side by side")
for one in families.unrolls:
    plain, expected = seconds_per_step(replace(one, mode="plain"), weights)
    recorded, losses = seconds_per_step(replace(one, mode="recorded"), weights)
    difference = float((losses - expected).abs().max())
    print(f"{one.task.name:14s} plain {1e3 * plain:6.2f} ms, recorded {1e3 * recorded:6.2f} ms", end=", ")
    print(f"{plain / recorded:.1f} times as fast, largest difference of a loss {difference:.0e}", flush=True)
