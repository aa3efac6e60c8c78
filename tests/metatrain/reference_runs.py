"""Short runs of every kind of meta-training, and a hash of what each computes: run it before and after a refactor.

``OMP_NUM_THREADS=1 python tests/metatrain/reference_runs.py [FILE]`` prints one hash per run.  With a FILE it compares
with the hashes in it and exits 1 where one differs; a FILE that does not exist is written.  Hashes are of one machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from flatopt.metatrain import RECIPES, MetaTrainConfig, TaskConfig, train
from flatopt.metatrain.checkpoint import latest

PUBLISHED = [
    "estimator.truncation_length=4",
    "num_updates=14",
    "validate_every=2",
    "validation.num_tasks=1",
    "log_every=1",
]
STAGED = [*PUBLISHED, "curriculum.stages=[8, 16]", "curriculum.min_num_eval=1", "checkpoint_every=0"]
TWO_FAMILIES = (
    TaskConfig(name="mlp", num_tasks=3, min_steps=5, max_steps=20, random_scaling=1.0),
    TaskConfig(name="cnn", num_tasks=2, min_steps=5, max_steps=15, weight=2.0),
)


def two_families(*overrides: str) -> MetaTrainConfig:
    """Return the flagship's recipe, made small."""
    small = ["estimator.truncation_length=5", "num_updates=7", "log_every=1", "compile=false", "validate_every=3"]
    small += ["estimator.families_per_update=none", "validation.num_tasks=2", "warmup_updates=2"]
    data = json.loads(RECIPES["smoke"]().override(small).to_json())
    data["tasks"] = [json.loads(json.dumps(vars(task))) for task in TWO_FAMILIES]
    data["objective"]["flatness"] |= {"name": "perturbation-gap", "coefficient": 0.3, "signed": True}
    return MetaTrainConfig.from_json(json.dumps(data)).override(list(overrides))


RUNS = {
    "smoke": lambda: RECIPES["smoke"]().override(["num_updates=8"]),
    "rnnprop-entropy": lambda: RECIPES["rnnprop-entropy"]().override(
        [*STAGED, "objective.flatness.options.num_steps=4"]
    ),
    "l2o-dm-hessian": lambda: RECIPES["l2o-dm-hessian"]().override(STAGED),
    "l2o-scale": lambda: RECIPES["l2o-scale"]().override([*STAGED, "num_updates=6"]),
    "two-families": lambda: two_families(),
    "two-families-in-turn": lambda: two_families("estimator.families_per_update=1"),
    "truncated-es": lambda: two_families("estimator.name=truncated-es", "imitation.probabilities=[0.5]"),
    "inner-flatness": lambda: two_families(
        "objective.inner_flatness.name=sam-gap",
        "objective.inner_flatness.coefficient=0.1",
        "objective.inner_flatness.schedule=last",
    ),
}


def fingerprint(config: MetaTrainConfig) -> str:
    """Train, and return a hash of the weights, their average, the best ones, and the losses of every update."""
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder))
        checkpoint = latest(Path(folder) / "checkpoints")
        assert checkpoint is not None
        digest = hashlib.sha256()
        for group in (checkpoint.weights, checkpoint.average, checkpoint.best):
            for name, value in group.items():
                digest.update(name.encode() + value.contiguous().numpy().tobytes())
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            kept = ("update", "loss", "smoothed_loss", "gradient_norm", "lr", "validation_loss", "imitation")
            digest.update(json.dumps([metrics.get(key) for key in kept]).encode())
        return digest.hexdigest()[:16]


def main(path: Path | None) -> int:
    """Run all, print, and compare."""
    found = {}
    for name, make in RUNS.items():
        found[name] = fingerprint(make())
        print(name, found[name], flush=True)
    if path is None:
        return 0
    if not path.exists():
        path.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    differs = [name for name, expected in json.loads(path.read_text()).items() if found.get(name) != expected]
    print(f"differ: {', '.join(differs)}" if differs else "all as before")
    return int(bool(differs))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else None))
