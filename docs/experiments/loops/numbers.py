"""Functions, equations, ratings, a graph: what networks are trained on besides images and text."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatopt.evaluate.compare import Problem
from flatopt.tasks import Batch

from . import classify, generator, made, squared_error, table

NUM_USERS, NUM_ITEMS = 600, 400


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Build linear layers with an activation between each two."""
    layers = [part for pair in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1])


def smooth_function(seed: int, split: str = "test") -> Problem:
    """Return regression without noise on 20,000 rows: a function of 8 numbers."""
    random = generator(3)
    inputs = torch.randn(24_000, 8, generator=random)
    a, b, c, d = (inputs @ torch.randn(8, 4, generator=random) / math.sqrt(8)).T
    targets = torch.sin(2 * a) + b * c + d.abs()
    targets = ((targets - targets.mean()) / targets.std()).unsqueeze(1)
    torch.manual_seed(seed)
    return Problem(perceptron(8, 64, 64, 1), *table(inputs, targets, 20_000, split, 128, seed), squared_error)


def uncertain_function(seed: int, split: str = "test") -> Problem:
    """Return regression of mean and standard deviation by the Gaussian likelihood; noise depends on the input."""
    random = generator(3)
    inputs = 4 * torch.rand(8000, 3, generator=random) - 2
    deviation = 0.1 + 0.4 * torch.sigmoid(2 * inputs[:, 0])
    targets = torch.sin(2 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2] / 2
    targets = (targets + deviation * torch.randn(len(inputs), generator=random)).unsqueeze(1)
    torch.manual_seed(seed)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        mean, log_deviation = model(batch.inputs).split(1, -1)
        return (log_deviation + 0.5 * ((batch.targets - mean) / log_deviation.exp()).square()).mean()

    model = perceptron(3, 64, 64, 2, activation=nn.SiLU)
    return Problem(model, *table(inputs, targets, 4000, split, 64, seed), loss_fn)


def equation(seed: int, split: str = "test") -> Problem:
    """Return a physics-informed network (Raissi et al., 2019) for Poisson's equation; the error of its solution."""
    torch.manual_seed(seed)

    def solution(points: Tensor) -> Tensor:
        return torch.sin(math.pi * points) + 0.3 * torch.sin(4 * math.pi * points)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return squared_error(model, batch).sqrt()
        points = batch.inputs.requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
        source = -(math.pi**2) * torch.sin(math.pi * points) - 0.3 * (4 * math.pi) ** 2 * torch.sin(
            4 * math.pi * points
        )
        ends = model(torch.tensor([[-1.0], [1.0]]))
        return (curvature - source).square().mean() / 100 + 10 * ends.square().mean()

    def draw(random: torch.Generator) -> Batch:
        points = 2 * torch.rand(64, 1, generator=random) - 1
        return Batch(points, solution(points))

    points = torch.linspace(-1, 1, 501 if split == "test" else 400).unsqueeze(1)
    model = perceptron(1, 48, 48, 1, activation=nn.Tanh)
    return Problem(model, made(draw, seed), [Batch(points, solution(points))], loss_fn)


@lru_cache(maxsize=1)
def ratings() -> tuple[Tensor, Tensor]:
    """Return 40,000 pairs of user and item, and noisy ratings of rank 5 with a bias of each."""
    random = generator(4)
    users, items = (0.5 * torch.randn(number, 5, generator=random) for number in (NUM_USERS, NUM_ITEMS))
    biases = [scale * torch.randn(len(part), generator=random) for scale, part in ((0.4, users), (0.5, items))]
    user = torch.randint(NUM_USERS, (40_000,), generator=random)
    item = (torch.rand(40_000, generator=random).square() * NUM_ITEMS).long()  # some items are popular
    liked = (users[user] * items[item]).sum(-1) + biases[0][user] + biases[1][item]
    return torch.stack([user, item], -1), 3.5 + liked + 0.5 * torch.randn(40_000, generator=random)


