"""What the benchmark of compression found, as markdown and as a figure of its JSON record."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distil_rank.core.figures import PALETTE, drawn
from distil_rank.core.records import ROOT, Record
from distil_rank.core.tables import markdown, with_interval

SCHEMA = "distil-rank/benchmark-compress/2"
FIGURE = ROOT / "benchmarks" / "results" / "compress.png"
NEURONS = "neurons and "
TICKS = (0.1, 0.2, 0.5, 1, 2, 5)


def bars(record: Record) -> str:
    """The bars and what was measured."""
    rows = [["what", "measured", "bar"]]
    if found := record.get("prior"):
        rows += [
            [
                "50 proteins with a prior in domain / all data",
                with_interval(found["in_domain_over_full_data"], ".3f"),
                "at most 1.10",
            ],
            [
                "50 proteins without a prior / all data",
                with_interval(found["no_prior_over_full_data"], ".3f"),
                "",
            ],
            [
                "prior out of domain / no prior, worst",
                f"{found['worst_out_of_domain_over_no_prior']:.4f}",
                "at most 1.01",
            ],
        ]
    if found := record.get("large"):
        minutes = found["processor_seconds"] / 60
        rows.append(
            [
                f"650M shape, own metric: processor time, {found['threads']} thread",
                f"{minutes:.1f} min",
                "",
            ]
        )
        rows.append(["650M shape, own metric: peak memory", f"{found['peak_gb']:.1f} GB", "24 GB"])
    return markdown(rows)


def cells(record: Record) -> str:
    """Held-out FVU against other layer compressors, paired over cells; above 0 ours is smaller."""
    if "cells" not in record:
        return "Not measured yet."
    rows = [
        [
            "ours",
            "against",
            "no worse",
            "within 0.1 %",
            "where n > d",
            "mean log FVU ratio, theirs / ours",
        ]
    ]
    for ours, label in (
        ("optimum", "optimum"),
        ("few rows", "optimum, few rows drawn to the weight"),
    ):
        against = record["cells"]["against"][ours]
        for name in [n for n in against if n.startswith(("SVD-LLM", "alternating", "optimum"))]:
            keys = (
                "share_no_worse",
                "share_no_worse_within_1e-3",
                "share_no_worse_with_more_rows_than_features",
            )
            text = with_interval(against[name]["mean_log_ratio"], "+.2g")
            rows.append([label, name, *(f"{against[name][key]:.1%}" for key in keys), text])
    return markdown(rows)


def models(record: Record) -> str:
    """Whole models: means over calibration draws, and each method against `budget`, paired."""
    parts = []
    for name, found in record["models"]["models"].items():
        rows = [["ratio", "method", "KL, nats", "hidden FVU", "layer FVU", "perplexity"]]
        rows[0] += ["KL / budget's", "hidden FVU / budget's"]
        paired = {(p["ratio"], p["method"]): p for p in found["against_budget"]}
        groups: dict[tuple[float, str], list[Record]] = {}
        for r in found["records"]:
            groups.setdefault((r["ratio"], r["method"]), []).append(r)
        for (ratio, method), draws in sorted(groups.items(), key=lambda item: item[0][0]):
            keys = ("logits_kl", "hidden_fvu", "perplexity_after")
            kl, hidden, perplexity = (np.mean([r[key]["value"] for r in draws]) for key in keys)
            layer = np.mean([r["layer_fvu"] for r in draws])
            row = [f"{ratio:g}", method, f"{kl:.2g}", f"{hidden:.3g}", f"{layer:.3g}"]
            row.append(f"{perplexity:.3f}")
            for key in keys[:2]:
                known = paired.get((ratio, method))
                row.append(with_interval(known[key], ".3g") if known else "1")
            rows.append(row)
        dense = f"dense perplexity {found['perplexity']['value']:.3f}"
        parts.append(f"**{name}** ({dense})\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def frontier(record: Record) -> str:
    """Bytes, KL and hidden FVU of every form, and time at batch 1 and 8 where it was measured."""
    if "frontier" not in record:
        return "Not measured yet."
    parts = []
    timed = record.get("times", {"models": {}})["models"]
    for name, records in record["frontier"]["models"].items():
        rows = [
            ["form", "bytes", "KL, nats", "hidden FVU", "perplexity", "ms, batch 1", "ms, batch 8"]
        ]
        for form, draws in by_form(records):
            row = [form, f"{round(np.mean([r['bytes'] for r in draws])):,}"]
            for key in ("logits_kl", "hidden_fvu"):
                values = [r[key]["value"] for r in draws if r[key]]
                few = f" [{min(values):.2g}, {max(values):.2g}]" if len(values) > 1 else ""
                row.append(f"{np.mean(values):.2g}{few}" if values else "")
            row.append(f"{np.mean([r['perplexity_after']['value'] for r in draws]):.3f}")
            at = [t for t in timed.get(name, ()) if t["form"] == form]
            row += [f"{t['after_ms']:.2f} ({t['speedup']['median']:.2f} x)" for t in at] or ["", ""]
            rows.append(row)
        parts.append(f"**{name}**\n\n{markdown(rows)}")
    if "shape" in record:
        parts.append(shape(record["shape"]))
    return "\n\n".join(parts)


def shape(found: Record) -> str:
    """Bytes and times of a shape whose weights are random: what it loses is not asked."""
    rows = [["form", "bytes", "ms, batch 1", "ms, batch 4"]]
    for form in dict.fromkeys(r["form"] for r in found["forms"]):
        of = [r for r in found["forms"] if r["form"] == form]
        timed = [r for r in of if "speedup" in r]
        shown = [f"{r['after_ms']:,.0f} ({r['speedup']['median']:.2f} x)" for r in timed]
        rows.append([form, f"{of[0]['bytes']:,}", *(shown or ["", ""])])
    name = f"{found['parameters'] / 1e6:,.0f} million random weights in the shape of ESM-2 650M"
    return f"**{name}**, {found['length']} residues\n\n{markdown(rows)}"


def by_form(records: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    """The draws of every form, the largest first."""
    forms = dict.fromkeys(r["form"] for r in records)
    groups = {form: [r for r in records if r["form"] == form] for form in forms}
    yield from sorted(groups.items(), key=lambda item: -item[1][0]["bytes"])


def draw_frontier(record: Record, path: Path = FIGURE) -> None:
    """KL against bytes of every form, those of a kind joined; the lower left is better."""
    models = record["frontier"]["models"]
    known = sorted({kind(r["form"]) for records in models.values() for r in records})
    plain = [label for label in known if not label.startswith(NEURONS)]
    looks = {label: (color, "o-") for label, color in zip(plain, PALETTE)}
    looks |= {NEURONS + label: (look[0], "s--") for label, look in looks.items()}
    with drawn(path, (5.2 * len(models), 5.2)) as figure:
        figure.set_layout_engine("constrained")
        for i, (name, records) in enumerate(models.items()):
            axis, kinds = figure.add_subplot(1, len(models), i + 1), dict[str, list[tuple]]()
            for form, draws in by_form(records):
                kl = np.mean([r["logits_kl"]["value"] for r in draws])
                if kl > 0:  # the dense model is the reference
                    size = np.mean([r["bytes"] for r in draws]) / 1e6
                    kinds.setdefault(kind(form), []).append((size, kl))
            for label, points in kinds.items():
                color, style = looks[label]
                axis.plot(*zip(*points), style, color=color, label=label, markersize=4)
            axis.set(xscale="log", yscale="log", xlabel="megabytes on disk", title=name)
            axis.set_xticks(TICKS, map(str, TICKS))
            axis.minorticks_off()
            axis.set_ylabel("" if i else "KL to the dense model, nats")
        lines = figure.axes[0].get_legend_handles_labels()
        figure.legend(*lines, fontsize=8, loc="outside lower center", ncols=4)
        figure.suptitle("Every way to make a model smaller", x=0.02, ha="left")


def kind(form: str) -> str:
    """What forms of one curve have in common."""
    family, _, stored = form.partition(", ")
    if family == "dense":
        return "dense, fewer bits"
    if family.startswith("nano-"):
        return "smaller model"
    return f"{family.rpartition(' ')[0]}, {stored}" if "low rank" in family else family
