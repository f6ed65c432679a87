"""The experiment's figure, from its two JSON files alone."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_rank.core.agreement import NAMES
from distil_rank.core.figures import INK, PALETTE, QUIET, drawn
from distil_rank.core.records import Record, read_json
from distil_rank.core.tables import number
from distil_rank.experiment.tables import headline, timings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = "distil-rank/benchmark/2"
CURVES_SCHEMA = "distil-rank/benchmark-curves/2"
SUMMARY, CURVES = "distil_rank_summary.json", "distil_rank_curves.json"
PNG = "distil_rank_final_report.png"
WARNING = PALETTE[1]
DASHED = (0, (4, 3))


def draw(folder: str | Path) -> Path:
    """Draw FOLDER/distil_rank_final_report.png from the summary and the curves in FOLDER."""
    folder = Path(folder)
    summary = read_json(folder / SUMMARY, SCHEMA)
    curves = read_json(folder / CURVES, CURVES_SCHEMA)
    head = summary.get("head")
    with drawn(folder / PNG, (22 if head else 16, 10.4)) as figure:
        widths, left = ([1.5, 1.1, 1], 0.11) if head else ([1.15, 1], 0.155)
        place = {"left": left, "right": 0.975, "top": 0.815, "bottom": 0.5, "wspace": 0.22}
        top = figure.add_gridspec(1, len(widths), width_ratios=widths, **place)
        place = {"left": 0.06, "right": 0.67, "top": 0.375, "bottom": 0.07, "wspace": 0.24}
        bottom = figure.add_gridspec(1, 2, **place)
        fidelity(figure.add_subplot(top[0]), summary)
        rank_curve(figure.add_subplot(top[1]), curves)
        if head:
            function_kept(figure.add_subplot(top[2]), head)
        training_loss(figure.add_subplot(bottom[0]), curves)
        weight_spectra(figure.add_subplot(bottom[1]), curves)
        latency(figure.add_axes((0.775, 0.07, 0.2, 0.305)), summary)
        figure.text(0.012, 0.965, title(summary), size=19, weight="bold")
        figure.text(0.012, 0.934, headline(summary), size=11.5, color=INK)
        notice = textwrap.fill("; ".join(summary["notices"]), 190)
        figure.text(0.012, 0.891, notice, size=9, color=WARNING, weight="bold", va="top")
        for i, name in enumerate(summary["experiments"]):
            text, ink = f"● {name} teacher", PALETTE[i]
            figure.text(0.012 + 0.2 * i, 0.9, text, size=11.5, color=ink, weight="bold")
    return folder / PNG


def title(summary: Record) -> str:
    """The figure's title: how small and how fast; SYNTHETIC where the data is."""
    first = next(iter(summary["experiments"].values()))
    synthetic = "" if summary["real_data"] else "SYNTHETIC DATA: "
    gains = [number(first[key]) for key in ("compression", "speedup")]
    gain = f"{gains[0]} x smaller, {gains[1]} x faster at batch 32"
    return f"{synthetic}A linear layer at rank {summary['target_rank']}: {gain}"


