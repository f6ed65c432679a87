"""What the experiment says in words and tables, from its summary alone."""

from collections.abc import Sequence

from distil_rank.core.agreement import NAMES
from distil_rank.core.records import Metric, Record
from distil_rank.core.tables import closeness, markdown, number, with_interval

NOTHING = 1e-9  # an FVU of 0 as float32 shows it
COLUMNS = {  # key -> heading
    "relative_mse": "relative MSE",
    "cosine": "cosine",
    "centred_cosine": "centered cosine",
    "worst_1pct_cosine": "worst-1 % cosine",
}


def headline(summary: Record) -> str:
    """Data, sizes, rank and seeds in one line; the word synthetic where it is true."""
    data, n = summary["data"], len(summary["seeds"])
    model = f"{data['model']}, " if data["model"] else ""
    rows = f"{data['n_train']:,} training and {data['n_val']:,} held-out rows"
    sizes = f"{rows} of {data['dim']} features, rank {summary['target_rank']}"
    return f"{model}{data['source']}: {sizes}, {n} seed{'s' if n > 1 else ''}"


def verdict(difference: Record, optimum: Metric) -> str:
    """Whether distillation beats the closed form, from the paired difference in held-out FVU."""
    best, distilled = optimum["value"], optimum["value"] + difference["value"]
    low, high = difference["rows_and_seeds"]
    bounds = f"95 % interval over rows and seeds [{low:+.2e}, {high:+.2e}]"
    paired = f"paired difference {difference['value']:+.2e}, {bounds}"
    found = f"its held-out FVU of {number(distilled)} is {beside(distilled, best)} ({paired})."
    if low > 0:
        return f"Distillation does not beat the closed form: {found}"
    if high < 0:
        return f"Distillation beats the closed form on held-out rows: {found}"
    return f"Distillation and the closed form cannot be told apart on held-out rows ({paired})."


def beside(distilled: float, best: float) -> str:
    """How two FVU compare, also where their first digits are the same."""
    if best <= NOTHING:
        return "above an optimum of 0" if distilled > best else "that of the optimum, 0"
    if distilled > 1.1 * best:
        return f"{number(distilled / best)} times the optimum's {number(best)}"
    side = "above" if distilled >= best else "below"
    return f"{abs(distilled / best - 1):.2%} {side} the optimum's {number(best)}"


def remarks(experiment: Record) -> list[str]:
    """What is to be said of one teacher: on its task, its verdict, and for other rows."""
    found, task = [], experiment.get("task")
    if task:
        share, wiener = (task[key] / task["constant_mse"] for key in ("mse", "wiener_mse"))
        found.append(
            f"On its own task, denoising held-out rows, the teacher's error is {number(share)} of a"
            f" constant's; the Wiener filter reaches {number(wiener)}."
        )
    found.append(experiment["verdict"])
    low, high = (experiment["bracket"][key] for key in ("low", "high"))
    if low <= high:
        found.append(
            "Over all rows of this kind the best student of this rank has an FVU between"
            f" {number(low)} (floor of the training rows) and {number(high)} (optimum, held out)."
        )
    else:
        found.append(
            "The held-out rows are easier than the training rows: the optimum's FVU is"
            f" {number(high)} on them and {number(low)} on those."
        )
    return found


def fidelity_table(experiment: Record) -> str:
    """One teacher's students, a markdown table: FVU with its interval over held-out rows first."""
    rows = [["student", "FVU", "95 % interval", *COLUMNS.values()]]
    for label, metrics in experiment["students"].items():
        fvu = metrics["fvu"]
        spread = f"{number(fvu['low'])} to {number(fvu['high'])}" if "low" in fvu else ""
        shown = [
            (closeness if "cosine" in key else number)(metrics[key]["value"]) for key in COLUMNS
        ]
        rows.append([label, number(fvu["value"]), spread, *shown])
    return markdown(rows)


def layer_name(shape: Sequence[int], rank: int) -> str:
    return f"{shape[0]} x {shape[1]}, rank {rank}"


def timings(summary: Record) -> dict[str, list[Record]]:
    """Timings of each layer compared, and of the shape of the published claim."""
    experiments, claim = summary["experiments"].values(), summary["claim"]
    found = {layer_name(e["shape"], summary["target_rank"]): e["latency"] for e in experiments}
    return found | {layer_name(claim["shape"], claim["rank"]): claim["latency"]}


