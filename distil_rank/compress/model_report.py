"""The picture of a compressed model, drawn from its report.json alone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_rank.experiment.report import INK, QUIET, STYLE
from distil_rank.core.records import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = "distil-rank/compressed-model/1"
LABEL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
PALETTE = ("#3767a6", "#2f8f63", "#c4502f", "#7c4fa0", "#b8860b", "#3a9aa8", "#a0476f", "#6b7a2f")


def draw(folder: str | Path) -> Path:
    """Draw FOLDER/report.png from FOLDER/report.json; returns its path."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    record = read_json(Path(folder) / "report.json", SCHEMA)
    path = Path(folder) / "report.png"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=110, facecolor="white")
        grid = figure.add_gridspec(2, 6, left=0.055, right=0.975, top=0.83, bottom=0.08, hspace=0.42, wspace=1.0)
        colours = kinds(record)
        fidelity(figure.add_subplot(grid[0, :4]), record, colours)
        quality(figure.add_subplot(grid[0, 4:]), record)
        ranks(figure.add_subplot(grid[1, :4]), record, colours)
        if record.get("recovery_loss"):
            recovery(figure.add_subplot(grid[1, 4:]), record)
        else:
            costs(figure.add_subplot(grid[1, 4:]), record)
        figure.text(0.012, 0.955, title(record), size=19, weight="bold")
        figure.text(0.012, 0.922, caption(record), size=11.5)
        x = 0.012
        for kind, colour in colours.items():
            figure.text(x, 0.885, f"● {kind}", size=11.5, color=colour, weight="bold")
            x += 0.0066 * len(kind) + 0.03
        temporary = Path(f"{path}.tmp{os.getpid()}")
        try:
            FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def title(record: dict[str, Any]) -> str:
    compression, name = record["compression"], record["config"]["target"].rstrip("/").rpartition("/")[2]
    text = f"{name}: {compression['parameters']:,} → {compression['parameters_after']:,} parameters"
    ratio = record["evaluation"].get("perplexity_ratio")
    return text + (f", perplexity × {ratio['value']:.3f}" if ratio else "")


def caption(record: dict[str, Any]) -> str:
    compression, data, evaluation = record["compression"], record["data"], record["evaluation"]
    how = f"{compression['method']} ranks at ratio {compression['ratio']:g}"
    how += " by sensitivity" if record["config"]["sensitivity"] else ""
    how += ", sequential" if compression["sequential"] else ""
    how += f", {len(record['recovery_loss'])} recovery steps" if record.get("recovery_loss") else ""
    how += ", int8 factors" if "int8" in record else ""
    gap = compression["allocation"]["gap"] if compression["allocation"] else 0.0
    return (
        f"{how} (at most {100 * gap:.2g} % from the best choice)   ·   fitted on {data['n_train']} proteins, measured on "
        f"{evaluation['proteins']} held-out ones ({evaluation['residues']:,} residues)   ·   seed {record['seeds'][0]}"
    )


def kind_of(name: str) -> str:
    """A layer's role: its name without the block."""
    return re.sub(r"^.*?\d+\.", "", name)


def kinds(record: dict[str, Any]) -> dict[str, str]:
    found = list(dict.fromkeys(kind_of(x["name"]) for x in record["compression"]["layers"] if x["rank"] is not None))
    return {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(found)}


def fidelity(axes: Axes, record: dict[str, Any], colours: dict[str, str]) -> None:
    """FVU of each layer on held-out activations, and the floor."""
    layers = record["compression"]["layers"]
    for i, layer in enumerate(layers):
        if layer["held_out_fvu"] is None:
            continue
        colour = colours[kind_of(layer["name"])]
        axes.plot(
            [i, i], [max(layer["held_out_floor_fvu"], 1e-9), max(layer["held_out_fvu"], 1e-9)], color=colour, lw=1.5
        )
        axes.plot(i, max(layer["held_out_fvu"], 1e-9), "o", color=colour, ms=6)
        axes.plot(i, max(layer["held_out_floor_fvu"], 1e-9), "_", color=INK, ms=9, mew=1.6)
    axes.set_yscale("log")
    axes.set_title("Loss of each layer on held-out proteins   (● student, — floor: no student of its rank is below)")
    axes.set_ylabel("FVU of the layer's output (log)")
    axes.set_xlabel("layer, in the model's order")
    axes.set_xlim(-1, len(layers))


