"""Write the Markdown tables and plots of docs/results.md from the results of scripts/studies/experiment.py.

A line of the results is one run. A difference is taken within a seed, between an arm and its study's reference, each at
its own best learning rate. ± is a 95% confidence interval of a mean difference over seeds.
"""

import os
import statistics

from scipy import stats

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.training import run_folder
from scripts.studies.arms import STUDIES, cache_of


def key(row: dict) -> tuple[str, float, int]:
    return row["arm"], row["lr"], row["seed"]


def read(folder: str, study: str) -> list[dict]:
    """Return the results of a study, the latest of each run, in the order of the study's arms."""
    rows = list({key(row): row for row in run_folder.read_rows(folder, f"{study}.jsonl")}.values())
    arms = list(STUDIES[study]["arms"])
    rows = [row for row in rows if row["arm"] in arms]
    return sorted(rows, key=lambda row: (arms.index(row["arm"]), row["lr"], row["seed"]))


def arms_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def runs_of(rows: list[dict], arm: str, lr: float) -> list[dict]:
    return [row for row in rows if (row["arm"], row["lr"]) == (arm, lr)]


def best_lr(rows: list[dict], arm: str) -> float:
    """Return the learning rate with the lowest mean among those with the most seeds: no lucky seed decides alone."""
    lrs = sorted({row["lr"] for row in rows if row["arm"] == arm})
    most = max(len(runs_of(rows, arm, lr)) for lr in lrs)
    whole = [lr for lr in lrs if len(runs_of(rows, arm, lr)) == most]
    return min(whole, key=lambda lr: statistics.mean(row["bits_per_byte"] for row in runs_of(rows, arm, lr)))


def best(rows: list[dict], arm: str) -> list[dict]:
    """Return an arm's runs at its best learning rate."""
    return runs_of(rows, arm, best_lr(rows, arm)) if arm in arms_of(rows) else []


def paired(rows: list[dict], arm: str, reference: str) -> list[float]:
    """Return bits per byte of an arm less the reference's, for every seed that both have.

    Raises RunFailure if batches of the same shapes had other data: then the runs cannot be compared.
    """
    by_seed, reference_by_seed = ({row["seed"]: row for row in best(rows, name)} for name in (arm, reference))
    seeds = sorted(set(by_seed) & set(reference_by_seed))
    for seed in seeds:
        a, b = by_seed[seed], reference_by_seed[seed]
        if a["rows"] == b["rows"] and a["data_sha256"] != b["data_sha256"]:
            raise RunFailure(f"{arm} has read other data than {reference} with seed {seed}; run both again")
    return [by_seed[s]["bits_per_byte"] - reference_by_seed[s]["bits_per_byte"] for s in seeds]


# ------------------------------------------------------------------------------------------------------------- tables


def of_study(study: str, rows: list[dict]) -> str:
    """Return the tables of a study, with the command and commits of its lines."""
    if not rows:
        return f"No runs of `{study}` yet."
    parts = [quality(study, rows)]
    if "lengths" in rows[0]:
        parts += [lengths(rows), positions(rows)]
    else:
        parts += beside(study, rows)
    if STUDIES[study].get("growing"):
        parts.append(growth(study, rows))
    return "\n\n".join([*parts, provenance(study, rows)])


def quality(study: str, rows: list[dict]) -> str:
    """Return a table of every arm at every learning rate, and its difference to the reference."""
    reference, lrs = STUDIES[study]["reference"], sorted({row["lr"] for row in rows})
    head = ["arm", "parameters", "attention", "TFLOP", "Mtokens", "cache", *(f"lr {lr:g}" for lr in lrs)]
    lines = [[*head, f"minus {reference}, each at its best rate", "seeds"]]
    for arm in arms_of(rows):
        row, less = best(rows, arm)[0], paired(rows, arm, reference)
        sizes = [f"{row['parameters'] / 1e6:.2f}M", f"{row['attention'] / 1e6:.2f}M"]
        sizes += [f"{row['flops'] / 1e12:.1f}", f"{row['tokens'] / 1e6:.2f}", str(cache_of(study, arm))]
        cells = [mean([r["bits_per_byte"] for r in runs_of(rows, arm, lr)]) for lr in lrs]
        lines.append([arm, *sizes, *cells, interval(less), str(len(less))])
    return markdown(lines)


