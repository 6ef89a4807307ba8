"""A low-rank ALiBi decoder for transformers, loaded with `trust_remote_code=True`; no other code is needed.

Pre-norm RMSNorm, SwiGLU, no biases. Each projection of attention is x @ down @ up. The cache holds what
`down` makes of the tokens, never keys or values, as one head: DynamicCache and StaticCache take it as it is. A step of
one token folds `up` into the query and the output and does not expand the cache.

Shapes: B batch, T query length, S key length, D model, H heads, K head width, R width of a latent.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple


class LowRankConfig(PreTrainedConfig):
    """`rank_q` to `rank_o` are the widths of the latents, 0 for dense projections; `mlp_rank` and `embed_rank` alike.

    With `shared_kv`, K and V have one latent; with `latent_norm`, those of Q, K and V are RMS-normalised.
    """

    model_type = "lowrank_alibi"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    rank_q: int = 32
    rank_k: int = 32
    rank_v: int = 96
    rank_o: int = 96
    shared_kv: bool = False
    latent_norm: bool = True
    mlp_rank: int = 0
    embed_rank: int = 0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048  # what it was trained to: ALiBi has no limit
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = 1  # what a cache sees
        super().__post_init__(**kwargs)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8(h+1)/n) for the n heads up to a power of two, then every second slope of 2n (arXiv 2108.12409)."""
    n = 1 << (heads.bit_length() - 1)
    return [2 ** (-8 * (h + 1) / n) for h in range(n)] + [2 ** (-4 * (2 * h + 1) / n) for h in range(heads - n)]


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.eps) * self.weight


class LowRankLinear(nn.Module):
    """x @ kernel, or x @ down @ up with a rank; without `has_down`, `up` for a latent that is made elsewhere."""

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

    def foldable(self) -> bool:
        """Whether `up` is a plain matrix: adapters and quantised weights are called, not read."""
        return self.rank > 0 and type(self.up) is nn.Linear


class LowRankAttention(nn.Module):
    def __init__(self, config: LowRankConfig, layer: int):
        super().__init__()
        c, d = config, config.hidden_size
        self.config, self.layer, self.H, self.K = config, layer, c.num_attention_heads, c.head_dim
        self.q, self.k = LowRankLinear(d, d, c.rank_q), LowRankLinear(d, d, c.rank_k)
        self.v = LowRankLinear(d, d, c.rank_v, has_down=not c.shared_kv)
        self.o = LowRankLinear(d, d, c.rank_o)

    def latent(self, x, linear: LowRankLinear):
        c = linear.reduce(x)
        return rms_norm(c, self.config.rms_norm_eps) if self.config.latent_norm and linear.rank else c

    def heads(self, c, linear: LowRankLinear):
        y = linear.expand(c)
        return y.view(*y.shape[:2], self.H, self.K).transpose(1, 2)

    def forward(self, x_BTD, bias, cache: Cache | None = None):
        k_BSR = self.latent(x_BTD, self.k)
        v_BSR = k_BSR[..., :0] if self.config.shared_kv else self.latent(x_BTD, self.v)  # nothing twice in the cache
        if cache is not None:
            k_BSR, v_BSR = (c.squeeze(1) for c in cache.update(k_BSR[:, None], v_BSR[:, None], self.layer))
        if self.config.shared_kv:
            v_BSR = k_BSR
        q_BHTK = self.heads(self.latent(x_BTD, self.q), self.q)
        if x_BTD.shape[1] == 1 and self.k.foldable() and self.v.foldable():
            o_BHTK = self.folded(q_BHTK, k_BSR, v_BSR, bias)
        else:
            k_BHSK, v_BHSK = self.heads(k_BSR, self.k), self.heads(v_BSR, self.v)
            o_BHTK = nn.functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias.to(q_BHTK.dtype))
        return self.o(o_BHTK.transpose(1, 2).reshape(x_BTD.shape))

    def folded(self, q_BHTK, k_BSR, v_BSR, bias):
        """q_h . (U_h c) = (q_h U_h) . c, and the same for the output: the heads work on the latents themselves."""
        B, H, T, K = q_BHTK.shape
        up_k_HKR, up_v_HKR = (linear.up.weight.view(H, K, -1) for linear in (self.k, self.v))
        q_BXR = (q_BHTK * K**-0.5 @ up_k_HKR).reshape(B, H * T, -1)
        scores_BHTS = (q_BXR @ k_BSR.mT).view(B, H, T, -1).float() + bias
        p_BXS = scores_BHTS.softmax(-1).to(q_BHTK.dtype).view(B, H * T, -1)
        return (p_BXS @ v_BSR).view(B, H, T, -1) @ up_v_HKR.mT