def latency_table(summary: Record) -> str:
    """Teacher and student times of each layer, a markdown table."""
    heading = "layer; batch; mode; teacher ms; student ms; speed-up (IQR); FLOP bound; of the bound"
    rows = [heading.split("; ")]
    for layer, found in timings(summary).items():
        for row in found:
            speedup, teacher, student = row["speedup"], row["teacher_ms"], row["student_ms"]
            times = [number(side["median"]) for side in (teacher, student)]
            gain, low, high = (number(speedup[key]) for key in ("median", "q25", "q75"))
            bound = [number(row["flop_bound"]), f"{row['fraction_of_bound']:.0%}"]
            head = [layer, str(row["batch"]), row["mode"]]
            rows.append([*head, *times, f"{gain} ({low} to {high})", *bound])
    return markdown(rows)


def batch_one(summary: Record) -> str:
    """The published speed-up beside ours, and what bounds both sides at batch 1."""
    claim = summary["claim"]
    eager = [row for row in claim["latency"] if row["mode"] == "eager"]
    found = ", ".join(f"{number(r['speedup']['median'])} at batch {r['batch']}" for r in eager)
    size = layer_name(claim["shape"], claim["rank"])
    one, empty = eager[0], claim["empty_calls"]
    parts = []
    for side, calls in (("teacher", "one call"), ("student", "two calls")):
        taken, cost = one[f"{side}_ms"]["median"], empty[f"{side}_ms"]["median"]
        megabytes = 4 * claim[f"params_{side}"] / 1e6
        speed = f"{megabytes / max(taken - cost, 1e-6):.0f} GB/s"
        share = f"{cost / taken:.0%} of which {calls} with nothing to compute also take"
        parts.append(
            f"the {side} takes {number(taken)} ms, {share}; in the rest its {number(megabytes)} MB"
            f" of weights are read at {speed}"
        )
    return (
        f"Of {size}, for which {claim['published_speedup']} is published, the speed-up is {found}."
        f" At batch 1 a weight is used once, so reading it and the calls set the bound, not the"
        f" arithmetic: {'; '.join(parts)}."
    )


def head_table(head: Record) -> str:
    """What each class of students of a head keeps at each size, a markdown table."""
    task = f"{head['task']} on the labels" if "task" in head else None
    kept = f"{NAMES[head['measure']]} kept"
    rows = [
        ["student", "weights / ", "bytes / ", kept, "FVU of the output", *([task] if task else [])]
    ]
    if task:
        rows.append(["dense", "1", "1", "1", "0", with_interval(head["dense"])])
    for s in head["students"]:
        sizes = [number(s[key]) for key in ("weights_ratio", "bytes_ratio")]
        rest = [with_interval(s["task"])] if task else []
        rows.append([s["student"], *sizes, *(with_interval(s[k]) for k in ("kept", "fvu")), *rest])
    return markdown(rows)


def rank_table(summary: Record) -> str:
    """Smallest rank of the optimum that reaches each FVU on held-out rows, and the floor's."""
    targets = list(next(iter(summary["experiments"].values()))["rank_for_fvu"])
    rows = [["teacher", *(f"FVU <= {float(target):.0%}" for target in targets)]]
    for name, experiment in summary["experiments"].items():
        found = [experiment["rank_for_fvu"][target] for target in targets]
        ranks = ["none" if f["fvu"] > summary["input_dim"] else str(f["fvu"]) for f in found]
        rows.append([name, *(f"{r} (floor {f['floor_fvu']})" for r, f in zip(ranks, found))])
    return markdown(rows)


def closing_table(summary: Record) -> str:
    """What the terminal shows at the end."""
    parts = [headline(summary), *summary["notices"]]
    for name, experiment in summary["experiments"].items():
        before, after = experiment["params_teacher"], experiment["params_student"]
        gains = [number(experiment[key]) for key in ("compression", "speedup")]
        gain = f"{gains[0]} x smaller), {gains[1]} x faster"
        parts.append(f"{name} teacher: {before:,} -> {after:,} parameters ({gain} at batch 32")
        parts += [fidelity_table(experiment), *remarks(experiment)]
    if head := summary.get("head"):
        rows = f"{head['n_train']:,} rows to fit on, {head['n_val']:,} held out, 95 % intervals"
        parts += [f"Head {head['name']}, {head['weights']:,} weights, {rows}", head_table(head)]
    parts += ["Smallest rank of the optimum, held out", rank_table(summary)]
    parts += ["Latency", latency_table(summary), batch_one(summary)]
    return "\n\n".join(parts)
