"""Text from a trained model: sampled, streamed, or as a conversation in the terminal.

python -m lowrank_jax.generate --workdir=runs/quickstart --prompt="ROMEO:"
python -m lowrank_jax.generate --workdir=runs/quickstart --chat
"""

import contextlib
import dataclasses
import sys
import time

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.inference import quantize
from lowrank_jax.inference.engine import TOP
from lowrank_jax.inference.sampling import PRESETS, Sampling
from lowrank_jax.inference.session import CONTEXT, Model
from lowrank_jax.inference.text_stream import Writer
from lowrank_jax.machine import console
from lowrank_jax.training.trained import open_run


def answer(run: Model, prompt: list[int], args, show) -> dict:
    """Generates after one prompt, handing each new piece of text to `show`; returns the facts of it."""
    writer, text, ids, told, finish = Writer(run.tokenizer, args.stop), "", [], [], "stop"
    if run.engine(1, len(prompt) + args.max_tokens).fresh:  # compiles, so that the timing is of the model alone
        for _ in run.stream([run.tokenizer.bos] * len(prompt), args.max_tokens, most=1):
            break
    started = time.monotonic()
    first = started
    with contextlib.closing(run.stream(prompt, args.max_tokens, args.logprobs, **args.sampling)) as pieces:
        for piece in pieces:
            first = first if ids else time.monotonic()
            ids, told, finish = ids + piece.ids, told + piece.logprobs, piece.finish or finish
            show(new := writer.add(piece.ids))
            text += new
            if writer.stopped:
                finish = "stop"
                break
    show(rest := writer.end())
    decoding = time.monotonic() - first
    facts = {
        "text": text + rest,
        "tokens": ids,
        "finish_reason": finish,
        "prefill_seconds": first - started,
        "tokens_per_s": (len(ids) - 1) / decoding if len(ids) > 1 else 0.0,
    }
    if args.logprobs:
        piece_of = lambda i: run.tokenizer.decode([i])
        facts["logprobs"] = [
            {"id": i, "logprob": p, "top": [{"id": j, "text": piece_of(j), "logprob": q} for j, q in top]}
            for i, (p, top) in zip(ids, told)
        ]
    return facts


def converse(run: Model, args, show) -> dict:
    """A conversation: the prompt's turn if there is one, then a turn per line of standard input."""
    messages, result = [{"role": "system", "content": args.system}] if args.system else [], {}
    asking = args.prompt is None or (sys.stdin.isatty() and not args.json)
    interactive = sys.stdin.isatty()
    if asking and interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input()
        show("Type a message. /system TEXT sets the tone, /reset starts over, Ctrl-C stops an answer, Ctrl-D ends.\n")
    turn = args.prompt
    while True:
        if turn is None:
            if not asking:
                return result
            try:
                turn = input("> " if interactive else "").strip()
            except EOFError:
                show("\n" if interactive else "")
                return result
        command, _, rest = turn.partition(" ")
        if command == "/reset":
            messages = [m for m in messages if m["role"] == "system"]
        elif command == "/system":
            messages = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
        elif command.startswith("/") and command[1:].isalpha():
            show(f"there is no {command}: /system TEXT, /reset\n")
        elif turn:
            messages = _turn(run, messages, turn, args, show)
            result = {"prompt": turn} | messages.pop()
        turn = None


def _turn(run: Model, messages: list[dict], text: str, args, show) -> list[dict]:
    """The conversation after a turn of each, and behind it the facts of the answer.

    What does not fit in the context with it is forgotten from the beginning on, but for the system's message.
    """
    while len(ids := run.prompt(text, messages, is_chat=True)) + args.max_tokens > args.context:
        turns = [m for m in messages if m["role"] != "system"]
        if not turns:
            raise UsageError(f"a message of {len(ids)} tokens does not fit in --context={args.context}")
        messages = [m for m in messages if m["role"] == "system"] + turns[2:]
        console.say("(the beginning of the conversation no longer fits and is forgotten)")
    shown = []

    def keep(piece: str) -> None:
        shown.append(piece)
        show(piece)

    try:
        result = answer(run, ids, args, keep)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        run.reset()
        result = {"text": "".join(shown), "finish_reason": "stop"}
    show("\n")
    said = {"role": "assistant", "content": result["text"].strip()}
    return [*messages, {"role": "user", "content": text}, said, result]


