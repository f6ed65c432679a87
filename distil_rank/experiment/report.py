"""The experiment's figure and tables, from its two JSON files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_rank.core.figures import INK, PALETTE, QUIET, drawn
from distil_rank.core.records import Metric, Record, read_json
from distil_rank.core.tables import closeness, markdown, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = "distil-rank/benchmark/1"
CURVES_SCHEMA = "distil-rank/benchmark-curves/1"
SUMMARY, CURVES = "distil_rank_summary.json", "distil_rank_curves.json"
PNG = "distil_rank_final_report.png"
COLORS = dict(zip(("Random", "Task-Trained", "Spectral"), PALETTE))
USER_COLOR = PALETTE[3]
DASHED = (0, (4, 3))
COLUMNS = {  # key -> heading
    "relative_mse": "relative MSE",
    "cosine": "cosine",
    "centred_cosine": "centered cosine",
    "worst_1pct_cosine": "worst-1 % cosine",
}


# Tables -------------------------------------------------------------------------------------------
def headline(summary: Record) -> str:
    """Data, sizes, rank and seeds in one line; the word synthetic where it is true."""
    data, n = summary["data"], len(summary["seeds"])
    model = f"{data['model']}, " if data["model"] else ""
    rows = f"{data['n_train']:,} training and {data['n_val']:,} held-out rows"
    sizes = f"{rows} of {data['dim']} features, rank {summary['target_rank']}"
    return f"{model}{data['source']}: {sizes}, {n} seed{'s' if n > 1 else ''}"


def verdict(difference: Metric, optimum: Metric) -> str:
    """Whether distillation beats the closed form, from the paired difference in held-out FVU."""
    best, distilled = optimum["value"], optimum["value"] + difference["value"]
    bounds = f"[{difference['low']:+.2g}, {difference['high']:+.2g}]"
    paired = f"paired difference {difference['value']:+.2g}, 95 % interval {bounds}"
    times = f"{distilled / best:.3g} times the optimum's {number(best)}" if best else "above 0"
    found = f"its held-out FVU of {number(distilled)} is {times} ({paired})."
    if difference["low"] > 0:
        return f"Distillation does not beat the closed form: {found}"
    if difference["high"] < 0:
        return f"Distillation beats the closed form on held-out rows: {found}"
    return f"Distillation and the closed form cannot be told apart on held-out rows ({paired})."


def fidelity_table(experiment: Record) -> str:
    """One teacher's students, a markdown table: FVU with its interval over held-out rows first."""
    rows = [["student", "FVU", "95 % interval", *COLUMNS.values()]]
    for label, metrics in experiment["students"].items():
        value, low, high = (number(metrics["fvu"][key]) for key in ("value", "low", "high"))
        shown = [
            (closeness if "cosine" in key else number)(metrics[key]["value"]) for key in COLUMNS
        ]
        rows.append([label, value, f"{low} to {high}", *shown])
    return markdown(rows)


def latency_table(experiment: Record) -> str:
    """Teacher and student times of one shape, a markdown table."""
    heading = "batch, mode, teacher ms, student ms, speed-up (IQR), FLOP bound, of the bound"
    rows = [heading.split(", ")]
    for row in experiment["latency"]:
        speedup, teacher, student = row["speedup"], row["teacher_ms"], row["student_ms"]
        times = [f"{side['median']:.4f}" for side in (teacher, student)]
        gain = f"{speedup['median']:.2f} ({speedup['q25']:.2f} to {speedup['q75']:.2f})"
        bound = [f"{row['flop_bound']:.2f}", f"{row['fraction_of_bound']:.0%}"]
        rows.append([str(row["batch"]), row["mode"], *times, gain, *bound])
    return markdown(rows)


def rank_table(summary: Record) -> str:
    """Smallest rank of the optimum that reaches each FVU on held-out rows, and the floor's."""
    targets = list(next(iter(summary["experiments"].values()))["rank_for_fvu"])
    rows = [["teacher", *(f"FVU <= {float(target):.0%}" for target in targets)]]
    for name, experiment in summary["experiments"].items():
        found = [experiment["rank_for_fvu"][target] for target in targets]
        ranks = ["none" if f["fvu"] > summary["input_dim"] else str(f["fvu"]) for f in found]
        rows.append([name, *(f"{r} (floor {f['floor_fvu']})" for r, f in zip(ranks, found))])
    return markdown(rows)


