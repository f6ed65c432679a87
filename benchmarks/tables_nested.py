"""Tables of docs/nested.md: a probe's record, or a benchmark's, as Markdown."""

from distil_rank.core.records import Record
from distil_rank.core.tables import markdown, with_interval
from distil_rank.nested.report import POOLS, SCHEMA, comparison_table, decided

__all__ = ["BENCHMARK", "SCHEMA", "benchmark", "documentation"]
BENCHMARK = "distil-rank/benchmark-nested/1"


def documentation(record: Record) -> str:
    """Every table of a probe."""
    parts = [fitted(record), stage_table(record), spearman_table(record)]
    parts += [comparison_table(record), verdicts(record)]
    if "leaderboard" in record:
        parts.append(leaderboard_table(record))
    parts += [task_table(name, found) for name, found in record.get("tasks", {}).items()]
    return "\n\n".join(parts)


def fitted(record: Record) -> str:
    chain, data = record["chain"], record["data"]
    models = ", ".join(m["model"] for m in data["models"].values())
    assays = data["assays"]
    limit = record["config"]["mutants"]
    used, measured = sum(a["used"] for a in assays), sum(a["measured"] for a in assays)
    drawn = "all"
    if limit:
        drawn = f"at most {limit} drawn at random from each, seed {record['seeds'][0]}"
    return (
        f"Chain of {models} ({chain['regression']}): {chain['rows']['fit']:,.0f} residues to fit"
        f" on, {chain['rows']['held_out']:,.0f} held out. Probe: {len(assays)} assays, {used:,} of"
        f" {measured:,} mutants ({drawn})."
    )


def stage_scores(chain: Record) -> Record:
    """R^2 of every stage: on held-out proteins, or on the fitted rows where none were held out."""
    if chain["held_out_r2"]:
        return chain["held_out_r2"]
    return {
        size: {
            kind: {"value": v, "low": v, "high": v}
            for kind, v in (r2["held_out"] or r2["fit"]).items()
        }
        for size, r2 in chain["r2"].items()
    }


def stage_table(record: Record) -> str:
    """R^2 of every stage."""
    chain = record["chain"]
    names = list(chain["dims"])
    where = "held-out" if chain["held_out_r2"] else "fitted"
    head = ["stage", "dims", "regression", f"{where} R² from the prefix"]
    rows = [[*head, "with the new directions"]]
    for before, size, fit in zip(names, names[1:], chain["fits"]):
        r2 = stage_scores(chain)[size]
        how = fit["regression"]
        if fit["components"]:
            how += f", {fit['components']} of {fit['rank']} components"
        dims = f"{chain['dims'][before]} → {chain['dims'][size]}"
        shown = [with_interval(r2[kind], ".3f") for kind in ("regression", "reconstruction")]
        rows.append([f"{before} → {size}", dims, how, *shown])
    return markdown(rows)


def spearman_table(record: Record) -> str:
    """Spearman of every representation: mean over assays, by scheme."""
    columns = ["mean", *record["schemes"]]
    rows = [["embedding", "dims", *(f"{words}: {s}" for words in POOLS.values() for s in columns)]]
    for row in sorted(record["representations"], key=lambda r: (r["kind"], r["dim"])):
        cells = [record["spearman"][pool][row["name"]] for pool in POOLS]
        values = [f"{cell[s]['value']:.3f}" for cell in cells for s in columns]
        rows.append([row["name"], str(row["dim"] or ""), *values])
    return markdown(rows)


def leaderboard_table(record: Record) -> str:
    """Means as ProteinGym ranks models, by scheme and function type, of the chain and controls."""
    rows: list[list[str]] = []
    for pool, named in record["leaderboard"].items():
        for name, cell in named.items():
            rows = rows or [["embedding", "", *cell]]
            rows.append([POOLS[pool], name, *(f"{value:.3f}" for value in cell.values())])
    return f"Mean over assays of a protein, proteins of a function, functions:\n\n{markdown(rows)}"


def verdicts(record: Record) -> str:
    """The contrasts, answered where Holm's p and the number of assays allow it."""
    lines = [power(record)]
    for row in record["comparisons"]:
        if "holm_p" in row:
            pool, _, ours = row["ours"].partition("/")
            theirs, shown = (
                row["theirs"].partition("/")[2],
                with_interval(row["difference"], "+.3f"),
            )
            lines.append(f"* {POOLS[pool]}: {ours} {outcome(row)} {theirs} ({shown}).")
    return "\n".join(lines)


