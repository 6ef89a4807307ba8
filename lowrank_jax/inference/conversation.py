"""A timed answer to one prompt, and a conversation in the terminal."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

from lowrank_jax.config import UsageError
from lowrank_jax.inference.engine import Request
from lowrank_jax.inference.session import Model
from lowrank_jax.inference.text_stream import Writer
from lowrank_jax.machine import console

HELP = "Type a message. /system TEXT sets the tone, /reset starts over, Ctrl-C stops an answer, Ctrl-D ends.\n"


def answer(model: Model, request: Request, stop: Sequence[str], show: Callable[[str], None]) -> dict:
    """Answer one request, pass each new text to `show`, and return the text, its tokens and their timing."""
    writer, text, ids, logprobs, finish = Writer(model.tokenizer, stop), "", [], [], "stop"
    if model.engine(1, len(request.ids) + request.max_new).fresh:  # compile first, so that the model alone is timed
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
    facts = {
        "text": text + rest,
        "tokens": ids,
        "finish_reason": finish,
        "prefill_seconds": first - started,
        "tokens_per_s": (len(ids) - 1) / seconds if len(ids) > 1 else 0.0,
    }
    if request.logprobs:
        alternative = lambda i, logprob: {"id": i, "text": model.tokenizer.decode([i]), "logprob": logprob}
        facts["logprobs"] = [
            {"id": i, "logprob": logprob, "top": [alternative(*other) for other in top]}
            for i, (logprob, top) in zip(ids, logprobs)
        ]
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