def ranks(axes: Axes, record: dict[str, Any], colours: dict[str, str]) -> None:
    """Share of the parameters that each layer keeps."""
    layers = record["compression"]["layers"]
    for i, layer in enumerate(layers):
        share = layer["parameters_after"] / layer["parameters"]
        colour = QUIET if layer["rank"] is None else colours[kind_of(layer["name"])]
        axes.bar(i, share, color=colour, width=0.8)
        if len(layers) <= 48:
            label, turn = "dense" if layer["rank"] is None else str(layer["rank"]), 90 if len(layers) > 24 else 0
            axes.text(i, share + 0.015, label, ha="center", va="bottom", size=8, rotation=turn, bbox=LABEL)
    if record["compression"]["ratio"]:
        axes.axhline(record["compression"]["ratio"], color=INK, lw=1, ls="--")
    axes.set_title("Parameters kept by each layer, rank above   (-- the budget, grey: dense)")
    axes.set_ylabel("share of the layer's parameters")
    axes.set_xlabel("layer, in the model's order")
    axes.set_ylim(0, 1.16)
    axes.set_xlim(-1, len(layers))


def quality(axes: Axes, record: dict[str, Any]) -> None:
    """Losses of the whole model with their intervals, on one log axis."""
    evaluation, before = record["evaluation"], record.get("before_recovery")
    rows: list[tuple[str, dict[str, float], bool]] = []
    for name, key in (("hidden-state FVU", "hidden_fvu"), ("logits KL (nats)", "logits_kl")):
        if before and key in before:
            rows.append((f"{name}\nbefore recovery", before[key], True))
        if key in evaluation:
            rows.append((name, evaluation[key], False))
    for record_, label in ((before, "perplexity ratio - 1\nbefore recovery"), (evaluation, "perplexity ratio - 1")):
        if record_ and "perplexity_ratio" in record_:
            ratio = record_["perplexity_ratio"]
            shifted = {k: ratio[k] - 1 for k in ("value", "low", "high")}
            if shifted["low"] > 0:
                rows.append((label, shifted, record_ is before))
    for i, (_, metric, old) in enumerate(rows):
        colour = QUIET if old else INK
        axes.plot([metric["low"], metric["high"]], [i, i], color=colour, lw=3, solid_capstyle="butt")
        axes.plot(metric["value"], i, "o", color=colour, ms=7)
        axes.annotate(
            f"{metric['value']:.3g}", (metric["value"], i), (0, 9), textcoords="offset points", ha="center", size=9
        )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_title("The whole model, 95 % intervals")
    axes.set_xlabel("loss, smaller is better (log)")


def costs(axes: Axes, record: dict[str, Any]) -> None:
    """Parameters, bytes and time after / before."""
    compression, cost = record["compression"], record["cost"]
    speed = cost["speedup"]
    rows = [
        ("parameters", compression["parameters_after"] / compression["parameters"], None),
        ("bytes", cost["bytes_after"] / cost["bytes_before"], None),
        ("time of a\nforward pass", 1 / speed["median"], (1 / speed["q75"], 1 / speed["q25"])),
    ]
    for i, (_, value, spread) in enumerate(rows):
        axes.barh(i, value, color=PALETTE[0], height=0.55)
        axes.text(value + 0.02, i, f"{value:.2f}", va="center", size=10)
        if spread:
            axes.plot(spread, [i, i], color=INK, lw=2)
    axes.axvline(1, color=INK, lw=1, ls="--")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(1.15, *(value + 0.15 for _, value, _ in rows)))
    batch = cost["batch"]
    axes.set_title("Cost, after / before")
    axes.set_xlabel(f"batch {batch[0]} × {batch[1]} tokens, {cost['threads']} thread(s), median and quartiles")


def recovery(axes: Axes, record: dict[str, Any]) -> None:
    """Loss of the recovery, smoothed over ten steps."""
    losses = record["recovery_loss"]
    width = min(10, len(losses))
    smooth = [
        sum(losses[max(0, i - width + 1) : i + 1]) / len(losses[max(0, i - width + 1) : i + 1])
        for i in range(len(losses))
    ]
    axes.plot(range(1, len(losses) + 1), losses, color=QUIET, lw=0.6)
    axes.plot(range(1, len(losses) + 1), smooth, color=PALETTE[2], lw=1.8)
    axes.set_yscale("log")
    axes.set_title("Recovery: distillation of the factors")
    axes.set_xlabel("step")
    axes.set_ylabel("logits KL + hidden MSE / variance")