def power(record: Record) -> str:
    """Whether the probe finds any signal: without it, no difference means anything."""
    cells = [
        (pool, name, cell["mean"])
        for pool, named in record["spearman"].items()
        for name, cell in named.items()
    ]
    found = [cell for cell in cells if cell[2]["low"] > 0]
    if found:
        return (
            f"* {len(found)} of {len(cells)} embeddings predict the assays better than chance"
            " (interval above 0)."
        )
    pool, name, best = max(cells, key=lambda cell: cell[2]["value"])
    used = sum(a["used"] for a in record["data"]["assays"]) / len(record["assays"])
    return (
        f"* **Underpowered**: with {used:.0f} mutants an assay, no embedding predicts them better"
        f" than chance (best: {name}, {POOLS[pool]}, {with_interval(best, '.3f')}), so the"
        " comparisons below decide nothing."
    )


def outcome(row: Record) -> str:
    if not decided(row):
        return "cannot be told apart from"
    return "is better than" if row["difference"]["value"] > 0 else "is worse than"


def task_table(name: str, found: Record) -> str:
    """Accuracy and macro-F1 of every representation in one task."""
    head = ["embedding", "accuracy", "macro-F1"]
    rows = [[*head, f"difference in accuracy to {found['reference']}"]]
    for embedding, cell in found["results"].items():
        shown = [with_interval(cell[key], ".3f") for key in ("accuracy", "macro_f1")]
        rows.append([embedding, *shown, with_interval(cell["difference"], "+.3f")])
    proteins, count = found["proteins"], found["rows"]
    rows_of = f"{count['train']:,} rows of {proteins['train']:,} proteins to train on"
    intro = (
        f"{name.replace('_', ' ').capitalize()}, {len(found['classes'])} classes: {rows_of},"
        f" {count['test']:,} of {proteins['test']:,} to test on; the largest class alone scores"
        f" {found['majority_accuracy']:.3f}:"
    )
    return f"{intro}\n\n{markdown(rows)}"


def benchmark(record: Record) -> str:
    """The measured bars."""
    rows = [["what", "measured", "bar"]]

    def ratio_row(what: str, ratio: Record) -> None:
        shown = f"{ratio['median']:.1f} x ({ratio['low']:.1f} to {ratio['high']:.1f})"
        rows.append([f"{what}, against scikit-learn", shown, f"{ratio['bar']} x"])

    for case in record.get("stream", {}).get("cases", []):
        what = f"one stage 320 → 480 of {record['stream']['rows']:,} residues"
        ratio_row(f"{what}, {case['threads']} thread(s)", case["ratio"])
        if case["threads"] == 1 and (used := case.get("cpu_seconds_per_million")):
            shown = f"{used['ours']:.1f} s (scikit-learn {used['theirs']:.1f} s)"
            rows.append(["CPU time of it for 1,000,000 residues", shown, f"{used['bar']} s"])
    if error := record.get("stream", {}).get("error_of_eigenvalues"):
        shown, bar = f"{error['largest_relative']:.1e}", f"{error['bar']:.0e}"
        rows.append(["largest relative error of an eigenvalue by float32 products", shown, bar])
    if found := record.get("memory"):
        imports = f"{found['bytes_after_import'] / 1e6:.0f} MB"
        for residues, peak in found["peak_bytes"].items():
            what = f"peak memory over {int(residues):,} residues (of which imports {imports})"
            rows.append([what, f"{peak / 1e6:.0f} MB", f"{found['bar'] / 1e6:.0f} MB"])
    if found := record.get("probe"):
        for name, bars in (("one-hot", found["leaderboard"]), ("noise", {})):
            for scheme, value in found[name].items():
                bar = f"{bars[scheme]:.2f}" if bars else "below .02 either way"
                what = f"Spearman of {name}, {scheme} folds, {len(found['mutants'])} assays"
                rows.append([what, f"{value:.3f}", bar])
        rate = found["false_verdicts"]
        rows.append(["false verdicts at 12 assays", f"{rate['share']:.1%}", f"{rate['bar']:.0%}"])
    names = {
        "own": "our chain",
        "corrected": "scalers fitted pair by pair, corrected",
        "as_released": "the same scalers applied as released",
    }
    for kind, by_size in record.get("released", {}).get("held_out_r2", {}).items():
        for size, r2 in list(by_size.items())[1:]:
            what = f"held-out R² of raw {size} from the prefix, and from all: {names[kind]}"
            rows.append([what, f"{r2['regression']:.3f}, {r2['reconstruction']:.3f}", ""])
    for case in record.get("ridge", {}).get("cases", []):
        ratio_row(f"ridge path, {case['n']:,} mutants x {case['d']:,}", case["ratio"])
    return markdown(rows)
