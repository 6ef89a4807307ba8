"""Text from a trained model: sampled, streamed, or as a conversation in the terminal.

python -m lowrank_jax.generate --workdir=runs/quickstart --prompt="ROMEO:"
python -m lowrank_jax.generate --workdir=runs/quickstart --chat
"""

import functools
import sys

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.inference import quantize
from lowrank_jax.inference.engine import MOST_ALTERNATIVES, Request
from lowrank_jax.inference.sampling import NUMBERS, PRESETS, Sampling
from lowrank_jax.inference.session import CONTEXT, Conversation, Model, answer
from lowrank_jax.machine import console
from lowrank_jax.training.trained import open_run


def add_sampling_flags(parser: cli.Parser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="instead of the default --temperature=0.8 --top_p=0.95")
    for name, field in NUMBERS.items():
        parser.add_argument(f"--{name}", type=field.type, help=field.metadata["help"])
    parser.add_argument("--logit_bias", default="", metavar="ID:BIAS,...", help="added to the logits of token ids")


def read_sampling(args) -> Sampling:
    """Return the sampling settings of the flags; raises UsageError."""
    values = vars(PRESETS[args.preset] if args.preset else Sampling(top_p=0.95))
    values = values | {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    try:
        pairs = [part.split(":") for part in args.logit_bias.split(",") if part.strip()]
        values["logit_bias"] = tuple((int(i), float(bias)) for i, bias in pairs)
    except ValueError:
        raise UsageError(f"--logit_bias={args.logit_bias} must be ID:BIAS, such as 17:-5,42:2.5") from None
    return Sampling(**values)


def arguments(argv: list[str]):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    parser.add_run()
    add("--prompt", help="text to continue, or with --chat the first message")
    add("--chat", action="store_true", help="a conversation, one message per line")
    add("--system", default="", help="system message of the conversation")
    add("--max_tokens", type=int, default=200, help="most new tokens (default 200)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    add("--logprobs", type=int, default=0, help=f"with --json: alternatives per token, at most {MOST_ALTERNATIVES}")
    add("--context", type=int, default=CONTEXT, help=f"with --chat: tokens remembered ({CONTEXT})")
    add("--weights", default="auto", help=f"auto (default), {', '.join(quantize.KINDS)}")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    if args.prompt is None and not args.chat:
        raise UsageError("--prompt=TEXT or --chat is missing")
    if not 1 <= args.max_tokens <= 1_000_000 or not 0 <= args.logprobs <= MOST_ALTERNATIVES:
        limits = f"--max_tokens must be between 1 and 1,000,000 and --logprobs between 0 and {MOST_ALTERNATIVES}"
        raise UsageError(limits)
    if args.chat and args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty: give --chat a prompt with text, or none to read messages from stdin")
    if args.chat and args.max_tokens >= args.context:
        raise UsageError(f"--max_tokens={args.max_tokens} must be below --context={args.context}")
    return args


def command(argv: list[str]) -> dict:
    args = arguments(argv)
    sampling = read_sampling(args)
    ask = lambda ids: Request(ids, args.max_tokens, sampling, args.logprobs)
    run = open_run(args.workdir, at=args.step, phase=args.phase)
    model = Model(run.config, run.tokenizer, run.params, args.weights)
    show = functools.partial(console.show, end="")
    if args.chat:
        reads = args.prompt is None or (sys.stdin.isatty() and not args.json)
        chat = Conversation(model, ask, args.stop, args.context, args.system, show)
        facts = chat.hold(args.prompt, reads)
        if args.json and not facts:
            raise UsageError("--chat --json got no message on standard input")
        return facts
    show(args.prompt)
    facts = answer(model, ask(model.prompt(args.prompt)), args.stop, show)
    show("\n")
    return {"prompt": args.prompt} | facts


def chat(argv: list[str]) -> dict:
    """Talk with a trained model in the terminal: `generate --chat`."""
    return command(["--chat", *argv])


if __name__ == "__main__":
    cli.main(command)
