"""Recurrent networks: one that classifies an image which it reads row by row, one that predicts the next token.

Legend: ``B`` sequences, ``T`` steps, ``G`` gates times width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._layers import check_choice, embed, init_affine, linear, matmul, normal, uniform
from ._optimizee import Optimizee, Params

Cell = Literal["lstm", "gru"]

NUM_GATES = {"lstm": 4, "gru": 3}


@dataclass(frozen=True, kw_only=True)
class RecurrentNet(Optimizee):
    """One recurrent layer over the rows, then a linear layer.  Names, shapes and equations of ``torch.nn``.

    Args:
        width: hidden units.
        num_rows: steps of the recurrence.
        row_size: inputs per step.
        num_classes: number of outputs.
        cell: ``"lstm"`` (``nn.LSTM``) or ``"gru"`` (``nn.GRU``).

    Example:
        >>> model = RecurrentNet(width=16, num_rows=8, row_size=8)
        >>> model.predict(model.init(torch.Generator().manual_seed(0)), torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    width: int
    num_rows: int
    row_size: int
    num_classes: int = 10
    cell: Cell = "lstm"

    def __post_init__(self) -> None:
        check_choice("cell", self.cell, tuple(NUM_GATES))

    def init(self, generator: torch.Generator) -> Params:
        """Return ``rnn.{weight,bias}_{ih,hh}_l0`` from ``U(+-1/sqrt(width))``, and ``head.{weight,bias}``."""
        params: Params = {}
        init_recurrence(params, self.row_size, self.width, self.cell, generator)
        init_affine(params, "head", (self.num_classes, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, num_classes]`` for inputs that reshape to ``[B, num_rows, row_size]``."""
        rows = inputs.reshape(inputs.shape[0], self.num_rows, self.row_size)
        return linear(params, "head", run_recurrence(params, rows, self.cell)[-1])


@dataclass(frozen=True, kw_only=True)
class RecurrentLanguageModel(Optimizee):
    """Token embeddings, one layer of ``nn.GRU``, a linear head.

    Args:
        vocab_size: number of tokens.
        width: hidden units, and channels of the embeddings.

    Example:
        >>> model = RecurrentLanguageModel(vocab_size=96, width=16)
        >>> params = model.init(torch.Generator().manual_seed(0))
        >>> model.predict(params, torch.zeros(3, 8, dtype=torch.int64)).shape
        torch.Size([3, 8, 96])
    """

    vocab_size: int
    width: int

    def init(self, generator: torch.Generator) -> Params:
        """Return ``token_embedding.weight``, ``rnn.{weight,bias}_{ih,hh}_l0`` and ``head.{weight,bias}``."""
        params = {"token_embedding.weight": normal((self.vocab_size, self.width), 1.0, generator)}  # as nn.Embedding
        init_recurrence(params, self.width, self.width, "gru", generator)
        init_affine(params, "head", (self.vocab_size, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return next-token logits ``[B, T, vocab_size]`` for int64 tokens ``[B, T]``."""
        hidden = run_recurrence(params, embed(params, "token_embedding", inputs), "gru")
        return linear(params, "head", torch.stack(hidden, 1))


def init_recurrence(params: Params, num_inputs: int, width: int, cell: Cell, generator: torch.Generator) -> None:
    """Add ``rnn.*`` with the names, shapes and initial values of one layer of ``torch.nn``."""
    rows = NUM_GATES[cell] * width
    bound = 1 / math.sqrt(width)
    params["rnn.weight_ih_l0"] = uniform((rows, num_inputs), bound, generator)
    params["rnn.weight_hh_l0"] = uniform((rows, width), bound, generator)
    params["rnn.bias_ih_l0"] = uniform((rows,), bound, generator)
    params["rnn.bias_hh_l0"] = uniform((rows,), bound, generator)


def run_recurrence(params: Params, inputs: Tensor, cell: Cell) -> list[Tensor]:
    """Return the hidden state ``[B, width]`` after each step of ``[B, T, num_inputs]``."""
    driven = matmul(inputs, params["rnn.weight_ih_l0"].T) + params["rnn.bias_ih_l0"]
    recurrent, bias = params["rnn.weight_hh_l0"].T, params["rnn.bias_hh_l0"]
    hidden = memory = torch.zeros_like(driven[:, 0, : recurrent.shape[0]])
    states = []
    for step in range(inputs.shape[1]):
        hidden, memory = _step(driven[:, step], hidden @ recurrent + bias, hidden, memory, cell)
        states.append(hidden)
    return states


def _step(driven: Tensor, recurrent: Tensor, hidden: Tensor, memory: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:
    """Advance hidden state and memory, given the parts of the gates ``[B, G]`` from input and past."""
    if cell == "gru":
        reset_x, update_x, new_x = driven.chunk(3, -1)
        reset_h, update_h, new_h = recurrent.chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return new + update * (hidden - new), memory
    enter, forget, new, leave = (driven + recurrent).chunk(4, -1)
    memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(memory), memory
