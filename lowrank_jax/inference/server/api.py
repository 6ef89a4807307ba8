"""OpenAI's text API: the bodies of requests (Chat and Completion below), checked and read; answers.py has the rest.

- A field that is null, or has the value that the server implies (NEUTRAL), counts as absent.
- Fields that do not change the answer are ignored (IGNORED).
- All others are refused, such as tools, images and response formats, so that no client believes that it got them.
- Sampling's own fields are as sampling.Sampling describes them; `preset` sets them first. `seed` is random if absent.
- Answer i of `n` draws with `seed` + i.
"""

import dataclasses
import functools
import gc
import json
import operator
import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference.engine import MOST_ALTERNATIVES, Request
from lowrank_jax.inference.sampling import NUMBERS, PRESETS, Sampling

COMPLETION_TOKENS = 16  # OpenAI's default for completions
MOST_STOPS, MOST_STOP_LETTERS = 4, 1024
MOST_LOGPROBS = 100_000  # of one response, chosen tokens and alternatives: about 30 MB; a stream has no limit
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
IGNORED |= {"service_tier", "parallel_tool_calls"}
NEUTRAL = {"tools": ([],), "functions": ([],), "echo": (False,), "suffix": ("",), "best_of": (1,)}
NEUTRAL |= {"tool_choice": ("none", "auto"), "function_call": ("none", "auto")}
NEUTRAL |= {"response_format": ({"type": "text"},), "modalities": (["text"],)}
DRAWN = NUMBERS.keys() - {"seed"}
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_LETTERS)]
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)]
Prompts = str | Ids | Annotated[list[str | Ids], Field(min_length=1, fail_fast=True)]
PROMPTS = "a text, a list of texts, a list of token ids or a list of such lists, none of them empty"


CLIENT_GONE = 499  # the status in the metrics of a request whose client disconnected


class Problem(Exception):
    """An error of a request, as the client sees it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _field(default, description: str, **limits):
    """Return a pydantic field; error messages say that its value must be `description`."""
    return Field(default, description=description, **limits)


class Part(BaseModel):
    type: Literal["text"]
    text: str


Parts = Annotated[list[Part], Field(fail_fast=True)]  # a million errors would take a gigabyte


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"] = _field(..., "system, developer, user or assistant")
    content: str | Parts = _field(..., 'a text or a list of parts {"type": "text", "text": ...}')

    @model_validator(mode="before")
    @classmethod
    def _present(cls, message):  # clients send back the messages that they got, with empty fields
        if not isinstance(message, dict):
            return message
        extra = [k for k, v in message.items() if v and k != "name" and k not in cls.model_fields]
        return {k: message[k] for k in (*cls.model_fields, *extra[:1]) if k in message}

    def plain(self) -> dict:
        """Return the message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = False
    include_obfuscation: bool | None = False  # OpenAI pads its events; ours are not padded


class Body(BaseModel):
    """The fields that both routes take; their meaning is OpenAI's."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = _field(None, "a text")
    max_tokens: int | None = _field(None, "an integer, at least 1", ge=1)
    n: int = _field(1, "an integer, at least 1", ge=1)
    stop: Stops = _field([], f"a text or at most {MOST_STOPS} texts, each of 1 to {MOST_STOP_LETTERS} letters")
    stream: bool = _field(False, "true or false")
    stream_options: StreamOptions | None = _field(None, "an object with include_usage, which is true or false")
    preset: Literal[*PRESETS] | None = _field(None, f"one of {', '.join(PRESETS)}")
    logit_bias: dict = _field({}, "an object of token ids with a number from -100 to 100 each")
    seed: int | None = _field(None, "an integer")

    @model_validator(mode="before")
    @classmethod
    def _present(cls, fields: dict):
        neutral = lambda name, x: any(x == y and type(x) is type(y) for y in NEUTRAL.get(name, ()))
        return {k: v for k, v in fields.items() if not (v is None or k in IGNORED or neutral(k, v))}


class Chat(Body):
    messages: list[Message] = _field(..., "a list of messages, at least one", min_length=1, fail_fast=True)
    max_completion_tokens: int | None = _field(None, "an integer, at least 1", ge=1)
    logprobs: bool = _field(False, "true or false")
    top_logprobs: int = _field(0, f"an integer from 0 to {MOST_ALTERNATIVES}", ge=0, le=MOST_ALTERNATIVES)
    continue_final_message: bool = _field(False, "true or false")  # as in vLLM: go on with the last message's text


class Completion(Body):
    prompt: Prompts = _field(..., PROMPTS)
    logprobs: int | None = _field(None, f"an integer from 0 to {MOST_ALTERNATIVES}", ge=0, le=MOST_ALTERNATIVES)

    def prompts(self) -> list[str | list[int]]:
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt


@dataclass(frozen=True)
class Settings:
    """The model's name and the limits of the server."""

    model: str
    vocab: int
    context: int  # most tokens of a prompt and its answer
    max_tokens: int  # of an answer
    answers: int  # of one API call
    timeout: float = 600.0  # seconds from a call to the end of its answers
    keys: tuple[str, ...] = ()  # one of which clients must send; none: no key is needed
    origins: tuple[str, ...] = ()  # of pages of other sites that may use the server; "*": all
    hosts: tuple[str, ...] = ()  # names of this machine, beside its addresses and localhost
    cache_bytes: tuple[int, int] = (0, 0)  # of a token: in the cache, and in a dense model's
    most_letters: int = 1 << 22  # of a prompt: more never fit in the context
    reuses_prefixes_of_all: bool = True  # False: an answer is sped up by prompts of the same key alone