def beside(study: str, rows: list[dict]) -> list[str]:
    """Return a table of arms and those with at least as many parameters or FLOPs, by the study's `limits`."""
    head = ["arm", "compared with", "parameters", "FLOPs", "tokens", "cache"]
    lines = [[*head, "bits per byte, arm minus other", "lower in"]]
    for arm, than, *_ in STUDIES[study]["limits"]:
        if less := paired(rows, arm, than):
            row, other = best(rows, arm)[0], best(rows, than)[0]
            shares = [f"{row[name] / other[name]:.2f}" for name in ("parameters", "flops", "tokens")]
            shares.append(f"{cache_of(study, arm) / cache_of(study, than):.2f}")
            lower = f"{sum(x < 0 for x in less)} of {len(less)}"
            lines.append([arm, than, *shares, interval(less), lower])
    return [markdown(lines)] if len(lines) > 1 else []


def lengths(rows: list[dict]) -> str:
    """Return bits per byte of the same targets at each length, averaged over kinds of text; last, the control."""
    columns = list(next(iter(rows[0]["lengths"].values())))
    names = [f"windowed, at {columns[-2]}" if c == "window" else f"at {c}" for c in columns]
    lines = [["arm", *names, f"{columns[-2]} minus {columns[0]}", "seeds"]]
    for arm in arms_of(rows):
        runs = best(rows, arm)
        by_column = {c: [_over_kinds(row, c)[0] for row in runs] for c in columns}
        grown = [b - a for a, b in zip(by_column[columns[0]], by_column[columns[-2]])]
        lines.append([arm, *(mean(by_column[c]) for c in columns), interval(grown), str(len(runs))])
    return markdown(lines)


def positions(rows: list[dict]) -> str:
    """Return bits per byte by position in the longest rows, and of the same targets in the shortest rows."""
    columns = list(next(iter(rows[0]["lengths"].values())))
    shortest, longest = columns[0], columns[-2]
    spans = ["0-256", "256-512", "512-1024", "1024-2048", "2048-4096"]
    count = len(_over_kinds(rows[0], longest)) - 1
    lines = [["arm", "rows of", *spans[:count]]]
    for arm in arms_of(rows):
        for column, shown in ((longest, longest), ("window", f"{longest}, windowed"), (shortest, shortest)):
            values = list(zip(*(_over_kinds(row, column)[1:] for row in best(rows, arm))))
            lines.append([arm, shown, *(mean(list(v)) for v in values)])
    return markdown(lines)


def growth(study: str, rows: list[dict]) -> str:
    """Return a table of each arm's tokens, FLOPs and time, and their shares of the reference's."""
    reference = STUDIES[study]["reference"]
    ends = {arm: {row["seed"]: row["curve"][-1] for row in best(rows, arm)} for arm in arms_of(rows)}
    tokens = {arm: best(rows, arm)[0]["tokens"] for arm in ends}
    of_reference = [f"{what}, share of {reference}" for what in ("tokens", "FLOPs", "time")]
    lines = [["arm", "TFLOP", "seconds of steps", *of_reference, "seeds"]]
    for arm, by_seed in ends.items():
        both = sorted(set(by_seed) & set(ends.get(reference, {})))
        share = lambda what: mean([by_seed[s][what] / ends[reference][s][what] for s in both], "{:.2f}")  # noqa: B023
        flops = f"{next(iter(by_seed.values()))['flops'] / 1e12:.1f}"
        seconds = mean([end["seconds"] for end in by_seed.values()], "{:.0f}")
        of_tokens = f"{tokens[arm] / tokens[reference]:.2f}" if reference in tokens else "–"
        lines.append([arm, flops, seconds, of_tokens, share("flops"), share("seconds"), str(len(by_seed))])
    return markdown(lines)


