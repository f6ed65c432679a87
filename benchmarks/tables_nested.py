"""A probe and a benchmark in tables: pure functions of their records, for the terminal and for docs/nested.md."""

from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = "distil-rank/nested-summary/1"
BENCHMARK = "distil-rank/benchmark-nested/1"
POOL_WORDS = {"mean": "mean-pooled", "site": "at the mutated position"}


def documentation(record: Mapping[str, Any]) -> str:
    """Every table of a probe, as Markdown."""
    parts = [
        fitted(record),
        stage_table(record),
        spearman_table(record),
        comparison_table(record),
        verdicts(record),
    ]
    if record.get("single_pass"):
        parts.append(single_pass_table(record))
    if record.get("locations"):
        parts.append(location_table(record))
    return "\n\n".join(parts)


def fitted(record: Mapping[str, Any]) -> str:
    chain, data = record["chain"], record["data"]
    models = ", ".join(m["model"] for m in data["models"].values())
    assays = data["assays"]
    limit = record["config"]["mutants"]
    used, measured = sum(a["used"] for a in assays), sum(a["measured"] for a in assays)
    drawn = (
        f"at most {limit} drawn at random from each, seed {record['seeds'][0]}" if limit else "all"
    )
    return (
        f"Chain of {models} ({chain['regression']}): {chain['rows']['fit']:,.0f} residues to fit on,"
        f" {chain['rows']['held_out']:,.0f} held out. Probe: {len(assays)} assays, {used:,} of {measured:,} mutants ({drawn})."
    )


def stage_table(record: Mapping[str, Any]) -> str:
    """R^2 of every stage."""
    chain = record["chain"]
    names = list(chain["dims"])
    rows = [
        [
            "stage",
            "dims",
            "regression",
            f"{_where(chain)} R² from the prefix",
            "with the new directions",
            "residual left",
        ]
    ]
    for before, size, fit in zip(names, names[1:], chain["fits"]):
        r2 = stage_scores(chain)[size]
        how = fit["regression"] + (
            f", {fit['components']} of {fit['rank']} components" if fit["components"] else ""
        )
        left = chain["residual_spectrum"][size][chain["added"][size]]
        shown = [ranged(r2[kind]) for kind in ("regression", "reconstruction")]
        rows.append(
            [
                f"{before} → {size}",
                f"{chain['dims'][before]} → {chain['dims'][size]}",
                how,
                *shown,
                f"{left:.1%}",
            ]
        )
    return markdown(rows)


def stage_scores(chain: Mapping[str, Any]) -> dict[str, Any]:
    """R^2 of every stage: on held-out proteins with intervals, or on the fitted rows where none were held out."""
    if chain["held_out_r2"]:
        return chain["held_out_r2"]
    return {
        size: {
            kind: {"value": v, "low": v, "high": v}
            for kind, v in (r2["held_out"] or r2["fit"]).items()
        }
        for size, r2 in chain["r2"].items()
    }


def _where(chain: Mapping[str, Any]) -> str:
    return "held-out" if chain["held_out_r2"] else "fitted"


def spearman_table(record: Mapping[str, Any]) -> str:
    """Spearman of every representation: mean over assays, by scheme."""
    rows = [
        [
            "embedding",
            "dims",
            *(
                f"{POOL_WORDS[p]}: {s}"
                for p in ("site", "mean")
                for s in ("mean", *record["schemes"])
            ),
        ]
    ]
    for row in sorted(record["representations"], key=lambda r: (r["kind"], r["dim"])):
        cells = [record["spearman"][p][row["name"]] for p in ("site", "mean")]
        values = [f"{cell[s]['value']:.3f}" for cell in cells for s in ("mean", *record["schemes"])]
        rows.append([row["name"], str(row["dim"] or ""), *values])
    return markdown(rows)


def comparison_table(record: Mapping[str, Any]) -> str:
    """The planned comparisons, paired over assays."""
    rows = [["embedding", "ours − theirs", "difference", "win rate", "Wilcoxon p", "Holm p"]]
    for row in record["comparisons"]:
        pool, _, ours = row["ours"].partition("/")
        theirs, p = (
            row["theirs"].partition("/")[2],
            [f"{row[k]:.3f}" for k in ("wilcoxon_p", "holm_p")],
        )
        rows.append(
            [
                POOL_WORDS[pool],
                f"{ours} − {theirs}",
                signed(row["difference"]),
                ranged(row["win_rate"], 2),
                *p,
            ]
        )
    return markdown(rows)