def fidelity(axes: Axes, summary: Record) -> None:
    """FVU of every student, a point a seed, a tick at the mean; each teacher's floor as a line."""
    experiments = summary["experiments"]
    labels = list(next(iter(experiments.values()))["students"])
    for i, experiment in enumerate(experiments.values()):
        offset, ink = 0.24 * (i - (len(experiments) - 1) / 2), PALETTE[i]
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
    for ink, experiment in zip(PALETTE, curves["experiments"].values()):
        fvu, floor = experiment["rank"]["fvu"], experiment["rank"]["floor_fvu"]
        n = min(len(fvu), len(floor))
        axes.plot(range(1, n), fvu[1:n], color=ink, lw=2, zorder=3)
        axes.plot(range(1, n), floor[1:n], color=ink, lw=1.2, ls=DASHED, zorder=3)
        axes.scatter([rank], [fvu[rank]], color=ink, s=36, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    compared = [experiment["rank"]["fvu"][rank] for experiment in curves["experiments"].values()]
    lowest = max(1e-9, min(1e-3, *(value / 3 for value in compared)))
    axes.set_ylim(lowest, 1.3)
    mark_rank(axes, rank, 1.2 * lowest, "right")
    for target in (0.1, 0.05, 0.01):
        axes.axhline(target, color=QUIET, lw=0.8, ls=":")
    plain_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.set_xlabel("rank of the student")
    axes.set_ylabel("FVU on held-out rows")
    marks = "solid: the optimum at every rank, dashed: the floor, dot: the students compared"
    titles(axes, "How small can it be", marks)


def function_kept(axes: Axes, head: Record) -> None:
    """What each class of students of a head keeps of its function by size; the floor dashed."""
    labels = list(dict.fromkeys(s["student"] for s in head["students"]))
    for label, ink in zip(labels, PALETTE[3:] + PALETTE[:3]):  # the first three are teachers'
        style = {"color": QUIET, "ls": DASHED} if label == "floor" else {"color": ink}
        found = [s for s in head["students"] if s["student"] == label]
        found.sort(key=lambda s: s["bytes_ratio"])
        x = [s["bytes_ratio"] for s in found]
        low, y, high = ([s["kept"][key] for s in found] for key in ("low", "value", "high"))
        axes.plot(x, y, marker="o", ms=4, lw=1.8, label=label, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    largest = max(s["bytes_ratio"] for s in head["students"])
    sizes = [2**i for i in range(7) if 2**i <= 1.3 * largest]
    axes.set_xticks(sizes, [f"1/{n}" if n > 1 else "1" for n in sizes])
    axes.set_xlabel("size of the student over the head's, in bytes")
    axes.legend(fontsize=9, loc="lower left")
    note = f"{NAMES[head['measure']]}, {head['n_val']:,} held-out rows, 95 % bands"
    titles(axes, f"What is kept of the head {head['name']}", note)


def training_loss(axes: Axes, curves: Record) -> None:
    """Mean loss over seeds: the improved recipe strong, the plain one pale."""
    strong: dict[str, Any] = {"lw": 2, "alpha": 1, "zorder": 3}
    pale: dict[str, Any] = {"lw": 1.1, "alpha": 0.4, "zorder": 2}
    for ink, experiment in zip(PALETTE, curves["experiments"].values()):
        for label, values in experiment["loss"].items():
            share = [100 * i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(share, values, color=ink, **(pale if "plain" in label else strong))
    axes.set_yscale("log")
    axes.set_xlabel("training, % of the steps")
    axes.set_ylabel("MSE + 0.1 (1 - cosine)")
    titles(axes, "Training loss", "mean over seeds; pale: the plain recipe")


def weight_spectra(axes: Axes, curves: Record) -> None:
    """Singular values of the teachers' weights and the rank cut-off."""
    for ink, experiment in zip(PALETTE, curves["experiments"].values()):
        values = experiment["singular_values"]
        shares = [value / values[0] for value in values]
        axes.plot(range(1, len(values) + 1), shares, color=ink, lw=2)
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1.3)
    mark_rank(axes, curves["target_rank"], 1.1e-3)
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel("singular value / largest")
    note = "singular values of seed 0's teachers, and where truncation cuts"
    titles(axes, "Weight spectra", note)


def latency(axes: Axes, summary: Record) -> None:
    """Speed-up with its interquartile range at each batch size, against the FLOP bound."""
    place, ticks = 0.0, {}
    edge = 1.8 * max(rows[0]["flop_bound"] for rows in timings(summary).values())
    for layer, rows in timings(summary).items():
        bound, top = rows[0]["flop_bound"], place
        note = f"{layer}; dashed: FLOP bound {number(bound)}"
        axes.text(0.015 * bound, place, note, va="center", size=9, color=QUIET)
        for row in rows:
            place += 1
            low, median, high = (row["speedup"][key] for key in ("q25", "median", "q75"))
            shade = "#5b6b7f" if row["mode"] == "eager" else "#a9b4c2"
            axes.barh(place, median, height=0.7, color=shade, zorder=2)
            spread = [[median - low], [high - median]]
            axes.errorbar(median, place, xerr=spread, color=INK, lw=1.2, capsize=3, zorder=3)
            share = f"{number(median)} x, {row['fraction_of_bound']:.0%}"
            box = {"fc": "white", "lw": 0, "pad": 1}
            look: dict[str, Any] = {"ha": "right", "va": "center", "size": 9.5, "bbox": box}
            axes.text(edge, place, share, zorder=4, **look)
            times = [number(row[f"{side}_ms"]["median"]) for side in ("teacher", "student")]
            graph = "" if row["mode"] == "eager" else ", graph"
            ticks[place] = f"batch {row['batch']}{graph}\n{' → '.join(times)} ms"
        axes.plot([bound, bound], [top + 0.5, place + 0.5], color=QUIET, lw=1.2, ls=DASHED)
        place += 1.2
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xlim(0, edge)
    axes.set_yticks(list(ticks), list(ticks.values()), size=9 if len(ticks) < 8 else 7)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("speed-up over the teacher")
    device, threads = summary["environment"]["device"], rows[0]["threads"]
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    where = cpu if device == "cpu" else device
    titles(axes, "Latency", f"on {where}; %: share of the FLOP bound")


def mark_rank(axes: Axes, rank: int, height: float, side: str = "left") -> None:
    """A line at the rank of the students, named at `height`; its text ends or begins there."""
    axes.axvline(rank, color=QUIET, lw=1)
    axes.text(rank, height, f"  rank {rank}  ", color=QUIET, va="bottom", ha=side, size=9)


def titles(axes: Axes, title: str, subtitle: str) -> None:
    """A title with a quieter line below it."""
    axes.set_title(title, pad=24)
    axes.text(0, 1.035, subtitle, transform=axes.transAxes, color=QUIET, size=9.5)


def percent_axis(axis: Any) -> None:
    """Log axis in per cent: 0.1 %, 1 %, 10 %, 100 %."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 100 * low else (1,)))
    plain_axis(axis, " %", 100)


def plain_axis(axis: Any, unit: str = "", times: float = 1) -> None:
    """Log axis in plain numbers: 1, 10, 100."""
    axis.set_major_formatter(lambda value, _: f"{times * value:g}{unit}")
    axis.set_minor_formatter("")
