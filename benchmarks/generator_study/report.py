"""The figures of a study, and its paper, from its JSON and nothing else.

python -m benchmarks.generator_study.report results/generators
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generator_study.paper import paper
from benchmarks.generator_study.presets import CELLS
from benchmarks.generator_study.study import CURVES, SCHEMA
from distil_rank.core.records import Record, atomic, read_json, write_text

COLORS = dict(zip(CELLS, ("#444444", "#0072B2", "#D55E00", "#009E73")))
STUDENT, TEACHER, NATURAL = "#0072B2", "#444444", "#E69F00"
FEW = 20  # tokens: bins below are not drawn (they stay in the table's ECE)
WIDE = ("ablation", "reliability", "uncertainty", "speed")


def draw(folder: Path) -> Path:
    """Draw every figure of the study in `folder` beside its JSON."""
    study = read_json(folder / "study.json", SCHEMA)
    curves = read_json(folder / "curves.json", CURVES)
    for name, figure in figures(study, curves):
        with atomic(folder / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=130, metadata={"Software": None})
    return folder / "study.json"


def figures(study: Record, curves: Record) -> Iterator[tuple[str, Any]]:
    """The figures by name, drawn one after the other."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    for name, fill in FIGURES.items():
        with rc_context(style):
            figure = Figure(figsize=(8.5 if name in WIDE else 6, 3.8), layout="constrained")
            FigureCanvasAgg(figure)
            fill(figure, study, curves)
        yield name, figure


def _caption(figure: Any, study: Record, text: str) -> None:
    data = study["data"]
    figure.supxlabel(
        f"{text}; {data['n_test']:,} held-out proteins of {data['source']}",
        fontsize=7,
        color="#555555",
    )


def _ablation(figure: Any, study: Record, curves: Record) -> None:
    schedules = study["ablation"]["schedules"]
    axes = figure.subplots(1, len(schedules), sharex=True, sharey=True, squeeze=False)[0]
    rows = [*CELLS[1:], "interaction"]
    for axis, (name, part) in zip(axes, schedules.items(), strict=True):
        for y, row in enumerate(rows):
            effect, color = part["contrasts"][row], COLORS.get(row, "#CC79A7")
            values = [100 * effect[k] for k in ("low", "high")]
            axis.plot(values, [y, y], color=color, lw=2)
            axis.plot(100 * effect["value"], y, "o", color=color)
            axis.annotate(
                part["contrasts"]["words"][row],
                (0.99, y - 0.22),
                xycoords=("axes fraction", "data"),
                ha="right",
                fontsize=7,
                color=color,
            )
        axis.axvline(0, color="#999999", lw=0.8)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(name)
        axis.set_xlabel("change of perplexity (%), negative is better")
    axes[0].set_ylim(len(rows) - 0.6, -0.6)
    runs = next(iter(schedules.values()))["contrasts"]["interaction"]["runs"]
    _caption(figure, study, f"Paired differences, {runs} runs a cell, 95 % t intervals")


def _sweep(field: str) -> Any:
    def draw(figure: Any, study: Record, curves: Record) -> None:
        axis = figure.subplots()
        for cell in ("baseline", "both"):
            entries = study[field][cell]
            x = [e[field] for e in entries]
            ratios = [e["ratio"] for e in entries]
            y = [r["value"] for r in ratios]
            error = [
                [r["value"] - r["low"] for r in ratios],
                [r["high"] - r["value"] for r in ratios],
            ]
            axis.errorbar(x, y, error, color=COLORS[cell], marker="o", capsize=2, label=cell)
        axis.axvline(study[field]["chosen"], color="#999999", ls=":", label="chosen on validation")
        if field == "temperature":
            axis.set_xscale("log")
        axis.set_xticks(x, [f"{v:g}" for v in x])
        axis.set_xticks([], minor=True)
        axis.set_xlabel(field)
        axis.set_ylabel("student / teacher perplexity")
        axis.legend()
        _caption(figure, study, "One run a point, 95 % interval over proteins")

    return draw


def _pareto(figure: Any, study: Record, curves: Record) -> None:
    axis = figure.subplots()
    farthest = max(record["compression"]["total"] for record in study["sizes"].values())
    for name, record in study["sizes"].items():
        x, ratio = record["compression"]["total"], record["ratio"]
        axis.errorbar(
            x,
            ratio["value"],
            yerr=[[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]],
            fmt="o",
            color=STUDENT,
            capsize=3,
        )
        axis.annotate(
            f" {name} \n {record['student']['parameters']['total']:,} parameters ",
            (x, ratio["value"]),
            fontsize=7,
            va="bottom",
            ha="right" if x == farthest else "left",
        )
    axis.axhline(1, color=TEACHER, lw=0.8)
    axis.annotate("teacher", (0.01, 1), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    axis.set_xscale("log")
    axis.margins(x=0.25, y=0.2)
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}x")
    axis.xaxis.set_minor_formatter(lambda v, _: f"{v:g}x" if v in (2, 3, 5, 20, 30, 50, 70) else "")
    axis.set_xlabel("fewer parameters than the teacher, embeddings included")
    axis.set_ylabel("student / teacher perplexity")
    _caption(figure, study, "One run a size, 95 % interval over proteins")


