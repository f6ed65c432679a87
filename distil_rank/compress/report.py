"""What a compressed model lost, for eyes: report.png from report.json alone, terminal, README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distil_rank.core.figures import INK, PALETTE, QUIET, drawn
from distil_rank.core.records import Record, read_json

SCHEMA = "distil-rank/compressed-model/2"
LABEL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
SMALLEST = 1e-6  # where a log axis shows smaller losses


def summary(record: Record, out: Path) -> str:
    """What the terminal shows."""
    found, evaluation, money = record["compression"], record["evaluation"], record["cost"]
    dense = [x for x in found["layers"] if not smaller(x)]
    pruned = sum(bool(x.get("neurons")) for x in found["layers"])
    lines = [
        f"{len(found['layers']) - len(dense) - pruned} layers low-rank, {pruned} of fewer neurons,"
        f" {len(dense)} dense",
        *(f"  dense: {x['name']} ({x['note']})" for x in dense),
        f"parameters {found['parameters']} -> {found['parameters_after']},"
        f" bytes {money['bytes_before']} -> {money['bytes_after']},"
        f" forward pass {money['speedup']['median']:.2f} x as fast",
    ]
    lines.append(
        ", ".join(f"{text} {evaluation[key]['value']:.4g}" for key, text in lost(evaluation))
    )
    if "perplexity_ratio" in evaluation:
        before, after, ratio = (evaluation[f"perplexity_{k}"] for k in ("before", "after", "ratio"))
        lines.append(
            f"{evaluation['kind']} {before['value']:.4g} -> {after['value']:.4g},"
            f" ratio {ratio['value']:.4g} [{ratio['low']:.4g}, {ratio['high']:.4g}]"
        )
    if "mutations" in record:
        before, after = (record["mutations"][f"mean_spearman_{k}"] for k in ("before", "after"))
        lines.append(f"DMS Spearman {before:.4f} -> {after:.4f}")
    return "\n".join([*lines, f"written to {out}"])


def readme(name: str, class_name: str, record: Record, out: Path) -> str:
    """README.md of the folder."""
    evaluation = record["evaluation"]
    return f"""{name} with {record["compression"]["parameters_after"]} parameters, compressed by \
Distil-Rank; {lead(evaluation)} on {evaluation["proteins"]} held-out proteins (see report.json).
```python
import distil_rank
model = distil_rank.load("{out.name}")  # {class_name}, same inputs and outputs as before
```
"""


LOSSES = {
    "logits_kl": "logits KL (nats)",
    "output_fvu": "output FVU",
    "hidden_fvu": "hidden-state FVU",
}


def lost(evaluation: Record) -> list[tuple[str, str]]:
    """Key and name of each loss that was measured, the one that says most first."""
    return [(key, text) for key, text in LOSSES.items() if key in evaluation]


def lead(evaluation: Record) -> str:
    """The one figure: KL to the dense model, or what its outputs or hidden states lost."""
    key, text = lost(evaluation)[0]
    return f"{text} {evaluation[key]['value']:.3g}"


def draw(folder: str | Path) -> Path:
    """Draw FOLDER/report.png from FOLDER/report.json; returns its path."""
    record = read_json(Path(folder) / "report.json", SCHEMA)
    path = Path(folder) / "report.png"
    with drawn(path, (16, 10)) as figure:
        margins = {"left": 0.055, "right": 0.975, "top": 0.83, "bottom": 0.08}
        grid = figure.add_gridspec(2, 6, **margins, hspace=0.42, wspace=1.0)
        colors = kinds(record)
        fidelity(figure.add_subplot(grid[0, :4]), record, colors)
        quality(figure.add_subplot(grid[0, 4:]), record)
        ranks(figure.add_subplot(grid[1, :4]), record, colors)
        costs(figure.add_subplot(grid[1, 4:]), record)
        figure.text(0.012, 0.955, title(record), size=19, weight="bold")
        figure.text(0.012, 0.922, caption(record), size=11.5)
        x = 0.012
        for kind, color in colors.items():
            figure.text(x, 0.885, f"● {kind}", size=11.5, color=color, weight="bold")
            x += 0.0066 * len(kind) + 0.03
    return path


def title(record: Record) -> str:
    found, name = record["compression"], Path(record["config"]["model"]).name
    text = f"{name}: {found['parameters']:,} → {found['parameters_after']:,} parameters"
    return f"{text}, {lead(record['evaluation'])}"


def caption(record: Record) -> str:
    found, data, evaluation = record["compression"], record["data"], record["evaluation"]
    steps = len(record.get("recovery_loss", ()))
    how = [
        f"ratio {found['ratio']:g}",
        *(["sequential"] if found["sequential"] else []),
        *([f"{steps} recovery steps"] if steps else []),
        *([f"{record['quantisation']['bits']} bits"] if "quantisation" in record else []),
    ]
    gap = found["allocation"]["gap"] if found["allocation"] else 0.0
    return (
        f"{', '.join(how)} (at most {100 * gap:.2g} % from the best choice)   ·   "
        f"fitted on {data['n_train']} proteins, measured on {evaluation['proteins']} held-out ones"
        f" ({evaluation['residues']:,} residues)   ·   seed {record['seeds'][0]}"
    )


def kind_of(name: str) -> str:
    """A layer's role: its name without the block."""
    return re.sub(r"^.*?\d+\.", "", name)