def provenance(study: str, rows: list[dict]) -> str:
    """Return the command, commits and CPU minutes of a study's lines."""
    lrs = ",".join(f"{lr:g}" for lr in sorted({row["lr"] for row in rows}))
    seeds = ",".join(map(str, sorted({row["seed"] for row in rows})))
    command = f"python scripts/studies/experiment.py run --study={study} --lrs={lrs} --seeds={seeds}"
    refused, minutes = sum(row["skipped"] for row in rows), sum(row["cpu_seconds"] or 0 for row in rows) / 60
    return (
        f"{len(rows)} runs, {minutes:.0f} CPU minutes, {refused} refused updates; `{command}`; "
        f"commits {', '.join(sorted({row['commit'] for row in rows}))}. "
        f"Each run with its own command: `docs/results/{study}.jsonl`."
    )


def cost(rows: list[dict]) -> str:
    """Return a table of each preset's measurements by scripts/bench/dense_twin.py, low rank beside dense."""
    latest = {(row["preset"], row["what"], row["model"]): row for row in rows}
    lines = [["preset", "what", "low rank", "dense", "low rank / dense"]]
    for preset, what in dict.fromkeys((row["preset"], row["what"]) for row in rows):
        pair = [latest.get((preset, what, name), {}) for name in ("low rank", "dense")]
        for name, (label, unit, form) in COSTS.items():
            values = [row.get(name) for row in pair]
            if None not in values:
                shown = [form.format(value / unit) for value in values]
                where = {"train": "training on a CPU", "decode": "decoding on a CPU"}.get(what, f"{what}, compiled")
                lines.append([preset, f"{where}: {label}", *shown, f"{values[0] / values[1]:.2f}"])
    commits = ", ".join(sorted({row["commit"] for row in latest.values()}))
    source = "each line: `docs/results/cost.jsonl`"
    return f"{markdown(lines)}\n\n`python scripts/bench/dense_twin.py`, commits {commits}; {source}."


# Name, unit and format of each measurement.
COSTS = {
    "parameters": ("parameters, M", 1e6, "{:.1f}"),
    "cpu_seconds": ("CPU seconds per step", 1, "{:.2f}"),
    "state_bytes": ("weights and optimizer, MB", 1e6, "{:,.0f}"),
    "temporary_bytes": ("temporary, by the compiler, MB", 1e6, "{:,.0f}"),
    "peak_rss_bytes": ("peak memory of the process, MB", 1e6, "{:,.0f}"),
    "cache_bytes": ("cache for 4,096 tokens, MB", 1e6, "{:.1f}"),
    "tokens_per_s_256": ("tokens per second after 256", 1, "{:.0f}"),
    "tokens_per_s_3840": ("tokens per second after 3,840", 1, "{:.0f}"),
    "peak_bytes_per_device": ("peak of a device, MB", 1e6, "{:,.0f}"),
    "param_bytes_per_device": ("weights on a device, MB", 1e6, "{:,.0f}"),
    "optimizer_bytes_per_device": ("optimizer on a device, MB", 1e6, "{:,.0f}"),
    "activation_bytes_per_device": ("temporary on a device, MB", 1e6, "{:,.0f}"),
    "model_flops_per_step": ("FLOPs per step, T", 1e12, "{:.1f}"),
    "compute_seconds": ("matmuls of a step at the peak, ms", 1e-3, "{:.1f}"),
    "memory_seconds": ("HBM of a step at the peak, ms", 1e-3, "{:.1f}"),
}


def mean(values: list[float], form: str = "{:.4f}") -> str:
    return form.format(statistics.mean(values)) if values else "–"


def interval(differences: list[float]) -> str:
    """Return mean ± half of the 95% confidence interval of the mean, by Student's t; the mean alone for one seed."""
    shown, n = mean(differences, "{:+.4f}"), len(differences)
    if n < 2:
        return shown
    return f"{shown} ± {stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5:.4f}"


def markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def _over_kinds(row: dict, column: str) -> list[float]:
    return [statistics.mean(values) for values in zip(*(kind[column] for kind in row["lengths"].values()))]


# -------------------------------------------------------------------------------------------------------------- plots


