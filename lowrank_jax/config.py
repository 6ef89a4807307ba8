"""Every setting of a run as frozen, hashable dataclasses: the only form that exists below the command line.

`RunConfig.from_dict` rejects unknown keys, wrong types and impossible values, each in one line that names the key.
configs/default.py explains every key beside its default.
"""

import dataclasses
import json
import math
import os
import re
import reprlib
import typing
from dataclasses import dataclass
from typing import Annotated

from lowrank_jax import keys


class UsageError(Exception):
    """A mistake in a command, a config or the data; commands print it as one line and exit with status 2."""


class RunFailure(Exception):
    """A run that cannot go on, for a reason that one line explains; exit status 1."""


_LIMITS = {
    **{f"at least {least}": lambda number, least=least: number >= least for least in (-1, 0, 1)},
    "above 0": lambda number: number > 0,
    **{f"between 0 and {most}": lambda number, most=most: 0 <= number <= most for most in (0.5, 1)},
    "at least 0 and below 1": lambda number: 0 <= number < 1,
}
# A type may also state the largest value, which no machine holds, so that nothing is allocated or compiled for it.
MOST_STEPS, MOST_LENGTH, MOST_TOKENS, MOST = 10**9, 2**24, 2**28, 10**15  # of a phase, a row, a step, anything else
MOST_ITEMS, MOST_CHARACTERS = 1000, 10**5  # of a list, of a text
TOO_MANY = f"has more than {MOST_ITEMS:,} items"
IN_BUCKET = r"(--workdir|--bucket|workdir|folder|config.init_from)=(gs|s3|memory)://[^/]+/."  # memory is for tests
RECORDED = "tokenizer_sha256"  # a key beside the settings in a run's config.json, see run_folder.py
Count, Size, Amount = Annotated[int, "at least 0"], Annotated[int, "at least 1"], Annotated[float, "at least 0"]
Share, Decay = Annotated[float, "between 0 and 1"], Annotated[float, "at least 0 and below 1"]
LocalPath = typing.NewType("LocalPath", str)
Schedule = tuple[tuple[int, float], ...]  # (first step, value) pairs with rising steps from 0


