"""The nine shipped sets of the published rules, in the ordinary loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state
from torch import nn

from flatopt import FlatOpt, list_pretrained, load_pretrained
from flatopt.evaluate.reproduction import SETS
from flatopt.metatrain import RECIPES, MetaTrainConfig
from flatopt.pretrained import shipped_folder
from flatopt.tasks import load_images

pytest.importorskip("sklearn")


def make_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))


def train(model: nn.Module, optimizer: FlatOpt, first: int, last: int) -> list[float]:
    """Take the steps ``first`` to ``last``, each on a batch of its own."""
    inputs, targets = load_images("digits", 8).train
    losses = []
    for step in range(first, last):
        chosen = torch.randint(len(targets), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[chosen].unsqueeze(1)), targets[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [name for name in list_pretrained() if load_pretrained(name).training])
def test_the_recipe_is_the_configuration_that_made_the_weights(name: str) -> None:
    text = (shipped_folder(name) / "training.json").read_text(encoding="utf-8")
    assert MetaTrainConfig.from_json(text) == RECIPES[name]()


@pytest.mark.parametrize("name", SETS)
def test_a_set_says_how_it_was_made(name: str) -> None:
    assert load_pretrained(name).training["recipe"] == name


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", SETS)
def test_a_shipped_set_trains_a_cnn_and_resumes_exactly(name: str, state_dtype: torch.dtype | None) -> None:
    build = partial(FlatOpt, pretrained=name, state_dtype=state_dtype)
    model = make_model()
    optimizer = build(model.parameters())
    losses = train(model, optimizer, 0, 100)
    resumed_model = make_model()
    resumed_model.load_state_dict(model.state_dict())
    resumed = build(resumed_model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, resumed)
    losses += train(model, optimizer, 100, 200)
    train(resumed_model, resumed, 100, 200)
    assert_same_state(optimizer, resumed)
    for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
