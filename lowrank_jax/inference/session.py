"""A trained model in memory, for Python and the terminal, and the text of its token ids as they arrive."""

import contextlib
import dataclasses
import difflib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.config import RunConfig, UsageError, shown
from lowrank_jax.data import chat
from lowrank_jax.data.records import ROLES
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference import sampling
from lowrank_jax.inference.engine import MOST_DECODED, Engine, Piece, Request, prepare
from lowrank_jax.inference.text_stream import Writer
from lowrank_jax.machine import console, sharding
from lowrank_jax.model import network, precision

CONTEXT = 4096  # tokens per slot, unless a request needs more
# Mean difference of log-probabilities between cached decoding and the forward pass, in nats per token. Largest of a
# dozen samples: 1e-6 in fp32, 0.001 in fp16, 0.007 in bf16 and fp8 after the quickstart (4 layers); 0.004 in fp16
# and 0.05 in bf16 with 8 layers of random weights. A decoder that ignored an output gate was off by 0.8 and
# 1.5 after 90 and 60 steps of training with the gate.
DECODE_TOLERANCE = 0.2
PADDED = 128  # the forward pass is compiled for multiples of this length, so for few lengths
HELP = "Type a message. /system TEXT sets the tone, /reset starts over, Ctrl-C stops an answer, Ctrl-D ends.\n"
SLOTS = 32  # most prompts that are continued at the same time
MOST_NEW = 1_000_000  # tokens of an answer
Prompt = TypeVar("Prompt", str, list[int])
Messages = list[dict[str, str]]  # [{"role": "user", "content": "Hello"}]
Strings = str | Sequence[str]