@dataclass(frozen=True)
class ModelConfig:
    vocab: Annotated[Count, 2**24]
    d: Annotated[Size, 2**17]
    layers: Annotated[Size, 2**10]
    heads: Size
    kv_heads: Count
    rank: Count
    rank_split: tuple[float, ...]
    shared_kv: bool
    latent_norm: bool
    mlp: Annotated[Count, 2**20]
    mlp_rank: Annotated[Count, 2**17]
    embed_rank: Annotated[Count, 2**17]
    tied: bool
    attention: Annotated[str, ("auto", "reference", "chunked", "cudnn", "splash", "native")]
    scan: bool
    remat: bool

    @property
    def head_dim(self) -> int:
        return self.d // self.heads

    @property
    def kv_dim(self) -> int:
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def hidden(self) -> int:
        """Return the SwiGLU's width: 8/3 d, so three matrices have the 8 d^2 of a classic 4d MLP, in steps of 64."""
        return self.mlp or -(-8 * self.d // 3 // 64) * 64

    @property
    def ranks(self) -> tuple[int, int, int, int]:
        """Return the ranks of Q, K, V and O: 4 x `rank` divided by `rank_split`, by the largest remainders.

        0 is dense: all with `rank` 0, else those whose share is 0. With `shared_kv`, K and V have the mean of theirs.
        """
        shares = [4 * self.rank * s / sum(self.rank_split) for s in self.rank_split]
        ranks = [int(s) for s in shares]
        by_remainder = sorted(range(4), key=lambda i: (ranks[i] - shares[i], i))
        for i in by_remainder[: 4 * self.rank - sum(ranks)]:
            ranks[i] += 1
        q, k, v, o = ranks
        return (q, (k + v + 1) // 2, (k + v + 1) // 2, o) if self.shared_kv else (q, k, v, o)


@dataclass(frozen=True)
class SourceConfig:
    spec: str
    weight: Schedule
    text_key: str
    messages_key: str
    split: str


@dataclass(frozen=True)
class PhaseConfig:
    sources: tuple[SourceConfig, ...]
    steps: Annotated[int, "at least -1", MOST_STEPS]
    tokens_per_param: Amount
    tokens_per_step: Annotated[Size, MOST_TOKENS]
    microbatch_tokens: Count
    block: Annotated[Size, MOST_LENGTH]
    auto_grow: bool
    grow_plan: tuple[int, ...]
    grow_every_steps: int
    lr: Annotated[float, "above 0"]
    lr_core: Amount
    lr_head: Amount
    freeze: str
    schedule: Annotated[str, ("wsd", "cosine", "linear")]
    warmup: Share
    cooldown: Share
    lr_end: Share
    eval_fraction: Annotated[float, "between 0 and 0.5"]
    eval_tokens: Size
    max_skipped: Count
    readers: Annotated[Count, 2**12]
    sample: str

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the sequence lengths in order: the block, then every longer length of the growth plan."""
        return (self.block, *(n for n in self.grow_plan if n > self.block)) if self.auto_grow else (self.block,)


@dataclass(frozen=True)
class OptimConfig:
    name: Annotated[str, ("muon", "adamw")]
    beta1: Decay
    beta2: Decay
    weight_decay: Amount
    clip: Amount
    z_loss: Amount
    label_smoothing: Decay
    ema: Decay
    skip_sigma: Amount


@dataclass(frozen=True)
class MeshConfig:
    data: Count
    fsdp: Count
    tensor: Count


@dataclass(frozen=True)
class TokenizerConfig:
    path: LocalPath
    vocab_size: Annotated[Count, 2**24]
    train_bytes: Size


@dataclass(frozen=True)
class EveryConfig:
    log: Size
    eval: Size
    save: Size
    save_minutes: Amount
    keep: Size
    fp8_check: Size
    tasks: Count


@dataclass(frozen=True)
class RunConfig:
    seed: Annotated[Count, 2**63 - 1]
    precision: Annotated[str, ("auto", "fp32", "bf16", "fp16", "fp8")]
    memory_gb: Amount
    init_from: LocalPath
    track: Annotated[tuple[str, ...], ("tensorboard", "wandb", "mlflow")]
    profile: Count
    tasks: tuple[str, ...]
    task_limit: Count
    model: ModelConfig
    mesh: MeshConfig
    optim: OptimConfig
    tokenizer: TokenizerConfig
    pretrain: PhaseConfig
    sft: PhaseConfig
    every: EveryConfig

    @classmethod
    def from_dict(cls, values: dict) -> "RunConfig":
        """Build and check a config from plain nested values; raises UsageError in one line.

        SFT needs weights to start from: without `init_from`, `pretrain.steps=0` still means -1, as in older configs.
        """
        values = {k: x for k, x in values.items() if k != RECORDED} if isinstance(values, dict) else values
        config = _build(cls, values, "config")
        if config.pretrain.steps == 0 and not config.init_from:
            config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, steps=-1))
        _check_values(config, "config")
        for name in ("model", "mesh", "optim", "tokenizer", "every"):
            _check_values(getattr(config, name), f"config.{name}")
        _check_model(config.model)
        nothing = "config.pretrain.steps=0 and config.sft.steps=0 leave nothing to train; raise one of them"
        _require(config.phases, f"{nothing}, or use config.pretrain.steps=-1 for config.pretrain.tokens_per_param")
        for name, phase in config.phases.items():
            _check_phase(phase, f"config.{name}")
        return config

    @property
    def phases(self) -> dict[str, PhaseConfig]:
        """Return the phases that have steps, by name, in their order."""
        return {name: p for name, p in (("pretrain", self.pretrain), ("sft", self.sft)) if p.steps}

    def to_dict(self) -> dict:
        """Return plain nested values that `from_dict` takes back."""
        return dataclasses.asdict(self)

    def with_vocab(self, vocab: int) -> "RunConfig":
        """Return the config with the tokenizer's size; raises UsageError where the config has another size."""
        size = f"config.model.vocab={self.model.vocab}"
        _require(self.model.vocab in (0, vocab), f"{size} but the tokenizer has {vocab} pieces; set it to 0")
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab=vocab))


def local_path(text: str | os.PathLike, what: str) -> str:
    """Return a local path with its `~` expanded, or a run's address in a bucket; raises UsageError for others."""
    path, stated = os.path.expanduser(text := os.fspath(text)), f"{what}={text:.200}".replace("\0", "\\0")
    scheme = re.match(r"\s*[A-Za-z][\w+-]*:/", text) and not re.match(IN_BUCKET, stated)
    _require(not scheme, f"{stated} is no local path, and only local paths are supported; copy or mount it")
    _require(path[:1] != "~", f"{stated} names no home folder; write ./{text:.200} for a folder of that name")
    _require("\0" not in path, f"{stated} has a NUL character, which no path can have")
    return path


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 200