class Factors(nn.Module):
    """Matrix factorisation with biases (Koren et al., 2009)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.vectors = nn.ModuleList(nn.Embedding(number, width) for number in (NUM_USERS, NUM_ITEMS))
        self.biases = nn.ModuleList(nn.Embedding(number, 1) for number in (NUM_USERS, NUM_ITEMS))
        self.mean = nn.Parameter(torch.zeros(()))
        for vectors, biases in zip(self.vectors, self.biases, strict=True):
            nn.init.normal_(vectors.weight, std=0.1)
            nn.init.zeros_(biases.weight)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return ratings ``[batch]`` of pairs ``[batch, 2]``."""
        user, item = (part(column) for part, column in zip(self.vectors, pairs.T, strict=True))
        biases = sum(part(column).squeeze(-1) for part, column in zip(self.biases, pairs.T, strict=True))
        return (user * item).sum(-1) + biases + self.mean


class TwoTowers(nn.Module):
    """An embedding of the user, one of the item, and a network on both."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.vectors = nn.ModuleList(nn.Embedding(number, width) for number in (NUM_USERS, NUM_ITEMS))
        self.network = perceptron(2 * width, 64, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return ratings ``[batch]``, less 3.5, of pairs ``[batch, 2]``."""
        both = [part(column) for part, column in zip(self.vectors, pairs.T, strict=True)]
        return self.network(torch.cat(both, -1)).squeeze(-1)


def factorisation(seed: int, split: str = "test") -> Problem:
    """Return matrix factorisation of ratings, whose mean has to be learned."""
    torch.manual_seed(seed)
    pairs, values = ratings()
    return Problem(Factors(), *table(pairs, values, 30_000, split, 256, seed), squared_error)


def neural_recommender(seed: int, split: str = "test") -> Problem:
    """Return a network on embeddings of user and item."""
    torch.manual_seed(seed)
    pairs, values = ratings()
    return Problem(TwoTowers(), *table(pairs, values - 3.5, 30_000, split, 256, seed), squared_error)


class GraphConvolution(nn.Module):
    """A graph convolutional network of two layers (Kipf and Welling, 2017)."""

    def __init__(self, adjacency: Tensor, num_inputs: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.first, self.second, self.dropout = (
            nn.Linear(num_inputs, width),
            nn.Linear(width, num_classes),
            nn.Dropout(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of every node."""
        hidden = F.relu(self.adjacency @ self.first(self.dropout(features)))
        return self.adjacency @ self.second(self.dropout(hidden))


def graph(seed: int, split: str = "test", num_nodes: int = 1000, num_classes: int = 5) -> Problem:
    """Return nodes of a graph to be classified, 150 of them labelled: a small data set, all of it in each step."""
    random = generator(8)
    labels = torch.randint(num_classes, (num_nodes,), generator=random)
    chance = torch.where(labels[:, None] == labels, 0.012, 0.003)
    edges = (torch.rand(num_nodes, num_nodes, generator=random) < chance).float().triu(1)
    adjacency = edges + edges.T + torch.eye(num_nodes)
    scale = adjacency.sum(1).rsqrt()
    centres = 0.35 * torch.randn(num_classes, 50, generator=random)
    features = torch.randn(num_nodes, 50, generator=random) + centres[labels]

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return classify(nn.Sequential(model, Rows(batch.inputs)), Batch(features, batch.targets))

    rows = {"train": slice(0, 150), "meta": slice(150, 400), "test": slice(400, None)}
    nodes = torch.arange(num_nodes)
    train, measured = (Batch(nodes[rows[name]], labels[rows[name]]) for name in ("train", split))
    torch.manual_seed(seed)
    model = GraphConvolution(scale[:, None] * adjacency * scale, 50, num_classes)
    return Problem(model, [train], [measured], loss_fn)


class Rows(nn.Module):
    """Choose some rows."""

    def __init__(self, chosen: Tensor) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, inputs: Tensor) -> Tensor:
        """Return these rows."""
        return inputs[self.chosen]


def modular_addition(seed: int, split: str = "test", modulus: int = 59) -> Problem:
    """Return addition modulo a prime, of which 70 per cent of all sums are shown; the error on the others."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    pairs = pairs[torch.randperm(len(pairs), generator=generator(2))]
    torch.manual_seed(seed)
    embedding = nn.Sequential(nn.Embedding(modulus, 64), nn.Flatten())
    model = nn.Sequential(embedding, perceptron(128, 128, modulus))
    num_train = 7 * len(pairs) // 10
    return Problem(model, *table(pairs, pairs.sum(1) % modulus, num_train, split, 128, seed), classify)
