"""A trained model for other programs, verified: what they compute from the export is what the model computes.

    python -m lowrank_jax.export --workdir=runs/quickstart --format=hf --out=exports/hf
    python -m lowrank_jax.export --workdir=runs/quickstart --format=gguf --out=exports/gguf [--attn=latent]

hf     a folder for Hugging Face transformers: low-rank weights, the model's code, tokenizer and chat template
gguf   model.gguf for llama.cpp, with the projections of attention merged (--attn=dense, the default) or with a cache
       of latents (--attn=latent); a model with latent_norm cannot be written as one
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.export import fidelity, gguf, hf, verify
from lowrank_jax.trained import open_run

# A format is a module with `write(trained, folder, ...) -> path` and `check(trained, path, ...) -> largest difference`,
# which both take its options.
FORMATS = {"hf": hf, "gguf": gguf}
OPTIONS = {"hf": (), "gguf": ("attn", "quant")}


@contextlib.contextmanager
def whole_folder(out: str) -> Iterator[str]:
    """A path beside `out` that becomes `out` if nothing is raised, and otherwise leaves nothing behind."""
    parent = os.path.dirname(out)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as hidden:
        yield (made := os.path.join(hidden, "export"))
        os.makedirs(os.path.dirname(out), exist_ok=True)
        if os.path.isdir(out):  # an empty one: rename replaces it on POSIX alone
            os.rmdir(out)
        os.rename(made, out)


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--attn", choices=gguf.FORMS, help="gguf: projections merged, or latents kept (default dense)")
    parser.add_argument("--quant", choices=gguf.TYPES, help="gguf: how matrices are kept (default f32)")
    args = parser.parse_args(argv)
    options = {name: getattr(args, name) for name in ("attn", "quant") if getattr(args, name)}
    for name in options:
        if name not in OPTIONS[args.format]:
            raise UsageError(f"--{name} is not for --format={args.format}")
    out = os.path.realpath(args.out)
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"--out={args.out} is there already; name a folder that is new or empty")
    trained, found = open_run(args.workdir), {"max_abs_err": None}
    with whole_folder(out) as folder:
        path = FORMATS[args.format].write(trained, folder, **options)
        try:
            found = {"max_abs_err": FORMATS[args.format].check(trained, path, **options)}
            told = f"verified: logits differ by at most {found['max_abs_err']:.1e}"
            if args.quant not in (None, "f32"):
                found = FORMATS[args.format].quality(trained, path, **options)
                told = f"{args.quant}, verified: {fidelity.describe(found)}"
        except verify.NotInstalled as e:
            told = f"not verified: nothing here runs it ({e})"
    cli.say(f"{args.out}: {args.format}, {told}")
    return {
        "format": args.format,
        "out": args.out,
        "verified": found["max_abs_err"] is not None,
        "step": trained.progress["step"],
    } | found


if __name__ == "__main__":
    cli.main(command)
