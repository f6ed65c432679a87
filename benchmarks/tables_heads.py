"""What the benchmark of heads found, as markdown and as a figure: functions of its JSON record."""

from pathlib import Path
from statistics import median

from distil_rank.compress.head_students import FORMS
from distil_rank.core.agreement import NAMES
from distil_rank.core.figures import PALETTE, QUIET, drawn
from distil_rank.core.records import ROOT, Record
from distil_rank.core.tables import markdown, number, with_interval

SCHEMA = "distil-rank/benchmark-heads/1"
FIGURE = ROOT / "benchmarks" / "results" / "heads.png"
KEPT = 0.95
COLORS = (*PALETTE[:6], QUIET)


def ratio(student: Record) -> float:
    """Size before / after: bytes of eight-bit students, else weights."""
    return float(student["bytes_ratio" if "int8" in student["student"] else "weights_ratio"])


def sizes(record: Record) -> str:
    """The smallest size at which each student keeps 95 % of the function, and what 5x keeps."""
    heads = [f"smallest size with {KEPT:.0%} kept", "kept at 5x", "at 10x"]
    rows = [["head x data", "measure", "student", *heads]]
    for name, cell in record["cells"].items():
        for form in FORMS:
            found = [s for s in cell["students"] if s["student"] == form]
            good = [ratio(s) for s in found if s["kept"]["value"] >= KEPT]
            smallest = f"1/{max(good):.1f}" if good else "none measured"
            at = {s.get("asked"): with_interval(s["kept"], ".3f") for s in found}
            if found:
                rows.append(
                    [name, NAMES[cell["measure"]], form, smallest, at.get(5, ""), at.get(10, "")]
                )
    return markdown(rows)


def headline(record: Record) -> str:
    """The first head, five times smaller: as one map, layer by layer, and the most there can be."""
    name, cell = next(iter(record["cells"].items()))
    at = {s["student"]: s["kept"] for s in cell["students"] if s.get("asked") == 5}
    one, each, floor = (at[form] for form in ("one map", "layer by layer", "floor"))
    among = f"{one['value']:.1%} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
    measure = NAMES[cell["measure"]]
    return (
        f"**A trained head ({name}), five times smaller: one map in closed form keeps {among} of"
        f" each held-out protein's {measure}. Compressed layer by layer, as is usual, it keeps"
        f" {each['value']:.1%}. The best outputs of that rank, which no student reaches in error,"
        f" keep {floor['value']:.1%}.**"
    )


def across(record: Record) -> str:
    """Fitted on one data set, used on another."""
    rows = [["fitted on", "used on", "one map", "layer by layer, output metric"]]
    pairs = dict.fromkeys((r["fitted"], r["used"]) for r in record["across"])
    for fitted, used in pairs:
        cells = [
            with_interval(r["kept"], ".3f")
            for form in rows[0][2:]
            for r in record["across"]
            if (r["fitted"], r["used"], r["student"]) == (fitted, used, form)
        ]
        rows.append([fitted, used, *cells])
    return markdown(rows)


def few_rows(record: Record) -> str:
    """Neighbors kept by the number of proteins and by what helps."""
    forms = list(dict.fromkeys(r["form"] for r in record["few_rows"]))
    rows = [["proteins", *forms]]
    for n in dict.fromkeys(r["n"] for r in record["few_rows"]):
        kept = {
            r["form"]: with_interval(r["kept"], ".3f") for r in record["few_rows"] if r["n"] == n
        }
        rows.append([str(n), *(kept[form] for form in forms)])
    return markdown(rows)


def times(record: Record) -> str:
    """What the smallest student that keeps 95 % of the function costs, beside the dense head."""
    if "times" not in record:
        return "Not measured yet."
    heads = ["kept", "FLOPs", "bytes", "ms, batch 1", "ms, batch 512"]
    rows = [["head x data", "student", *heads]]
    for name, cell in record["cells"].items():
        timed = [s for s in cell["students"] if "times" in s]
        good = [s for s in timed if s["kept"]["value"] >= KEPT]
        dense = [median(s["times"][i]["dense_ms"]["median"] for s in timed) for i in range(2)]
        cost = [f"{cell['flops']:,}", f"{cell['bytes']:,}", *map(number, dense)]
        rows.append([name, "dense", "1", *cost])
        for form in FORMS:
            if found := [s for s in good if s["student"] == form]:
                best = max(found, key=ratio)
                ms = [f"{number(t['ms']['median'])} ({faster(t)})" for t in best["times"]]
                cost = [f"{best['flops']:,}", f"{best['bytes']:,}", *ms]
                rows.append([name, form, f"{best['kept']['value']:.3f}", *cost])
    found = record["times"]
    machine = f"{found['threads']} thread of {found['environment']['cpu']}"
    note = f"In brackets: times faster than the dense head, medians of {found['rounds']} pairs"
    return f"{markdown(rows)}\n\n{note}; {machine}, commit {found['environment']['commit'][:12]}."


def faster(time: Record) -> str:
    return f"{time['speedup']['median']:.2f}x"


def draw(record: Record, path: Path = FIGURE) -> None:
    """Function kept against size, layer by layer and as a whole."""
    cells = record["cells"]
    with drawn(path, (4.2 * len(cells), 4.7)) as figure:
        figure.set_layout_engine("constrained")
        for i, (name, cell) in enumerate(cells.items()):
            axis = figure.add_subplot(1, len(cells), i + 1)
            for form, color in zip(FORMS, COLORS):
                found = sorted((s for s in cell["students"] if s["student"] == form), key=ratio)
                if not found:
                    continue
                x, y = [ratio(s) for s in found], [s["kept"]["value"] for s in found]
                low, high = ([s["kept"][k] for s in found] for k in ("low", "high"))
                style = "--" if form == "floor" else "-"
                axis.plot(x, y, style, color=color, marker="o", markersize=3, label=form)
                axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "1/2", "1/4", "1/8", "1/16", "1/32"])
            axis.set_title(name.replace(" x ", "\n"), fontsize=10)
            axis.set_xlabel(f"size (n = {cell['n_val']} held out)")
            axis.set_ylabel(f"{NAMES[cell['measure']]} kept" if i in (0, len(cells) - 1) else "")
        lines = figure.axes[0].get_legend_handles_labels()
        figure.legend(*lines, fontsize=8, loc="outside lower center", ncols=len(lines[0]))
        figure.suptitle(
            "Function kept against size, layer by layer and as a whole", x=0.02, ha="left"
        )
