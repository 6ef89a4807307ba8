"""A low-rank ALiBi decoder for transformers, loaded with `trust_remote_code=True`. Its layers are those of lowrank.py.

The cache holds latents, never keys or values, as one head: DynamicCache and StaticCache take them as they are.
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

from .lowrank import Attention, Block, alibi


class LowRankConfig(PreTrainedConfig):
    """Sizes of the network. `rank_q` to `rank_o`, `mlp_rank` and `embed_rank` are 0 for dense matrices.

    With `shared_kv`, K and V share one latent; with `latent_norm`, the latents of Q, K and V are RMS-normalised.
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
    max_position_embeddings: int = 2048  # the longest in training: ALiBi has no limit
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = 1  # for the cache
        super().__post_init__(**kwargs)


class LowRankAttention(Attention):
    """The attention of lowrank.py over a cache of transformers; the suffixes of shapes are the same."""

    def __init__(self, config: LowRankConfig, layer: int):
        super().__init__(config)
        self.layer = layer

    def forward(self, x_BTD, bias, cache: Cache | None = None):
        k_BSR = self.latent(x_BTD, self.k)
        v_BSR = k_BSR[..., :0] if self.c.shared_kv else self.latent(x_BTD, self.v)  # the cache holds nothing twice
        if cache is not None:
            k_BSR, v_BSR = (c.squeeze(1) for c in cache.update(k_BSR[:, None], v_BSR[:, None], self.layer))
        v_BSR = k_BSR if self.c.shared_kv else v_BSR
        q_BHTK = self.heads(self.latent(x_BTD, self.q), self.q)
        # `up` must be a plain matrix: adapters and quantised weights can be called, but not read.
        can_fold = all(linear.rank > 0 and type(linear.up) is nn.Linear for linear in (self.k, self.v))
        if x_BTD.shape[1] == 1 and can_fold:
            o_BHTK = self.folded(q_BHTK * self.K**-0.5, k_BSR, v_BSR, bias)
        else:
            k_BHSK, v_BHSK = self.heads(k_BSR, self.k), self.heads(v_BSR, self.v)
            o_BHTK = nn.functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias.to(q_BHTK.dtype))
        return self.o(o_BHTK.transpose(1, 2).reshape(x_BTD.shape)), cache


class LowRankBlock(GradientCheckpointingLayer, Block):
    """The block of lowrank.py, for gradient checkpointing."""


class LowRankPreTrainedModel(PreTrainedModel):
    config: LowRankConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LowRankBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True  # no other backend takes a bias per head
    _can_compile_fullgraph = True


class LowRankModel(LowRankPreTrainedModel):
    def __init__(self, config: LowRankConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_rank or config.hidden_size)
        if config.embed_rank:
            self.embed_up = nn.Linear(config.embed_rank, config.hidden_size, bias=False)
        blocks = [LowRankBlock(config, LowRankAttention(config, i)) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def alibi_bias(self, x_BTD, attention_mask, cache: Cache | None):
        """Return the bias [1 or B, H, T, S], with the lowest number of the type at hidden positions."""
        inputs = {"inputs_embeds": x_BTD, "attention_mask": attention_mask, "past_key_values": cache}
        mask = create_causal_mask(config=self.config, allow_is_causal_skip=False, **inputs)  # a skip would return None
        T, S = mask.shape[-2:]
        device, start = x_BTD.device, 0 if cache is None else cache.get_seq_length()
        # Computed in every call: transformers builds models on the meta device, where an unsaved buffer would be lost.
        queries_T, keys_S = torch.arange(T, device=device) + start, torch.arange(S, device=device)
        _, bias = alibi(self.config.num_attention_heads, queries_T, keys_S)
        hidden = ~mask if mask.dtype == torch.bool else mask < 0  # the mask of sdpa is bool, that of eager is added
        return bias.masked_fill(hidden, torch.finfo(x_BTD.dtype).min)

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
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not self.training:
            past_key_values = DynamicCache(config=self.config)
        bias = self.alibi_bias(x_BTD, attention_mask, past_key_values)  # before a layer adds to the cache
        states = []
        for layer in self.layers:
            states.append(x_BTD)
            x_BTD, _ = layer(x_BTD, bias, past_key_values)
        x_BTD = self.norm(x_BTD)
        states = (*states, x_BTD) if output_hidden_states or self.config.output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x_BTD, past_key_values=past_key_values, hidden_states=states)


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
        # 0 keeps all positions.
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x, past = out.last_hidden_state[:, positions], out.past_key_values
        if self.config.embed_rank:
            x = x @ self.model.embed_up.weight if self.config.tie_word_embeddings else self.lm_head_down(x)
        logits = self.lm_head(x)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past, hidden_states=out.hidden_states)


LowRankConfig.register_for_auto_class()  # so that save_pretrained copies the code, too
LowRankModel.register_for_auto_class("AutoModel")
LowRankForCausalLM.register_for_auto_class("AutoModelForCausalLM")
