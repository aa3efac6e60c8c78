"""Networks to be optimized, as ordinary ``torch.nn`` modules: they are what a user of the optimizer has.

Most take images ``[batch, size, size]`` and return logits ``[batch, 10]``; ``transformer`` and ``lstm`` read an image
row by row.  ``dense`` takes rows of a table, ``decoder`` and ``text_gru`` take characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

NUM_CLASSES = 10


def mlp(
    size: int, *, width: int = 32, depth: int = 1, activation: type[nn.Module] = nn.ReLU, normalise: bool = False
) -> nn.Sequential:
    """Build a multi-layer perceptron with ``depth`` hidden layers, with LayerNorm after each when ``normalise``."""
    widths = [size * size, *[width] * depth]
    hidden = _hidden_layers(widths, activation, normalise)
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], NUM_CLASSES))


def dense(size: int, *, width: int, num_outputs: int, depth: int = 2) -> nn.Sequential:
    """Build a multi-layer perceptron for rows of a table, ``[batch, size]``."""
    widths = [size, *[width] * depth]
    return nn.Sequential(*_hidden_layers(widths), nn.Linear(widths[-1], num_outputs))


def _hidden_layers(
    widths: Sequence[int], activation: type[nn.Module] = nn.ReLU, normalise: bool = False
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for num_inputs, width in pairwise(widths):
        layers += [nn.Linear(num_inputs, width), *([nn.LayerNorm(width)] if normalise else []), activation()]
    return layers


def cnn(size: int, *, width: int = 16, depth: int = 2, normalise: bool = False, num_groups: int = 0) -> nn.Sequential:
    """Build ``depth`` 3x3 convolutions, the first two with pooling.

    After each BatchNorm when ``normalise``, or GroupNorm when there are ``num_groups``.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, size))]
    for index, num_channels in enumerate((1, *[width] * (depth - 1))):
        layers += [nn.Conv2d(num_channels, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width)] if normalise else []
        layers += [nn.GroupNorm(num_groups, width)] if num_groups else []
        layers += [nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if index < 2 else []
    features = width * (size // 2 ** min(depth, 2)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, NUM_CLASSES))


def published_cnn(size: int) -> nn.Sequential:
    """Build the convolutional net of the published learned optimizers: BatchNorm, no padding, linear logits."""
    first = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    features = 32 * (((size - 2) // 2 - 4) // 2) ** 2
    return nn.Sequential(nn.Unflatten(1, (1, size)), *first, *second, nn.Linear(features, NUM_CLASSES))


def published_plain_cnn(size: int, *, stride: int = 2) -> nn.Sequential:
    """Build their other one, convolutions without bias, normalisation or pooling; they had a stride of 1."""
    first = [nn.Conv2d(1, 8, 3, stride=stride, padding=1, bias=False), nn.ReLU()]
    second = [nn.Conv2d(8, 8, 5, stride=stride, padding=2, bias=False), nn.ReLU(), nn.Flatten()]
    features = 8 * math.ceil(math.ceil(size / stride) / stride) ** 2
    return nn.Sequential(nn.Unflatten(1, (1, size)), *first, *second, nn.Linear(features, NUM_CLASSES))


def small_start(size: int, *, build: Callable[[int], nn.Module], std: float = 0.01) -> nn.Module:
    """Build a model and draw weights and biases of its linear and convolutional layers from ``N(0, std^2)``."""
    model = build(size)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for param in module.parameters():
                nn.init.normal_(param, std=std)
    return model


def residual_net(size: int, *, width: int = 16, num_blocks: int = 2) -> nn.Sequential:
    """Build a small pre-activation residual network with BatchNorm."""
    stem = [nn.Unflatten(1, (1, size)), nn.Conv2d(1, width, 3, padding=1), nn.MaxPool2d(2)]
    blocks = [Residual(nn.Sequential(*_pre_activation(width), *_pre_activation(width))) for _ in range(num_blocks)]
    head = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(4 * width, NUM_CLASSES))


def _pre_activation(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]


def transformer(size: int, *, width: int = 32, depth: int = 2, normalise: bool = True) -> nn.Sequential:
    """Build a transformer that reads an image row by row; LayerNorm before each branch when ``normalise``."""
    layers: list[nn.Module] = [nn.Linear(size, width), Positions(size, width)]
    for _ in range(depth):
        for branch in (SelfAttention(width), _feed_forward(width)):
            layers.append(Residual(nn.Sequential(nn.LayerNorm(width), branch) if normalise else branch))
    layers += [nn.LayerNorm(width)] if normalise else []
    return nn.Sequential(*layers, MeanOverRows(), nn.Linear(width, NUM_CLASSES))


def lstm(size: int, *, width: int = 32, depth: int = 1, normalise: bool = False) -> nn.Sequential:
    """Build an LSTM that reads an image row by row, with LayerNorm after each layer when ``normalise``."""
    layers: list[nn.Module] = []
    for num_inputs in (size, *[width] * (depth - 1)):
        layers.append(Recurrent(nn.LSTM(num_inputs, width, batch_first=True)))
        layers += [nn.LayerNorm(width)] if normalise else []
    return nn.Sequential(*layers, LastRow(), nn.Linear(width, NUM_CLASSES))


def autoencoder(size: int, *, width: int = 96, code: int = 16) -> nn.Sequential:
    """Build a dense autoencoder of images; returns ``[batch, size * size]``."""
    encoder = [nn.Flatten(), nn.Linear(size * size, width), nn.GELU(), nn.Linear(width, code)]
    return nn.Sequential(*encoder, nn.Linear(code, width), nn.GELU(), nn.Linear(width, size * size))


def pre_norm_mlp(size: int, *, width: int = 64, depth: int = 6) -> nn.Sequential:
    """Build a residual perceptron with LayerNorm before each branch of two layers."""
    branches = [
        Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)))
        for _ in range(depth)
    ]
    ends = nn.LayerNorm(width), nn.Linear(width, NUM_CLASSES)
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, width), *branches, *ends)


