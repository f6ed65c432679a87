"""The report PNG of the benchmark, drawn from its two JSON files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_rank.experiment.tables import CURVES_SCHEMA, SCHEMA, headline
from distil_rank.core.records import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PNG = "distil_rank_final_report.png"
COLOURS = {"Random": "#3767a6", "Task-Trained": "#c4502f", "Spectral": "#2f8f63"}
USER_COLOUR = "#7c4fa0"
INK, QUIET = "#22262b", "#6f7680"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


def draw(folder: str | Path) -> Path:
    """Draw FOLDER/distil_rank_final_report.png from the summary and the curves in FOLDER; returns its path."""
    import matplotlib

    folder = Path(folder)
    summary = read_json(folder / "distil_rank_summary.json", SCHEMA)
    curves = read_json(folder / "distil_rank_curves.json", CURVES_SCHEMA)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10.4), dpi=110, facecolor="white")
        top = figure.add_gridspec(
            1, 2, left=0.155, right=0.975, top=0.815, bottom=0.5, wspace=0.22, width_ratios=[1.15, 1]
        )
        bottom = figure.add_gridspec(1, 3, left=0.06, right=0.975, top=0.375, bottom=0.07, wspace=0.28)
        fidelity(figure.add_subplot(top[0]), summary)
        rank_curve(figure.add_subplot(top[1]), summary, curves)
        training_loss(figure.add_subplot(bottom[0]), curves)
        weight_spectra(figure.add_subplot(bottom[1]), summary, curves)
        latency(figure.add_subplot(bottom[2]), summary)
        figure.text(0.012, 0.965, title(summary), size=19, weight="bold")
        figure.text(0.012, 0.934, headline(summary), size=11.5, color=INK)
        names = list(summary["experiments"])
        for i, name in enumerate(names):
            figure.text(0.012 + 0.15 * i, 0.9, f"● {name} teacher", size=11.5, color=colour(name), weight="bold")
        canvas = FigureCanvasAgg(figure)
        temporary = folder / f"{PNG}.tmp{os.getpid()}"
        try:
            canvas.print_png(temporary, metadata={"Software": None})
            os.replace(temporary, folder / PNG)
        finally:
            temporary.unlink(missing_ok=True)
    return folder / PNG


def title(summary: dict[str, Any]) -> str:
    """The figure's title: how small and how fast; SYNTHETIC where the data is."""
    first = next(iter(summary["experiments"].values()))
    synthetic = "" if summary["real_data"] else "SYNTHETIC DATA: "
    gain = f"{first['compression']:.2f} x smaller, {first['speedup']:.2f} x faster at batch 32"
    return f"{synthetic}A linear layer at rank {summary['target_rank']}: {gain}"


def colour(name: str) -> str:
    return COLOURS.get(name, USER_COLOUR)


def fidelity(axes: Axes, summary: dict[str, Any]) -> None:
    """FVU of every student, a point a seed, a tick at the mean; the floor of each teacher as a line."""
    experiments = summary["experiments"]
    labels = list(next(iter(experiments.values()))["students"])
    offsets = [0.24 * (i - (len(experiments) - 1) / 2) for i in range(len(experiments))]
    for (name, experiment), offset in zip(experiments.items(), offsets):
        floor = next(m for label, m in experiment["students"].items() if label.startswith("floor"))["fvu"]["value"]
        axes.axvline(floor, color=colour(name), lw=1.2, ls=(0, (4, 3)), zorder=1)
        for row, label in enumerate(labels):
            fvu = experiment["students"][label]["fvu"]
            values = fvu["per_seed"]
            axes.scatter(values, [row + offset] * len(values), s=30, color=colour(name), alpha=0.55, lw=0, zorder=3)
            axes.scatter([fvu["value"]], [row + offset], marker="|", s=170, color=colour(name), lw=2, zorder=4)
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for row in range(1, len(labels)):
        axes.axhline(row - 0.5, color="#eef0f2", lw=0.8, zorder=0)
    axes.axvline(1, color=QUIET, lw=1)
    percent_axis(axes.xaxis)
    axes.set_xlabel("FVU on held-out rows (fraction of variance unexplained; smaller is better)")
    titles(
        axes,
        "What each student loses",
        "a point a seed, | the mean, dashed: the mean floor; no student of a seed can be left of its own floor",
    )