@dataclass(frozen=True)
class Call:
    """A checked API call, with a request to the engine for each answer."""

    is_chat: bool
    requests: tuple[Request, ...]  # `n` for each prompt, prompt by prompt
    prompt_tokens: int  # each prompt counts once
    stop: tuple[str, ...]
    logprobs: int | None  # alternatives per token in the response; None: no log-probabilities
    stream: bool
    include_usage: bool  # at the end of a stream
    begun: tuple[int, ...] = ()  # the last ids of the answer that is continued


def read(data: bytes, is_chat: bool, tokenizer: Tokenizer, settings: Settings, owner="", is_gone=lambda: False) -> Call:
    """Return the API call in a body of JSON; raises Problem if the server cannot answer it as it is meant.

    `owner` is the key's holder, whose prompts may share a prefix. Once `is_gone()` is true no further prompt is
    encoded.
    """
    fields = _json(data)
    drawn = {name: value for name in DRAWN if (value := fields.pop(name, None)) is not None}
    model = fields.get("model")
    if isinstance(model, str) and model != settings.model:
        message = f"the model {model[:100]!r} does not exist: this is {settings.model!r}"
        raise Problem(404, message, "model", "model_not_found")
    name = "messages" if is_chat else "prompt"
    if isinstance(listed := fields.get(name), list) and len(listed) > max(settings.context, settings.answers):
        message = f"{name} of {len(listed):,} parts do not fit in a context of {settings.context} tokens"
        raise Problem(400, message, name, "context_length_exceeded")  # before each is checked: 110,000 take a second
    body = _checked(Chat if is_chat else Completion, fields)
    sources = [body.messages] if is_chat else body.prompts()
    if body.n * len(sources) > settings.answers:  # before any of them is encoded
        name = "prompt" if len(sources) > settings.answers else "n"
        raise Problem(400, f"this server gives at most {settings.answers} answers to a request", name)
    if is_chat and body.top_logprobs and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    continues = is_chat and body.continue_final_message
    if continues and body.messages[-1].role != "assistant":
        raise Problem(400, "continue_final_message needs a last message of the assistant", "continue_final_message")
    if body.stream_options and not body.stream:
        raise Problem(400, "stream_options needs stream to be true", "stream_options")
    logprobs = (body.top_logprobs if body.logprobs else None) if is_chat else body.logprobs
    sampling, max_new = _sampling(body, drawn, settings), _max_tokens(body, is_chat, settings)
    alternatives = 0 if logprobs is None else max(1, logprobs)
    entries = body.n * len(sources) * max_new * (alternatives and 1 + alternatives)
    if entries > MOST_LOGPROBS and not body.stream:
        message = f"{entries:,} log-probabilities are more than the {MOST_LOGPROBS:,} of one response"
        raise Problem(400, f"{message}; ask for fewer tokens or alternatives, or for a stream", "logprobs")
    prompts = []
    for source in sources:
        if is_gone():
            raise Problem(CLIENT_GONE, "the client has left")
        prompts.append(_ids(source, is_chat, tokenizer, settings, continues))
    samplings = [dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**63) for i in range(body.n)]
    requests = tuple(Request(ids, max_new, drawing, alternatives, owner) for ids in prompts for drawing in samplings)
    usage, length = bool(body.stream_options and body.stream_options.include_usage), sum(map(len, prompts))
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    begun = tuple(prompts[0][-8:]) if continues and body.messages[-1].plain()["content"] else ()
    return Call(is_chat, requests, length, stop, logprobs, body.stream, usage, begun)


