"""Small transformers: a causal one for next-token prediction, and one between the patches of an image.

Legend: ``B`` sequences, ``T`` positions, ``H`` heads, ``D`` channels per head.

References: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Dosovitskiy et al., 2021,
https://arxiv.org/abs/2010.11929
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layers import ACTIVATIONS, embed, init_affine, init_norm, layer_norm, linear, matmul, normal, uniform
from ._optimizee import Optimizee, Params


@dataclass(frozen=True, kw_only=True)
class Transformer(Optimizee):
    """Token and position embeddings, pre-LN blocks of causal attention and GELU, an untied linear head.

    Names and shapes of a block are those of ``nn.TransformerEncoderLayer``; its feed-forward width is ``4 * width``.

    Args:
        vocab_size: number of tokens.
        width: channels; a multiple of ``num_heads``.
        num_heads: attention heads.
        num_layers: blocks.
        context_length: longest sequence.

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

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")

    def init(self, generator: torch.Generator) -> Params:
        """Return embeddings, of the scale of GPT-2's, ``layers.i.*`` blocks, ``norm`` and ``head``."""
        params = {
            "token_embedding.weight": normal((self.vocab_size, self.width), 0.02, generator),
            "position_embedding.weight": normal((self.context_length, self.width), 0.02, generator),
        }
        for index in range(self.num_layers):
            init_block(params, f"layers.{index}", self.width, generator)
        init_norm(params, "norm", self.width, generator)
        init_affine(params, "head", (self.vocab_size, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return next-token logits ``[B, T, vocab_size]`` for int64 tokens ``[B, T]``, ``T <= context_length``."""
        hidden = embed(params, "token_embedding", inputs)
        hidden = hidden + params["position_embedding.weight"][: inputs.shape[1]]
        for index in range(self.num_layers):
            hidden = apply_block(params, f"layers.{index}", hidden, self.num_heads, causal=True)
        return linear(params, "head", layer_norm(params, "norm", hidden))


@dataclass(frozen=True, kw_only=True)
class VisionTransformer(Optimizee):
    """Linear embedding of square patches, learned positions, pre-LN blocks, and a linear head on the mean.

    Args:
        image_size: height and width; a multiple of ``patch_size``.
        patch_size: height and width of a patch.
        width: channels; a multiple of ``num_heads``.
        num_heads: attention heads.
        num_layers: blocks.
        num_classes: number of outputs.

    Example:
        >>> model = VisionTransformer(image_size=8, patch_size=2, width=16, num_heads=2, num_layers=1)
        >>> model.predict(model.init(torch.Generator().manual_seed(0)), torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    image_size: int
    patch_size: int
    width: int
    num_heads: int
    num_layers: int
    num_classes: int = 10

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")

    def init(self, generator: torch.Generator) -> Params:
        """Return ``stem``, ``position_embedding``, ``layers.i.*`` blocks, ``norm`` and ``head``."""
        params: Params = {}
        init_affine(params, "stem", (self.width, self.patch_size**2), generator, "torch")
        num_patches = (self.image_size // self.patch_size) ** 2
        params["position_embedding.weight"] = normal((num_patches, self.width), 0.02, generator)
        for index in range(self.num_layers):
            init_block(params, f"layers.{index}", self.width, generator)
        init_norm(params, "norm", self.width, generator)
        init_affine(params, "head", (self.num_classes, self.width), generator, "torch")
        return params

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return ``[B, num_classes]`` for inputs that reshape to ``[B, image_size, image_size]``."""
        patch, side = self.patch_size, self.image_size // self.patch_size
        cut = inputs.reshape(inputs.shape[0], side, patch, side, patch).transpose(2, 3)
        hidden = linear(params, "stem", cut.reshape(inputs.shape[0], side**2, patch**2))
        hidden = hidden + params["position_embedding.weight"]
        for index in range(self.num_layers):
            hidden = apply_block(params, f"layers.{index}", hidden, self.num_heads, causal=False)
        return linear(params, "head", layer_norm(params, "norm", hidden).mean(1))


def init_block(params: Params, name: str, width: int, generator: torch.Generator) -> None:
    """Add a block with the names, shapes and initial values of ``nn.TransformerEncoderLayer``."""
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


def apply_block(params: Params, name: str, hidden: Tensor, num_heads: int, *, causal: bool) -> Tensor:
    """Add self-attention, then a feed-forward network, each of normalised inputs, to ``[B, T, width]``."""
    normalised = layer_norm(params, f"{name}.norm1", hidden)
    hidden = hidden + self_attention(params, f"{name}.self_attn", normalised, num_heads, causal=causal)
    expanded = linear(params, f"{name}.linear1", layer_norm(params, f"{name}.norm2", hidden))
    return hidden + linear(params, f"{name}.linear2", ACTIVATIONS["gelu"](expanded))


def self_attention(params: Params, name: str, hidden: Tensor, num_heads: int, *, causal: bool) -> Tensor:
    """Return multi-head self-attention of ``[B, T, width]``, to the past alone if ``causal``."""
    batch, length, width = hidden.shape
    projected = matmul(hidden, params[f"{name}.in_proj_weight"].T) + params[f"{name}.in_proj_bias"]
    query, key, value = projected.reshape(batch, length, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
    attended = attention(query, key, value, causal=causal)
    return linear(params, f"{name}.out_proj", attended.transpose(1, 2).reshape(batch, length, width))


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Return ``softmax(Q K^T / sqrt(D), masked to the past if causal) V`` for ``[B, H, T, D]``."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if causal:
        position = torch.arange(query.shape[-2], device=query.device)
        scores = scores.masked_fill(position.unsqueeze(1) < position, -torch.inf)
    return torch.softmax(scores, -1) @ value
