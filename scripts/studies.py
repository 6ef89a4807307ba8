"""The studies of scripts/experiment.py as plain data, and the changes to the network that no config has.

An arm is {config key: value} on top of its study's settings. Its `variant` names functions of VARIANTS, which change
the product's code in the process that trains the arm: what is only a baseline, or has not won, is not in the product.
"""

import functools
import math
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax import attention, model, optim
from lowrank_jax.sharding import path_name

# English of three centuries and Python, out of the packages in requirements.txt and Python itself: 21 MB and 5 MB.
TEXT = f"builtin:addresses@0.4, builtin:plays@0.2, builtin:bible@0.1, text:{sysconfig.get_path('stdlib')}/*.py@0.3"
VOCAB = 1024  # SentencePiece pieces learnt from that text: 2.8 bytes each, so that the head stays cheap
EVEN, V_AND_O = (1, 1, 1, 1), (1, 1, 3, 3)

SETTINGS = {
    "model.d": 256,
    "model.layers": 4,
    "model.heads": 8,
    "model.scan": False,
    "pretrain.steps": 200,
    "pretrain.tokens_per_step": 4096,
    "pretrain.microbatch_tokens": 1024,
    "pretrain.block": 256,
    "pretrain.eval_fraction": 0.02,
    "pretrain.eval_tokens": 65_536,
    "every.eval": 10**6,
    "every.save": 100,
    "every.keep": 1,
    "track": "",
}


def low(rank_split=V_AND_O, norm=False, rank=32, **more) -> dict:
    """An arm with factors: R = D/8 and no norm on the latents, unless said otherwise."""
    return {"model.rank": rank, "model.rank_split": rank_split, "model.latent_norm": norm} | more


DENSE = {"model.rank": 0}
FIVE = {"model.layers": 5}
STUDIES = {
    # Is low rank worth it? The claims about sizes (in `limits`) are tested in tests/test_experiment.py.
    "quality": {
        "settings": SETTINGS,
        "reference": "dense",
        "lrs": (6e-3, 1.2e-2),
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
            "split norm all": low(variant="norm_qkvo"),
            "split norm v": low(variant="norm_v"),
            "split norm vo": low(variant="norm_vo"),
            "split norm qk": low(variant="norm_qk"),
            "split half down": low(variant="half_down"),
            "split half up": low(variant="half_up"),
            "split bounded": low(variant="bounded"),
            "split spectral": low(variant="spectral"),
            "split heads": low(variant="muon_heads"),
            "split norm wide": low(norm=True) | {"model.mlp": 960},
            "split norm tokens": low(norm=True) | {"pretrain.steps": 252},
            "dense short": DENSE | {"pretrain.steps": 158},
            "shared norm": low(norm=True) | {"model.shared_kv": True},
            "d/4 split norm": low(norm=True, rank=64),
            "d/4 even": low(EVEN, rank=64),
            "split norm 4 heads": low(norm=True) | {"model.heads": 4},
            "split norm 16 heads": low(norm=True) | {"model.heads": 16},
            "whole": low(norm=True) | {"model.mlp_rank": 64, "model.embed_rank": 64},
            "whole 8 layers": low(norm=True) | {"model.mlp_rank": 64, "model.embed_rank": 64, "model.layers": 8},
        },
        # What must hold of an arm beside another: parameters and FLOPs of the whole training at most as many.
        "limits": [
            ("split norm 5 layers", "dense"),
            ("split 5 layers", "dense"),
            ("split norm wide", "dense"),
            ("split norm", "dense small"),
            ("split norm tokens", "dense"),
        ],
    },
}


# ----------------------------------------------------------------------------------------------------------- variants


def apply(names: str) -> None:
    """Changes the product in this process, for good, by variants named `one+another`."""
    for name in filter(None, names.split("+")):
        VARIANTS[name]()


def _norms(of: str) -> None:
    """RMSNorm, without a gain, on the latents of some of q, k, v and o."""
    init, reduce = model.Attention.__init__, model.Linear.reduce

    def marked(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for name in of:
            getattr(self, name).normed = True

    def normed(self, x):
        return model.rms_norm(reduce(self, x)) if getattr(self, "normed", False) else reduce(self, x)

    model.Attention.__init__, model.Linear.reduce = marked, normed


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
    init = model.Linear.__init__

    def spectral(self, matmul, rngs, d_in, d_out, rank=0, zero=False, has_down=True):
        init(self, matmul, rngs, d_in, d_out, rank, zero, has_down)
        if not rank or not has_down:
            return
        u, s, vt = jnp.linalg.svd(jax.random.normal(rngs.params(), (d_in, d_out)) * d_in**-0.5, full_matrices=False)
        self.down[...] = u[:, :rank] * jnp.sqrt(s[:rank])
        if not zero:
            self.up[...] = jnp.sqrt(s[:rank])[:, None] * vt[:rank]

    model.Linear.__init__ = spectral


def _no_positions() -> None:
    attention.alibi_slopes = lambda heads: np.zeros(heads, np.float32)


VARIANTS = {
    "norm_qkvo": lambda: _norms("qkvo"),
    "norm_v": lambda: _norms("v"),
    "norm_vo": lambda: _norms("vo"),
    "norm_qk": lambda: _norms("qk"),
    "half_down": lambda: _scale_updates(down=0.5),
    "half_up": lambda: _scale_updates(up=0.5),
    "bounded": _bounded,
    "spectral": _spectral,
    "muon_heads": _muon_per_head,
    "nope": _no_positions,
}
