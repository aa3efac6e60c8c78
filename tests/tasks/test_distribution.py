"""Randomised problems: each augmentation does what it says, and the vectorised gather equals its definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from flatopt.tasks import (
    MLP,
    SPLITS,
    Batch,
    Data,
    Images,
    Problems,
    Split,
    Tabular,
    TaskDistribution,
    Text,
    Transformer,
    load_images,
    load_text,
)

DIGITS = TaskDistribution(
    model=MLP(sizes=(64, 6, 10)), data=Images(sources=(("digits", 1.0),)), num_train_range=(50, 2000)
)
PLAIN = dataclasses.replace(
    DIGITS,
    input_scale_range=(1.0, 1.0),
    init_scale_range=(1.0, 1.0),
    label_noise_probability=0.0,
    label_permutation=False,
)
TEXT = TaskDistribution(
    model=Transformer(vocab_size=96, width=8, num_heads=2, num_layers=1, context_length=9),
    data=Text(context_length=9),
    num_train_range=(100, 1000),
    batch_size=6,
)
TABLES = Tabular(num_features=5, num_sets=3, num_train=40)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hash32(value: int) -> int:
    """MurmurHash3's finaliser on Python integers."""
    bits = value * 0x9E3779B1 % 2**32
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    return bits ^ bits >> 16


def literal_target(label: int, example: int, problems: Problems, n: int, split: Split, num_classes: int) -> int:
    bits = hash32(example + int(problems.noise_seed[n]))
    if split == "train" and (bits >> 8) / 2**24 < float(problems.label_noise[n]):
        label = (label + 1 + ((bits & 255) * (num_classes - 1) >> 8)) % num_classes
    return int(problems.label_permutation[n, label])


def literal_rows(
    distribution: TaskDistribution, problems: Problems, num_batches: int, split: Split, generator: torch.Generator
) -> Tensor:
    table = distribution.data.table()
    num_problems = len(problems.source)
    drawn = torch.randint(2**31, (num_batches, num_problems, distribution.batch_size), generator=generator)
    rows = torch.empty_like(drawn)
    for index in torch.cartesian_prod(*map(torch.arange, drawn.shape)).tolist():
        batch, n, example = index
        source = int(problems.source[n])
        size = int(table.sizes[SPLITS.index(split), source])
        position = int(drawn[batch, n, example])
        if split == "train":
            position = int(problems.offset[n]) + position % int(problems.num_train[n])
        rows[batch, n, example] = int(table.starts[SPLITS.index(split), source]) + position % size
    return rows


@pytest.mark.parametrize("split", SPLITS)
def test_image_batches_equal_their_slow_definition(split: Split) -> None:
    distribution = dataclasses.replace(DIGITS, batch_size=7, label_noise_probability=0.7, label_noise_range=(0.5, 0.5))
    problems = distribution.sample_problems(5, seeded())
    batches = distribution.sample_batches(problems, 3, split, seeded(1))
    table = distribution.data.table()
    rows = literal_rows(distribution, problems, 3, split, seeded(1))
    for batch, n, example in torch.cartesian_prod(*map(torch.arange, rows.shape)).tolist():
        row = int(rows[batch, n, example])
        torch.testing.assert_close(batches.inputs[batch, n, example], table.inputs[row] * problems.input_scale[n])
        label = literal_target(int(table.targets[row]), row, problems, n, split, 10)
        assert batches.targets[batch, n, example] == label


@pytest.mark.parametrize("split", SPLITS)
def test_text_batches_equal_their_slow_definition(split: Split) -> None:
    distribution = dataclasses.replace(TEXT, label_noise_probability=0.7, label_noise_range=(0.5, 0.5))
    problems = distribution.sample_problems(3, seeded())
    batches = distribution.sample_batches(problems, 2, split, seeded(1))
    assert batches.inputs.dtype == batches.targets.dtype == torch.int64
    text = torch.cat(list(load_text()))
    rows = literal_rows(distribution, problems, 2, split, seeded(1))
    for batch, n, example in torch.cartesian_prod(*map(torch.arange, rows.shape)).tolist():
        row = int(rows[batch, n, example])
        assert batches.inputs[batch, n, example].tolist() == text[row : row + 9].tolist()
        for place in range(9):
            label = literal_target(int(text[row + 1 + place]), row + 1 + place, problems, n, split, 96)
            assert batches.targets[batch, n, example, place] == label


