"""A low-rank ALiBi language model in plain PyTorch. It needs config.json and model.safetensors from the same folder.

    net = LowRank.load(folder)
    logits_BTV, past = net(ids_BT)                # a prompt
    logits_B1V, past = net(next_ids_B1, past)     # one more token

Pre-norm RMSNorm, SwiGLU, no biases. Each projection of attention is x @ down @ up. `past` is the cache. It holds the
latents, x @ down, of K and V in each layer, or the one latent that they share, and never keys or values. A step of one
token folds `up` into the query and the output instead of expanding the cache.

Shapes: B batch, T query length, S key length, D model, H heads, K head width, R width of a latent.
"""

import json
import os
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

Past = list[list[torch.Tensor]]  # per layer [k, v], or [k] where they share a latent; each is [B, 1, S, R]


def alibi(heads: int, queries_T: torch.Tensor, keys_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances i - j [T, S] of positions, and the bias -m_h (i - j) [1, H, T, S].

    m_h is 2^(-8(h+1)/n) for the n heads up to a power of two, then every second slope of 2n (arXiv 2108.12409).
    Positions count along the row, padding included: a shift of all positions changes no difference.
    """
    n = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / n) for h in range(n)] + [2 ** (-4 * (2 * h + 1) / n) for h in range(heads - n)]
    distance_TS = queries_T[:, None] - keys_S
    return distance_TS, (-torch.tensor(slopes, device=keys_S.device)[:, None, None] * distance_TS)[None]


class Linear(nn.Module):
    """x @ kernel, or with a rank x @ down @ up; without `has_down` the latent comes from another layer."""

    def __init__(self, d_in: int, d_out: int, rank: int, has_down: bool = True):
        super().__init__()
        self.rank = rank
        if not rank:
            self.kernel = nn.Linear(d_in, d_out, bias=False)
            return
        if has_down:
            self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)

    def reduce(self, x):
        return self.down(x) if self.rank else self.kernel(x)

    def expand(self, c):
        return self.up(c) if self.rank else c

    def forward(self, x):
        return self.expand(self.reduce(x))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.hidden_size
        self.c, self.H, self.K, self.fold = c, c.num_attention_heads, d // c.num_attention_heads, None
        self.q, self.k, self.o = Linear(d, d, c.rank_q), Linear(d, d, c.rank_k), Linear(d, d, c.rank_o)
        self.v = Linear(d, d, c.rank_v, has_down=not c.shared_kv)

    def forward(self, x_BTD, bias_BHTS, past):
        new = [self.latent(x_BTD, linear)[:, None] for linear in ((self.k,) if self.c.shared_kv else (self.k, self.v))]
        past = new if past is None else [torch.cat(both, 2) for both in zip(past, new)]
        k_BSR, v_BSR = past[0][:, 0], past[-1][:, 0]
        q_BHTK = self.heads(self.latent(x_BTD, self.q), self.q) * self.K**-0.5
        fold = x_BTD.shape[1] == 1 if self.fold is None else self.fold
        if fold and self.k.rank:
            o_BHTK = self.folded(q_BHTK, k_BSR, v_BSR, bias_BHTS)
        else:
            scores_BHTS = (q_BHTK @ self.heads(k_BSR, self.k).mT).float() + bias_BHTS
            o_BHTK = scores_BHTS.softmax(-1).to(x_BTD.dtype) @ self.heads(v_BSR, self.v)
        return self.o(o_BHTK.transpose(1, 2).reshape(x_BTD.shape)), past

    def latent(self, x, linear):
        c = linear.reduce(x)
        return F.rms_norm(c, c.shape[-1:], eps=self.c.rms_norm_eps) if self.c.latent_norm and linear.rank else c

    def heads(self, c, linear):
        return linear.expand(c).unflatten(-1, (self.H, self.K)).transpose(1, 2)

    def factor(self, linear, x):
        return linear.up.weight

    def folded(self, q_BHTK, k_BSR, v_BSR, bias_BHTS):
        """Attend to the latents themselves: q_h . (U_h c) = (q_h U_h) . c, and likewise for the output.

        All heads are in one product, [B, H T, R] with [B, R, S]: torch would copy the latents for each head.
        """
        B, H, T, K = q_BHTK.shape
        up_k_HKR, up_v_HKR = (self.factor(linear, q_BHTK).view(H, K, -1) for linear in (self.k, self.v))
        scores_BXS = (q_BHTK @ up_k_HKR).reshape(B, H * T, -1) @ k_BSR.mT
        scores_BHTS = scores_BXS.view(B, H, T, -1).float() + bias_BHTS
        p_BXS = scores_BHTS.softmax(-1).to(q_BHTK.dtype).view(B, H * T, -1)
        return (p_BXS @ v_BSR).view(B, H, T, -1) @ up_v_HKR.mT


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, f, rank = c.hidden_size, c.intermediate_size, c.mlp_rank
        self.gate, self.up, self.out = Linear(d, f, rank), Linear(d, f, rank), Linear(f, d, rank)

    def forward(self, x):
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c, attention: Attention):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(c.hidden_size, c.rms_norm_eps), attention
        self.mlp_norm, self.mlp = nn.RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(self, x, bias, past):
        out, past = self.attention(self.attention_norm(x), bias, past)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), past


class LowRank(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.c = c = SimpleNamespace(**config)
        width = c.embed_rank or c.hidden_size
        self.embed_tokens = nn.Embedding(c.vocab_size, width)
        self.layers = nn.ModuleList(Block(c, Attention(c)) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        if c.embed_rank:
            self.embed_up = nn.Linear(width, c.hidden_size, bias=False)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(width, c.vocab_size, bias=False)
            if c.embed_rank:
                self.lm_head_down = nn.Linear(c.hidden_size, width, bias=False)

    @classmethod
    def load(cls, folder: str) -> "LowRank":
        from safetensors.torch import load_file

        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
        with torch.device("meta"):  # draws no weights, as those in the file replace them
            net = cls(config)
        net.load_state_dict(load_file(os.path.join(folder, "model.safetensors")), assign=True)
        return net.eval()

    def forward(self, ids_BT, past: Past | None = None, mask_BS=None) -> tuple[torch.Tensor, Past]:
        """Return logits [B, T, V] of T new tokens after those of `past`, and the past that includes them.

        Pad rows of different lengths on the left. `mask_BS` is then 0 at padding; it covers `past` and the new tokens.
        """
        x_BTD = self.embed_tokens(ids_BT)
        x_BTD = self.embed_up(x_BTD) if self.c.embed_rank else x_BTD
        before = 0 if past is None else past[0][0].shape[2]
        bias, present = self.bias(ids_BT.shape[1], before, mask_BS, x_BTD.device), []
        for i, layer in enumerate(self.layers):
            x_BTD, latents = layer(x_BTD, bias, None if past is None else past[i])
            present.append(latents)
        return self.logits(self.norm(x_BTD)), present

    def bias(self, T, before, mask_BS, device):
        """Return the bias [1 or B, H, T, S], with -1e30 at hidden positions."""
        query_T, key_S = torch.arange(T, device=device) + before, torch.arange(T + before, device=device)
        distance_TS, bias = alibi(self.c.num_attention_heads, query_T, key_S)
        hidden = (distance_TS < 0)[None, None]
        if mask_BS is not None:
            hidden = hidden | (mask_BS == 0)[:, None, None]
        return bias.masked_fill(hidden, -1e30)

    def logits(self, x):
        if self.c.tie_word_embeddings:
            x = x @ self.embed_up.weight if self.c.embed_rank else x
            return F.linear(x, self.embed_tokens.weight)
        return self.lm_head(self.lm_head_down(x) if self.c.embed_rank else x)

    @torch.no_grad()
    def generate(self, ids: list[int], count: int, temperature: float = 0.0) -> list[int]:
        """Return at most `count` ids that follow `ids`, up to an end; the likeliest ones where `temperature` is 0."""
        ends, new, past = self.c.eos_token_id, [], None
        ends = ends if isinstance(ends, list) else [ends]
        unread = torch.tensor([ids], device=self.embed_tokens.weight.device)
        while len(new) < count and not (new and new[-1] in ends):
            logits, past = self(unread, past)
            last_V = logits[0, -1].float()
            drawn = torch.multinomial((last_V / temperature).softmax(-1), 1) if temperature else last_V.argmax()[None]
            unread = drawn[None]
            new.append(drawn.item())
        return new
