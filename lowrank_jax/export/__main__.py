"""A trained model for other programs, verified: what they compute from the export is what the model computes.

    python -m lowrank_jax.export --workdir=runs/quickstart --format=hf --out=exports/hf
    python -m lowrank_jax.export --workdir=runs/quickstart --format=torch --out=exports/torch
    python -m lowrank_jax.export --workdir=runs/quickstart --format=onnx --out=exports/onnx [--quant=int8]
    python -m lowrank_jax.export --workdir=runs/quickstart --format=gguf --out=exports/gguf [--attn=latent]

hf     a folder for Hugging Face transformers: low-rank weights, the model's code, tokenizer and chat template
torch  a folder for plain PyTorch: low-rank weights, one module, tokenizer and an example
onnx   a folder for ONNX Runtime: a graph with the latents going in and out, tokenizer and a card
gguf   model.gguf for llama.cpp, with the projections of attention merged (--attn=dense, the default) or with a cache
       of latents (--attn=latent); a model with latent_norm cannot be written as one

Training can go on from hf and torch: python -m lowrank_jax.importer.
"""

import os

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.export import fidelity, gguf, hf, onnx, torch, verify
from lowrank_jax.export.folder import whole_folder
from lowrank_jax.machine import console
from lowrank_jax.training import run_folder
from lowrank_jax.training.trained import open_run

# A format is a module with `write(trained, folder, ...) -> path` and `check(trained, path, ...) -> largest difference`,
# which both take its options; with a choice of `TYPES`, also `quality(trained, path, ...) -> facts`.
FORMATS = {"hf": hf, "torch": torch, "onnx": onnx, "gguf": gguf}
OPTIONS = {"hf": ("merge",), "torch": (), "onnx": ("quant",), "gguf": ("attn", "quant")}


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--attn", choices=gguf.FORMS, help="gguf: projections merged, or latents kept (default dense)")
    kinds = f"gguf: {', '.join(gguf.TYPES)}; onnx: {', '.join(onnx.TYPES)}"
    parser.add_argument("--quant", metavar="KIND", help=f"how matrices are kept (default f32); {kinds}")
    parser.add_argument("--merge", action="store_true", help="hf: dense weights for a class of transformers' own")
    parser.add_argument("--unfinished", action="store_true", help="also a run whose training has not ended")
    args = parser.parse_args(argv)
    format, options = FORMATS[args.format], _options(args)
    out = os.path.realpath(args.out)
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"--out={args.out} is there already; name a folder that is new or empty")
    trained, difference, changed = open_run(args.workdir), None, {}
    step = trained.progress.step
    if not args.unfinished and run_folder.finished_step(args.workdir) != step:
        raise UsageError(
            f"--workdir={args.workdir} is not finished (its newest checkpoint is of step {step}); "
            "let lowrank_jax.main end it, or export it as it is with --unfinished"
        )
    with whole_folder(out) as folder:
        path = format.write(trained, folder, **options)
        try:
            difference = format.check(trained, path, **options)
            told = f"verified: logits differ by at most {difference:.1e}"
            if options.get("quant", "f32") != "f32":
                changed = format.quality(trained, path, **options)
                told = f"{options['quant']}, {fidelity.describe(changed)}"
        except verify.NotInstalled as e:
            told = f"not verified: nothing here runs it ({e})"
    console.say(f"{args.out}: {args.format}, {told}")
    return {
        "format": args.format,
        "out": args.out,
        "verified": difference is not None,
        "max_abs_err": difference,
        "step": step,
        **changed,
    }


def _options(args) -> dict:
    """What was asked for; raises UsageError for what the format does not know."""
    asked = {name: getattr(args, name) for name in ("attn", "quant", "merge") if getattr(args, name)}
    for name in asked:
        if name not in OPTIONS[args.format]:
            raise UsageError(f"--{name} is not for --format={args.format}")
    if "quant" in asked and asked["quant"] not in (known := FORMATS[args.format].TYPES):
        raise UsageError(f"--quant={args.quant} must be one of {', '.join(known)} for --format={args.format}")
    return asked


if __name__ == "__main__":
    cli.main(command)
