"""A small causal transformer for next-token prediction.

Legend: ``B`` sequences, ``T`` positions, ``H`` heads, ``D`` channels per head.

Reference: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layers import ACTIVATIONS, init_affine, init_norm, layer_norm, linear, matmul, normal, one_hot, uniform
from ._task import Optimizee, Params


@dataclass(frozen=True, kw_only=True)
class Transformer(Optimizee):
    """Token and position embeddings, causal self-attention blocks with GELU, an untied linear head.

    Names and shapes of a block are those of ``nn.TransformerEncoderLayer``; its feed-forward width is ``4 * width``.

    Args:
        vocab_size: number of tokens.
        width: channels; a multiple of ``num_heads``.
        num_heads: attention heads.
        num_layers: blocks.
        context_length: longest sequence, and the length that text tasks draw.
        norm_first: normalise the input of each branch and once before the head, rather than after each residual sum.
        embedding_std: standard deviation of the initial embeddings; 0.02 as in GPT-2, 1 as in ``nn.Embedding``.

    Example:
        >>> model = Transformer(vocab_size=96, width=16, num_heads=2, num_layers=1, context_length=8)
        >>> params = model.init(torch.Generator().manual_seed(0))
        >>> model.predict(params, torch.zeros(3, 8, dtype=torch.int64)).shape
        torch.Size([3, 8, 96])
    """

    vocab_size: int
    width: int
    num_heads: int
    num_layers: int
    context_length: int
    norm_first: bool = True
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")

    def init(self, generator: torch.Generator) -> Params:
        """Return embeddings, ``layers.i.*`` blocks, ``norm`` with ``norm_first``, and ``head``."""
        width = self.width
        params = {
            "token_embedding.weight": normal((self.vocab_size, width), self.embedding_std, generator),
            "position_embedding.weight": normal((self.context_length, width), self.embedding_std, generator),
        }
        for index in range(self.num_layers):
            name = f"layers.{index}"
            # Xavier for the stacked projection and zero biases, as nn.MultiheadAttention does.
            bound = math.sqrt(6 / (3 * width + width))
            params[f"{name}.self_attn.in_proj_weight"] = uniform((3 * width, width), bound, generator)
            params[f"{name}.self_attn.in_proj_bias"] = torch.zeros(3 * width, device=generator.device)
            init_affine(params, f"{name}.self_attn.out_proj", (width, width), generator, "torch")
            params[f"{name}.self_attn.out_proj.bias"].zero_()
            init_affine(params, f"{name}.linear1", (4 * width, width), generator, "torch")
            init_affine(params, f"{name}.linear2", (width, 4 * width), generator, "torch")
            init_norm(params, f"{name}.norm1", width, generator)
            init_norm(params, f"{name}.norm2", width, generator)
        if self.norm_first:
            init_norm(params, "norm", width, generator)
        init_affine(params, "head", (self.vocab_size, width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return next-token logits ``[B, T, vocab_size]`` for int64 tokens ``[B, T]``, ``T <= context_length``."""
        tokens = params["token_embedding.weight"]
        # A product with one-hot vectors: the backward pass of an embedding lookup is a scatter, slow under vmap.
        hidden = matmul(one_hot(inputs, self.vocab_size, tokens.dtype), tokens)
        hidden = hidden + params["position_embedding.weight"][: inputs.shape[1]]
        for index in range(self.num_layers):
            hidden = self._block(params, f"layers.{index}", hidden)
        if self.norm_first:
            hidden = layer_norm(params, "norm", hidden)
        return linear(params, "head", hidden)

    def _block(self, params: Params, name: str, hidden: Tensor) -> Tensor:
        if self.norm_first:
            hidden = hidden + self._attention(params, f"{name}.self_attn", layer_norm(params, f"{name}.norm1", hidden))
            return hidden + _feed_forward(params, name, layer_norm(params, f"{name}.norm2", hidden))
        hidden = layer_norm(params, f"{name}.norm1", hidden + self._attention(params, f"{name}.self_attn", hidden))
        return layer_norm(params, f"{name}.norm2", hidden + _feed_forward(params, name, hidden))

    def _attention(self, params: Params, name: str, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.num_heads
        projected = matmul(hidden, params[f"{name}.in_proj_weight"].T) + params[f"{name}.in_proj_bias"]
        query, key, value = projected.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        return linear(
            params,
            f"{name}.out_proj",
            causal_attention(query, key, value).transpose(1, 2).reshape(batch, length, width),
        )


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return ``softmax(Q K^T / sqrt(D), masked to the past) V`` for ``[B, H, T, D]``."""
    length = query.shape[-2]
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    position = torch.arange(length, device=query.device)
    visible = position.unsqueeze(1) >= position
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1) @ value


def _feed_forward(params: Params, name: str, hidden: Tensor) -> Tensor:
    return linear(params, f"{name}.linear2", ACTIVATIONS["gelu"](linear(params, f"{name}.linear1", hidden)))
