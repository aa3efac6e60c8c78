"""FlatOpt on problems of other kinds than those of the benchmark: fine-tuning, generative models, ratings, ...

All problems of ``docs/experiments/loops`` with all optimizers, three seeds.  The baselines have the learning rate, and
Muon the schedule, that one run finds best on the ``meta`` split.  FlatOpt is used as it comes, and again at other
values of its ``lr``.  Nothing about it was chosen on these problems.  All that were tried are shown.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/workloads.py [NUM_PROCESSES]``; it writes
``docs/results/workloads.json`` for ``docs/results/generate.py``.  ``--games`` runs those of ``loops/games.py`` alone
and replaces their tables, ``--direct`` those of ``loops/direct.py``, ``--long`` those of ``loops/long.py``;
``--fast`` trains a few steps with one seed, and writes nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from loops import direct, games, long, loss_of, numbers, pictures, sequences
from torch.optim.lr_scheduler import CosineAnnealingLR

from flatopt import load_pretrained
from flatopt.evaluate._training import best_setting, set_mode
from flatopt.evaluate.compare import Problem, measure
from flatopt.evaluate.contestants import (
    REFERENCE,
    Contestant,
    Setting,
    baselines,
    default_name,
    learned_contestant,
    learned_contestants,
)
from flatopt.tasks import Batch

FAST = "--fast" in sys.argv
WORDS = [int(word) for word in sys.argv[1:] if not word.startswith("--")]
NUM_PROCESSES, NUM_SEEDS = (1, 1) if FAST else (WORDS[0] if WORDS else 2, 3)
OUT = Path(__file__).parents[1] / "results" / "workloads.json"
SMALLER_LRS, LARGER_LRS = (0.3, 0.1, 0.03), (3.0, 10.0, 30.0)
FLATOPT = "FlatOpt"


class Workload(NamedTuple):
    """A problem, and for how many steps it is trained."""

    name: str
    make: Callable[..., Problem]
    num_steps: int


WORKLOADS = (
    Workload("fine-tuning: transformer, other text", sequences.other_text, 150),
    Workload("fine-tuning: LoRA, other text", sequences.lora, 200),
    Workload("fine-tuning: CNN, shifted images", pictures.shifted_images, 150),
    Workload("fine-tuning: CNN, new classes", pictures.new_classes, 150),
    Workload("VAE", pictures.vae, 600),
    Workload("diffusion, U-Net", pictures.diffusion, 500),
    Workload("contrastive learning", pictures.contrastive, 500),
    Workload("logistic regression", pictures.logistic, 600),
    Workload("MLP-Mixer", pictures.mixer, 400),
    Workload("depthwise separable CNN", pictures.mobile, 400),
    Workload("ConvNeXt", pictures.convnext, 300),
    Workload("picture by coordinates, SIREN", pictures.siren, 300),
    Workload("picture by coordinates, Fourier features", pictures.fourier, 300),
    Workload("physics-informed network", numbers.equation, 1500),
    Workload("smooth function, 20,000 rows", numbers.smooth_function, 1500),
    Workload("mean and deviation, 4,000 rows", numbers.uncertain_function, 800),
    Workload("matrix factorisation", numbers.factorisation, 1000),
    Workload("embeddings and MLP, ratings", numbers.neural_recommender, 1000),
    Workload("graph convolution, 150 labels", numbers.graph, 200),
    Workload("modular addition", numbers.modular_addition, 2000),
    Workload("adding problem, GRU", sequences.adding_gru, 800),
    Workload("adding problem, RNN", sequences.adding_rnn, 800),
    Workload("reversal, transformer", sequences.reversal, 600),
)
GAMES = (
    Workload("PPO, cart with a pole", games.cart, 1200),
    Workload("PPO, pendulum", games.pendulum, 2400),
    Workload("deep Q-learning, cart with a pole", games.q_learning, 2000),
    Workload("GAN", games.adversarial, 1500),
)
DIRECT = (
    Workload("Gaussian process, 6 parameters", direct.gaussian_process, 300),
    Workload("pose, 6 parameters", direct.pose, 500),
    Workload("picture with given features", direct.picture, 400),
    Workload("Rosenbrock's function, 50 parameters", direct.banana, 2000),
    Workload("logistic regression, inputs not scaled", direct.scaled_logistic, 500),
    Workload("positive matrix factors", direct.positive_factors, 1000),
    Workload("factors of a tensor", direct.tensor_factors, 1000),
    Workload("map of distances", direct.map_of_distances, 500),
)
LONG = (
    Workload("MLP, 50,000 images", long.perceptron, 5000),
    Workload("BatchNorm CNN, 50,000 images", long.convolutions, 5000),
    Workload("transformer, 3 million characters", long.characters, 5000),
    Workload("smooth function, 20,000 rows", numbers.smooth_function, 10_000),
)


class Group(NamedTuple):
    """Problems with tables of their own."""

    flag: str
    """Runs them alone."""
    title: str
    workloads: tuple[Workload, ...]
    other_lrs: tuple[float, ...] = SMALLER_LRS


GROUPS = (
    Group("--networks", "Other kinds of problems", WORKLOADS),
    Group("--games", "Reinforcement learning, adversarial training", GAMES),
    Group("--direct", "Direct fitting", DIRECT, LARGER_LRS),
    Group("--long", "Long runs", LONG, (0.3, 3.0)),
)


def run(workload: Workload, contestant: Contestant, setting: Setting, seed: int, split: str) -> tuple[str, float]:
    """Train; return what is measured, and its value: the error in per cent where there is one, or the loss."""
    torch.set_num_threads(1)
    num_steps = 4 if FAST else workload.num_steps
    problem = workload.make(seed, split)
    params = [param for param in problem.model.parameters() if param.requires_grad]
    optimizer = contestant.build(params, setting.lr, num_steps, seed, **dict(setting.options))
    schedule = CosineAnnealingLR(optimizer, num_steps) if setting.cosine else None
    modes = optimizer if contestant.averages else None
    set_mode(problem.model, modes, training=True)

    def closure(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = loss_of(problem, batch)
        loss.backward()
        return loss.item()

    epochs = itertools.chain.from_iterable(problem.train for _ in range(num_steps))
    for batch in itertools.islice(epochs, num_steps):
        if not math.isfinite(optimizer.step(partial(closure, batch))):
            return "diverged", math.inf
        if schedule is not None:
            schedule.step()
    set_mode(problem.model, modes, training=False)
    if modes is not None and any(isinstance(part, torch.nn.BatchNorm2d) for part in problem.model.modules()):
        problem.model.train()  # statistics of the averages
        with torch.no_grad():
            for _ in range(20):
                loss_of(problem, next(problem.train))  # type: ignore[call-overload]
    found = measure(problem)
    value = found.get("error", found["test_loss"])
    return "error, %" if "error" in found else "loss", value if math.isfinite(value) else math.inf


class Finished(NamedTuple):
    """What one optimizer reached on the test split."""

    setting: str
    kind: str
    values: list[float]

    def text(self) -> str:
        """Return the cell of a table."""
        spread = f" ± {stdev(self.values):.1g}" if len(self.values) > 1 and math.isfinite(sum(self.values)) else ""
        return f"{fmean(self.values):.3g}{spread}"


def contestants(other_lrs: Sequence[float]) -> list[Contestant]:
    """Return FlatOpt, with the length of the run known and not; three tuned baselines; FlatOpt at other values."""
    learned = load_pretrained(default_name())
    told, untold = (one for one in learned_contestants(default_name())[:2])
    tuned = [one for one in baselines() if one.name in (REFERENCE, "Schedule-Free AdamW", "Muon")]
    others = [
        replace(learned_contestant(f"{FLATOPT}, lr {lr:g}", learned, horizon_known=True), lrs=(lr,)) for lr in other_lrs
    ]
    if FAST:
        tuned = [replace(one, lrs=one.lrs[1:2], cosines=(True,), extends=False) for one in tuned]
    return [told, untold, *tuned, *others]


def finish(other_lrs: Sequence[float], workload: Workload) -> dict[str, Finished]:
    """Return what every optimizer reached on a problem."""
    warnings.simplefilter("ignore")
    found = {}
    for contestant in contestants(other_lrs):
        setting = best_setting(
            contestant, lambda setting, who=contestant: (-run(workload, who, setting, 0, "meta")[1],)
        )
        runs = [run(workload, contestant, setting, seed, "test") for seed in range(NUM_SEEDS)]
        found[contestant.name] = Finished(str(setting), runs[0][0], [value for _, value in runs])
    return found


def no_worse(finished: Sequence[dict[str, Finished]], name: str, others: Sequence[str]) -> str:
    """Return on how many problems the mean of one optimizer is no worse than those of all others."""
    means = [{who: fmean(one.values) for who, one in of.items()} for of in finished]
    return f"{sum(all(of[name] <= of[other] for other in others) for of in means)} of {len(means)}"


def main() -> None:
    """Run all, and write the tables."""
    if FAST:
        tables_of(Group("", "", (*WORKLOADS[2:14:11], GAMES[2], DIRECT[1], LONG[2])))
        return
    groups = [group for group in GROUPS if group.flag in sys.argv] or GROUPS
    tables = [table for group in groups for table in tables_of(group)]
    titles = {table["title"] for table in tables}
    others = json.loads(OUT.read_text(encoding="utf-8"))["tables"] if len(groups) < len(GROUPS) else []
    tables = [table for table in others if table["title"] not in titles] + tables
    OUT.write_text(json.dumps({"tables": tables}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def kind_of(lrs: Sequence[float]) -> str:
    """Return how values of ``lr`` differ from 1."""
    return "larger" if min(lrs) > 1 else "smaller" if max(lrs) < 1 else "other"


def tables_of(group: Group) -> list[dict[str, Any]]:
    """Run some problems, print every row, and return the tables."""
    _, title, workloads, other_lrs = group
    finished = []
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        for workload, found in zip(workloads, pool.map(partial(finish, other_lrs), workloads), strict=True):
            finished.append(found)
            cells = (f"{name} [{one.setting}] {one.text()}" for name, one in found.items())
            print(f"{workload.name}: {'; '.join(cells)}", flush=True)
    names = list(finished[0])
    tuned = [one.name for one in contestants(other_lrs) if one.extends]
    shown = [name for name in names if ", lr " not in name]
    learned = load_pretrained(default_name())
    return [
        {
            "title": title,
            "note": f"Mean ± standard deviation over {NUM_SEEDS} seeds on the test split; lower is better. {FLATOPT}: "
            "nothing tuned. The others: the learning rate, of Muon the schedule too, that one run finds best on the "
            "meta split, from five values, and more where the best is at an edge. "
            f"Weights: {default_name()}, SHA-256 {learned.sha256[:12]}.",
            "command": "OMP_NUM_THREADS=1 python docs/experiments/workloads.py",
            "columns": ["problem", "measured", *shown],
            "rows": [
                [workload.name, found[FLATOPT].kind, *(found[name].text() for name in shown)]
                for workload, found in zip(workloads, finished, strict=True)
            ],
        },
        {
            "title": f"{title}: on how many the mean, before it is rounded, is no worse",
            "columns": ["optimizer", f"than {REFERENCE}", "than all tuned ones"],
            "rows": [[name, no_worse(finished, name, [REFERENCE]), no_worse(finished, name, tuned)] for name in shown],
        },
        {
            "title": f"{title}: {FLATOPT} at {kind_of(other_lrs)} values of lr, and the settings of the others",
            "columns": ["problem", "lr 1", *(f"lr {lr:g}" for lr in other_lrs), *tuned],
            "rows": [
                [
                    workload.name,
                    found[FLATOPT].text(),
                    *(found[f"{FLATOPT}, lr {lr:g}"].text() for lr in other_lrs),
                    *(found[name].setting for name in tuned),
                ]
                for workload, found in zip(workloads, finished, strict=True)
            ],
        },
    ]


if __name__ == "__main__":
    main()
