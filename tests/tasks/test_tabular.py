"""Generated tables: what is clean, what is noisy, what overlaps, and that something can be learned."""

from __future__ import annotations

import pytest
import torch

from flatopt.tasks import Batch, Split, Tabular
from flatopt.tasks._optimizee import SPLITS

CLASSES = Tabular(num_features=6, num_classes=3, num_sets=8, num_train=800)
VALUES = Tabular(num_features=6, num_sets=12, num_train=800)


def split_of(data: Tabular, split: Split, source: int) -> Batch:
    table, index = data.table(), SPLITS.index(split)
    start, size = int(table.starts[index, source]), int(table.sizes[index, source])
    return data.gather(table, torch.arange(start, start + size))


@pytest.mark.parametrize("data", [CLASSES, VALUES], ids=["classes", "values"])
def test_features_of_the_training_split_are_standardised(data: Tabular) -> None:
    for source in range(data.num_sets):
        train = split_of(data, "train", source).inputs
        assert train.shape == (800, 6)
        torch.testing.assert_close(train.mean(0), torch.zeros(6), rtol=0, atol=0.03)
        # Outliers are clipped: how many depends on the draws, which are not those of every build of torch.
        assert train.std(0).min() > 0.75 and train.std(0).max() < 1.001
        held_out = split_of(data, "meta", source).inputs
        assert held_out.shape == (1000, 6)
        assert held_out.mean(0).abs().max() < 0.2 and (held_out.std(0) - 1).abs().max() < 0.3


def test_every_data_set_has_every_class_in_every_split_but_not_equally_often() -> None:
    shares = [
        split_of(CLASSES, split, source).targets.bincount(minlength=3) / 1000
        for split in SPLITS
        for source in range(CLASSES.num_sets)
    ]
    assert all(len(share) == 3 and share.min() > 0.01 for share in shares)
    assert any(share.max() > 0.45 for share in shares)


def nearest_errors(data: Tabular, source: int) -> tuple[float, float]:
    """Return the error on ``meta`` of the mean over the five nearest training rows, and of the mean of all."""
    train, meta = split_of(data, "train", source), split_of(data, "meta", source)
    near = torch.cdist(meta.inputs, train.inputs).topk(5, largest=False).indices
    if data.num_classes:
        guess, common = train.targets[near].mode(-1).values, train.targets.mode().values
        return (guess != meta.targets).float().mean().item(), (common != meta.targets).float().mean().item()
    guess = train.targets[near].mean(1)
    return (guess - meta.targets).square().mean().item(), meta.targets.square().mean().item()


@pytest.mark.parametrize("data", [CLASSES, VALUES], ids=["classes", "values"])
def test_the_neighbours_of_a_row_tell_its_target(data: Tabular) -> None:
    errors = [nearest_errors(data, source) for source in range(data.num_sets)]
    assert sum(near < 0.9 * trivial for near, trivial in errors) >= 0.8 * len(errors)


def test_only_training_values_are_noisy_by_a_tenth_to_one_standard_deviation() -> None:
    stds = []
    for source in range(VALUES.num_sets):
        train, test = split_of(VALUES, "train", source).targets, split_of(VALUES, "test", source).targets
        torch.testing.assert_close(train.std(), torch.tensor(1.0))
        stds.append(test.std().item())  # 1 / sqrt(1 + noise^2)
    assert 0.6 < min(stds) < 0.85 and 0.95 < max(stds) < 1.1


def test_other_seeds_and_sources_are_other_data() -> None:
    first, again = (Tabular(num_features=6, num_sets=2, num_train=50, seed=seed).build() for seed in (0, 0))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    other = Tabular(num_features=6, num_sets=2, num_train=50, seed=1).build()
    assert not torch.equal(first.inputs, other.inputs)
    assert not torch.equal(first.targets[:50], first.targets[50:100])


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_features": 3}, "num_features must be at least 4"), ({"num_features": 5, "num_classes": 1}, "num_classes")],
)
def test_impossible_tables_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tabular(**fields)  # type: ignore[arg-type]
