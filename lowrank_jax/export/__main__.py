"""Export of a trained model for other programs. Each export is verified: its logits are compared with the model's.

    python -m lowrank_jax.export --workdir=runs/quickstart --format=hf --out=exports/hf
    python -m lowrank_jax.export --workdir=runs/quickstart --format=onnx --out=exports/onnx --quant=int8

hf     a folder for Hugging Face transformers: low-rank weights, the model's code, tokenizer and chat template
torch  a folder for plain PyTorch: low-rank weights, one module, tokenizer and an example
onnx   a folder for ONNX Runtime: a graph with latents as inputs and outputs, tokenizer and a card
gguf   model.gguf for llama.cpp. --attn=dense, the default, merges the factors of attention; --attn=latent keeps a
       cache of latents. A model with latent_norm cannot be exported as GGUF

To continue training from hf or torch, import it: python -m lowrank_jax.importer.
"""

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.export import gguf, hf, onnx, torch, verify
from lowrank_jax.export.folder import unused, whole_folder
from lowrank_jax.machine import console
from lowrank_jax.training import mirror, run_folder
from lowrank_jax.training.trained import open_run

# A format is a module with these functions, which take its options as keywords. `write(trained, folder) -> path` raises
# UsageError, before it writes, for a model or tokenizer that the format cannot hold. `check(trained, path)` reads
# prompts as a whole and token by token, and raises RunFailure where logits or ids differ. `quality(trained, path)`
# belongs to formats with `TYPES` for --quant. All raise NotInstalled where a package is missing.
FORMATS = {"hf": hf, "torch": torch, "onnx": onnx, "gguf": gguf}
OPTIONS = {"hf": (), "torch": (), "onnx": ("quant",), "gguf": ("attn", "quant")}


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_run()
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_path("--out", required=True, help="the new folder")
    parser.add_argument("--attn", choices=gguf.FORMS, help="gguf: merged projections or latents (default dense)")
    types = f"gguf: {', '.join(gguf.TYPES)}; onnx: {', '.join(onnx.TYPES)}"
    parser.add_argument("--quant", metavar="KIND", help=f"type of the matrices (default f32); {types}")
    parser.add_argument("--unfinished", action="store_true", help="export a run whose training has not ended")
    args = parser.parse_args(argv)
    format = FORMATS[args.format]
    options = {name: getattr(args, name) for name in ("attn", "quant") if getattr(args, name)}
    for name in options:
        if name not in OPTIONS[args.format]:
            raise UsageError(f"--{name} is not for --format={args.format}")
    if "quant" in options and args.quant not in format.TYPES:
        raise UsageError(f"--quant={args.quant} must be one of {', '.join(format.TYPES)} for --format={args.format}")
    out, difference, change = unused(args.out, "--out"), None, {}
    with mirror.opened(args.workdir) as run:
        trained, finished = open_run(run, at=args.step, phase=args.phase), run_folder.finished_step(run)
    step, is_chosen = trained.progress.step, args.step is not None or args.phase != ""
    if not (args.unfinished or is_chosen) and finished != step:
        advice = "finish it with lowrank_jax.main, or export it as it is with --unfinished"
        raise UsageError(f"--workdir={args.workdir} is not finished: its newest checkpoint is of step {step}; {advice}")
    with whole_folder(out) as folder:
        path = format.write(trained, folder, **options)
        try:
            difference = format.check(trained, path, **options)
            outcome = f"verified: logits differ by at most {difference:.1e}"
            if options.get("quant", "f32") != "f32":
                change = format.quality(trained, path, **options)
                outcome = f"{options['quant']}, {verify.describe(change)}"
        except verify.NotInstalled as e:
            outcome = f"not verified: {e}"
    console.say(f"{args.out}: {args.format}, {outcome}")
    facts = {"format": args.format, "out": args.out, "verified": difference is not None, "max_abs_err": difference}
    return facts | {"step": step} | change


if __name__ == "__main__":
    cli.main(command)
