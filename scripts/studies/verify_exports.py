"""Print the parity table of docs/export.md: the largest difference of each export's logits to the model's own.

    pip install -r requirements-test.txt
    python scripts/studies/verify_exports.py [--workdir=runs/a,runs/b] [--formats=hf,torch,onnx,gguf,gguf-latent]

The models are of toy size with random weights (no factor is zero and no gain is 1), and the runs of --workdir. Logits
are compared at random prompts of 1 and 13 tokens and of 1 and 1.5 times the longest trained length, at once and with
the cache; ids of texts and of a conversation must be the same. A dash marks a model that the format cannot hold.
"""

import os
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
os.environ["HF_HUB_OFFLINE"] = "1"

from lowrank_jax import cli
from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.machine import console

VOCAB = 1001
TOY = {"d": 96, "layers": 2, "heads": 8, "rank": 12, "mlp": 160, "latent_norm": False, "rank_split": (1, 1, 1, 1)}
MODELS = {
    "8 heads": {},
    "12 heads, one latent": {"heads": 12, "shared_kv": True},
    "32 heads": {"heads": 32},
    "12 heads, a head of its own": {"heads": 12, "tied": False},
    "32 heads, one latent, MLP and embedding in low rank": {
        "heads": 32,
        "shared_kv": True,
        "mlp_rank": 24,
        "embed_rank": 48,
    },
    "8 heads, split ranks, norms on latents": {"latent_norm": True, "rank_split": (1, 1, 3, 3)},
    "8 heads, dense": {"rank": 0},
}
FORMATS = ("hf", "torch", "onnx", "gguf", "gguf-latent")


def toy(changes: dict, tok):
    """Return a model of toy size with random weights."""
    import jax

    from lowrank_jax.model import network
    from lowrank_jax.training.plan import Progress
    from lowrank_jax.training.trained import Trained

    path = os.path.join(sys.path[0], "configs", "default.py")
    values = cli.read_config([f"--config={path}", "--config.pretrain.block=64"]).to_dict()
    values["pretrain"]["tokens_per_step"] = 64
    values["model"] |= TOY | {"vocab": tok.vocab_size} | changes
    config, keys = RunConfig.from_dict(values), iter(jax.random.split(jax.random.key(1), 1000))
    draw = lambda path, w: (
        1 + 0.3 * jax.random.normal(next(keys), w.shape)
        if path[-1].key == "gain"
        else w.shape[-2] ** -0.5 * jax.random.normal(next(keys), w.shape)
    )
    params = jax.tree_util.tree_map_with_path(draw, network.init(config.model, jax.random.key(0)))
    return Trained(config, tok, params, Progress())


def error(trained, format: str, folder: str) -> float | None:
    """Return the largest difference of two logits, or None if the format cannot hold the model."""
    from lowrank_jax.export import gguf, hf, onnx, torch

    options = {"attn": "latent"} if format == "gguf-latent" else {}
    module = {"hf": hf, "torch": torch, "onnx": onnx, "gguf": gguf, "gguf-latent": gguf}[format]
    try:
        path = module.write(trained, folder, **options)
    except UsageError as e:
        console.say(f"{format}: {e}")
        return None
    return module.check(trained, path, **options)


def command(argv: list[str]) -> dict:
    from lowrank_jax.data import builtin, tokenizer
    from lowrank_jax.training.trained import open_run

    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", default="", help="folders of further runs, separated by commas")
    parser.add_argument("--formats", default=",".join(FORMATS))
    args = parser.parse_args(argv)
    formats = args.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        raise UsageError(f"--formats knows {', '.join(FORMATS)}, not {min(unknown)}")
    tok = tokenizer.train([document["text"] for document in builtin.load("quickstart")[:200]], VOCAB)
    models = {name: lambda changes=changes: toy(changes, tok) for name, changes in MODELS.items()}
    models |= {
        f"trained: {os.path.basename(run)}": lambda run=run: open_run(run) for run in args.workdir.split(",") if run
    }
    errors = {}
    print("| model | " + " | ".join(formats) + " |\n|---" + "|---" * len(formats) + "|", flush=True)
    for name, make in models.items():
        trained = make()
        with tempfile.TemporaryDirectory() as folder:
            errors[name] = {format: error(trained, format, os.path.join(folder, format)) for format in formats}
        shown = ["-" if errors[name][format] is None else f"{errors[name][format]:.1e}" for format in formats]
        print(f"| {name} | " + " | ".join(shown) + " |", flush=True)
    return {"errors": errors}


if __name__ == "__main__":
    cli.main(command)