def closing_table(summary: Record) -> str:
    """What the terminal shows at the end."""
    parts = [headline(summary)]
    for name, experiment in summary["experiments"].items():
        before, after = experiment["params_teacher"], experiment["params_student"]
        gain = f"{experiment['compression']:.2f} x smaller), {experiment['speedup']:.2f} x faster"
        parts.append(f"{name} teacher: {before:,} -> {after:,} parameters ({gain} at batch 32")
        parts += [fidelity_table(experiment), experiment["verdict"]]
    parts += ["Smallest rank of the optimum, held out", rank_table(summary)]
    parts += ["Latency", latency_table(next(iter(summary["experiments"].values())))]
    return "\n\n".join(parts)


# Figure -------------------------------------------------------------------------------------------
def draw(folder: str | Path) -> Path:
    """Draw FOLDER/distil_rank_final_report.png from the summary and the curves in FOLDER."""
    folder = Path(folder)
    summary = read_json(folder / SUMMARY, SCHEMA)
    curves = read_json(folder / CURVES, CURVES_SCHEMA)
    with drawn(folder / PNG, (16, 10.4)) as figure:
        place = {"left": 0.155, "right": 0.975, "top": 0.815, "bottom": 0.5, "wspace": 0.22}
        top = figure.add_gridspec(1, 2, width_ratios=[1.15, 1], **place)
        place = {"left": 0.06, "right": 0.975, "top": 0.375, "bottom": 0.07, "wspace": 0.28}
        bottom = figure.add_gridspec(1, 3, **place)
        fidelity(figure.add_subplot(top[0]), summary)
        rank_curve(figure.add_subplot(top[1]), curves)
        training_loss(figure.add_subplot(bottom[0]), curves)
        weight_spectra(figure.add_subplot(bottom[1]), curves)
        latency(figure.add_subplot(bottom[2]), summary)
        figure.text(0.012, 0.965, title(summary), size=19, weight="bold")
        figure.text(0.012, 0.934, headline(summary), size=11.5, color=INK)
        for i, name in enumerate(summary["experiments"]):
            text, ink = f"● {name} teacher", color(name)
            figure.text(0.012 + 0.15 * i, 0.9, text, size=11.5, color=ink, weight="bold")
    return folder / PNG


def title(summary: Record) -> str:
    """The figure's title: how small and how fast; SYNTHETIC where the data is."""
    first = next(iter(summary["experiments"].values()))
    synthetic = "" if summary["real_data"] else "SYNTHETIC DATA: "
    gain = f"{first['compression']:.2f} x smaller, {first['speedup']:.2f} x faster at batch 32"
    return f"{synthetic}A linear layer at rank {summary['target_rank']}: {gain}"


def color(name: str) -> str:
    return COLORS.get(name, USER_COLOR)


def fidelity(axes: Axes, summary: Record) -> None:
    """FVU of every student, a point a seed, a tick at the mean; each teacher's floor as a line."""
    experiments = summary["experiments"]
    labels = list(next(iter(experiments.values()))["students"])
    for i, (name, experiment) in enumerate(experiments.items()):
        offset, ink = 0.24 * (i - (len(experiments) - 1) / 2), color(name)
        students = experiment["students"]
        floor = next(m for label, m in students.items() if label.startswith("floor"))
        axes.axvline(floor["fvu"]["value"], color=ink, lw=1.2, ls=DASHED, zorder=1)
        for row, label in enumerate(labels):
            fvu, y = students[label]["fvu"], row + offset
            values = fvu["per_seed"]
            axes.scatter(values, [y] * len(values), s=30, color=ink, alpha=0.55, lw=0, zorder=3)
            axes.scatter([fvu["value"]], [y], marker="|", s=170, color=ink, lw=2, zorder=4)
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for row in range(1, len(labels)):
        axes.axhline(row - 0.5, color="#eef0f2", lw=0.8, zorder=0)
    axes.axvline(1, color=QUIET, lw=1)
    percent_axis(axes.xaxis)
    axes.set_xlabel("FVU on held-out rows (fraction of variance unexplained; smaller is better)")
    marks = "a point a seed, | the mean, dashed: the mean floor"
    bound = "no student of a seed can be left of its own floor"
    titles(axes, "What each student loses", f"{marks}; {bound}")