@pytest.mark.parametrize("split", SPLITS)
def test_images_come_from_the_split_with_their_labels(split: Split) -> None:
    data: Batch = getattr(load_images("digits", 8), split)
    labels = {
        tuple(image): label for image, label in zip(data.inputs.flatten(1).tolist(), data.targets.tolist(), strict=True)
    }
    batches = PLAIN.sample_batches(PLAIN.sample_problems(4, seeded()), 5, split, seeded(1))
    images, targets = batches.inputs.flatten(0, -2).tolist(), batches.targets.flatten().tolist()
    assert all(labels[tuple(image)] == target for image, target in zip(images, targets, strict=True))


@pytest.mark.parametrize(
    ("data", "length"),
    [(Images(sources=(("digits", 0.5), ("digits", 0.5))), 1), (Text(context_length=9), 10), (TABLES, 1)],
    ids=["digits", "text", "tabular"],
)
def test_splits_and_sources_share_no_row_of_the_table(data: Data, length: int) -> None:
    table = data.table()
    starts, sizes = table.starts.flatten().tolist(), table.sizes.flatten().tolist()
    spans = sorted((start, start + size - 1 + length) for start, size in zip(starts, sizes, strict=True))
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] == len(table.inputs)


def test_the_training_subset_has_the_stated_size_and_others_are_whole() -> None:
    distribution = dataclasses.replace(PLAIN, num_train_range=(40, 40), batch_size=500)
    problems = distribution.sample_problems(3, seeded())
    seen = {}
    for split in ("train", "meta"):
        inputs = distribution.sample_batches(problems, 20, split, seeded(1)).inputs.transpose(0, 1).flatten(1, 2)
        seen[split] = [{tuple(image) for image in one.tolist()} for one in inputs]
    assert [len(part) for part in seen["train"]] == [40, 40, 40]
    assert not set.intersection(*seen["train"])
    assert [len(part) for part in seen["meta"]] == [300, 300, 300]


def test_problem_fields_stay_in_their_ranges_and_fill_them() -> None:
    distribution = dataclasses.replace(DIGITS, reparametrization_range=(0.1, 10.0))
    problems = distribution.sample_problems(400, seeded())
    assert problems.num_train.min() >= 50 and problems.num_train.max() == 1097
    # Log-uniform: half of the values lie below the geometric mean sqrt(50 * 2000).
    assert (problems.num_train < 316).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert 0.5 <= problems.input_scale.min() < 0.55 and 1.9 < problems.input_scale.max() <= 2.0
    assert (problems.input_scale < 1).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert (problems.label_noise > 0).float().mean().item() == pytest.approx(0.125, abs=0.05)
    noise = problems.label_noise[problems.label_noise > 0]
    assert 0.1 <= noise.min() < 0.115 and 0.185 < noise.max() <= 0.2
    assert noise.mean().item() == pytest.approx(0.15, abs=0.02)
    assert torch.equal(problems.label_permutation.sort(-1).values, torch.arange(10).expand(400, 10))
    assert len({tuple(row) for row in problems.label_permutation.tolist()}) > 390
    assert set(problems.param_scales) == set(problems.params)
    assert all(scale.min() >= 0.099 and scale.max() <= 10.01 for scale in problems.param_scales.values())
    assert all(len(value) == 400 for value in problems.params.values())


