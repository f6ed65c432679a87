"""The benchmark in words and tables: pure functions of its summary record."""

import math
from typing import Any

SCHEMA = "distil-rank/benchmark/1"
CURVES_SCHEMA = "distil-rank/benchmark-curves/1"
BARS_SCHEMA = "distil-rank/benchmark-lowrank/1"
METRICS = {  # key -> heading
    "fvu": "FVU",
    "relative_mse": "relative MSE",
    "cosine": "cosine",
    "centred_cosine": "centred cosine",
    "worst_1pct_cosine": "worst-1 % cosine",
}


def framed(*lines: str) -> str:
    """Lines in a frame, for a notice nobody should miss."""
    width = max(map(len, lines))
    return "\n".join([f"+{'-' * (width + 2)}+", *(f"| {line:<{width}} |" for line in lines), f"+{'-' * (width + 2)}+"])


def verdict(difference: dict[str, Any], optimum: dict[str, Any]) -> str:
    """Whether distillation beats the closed form, from the paired difference in held-out FVU, in words."""
    best, distilled = optimum["value"], optimum["value"] + difference["value"]
    times = (
        f"its held-out FVU of {number(distilled)} is {distilled / best:.3g} times the optimum's {number(best)}"
        if best
        else ""
    )
    bounds = ", ".join(f"{difference[key]:+.2g}" for key in ("low", "high"))
    paired = f"paired difference {difference['value']:+.2g}, 95 % interval [{bounds}]"
    if difference["low"] > 0:
        return f"Distillation does not beat the closed form: {times} ({paired})."
    if difference["high"] < 0:
        return f"Distillation beats the closed form on held-out rows: {times} ({paired})."
    return f"Distillation and the closed form cannot be told apart on held-out rows ({paired})."


def number(value: float) -> str:
    """Four decimals, so that a column can be compared; scientific where they would all be 0."""
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.1e}"


def cosine_text(cosine: float) -> str:
    """Four decimals, more where the distance to 1 needs them: 0.99993, not 1.0000."""
    distance = 1 - abs(cosine)
    decimals = 4 if distance <= 0 else min(9, max(4, 2 - math.floor(math.log10(distance)) - 1))
    return f"{cosine:.{decimals}f}"


def fidelity_table(experiment: dict[str, Any]) -> str:
    """One teacher's students, a markdown table: FVU with its interval over held-out rows first."""
    rows = [["student", "FVU", "95 % interval", *list(METRICS.values())[1:]]]
    for label, metrics in experiment["students"].items():
        fvu = metrics["fvu"]
        rows.append([label, number(fvu["value"]), f"{number(fvu['low'])} to {number(fvu['high'])}"])
        rows[-1] += [(cosine_text if "cosine" in key else number)(metrics[key]["value"]) for key in list(METRICS)[1:]]
    return markdown(rows)


def latency_table(experiment: dict[str, Any]) -> str:
    """Teacher and student times of one shape, a markdown table."""
    rows = [["batch", "mode", "teacher ms", "student ms", "speed-up (IQR)", "FLOP bound", "of the bound"]]
    for row in experiment["latency"]:
        speedup = row["speedup"]
        rows.append(
            [
                str(row["batch"]),
                row["mode"],
                f"{row['teacher_ms']['median']:.4f}",
                f"{row['student_ms']['median']:.4f}",
                f"{speedup['median']:.2f} ({speedup['q25']:.2f} to {speedup['q75']:.2f})",
                f"{row['flop_bound']:.2f}",
                f"{row['fraction_of_bound']:.0%}",
            ]
        )
    return markdown(rows)


def rank_table(summary: dict[str, Any]) -> str:
    """Smallest rank of the optimum that reaches each FVU on held-out rows, and the floor's, a markdown table."""
    targets = list(next(iter(summary["experiments"].values()))["rank_for_fvu"])
    rows = [["teacher", *(f"FVU <= {float(target):.0%}" for target in targets)]]
    for name, experiment in summary["experiments"].items():
        found = experiment["rank_for_fvu"]
        rows.append(
            [name, *(f"{shown_rank(found[t]['fvu'], summary)} (floor {found[t]['floor_fvu']})" for t in targets)]
        )
    return markdown(rows)


def shown_rank(rank: int, summary: dict[str, Any]) -> str:
    return "none" if rank > summary["input_dim"] else str(rank)


def headline(summary: dict[str, Any]) -> str:
    """Data, sizes, rank and seeds in one line; the word synthetic where it is true."""
    data, n = summary["data"], len(summary["seeds"])
    model = f"{data['model']}, " if data["model"] else ""
    return (
        f"{model}{data['source']}: {data['n_train']:,} training and {data['n_val']:,} held-out rows of {data['dim']} features, "
        f"rank {summary['target_rank']}, {n} seed{'s' if n > 1 else ''}"
    )