def _json(data: bytes) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    gc.disable()  # collections while a million lists are read would hold all threads for 0.2 s instead of 0.07 s
    try:
        fields = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise Problem(400, f"the body is not JSON: {' '.join(str(e).split())[:200]}") from None
    finally:
        gc.enable()
    if not isinstance(fields, dict):
        raise Problem(400, "the body must be a JSON object")
    return fields


def _checked(kind: type[Body], fields: dict) -> Body:
    """Return the body; raises Problem for the first wrong field: its path, its value, and what it must be."""
    known = {*kind.model_fields, *IGNORED, *NEUTRAL}
    for name in fields:
        if name not in known:
            raise Problem(400, f"unknown field {name[:100]!r}", name[:100], "unknown_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False)[0]
    depth = {"messages": 3, "stream_options": 2 if error["type"] == "extra_forbidden" else 1}
    place = error["loc"][: depth.get(error["loc"][0], 1)]  # of the wrong field
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:100]}" for part in place)[1:]
    if error["type"] == "extra_forbidden":
        code = None if place[0] == "messages" else "unsupported_parameter"
        raise Problem(400, f"{path} is not supported by this server", path, code)
    field = {1: kind.model_fields, 3: Message.model_fields}.get(len(place), {}).get(place[-1])
    description = field.description if field else "an object with role and content"
    if error["type"] == "missing" and error["loc"] == place:
        raise Problem(400, f"{path} is missing; it must be {description}", path)
    value = json.dumps(functools.reduce(operator.getitem, place, fields))[:60]
    raise Problem(400, f"{path}={value} must be {description}", path if field else "messages")


def _ids(
    source: list[Message] | str | list[int], is_chat: bool, tokenizer: Tokenizer, settings: Settings, continues=False
) -> list[int]:
    name = "messages" if is_chat else "prompt"
    letters = sum(len(m.plain()["content"]) + 1 for m in source) if is_chat else len(source)
    if letters > settings.most_letters or (is_chat and len(source) >= settings.context):
        message = f"a prompt of {letters:,} letters does not fit in a context of {settings.context} tokens"
        raise Problem(400, message, name, "context_length_exceeded")
    try:
        if is_chat:
            messages = [message.plain() for message in source]
            begun = tokenizer.encode(messages.pop()["content"]) if continues else []  # apart, as in training
            ids = [tokenizer.bos, *chat.encode(tokenizer, messages, prompt=True)[0], *begun]
        else:
            ids = [tokenizer.bos, *tokenizer.encode(source)] if isinstance(source, str) else source
    except UsageError as e:
        raise Problem(400, str(e), name) from None
    if unknown := [i for i in ids if not 0 <= i < settings.vocab]:
        raise Problem(400, f"{name} has the token id {unknown[0]}; ids go from 0 to {settings.vocab - 1}", name)
    if len(ids) >= settings.context:
        message = f"a prompt of {len(ids)} tokens and its answer must fit in a context of {settings.context}"
        raise Problem(400, message, name, "context_length_exceeded")
    return ids


def _max_tokens(body: Body, is_chat: bool, settings: Settings) -> int:
    name = "max_completion_tokens" if is_chat and body.max_completion_tokens else "max_tokens"
    default = min(settings.max_tokens, settings.context if is_chat else COMPLETION_TOKENS)
    max_tokens = getattr(body, name) or default
    if max_tokens > settings.max_tokens and settings.max_tokens < settings.context:
        raise Problem(400, f"{name} must be at most {settings.max_tokens}, not {max_tokens}", name)
    return min(max_tokens, settings.context)


def _sampling(body: Body, drawn: dict, settings: Settings) -> Sampling:
    values = dataclasses.asdict(PRESETS[body.preset]) if body.preset else {"temperature": 1.0}  # OpenAI's default
    values["seed"] = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    for key in body.logit_bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < settings.vocab):
            message = f"logit_bias has {key[:60]!r}; token ids go from 0 to {settings.vocab - 1}"
            raise Problem(400, message, "logit_bias")
    values["logit_bias"] = tuple((int(key), bias) for key, bias in body.logit_bias.items())
    try:
        return Sampling(**values | drawn)
    except UsageError as e:
        setting = re.match(r"\w+", str(e))  # the message begins with the setting's name
        raise Problem(400, str(e), setting[0] if setting and setting[0] in values | drawn else None) from None