def test_label_noise_is_on_train_only_with_the_stated_fraction_and_fixed_by_example() -> None:
    clean = dataclasses.replace(PLAIN, batch_size=2000)
    noisy = dataclasses.replace(clean, label_noise_probability=1.0, label_noise_range=(0.3, 0.3))
    problems = noisy.sample_problems(4, seeded())
    for split in SPLITS:
        wrong, right = (one.sample_batches(problems, 4, split, seeded(1)) for one in (noisy, clean))
        torch.testing.assert_close(wrong.inputs, right.inputs, rtol=0, atol=0)
        differ = wrong.targets != right.targets
        if split != "train":
            assert not differ.any()
            continue
        # Four problems with at least 50 examples each: two standard errors.
        assert differ.float().mean().item() == pytest.approx(0.3, abs=0.06)
        shifts = torch.bincount((wrong.targets - right.targets)[differ] % 10, minlength=10)
        assert shifts[0] == 0 and shifts[1:].min() > 0.3 * shifts[1:].float().mean()
        for n in range(4):
            labels: dict[tuple[float, ...], set[int]] = {}
            images, targets = wrong.inputs[:, n].flatten(0, 1), wrong.targets[:, n].flatten()
            for image, target in zip(images.tolist(), targets.tolist(), strict=True):
                labels.setdefault(tuple(image), set()).add(target)
            assert all(len(found) == 1 for found in labels.values())


def test_init_scale_touches_weights_only() -> None:
    model = Transformer(vocab_size=96, width=8, num_heads=2, num_layers=1, context_length=9)
    scaled = dataclasses.replace(TEXT, model=model, init_scale_range=(3.0, 3.0)).sample_problems(2, seeded())
    plain = dataclasses.replace(TEXT, model=model, init_scale_range=(1.0, 1.0)).sample_problems(2, seeded())
    for name, value in plain.params.items():
        factor = 3.0 if value[0].dim() > 1 and "embedding" not in name else 1.0
        torch.testing.assert_close(scaled.params[name], factor * value)


def test_reparametrisation_changes_units_and_not_the_function() -> None:
    changed = dataclasses.replace(DIGITS, reparametrization_range=(0.2, 5.0))
    problems, plain = changed.sample_problems(4, seeded()), DIGITS.sample_problems(4, seeded())
    batch = Batch(*(part[0] for part in DIGITS.sample_batches(plain, 1, "train", seeded(1))))
    losses = torch.func.vmap(changed.loss)(problems, problems.params, batch)
    torch.testing.assert_close(losses, torch.func.vmap(DIGITS.loss)(plain, plain.params, batch))
    ratios = plain.params["layers.0.weight"] / problems.params["layers.0.weight"]
    torch.testing.assert_close(ratios, problems.param_scales["layers.0.weight"])
    slopes = torch.func.vmap(torch.func.grad(changed.loss, 1))(problems, problems.params, batch)
    expected = torch.func.vmap(torch.func.grad(DIGITS.loss, 1))(plain, plain.params, batch)
    for name, scale in problems.param_scales.items():
        torch.testing.assert_close(slopes[name], expected[name] * scale)


