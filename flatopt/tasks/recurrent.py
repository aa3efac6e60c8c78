"""A recurrent network that reads an image row by row and classifies from its last hidden state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._layers import check_choice, init_affine, linear, matmul, uniform
from ._task import Optimizee, Params

NUM_GATES = {"lstm": 4, "gru": 3, "tanh": 1}


@dataclass(frozen=True, kw_only=True)
class RecurrentNet(Optimizee):
    """One recurrent layer over the rows, then a linear layer.  Names, shapes and equations of ``torch.nn``.

    Args:
        width: hidden units.
        num_rows: steps of the recurrence.
        row_size: inputs per step.
        num_classes: number of outputs.
        cell: ``"lstm"`` (``nn.LSTM``), ``"gru"`` (``nn.GRU``) or ``"tanh"`` (``nn.RNN``).

    Example:
        >>> model = RecurrentNet(width=16, num_rows=8, row_size=8)
        >>> model.predict(model.init(torch.Generator().manual_seed(0)), torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    width: int
    num_rows: int
    row_size: int
    num_classes: int = 10
    cell: Literal["lstm", "gru", "tanh"] = "lstm"

    def __post_init__(self) -> None:
        check_choice("cell", self.cell, tuple(NUM_GATES))

    def init(self, generator: torch.Generator) -> Params:
        """Return ``rnn.{weight,bias}_{ih,hh}_l0`` from ``U(+-1/sqrt(width))``, and ``head.{weight,bias}``."""
        rows = NUM_GATES[self.cell] * self.width
        bound = 1 / math.sqrt(self.width)
        params = {
            "rnn.weight_ih_l0": uniform((rows, self.row_size), bound, generator),
            "rnn.weight_hh_l0": uniform((rows, self.width), bound, generator),
            "rnn.bias_ih_l0": uniform((rows,), bound, generator),
            "rnn.bias_hh_l0": uniform((rows,), bound, generator),
        }
        init_affine(params, "head", (self.num_classes, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, num_classes]`` for inputs that reshape to ``[B, num_rows, row_size]``."""
        rows = inputs.reshape(inputs.shape[0], self.num_rows, self.row_size)
        driven = matmul(rows, params["rnn.weight_ih_l0"].T) + params["rnn.bias_ih_l0"]
        recurrent, bias = params["rnn.weight_hh_l0"].T, params["rnn.bias_hh_l0"]
        hidden = memory = torch.zeros_like(driven[:, 0, : self.width])
        for row in range(self.num_rows):
            hidden, memory = self._cell(driven[:, row], hidden @ recurrent + bias, hidden, memory)
        return linear(params, "head", hidden)

    def _cell(self, driven: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Advance hidden state and memory, given the parts of the gates ``[B, gates * width]`` from input and past."""
        if self.cell == "tanh":
            return torch.tanh(driven + recurrent), memory
        if self.cell == "gru":
            reset_x, update_x, new_x = driven.chunk(3, -1)
            reset_h, update_h, new_h = recurrent.chunk(3, -1)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            return new + update * (hidden - new), memory
        enter, forget, new, leave = (driven + recurrent).chunk(4, -1)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(memory), memory
