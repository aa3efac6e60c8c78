"""Two LSTM layers on one coordinate at a time, with loops over units: the slow oracle of L2O-DM and RNNProp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIZES = [(3, 4), (4,), (2, 1, 2), ()]
NUM_STEPS = 50


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lstm_unit_by_unit(
    weight: list[list[float]], bias: list[float], x: list[float], hidden: list[float], cell: list[float]
) -> tuple[list[float], list[float]]:
    """Return new hidden and cell state; rows of ``weight`` are the blocks input, forget, candidate, output."""
    size, inputs = len(hidden), x + hidden
    z = [sum(w * value for w, value in zip(row, inputs, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
    new_cell = [sigmoid(z[size + k]) * cell[k] + sigmoid(z[k]) * math.tanh(z[2 * size + k]) for k in range(size)]
    return [math.tanh(new_cell[k]) * sigmoid(z[3 * size + k]) for k in range(size)], new_cell


def two_layers(weights: dict[str, Tensor], x: list[float], memory: dict[str, list[float]]) -> float:
    """Advance ``memory`` by one step and return what the read-out gives."""
    for layer in (0, 1):
        weight, bias = weights[f"lstm_{layer}.weight"].tolist(), weights[f"lstm_{layer}.bias"].tolist()
        hidden, cell = memory[f"hidden_{layer}"], memory[f"cell_{layer}"]
        x, cell = lstm_unit_by_unit(weight, bias, x, hidden, cell)
        memory[f"hidden_{layer}"], memory[f"cell_{layer}"] = x, cell
    row = weights["readout.weight"][0].tolist()
    return sum(w * h for w, h in zip(row, x, strict=True)) + float(weights["readout.bias"])


def fresh_memory(size: int) -> dict[str, list[float]]:
    return {f"{kind}_{layer}": [0.0] * size for kind in ("hidden", "cell") for layer in (0, 1)}


def start(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]


def grads_at(params: list[Tensor], step: int) -> list[Tensor]:
    """Return gradients that follow from the parameters, from tiny to huge: an error of a step is not forgotten."""
    return [
        10.0 ** (index - 2) * (param + torch.sin(7 * param + step + torch.arange(param.numel()).reshape(param.shape)))
        for index, param in enumerate(params)
    ]