def _reliability(figure: Any, study: Record, curves: Record) -> None:
    record = study["sizes"][study["ablated_size"]]
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    panels = [
        ("teacher", record["teacher"]["calibration"]["as_is"], TEACHER),
        (f"student ({study['ablated_size']})", record["student"]["calibration"]["as_is"], STUDENT),
        (
            "student, temperature scaled",
            record["student"]["calibration"]["temperature_scaled"],
            STUDENT,
        ),
    ]
    kept = [[i for i, n in enumerate(c["bins"]["count"]) if n >= FEW] for _, c, _ in panels]
    limits, ticks = (0.03, 1.2), (0.05, 0.1, 0.2, 0.5, 1)
    for axis, (title, found, color), rows in zip(axes, panels, kept, strict=True):
        bins = {name: np.array(values)[rows] for name, values in found["bins"].items()}
        half, accuracy = 1.96 * bins["standard_error"], bins["accuracy"]
        below = np.minimum(half, accuracy - limits[0] / 2)  # a logarithmic axis has no 0
        axis.plot(limits, limits, color="#999999", lw=0.8)
        axis.errorbar(
            bins["confidence"],
            accuracy,
            yerr=[below.clip(0), half],
            fmt="o",
            color=color,
            capsize=2,
        )
        axis.set(xscale="log", yscale="log", xlim=limits, ylim=limits, xlabel="confidence")
        for side in (axis.xaxis, axis.yaxis):
            side.set_ticks(ticks, [f"{v:g}" for v in ticks])
            side.set_ticks([], minor=True)
        axis.set_title(title, fontsize=9)
        text = f"signed gap {found['signed_gap']['value']:+.4f}"
        axis.text(0.03, 0.97, text, transform=axis.transAxes, va="top", fontsize=7)
    axes[0].set_ylabel("accuracy")
    _caption(
        figure,
        study,
        f"Most probable token, bins of {FEW} tokens or more, 95 % intervals;"
        " scaling fitted on half of the proteins",
    )


def _amino_acids(figure: Any, study: Record, curves: Record) -> None:
    record = study["sizes"][study["ablated_size"]]
    axis = figure.subplots()
    sources = [
        ("natural", record["student"]["generation"]["natural_frequencies"], NATURAL),
        ("teacher", record["teacher"]["generation"]["frequencies"], TEACHER),
        ("student", record["student"]["generation"]["frequencies"], STUDENT),
    ]
    letters = sorted(sources[0][1], key=lambda a: -sources[0][1][a])
    for shift, (name, frequencies, color) in enumerate(sources):
        divergence = (
            {} if name == "natural" else record[name]["generation"].get("amino_acid_kl", {})
        )
        kl = f", KL {divergence['value']:.4f} nats" if divergence else ""
        axis.bar(
            [i + 0.28 * (shift - 1) for i in range(20)],
            [100 * frequencies[a] for a in letters],
            0.28,
            color=color,
            label=name + kl,
        )
    axis.set_xticks(range(20), letters)
    axis.set_ylabel("frequency (%)")
    axis.legend()
    n = record["student"]["generation"]["n"]
    _caption(figure, study, f"{n} proteins written by either, natural ones of equal lengths")


def _speed(figure: Any, study: Record, curves: Record) -> None:
    left, right = figure.subplots(1, 2)
    first = next(iter(study["sizes"].values()))
    batches = [k for k in first["speed"]["models"]["teacher"] if k.isdigit()]
    shades = ["#0072B2", "#56B4E9", "#009E73", "#CC79A7"]
    for (name, record), color in zip(study["sizes"].items(), shades, strict=False):
        speeds = record["speed"]["models"]
        ratio = [
            speeds["student"][b]["tokens_per_second"] / speeds["teacher"][b]["tokens_per_second"]
            for b in batches
        ]
        left.plot(range(len(batches)), ratio, "o-", color=color, label=name)
        right.bar(name, speeds["teacher"]["peak_mib"] / speeds["student"]["peak_mib"], color=color)
    left.set_xticks(range(len(batches)), batches)
    left.set_xlabel("proteins written together")
    left.set_ylabel("speed / teacher's")
    left.set_ylim(bottom=0)
    left.axhline(1, color="#999999", lw=0.8)
    left.legend()
    right.axhline(1, color="#999999", lw=0.8)
    right.set_ylabel("teacher's peak memory / student's")
    repeats, device = first["speed"]["repeats"], study["environment"]["device"]
    _caption(figure, study, f"Medians of {repeats} interleaved rounds on {device}")


def _uncertainty(figure: Any, study: Record, curves: Record) -> None:
    examples = curves["uncertainty"]
    width, total = (
        max(len(e["entropy"]) for e in examples),
        sum(len(e["entropy"]) for e in examples),
    )
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axis, name, colors in ((top, "entropy", "viridis"), (bottom, "weight", "magma")):
        table = [e[name] + [float("nan")] * (width - len(e[name])) for e in examples]
        # line breaks and ends are all but certain: the colors are for the residues between them
        low, high = (
            sorted(v for e in examples for v in e[name])[int(q * total)] for q in (0.06, 0.995)
        )
        image = axis.imshow(
            table, aspect="auto", cmap=colors, interpolation="nearest", vmin=low, vmax=high
        )
        axis.set_ylabel("protein")
        axis.set_yticks([])
        figure.colorbar(
            image,
            ax=axis,
            label="teacher's entropy (nats)" if name == "entropy" else "weight",
            pad=0.01,
        )
    bottom.set_xlabel("position")
    _caption(
        figure, study, "Uncertainty of the teacher and the weights it gives, median-length proteins"
    )


FIGURES = {
    "ablation": _ablation,
    "temperature": _sweep("temperature"),
    "alpha": _sweep("alpha"),
    "pareto": _pareto,
    "reliability": _reliability,
    "amino_acids": _amino_acids,
    "speed": _speed,
    "uncertainty": _uncertainty,
}


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["results/generators"]:
        place = Path(argument)
        print(f"drawn: {draw(place)}")
        text = paper(read_json(place / "study.json", SCHEMA), figures=".")
        write_text(place / "paper.md", text + "\n")
