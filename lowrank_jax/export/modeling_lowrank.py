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
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .lowrank import Attention, Block, alibi

logger = logging.get_logger(__name__)
IGNORED = -100  # the label that counts in no loss


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


def matrix(linear, width: int, like):
    """Return a layer's matrix [out, width]; `linear` may be adapted, quantised or offloaded, and `like` has the type.

    Only a call applies what such layers hold beside their weights, or loads weights that are elsewhere between calls.
    """
    w = getattr(linear, "weight", None)
    if type(linear) is nn.Linear and type(w) is nn.Parameter and w.shape[-1:] == (width,) and not w.is_meta:
        return w
    return linear(torch.eye(width, dtype=like.dtype, device=like.device)).mT


def visible(mask):
    """Return where a mask of four dimensions lets a query see: that of sdpa is bool, that of eager is added."""
    return mask if mask.dtype == torch.bool else mask >= 0


def queries_seen(attention_mask, cache: Cache | None, T: int):
    """Return which of T new tokens are no padding [1 or B, T]; with a 4-D mask, which see anything; None for all."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 4:
        return visible(attention_mask).any(-1).any(1)
    start = 0 if cache is None or attention_mask.shape[1] == T else cache.get_seq_length()
    return attention_mask[:, torch.arange(T, device=attention_mask.device) + start].bool()


def documents(shape, seen_BT, position_ids=None, cu_seq_lens_q=None, seq_idx=None, **_):
    """Return the numbers [B, T] of documents that are packed into rows of this shape, or None where none is packed.

    A document starts where `cu_seq_lens_q` or `seq_idx` says so, or where `position_ids` of tokens that are no padding
    go on by neither 1 nor the distance in the row.
    """
    B, T = shape
    if cu_seq_lens_q is not None:
        ends, index = cu_seq_lens_q[1:], torch.arange(B * T, device=cu_seq_lens_q.device)
        if not torch.compiler.is_compiling() and ends[-1] != B * T:
            raise ValueError(f"cu_seq_lens_q ends at {ends[-1]}, but the batch has {B} x {T} tokens")
        numbers_BT = torch.bucketize(index, ends, right=True).view(B, T)
    elif seq_idx is not None:
        numbers_BT = seq_idx.expand(B, T)
    elif position_ids is not None and T > 1:
        position_BT, index_T = position_ids.expand(B, T), torch.arange(T, device=position_ids.device)
        seen_BT = torch.ones_like(position_BT, dtype=torch.bool) if seen_BT is None else seen_BT.expand(B, T)
        before_BT = torch.where(seen_BT, index_T, -1).cummax(-1).values[:, :-1]  # the last one that is no padding
        step_BT = position_BT[:, 1:] - position_BT.gather(1, before_BT.clamp(min=0))
        goes_on = (step_BT == 1) | (step_BT == index_T[1:] - before_BT) | (before_BT < 0) | ~seen_BT[:, 1:]
        numbers_BT = nn.functional.pad((~goes_on).cumsum(-1), (1, 0))
    else:
        return None
    is_packed = torch.compiler.is_compiling() or (numbers_BT != numbers_BT[:, :1]).any()
    return numbers_BT if is_packed else None


def rows_of(shape, attention_mask, position_ids, cache: Cache | None, kwargs: dict):
    """Return `queries_seen` and `documents`; a 4-D mask says alone who sees whom."""
    seen_BT = queries_seen(attention_mask, cache, shape[1])
    is_4d = attention_mask is not None and attention_mask.ndim == 4
    return seen_BT, documents(shape, seen_BT, None if is_4d else position_ids, **kwargs)


def predicts_next(shape, seen_BT, numbers_BT):
    """Return which queries [B, T] may learn the next token: not padding, and no last token of a packed document."""
    predicts_BT = torch.ones(shape, dtype=torch.bool) if seen_BT is None else seen_BT.expand(shape).clone()
    if numbers_BT is not None:
        is_same = numbers_BT[:, 1:] == numbers_BT[:, :-1]
        predicts_BT = predicts_BT.to(is_same.device) & nn.functional.pad(is_same, (0, 1), value=True)
    return predicts_BT


def refuse_foreign_cache(c: LowRankConfig, cache: Cache | None):
    """Raise ValueError for a cache that holds no latents, such as that of prefix tuning."""
    for layer in getattr(cache, "layers", ())[:1]:
        tensors = getattr(layer, "keys", None), getattr(layer, "values", None)
        if tensors[0] is not None and tensors[0].ndim == 4:
            widths = [x.shape[-1] for x in tensors]
            latents = [c.rank_k or c.hidden_size, 0 if c.shared_kv else c.rank_v or c.hidden_size]
            if widths != latents:
                reason = f"the cache has {widths} numbers per token, but the latents of this model have {latents}"
                raise ValueError(f"{reason}: prefix tuning is impossible, use LoRA or prompt tuning")


class LowRankAttention(Attention):
    """The attention of lowrank.py over a cache of transformers; the suffixes of shapes are the same.

    Returns the output, and in eager the weights [B, H, T, S].
    """

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
        is_eager, weights_BHTS = self.c._attn_implementation == "eager", None
        if x_BTD.shape[1] == 1 and self.k.rank and self.v.rank and not is_eager:
            o_BHTK = self.folded(q_BHTK * self.K**-0.5, k_BSR, v_BSR, bias)
            return self.o(o_BHTK.transpose(1, 2).reshape(x_BTD.shape)), None
        k_BHSK, v_BHSK = self.heads(k_BSR, self.k), self.heads(v_BSR, self.v)
        if is_eager:
            scores_BHTS = (q_BHTK * self.K**-0.5 @ k_BHSK.mT).float() + bias
            weights_BHTS = scores_BHTS.softmax(-1).to(q_BHTK.dtype)
            o_BHTK = weights_BHTS @ v_BHSK
        else:
            o_BHTK = nn.functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias.to(q_BHTK.dtype))
        return self.o(o_BHTK.transpose(1, 2).reshape(x_BTD.shape)), weights_BHTS

    def factor(self, linear, x):
        return matrix(linear.up, linear.rank, x)


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

    def alibi_bias(self, x_BTD, attention_mask, cache: Cache | None, numbers_BT=None):
        """Return the bias [1 or B, H, T, S], with the lowest number of the type at hidden positions.

        Without a cache, tokens with other `numbers_BT` are hidden: they belong to other documents.
        """
        inputs = {"inputs_embeds": x_BTD, "attention_mask": attention_mask, "past_key_values": cache}
        mask = create_causal_mask(config=self.config, allow_is_causal_skip=False, **inputs)  # a skip would return None
        T, S = mask.shape[-2:]
        device, start = x_BTD.device, 0 if cache is None else cache.get_seq_length()
        # Computed in every call: transformers builds models on the meta device, where an unsaved buffer would be lost.
        queries_T, keys_S = torch.arange(T, device=device) + start, torch.arange(S, device=device)
        _, bias = alibi(self.config.num_attention_heads, queries_T, keys_S)
        hidden = ~visible(mask)
        if numbers_BT is not None and cache is None:
            hidden = hidden | (numbers_BT[:, None, :, None] != numbers_BT[:, None, None])
        return bias.masked_fill(hidden, torch.finfo(x_BTD.dtype).min)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values: Cache | None = None,
        inputs_embeds=None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """Run the layers. ALiBi counts positions along the row: `position_ids` only tell packed documents apart."""
        c, output_attentions = self.config, kwargs.get("output_attentions")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if c.embed_rank and x_BTD.shape[-1] == c.embed_rank:  # as `get_input_embeddings` gives them
            x_BTD = self.embed_up(x_BTD)
        seen_BT, numbers_BT = rows_of(x_BTD.shape[:2], attention_mask, position_ids, past_key_values, kwargs)
        refuse_foreign_cache(c, past_key_values)
        if numbers_BT is not None and past_key_values is not None and not torch.compiler.is_compiling():
            raise ValueError(
                "packed documents (position_ids, cu_seq_lens_q) need past_key_values=None: a cache mixes them"
            )
        use_cache = c.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not self.training and numbers_BT is None:
            past_key_values = DynamicCache(config=c)
        bias = self.alibi_bias(x_BTD, attention_mask, past_key_values, numbers_BT)  # before a layer adds to the cache
        states, attentions = [], []
        for layer in self.layers:
            states.append(x_BTD)
            x_BTD, weights_BHTS = layer(x_BTD, bias, past_key_values)
            attentions.append(weights_BHTS)
        x_BTD = self.norm(x_BTD)
        if seen_BT is not None:  # a row of padding has no logits and no gradient, whatever the loss
            x_BTD = x_BTD.masked_fill(~seen_BT[..., None].to(x_BTD.device), 0)
        if output_attentions is None:
            output_attentions = c.output_attentions
        if output_attentions and c._attn_implementation != "eager":
            logger.warning_once('output_attentions needs attn_implementation="eager"; sdpa returns no attentions')
        wants_states = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=(*states, x_BTD) if wants_states else None,
            attentions=tuple(attentions) if output_attentions and c._attn_implementation == "eager" else None,
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
        position_ids=None,
        past_key_values: Cache | None = None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ):
        if labels is not None:
            rows = rows_of(labels.shape, attention_mask, position_ids, past_key_values, kwargs)
            is_ignored = ~predicts_next(labels.shape, *rows).to(labels.device)
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        # 0 keeps all positions.
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x, loss = out.last_hidden_state[:, positions], None
        if self.config.embed_rank:
            tied = self.config.tie_word_embeddings
            x = x @ matrix(self.model.embed_up, self.config.embed_rank, x) if tied else self.lm_head_down(x)
        logits = self.lm_head(x)
        if labels is not None:
            shifted = kwargs.pop("shift_labels", None)
            shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted is None else shifted
            kept = shifted.masked_fill(is_ignored, IGNORED)
            if kwargs.get("num_items_in_batch") is not None:  # the Trainer has counted all labels
                share = [(ids != IGNORED).sum().clamp(min=1) for ids in (kept, shifted)]
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * share[0] / share[1]
            loss = self.loss_function(logits, labels, self.config.vocab_size, shift_labels=kept, **kwargs)
        others = {
            "past_key_values": out.past_key_values,
            "hidden_states": out.hidden_states,
            "attentions": out.attentions,
        }
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)


LowRankConfig.register_for_auto_class()  # so that save_pretrained copies the code, too
LowRankModel.register_for_auto_class("AutoModel")
LowRankForCausalLM.register_for_auto_class("AutoModelForCausalLM")