HELP = {
    "temperature": "0 is greedy (default 0.8)",
    "top_k": "only the k likeliest tokens (0: off)",
    "top_p": "only the likeliest tokens of this mass (default 0.95)",
    "min_p": "only tokens this likely, relative to the likeliest (0: off)",
    "repetition_penalty": "divides the logits of tokens that occurred (1: off)",
    "presence_penalty": "is taken off the logits of tokens that occurred",
    "frequency_penalty": "is taken off them once for each time",
    "penalty_last_n": "tokens that the penalties look back (0: all)",
    "no_repeat_ngram": "never the same n tokens twice (0: off)",
    "seed": "the same seed draws the same text",
}


def add_sampling_flags(parser: cli.Parser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="settings to begin with")
    for field in dataclasses.fields(Sampling):
        if field.name != "logit_bias":
            parser.add_argument(f"--{field.name}", type=type(field.default), help=HELP[field.name])
    parser.add_argument("--logit_bias", default="", metavar="ID:BIAS,...", help="added to the logits of token ids")


def read_sampling(args) -> dict:
    """The fields of Sampling that the flags describe; raises UsageError."""
    preset = PRESETS[args.preset] if args.preset else Sampling(top_p=0.95)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling) if getattr(args, f.name) is not None}
    try:
        pairs = [part.split(":") for part in args.logit_bias.split(",") if part.strip()]
        given["logit_bias"] = tuple((int(i), float(bias)) for i, bias in pairs)
    except ValueError:
        raise UsageError(f"--logit_bias={args.logit_bias} must be ID:BIAS, such as 17:-5,42:2.5") from None
    return vars(dataclasses.replace(preset, **given))


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--prompt", help="text to continue, or with --chat the first message")
    parser.add_argument("--chat", action="store_true", help="a conversation, one message a line")
    parser.add_argument("--system", default="", help="system message of the conversation")
    parser.add_argument("--max_tokens", type=int, default=200, help="most new tokens (default 200)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be given again")
    parser.add_argument(
        "--logprobs", type=int, default=0, help=f"with --json: so many likeliest of each token, to {TOP}"
    )
    parser.add_argument("--context", type=int, default=CONTEXT, help=f"with --chat: tokens remembered ({CONTEXT})")
    parser.add_argument("--weights", default="auto", help=f"auto (default), {', '.join(quantize.KINDS)}")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    if args.prompt is None and not args.chat:
        raise UsageError("--prompt=TEXT or --chat is missing")
    if not 1 <= args.max_tokens <= 1_000_000 or not 0 <= args.logprobs <= TOP:
        raise UsageError(f"--max_tokens must be between 1 and 1,000,000 and --logprobs between 0 and {TOP}")
    if args.chat and args.prompt is not None and not args.prompt.strip():
        raise UsageError("--chat needs a --prompt with text in it, or none, to read messages from standard input")
    if args.chat and args.max_tokens >= args.context:
        raise UsageError(f"--max_tokens={args.max_tokens} must be below --context={args.context}")
    args.sampling = read_sampling(args)
    trained = open_run(args.workdir)
    run = Model(trained.config, trained.tokenizer, trained.params, args.weights)
    show = lambda text: print(text, end="", flush=True)
    if args.chat:
        result = converse(run, args, show)
        if args.json and not result:
            raise UsageError("--chat --json got no message on standard input")
        return result
    show(args.prompt)
    result = answer(run, run.prompt(args.prompt), args, show)
    show("\n")
    return {"prompt": args.prompt} | result


if __name__ == "__main__":
    cli.main(command)