def rank_curve(axes: Axes, summary: dict[str, Any], curves: dict[str, Any]) -> None:
    """FVU of the optimum at every rank on held-out rows, with the floor there."""
    for name, experiment in curves["experiments"].items():
        ranks, rank = experiment["rank"], summary["target_rank"]
        n = min(len(ranks["fvu"]), len(ranks["floor_fvu"]))
        axes.plot(range(1, n), ranks["fvu"][1:n], color=colour(name), lw=2, zorder=3)
        axes.plot(range(1, n), ranks["floor_fvu"][1:n], color=colour(name), lw=1.2, ls=(0, (4, 3)), zorder=3)
        axes.scatter([rank], [ranks["fvu"][rank]], color=colour(name), s=36, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    compared = [experiment["rank"]["fvu"][summary["target_rank"]] for experiment in curves["experiments"].values()]
    lowest = max(1e-9, min(1e-3, *(value / 3 for value in compared)))
    axes.set_ylim(lowest, 1.3)
    axes.axvline(summary["target_rank"], color=QUIET, lw=1)
    axes.text(
        summary["target_rank"], 1.2 * lowest, f"  rank {summary['target_rank']}", color=QUIET, va="bottom", size=9
    )
    for target in (0.1, 0.05, 0.01):
        axes.axhline(target, color=QUIET, lw=0.8, ls=":")
    plain_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.set_xlabel("rank of the student")
    axes.set_ylabel("FVU on held-out rows")
    titles(
        axes, "How small can it be", "solid: the optimum at every rank, dashed: the floor, dot: the students compared"
    )


def training_loss(axes: Axes, curves: dict[str, Any]) -> None:
    """Mean loss over seeds: the improved recipe strong, the plain one pale."""
    for name, experiment in curves["experiments"].items():
        for label, values in experiment["loss"].items():
            pale = "plain" in label
            axes.plot(
                [i * 100 / max(1, len(values) - 1) for i in range(len(values))],
                values,
                color=colour(name),
                lw=1.1 if pale else 2,
                alpha=0.4 if pale else 1,
                zorder=2 if pale else 3,
            )
    axes.set_yscale("log")
    axes.set_xlabel("training, % of the steps")
    axes.set_ylabel("MSE + 0.1 (1 - cosine)")
    titles(axes, "Training loss", "mean over seeds; pale: the plain recipe")


def weight_spectra(axes: Axes, summary: dict[str, Any], curves: dict[str, Any]) -> None:
    """Singular values of the teachers' weights and the rank cut-off."""
    for name, experiment in curves["experiments"].items():
        values = experiment["singular_values"]
        axes.plot(range(1, len(values) + 1), [v / values[0] for v in values], color=colour(name), lw=2)
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1.3)
    axes.axvline(summary["target_rank"], color=QUIET, lw=1)
    axes.text(summary["target_rank"], 1.1e-3, f"  rank {summary['target_rank']}", color=QUIET, va="bottom", size=9)
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel("singular value / largest")
    titles(axes, "Weight spectra", "singular values of seed 0's teachers, and where truncation cuts")


def latency(axes: Axes, summary: dict[str, Any]) -> None:
    """Speed-up with its interquartile range at each batch size, against the FLOP bound."""
    rows = next(iter(summary["experiments"].values()))["latency"]
    bound = rows[0]["flop_bound"]
    for i, row in enumerate(rows):
        speedup = row["speedup"]
        axes.bar(i, speedup["median"], width=0.62, color="#5b6b7f" if row["mode"] == "eager" else "#a9b4c2", zorder=2)
        spread = [[speedup["median"] - speedup["q25"]], [speedup["q75"] - speedup["median"]]]
        axes.errorbar(i, speedup["median"], yerr=spread, color=INK, lw=1.2, capsize=3, zorder=3)
        share = f"{speedup['median']:.1f} x\n{row['fraction_of_bound']:.0%}"
        tall = speedup["median"] > 0.3 * bound
        place: dict[str, Any] = {"va": "top", "color": "white", "weight": "bold"} if tall else {"va": "bottom"}
        axes.text(i, speedup["q25"] * 0.97 if tall else speedup["q75"] * 1.05, share, ha="center", size=9.5, **place)
    axes.axhline(bound, color=QUIET, lw=1.2, ls=(0, (4, 3)))
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
    device = summary["environment"]["device"]
    threads = f", {rows[0]['threads']} thread{'s' if rows[0]['threads'] > 1 else ''}" if device == "cpu" else ""
    titles(
        axes,
        "Latency",
        f"on {device.upper() if device == 'cpu' else device}{threads}; with the share of the FLOP bound reached",
    )


def titles(axes: Axes, title: str, subtitle: str) -> None:
    """A title with a quieter line below it."""
    axes.set_title(title, pad=24)
    axes.text(0, 1.035, subtitle, transform=axes.transAxes, color=QUIET, size=9.5)


def percent_axis(axis: Any) -> None:
    """Log axis in per cent: 0.1 %, 1 %, 10 %, 100 %."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
    axis.set_minor_formatter(NullFormatter())


def plain_axis(axis: Any) -> None:
    """Log axis in plain numbers: 1, 10, 100."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