class Model:
    """A trained model in memory: `.generate`, `.chat`, `.stream`, `.logits`, `.params`, `.config`, `.tokenizer`.

    `settings` of the methods are fields of sampling.Sampling, or `preset="balanced"`. `weights` is the format that
    generation uses: `fp32`, `bf16`, `fp16`, `int8`, `int4`, or `auto` for the run's own.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, params: dict, weights: str = "auto"):
        self.config, self.tokenizer, self.params = config, tokenizer, params
        self.weights = prepare(self.config, self.params, weights)
        self._engine: Engine | None = None

    def __repr__(self) -> str:
        m, count = self.config.model, sum(x.size for x in jax.tree.leaves(self.params))
        longest = max(phase.lengths[-1] for phase in self.config.phases.values())
        sizes = f"{m.layers} layers of width {m.d}, {f'rank {m.rank}' if m.rank else 'dense'}, vocabulary {m.vocab:,}"
        return f"Model({count:,} parameters, {sizes}, trained at lengths up to {longest:,})"

    def logits(self, tokens) -> jax.Array:
        """Return fp32 logits [B, T, V] of token ids [B, T], from the full forward pass."""
        dtype = precision.policy(self.config.precision).dtype
        x_BTD = network.features(self.config.model, self.params, jnp.asarray(tokens), None, dtype)
        return network.logits(self.config.model, self.params, x_BTD)

    def engine(self, slots: int, context: int) -> Engine:
        """Return an engine with at least this many slots and this much context; reuse the last one if it suffices."""
        last = self._engine
        if last is None or last.slots < slots or last.context < context:
            sizes = max(slots, last.slots if last else 1), max(context, last.context if last else CONTEXT)
            powers = [1 << (n - 1).bit_length() for n in sizes]  # few shapes are ever compiled
            self._engine = Engine(self.config.model, self.weights, chat.stop_ids(self.tokenizer), *powers)
        return self._engine

    def reset(self) -> None:
        """Forget the engine after an interruption, which may have come while its cache was donated to a program."""
        self._engine = None

    @overload
    def generate(
        self, prompts: Prompt, max_new: int = ..., seed: int = ..., stop: Strings = ..., **settings
    ) -> Prompt: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], max_new: int = ..., seed: int = ..., stop: Strings = ..., **settings
    ) -> list[Prompt]: ...
    def generate(self, prompts, max_new=200, seed=0, stop=(), **settings):
        """Return what follows a prompt, or a list of what follows each of several: text for a text, ids for ids.

        Conversations in a list get their answers. Texts end before the first of the `stop` strings, and ids end with a
        stop token. Prompt i draws with seed + i.
        """
        if _kind(prompts) in ("text", "ids"):
            return self.generate([prompts], max_new, seed, stop, **settings)[0]
        if not isinstance(prompts, list | tuple | np.ndarray) or _kind(prompts) == "messages":
            raise UsageError(f"prompts={shown(prompts)} must be texts or lists of token ids; `chat` takes messages")
        kinds, first = {_kind(prompt) for prompt in prompts}, sampling.read(settings | {"seed": seed})
        if "ids" in kinds and kinds & {"text", "messages"}:
            raise UsageError("prompts mix texts and token ids; `model.prompt(text)` gives the ids of a text")
        requests = []
        for i, prompt in enumerate(prompts):
            drawing = dataclasses.replace(first, seed=seed + i)
            requests.append(_request(self._ids(prompt, f"prompts[{i}]"), max_new, drawing))
        if kinds and "ids" not in kinds:
            return self.texts(requests, _stops(stop))
        if stop:
            raise UsageError("stop strings end texts; prompts of ids end with a stop token")
        new = [[] for _ in requests]
        for i, piece in self.pieces(requests, MOST_DECODED):
            new[i] += piece.ids
        return new

    def chat(self, messages: str | Messages, max_new: int = 200, seed: int = 0, stop: Strings = (), **settings) -> str:
        """Return the assistant's answer to a conversation, such as [{"role": "user", "content": "Hello"}].

        A text is the conversation's only message. White space around the answer is left out.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if _kind(messages) != "messages":
            raise UsageError(f'messages={shown(messages)} must be a list such as [{{"role": "user", "content": "Hi"}}]')
        drawing = sampling.read(settings | {"seed": seed})
        return self.texts([_request(self._ids(messages), max_new, drawing)], _stops(stop))[0].strip()

    def _ids(self, prompt, name: str = "prompt") -> list[int]:
        """Return the ids of a text, of ids, or of messages that the assistant shall answer; raises UsageError."""
        kind = _kind(prompt)
        if kind == "messages":
            return [self.tokenizer.bos, *chat.encode(self.tokenizer, _turns(prompt), prompt=True)[0]]
        if not kind:
            raise UsageError(f"{name}={shown(prompt)} must be a text or a list of token ids")
        return self.prompt(prompt) if kind == "text" else [int(i) for i in prompt]

    def texts(self, requests: Sequence[Request], stop: Sequence[str]) -> list[str]:
        """Return the texts that answer requests, each before the first of the `stop` strings."""
        writers, texts = [Writer(self.tokenizer, stop, request.ids) for request in requests], [""] * len(requests)
        going = set(range(len(requests)))
        with contextlib.closing(self.pieces(requests, MOST_DECODED)) as pieces:
            for i, piece in pieces:
                texts[i] += writers[i].add(piece.ids)
                going -= {i} if piece.finish or writers[i].stopped else set()
                if not going:
                    break
        return [text + writer.end() for text, writer in zip(texts, writers)]

    def _text_pieces(self, request: Request, stop: Sequence[str], most: int) -> Iterator[str]:
        writer = Writer(self.tokenizer, stop, request.ids)
        with contextlib.closing(self.pieces([request], most)) as pieces:
            for _, piece in pieces:
                if text := writer.add(piece.ids):
                    yield text
                if writer.stopped:
                    return
        if rest := writer.end():
            yield rest

    def checked_sample(self, prompt: list[int], max_new: int, **settings) -> tuple[list[int], float]:
        """Return (new ids, mean difference in nats of their log-probabilities from those of the full forward pass)."""
        new, logprobs = [], []
        for piece in self.stream(prompt, max_new, logprobs=1, **settings):
            new, logprobs = new + piece.ids, logprobs + [logprob for logprob, _ in piece.logprobs]
        tokens = np.zeros((1, -(-(len(prompt) + len(new)) // PADDED) * PADDED), np.int32)
        tokens[0, : len(prompt) + len(new)] = prompt + new
        forward_TV = jax.nn.log_softmax(self.logits(tokens)[0, len(prompt) - 1 : len(prompt) + len(new) - 1])
        forward = np.take_along_axis(sharding.fetch(forward_TV), np.array(new)[:, None], axis=1)[:, 0]
        return new, float(np.abs(forward - np.array(logprobs)).mean())

    @overload
    def stream(self, prompt: list[int], max_new=..., logprobs=..., most=..., **settings) -> Iterator[Piece]: ...
    @overload
    def stream(self, prompt: str | Messages, max_new=..., *, stop: Strings = ..., **settings) -> Iterator[str]: ...
    def stream(self, prompt, max_new=200, logprobs=0, most=8, stop=(), **settings):
        """Iterate over what follows a prompt, as it comes: text for a text or for messages, a Piece for ids.

        Each item has up to `most` tokens; the first has one. Log-probabilities come with ids, `stop` is for texts.
        """
        request = _request(self._ids(prompt), max_new, sampling.read(settings), logprobs)
        if _kind(prompt) == "ids":
            if stop:
                raise UsageError("stop strings end texts; a prompt of ids ends with a stop token")
            return (piece for _, piece in self.pieces([request], most))
        if logprobs:
            raise UsageError("logprobs come with ids: stream model.prompt(text) instead of the text")
        return self._text_pieces(request, _stops(stop), most)

    def pieces(self, requests: Sequence[Request], most: int = 8) -> Iterator[tuple[int, Piece]]:
        """Yield (number of the request, piece) of up to `most` tokens until all requests are answered."""
        engine = self.engine(min(len(requests), SLOTS), max((len(r.ids) + r.max_new for r in requests), default=0))
        waiting, slots = list(enumerate(requests))[::-1], {}
        try:
            while waiting or slots:
                while waiting and engine.free:
                    i, request = waiting.pop()
                    slots[engine.add(request)] = i
                for slot, piece in engine.step(most).items():
                    i = slots.pop(slot) if piece.finish else slots[slot]
                    yield i, piece
        except KeyboardInterrupt:
            self.reset()
            raise
        finally:
            for slot in slots:
                engine.drop(slot)

    def prompt(self, text: str, history: Sequence[dict] = (), is_chat: bool = False) -> list[int]:
        """Return ids that begin a document with `text`, or ids of a conversation in which the user says it next."""
        if not is_chat:
            return [self.tokenizer.bos, *self.tokenizer.encode(text)]
        messages = [*history, {"role": "user", "content": text}]
        return [self.tokenizer.bos, *chat.encode(self.tokenizer, messages, prompt=True)[0]]


def _kind(prompt) -> str:
    """Return what a prompt is: "text", "ids" or "messages"; empty for anything else, as for a list of prompts."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list | tuple | np.ndarray) or getattr(prompt, "shape", None) == () or not len(prompt):
        return ""
    if all(isinstance(part, Integral) and not isinstance(part, bool) for part in prompt):
        return "ids"
    return "messages" if all(isinstance(part, dict) for part in prompt) else ""


def _turns(messages: Messages) -> list[dict]:
    """Return messages with the roles that templates know; raises UsageError for what the assistant cannot answer."""
    turns = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, 1)
            raise UsageError(
                f"messages[{i}] has the role {shown(role)}; use {near[0] if near else 'user or assistant'}"
            )
        if not isinstance(content, str):
            raise UsageError(f"messages[{i}] has the content {shown(content)}, which must be text")
        turns.append(message | {"role": ROLES[role]})
    if turns[-1]["role"] == "assistant":
        raise UsageError("the last message is the assistant's; end with one of the user's")
    return turns


def _stops(stop: Strings) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) and text for text in stops):
        raise UsageError(f"stop={shown(stop)} must be a text or a list of texts, none of them empty")
    return tuple(stops)


def _request(ids: list[int], max_new: int, drawing: sampling.Sampling, logprobs: int = 0) -> Request:
    request = Request(ids, max_new, drawing, logprobs)
    if max_new > MOST_NEW:
        raise UsageError(f"max_new must be at most {MOST_NEW:,}, not {shown(max_new)}")
    return request


def answer(model: Model, request: Request, stop: Sequence[str], show: Callable[[str], None]) -> dict:
    """Answer one request, pass each new text to `show`, and return the text, its tokens and their timing."""
    writer, text, ids, logprobs, finish = Writer(model.tokenizer, stop), "", [], [], "stop"
    engine = model.engine(1, len(request.ids) + request.max_new)
    if not engine.has_run:  # compile first, so that the model alone is timed
        for _ in model.pieces([dataclasses.replace(request, ids=[model.tokenizer.bos] * len(request.ids))], most=1):
            break
    started = first = time.monotonic()
    with contextlib.closing(model.pieces([request])) as pieces:
        for _, piece in pieces:
            first = first if ids else time.monotonic()
            ids, logprobs, finish = ids + piece.ids, logprobs + piece.logprobs, piece.finish or finish
            show(new := writer.add(piece.ids))
            text += new
            if writer.stopped:
                finish = "stop"
                break
    show(rest := writer.end())
    seconds = time.monotonic() - first
    facts = {"text": text + rest, "tokens": ids, "finish_reason": finish, "prefill_seconds": first - started}
    facts["tokens_per_s"] = (len(ids) - 1) / seconds if len(ids) > 1 else 0.0
    if request.logprobs:
        alternative = lambda i, logprob: {"id": i, "text": model.tokenizer.decode([i]), "logprob": logprob}
        entry = lambda i, logprob, top: {"id": i, "logprob": logprob, "top": [alternative(*other) for other in top]}
        facts["logprobs"] = [entry(i, *logprob) for i, logprob in zip(ids, logprobs)]
    return facts


@dataclasses.dataclass
class Conversation:
    """A conversation of at most `context` tokens; `ask` turns ids into a request, and `show` gets every text."""

    model: Model
    ask: Callable[[list[int]], Request]
    stop: Sequence[str]
    context: int
    system: str  # the system message; empty: none
    show: Callable[[str], None]
    turns: list[dict] = dataclasses.field(default_factory=list)

    def hold(self, first: str | None, reads: bool) -> dict:
        """Answer `first`, if any, and then every line of standard input if `reads`; return the last facts."""
        is_terminal, facts = sys.stdin.isatty(), {}
        if reads and is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - line editing and history for input()
            self.show(HELP)
        if first is not None:
            facts = self._turn(first) or facts
        while reads:
            try:
                line = input("> " if is_terminal else "").strip()
            except EOFError:
                self.show("\n" if is_terminal else "")
                break
            facts = self._turn(line) or facts
        return facts

    def _turn(self, line: str) -> dict | None:
        """Answer the user's next message and return the facts of the answer, or obey a command."""
        command, _, rest = line.partition(" ")
        if command in ("/reset", "/system"):
            self.system = rest.strip() if command == "/system" else self.system
            self.turns = []
        elif command.startswith("/") and command[1:].isalpha():
            self.show(f"unknown command {command}; use /system TEXT or /reset\n")
        elif line:
            return {"prompt": line} | self._reply(line)

    def _reply(self, text: str) -> dict:
        """Answer a message. If the context is full, the oldest turns are forgotten, but never the system message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        read = lambda: self.ask(self.model.prompt(text, system + self.turns, is_chat=True))
        while len((request := read()).ids) + request.max_new > self.context:
            if not self.turns:
                raise UsageError(f"a message of {len(request.ids)} tokens does not fit in --context={self.context}")
            self.turns = self.turns[2:]
            console.say("(the conversation no longer fits in the context: its oldest turn is forgotten)")
        shown = []

        def show(piece: str) -> None:
            shown.append(piece)
            self.show(piece)

        try:
            facts = answer(self.model, request, self.stop, show)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self.model.reset()
            facts = {"text": "".join(shown), "finish_reason": "stop"}
        self.show("\n")
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": facts["text"].strip()}]
        return facts
