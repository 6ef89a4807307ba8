"""Text from a trained model: prefill and decode over the latent cache, sampled and streamed.

python -m lowrank_jax.generate --workdir=runs/quickstart --prompt="ROMEO:"
python -m lowrank_jax.generate --workdir=runs/quickstart --chat
"""

import functools
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import attention, cli, model, precision, sharding
from lowrank_jax.config import ModelConfig, UsageError
from lowrank_jax.data import chat
from lowrank_jax.trained import Trained, open_run

CHUNK = 16  # tokens decoded between two looks at the host: what streaming waits for
BUCKET = 128  # prompt and cache lengths are rounded up to multiples of this, so that few shapes are ever compiled


class Sampling(NamedTuple):
    """How the next token is drawn; the meaning and the order are those of Hugging Face's logits processors.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def filter_logits(logits_BV: jax.Array, s: Sampling) -> jax.Array:
    """Logits divided by the temperature, with every token that top-k, top-p or min-p excludes at -1e30."""
    V = logits_BV.shape[-1]
    logits_BV = logits_BV / jnp.maximum(s.temperature, 1e-6)
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    rank_V = jnp.arange(V)
    sorted_BV = jnp.where(rank_V < jnp.where(s.top_k > 0, s.top_k, V), sorted_BV, attention.MASKED)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # the mass that is likelier than each token
    keep_BV = (sorted_BV > attention.MASKED) & ((before_BV < s.top_p) | (s.top_p >= 1))
    keep_BV = (keep_BV & (probs_BV >= s.min_p * probs_BV[:, :1])) | (rank_V == 0)  # never nothing
    floor_B1 = jnp.min(jnp.where(keep_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= floor_B1, logits_BV, attention.MASKED)


class _Loop(NamedTuple):
    """The state of decoding: `count` tokens of each row are in `out`, the last of them not yet in the cache."""

    cache: dict
    out: jax.Array  # [B, max_new]
    count: jax.Array
    done: jax.Array  # [B] this row has ended


@functools.partial(jax.jit, static_argnames=("c", "size", "max_new", "dtype"))
def _start(c: ModelConfig, params, tokens_BT, lengths_B, stop_ids, key, sampling, *, size, max_new, dtype) -> _Loop:
    logits_BV, cache = model.prefill(c, params, tokens_BT, lengths_B, size, dtype)
    first_B = _sample(logits_BV, sampling, jax.random.wrap_key_data(key), 0)
    out = jnp.zeros((tokens_BT.shape[0], max_new), jnp.int32).at[:, 0].set(first_B)
    return _Loop(cache, out, jnp.asarray(1), jnp.isin(first_B, stop_ids))


@functools.partial(jax.jit, static_argnames="c", donate_argnames="loop")
def _decode_until(c: ModelConfig, params, loop: _Loop, lengths_B, stop_ids, key, sampling, limit) -> _Loop:
    """Decodes, in one compiled loop, until `limit` tokens are out or every row has ended."""

    def body(loop: _Loop) -> _Loop:
        last_B = loop.out[:, loop.count - 1]
        logits_BV, cache = model.decode(c, params, last_B, lengths_B + loop.count - 1, loop.cache)
        drawn_B = _sample(logits_BV, sampling, jax.random.wrap_key_data(key), loop.count)
        next_B = jnp.where(loop.done, stop_ids[0], drawn_B)
        out = loop.out.at[:, loop.count].set(next_B)
        return _Loop(cache, out, loop.count + 1, loop.done | jnp.isin(next_B, stop_ids))

    return jax.lax.while_loop(lambda loop: (loop.count < limit) & ~loop.done.all(), body, loop)


def _sample(logits_BV, s: Sampling, key, count) -> jax.Array:
    noise_BV = jax.random.gumbel(jax.random.fold_in(key, count), logits_BV.shape)
    drawn_B = jnp.argmax(filter_logits(logits_BV, s) + noise_BV, axis=-1)  # Gumbel-max: a draw from the softmax
    return jnp.where(s.temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


class Model:
    """A trained model in memory: `.params`, `.config`, `.tokenizer`, `.logits(tokens)`, `.generate(...)`."""

    def __init__(self, trained: Trained):
        self.config, self.tokenizer, self.params, self.progress = trained
        self._dtype = precision.policy(self.config.precision).dtype
        self._stop_ids = chat.stop_ids(self.tokenizer)
        self._compiled: set[tuple] = set()

    def logits(self, tokens) -> jax.Array:
        """[B, T, V] fp32 logits of token ids [B, T], from the full forward pass."""
        x_BTD, _ = model.features(self.config.model, self.params, jnp.asarray(tokens), None, self._dtype)
        return model.logits(self.config.model, self.params, x_BTD)

    def generate(self, prompts: list[list[int]], max_new: int = 200, seed: int = 0, **sampling) -> list[list[int]]:
        """New token ids for each prompt of ids (of any lengths), each ending with its stop token if it met one."""
        return [self._until_stop(row) for row in list(self.stream(prompts, max_new, seed, max_new, **sampling))[-1]]

    def stream(
        self, prompts, max_new: int = 200, seed: int = 0, chunk: int = CHUNK, **sampling
    ) -> Iterator[np.ndarray]:
        """All tokens so far, [B, n], after the first token and then every `chunk` tokens until all rows have ended."""
        if not prompts or not all(prompts):
            raise UsageError("every prompt needs at least one token")
        if max_new < 1:
            raise UsageError("max_new must be at least 1")
        lengths = [len(p) for p in prompts]
        longest, room = _bucket(max(lengths)), _bucket(max_new)
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        # Arrays of the host, which go wherever the parameters are.
        c, key, s = self.config.model, np.asarray(jax.random.key_data(jax.random.key(seed))), Sampling(**sampling)
        lengths_B, stop_ids = np.asarray(lengths, np.int32), np.asarray(self._stop_ids, np.int32)
        shapes = {"size": longest + room, "max_new": room, "dtype": self._dtype}
        loop = _start(c, self.params, tokens, lengths_B, stop_ids, key, s, **shapes)
        done, count = sharding.fetch(loop.done).all(), 1
        yield sharding.fetch(loop.out)[:, :1]
        while not done and count < max_new:
            limit = min(count + chunk, max_new)
            loop = _decode_until(c, self.params, loop, lengths_B, stop_ids, key, s, limit)
            done, count = sharding.fetch(loop.done).all(), int(loop.count)
            yield sharding.fetch(loop.out)[:, :count]

    def compile(self, prompt_length: int, max_new: int) -> None:
        """Compiles for one prompt of this length, so that a timing after it is one of the model alone."""
        shapes = (_bucket(prompt_length), _bucket(max_new))
        if shapes not in self._compiled:
            for _ in zip(self.stream([[self.tokenizer.bos] * prompt_length], max_new, chunk=1), range(2)):
                pass
            self._compiled.add(shapes)

    def prompt(self, text: str, history: list[dict] = (), is_chat: bool = False) -> list[int]:
        """Ids that begin a document with `text` or, as a chat, a conversation in which it is the user's next turn."""
        if not is_chat:
            return [self.tokenizer.bos, *self.tokenizer.encode(text)]
        messages = [*history, {"role": "user", "content": text}]
        return [self.tokenizer.bos, *chat.encode(self.tokenizer, messages, prompt=True)[0]]

    def _until_stop(self, row: np.ndarray) -> list[int]:
        ends = np.flatnonzero(np.isin(row, self._stop_ids))
        return row[: ends[0] + 1 if len(ends) else None].tolist()


