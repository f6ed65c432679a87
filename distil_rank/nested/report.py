"""The figure of a probe, drawn from its JSON alone, and what the commands print.

distil-rank report      # results/nested_report.png from results/nested_summary.json, and the rest
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distil_rank.core.figures import INK, PALE, PALETTE, QUIET, drawn
from distil_rank.core.records import Record, read_json
from distil_rank.core.tables import markdown, with_interval
from distil_rank.nested.chain import NestedChain

SCHEMA = "distil-rank/nested-summary/1"
SUMMARY, FIGURE = "nested_summary.json", "nested_report.png"
POOLS = {"site": "at the mutated position", "mean": "mean-pooled"}
# words and color of a kind of embedding, in all panels
BLUE, RED = PALETTE[:2]
KINDS = {
    "nested-pcr": ("nested (PCR)", BLUE),
    "nested-ols": ("nested (OLS)", PALETTE[5]),
    "nested-ridge": ("nested (ridge)", BLUE),
    "raw": ("raw", INK),
    "naive-pca": ("naive PCA", PALETTE[4]),
    "random-completion": ("random completion", PALETTE[7]),
    "concatenation": ("concatenation", RED),
    "one-hot": ("one-hot", PALE),
}
MARKERS = {"concatenation": "D", "one-hot": "x"}


def fitted_text(chain: NestedChain, out: Path) -> str:
    """What was fitted, stage by stage."""
    lines = [f"{out}: " + " -> ".join(f"{name} ({dim})" for name, dim in chain.dims.items())]
    for name, stage in zip(chain.sizes[1:], chain.stages):
        r2 = chain.record["r2"][name]
        shown, where = (r2["held_out"], "held-out") if r2["held_out"] else (r2["fit"], "fitted")
        fit = ", ".join(f"{k} {v}" for k, v in asdict(stage.fit).items() if v is not None)
        lines.append(
            f"  {name}: {where} R^2 {shown['regression']:.4f} from the prefix,"
            f" {shown['reconstruction']:.4f} with the {stage.added} new directions ({fit})"
        )
    return "\n".join(lines)


def comparison_table(record: Record) -> str:
    """The contrasts with their tests and the pairs described, paired over assays."""
    rows = [["embedding", "ours − theirs", "difference", "win rate", "Wilcoxon p", "Holm p"]]
    for row in record["comparisons"]:
        pool, _, ours = row["ours"].partition("/")
        rows.append(
            [
                POOLS[pool],
                f"{ours} − {row['theirs'].partition('/')[2]}",
                with_interval(row["difference"], "+.3f"),
                with_interval(row["win_rate"], ".2f"),
                *(f"{row[p]:.3f}" if p in row else "" for p in ("wilcoxon_p", "holm_p")),
            ]
        )
    return markdown(rows)


def decided(row: Record) -> bool:
    """Whether a contrast may be called better or worse: Holm's p below .05, six assays."""
    return row.get("holm_p", 1) < 0.05 and row["difference"]["n"] >= 6


def draw(folder: Path) -> Path:
    """Draw the figure of the summary in `folder`, beside it."""
    record = read_json(folder / SUMMARY, SCHEMA)
    with drawn(folder / FIGURE, (15, 15.5), 130) as figure:
        figure.set_layout_engine("constrained")
        tasks = record.get("tasks", {})
        heights = [1] * bool(tasks) + [1.1, 1.55]
        parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.03)
        *top, middle, bottom = parts
        for part in top:
            for axis, name in zip(part.subplots(1, len(tasks), squeeze=False)[0], tasks):
                task(axis, record, name)
        axes = middle.subplots(1, 2)
        for axis, pool in zip(axes, POOLS):
            cells = {name: cell["mean"] for name, cell in record["spearman"][pool].items()}
            by_dimension(axis, record, cells)
            axis.set_ylabel("Spearman, mean over schemes and assays")
            axis.set_title(f"Mutational scans, embedding {POOLS[pool]}")
        axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.6)
        for axis, pool in zip(bottom.subplots(1, 2, sharey=True), POOLS):
            forest(axis, record, pool)
        models = [m["model"] for m in record["data"]["models"].values()]
        names = ", ".join(models or record["chain"]["dims"])
        title = f"Nested embeddings of {names}: what every dimension is worth"
        figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
        figure.supxlabel(caption(record), x=0.012, ha="left", fontsize=9, color=QUIET)
    return folder / FIGURE