def vit(size: int, *, patch: int = 7, width: int = 48, depth: int = 2) -> nn.Sequential:
    """Build a vision transformer: patches, learned positions, pre-norm layers, the mean over patches."""
    num_patches = (size // patch) ** 2
    stem = [nn.Unflatten(1, (1, size)), nn.Conv2d(1, width, patch, stride=patch), nn.Flatten(2), Transpose()]
    layers = _transformer_layers(width, depth)
    ends = [nn.LayerNorm(width), MeanOverRows(), nn.Linear(width, NUM_CLASSES)]
    return nn.Sequential(*stem, Positions(num_patches, width), *layers, *ends)


def decoder(size: int, *, num_tokens: int = 96, width: int = 48, depth: int = 2) -> nn.Sequential:
    """Build a causal transformer that predicts the next of each of ``size`` tokens."""
    layers = _transformer_layers(width, depth, causal=True)
    ends = [nn.LayerNorm(width), nn.Linear(width, num_tokens)]
    return nn.Sequential(nn.Embedding(num_tokens, width), Positions(size, width), *layers, *ends)


def text_gru(size: int, *, num_tokens: int = 96, width: int = 64) -> nn.Sequential:
    """Build a GRU that predicts the next of each token."""
    return nn.Sequential(
        nn.Embedding(num_tokens, width),
        Recurrent(nn.GRU(width, width, batch_first=True)),
        nn.Linear(width, num_tokens),
    )


def _transformer_layers(width: int, depth: int, *, causal: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(depth):
        feed_forward = _feed_forward(width)  # its random numbers come before those of the attention
        for branch in (SelfAttention(width, causal=causal), feed_forward):
            layers.append(Residual(nn.Sequential(nn.LayerNorm(width), branch)))
    return layers


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Residual(nn.Module):
    """Add a branch to its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs + branch(inputs)``."""
        return inputs + self.branch(inputs)


class Transpose(nn.Module):
    """Exchange the last two axes."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[batch, b, a]`` of ``[batch, a, b]``."""
        return inputs.transpose(1, 2)


class LastRow(nn.Module):
    """Keep the last element of a sequence."""

    def forward(self, sequence: Tensor) -> Tensor:
        """Return ``[batch, width]`` of ``[batch, length, width]``."""
        return sequence[:, -1]


class MeanOverRows(nn.Module):
    """Average a sequence."""

    def forward(self, sequence: Tensor) -> Tensor:
        """Return ``[batch, width]`` of ``[batch, length, width]``."""
        return sequence.mean(1)


class Positions(nn.Module):
    """Add a learned embedding of the position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, width)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return the sequence plus one vector per position."""
        return sequence + self.embedding.weight


class SelfAttention(nn.Module):
    """Multi-head self-attention of a sequence, one head per 16 channels."""

    def __init__(self, width: int, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.attention = nn.MultiheadAttention(width, max(1, width // 16), batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return ``[batch, length, width]`` of the same shape."""
        length = sequence.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=sequence.device).triu(1) if self.causal else None
        return self.attention(sequence, sequence, sequence, attn_mask=mask, need_weights=False)[0]


class Recurrent(nn.Module):
    """A recurrent layer, without its final state."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, sequence: Tensor) -> Tensor:
        """Return the hidden states ``[batch, length, width]``."""
        return self.cell(sequence)[0]