def publish(folder: str) -> None:
    """Write every study's tables between its marks in the results.md above `folder`, and its plot into `folder`."""
    path = os.path.join(os.path.dirname(os.path.abspath(folder)), "results.md")
    with open(path, encoding="utf-8") as f:
        page = f.read()
    for study in (*STUDIES, "cost"):
        begin, end = f"<!-- {study} -->", f"<!-- /{study} -->"
        if begin not in page:
            continue
        if page.find(end) < page.find(begin):
            raise UsageError(f"{path} has {begin} without {end} after it; add that line")
        before, rest = page.split(begin, 1)
        if study == "cost":
            rows, shown = [], cost(run_folder.read_rows(folder, "cost.jsonl"))
        else:
            rows = read(folder, study)
            shown = of_study(study, rows) + (f"\n\n![{study}](results/{study}.png)" if rows else "")
        page = f"{before}{begin}\n{shown}\n{end}{rest.split(end, 1)[1]}"
        if rows:
            plot(study, rows, os.path.join(folder, f"{study}.png"))
    run_folder.write_text(path, page)


def plot(study: str, rows: list[dict], path: str) -> None:
    from matplotlib.figure import Figure

    kind = _plot_growth if STUDIES[study].get("growing") else _plot_lengths if "lengths" in rows[0] else _plot_quality
    figure = Figure(
        figsize=(8, 1.4 + 0.26 * len(arms_of(rows)) if kind is _plot_quality else 3.6), layout="constrained"
    )
    kind(figure, study, rows)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _plot_quality(figure, study: str, rows: list[dict]) -> None:
    """Plot each seed's difference to the reference; filled if parameters and FLOPs are at most the reference's."""
    reference, axes = STUDIES[study]["reference"], figure.subplots()
    limit = best(rows, reference)[0] if best(rows, reference) else None
    for y, arm in enumerate(arms_of(rows)):
        less, row = paired(rows, arm, reference), best(rows, arm)[0]
        within = limit and all(row[what] <= limit[what] * 1.005 for what in ("parameters", "flops"))
        axes.scatter(less, [y] * len(less), s=22, color="C0", facecolor="C0" if within else "none")
        if less:
            axes.scatter([statistics.mean(less)], [y], marker="|", s=150, color="black")
    axes.axvline(0, color="#999999", lw=0.8)
    axes.set_yticks(range(len(arms_of(rows))), arms_of(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"bits per byte minus {reference}'s, by seed (open: more parameters or FLOPs than {reference})")


def _plot_lengths(figure, study: str, rows: list[dict]) -> None:
    left, right = figure.subplots(1, 2)
    columns = list(next(iter(rows[0]["lengths"].values())))[:-1]
    mean = lambda arm, column, at: statistics.mean(_over_kinds(row, column)[at] for row in best(rows, arm))
    for i, arm in enumerate(arms_of(rows)):
        left.plot([int(c) for c in columns], [mean(arm, c, 0) for c in columns], "o-", color=f"C{i}", label=arm)
        left.plot([int(columns[-1])], [mean(arm, "window", 0)], "x", color=f"C{i}")
        count = len(_over_kinds(rows[0], columns[-1])) - 1
        right.plot([mean(arm, columns[-1], at + 1) for at in range(count)], "o-", color=f"C{i}")
        right.plot([mean(arm, columns[0], at + 1) for at in range(count)], ":", color=f"C{i}")
    left.set_xscale("log", base=2)
    left.set_xticks([int(c) for c in columns], columns)
    left.set_xlabel("length of the rows (x: windowed)")
    left.set_ylabel("bits per byte")
    left.legend(fontsize=8)
    right.set_xlabel(f"part of a row of {columns[-1]} (dotted: in rows of {columns[0]})", fontsize=8)
    right.set_xticks(range(5), ["0-256", "-512", "-1024", "-2048", "-4096"], fontsize=8)


def _plot_growth(figure, study: str, rows: list[dict]) -> None:
    for axes, what, label, unit in zip(figure.subplots(1, 2), ("flops", "seconds"), ("TFLOP", "seconds"), (1e12, 1)):
        for i, arm in enumerate(arms_of(rows)):
            for j, row in enumerate(best(rows, arm)):
                x, y = ([p[k] for p in row["curve"][1:]] for k in (what, "bits_per_byte"))
                axes.plot([v / unit for v in x], y, color=f"C{i}", lw=1, label=None if j else arm)
        axes.set_xlabel(f"{label} of training")
        axes.set_ylabel("bits per byte held out")
        axes.legend(fontsize=8)
