"""Tables of README.md, docs/benchmark.md and results/README.md: records of `python main.py`."""

from collections.abc import Sequence

from distil_rank.core.records import Record
from distil_rank.core.tables import markdown, number
from distil_rank.experiment.report import (
    SCHEMA,
    fidelity_table,
    headline,
    latency_table,
    rank_table,
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
        cells = [f"{number(f['value'])} [{number(f['low'])}, {number(f['high'])}]" for f in found]
        rows.append([label, *cells])
    small = f"{first['compression']:.2f} times smaller, {first['speedup']:.2f} times faster"
    return f"*{headline(summary)}: {small} at batch 32.*\n\n{markdown(rows)}"


def documentation(summary: Record) -> str:
    """A heading line, a table and a verdict for each teacher, ranks and latency."""
    parts = [f"*{headline(summary)}.*"]
    for name, experiment in summary["experiments"].items():
        parts += [f"**{name} teacher**", fidelity_table(experiment), experiment["verdict"]]
    first, place = next(iter(summary["experiments"].values())), summary["environment"]
    sizes = f"{first['params_teacher']:,} to {first['params_student']:,} parameters"
    threads = f"{first['latency'][0]['threads']} thread(s), {place['cpu']}"
    device = threads if place["device"] == "cpu" else place["device"]
    floors = "(in brackets: the floor's)"
    parts += [f"**Smallest rank of the optimum on held-out rows** {floors}", rank_table(summary)]
    smaller = f"{first['compression']:.2f} times smaller"
    parts += [f"**Latency** ({sizes}, {smaller}; {device})", latency_table(first)]
    return "\n\n".join(parts)


def findings(summaries: Sequence[Record]) -> str:
    """What several runs say of distillation and of the speed at batch 1, a markdown list."""
    ratios, outcomes, slow = [], [], []
    for summary in summaries:
        for experiment in summary["experiments"].values():
            students = experiment["students"]
            difference = students["distilled"]["fvu_minus_optimum"]
            best = students["optimum"]["fvu"]["value"]
            ratios.append(students["distilled"]["fvu"]["value"] / best)
            worse, better = difference["low"] > 0, difference["high"] < 0
            outcomes.append("above" if worse else "below" if better else "equal")
        first = next(iter(summary["experiments"].values()))["latency"][0]
        slow.append(f"{first['speedup']['median']:.2f} with {summary['input_dim']} features")
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
    if found := record.get("whole"):
        what = "python main.py (1280 features) / three plain students"
        rows.append([what, f"{found['ratio']:.1f} x", "2 x"])
    return markdown(rows)
