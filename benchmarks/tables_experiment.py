"""Tables of README.md, docs/benchmark.md and results/README.md: records of `python main.py`."""

from collections.abc import Sequence

from distil_rank.core.records import Record
from distil_rank.core.tables import markdown, number
from distil_rank.experiment.report import SCHEMA
from distil_rank.experiment.tables import (
    batch_one,
    fidelity_table,
    headline,
    latency_table,
    rank_table,
    remarks,
)

__all__ = ["BARS", "SCHEMA", "bars", "documentation", "findings", "overview"]
BARS = "distil-rank/benchmark-lowrank/1"


def overview(summary: Record) -> str:
    """FVU of every student under every teacher, and how small and how fast."""
    experiments = summary["experiments"]
    first = next(iter(experiments.values()))
    rows = [["FVU on held-out rows", *(f"{name} teacher" for name in experiments)]]
    for label in first["students"]:
        found = [experiment["students"][label]["fvu"] for experiment in experiments.values()]
        cells = [f"{number(f['value'])}{spread(f)}" for f in found]
        rows.append([label, *cells])
    small, fast = (number(first[key]) for key in ("compression", "speedup"))
    gain = f"{small} times smaller, {fast} times faster at batch 32"
    return f"*{headline(summary)}: {gain}.*\n\n{markdown(rows)}"


def spread(metric: Record) -> str:
    """Its interval, where it has one: a floor has none."""
    return f" [{number(metric['low'])}, {number(metric['high'])}]" if "low" in metric else ""


def documentation(summary: Record) -> str:
    """A heading line, a table and a verdict for each teacher, ranks and latency."""
    parts = [f"*{headline(summary)}.*", *(f"**{notice}.**" for notice in summary["notices"])]
    for name, experiment in summary["experiments"].items():
        parts += [f"**{name} teacher**", fidelity_table(experiment), *remarks(experiment)]
    place = summary["environment"]
    threads = f"{summary['claim']['latency'][0]['threads']} thread(s), {place['cpu']}"
    device = threads if place["device"] == "cpu" else place["device"]
    floors = "(in brackets: the floor's)"
    parts += [f"**Smallest rank of the optimum on held-out rows** {floors}", rank_table(summary)]
    parts += [f"**Latency** ({device})", latency_table(summary), batch_one(summary)]
    return "\n\n".join(parts)


def findings(summaries: Sequence[Record]) -> str:
    """What several runs say of distillation and of the speed at batch 1, a markdown list."""
    ratios, outcomes, slow = [], [], []
    for summary in summaries:
        for experiment in summary["experiments"].values():
            students = experiment["students"]
            low, high = students["distilled"]["fvu_minus_optimum"]["rows_and_seeds"]
            best = students["optimum"]["fvu"]["value"]
            ratios.append(students["distilled"]["fvu"]["value"] / best)
            outcomes.append("above" if low > 0 else "below" if high < 0 else "equal")
        first = next(iter(summary["experiments"].values()))["latency"][0]
        speedup = number(first["speedup"]["median"])
        slow.append(f"{speedup} with {summary['input_dim']} features")
    above, below, equal = (outcomes.count(name) for name in ("above", "below", "equal"))
    counts = f"above the closed form in {above}, below it in {below}, indistinguishable in {equal}"
    times = f"{min(ratios):.3f} to {max(ratios):.3f} times the optimum's"
    return "\n".join(
        [
            f"- Of {len(outcomes)} cells (teacher and data), the held-out FVU of distillation in"
            f" its best form is {counts}; it is {times}.",
            f"- At batch {first['batch']} the speed-up is {', '.join(slow)}: two calls cost much of"
            " what the arithmetic saves.",
        ]
    )


def bars(record: Record) -> str:
    """What `python -m benchmarks.lowrank` measured, and the bars."""
    rows = [["what", "measured", "bar"]]
    if found := record.get("exactness"):
        gap = max(found["largest_relative_gap"].values())
        rows.append(["largest certificate gap, relative", f"{gap:.1e}", "1e-09"])
    if found := record.get("speed"):
        what = "1000 plain steps / compress_linear from"
        rows.append([f"{what} 10,000 rows", f"{found['ratio_from_rows']:.1f} x", "5 x"])
        rows.append([f"{what} moments", f"{found['ratio_from_moments']:.1f} x", "10 x"])
    for row in record.get("latency", {}).get("rows", []):
        bar = record["latency"]["bars"].get(f"batch {row['batch']}")
        bound = f"share of the FLOP bound {row['flop_bound']:.2f}"
        shown = f"{row['fraction_of_bound']:.1%} ({row['speedup']['median']:.2f} x)"
        rows.append(
            [f"latency at batch {row['batch']}, {bound}", shown, f"{bar:.0%}" if bar else ""]
        )
    if found := record.get("memory"):
        what = f"peak memory of moments over {found['rows']:,} rows of 1280"
        rows.append([what, f"{found['peak_mb']:.0f} MB", "400 MB"])
    if found := record.get("many_rows"):
        what = f"peak memory of python main.py on {found['rows']:,} rows of 1280, five seeds"
        rows.append([what, f"{found['peak_gb']:.2f} GB", f"{found['bar_gb']} GB"])
    if found := record.get("whole"):
        what = "python main.py (1280 features) / three plain students"
        rows.append([what, f"{found['ratio']:.1f} x", "2 x"])
    return markdown(rows)
