"""Helpers for tests of exports: small models whose weights all matter, odd texts, the command in this process."""

import json
import os
import random
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import cli
from lowrank_jax.export import __main__ as export
from lowrank_jax.model import network
from lowrank_jax.training.plan import Progress
from lowrank_jax.training.trained import Trained

# Set before transformers is imported. It copies a model's code to this folder, and asks the hub for updates.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="lowrank_jax_test_modules_")
os.environ["HF_HUB_OFFLINE"] = "1"


# Head counts with each kind of slopes, latents shared or not, heads tied or not. `tok` has an odd size.
MODELS = {
    "usual": {},
    "12 heads, one latent": {"d": 48, "heads": 12, "shared_kv": True},
    "3 heads, no norm, one latent": {"d": 36, "heads": 3, "shared_kv": True, "latent_norm": False},
    "equal ranks, no norm": {"latent_norm": False, "rank_split": (1, 1, 1, 1)},
    "all in low rank": {"mlp_rank": 8, "embed_rank": 12},
    "32 heads, a head of its own": {"d": 64, "heads": 32, "tied": False},
    "all in low rank, a head of its own": {"mlp_rank": 8, "embed_rank": 12, "tied": False, "shared_kv": True},
    "dense": {"rank": 0},
}


def trained(make, tok, **changes) -> Trained:
    """Return a model with random weights: no factor is zero as in a new model, and no gain is 1."""
    settings = {"d": 32, "heads": 8, "rank": 8, "mlp": 48, "vocab": tok.vocab_size} | changes
    config = make.run_config(pretrain__block=48, **{f"model__{key}": value for key, value in settings.items()})
    rng = np.random.default_rng(0)  # jax would compile every draw

    def draw(path, w):
        noise = rng.standard_normal(w.shape, np.float32)
        return jnp.asarray(1 + 0.3 * noise if path[-1].key == "gain" else w.shape[-2] ** -0.5 * noise)

    shapes = jax.eval_shape(lambda: network.init(config.model, jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Trained(config, tok, params, Progress(step=7, tokens=1234, cursor={}))


def nasty_texts(prose: str, count: int = 300) -> list[str]:
    """Return mixtures of words, repeated letters, white space and any code points, without names of symbols."""
    draw = random.Random(0)
    words = prose.split()
    kinds = (
        lambda: draw.choice(words),
        lambda: "".join(draw.choices("aeb", k=draw.randint(1, 9))),
        lambda: "".join(draw.choices(" \n\t\r\u00a0\u2028", k=draw.randint(1, 6))),
        lambda: chr(
            draw.choice([draw.randrange(1, 0x250), draw.randrange(0x3040, 0xD800), draw.randrange(0x1F300, 0x1F700)])
        ),
        lambda: draw.choice(
            ["<0x41>", "|im_end|>", "e\u0301", "\ufeff", "1234567", "\U0001f468\u200d\U0001f469", "</"]
        ),
    )
    return ["", " ", "\n"] + ["".join(draw.choice(kinds)() for _ in range(draw.randint(1, 12))) for _ in range(count)]


def run(monkeypatch, capsys, model: Trained, *args: str) -> tuple[int, dict, str]:
    """Run the command for a model that was never saved; return exit status, JSON and stderr."""
    monkeypatch.setattr(export, "open_run", lambda folder, **which: model)
    status = 0
    try:
        cli.main(export.command, ["--workdir=none", "--unfinished", "--json", *args])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else {}, err


def refused(result: tuple[int, dict, str], status: int, *names: str) -> None:
    """Assert that the command failed with one line that has these names in it."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == status and len(lines) == 1, err
    for name in names:
        assert name in lines[0], lines[0]
