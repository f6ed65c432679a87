"""The figures of the study, from its JSON and nothing else."""

from pathlib import Path
from typing import Any

from benchmarks.generator_study.design import CONTRASTS
from benchmarks.generator_study.paper import SCHEMA
from distil_rank.core.figures import PALETTE, QUIET, drawn
from distil_rank.core.records import Record, read_json

SHOWN = ("no teacher", "distilled", "both", "slice")


def draw(folder: Path) -> list[Path]:
    """Draw every figure of the study in `folder` beside its JSON."""
    study, paths = read_json(folder / "study.json", SCHEMA), []
    for name, (fill, size) in FIGURES.items():
        paths.append(folder / f"{name}.png")
        with drawn(paths[-1], size) as figure:
            figure.set_layout_engine("constrained")
            fill(figure, study)
            figure.supxlabel(caption(study), fontsize=7, color=QUIET)
    return paths


def caption(study: Record) -> str:
    used, runs = study["data"]["test_proteins_used"], len(study["seeds"])
    source = study["data"]["source"]
    return f"{used:,} held-out proteins of {source}, {runs} runs a cell, 95 % t intervals over runs"


def _errors(axis: Any, x: Any, cells: list[Record], **style: Any) -> None:
    values = [cell["value"] for cell in cells]
    below = [v - cell["low"] for v, cell in zip(values, cells)]
    above = [cell["high"] - v for v, cell in zip(values, cells)]
    axis.errorbar(x, values, (below, above), marker="o", capsize=2, **style)


def doses(figure: Any, study: Record) -> None:
    """Perplexity of the first size along temperature and alpha, with its two references."""
    size, cells = next(iter(study["cells"].items()))
    for axis, (field, of) in zip(figure.subplots(1, 2, sharey=True), study["doses"].items()):
        found = [cell["perplexity"]["all"] for cell in of.values()]
        x = [float(value) for value in of]
        _errors(axis, x, found, color=PALETTE[0])
        alone = cells["no teacher"]["perplexity"]["all"]["value"]
        axis.axhline(alone, color=PALETTE[1], ls=":", label="no teacher (alpha = 1)")
        axis.axvline(study["objective"][field], color=QUIET, lw=0.8, label="chosen on validation")
        axis.set(xlabel=field, title=f"{field}, {size}", ylabel="test perplexity")
        axis.legend(fontsize=8)


def effects(figure: Any, study: Record) -> None:
    """Every planned contrast of every size."""
    axes = figure.subplots(1, len(study["effects"]), sharey=True, squeeze=False)[0]
    for axis, (size, of) in zip(axes, study["effects"].items()):
        for y, effect in enumerate(of.values()):
            color = QUIET if effect["word"] == "no effect found" else PALETTE[effect["value"] > 0]
            axis.plot([100 * effect[k] for k in ("low", "high")], [y, y], color=color, lw=2)
            axis.plot(100 * effect["value"], y, "o", color=color)
        axis.axvline(0, color=QUIET, lw=0.8)
        axis.set_yticks(range(len(CONTRASTS)), CONTRASTS)
        axis.set_ylim(len(CONTRASTS) - 0.5, -0.5)
        axis.set(title=size, xlabel="change of perplexity (%)")


def strata(figure: Any, study: Record) -> None:
    """Perplexity by difficulty beside teacher and token frequencies."""
    axes = figure.subplots(1, len(study["cells"]), sharey=True, squeeze=False)[0]
    names = [name for name in study["strata"] if name != "all"]
    for axis, (size, of) in zip(axes, study["cells"].items()):
        for (name, found), style in zip(study["references"]["perplexity"].items(), ("--", ":")):
            values = [found[stratum] for stratum in names]
            axis.plot(names, values, color=QUIET, ls=style, label=name)
        for color, cell in zip(PALETTE, SHOWN):
            found = [of[cell]["perplexity"][stratum] for stratum in names]
            _errors(axis, names, found, color=color, label=cell)
        axis.set(title=size)
    axes[0].set_ylabel("test perplexity")
    axes[0].legend(fontsize=7)


FIGURES = {
    "doses": (doses, (8, 3.4)),
    "effects": (effects, (10, 3.6)),
    "strata": (strata, (10, 3.6)),
}
