"""Networks on sequences: a pretrained language model on other text, whole and by LoRA; tasks that need memory."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatopt.evaluate.compare import Problem
from flatopt.evaluate.models import decoder
from flatopt.tasks import Batch, load_text
from flatopt.tasks.text import encode

from . import generator, likelihood, made, of_split, pretrain, squared_error, table

LENGTH, WIDTH = 64, 64


def windows(tokens: Tensor, batch_size: int, random: torch.Generator, length: int = LENGTH) -> Batch:
    """Return stretches of tokens that begin anywhere, and the next ones."""
    starts = torch.randint(len(tokens) - length, (batch_size, 1), generator=random)
    chosen = tokens[starts + torch.arange(length + 1)]
    return Batch(chosen[:, :-1], chosen[:, 1:])


@lru_cache(maxsize=1)
def prose() -> dict[str, Tensor]:
    """Return the help texts of Python, English for the most part: 30,000 characters to train on."""
    from pydoc_data.topics import topics

    tokens = encode("\n".join(topics[name] for name in sorted(topics)).encode())
    return dict(zip(("train", "meta", "test"), tokens[-200_000:].split([30_000, 80_000, 90_000]), strict=True))


@lru_cache(maxsize=1)
def _pretrained() -> dict[str, Tensor]:
    """Return the weights of a transformer that knows Python's source code."""
    torch.manual_seed(0)
    code = load_text().train
    return pretrain(Problem(_transformer(), made(lambda random: windows(code, 16, random), 0), [], likelihood), 4000)


def _transformer() -> nn.Sequential:
    model = decoder(LENGTH, width=WIDTH)
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    return model


def _on_prose(model: nn.Module, seed: int, split: str) -> Problem:
    train = made(lambda random: windows(prose()["train"], 16, random), seed)
    measured = of_split(lambda random: windows(prose()[split], 40, random), split)
    return Problem(model, train, measured, likelihood)


def other_text(seed: int, split: str = "test") -> Problem:
    """Return the pretrained transformer, whole, on other text."""
    torch.manual_seed(seed)
    model = _transformer()
    model.load_state_dict(_pretrained())
    return _on_prose(model, seed, split)


class LoRA(nn.Module):
    """A frozen linear layer plus a learned product of low rank (Hu et al., 2022)."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), 16 / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[..., out_features]``."""
        return self.linear(inputs) + self.scale * (inputs @ self.down.T @ self.up.T)


def lora(seed: int, split: str = "test") -> Problem:
    """Return the same by LoRA of rank 4 in the layers of its feed-forward networks."""
    torch.manual_seed(seed)
    model = _transformer()
    model.load_state_dict(_pretrained())
    model.requires_grad_(False)
    for owner in list(model.modules()):
        for name, part in list(owner.named_children()):
            if type(part) is nn.Linear and part is not model[-1]:
                setattr(owner, name, LoRA(part))
    return _on_prose(model, seed, split)


class LastOf(nn.Module):
    """A recurrent network and a linear layer on its last state."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.out = recurrent, nn.Linear(width, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return ``[batch, 1]`` of ``[batch, length, inputs]``."""
        return self.out(self.recurrent(sequence)[0][:, -1])


def _adding(kind: type[nn.RNNBase], seed: int, split: str, length: int = 30, width: int = 48) -> Problem:
    """Return the adding problem (Hochreiter and Schmidhuber, 1997): the sum of two marked numbers of a sequence."""
    random = generator(0)
    numbers, marks = torch.rand(14_000, length, generator=random), torch.zeros(14_000, length)
    half = length // 2
    for first in (0, half):
        marks.scatter_(1, torch.randint(first, first + half, (len(marks), 1), generator=random), 1.0)
    sums = (numbers * marks).sum(1, keepdim=True)
    torch.manual_seed(seed)
    model = LastOf(kind(2, width, batch_first=True), width)  # type: ignore[call-arg, arg-type]
    return Problem(model, *table(torch.stack([numbers, marks], -1), sums, 10_000, split, 64, seed), squared_error)


def adding_gru(seed: int, split: str = "test") -> Problem:
    """Return the adding problem for a GRU, 30 numbers."""
    return _adding(nn.GRU, seed, split)


def adding_rnn(seed: int, split: str = "test") -> Problem:
    """Return the adding problem for a plain recurrent network."""
    return _adding(nn.RNN, seed, split)


def reversal(seed: int, split: str = "test", length: int = 12, num_tokens: int = 20) -> Problem:
    """Return a transformer that writes a sequence of random tokens backwards; the error of a token."""
    torch.manual_seed(seed)
    model = decoder(2 * length, num_tokens=num_tokens, width=WIDTH)

    def draw(batch_size: int, random: torch.Generator) -> Batch:
        tokens = torch.randint(1, num_tokens, (batch_size, length), generator=random)
        whole = torch.cat([tokens, torch.zeros(batch_size, 1, dtype=torch.long), tokens.flip(1)], 1)
        return Batch(whole[:, :-1], whole[:, length + 1 :])

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        outputs = model(batch.inputs)[:, length:]
        wrong = (outputs.argmax(-1) != batch.targets).float().mean()
        return F.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten()), {"error": 100 * float(wrong)}

    train = made(lambda random: draw(64, random), seed)
    return Problem(model, train, of_split(lambda random: draw(250, random), split), loss_fn)