def shown(value) -> str:
    """Return a value as an error shows it: shortened, whatever its size."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _build(cls, values, path: str):
    _require(isinstance(values, dict), f"{path} must be a group of keys, not {shown(values)}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UsageError(keys.unknown(str(key), path, hints, {} if cls is SourceConfig else keys.tree(RunConfig)))
    for key in hints:
        _require(key in values, f"config key {path}.{key} is missing; see configs/default.py")
    return cls(**{key: _convert(hint, values[key], f"{path}.{key}") for key, hint in hints.items()})


def _convert(hint, value, path: str):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if hint == tuple[SourceConfig, ...]:
        return read_sources(value, path)
    if hint is LocalPath:
        return local_path(_convert(str, value, path), path)
    if hint == Schedule:
        return _read_schedule(value, path)
    if typing.get_origin(hint) is tuple:
        items = re.split(r"[,\s]+", value.strip("()[] ")) if isinstance(value, str) else value
        kind = typing.get_args(hint)[0]
        example = {int: "256,512,1024", float: "1,1,3,3", str: "tensorboard,wandb"}[kind]
        _require(isinstance(items, (list, tuple)), f"{path}={shown(value)} must be a list, such as {example}")
        _require(len(items) <= MOST_ITEMS, f"{path} {TOO_MANY}")
        return tuple(_convert(kind, item, path) for item in items if item != "")
    if hint in (bool, str) and isinstance(value, hint):
        is_short = hint is bool or len(value) <= MOST_CHARACTERS
        _require(is_short, f"{path}={shown(value)} must have at most {MOST_CHARACTERS:,} characters")
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = (keys.whole if hint is int else float)(value) if isinstance(value, (int, float, str)) else math.nan
            if (hint is float or isinstance(value, str) or number == value) and abs(number) < math.inf:  # 3.5 is no int
                _require(abs(number) < 2**63, f"{path}={shown(value)} must be below 2**63")
                return number + 0  # 0.0 for -0.0
        except (ValueError, OverflowError):
            pass
    kind = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[hint]
    raise UsageError(f"{path}={shown(value)} must be {kind}")


def read_sources(value, path: str) -> tuple[SourceConfig, ...]:
    """Return sources from `kind:location@weight, ...`, or from a list (or its JSON text) of such texts and groups."""
    items = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            items = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{path} is not a JSON list: {e}") from None
    elif isinstance(value, str):
        items = [s.strip() for s in re.split(r"[,\n]", value) if s.strip()]
    _require(isinstance(items, list | tuple), f"{path}={shown(value)} must be text such as text:my/*.txt, or a list")
    _require(len(items) <= MOST_ITEMS, f"{path} {TOO_MANY}")
    defaults = {"weight": 1.0, "text_key": "text", "messages_key": "messages", "split": "train"}
    sources = []
    for i, item in enumerate(items):
        if isinstance(item, str):  # kind:location, kind:location@weight or kind:location@step:weight/step:weight
            spec, weight = re.fullmatch(r"(.*?)(?:@(\d[\d.:/]*))?", item, re.DOTALL).groups()
            item = {"spec": spec} | ({"weight": weight} if weight else {})
        _require(isinstance(item, dict), f"{path}[{i}]={shown(item)} must be text or a group of keys")
        source = _build(SourceConfig, defaults | item, f"{path}[{i}]")
        spec = f"{path}[{i}]={shown(source.spec)}"
        _require(re.match(r"\w+:.", source.spec), f"{spec} must be kind:location, such as text:my/*.txt")
        sources.append(source)
        _require(sum(len(s.weight) for s in sources) <= MOST_ITEMS, f"{path}: the list of their weights {TOO_MANY}")
    return tuple(sources)


def _read_schedule(value, path: str) -> Schedule:
    """Read a number, or (step, number) pairs: ((0, 0.7), (1000, 0.3)), {0: 0.7, 1000: 0.3} or "0:0.7/1000:0.3"."""
    if isinstance(value, str) and ":" in value:
        value = [pair.split(":") for pair in value.split("/", MOST_ITEMS)]
    pairs = value.items() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [(0, value)]
    _require(len(pairs) <= MOST_ITEMS, f"{path} {TOO_MANY}")
    try:
        schedule = tuple((_convert(int, step, path), _convert(float, number, path)) for step, number in pairs)
    except (TypeError, ValueError):
        raise UsageError(f"{path}={shown(value)} must be a number, or pairs of a step and a number") from None
    steps = [step for step, _ in schedule]
    _require(steps[:1] == [0] and sorted(set(steps)) == steps, f"{path}: the steps of {shown(value)} must rise from 0")
    _require(min(number for _, number in schedule) >= 0, f"{path}={shown(value)} must be at least 0")
    _require(max(number for _, number in schedule) > 0, f"{path}={shown(value)} must be above 0 at some step")
    return schedule


def _require(ok, message: str) -> None:
    if not ok:
        raise UsageError(message)


def _check_values(group, path: str) -> None:
    for key, hint in typing.get_type_hints(type(group), include_extras=True).items():
        value, (limit, *most) = getattr(group, key), getattr(hint, "__metadata__", [None])
        if isinstance(limit, str):
            _require(_LIMITS[limit](value), f"{path}.{key}={value} must be {limit}")
            _require(value <= (most or [MOST])[0], f"{path}.{key}={value} must be at most {(most or [MOST])[0]}")
        elif limit:
            for word in value if isinstance(value, tuple) else [value]:
                _require(word in limit, f"{path}.{key}={shown(word)} must be one of {', '.join(limit)}")


def _check_model(m: ModelConfig) -> None:
    path = "config.model"
    near = min((h for h in range(1, m.d + 1) if m.d % h == 0), key=lambda h: abs(h - m.heads))
    _require(near == m.heads, f"{path}.heads={m.heads} does not divide {path}.d={m.d}; use {near}")
    _require(m.rank <= m.d, f"{path}.rank={m.rank} must not exceed {path}.d={m.d}")
    _require(m.heads % (m.kv_heads or 1) == 0, f"{path}.kv_heads={m.kv_heads} does not divide {path}.heads; use 1")
    good_split = len(m.rank_split) == 4 and min(m.rank_split) >= 0 and min(m.rank_split[1:3]) > 0
    _require(good_split, f"{path}.rank_split={shown(m.rank_split)} must be four shares above 0, for q,k,v,o; q,o: or 0")
    _require(m.rank > 0 or not m.shared_kv, f"{path}.shared_kv needs latents; set {path}.rank above 0")
    too_small = m.rank > 0 and any(rank < 1 for rank, share in zip(m.ranks, m.rank_split) if share)
    _require(not too_small, f"{path}.rank={m.rank} gives a projection rank 0; raise it or even out {path}.rank_split")


def _check_phase(p: PhaseConfig, path: str) -> None:
    _require(len(p.sources) > 0, f"{path}.sources is empty; name at least one, such as text:my/*.txt")
    _check_values(p, path)
    _require(p.steps > 0 or p.tokens_per_param > 0, f"{path}.steps and {path}.tokens_per_param give no steps; set one")
    _require(p.warmup + p.cooldown <= 1, f"{path}.warmup={p.warmup} + {path}.cooldown={p.cooldown} must not exceed 1")
    for first in sorted({step for s in p.sources for step, _ in s.weight}):
        weights = [[w for step, w in s.weight if step <= first][-1] for s in p.sources]
        _require(any(weights), f"{path}.sources: every weight is 0 from step {first} on; keep one above 0")
    try:
        re.compile(p.freeze)
    except (re.error, RecursionError, OverflowError) as e:
        raise UsageError(f"{path}.freeze={shown(p.freeze)} is not a regular expression: {e}") from None
    if p.auto_grow:
        _require(len(p.grow_plan) > 0, f"{path}.grow_plan is empty; set it, or set {path}.auto_grow=False")
        plan = f"{path}.grow_plan={shown(p.grow_plan).strip('(),').replace(' ', '')}"
        _require(all(a < b for a, b in zip(p.grow_plan, p.grow_plan[1:])), f"{plan} must rise from length to length")
        _require(p.grow_plan[-1] <= MOST_LENGTH, f"{plan} must be at most {MOST_LENGTH}")
        advice = "lower the block, or start the plan with it"
        _require(p.block <= p.grow_plan[0], f"{plan} starts below {path}.block={p.block}; {advice}")
        _require(p.grow_every_steps >= 1, f"{path}.grow_every_steps={p.grow_every_steps} must be at least 1")
    _check_rows(p, path)


def _check_rows(p: PhaseConfig, path: str) -> None:
    """Raise UsageError where a step is no whole number of rows of every length, or its readers cannot share them."""
    unit, tokens = math.lcm(*p.lengths), f"{path}.tokens_per_step={p.tokens_per_step}"
    good = max(p.tokens_per_step // unit, 1) * unit
    advice = f"use {good} (tokens per step stay the same while the length grows)"
    advice = advice if good <= MOST_TOKENS else "use lengths with a smaller common multiple"
    for n in p.lengths:
        _require(p.tokens_per_step % n == 0, f"{tokens} is not a multiple of the sequence length {n}; {advice}")
    all_rows = [p.tokens_per_step // n for n in p.lengths]
    good = max((n for n in range(1, p.readers) if math.gcd(*all_rows) % n == 0), default=1)
    for n, rows in zip(p.lengths, all_rows):
        shares = f"{path}.readers={p.readers} must divide the {rows} rows of {n} tokens of a step"
        _require(not p.readers or rows % p.readers == 0, f"{shares}; use {good}")
