"""A timed answer to one prompt, and a conversation in the terminal."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from lowrank_jax.config import UsageError
from lowrank_jax.inference.session import Model
from lowrank_jax.inference.text_stream import Writer
from lowrank_jax.machine import console


class Style(NamedTuple):
    """The settings of every answer."""

    max_new: int
    stop: tuple[str, ...]
    logprobs: int
    sampling: dict  # fields of sampling.Sampling
    context: int  # most tokens of a conversation


def answer(model: Model, prompt: list[int], style: Style, show: Callable[[str], None]) -> dict:
    """Continue one prompt, pass each new text to `show`, and return the text, its tokens and their timing."""
    writer, text, ids, logprobs, finish = Writer(model.tokenizer, style.stop), "", [], [], "stop"
    if model.engine(1, len(prompt) + style.max_new).fresh:  # compile first, so that the model alone is timed
        for _ in model.stream([model.tokenizer.bos] * len(prompt), style.max_new, most=1):
            break
    started = first = time.monotonic()
    with contextlib.closing(model.stream(prompt, style.max_new, style.logprobs, **style.sampling)) as pieces:
        for piece in pieces:
            first = first if ids else time.monotonic()
            ids, logprobs, finish = ids + piece.ids, logprobs + piece.logprobs, piece.finish or finish
            show(new := writer.add(piece.ids))
            text += new
            if writer.stopped:
                finish = "stop"
                break
    show(rest := writer.end())
    seconds = time.monotonic() - first
    facts = {
        "text": text + rest,
        "tokens": ids,
        "finish_reason": finish,
        "prefill_seconds": first - started,
        "tokens_per_s": (len(ids) - 1) / seconds if len(ids) > 1 else 0.0,
    }
    if style.logprobs:
        alternative = lambda i, logprob: {"id": i, "text": model.tokenizer.decode([i]), "logprob": logprob}
        facts["logprobs"] = [
            {"id": i, "logprob": logprob, "top": [alternative(*other) for other in top]}
            for i, (logprob, top) in zip(ids, logprobs)
        ]
    return facts


class Conversation:
    """A conversation whose messages are remembered; `show` gets every text for the user."""

    def __init__(self, model: Model, style: Style, system: str, show: Callable[[str], None]):
        self._model, self._style, self._show = model, style, show
        self._system, self._turns = _system(system), []

    def turn(self, line: str) -> dict | None:
        """Answer the user's next message and return the facts of the answer, or obey a command."""
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self._turns = []
        elif command == "/system":
            self._system, self._turns = _system(rest.strip()), []
        elif command.startswith("/") and command[1:].isalpha():
            self._show(f"unknown command {command}; use /system TEXT or /reset\n")
        elif line:
            return {"prompt": line} | self._reply(line)

    def _reply(self, text: str) -> dict:
        """Answer a message. If the context is full, the oldest turns are forgotten, but never the system message."""
        read = lambda: self._model.prompt(text, self._system + self._turns, is_chat=True)
        while len(ids := read()) + self._style.max_new > self._style.context:
            if not self._turns:
                raise UsageError(f"a message of {len(ids)} tokens does not fit in --context={self._style.context}")
            self._turns = self._turns[2:]
            console.say("(the conversation no longer fits in the context: its oldest turn is forgotten)")
        shown = []

        def show(piece: str) -> None:
            shown.append(piece)
            self._show(piece)

        try:
            facts = answer(self._model, ids, self._style, show)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self._model.reset()
            facts = {"text": "".join(shown), "finish_reason": "stop"}
        self._show("\n")
        self._turns += [{"role": "user", "content": text}, {"role": "assistant", "content": facts["text"].strip()}]
        return facts


def _system(text: str) -> list[dict]:
    return [{"role": "system", "content": text}] if text else []


def converse(conversation: Conversation, first: str | None, reads: bool, show: Callable[[str], None]) -> dict:
    """Answer `first`, if there is one, and then every line of standard input if `reads`; return the last facts."""
    is_terminal, facts = sys.stdin.isatty(), {}
    if reads and is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input()
        show("Type a message. /system TEXT sets the tone, /reset starts over, Ctrl-C stops an answer, Ctrl-D ends.\n")
    if first is not None:
        facts = conversation.turn(first) or facts
    while reads:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            show("\n" if is_terminal else "")
            break
        facts = conversation.turn(line) or facts
    return facts
