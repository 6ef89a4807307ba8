"""The peer of train.py and device/peers.py: a dense GPT with ALiBi as one would write it in PyTorch.

It has RMSNorm, SwiGLU and a tied head. Weights are fp32; activations have the `dtype` of the model, to which each
layer casts its weights, as in our step. ALiBi is the mask of scaled_dot_product_attention (`sdpa`, `alibi_mask`), or a
score_mod of FlexAttention beside a block mask of the causal order and of documents (`flex`, `document_mask`).
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lowrank_jax.model.attention import alibi_slopes


def alibi_mask(heads: int, segments_BT: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Return the bias [B, H, T, T] with -inf where a query sees no key; B is 1 if no row has a second document.

    Of three dimensions, PyTorch's fast kernels refuse a mask. On a CPU the flash kernel takes one of four. On a GPU
    flash takes none; cuDNN's kernel comes first on a Hopper from cuDNN 9.15 on, else the memory-efficient one
    (sdp_utils.cpp of PyTorch).
    """
    positions = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    slopes = torch.from_numpy(alibi_slopes(heads)).to(segments_BT.device)
    distance = positions[:, None] - positions
    is_one = bool((segments_BT == segments_BT[:, :1]).all())
    visible = distance >= 0 if is_one else (distance >= 0) & (segments_BT[:, :, None] == segments_BT[:, None])
    bias = torch.where(visible.reshape(-1, 1, *distance.shape), -slopes[:, None, None] * distance, float("-inf"))
    return bias.to(dtype)


def document_mask(segments_BT: torch.Tensor):
    """Return FlexAttention's block mask of causal attention inside documents."""
    visible = lambda b, h, i, j: (i >= j) & (segments_BT[b, i] == segments_BT[b, j])
    B, T = segments_BT.shape
    return create_block_mask(visible, B, None, T, T, segments_BT.device.type)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(heads: int, device: str) -> Callable:
    """Return attention [B, H, T, K] with ALiBi for a mask of `document_mask`; it must be compiled to be fast."""
    slopes = torch.from_numpy(alibi_slopes(heads)).to(device)
    return functools.partial(_flex, lambda score, b, h, i, j: score - slopes[h] * (i - j))


def _flex(score_mod: Callable, q, k, v, mask):
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask)


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, c, attend: Callable, naive_rank: int):
        super().__init__()
        linear = lambda d_in, d_out: Linear(d_in, d_out, bias=False)
        factors = [linear(c.d, naive_rank), linear(naive_rank, c.d)] if naive_rank else []
        self.heads, self.attend = c.heads, attend
        self.norms = nn.ModuleList([Norm(c.d, eps=1e-6) for _ in range(2)])
        self.qkvo = nn.ModuleList([nn.Sequential(linear(c.d, c.d), *factors) for _ in range(4)])
        self.gate, self.up, self.out = linear(c.d, c.hidden), linear(c.d, c.hidden), linear(c.hidden, c.d)

    def forward(self, x, mask):
        h, (B, T, _) = self.norms[0](x), x.shape
        q, k, v = (w(h).view(B, T, self.heads, -1).transpose(1, 2) for w in self.qkvo[:3])
        x = x + self.qkvo[3](self.attend(q, k, v, mask).transpose(1, 2).reshape(x.shape))
        h = self.norms[1](x)
        return x + self.out(F.silu(self.gate(h)) * self.up(h))


class GPT(nn.Module):
    """`naive_rank` puts factors of that rank behind full projections, as is often seen; 0: none."""

    def __init__(self, c, attend: Callable = sdpa, dtype=torch.float32, naive_rank: int = 0):
        super().__init__()
        self.dtype, self.table = dtype, nn.Embedding(c.vocab, c.d)
        nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(c, attend, naive_rank) for _ in range(c.layers)])
        self.norm = Norm(c.d, eps=1e-6)

    def features(self, tokens, mask):
        """Return the normalised last hidden states [B, T, D]."""
        x = self.table(tokens).to(self.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, tokens, mask, targets):
        """Return the mean cross-entropy."""
        return cross_entropy(self.table.weight, self.features(tokens, mask), targets)


def cross_entropy(table, x, targets):
    logits = x.flatten(0, 1) @ table.to(x.dtype).T
    return F.cross_entropy(logits.float(), targets.flatten())