def rank_curve(axes: Axes, curves: Record) -> None:
    """FVU of the optimum at every rank on held-out rows, with the floor there."""
    rank = curves["target_rank"]
    for name, experiment in curves["experiments"].items():
        fvu, floor, ink = experiment["rank"]["fvu"], experiment["rank"]["floor_fvu"], color(name)
        n = min(len(fvu), len(floor))
        axes.plot(range(1, n), fvu[1:n], color=ink, lw=2, zorder=3)
        axes.plot(range(1, n), floor[1:n], color=ink, lw=1.2, ls=DASHED, zorder=3)
        axes.scatter([rank], [fvu[rank]], color=ink, s=36, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    compared = [experiment["rank"]["fvu"][rank] for experiment in curves["experiments"].values()]
    lowest = max(1e-9, min(1e-3, *(value / 3 for value in compared)))
    axes.set_ylim(lowest, 1.3)
    mark_rank(axes, rank, 1.2 * lowest)
    for target in (0.1, 0.05, 0.01):
        axes.axhline(target, color=QUIET, lw=0.8, ls=":")
    plain_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.set_xlabel("rank of the student")
    axes.set_ylabel("FVU on held-out rows")
    marks = "solid: the optimum at every rank, dashed: the floor, dot: the students compared"
    titles(axes, "How small can it be", marks)


def training_loss(axes: Axes, curves: Record) -> None:
    """Mean loss over seeds: the improved recipe strong, the plain one pale."""
    strong: dict[str, Any] = {"lw": 2, "alpha": 1, "zorder": 3}
    pale: dict[str, Any] = {"lw": 1.1, "alpha": 0.4, "zorder": 2}
    for name, experiment in curves["experiments"].items():
        for label, values in experiment["loss"].items():
            share = [100 * i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(share, values, color=color(name), **(pale if "plain" in label else strong))
    axes.set_yscale("log")
    axes.set_xlabel("training, % of the steps")
    axes.set_ylabel("MSE + 0.1 (1 - cosine)")
    titles(axes, "Training loss", "mean over seeds; pale: the plain recipe")


def weight_spectra(axes: Axes, curves: Record) -> None:
    """Singular values of the teachers' weights and the rank cut-off."""
    for name, experiment in curves["experiments"].items():
        values = experiment["singular_values"]
        shares = [value / values[0] for value in values]
        axes.plot(range(1, len(values) + 1), shares, color=color(name), lw=2)
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1.3)
    mark_rank(axes, curves["target_rank"], 1.1e-3)
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel("singular value / largest")
    note = "singular values of seed 0's teachers, and where truncation cuts"
    titles(axes, "Weight spectra", note)


def latency(axes: Axes, summary: Record) -> None:
    """Speed-up with its interquartile range at each batch size, against the FLOP bound."""
    rows = next(iter(summary["experiments"].values()))["latency"]
    bound = rows[0]["flop_bound"]
    for i, row in enumerate(rows):
        low, median, high = (row["speedup"][key] for key in ("q25", "median", "q75"))
        shade = "#5b6b7f" if row["mode"] == "eager" else "#a9b4c2"
        axes.bar(i, median, width=0.62, color=shade, zorder=2)
        spread = [[median - low], [high - median]]
        axes.errorbar(i, median, yerr=spread, color=INK, lw=1.2, capsize=3, zorder=3)
        tall = median > 0.3 * bound
        inside: dict[str, Any] = {"va": "top", "color": "white", "weight": "bold"}
        look = inside if tall else {"va": "bottom"}
        share = f"{median:.1f} x\n{row['fraction_of_bound']:.0%}"
        axes.text(i, low * 0.97 if tall else high * 1.05, share, ha="center", size=9.5, **look)
    axes.axhline(bound, color=QUIET, lw=1.2, ls=DASHED)
    axes.text(-0.45, bound, f"FLOP bound {bound:.2f}", ha="left", va="bottom", color=QUIET, size=9)
    axes.set_ylim(0, 1.25 * max(bound, *(row["speedup"]["q75"] for row in rows)))
    names = [
        f"batch {row['batch']}{'' if row['mode'] == 'eager' else ', graph'}\n"
        f"{row['teacher_ms']['median']:.2g} → {row['student_ms']['median']:.2g} ms"
        for row in rows
    ]
    axes.set_xticks(range(len(rows)), names, size=10 if len(rows) < 5 else 7.5)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("speed-up over the teacher")
    device, threads = summary["environment"]["device"], rows[0]["threads"]
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    place = cpu if device == "cpu" else device
    titles(axes, "Latency", f"on {place}; with the share of the FLOP bound reached")


def mark_rank(axes: Axes, rank: int, height: float) -> None:
    """A line at the rank of the students, named at `height`."""
    axes.axvline(rank, color=QUIET, lw=1)
    axes.text(rank, height, f"  rank {rank}", color=QUIET, va="bottom", size=9)


def titles(axes: Axes, title: str, subtitle: str) -> None:
    """A title with a quieter line below it."""
    axes.set_title(title, pad=24)
    axes.text(0, 1.035, subtitle, transform=axes.transAxes, color=QUIET, size=9.5)


def percent_axis(axis: Any) -> None:
    """Log axis in per cent: 0.1 %, 1 %, 10 %, 100 %."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(10))
    plain_axis(axis, " %", 100)


def plain_axis(axis: Any, unit: str = "", times: float = 1) -> None:
    """Log axis in plain numbers: 1, 10, 100."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{times * v:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())
