"""The report PNG of the benchmark, drawn from its two JSON files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_rank.layers.tables import CURVES_SCHEMA, SCHEMA, headline
from distil_rank.records import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PNG = "distil_rank_final_report.png"
COLOURS = {"Random": "#3767a6", "Task-Trained": "#c4502f", "Spectral": "#2f8f63"}
USER_COLOUR = "#7c4fa0"
INK, QUIET = "#22262b", "#8a9099"
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
        grid = figure.add_gridspec(2, 6, left=0.052, right=0.975, top=0.845, bottom=0.075, hspace=0.38, wspace=1.15)
        fidelity(figure.add_subplot(grid[0, :3]), summary)
        rank_curve(figure.add_subplot(grid[0, 3:]), summary, curves)
        training_loss(figure.add_subplot(grid[1, :2]), curves)
        weight_spectra(figure.add_subplot(grid[1, 2:4]), summary, curves)
        latency(figure.add_subplot(grid[1, 4:]), summary)
        first = next(iter(summary["experiments"].values()))
        small = f"{first['compression']:.2f} x smaller, {first['speedup']:.2f} x faster at batch 32"
        synthetic = "" if summary["real_data"] else "SYNTHETIC DATA: "
        figure.text(
            0.012, 0.965, f"{synthetic}a linear layer at rank {summary['target_rank']}: {small}", size=19, weight="bold"
        )
        figure.text(0.012, 0.934, headline(summary), size=11.5, color=INK)
        x = 0.012
        for name in summary["experiments"]:
            figure.text(x, 0.902, f"● {name} teacher", size=11.5, color=colour(name), weight="bold")
            x += 0.0078 * (len(name) + 12)
        canvas = FigureCanvasAgg(figure)
        temporary = folder / f"{PNG}.tmp{os.getpid()}"
        try:
            canvas.print_png(temporary, metadata={"Software": None})
            os.replace(temporary, folder / PNG)
        finally:
            temporary.unlink(missing_ok=True)
    return folder / PNG


def colour(name: str) -> str:
    return COLOURS.get(name, USER_COLOUR)


def fidelity(axes: Axes, summary: dict[str, Any]) -> None:
    """FVU of every student, a point a seed, a tick at the mean; the floor of each teacher as a line."""
    experiments = summary["experiments"]
    labels = [label for label in next(iter(experiments.values()))["students"] if not label.startswith("floor")]
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
    axes.set_title("What each student loses   ·  a point a seed, dashed: the floor no student of this rank can beat")


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
    axes.set_ylim(1e-3, 1.3)
    axes.axvline(summary["target_rank"], color=QUIET, lw=1)
    axes.text(
        summary["target_rank"], 1.32, f" rank {summary['target_rank']}", color=QUIET, va="bottom", ha="center", size=9
    )
    for target in (0.1, 0.05, 0.01):
        axes.axhline(target, color=QUIET, lw=0.8, ls=":")
    plain_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.set_xlabel("rank of the student")
    axes.set_ylabel("FVU on held-out rows")
    axes.set_title("How small can it be   ·  solid: optimum, dashed: floor", pad=20)


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
    axes.set_title("Training loss   ·  pale: plain recipe")


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
    axes.set_title("Weight spectra")


def latency(axes: Axes, summary: dict[str, Any]) -> None:
    """Speed-up with its interquartile range at each batch size, against the FLOP bound."""
    rows = next(iter(summary["experiments"].values()))["latency"]
    bound = rows[0]["flop_bound"]
    for i, row in enumerate(rows):
        speedup = row["speedup"]
        axes.bar(i, speedup["median"], width=0.62, color="#5b6b7f" if row["mode"] == "eager" else "#a9b4c2", zorder=2)
        spread = [[speedup["median"] - speedup["q25"]], [speedup["q75"] - speedup["median"]]]
        axes.errorbar(i, speedup["median"], yerr=spread, color=INK, lw=1.2, capsize=3, zorder=3)
        text = f"{row['teacher_ms']['median']:.3g} → {row['student_ms']['median']:.3g} ms"
        axes.text(i, 0.25, text, ha="center", va="bottom", size=8, color="white", rotation=90 if len(rows) > 4 else 0)
        share = f"{speedup['median']:.1f} x\n{row['fraction_of_bound']:.0%}"
        axes.text(i, speedup["q75"] + 0.02 * bound, share, ha="center", va="bottom", size=9)
    axes.axhline(bound, color=QUIET, lw=1.2, ls=(0, (4, 3)))
    axes.text(len(rows) - 0.5, bound, f"FLOP bound {bound:.2f}", ha="right", va="bottom", color=QUIET, size=9)
    axes.set_ylim(0, 1.25 * max(bound, *(row["speedup"]["q75"] for row in rows)))
    names = [f"batch {row['batch']}" + ("" if row["mode"] == "eager" else f"\n{row['mode']}") for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("speed-up over the teacher")
    device = summary["environment"]["device"]
    threads = f", {rows[0]['threads']} thread{'s' if rows[0]['threads'] > 1 else ''}" if device == "cpu" else ""
    axes.set_title(f"Latency   ·  {device.upper() if device == 'cpu' else device}{threads}, % of the bound reached")


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