def _bucket(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


def answer(run: Model, prompt_ids: list[int], args, show) -> dict:
    """Generates after one prompt, handing each new piece of text to `show`; returns the facts of it."""
    sampling = {key: getattr(args, key) for key in Sampling._fields}
    run.compile(len(prompt_ids), args.max_tokens)
    started, first, shown, ids = time.monotonic(), 0.0, 0, []
    for rows in run.stream([prompt_ids], args.max_tokens, args.seed, **sampling):
        ids = run._until_stop(rows[0])
        first = first or time.monotonic() - started
        text = run.tokenizer.decode(ids).rstrip("\ufffd")  # the rest of a character may be still to come
        show(text[shown:])
        shown = max(shown, len(text))
    text = run.tokenizer.decode(ids)
    show(text[shown:])
    decoding = time.monotonic() - started - first
    stopped = ids[-1] in run._stop_ids
    return {
        "text": text,
        "tokens": ids,
        "finish_reason": "stop" if stopped else "length",
        "prefill_seconds": first,
        "tokens_per_s": (len(ids) - 1) / decoding if len(ids) > 1 else 0.0,
    }


def converse(run: Model, args, show) -> dict:
    """A conversation: the prompt's turn if there is one, then a turn per line of standard input."""
    messages, result = [{"role": "system", "content": args.system}] if args.system else [], {}
    asking = args.prompt is None or (sys.stdin.isatty() and not args.json)
    interactive = sys.stdin.isatty()
    if asking and interactive:
        show("Type a message; /reset starts over, Ctrl-D ends.\n")
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
        if turn == "/reset":
            messages = [m for m in messages if m["role"] == "system"]
        elif turn:
            result = {"prompt": turn} | answer(run, run.prompt(turn, messages, is_chat=True), args, show)
            show("\n")
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": result["text"].strip()})
        turn = None


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--prompt", help="text to continue, or with --chat the first message")
    parser.add_argument("--chat", action="store_true", help="a conversation, one message a line")
    parser.add_argument("--system", default="", help="system message of the conversation")
    parser.add_argument("--max_tokens", type=int, default=200, help="most new tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens (0: off)")
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="only the likeliest tokens of this mass (default 0.95)"
    )
    parser.add_argument("--min_p", type=float, default=0.0, help="only tokens this likely, relative to the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.prompt is None and not args.chat:
        raise UsageError("--prompt=TEXT or --chat is missing")
    if (
        not 0 <= args.temperature < 1e6
        or not 0 <= args.top_k < 2**31
        or not 0 < args.top_p <= 1
        or not 0 <= args.min_p <= 1
    ):
        raise UsageError("sampling needs temperature >= 0, top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1")
    if not 1 <= args.max_tokens <= 1_000_000 or not 0 <= args.seed < 2**63:
        raise UsageError("--max_tokens must be between 1 and 1,000,000 and --seed between 0 and 2^63 - 1")
    if args.chat and args.prompt is not None and not args.prompt.strip():
        raise UsageError("--chat needs a --prompt with text in it, or none, to read messages from standard input")
    run = Model(open_run(args.workdir))
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
