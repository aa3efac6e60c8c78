"""Small networks as functions of a dict of weights; features come first, ``[features, n]``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._rule import State, Weights


def init_linear(
    name: str,
    num_inputs: int,
    num_outputs: int,
    generator: torch.Generator | None,
    *,
    scale: float = 1.0,
    bias: float = 0.0,
    zero: bool = False,
) -> Weights:
    """Return weight ``[num_outputs, num_inputs]``, normal with std ``scale / sqrt(num_inputs)`` or zero, and a bias."""
    weight = torch.randn(num_outputs, num_inputs, generator=generator) / num_inputs**0.5
    weight = torch.zeros_like(weight) if zero else weight * scale
    return {f"{name}.weight": weight, f"{name}.bias": torch.full((num_outputs,), bias)}


def linear(weights: Weights, name: str, x_Fn: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return ``weight @ x + bias``, ``[outputs, n]``, with ``shift`` ``[outputs, 1 or n]`` added to the bias."""
    bias = weights[f"{name}.bias"][:, None]
    return weights[f"{name}.weight"] @ x_Fn + (bias if shift is None else bias + shift)


def truncated_normal(*shape: int, std: float, generator: torch.Generator | None) -> Tensor:
    """Return normal numbers of a standard deviation ``std`` before those beyond two of it are excluded."""
    uniform = 2 * torch.rand(*shape, generator=generator) - 1
    return torch.erfinv(math.erf(2**0.5) * uniform) * (2**0.5 * std)


def init_lstm(name: str, num_inputs: int, hidden: int, generator: torch.Generator | None) -> Weights:
    """Return what :func:`lstm` reads: truncated normals with variance ``1 / (num_inputs + hidden)``, forget bias 1."""
    std = (num_inputs + hidden) ** -0.5
    forget = torch.arange(4 * hidden).div(hidden, rounding_mode="floor") == 1
    return {
        f"{name}.weight": truncated_normal(4 * hidden, num_inputs + hidden, std=std, generator=generator),
        f"{name}.bias": truncated_normal(4 * hidden, std=std, generator=generator) + forget,
    }


def lstm(weights: Weights, name: str, x_Fn: Tensor, hidden_Hn: Tensor, cell_Hn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden and cell state of an LSTM.

    The rows of ``weight`` ``[4 hidden, inputs + hidden]`` are the gates input, forget, candidate, output, as in
    ``torch.nn.LSTMCell``; whatever is added to the forget gate is part of the bias.
    """
    input_, forget, candidate, output = linear(weights, name, torch.cat([x_Fn, hidden_Hn])).chunk(4)
    cell_Hn = forget.sigmoid() * cell_Hn + input_.sigmoid() * candidate.tanh()
    return output.sigmoid() * cell_Hn.tanh(), cell_Hn


def lstm_state_keys(num_layers: int) -> frozenset[str]:
    """Return the keys of :func:`init_lstm_state`."""
    return frozenset(f"{kind}_{layer}" for layer in range(num_layers) for kind in ("hidden", "cell"))


def init_lstm_state(param: Tensor, num_layers: int, hidden: int) -> State:
    """Return zero states ``hidden_0, cell_0, hidden_1, ...``, ``[*param.shape, hidden]`` each."""
    zeros = torch.zeros_like(param).unsqueeze(-1).repeat(*(1,) * param.dim(), hidden)
    return {f"{kind}_{layer}": zeros.clone() for layer in range(num_layers) for kind in ("hidden", "cell")}


def stacked_lstm(weights: Weights, state: State, x_Fn: Tensor, num_layers: int) -> tuple[State, Tensor]:
    """Advance the layers ``lstm_0, lstm_1, ...``; return their states ``[n, hidden]`` and the last output."""
    new: State = {}
    for layer in range(num_layers):
        hidden_Hn, cell_Hn = state[f"hidden_{layer}"].mT, state[f"cell_{layer}"].mT
        x_Fn, cell_Hn = lstm(weights, f"lstm_{layer}", x_Fn, hidden_Hn, cell_Hn)
        new |= {f"hidden_{layer}": x_Fn.mT, f"cell_{layer}": cell_Hn.mT}
    return new, x_Fn


def init_gru(name: str, num_inputs: int, hidden: int, generator: torch.Generator | None) -> Weights:
    """Return what :func:`gru` reads, with the gates open: a new cell forgets slowly."""
    wide = num_inputs + hidden
    return {
        **init_linear(f"{name}.gates", wide, 2 * hidden, generator, scale=0.5, bias=2.2),
        **init_linear(f"{name}.candidate", wide, hidden, generator, scale=0.5),
    }


def gru(weights: Weights, name: str, x_Fn: Tensor, hidden_Hn: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return the next state of a GRU that resets before the candidate's product.

    ``shift`` ``[3 hidden, 1 or n]`` is added to the biases of reset gate, update gate and candidate.  Not
    ``torch.nn.GRUCell``, which resets after the product.
    """
    size = len(hidden_Hn)
    of_gates, of_candidate = (None, None) if shift is None else shift.split([2 * size, size])
    gates = linear(weights, f"{name}.gates", torch.cat([x_Fn, hidden_Hn]), of_gates)
    reset, update = gates.sigmoid().chunk(2)
    candidate = linear(weights, f"{name}.candidate", torch.cat([x_Fn, reset * hidden_Hn]), of_candidate).tanh()
    return update * hidden_Hn + (1 - update) * candidate
