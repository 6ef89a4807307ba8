"""A request's answers: tokens to text as they come, in the shapes of OpenAI's text API."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference.engine import Piece
from lowrank_jax.inference.server.api import Question
from lowrank_jax.inference.text_stream import Writer


@dataclass(frozen=True)
class Told:
    """A token with its log-probability."""

    at: int  # where in the answer's text it begins
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]  # the likeliest, from the most on


class Answer:
    """One answer as its pieces come: `add` returns what the client can be told of each.

    A token is told with the text that it begins, so neither is the symbol that ends an answer, nor what lies behind a
    stop string.
    """

    def __init__(self, question: Question, tokenizer: Tokenizer):
        self.finish: str | None = None
        self.tokens = 0  # up to and including the one that ended it
        self._written = 0  # characters
        self._question, self._tokenizer = question, tokenizer
        self._writer, self._places = Writer(tokenizer, question.stop), Writer(tokenizer)
        self._read = 0  # characters that `_places` wrote: what stop strings hold back is in it
        self._waiting: list[Told] = []
        self._symbols = {i: name for name, i in tokenizer.specials.items()}

    def add(self, piece: Piece) -> tuple[str, list[Told]]:
        """The new text, and the tokens of it if the question asks for them."""
        new = ""
        for at, i in enumerate(piece.ids):
            self.tokens += 1
            if self._question.logprobs is not None:
                self._tell(i, *piece.logprobs[at])
            new += self._writer.add([i])
            if self._writer.stopped:
                break
        if piece.finish and not self._writer.stopped:
            new += self._writer.end()
        self.finish = "stop" if self._writer.stopped else piece.finish
        self._written += len(new)
        told = [token for token in self._waiting if token.at < self._written]
        self._waiting = self._waiting[len(told) :]
        return new, told

    def _tell(self, i: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        top = tuple((self._text(other), p) for other, p in top[: self._question.logprobs])
        self._waiting.append(Told(self._read, self._text(i), logprob, top))
        self._read += len(self._places.add([i]))

    def _text(self, i: int) -> str:
        return self._symbols[i] if i in self._symbols else self._tokenizer.decode([i])


class Shapes:
    """The objects of one response."""

    def __init__(self, question: Question, model: str):
        self._question, kind = question, ("chatcmpl-" if question.is_chat else "cmpl-")
        self._head = {"id": kind + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, texts: list[str], told: list[list[Told]], answers: list[Answer]) -> dict:
        """The response to a request that is no stream."""
        choices = []
        for i, (text, tokens, answer) in enumerate(zip(texts, told, answers)):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self._question.is_chat else {"text": text}
            choices.append(self._choice(i, said, tokens, answer.finish))
        kind = "chat.completion" if self._question.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage(answers)}

    def first(self, i: int) -> dict:
        """What a stream says before the first piece of an answer."""
        return self._chunk([self._choice(i, {"delta": {"role": "assistant", "content": ""}}, [], None)])

    def piece(self, i: int, text: str, told: list[Told], finish: str | None) -> dict:
        """What a stream says of a new piece."""
        said = {"delta": {"content": text} if text else {}} if self._question.is_chat else {"text": text}
        return self._chunk([self._choice(i, said, told, finish)])

    def last(self, answers: list[Answer]) -> dict:
        """What a stream with `include_usage` ends with."""
        return self._chunk([]) | {"usage": self.usage(answers)}

    def usage(self, answers: list[Answer]) -> dict:
        """Tokens read and written; a prompt counts once, however many answers it gets."""
        read, written = sum(map(len, self._question.prompts)), sum(answer.tokens for answer in answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _chunk(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self._question.is_chat else "text_completion"
        usage = {"usage": None} if self._question.tells_usage else {}
        return {**self._head, "object": kind, "choices": choices, **usage}

    def _choice(self, i: int, said: dict, told: list[Told], finish: str | None) -> dict:
        shape = _chat_logprobs if self._question.is_chat else _completion_logprobs
        logprobs = None if self._question.logprobs is None else shape(told)
        return {"index": i, **said, "logprobs": logprobs, "finish_reason": finish}


def _chat_logprobs(told: list[Told]) -> dict:
    # A text with U+FFFD is a part of a character, whose bytes it does not tell.
    bytes_of = lambda text: None if "\ufffd" in text else list(text.encode())
    entry = lambda text, logprob: {"token": text, "logprob": logprob, "bytes": bytes_of(text)}
    content = [entry(t.text, t.logprob) | {"top_logprobs": [entry(*other) for other in t.top]} for t in told]
    return {"content": content, "refusal": None}


def _completion_logprobs(told: list[Told]) -> dict:
    return {
        "tokens": [t.text for t in told],
        "token_logprobs": [t.logprob for t in told],
        # Of tokens with the same text the likeliest counts; the chosen one is always there.
        "top_logprobs": [{t.text: t.logprob} | dict(reversed(t.top)) for t in told],
        "text_offset": [t.at for t in told],
    }