def verdicts(record: Mapping[str, Any]) -> str:
    """The questions of the method, answered from the intervals."""
    own, sizes = record["chain"]["regression"], list(record["chain"]["dims"])
    last, dim = sizes[-1], record["chain"]["dims"][sizes[-1]]
    other = "nested-ols" if own != "nested-ols" else "nested-pcr"
    lines = [power(record)]
    for pool, words in POOL_WORDS.items():
        by_pair = {
            (r["ours"], r["theirs"]): r["difference"]
            for r in record["comparisons"]
            if r["ours"].startswith(f"{pool}/")
        }
        for theirs, question in (
            (f"raw_{last}", f"the raw {last}"),
            (f"naive-pca_dim{dim}", "naive PCA of the concatenation"),
            (f"random-completion_{last}", "a random completion of the prefix"),
            (f"{other}_{last}", f"its ablation {other}"),
        ):
            found = by_pair.get((f"{pool}/{own}_{last}", f"{pool}/{theirs}"))
            if found:
                lines.append(
                    f"* {words}: {own}_{last} {outcome(found)} {question} ({signed(found)})."
                )
        for kind, chain in record["monotonicity"][pool].items():
            lines.append(
                f"* {words}: {kind} never falls along the family in {ranged(chain['monotone'], 2)} of the assays."
            )
    return "\n".join(lines)


def power(record: Mapping[str, Any]) -> str:
    """Whether the probe finds any signal at all: without it, no difference between embeddings means anything."""
    cells = [
        (p, n, c["mean"]) for p, by_name in record["spearman"].items() for n, c in by_name.items()
    ]
    best = max(cells, key=lambda cell: cell[2]["value"])
    found = [cell for cell in cells if cell[2]["low"] > 0]
    used = sum(a["used"] for a in record["data"]["assays"]) / len(record["assays"])
    if found:
        return f"* {len(found)} of {len(cells)} embeddings predict the assays better than chance (interval above 0)."
    return (
        f"* **Underpowered**: with {used:.0f} mutants an assay, no embedding predicts them better than chance (best:"
        f" {best[1]}, {POOL_WORDS[best[0]]}, {ranged(best[2])}), so the comparisons below decide nothing."
    )


def outcome(difference: Mapping[str, Any]) -> str:
    if difference["low"] > 0:
        return "is better than"
    return "is worse than" if difference["high"] < 0 else "cannot be told apart from"


def single_pass_table(record: Mapping[str, Any]) -> str:
    single = record["single_pass"]
    rows = [["block", "R² fitted", "R² held out"]]
    for size, value in single["r2"]["fit"].items():
        held_out = single["r2"].get("held_out")
        rows.append([size, f"{value:.3f}", f"{held_out[size]:.3f}" if held_out else ""])
    layers = ", ".join(map(str, single["layers"]))
    return f"Single pass from layers {layers} of the largest model, rank {single['rank']}:\n\n{markdown(rows)}"


def location_table(record: Mapping[str, Any]) -> str:
    found = record["locations"]
    rows = [["embedding", "accuracy", f"difference to {found['reference']}"]]
    for name, cell in found["results"].items():
        rows.append([name, ranged(cell["accuracy"]), signed(cell["difference"])])
    intro = (
        f"Subcellular location, {len(found['classes'])} classes, {found['n_train']:,} proteins to train on and"
        f" {found['n_test']:,} to test on; the largest class alone scores {found['majority_accuracy']:.3f}:"
    )
    return f"{intro}\n\n{markdown(rows)}"


def benchmark(record: Mapping[str, Any]) -> str:
    """The measured bars, as Markdown."""
    rows = [["what", "measured", "bar"]]
    for case in record.get("stream", {}).get("cases", []):
        ratio = case["ratio"]
        shown = f"{ratio['median']:.1f} x ({ratio['low']:.1f} to {ratio['high']:.1f})"
        what = f"one stage 320 → 480 of {record['stream']['rows']:,} residues, {case['threads']} thread(s), against scikit-learn"
        rows.append([what, shown, f"{ratio['bar']} x"])
    if found := record.get("memory"):
        for residues, peak in found["peak_bytes"].items():
            what = f"peak memory over {int(residues):,} residues (of which imports {found['bytes_after_import'] / 1e6:.0f} MB)"
            rows.append([what, f"{peak / 1e6:.0f} MB", f"{found['bar'] / 1e6:.0f} MB"])
    for case in record.get("ridge", {}).get("cases", []):
        ratio = case["ratio"]
        shown = f"{ratio['median']:.1f} x ({ratio['low']:.1f} to {ratio['high']:.1f})"
        rows.append(
            [
                f"ridge path, {case['n']:,} mutants x {case['d']:,}, against scikit-learn",
                shown,
                f"{ratio['bar']} x",
            ]
        )
    return markdown(rows)


def ranged(cell: Mapping[str, Any], digits: int = 3) -> str:
    return f"{cell['value']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"


def signed(cell: Mapping[str, Any]) -> str:
    return f"{cell['value']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
