"""What the benchmark of compression found, as markdown: functions of its JSON record."""

import numpy as np

from distil_rank.core.records import Record
from distil_rank.core.tables import markdown, number, with_interval

SCHEMA = "distil-rank/benchmark-compress/1"
MODELS = "distil-rank/benchmark-compress-models/1"


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
    if found := record.get("int8"):
        for least in (1e-2, 1e-3, 0.0):
            worst = max(s["extra"] for s in found["same_rank"] if s["low_rank"] >= least)
            label = (
                f"int8 at the same rank, worst extra FVU where FVU >= {least:g}"
                if least
                else "the same, any FVU"
            )
            rows.append([label, f"{worst:.2%}", "2 %"])
        factor = found["float32_over_int8_fvu_at_equal_bytes"]
        text = f"{factor['median']:.1f} ({factor['smallest']:.1f} to {factor['largest']:.1f})"
        rows.append(["float32 FVU / int8 FVU at equal bytes, median (range)", text, "above 1"])
    if found := record.get("head"):
        for r in found["records"]:
            metric = {"own": ", own metric", "next": ", next layer's metric", "output": ""}[
                r["metric"]
            ]
            metric += ", int8" if r["int8"] else ""
            text = with_interval(r["task"]["change"], "+.4f")
            smaller = f"{r['bytes_ratio']:.1f} x fewer bytes, seed {r['seed']}{metric}"
            rows.append([f"GB1 head, {smaller}: Spearman", text, "-0.01"])
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
    for name, found in record["models"].items():
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


def precision(record: Record) -> str:
    """FVU at equal bytes by precision."""
    if "int8" not in record:
        return "Not measured yet."
    rows = [["teacher", "bytes", "float32", "bfloat16", "int8"]]
    for teacher, curve in record["int8"]["equal_bytes"].items():
        for size in dict.fromkeys(point["bytes"] for point in curve):
            at = {p["precision"]: p for p in curve if p["bytes"] == size}
            cells = [
                f"{number(at[k]['fvu'])} (rank {at[k]['rank']})"
                for k in ("float32", "bfloat16", "int8")
            ]
            rows.append([teacher, f"{size:,}", *cells])
    return markdown(rows)