def documentation(summary: dict[str, Any]) -> str:
    """The same for a document: a heading line, then a table and a verdict for each teacher, ranks and latency."""
    parts = [f"*{headline(summary)}.*"]
    for name, experiment in summary["experiments"].items():
        parts += [f"**{name} teacher**", fidelity_table(experiment), experiment["verdict"]]
    first = next(iter(summary["experiments"].values()))
    sizes = f"{first['params_teacher']:,} to {first['params_student']:,} parameters, {first['compression']:.2f} times smaller"
    threads = f"{first['latency'][0]['threads']} thread(s), " if summary["environment"]["device"] == "cpu" else ""
    place = (
        summary["environment"]["cpu"] if summary["environment"]["device"] == "cpu" else summary["environment"]["device"]
    )
    parts += ["**Smallest rank of the optimum on held-out rows** (in brackets: the floor's)", rank_table(summary)]
    parts += [f"**Latency** ({sizes}; {threads}{place})", latency_table(first)]
    return "\n\n".join(parts)


def findings(summaries: list[dict[str, Any]]) -> str:
    """What several runs say of distillation and of the cosine-aware closed form, a markdown list."""
    ratios, outcomes, cosines, slow = [], [], [], []
    for summary in summaries:
        for experiment in summary["experiments"].values():
            students = experiment["students"]
            difference, best = students["distilled"]["fvu_minus_optimum"], students["optimum"]["fvu"]["value"]
            ratios.append(students["distilled"]["fvu"]["value"] / best)
            outcomes.append("worse" if difference["low"] > 0 else "better" if difference["high"] < 0 else "equal")
            cosines.append(
                students["optimum, cosine-aware"]["cosine"]["value"] - students["optimum"]["cosine"]["value"]
            )
        first = next(iter(summary["experiments"].values()))["latency"][0]
        slow.append(f"{first['speedup']['median']:.2f} with {summary['input_dim']} features")
    worse, better, equal = (outcomes.count(name) for name in ("worse", "better", "equal"))
    counts = f"above the closed form in held-out FVU in {worse}, below it in {better} and indistinguishable in {equal}"
    times = f"its FVU is {min(ratios):.3f} to {max(ratios):.3f} times the optimum's"
    change = f"{min(cosines):+.1e} to {max(cosines):+.1e}"
    lines = [
        f"- Of {len(outcomes)} cells (teacher and data), distillation in its best form is {counts}; {times}.",
        f"- The cosine-aware closed form changes the held-out cosine by {change}: where |y| hardly varies between",
        "  proteins, the weights of the rows hardly do.",
        f"- At batch {first['batch']} the speed-up is {', '.join(slow)}: two calls cost much of what the arithmetic saves.",
    ]
    return "\n".join(lines)


def closing_table(summary: dict[str, Any]) -> str:
    """What the terminal shows at the end."""
    parts = [headline(summary)]
    for name, experiment in summary["experiments"].items():
        parts.append(
            f"{name} teacher: {experiment['params_teacher']:,} -> {experiment['params_student']:,} parameters "
            f"({experiment['compression']:.2f} x smaller), {experiment['speedup']:.2f} x faster at batch 32"
        )
        parts.append(fidelity_table(experiment))
        parts.append(experiment["verdict"])
    parts.append("Smallest rank of the optimum, held out")
    parts.append(rank_table(summary))
    parts.append("Latency")
    parts.append(latency_table(next(iter(summary["experiments"].values()))))
    return "\n\n".join(parts)


def bars(record: dict[str, Any]) -> str:
    """The bars and what was measured, a markdown table."""
    rows = [["what", "measured", "bar"]]
    if found := record.get("exactness"):
        rows.append(
            ["largest certificate gap, relative", f"{max(found['largest_relative_gap'].values()):.1e}", "1e-09"]
        )
    if found := record.get("speed"):
        rows.append(["1000 plain steps / compress_linear from 10,000 rows", f"{found['ratio_from_rows']:.1f} x", "5 x"])
        rows.append(["1000 plain steps / compress_linear from moments", f"{found['ratio_from_moments']:.1f} x", "10 x"])
    if found := record.get("latency"):
        for row in found["rows"]:
            bar = found["bars"].get(f"batch {row['batch']}")
            shown = f"{row['fraction_of_bound']:.1%} ({row['speedup']['median']:.2f} x)"
            rows.append(
                [
                    f"latency at batch {row['batch']}, share of the FLOP bound {row['flop_bound']:.2f}",
                    shown,
                    f"{bar:.0%}" if bar else "",
                ]
            )
    if found := record.get("memory"):
        rows.append(
            [f"peak memory of moments over {found['rows']:,} rows of 1280", f"{found['peak_mb']:.0f} MB", "400 MB"]
        )
    if found := record.get("whole"):
        rows.append(["python main.py (1280 features) / three plain students", f"{found['ratio']:.1f} x", "2 x"])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """An aligned markdown table; the first row is the heading, the first column is text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
