"""Answers to API calls in OpenAI's shapes: whole, or as the events of a stream."""

import contextlib
import functools
import time
import uuid
from typing import NamedTuple

from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference.engine import Piece
from lowrank_jax.inference.server.api import Call
from lowrank_jax.inference.text_stream import Writer


class Token(NamedTuple):
    """A token of an answer with its log-probability."""

    offset: int  # the place in the answer's text where it begins
    text: str
    data: bytes  # which may be part of a character
    logprob: float
    top: list[tuple[str, bytes, float]]  # text, bytes and log-probability of the most likely tokens, in order


class Answer:
    """An answer as its pieces arrive; unless the call is a stream, it keeps its `text` and `logprobs`.

    A token is sent with the text that it begins. So the symbol that ends an answer and the tokens behind a stop string
    are never sent.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer):
        self.finish = None
        self.tokens = 0  # up to and including the one that ended it
        self.parts: list[str] = []
        self.logprobs: list[Token] = []
        self._call, self._tokenizer, self._writer = call, tokenizer, Writer(tokenizer, call.stop, call.begun)
        self._sent = 0  # letters
        self._waiting: list[Token] = []

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def add(self, piece: Piece) -> tuple[str, list[Token]]:
        """Return the new text, and its tokens if the call asks for log-probabilities."""
        new = ""
        # Decoding ids one by one takes as long as all else here together: only where a token's place matters.
        size = 1 if self._call.logprobs is not None or self._call.stop else max(1, len(piece.ids))
        for n in range(0, len(piece.ids), size):
            ids, start = piece.ids[n : n + size], self._writer.decoded
            self.tokens += len(ids)
            new += self._writer.add(ids)
            if self._call.logprobs is not None:
                self._wait(ids[0], start, *piece.logprobs[n])
            if self._writer.stopped:
                break
        if piece.finish and not self._writer.stopped:
            new += self._writer.end()
        self.finish = "stop" if self._writer.stopped else piece.finish
        self._sent += len(new)
        tokens = [token for token in self._waiting if token.offset < self._sent]
        self._waiting = self._waiting[len(tokens) :]
        if not self._call.stream:
            self.parts.append(new)
            self.logprobs += tokens
        return new, tokens

    def _wait(self, i: int, start: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Queue a token until its text is sent; `start` letters were decoded before it."""
        text, data = _text_and_bytes(self._tokenizer, i)
        with contextlib.suppress(UnicodeDecodeError):  # whole letters are the end of what is decoded now
            start = max(start, self._writer.decoded - len(data.decode()))
        top = [(*_text_and_bytes(self._tokenizer, other), p) for other, p in top[: self._call.logprobs]]
        self._waiting.append(Token(start, text, data, logprob, top))


@functools.lru_cache(maxsize=1 << 16)
def _text_and_bytes(tokenizer: Tokenizer, i: int) -> tuple[str, bytes]:
    """Return a token's text and bytes; a control symbol has its name as both."""
    name = next((name for name, symbol in tokenizer.specials.items() if symbol == i), None)
    return (tokenizer.decode([i]), tokenizer.bytes_of(i)) if name is None else (name, name.encode())


class Reply:
    """The answers to one call, and the JSON objects that show them: whole, or as the events of a stream."""

    def __init__(self, call: Call, tokenizer: Tokenizer, model: str):
        self.answers = [Answer(call, tokenizer) for _ in call.requests]
        self._call, name = call, "chatcmpl" if call.is_chat else "cmpl"
        self._head = {"id": f"{name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self) -> dict:
        """Return the response to a call that is no stream."""
        message = lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}}
        content = message if self._call.is_chat else lambda text: {"text": text}
        choices = [self._choice(i, content(a.text), a.logprobs, a.finish) for i, a in enumerate(self.answers)]
        kind = "chat.completion" if self._call.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def first(self, i: int) -> dict:
        """Return the event of a chat stream that opens answer i."""
        return self._event(self._choice(i, {"delta": {"role": "assistant", "content": ""}}, [], None))

    def piece(self, i: int, text: str, tokens: list[Token]) -> dict:
        """Return the event of a stream for a new piece of answer i."""
        content = {"delta": {"content": text} if text else {}} if self._call.is_chat else {"text": text}
        return self._event(self._choice(i, content, tokens, self.answers[i].finish))

    def last(self) -> dict:
        """Return the event that ends a stream with `include_usage`."""
        return self._event() | {"usage": self._usage()}

    def _usage(self) -> dict:
        read, written = self._call.prompt_tokens, sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _event(self, *choices: dict) -> dict:
        kind = "chat.completion.chunk" if self._call.is_chat else "text_completion"
        usage = {"usage": None} if self._call.include_usage else {}
        return {**self._head, "object": kind, "choices": choices, **usage}

    def _choice(self, i: int, content: dict, tokens: list[Token], finish: str | None) -> dict:
        shape = _chat_logprobs if self._call.is_chat else _completion_logprobs
        logprobs = None if self._call.logprobs is None else shape(tokens)
        return {"index": i, **content, "logprobs": logprobs, "finish_reason": finish}


def _chat_logprobs(tokens: list[Token]) -> dict:
    entry = lambda text, data, logprob: {"token": text, "logprob": logprob, "bytes": list(data)}
    content = [entry(t.text, t.data, t.logprob) | {"top_logprobs": [entry(*other) for other in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: list[Token]) -> dict:
    likely = lambda t: reversed([(text, logprob) for text, _, logprob in t.top])
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        # If several tokens have the same text, the most likely one counts. The chosen token is always included.
        "top_logprobs": [{t.text: t.logprob} | dict(likely(t)) for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }
