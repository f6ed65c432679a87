"""The figure of a probe, drawn from its JSON alone.

distil-rank report      # results/nested_report.png from results/nested_summary.json, and every other figure
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from distil_rank.nested.tables import POOL_WORDS, SCHEMA, stage_scores
from distil_rank.core.records import read_json

INK, PALE = "#22262b", "#9aa3ad"
# one colour per kind in all panels
COLOURS = {
    "nested-pcr": "#0b6e99",
    "nested-ols": "#5bb0d1",
    "nested-ridge": "#0b6e99",
    "raw": INK,
    "naive-pca": "#d1793b",
    "large-pca": "#8a6fb3",
    "random-completion": "#8f9a3c",
    "concatenation": "#b0413e",
    "single-pass": "#2f9e6e",
    "one-hot": PALE,
    "composition": PALE,
}
WORDS = {
    "nested-pcr": "nested (PCR)",
    "nested-ols": "nested (OLS)",
    "nested-ridge": "nested (ridge)",
    "raw": "raw",
    "naive-pca": "naive PCA of all",
    "large-pca": "PCA of the largest",
    "random-completion": "random completion",
    "concatenation": "concatenation",
    "single-pass": "single pass",
    "one-hot": "one-hot",
}


def draw(folder: Path) -> Path:
    """Draw `nested_report.png` from `nested_summary.json`, both in `folder`."""
    return draw_summary(folder / "nested_summary.json", folder / "nested_report.png")


def draw_summary(summary: Path, out: Path) -> Path:
    """Draw the report of a summary; the PNG appears whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    record = read_json(summary, SCHEMA)
    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": PALE,
        "axes.labelcolor": INK,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.color": "#e7eaed",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(15, 15.5), layout="constrained")
        top, middle, bottom = figure.subfigures(  # type: ignore[misc]
            3, 1, height_ratios=[1, 1.1, 1.55], hspace=0.03
        )
        upper = top.subplots(1, 3)
        stages(upper[0], record)
        spectra(upper[1], record)
        if record.get("locations"):
            located(upper[2], record)
        else:
            schemes(upper[2], record, "site")
        axes = middle.subplots(1, 2)
        limits = []
        for axis, pool in zip(axes, ("site", "mean")):
            curve(axis, record, pool)
            limits.append(axis.get_ylim())
        axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.6)
        forest(bottom.subplots(1, 2, sharey=True), record)
        figure.suptitle(
            title(record), x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK
        )
        figure.supxlabel(caption(record), x=0.012, ha="left", fontsize=9, color="#5b636c")
        temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
        try:
            figure.savefig(
                temporary, dpi=130, format="png", facecolor="white", metadata={"Software": None}
            )
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
            plt.close(figure)
    return out


def title(record: Mapping[str, Any]) -> str:
    models = [m["model"] for m in record["data"]["models"].values()] or list(
        record["chain"]["dims"]
    )
    return f"Nested embeddings of {', '.join(models)}: what every dimension is worth"


def caption(record: Mapping[str, Any]) -> str:
    data, chain, assays = record["data"]["chain"], record["chain"], record["data"]["assays"]
    mutants = sum(a["used"] for a in assays)
    lines = [
        f"Chain: {chain['regression'].partition('-')[2].upper()}, fitted on {chain['rows']['fit']:,.0f} residues, scored on"
        f" {chain['rows']['held_out']:,.0f} held-out residues ({data.get('proteins', 0):,} proteins in all)."
        f" Probe: {len(assays)} assays, {mutants:,} single mutants (at most {record['config']['mutants'] or 'all'} each, seed"
        f" {record['seeds'][0]}), ridge, penalty by nested cross-validation.",
        "Spearman over all out-of-fold predictions, mean over random, modulo and contiguous folds, then over assays. Bars and"
        " bands: 95 % intervals over assays (R²: over proteins; accuracy: over test proteins). Holm: over all comparisons.",
    ]
    return "\n".join(lines)


def stages(axis: Any, record: Mapping[str, Any]) -> None:
    """What is left unexplained of each size, 1 - R^2, from the prefix alone and with the new directions."""
    found = stage_scores(record["chain"])
    dims, colour = record["chain"]["dims"], COLOURS[record["chain"]["regression"]]
    for i, values in enumerate(found.values()):
        for kind, face, shift in (("regression", "white", -0.06), ("reconstruction", colour, 0.06)):
            v = {end: max(1 - values[kind][end], 1e-9) for end in ("value", "low", "high")}
            axis.plot([i + shift] * 2, [v["low"], v["high"]], color=colour, lw=2, zorder=2)
            axis.plot(i + shift, v["value"], "o", ms=9, mfc=face, mec=colour, mew=1.8, zorder=3)
            side: Any = (
                {"ha": "right", "xytext": (-9, 0)}
                if shift < 0
                else {"ha": "left", "xytext": (9, 0)}
            )
            axis.annotate(
                f"{v['value']:.2g}",
                (i + shift, v["value"]),
                textcoords="offset points",
                va="center",
                **side,
            )
    names = list(dims)
    ticks = [f"{a} → {b}\n({dims[a]} → {dims[b]} dims)" for a, b in pairwise(names)]
    axis.set_xticks(range(len(found)), ticks)
    axis.set_xlim(-0.6, len(found) - 0.4)
    axis.set_yscale("log")
    axis.margins(y=0.18)
    where = "held-out proteins" if record["chain"]["held_out_r2"] else "fitted rows"
    axis.set_ylabel(f"1 − R² of the larger raw embedding, {where}")
    axis.grid(axis="x", visible=False)
    axis.plot([], [], "o", ms=8, mfc="white", mec=colour, mew=1.8, label="from the prefix alone")
    axis.plot([], [], "o", ms=8, color=colour, label="with the new directions")
    axis.legend(loc="center left")
    axis.set_title("The prefix predicts, the new block completes")


def spectra(axis: Any, record: Mapping[str, Any]) -> None:
    """Residual variance that is left after the first directions of every stage."""
    shades = ["#5bb0d1", "#0b6e99", "#083d56", "#22262b", "#d1793b"]
    outermost = list(record["chain"]["residual_spectrum"])[-1]  # right of all other curves
    for (size, tails), colour in zip(record["chain"]["residual_spectrum"].items(), shades):
        added = record["chain"]["added"][size]
        shown = [k for k, t in enumerate(tails) if t > 1e-8]
        axis.plot(shown, [tails[k] for k in shown], color=colour, lw=2, label=f"residual of {size}")
        axis.plot(added, max(tails[added], 1e-8), "o", color=colour, ms=8, mec="white", zorder=3)
        axis.annotate(
            f"{added} kept,\n{tails[added]:.2g} left",
            (added, max(tails[added], 1e-8)),
            textcoords="offset points",
            xytext=(8, 8) if size == outermost else (-8, -8),
            ha="left" if size == outermost else "right",
            va="bottom" if size == outermost else "top",
            color=colour,
            fontsize=9,
        )
    axis.set_yscale("log")
    kept = [
        tails[record["chain"]["added"][size]]
        for size, tails in record["chain"]["residual_spectrum"].items()
    ]
    axis.set_ylim(max(min(kept), 1e-8) / 5, 1.5)
    axis.set_xlabel("residual directions")
    axis.set_ylabel("share of residual variance left")
    axis.legend(loc="upper right")
    axis.set_title("Spectrum of the residuals")


def curve(axis: Any, record: Mapping[str, Any], pool: str) -> None:
    """Spearman against dimension for nested and baselines."""
    values = record["spearman"][pool]
    by_kind: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for row in record["representations"]:
        by_kind.setdefault(row["kind"], []).append((row["dim"], values[row["name"]]["mean"]))
    own = record["chain"]["regression"]
    for kind, points in by_kind.items():
        points.sort(key=lambda p: p[0])
        dims, means = [d for d, _ in points], [v["value"] for _, v in points]
        colour, label = COLOURS[kind], WORDS[kind]
        if kind == "one-hot":
            axis.axhline(means[0], color=colour, lw=1.5, ls=(0, (5, 3)), label=label)
        elif len(points) == 1:
            axis.plot(
                dims,
                means,
                "D" if kind == "concatenation" else "s",
                color=colour,
                ms=8,
                label=label,
                zorder=4,
            )
        else:
            main = kind in (own, "raw")
            style = {
                "lw": 2.6 if main else 1.6,
                "zorder": 5 if main else 3,
                "marker": "o",
                "ms": 6 if main else 4,
            }
            axis.plot(
                dims, means, color=colour, label=label, ls="--" if kind == "raw" else "-", **style
            )
            if kind == own:
                axis.fill_between(
                    dims,
                    [v["low"] for _, v in points],
                    [v["high"] for _, v in points],
                    color=colour,
                    alpha=0.1,
                    lw=0,
                )
    dimensions(axis, record)
    axis.set_ylabel("Spearman, mean over schemes and assays")
    axis.set_title(f"Mutational scans, embedding {POOL_WORDS[pool]}")


def dimensions(axis: Any, record: Mapping[str, Any]) -> None:
    """A logarithmic axis of dimensions with the chain's own, and the concatenation's, as ticks."""
    ticks = sorted(
        {*record["chain"]["dims"].values(), max(row["dim"] for row in record["representations"])}
    )
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.xaxis.minorticks_off()
    axis.set_xlabel("dimensions")


def schemes(axis: Any, record: Mapping[str, Any], pool: str) -> None:
    """Spearman by cross-validation scheme for the widest representations."""
    own, last = record["chain"]["regression"], list(record["chain"]["dims"])[-1]
    names = {
        "one-hot": "one-hot",
        f"raw_{last}": "raw",
        f"{own}_{last}": own,
        "concatenation": "concatenation",
    }
    width = 0.8 / len(names)
    for i, (name, kind) in enumerate(names.items()):
        cells = [record["spearman"][pool][name][s] for s in record["schemes"]]
        at = [j + (i - (len(names) - 1) / 2) * width for j in range(len(cells))]
        axis.bar(
            at, [c["value"] for c in cells], width * 0.9, color=COLOURS[kind], label=WORDS[kind]
        )
    axis.axhline(0, color=INK, lw=0.8)
    axis.set_xticks(range(len(record["schemes"])), record["schemes"])
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("Spearman")
    axis.legend(fontsize=9)
    axis.set_title(f"By scheme, {POOL_WORDS[pool]}")


def located(axis: Any, record: Mapping[str, Any]) -> None:
    """Accuracy of the location probe against dimension."""
    found = record["locations"]
    by_kind: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for row in record["representations"]:
        if row["name"] in found["results"]:
            by_kind.setdefault(row["kind"], []).append(
                (row["dim"], found["results"][row["name"]]["accuracy"])
            )
    own = record["chain"]["regression"]
    for kind, points in by_kind.items():
        points.sort(key=lambda p: p[0])
        dims, values = [d for d, _ in points], [v["value"] for _, v in points]
        main = kind in (own, "raw")
        marker = {"concatenation": "D", "single-pass": "s"}.get(kind, "o")
        axis.plot(
            dims,
            values,
            marker=marker,
            ms=6 if main else 4,
            lw=2.4 if main else 1.4,
            color=COLOURS[kind],
            ls="--" if kind == "raw" else "-",
        )
        if kind == own:
            axis.fill_between(
                dims,
                [v["low"] for _, v in points],
                [v["high"] for _, v in points],
                color=COLOURS[kind],
                alpha=0.1,
                lw=0,
            )
    control = found["results"]["composition"]["accuracy"]["value"]
    axis.axhline(control, color=PALE, lw=1.5, ls=(0, (5, 3)))
    axis.text(
        1,
        control,
        "amino-acid composition ",
        transform=axis.get_yaxis_transform(),
        ha="right",
        va="bottom",
        fontsize=9,
        color="#5b636c",
    )
    dimensions(axis, record)
    axis.set_ylabel("accuracy on test proteins")
    axis.set_title(f"Subcellular location, {len(found['classes'])} classes")


def forest(axes: Any, record: Mapping[str, Any]) -> None:
    """Every planned comparison: difference with interval, win rate and Holm-corrected p."""
    for axis, pool in zip(axes, ("site", "mean")):
        rows = [r for r in record["comparisons"] if r["ours"].startswith(f"{pool}/")][::-1]
        for i, row in enumerate(rows):
            d, w = row["difference"], row["win_rate"]
            sure = row["holm_p"] < 0.05
            colour = (
                (COLOURS["nested-pcr"] if d["value"] > 0 else COLOURS["concatenation"])
                if sure
                else "#6b7480"
            )
            axis.plot([d["low"], d["high"]], [i, i], color=colour, lw=2.2)
            axis.plot(
                d["value"],
                i,
                "o",
                ms=8,
                mfc=colour if sure else "white",
                mec=colour,
                mew=1.8,
                zorder=3,
            )
            text = f"{d['value']:+.3f}   {w['value']:>4.0%} [{w['low']:.0%}, {w['high']:.0%}]   {_p(row['holm_p'])}"
            axis.text(
                1.015,
                i,
                text,
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=9,
                color=INK,
            )
        axis.axvline(0, color=INK, lw=1)
        axis.set_yticks(
            range(len(rows)), [f"{_short(r['ours'])}  −  {_short(r['theirs'])}" for r in rows]
        )
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("difference in Spearman (filled: Holm p < 0.05)")
        axis.set_title(f"Paired over assays, {POOL_WORDS[pool]}")
        axis.text(
            1.015,
            len(rows) - 0.4,
            "diff.      win rate [95 %]       Holm",
            transform=axis.get_yaxis_transform(),
            fontsize=9,
            color="#5b636c",
            va="bottom",
        )


def _short(name: str) -> str:
    name = name.partition("/")[2]
    for kind, words in WORDS.items():
        if name == kind:
            return words
        for separator in ("_dim", "_"):
            if name.startswith(kind + separator):
                return f"{words} {name[len(kind) + len(separator) :]}"
    return name


def _p(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")