def smaller(layer: Record) -> bool:
    return layer["parameters_after"] < layer["parameters"]


def kinds(record: Record) -> dict[str, str]:
    """Color of each role that was compressed."""
    layers = record["compression"]["layers"]
    found = dict.fromkeys(kind_of(x["name"]) for x in layers if smaller(x))
    return {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(found)}


def fidelity(axes: Any, record: Record, colors: dict[str, str]) -> None:
    """Loss of each layer in its metric on held-out activations, the floor, and the plain FVU."""
    layers = record["compression"]["layers"]
    for i, layer in enumerate(layers):
        if layer["held_out_loss"] is None:
            continue
        color = colors[kind_of(layer["name"])]
        floor, loss, fvu = (max(layer[f"held_out_{k}"], SMALLEST) for k in ("floor", "loss", "fvu"))
        axes.plot([i, i], [floor, loss], color=color, lw=1.5)
        axes.plot(i, loss, "o", color=color, ms=6)
        axes.plot(i, fvu, "x", color=color, ms=6)
        axes.plot(i, floor, "_", color=INK, ms=9, mew=1.6)
    axes.set_yscale("log")
    axes.set_title(
        "Loss of each layer, held out   (● in its metric, — floor: none is below, × FVU)"
    )
    axes.set_ylabel("loss over that of a constant (log)")
    axes.set_xlabel("layer, in the model's order")
    axes.set_xlim(-1, len(layers))


def ranks(axes: Any, record: Record, colors: dict[str, str]) -> None:
    """Share of the parameters that each layer keeps."""
    layers = record["compression"]["layers"]
    for i, layer in enumerate(layers):
        share = layer["parameters_after"] / layer["parameters"]
        color = colors[kind_of(layer["name"])] if smaller(layer) else QUIET
        axes.bar(i, share, color=color, width=0.8)
        if len(layers) <= 48:
            kept = f"{layer['neurons'][0]}n" if layer.get("neurons") else layer["rank"]
            text, turn = str(kept or "dense"), 90 * (len(layers) > 24)
            place: Any = {"ha": "center", "va": "bottom"}
            axes.text(i, share + 0.015, text, size=8, rotation=turn, bbox=LABEL, **place)
    if record["compression"]["ratio"]:
        axes.axhline(record["compression"]["ratio"], color=INK, lw=1, ls="--")
    axes.set_title("Parameters kept by each layer, rank or neurons (n) above   (-- the budget)")
    axes.set_ylabel("share of the layer's parameters")
    axes.set_xlabel("layer, in the model's order")
    axes.set_ylim(0, 1.16)
    axes.set_xlim(-1, len(layers))


def quality(axes: Any, record: Record) -> None:
    """Losses of the whole model with their intervals, on one log axis."""
    rows: list[tuple[str, list[float], str]] = []
    for key, name in {**LOSSES, "perplexity_ratio": "perplexity ratio - 1"}.items():
        old = record.get("before_recovery")
        for found, label in ((old, f"{name}\nbefore recovery"), (record["evaluation"], name)):
            if found and key in found:
                one = key == "perplexity_ratio"
                values = [found[key][k] - one for k in ("value", "low", "high")]
                if values[1] > 0 or not one:
                    rows.append((label, values, QUIET if found is old else INK))
    for i, (_, (value, low, high), color) in enumerate(rows):
        axes.plot([low, high], [i, i], color=color, lw=3, solid_capstyle="butt")
        axes.plot(value, i, "o", color=color, ms=7)
        place: Any = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.3g}", (value, i), size=9, **place)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_title("The whole model, 95 % intervals")
    axes.set_xlabel("loss, smaller is better (log)")


def costs(axes: Any, record: Record) -> None:
    """Parameters, bytes and time after / before."""
    found, cost = record["compression"], record["cost"]
    speed = cost["speedup"]
    rows = {
        "parameters": found["parameters_after"] / found["parameters"],
        "bytes": cost["bytes_after"] / cost["bytes_before"],
        "time of a\nforward pass": 1 / speed["median"],
    }
    ends = (*list(rows.values())[:2], 1 / speed["q25"])  # right of the bar and its quartiles
    for i, (value, end) in enumerate(zip(rows.values(), ends)):
        axes.barh(i, value, color=PALETTE[0], height=0.55)
        axes.text(end + 0.02, i, f"{value:.2f}", va="center", size=10)
    axes.plot((1 / speed["q75"], 1 / speed["q25"]), [2, 2], color=INK, lw=2)
    axes.axvline(1, color=INK, lw=1, ls="--")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(1.15, *(end + 0.15 for end in ends)))
    (rows_, tokens), threads = cost["batch"], cost["threads"]
    axes.set_title("Cost, after / before")
    axes.set_xlabel(f"batch {rows_} × {tokens} tokens, {threads} thread(s), median and quartiles")