def test_small_training_batches_are_examples_repeated_and_have_the_loss_of_the_few() -> None:
    family = dataclasses.replace(PLAIN, batch_size=32, min_batch_size=8)
    problems = family.sample_problems(200, seeded())
    assert {size: (problems.batch_size == size).sum() > 40 for size in (8, 16, 32)} == {8: True, 16: True, 32: True}
    batch = Batch(*(part[0] for part in family.sample_batches(problems, 1, "train", seeded(1))))
    losses = torch.func.vmap(family.loss)(problems, problems.params, batch)
    for n in range(6):
        size = int(problems.batch_size[n])
        few = Batch(batch.inputs[n, :size], batch.targets[n, :size])
        assert torch.equal(batch.inputs[n], few.inputs.repeat(32 // size, 1))
        one = torch.utils._pytree.tree_map(lambda value, n=n: value[n], problems)
        torch.testing.assert_close(losses[n], family.loss(one, one.params, few))
    held_out = family.sample_batches(problems, 1, "meta", seeded(1)).inputs[0]
    assert all(len(torch.unique(images, dim=0)) > 28 for images in held_out[:6])


def test_batch_sizes_change_nothing_else_that_is_drawn() -> None:
    plain, sized = (one.sample_problems(3, seeded()) for one in (DIGITS, dataclasses.replace(DIGITS, min_batch_size=8)))
    torch.testing.assert_close(plain, sized._replace(batch_size=plain.batch_size), rtol=0, atol=0)


def test_vmapped_loss_and_error_equal_a_loop() -> None:
    problems = DIGITS.sample_problems(3, seeded())
    batch = Batch(*(part[0] for part in DIGITS.sample_batches(problems, 1, "meta", seeded(1))))
    for measure in (DIGITS.loss, DIGITS.error):
        many = torch.func.vmap(measure)(problems, problems.params, batch)
        for n in range(3):
            one = torch.utils._pytree.tree_map(lambda value, n=n: value[n], (problems, problems.params, batch))
            torch.testing.assert_close(many[n], measure(*one))


def test_everything_is_decided_by_the_generator() -> None:
    first, again, other = (DIGITS.sample_problems(3, seeded(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first.params["layers.0.weight"], other.params["layers.0.weight"])
    batches = [DIGITS.sample_batches(first, 2, "train", seeded(seed)) for seed in (1, 1, 2)]
    torch.testing.assert_close(batches[0], batches[1], rtol=0, atol=0)
    assert not torch.equal(batches[0].inputs, batches[2].inputs)


def test_some_problems_can_be_replaced_by_fresh_ones() -> None:
    old, fresh = DIGITS.sample_problems(4, seeded(1)), DIGITS.sample_problems(2, seeded(2))
    where = torch.tensor([1, 3])
    mixed = torch.utils._pytree.tree_map(lambda a, b: a.index_copy(0, where, b), old, fresh)
    expected = torch.utils._pytree.tree_map(lambda a, b: torch.stack([a[0], b[0], a[2], b[1]]), old, fresh)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0)
    assert DIGITS.sample_batches(mixed, 1, "train", seeded()).inputs.shape == (1, 4, 64, 64)


def test_sources_are_drawn_with_their_probabilities() -> None:
    pair = dataclasses.replace(PLAIN, data=Images(sources=(("digits", 0.2), ("digits", 0.8))))
    problems = pair.sample_problems(500, seeded())
    assert problems.source.float().mean().item() == pytest.approx(0.8, abs=0.06)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_problems_and_batches() -> None:
    here, there = DIGITS.sample_problems(3, seeded()), DIGITS.sample_problems(3, seeded(), "cuda")
    torch.testing.assert_close(torch.utils._pytree.tree_map(Tensor.cpu, there), here, rtol=0, atol=0)
    batches = [DIGITS.sample_batches(problems, 2, "train", seeded(1)) for problems in (here, there)]
    assert batches[1].inputs.is_cuda
    torch.testing.assert_close(batches[1].to("cpu"), batches[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_noise_probability": 1.5}, r"label_noise_probability must lie in \[0, 1\], not 1.5"),
        ({"input_scale_range": (2.0, 0.5)}, "input_scale_range must be two increasing positive numbers"),
        ({"num_train_range": (0, 5)}, "num_train_range"),
        ({"min_batch_size": 65}, "min_batch_size must be from 1 to batch_size=64, not 65"),
        ({"label_noise_range": (0.2, 0.1)}, r"label_noise_range must be two increasing numbers in \[0, 1\]"),
    ],
)
def test_impossible_distributions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DIGITS, **change)  # type: ignore[arg-type]


def test_random_scaling_has_a_factor_per_coordinate_and_leaves_the_function() -> None:
    changed = dataclasses.replace(DIGITS, reparametrization_range=(0.05, 20.0))
    problems, plain = (one.sample_problems(3, torch.Generator().manual_seed(0)) for one in (changed, DIGITS))
    batch = DIGITS.sample_batches(plain, 1, "test", torch.Generator().manual_seed(1))
    first = Batch(batch.inputs[0], batch.targets[0])
    logs = torch.cat([value.log().reshape(-1) for value in problems.param_scales.values()])
    assert [value.shape for value in problems.param_scales.values()] == [value.shape for value in plain.params.values()]
    assert logs.abs().max() <= math.log(20)
    torch.testing.assert_close(logs.std(), torch.tensor(2 * math.log(20) / 12**0.5), rtol=0.03, atol=0)
    losses = [torch.func.vmap(DIGITS.loss)(one, one.params, first) for one in (problems, plain)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