def caption(record: Record) -> str:
    data, chain, assays = record["data"]["chain"], record["chain"], record["data"]["assays"]
    mutants, limit = sum(a["used"] for a in assays), record["config"]["mutants"]
    drawn = f"at most {limit} each, seed {record['seeds'][0]}" if limit else "all"
    regression, rows = chain["regression"].partition("-")[2].upper(), chain["rows"]
    tested = sum("holm_p" in row for row in record["comparisons"])
    return (
        f"Chain: {regression}, fitted on {rows['fit']:,.0f} residues, scored on"
        f" {rows['held_out']:,.0f} held-out residues ({data.get('proteins', 0):,} proteins in all)."
        f" Probe: {len(assays)} assays, {mutants:,} mutants ({drawn}), ridge, penalty by nested"
        " cross-validation.\n"
        "Spearman over all out-of-fold predictions, mean over random, modulo and contiguous folds,"
        " then over assays. Bars and bands: 95 % intervals over assays (R²: over proteins;"
        f" accuracy: over test proteins). Holm: over {tested} contrasts."
    )


def by_dimension(axis: Any, record: Record, cells: Mapping[str, Record]) -> None:
    """A line a kind of embedding against dimension; the chain's own with its intervals."""
    own = record["chain"]["regression"]
    controls = [name for name in ("one-hot", "one-hot-window", "composition") if name in cells]
    for kind, (label, color) in KINDS.items():
        rows = [r for r in record["representations"] if r["kind"] == kind and r["dim"]]
        points = sorted((r["dim"], r["name"]) for r in rows if r["name"] in cells)
        if not points:
            continue
        dims, found = [d for d, _ in points], [cells[name] for _, name in points]
        main = kind in (own, "raw")
        style: Any = {"marker": MARKERS.get(kind, "o"), "ms": 6 if main else 4, "label": label}
        style |= {"lw": 2.5 if main else 1.5, "zorder": 5 if main else 3}
        values = [cell["value"] for cell in found]
        axis.plot(dims, values, color=color, ls="--" if kind == "raw" else "-", **style)
        if kind == own:
            low, high = ([cell[end] for cell in found] for end in ("low", "high"))
            axis.fill_between(dims, low, high, color=color, alpha=0.1, lw=0)
    for name in controls:
        at = cells[name]["value"]
        axis.axhline(at, color=PALE, lw=1.5, ls=(0, (5, 3)))
        where: Any = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axis.text(1, at, f"{name} ", fontsize=9, color=QUIET, **where)
    widest = max(row["dim"] for row in record["representations"])
    ticks = sorted({*record["chain"]["dims"].values(), widest})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.xaxis.minorticks_off()
    axis.set_xlabel("dimensions")


def task(axis: Any, record: Record, name: str) -> None:
    """Accuracy of one task against dimension."""
    found = record["tasks"][name]
    by_dimension(axis, record, {name: c["accuracy"] for name, c in found["results"].items()})
    axis.set_ylabel("accuracy on test proteins")
    axis.set_title(f"{name.replace('_', ' ').capitalize()}, {len(found['classes'])} classes")


def forest(axis: Any, record: Record, pool: str) -> None:
    """Every comparison: difference with interval, win rate, and Holm's p of the contrasts."""
    rows = [r for r in record["comparisons"] if r["ours"].startswith(f"{pool}/")][::-1]
    beside: Any = {"transform": axis.get_yaxis_transform(), "fontsize": 9}
    for i, row in enumerate(rows):
        d, w, sure = row["difference"], row["win_rate"], decided(row)
        color = (BLUE if d["value"] > 0 else RED) if sure else QUIET
        axis.plot([d["low"], d["high"]], [i, i], color=color, lw=2.2)
        face = color if sure else "white"
        axis.plot(d["value"], i, "o", ms=8, mfc=face, mec=color, mew=1.8, zorder=3)
        p = f"p = {row['holm_p']:.3f}" if "holm_p" in row else ""
        text = f"{d['value']:+.3f}   {w['value']:>4.0%} [{w['low']:.0%}, {w['high']:.0%}]   {p}"
        axis.text(1.015, i, text, va="center", **beside)
    axis.axvline(0, color=INK, lw=1)
    labels = [f"{_short(r['ours'])}  −  {_short(r['theirs'])}" for r in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("difference in Spearman (p: contrasts, by Holm; filled: p < .05)")
    axis.set_title(f"Paired over assays, {POOLS[pool]}")
    head = "diff.      win rate [95 %]       Holm"
    axis.text(1.015, len(rows) - 0.4, head, va="bottom", color=QUIET, **beside)


def _short(name: str) -> str:
    kind, _, size = name.partition("/")[2].partition("_")
    words = KINDS[kind][0] if kind in KINDS else kind
    return f"{words} {size.removeprefix('dim')}".strip()
