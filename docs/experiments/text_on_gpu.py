"""A transformer of seven million parameters on text: FlatOpt, nothing tuned, against tuned baselines, on a GPU.

Characters of the standard library's own source, in windows of 256, 32 to a batch; 1,500 steps in bfloat16 autocast.
AdamW and Muon (with AdamW for what is no matrix) have a warm-up over a twentieth of the run and a cosine, Schedule-Free
AdamW has the warm-up alone; decay 0.1 all.  Each has the learning rate that is best on the ``meta`` files.  FlatOpt is
told the length of the run, or not, and takes matrices in strips, as it does by default, or whole.
Printed is the loss on the ``meta`` and ``test`` files, per seed, in nats per character.  ``docs/log.md`` quotes it.

Run as ``python docs/experiments/text_on_gpu.py [NUM_PROCESSES] [NUM_SEEDS]``: the runs go side by side.  ``--large``
takes a network of 57 million parameters, ``--fast`` a tiny one, five steps, one seed, and the CPU if there is no GPU.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flatopt import FlatOpt, LearnedRule, load_pretrained
from flatopt.evaluate._training import build_model, cross_entropy
from flatopt.evaluate.baselines import MuonWithAdamW
from flatopt.evaluate.contestants import default_name, untrained
from flatopt.evaluate.models import decoder
from flatopt.tasks.text import load_text

FAST, LARGE = "--fast" in sys.argv, "--large" in sys.argv
WORDS = [int(word) for word in sys.argv[1:] if not word.startswith("--")]
NUM_PROCESSES, NUM_SEEDS = (*WORDS, *(12, 2)[len(WORDS) :]) if not FAST else (1, 1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_BYTES, LENGTH = (200_000, 16) if FAST else (10_000_000, 256)
WIDTH, DEPTH = (16, 1) if FAST else (768, 12) if LARGE else (384, 6)
NUM_STEPS, BATCH_SIZE, NUM_TEST_BATCHES = (5, 4, 2) if FAST else (1500, 32, 40)
WARMUP = max(1, NUM_STEPS // 20)

GRID = {
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2),
    "Muon": (3e-3, 1e-2, 3e-2, 1e-1),
    "Schedule-Free AdamW": (1e-3, 3e-3, 1e-2, 3e-2),
}
LEARNED = (
    "FlatOpt, length told",
    "FlatOpt, length not told",
    "FlatOpt, whole matrices",
    "untrained core, length told",
)
RUNS = [(name, lr) for name, lrs in GRID.items() for lr in (lrs[1:2] if FAST else lrs)]
RUNS += [(name, 1.0) for name in LEARNED]


def build(name: str, params: list[torch.nn.Parameter], lr: float) -> Optimizer:
    """Make the optimizer of a run."""
    if name == "AdamW":
        return AdamW(params, lr, weight_decay=0.1)
    if name == "Muon":
        return MuonWithAdamW(params, lr)
    if name == "Schedule-Free AdamW":
        return AdamWScheduleFree(params, lr, weight_decay=0.1, warmup_steps=WARMUP)
    learned = load_pretrained(default_name())
    if "untrained" in name:
        learned = untrained(learned)
    if "whole" in name:
        learned = LearnedRule(replace(learned.rule, strip_size=4096), learned.weights)
    return FlatOpt(params, pretrained=learned, num_steps=None if "not" in name else NUM_STEPS)


def make_model(seed: int) -> nn.Module:
    """Make the network of a run."""
    return build_model(partial(decoder, width=WIDTH, depth=DEPTH), LENGTH, seed)


def run(task: tuple[str, float, int]) -> tuple[float, float]:
    """Train, and return the losses on the meta and on the test files."""
    name, lr, seed = task
    torch.set_num_threads(1)
    splits = [part.to(DEVICE) for part in load_text(NUM_BYTES)]
    generator = torch.Generator().manual_seed(seed)
    model = make_model(seed).to(DEVICE)
    optimizer = build(name, list(model.parameters()), lr)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / WARMUP)
        return rise * 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / (NUM_STEPS - WARMUP)))

    schedule = LambdaLR(optimizer, factor) if name in ("AdamW", "Muon") else None

    def loss_of(text: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH_SIZE,), generator=draws).to(DEVICE)
        windows = text[starts[:, None] + torch.arange(LENGTH + 1, device=DEVICE)]
        with torch.autocast(DEVICE, torch.bfloat16):
            return cross_entropy(model(windows[:, :-1]).float(), windows[:, 1:])

    if isinstance(optimizer, AdamWScheduleFree):
        optimizer.train()
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = loss_of(splits[0], generator)
        loss.backward()
        optimizer.step(lambda loss=loss: loss)  # Muon's wrapper wants a closure
        if schedule is not None:
            schedule.step()
    if isinstance(optimizer, FlatOpt | AdamWScheduleFree):
        optimizer.eval()
    model.eval()
    with torch.no_grad():
        found = []
        for text in splits[1:]:
            draws = torch.Generator().manual_seed(0)
            found.append(fmean(float(loss_of(text, draws)) for _ in range(NUM_TEST_BATCHES)))
    return found[0], found[1]


if __name__ == "__main__":
    size = sum(param.numel() for param in make_model(0).parameters())
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{size:,} parameters, {NUM_STEPS} steps, {where}, torch {torch.__version__}", flush=True)
    tasks = [(name, lr, seed) for seed in range(NUM_SEEDS) for name, lr in RUNS]
    with multiprocessing.get_context("spawn").Pool(NUM_PROCESSES) as pool:
        for (name, lr, seed), (meta, test) in zip(tasks, pool.imap(run, tasks, chunksize=1), strict=True):
            print(f"{name:28s} lr {lr:g}, seed {seed}: meta {meta:.4f}, test {test:.4f}", flush=True)