class LowRankMLP(nn.Module):
    def __init__(self, config: LowRankConfig):
        super().__init__()
        d, f, rank = config.hidden_size, config.intermediate_size, config.mlp_rank
        self.gate, self.up, self.out = LowRankLinear(d, f, rank), LowRankLinear(d, f, rank), LowRankLinear(f, d, rank)

    def forward(self, x):
        return self.out(nn.functional.silu(self.gate(x)) * self.up(x))


class LowRankBlock(GradientCheckpointingLayer):
    def __init__(self, config: LowRankConfig, layer: int):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm, self.attention = RMSNorm(d, eps), LowRankAttention(config, layer)
        self.mlp_norm, self.mlp = RMSNorm(d, eps), LowRankMLP(config)

    def forward(self, x, bias, cache: Cache | None = None):
        x = x + self.attention(self.attention_norm(x), bias, cache)
        return x + self.mlp(self.mlp_norm(x))


class LowRankPreTrainedModel(PreTrainedModel):
    config: LowRankConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LowRankBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True  # the others take no bias that differs by head
    _can_compile_fullgraph = True


class LowRankModel(LowRankPreTrainedModel):
    def __init__(self, config: LowRankConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_rank or config.hidden_size)
        if config.embed_rank:
            self.embed_up = nn.Linear(config.embed_rank, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(LowRankBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def alibi_bias(self, x_BTD, attention_mask, cache: Cache | None):
        """-m_h (i - j) as [1 or B, H, T, S], and the least number there is where nothing may be seen.

        Positions count along the row, padding included: a shift of all of them changes no difference.
        """
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            past_key_values=cache,
            allow_is_causal_skip=False,  # or it may be None
        )
        T, S = mask.shape[-2:]
        start = 0 if cache is None else cache.get_seq_length()
        here = x_BTD.device
        distance_TS = torch.arange(T, device=here)[:, None] + start - torch.arange(S, device=here)
        # Made anew each time: a buffer that is not saved would be lost on the meta device that models are built on.
        slopes_H11 = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=here)[:, None, None]
        hidden = ~mask if mask.dtype == torch.bool else mask < 0  # sdpa's is bool, eager's is added
        return (-slopes_H11 * distance_TS)[None].masked_fill(hidden, torch.finfo(x_BTD.dtype).min)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values: Cache | None = None,
        inputs_embeds=None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ):
        x_BTD = inputs_embeds
        if x_BTD is None:
            x_BTD = self.embed_tokens(input_ids)
            x_BTD = self.embed_up(x_BTD) if self.config.embed_rank else x_BTD
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and not self.training:
            past_key_values = DynamicCache(config=self.config)
        bias = self.alibi_bias(x_BTD, attention_mask, past_key_values)  # before a layer adds to the cache
        states = []
        for layer in self.layers:
            states.append(x_BTD)
            x_BTD = layer(x_BTD, bias, past_key_values)
        x_BTD = self.norm(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=(*states, x_BTD) if output_hidden_states or self.config.output_hidden_states else None,
        )


class LowRankForCausalLM(LowRankPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LowRankConfig):
        super().__init__(config)
        self.model = LowRankModel(config)
        if config.embed_rank and not config.tie_word_embeddings:
            self.lm_head_down = nn.Linear(config.hidden_size, config.embed_rank, bias=False)
        self.lm_head = nn.Linear(config.embed_rank or config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values: Cache | None = None,
        inputs_embeds=None,
        labels=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = out.last_hidden_state[:, kept]  # all of them for 0
        if self.config.embed_rank:
            x = x @ self.model.embed_up.weight if self.config.tie_word_embeddings else self.lm_head_down(x)
        logits = self.lm_head(x)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


LowRankConfig.register_for_auto_class()  # so that save_pretrained copies this file along
LowRankModel.register_for_auto_class("AutoModel")
LowRankForCausalLM.register_for_auto_class("AutoModelForCausalLM")
