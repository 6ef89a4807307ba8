"""The outlook of a run: the time to its end, the passes over its data, and advice where either makes no sense."""

from collections.abc import Sequence

from lowrank_jax.config import MOST_STEPS, RunConfig
from lowrank_jax.data import stream
from lowrank_jax.data.stream import Checked
from lowrank_jax.data.tokenizer import pieces_for
from lowrank_jax.model import costs
from lowrank_jax.training.plan import Stage, last_stage

MEASURED_STEPS, MEASURED_SECONDS = 5, 30.0  # a step is timed over so many steps, or fewer that take so long
LONGEST_ON_CPU, SENSIBLE_ON_CPU = 86_400, 3_600  # seconds of a run
# Up to 4 passes over text are worth almost as much as new text (arXiv 2305.16264).
MOST_PASSES, FEWEST_PASSES = 4, 0.05
VOCAB_SLACK = 4  # a vocabulary may be so many times as large as its corpus suggests


def corpus_bytes(checked: dict[str, dict[str, Checked]]) -> int:
    """Return about how many bytes the sources of all phases have; 0 where one of them does not tell."""
    sizes = {spec: source.bytes for sources in checked.values() for spec, source in sources.items()}
    return sum(sizes.values()) if all(sizes.values()) else 0


def passes(config: RunConfig, stages: Sequence[Stage], checked: dict) -> dict[str, dict[str, float]]:
    """Return how many times each phase reads each source of `stream.check`, without sources of unknown size."""
    counts = {}
    for phase, p in config.phases.items():
        steps = last_stage(stages, phase).phase_steps
        sizes = {spec: source.tokens for spec, source in checked.get(phase, {}).items() if source.tokens}
        firsts = sorted({step for source in p.sources for step, _ in source.weight if step < steps})
        reads = dict.fromkeys(sizes, 0.0)
        for first, end in zip(firsts, [*firsts[1:], steps]):
            for source, share in zip(p.sources, stream.mixture(p, first)):
                if source.spec in reads:
                    reads[source.spec] += (end - first) * p.tokens_per_step * share
        counts[phase] = {spec: count / sizes[spec] for spec, count in reads.items()}
    return counts


def seconds_left(config: RunConfig, stages: Sequence[Stage], done: int, seconds_per_flop: float) -> dict[str, float]:
    """Return the seconds that the remaining steps of each phase take, by their FLOPs; without evaluations and saves."""
    seconds = {}
    for s in stages:
        if (steps := s.end - max(s.start, done)) > 0:
            seconds[s.phase] = seconds.get(s.phase, 0.0) + steps * step_flops(config, s) * seconds_per_flop
    return seconds


def step_flops(config: RunConfig, stage: Stage) -> float:
    """Return the FLOPs of a step."""
    return costs.train_flops_per_token(config.model, stage.seq_len) * stage.tokens_per_step


def summary(seconds: dict[str, float], counts: dict[str, dict[str, float]]) -> str:
    """Return one line: the time to the run's end, by phase, and the passes over each source."""
    phases = ", ".join(f"{phase} {duration(value)}" for phase, value in seconds.items())
    lines = [f"{phase} reads {spec} {_times(n)}" for phase, reads in counts.items() for spec, n in reads.items()]
    total = f"about {duration(sum(seconds.values()))} to the end, evaluations and checkpoints not counted ({phases})"
    return "; ".join([total, *lines])


def data_warnings(config: RunConfig, stages: Sequence[Stage], counts: dict, corpus_bytes: int) -> list[str]:
    """Return a line for each source that is read too often or hardly, and for a vocabulary too large for its corpus."""
    lines, t = [], config.tokenizer
    for phase, reads in counts.items():
        steps, several = last_stage(stages, phase).phase_steps, len(reads) > 1
        for spec, count in reads.items():
            if count > MOST_PASSES:
                remedy = f"use more text, config.{phase}.steps={max(int(steps * MOST_PASSES / count), 1)}"
                remedy += ", or a lower weight for it" if several else ""
                lines.append(f"{phase} reads {spec} {_times(count)}, and more than {MOST_PASSES} add little; {remedy}")
            elif 0 < count < FEWEST_PASSES:
                whole = min(round(steps / count), MOST_STEPS)
                remedy = f"config.{phase}.steps={whole} would read it once"
                lines.append(f"{phase} reads only {count:.2%} of {spec}; {remedy}")
    pieces = pieces_for(corpus_bytes)
    if corpus_bytes and not (t.path or config.init_from) and config.model.vocab > VOCAB_SLACK * pieces:
        large = f"a vocabulary of {config.model.vocab:,} pieces is too large for {corpus_bytes / 1e6:.2g} MB of data"
        lines.append(f"{large}, as most pieces are seldom seen; config.tokenizer.vocab_size={pieces} suits it")
    return lines


def time_warning(config: RunConfig, stages: Sequence[Stage], seconds: dict[str, float], platform: str) -> str:
    """Return a line where a CPU would train for more than a day, with the steps of a run of an hour; else nothing."""
    total = sum(seconds.values())
    if platform != "cpu" or total <= LONGEST_ON_CPU:
        return ""
    share = SENSIBLE_ON_CPU / total
    steps = {phase: max(int(last_stage(stages, phase).phase_steps * share), 1) for phase in config.phases}
    shorter = " ".join(f"config.{phase}.steps={n}" for phase, n in steps.items())
    remedy = f"use a GPU or TPU, a smaller model (the quickstart's has model.d=256 and model.layers=4), or {shorter}"
    return f"{duration(total)} on a CPU is very long; {remedy}, which takes about an hour"


def duration(seconds: float) -> str:
    """Return a time in its fitting unit: 45 s, 12 min, 5.3 h, 9.2 days."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:,.1f} days"


def _times(count: float) -> str:
    return f"{count:,.0f} times" if count >= 10 else f"{count:.2g} times"
