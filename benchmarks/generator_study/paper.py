"""The paper draft of a study: prose around its numbers; no number and no verdict is typed here."""

# ruff: noqa: E501 - the lines of the text are long
from collections.abc import Iterable
from itertools import pairwise

from benchmarks.generator_study.design import CONTRASTS
from distil_rank.core.records import Record
from distil_rank.core.tables import markdown, with_interval

SCHEMA = "distil-rank/generator-study/3"
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon (the matrices) and AdamW"}
WEAK = 0.3  # a teacher this little below token frequencies is called weak
SPREAD = 0.05  # of the quartiles of the weights: below it they are called constant


def paper(study: Record, figures: str = "../results/generators") -> str:
    """The whole draft; `figures` is their folder as the paper sees it."""
    data, base, preset = study["data"], study["objective"], study["config"]["preset_values"]
    reference = study["references"]["perplexity"]
    teacher, alone = (reference[name]["all"] for name in ("teacher", "token frequencies"))
    environment, duration = study["environment"], study["duration"]
    tests = sum(map(len, study["effects"].values()))
    split = {
        True: "The teacher was trained without the test proteins.",
        False: "**That the teacher was trained without the test proteins is not on record.**",
    }[study["teacher_left_these_out"]]
    time = (
        ""
        if duration["runs_found"]
        else f" It took {duration['minutes']:.0f} minutes with {duration['workers']} process(es)."
    )
    return f"""# Distilling a protein generator: what teacher, enhancements and warm start are worth

## Abstract

Students of three sizes are distilled from {study["references"]["name"]} ({study["references"]["parameters"]["total"]:,} parameters, test perplexity
{teacher:.2f}; token frequencies alone {alone:.2f}) with controls that can fail: no teacher, token frequencies, a warm start.
Over {len(study["seeds"])} paired runs a cell and {tests} planned contrasts with Holm's correction. The teacher: {_all(study, "teacher")}.
Uncertainty weights: {_all(study, "uncertainty")}. Calibration smoothing: {_all(study, "calibration")}. Both: {_all(study, "both")}.
A start from a slice of the teacher: {_all(study, "slice")}.

## Introduction

Large language models write proteins; small ones write them faster. Distillation trains a small student on the distributions of a
large teacher (Hinton, Vinyals and Dean 2015). A published study distilled ProtGPT2 into small GPT-2 students and reported that
uncertainty weights and calibration smoothing each hurt alone and together help (perplexity ratio 18.95; alone 36.9 and 39.6;
both 8.93), most on difficult proteins (15 to 25 %), with one seed and five proteins. Do these effects hold under equal conditions,
and does a student need the teacher at all?

## Related work

DistilProtBert (Geffen, Ofran and Unger 2022) halves ProtBert, an encoder. MTDP (Shang et al. 2024) distills several encoders into
one small embedder. SpiderGPT (arXiv 2504.08437) distills ProtGPT2 and fine-tunes the student on spider silk. None of them
compares with a student of the same size, data and steps that had no teacher.

## Methods

With teacher logits z_T, student logits z_S, p = softmax(z_T / tau), q = softmax(z_S / tau), the student minimizes
`alpha CE(z_S, token) + (1 - alpha) tau^2 mean_t w_t KL(p || q)`. *Uncertainty*: w_t = 0.5 + 0.5 (H_t - min) / (max - min), H_t the
teacher's entropy, extremes over the residues of a protein. *Calibration*: p is mixed with the uniform distribution by
eps_t = {base["smoothing"]:g} (1 - max p). *Slice*: first features, heads and neurons of evenly spaced teacher layers.
The doses act as follows: quartiles over residues are {_list(study["dose_of_enhancements"]["weight"])} for w_t and
{_list(study["dose_of_enhancements"]["smoothing"])} for eps_t.{_dose(study)}

Proteins: {data["source"]}, {data["n_train"]:,} for training, {data["test_proteins_used"]:,} of {data["n_test"]:,} test proteins, split by {data["split"]["method"]}. {split}
Difficulty: thirds of the test proteins by the teacher's own perplexity{_hard(study)}. Every run has {preset["steps"]:,} steps of {preset["batch_size"]} proteins by {OPTIMIZERS[preset["optimizer"]]}; run i of every cell shares its
batches and random weights. Learning rates (of {_list(preset["rates"])}, one for each size, start, and with or without teacher), temperature and alpha
are chosen on validation proteins: {"; ".join(f"{field} {base[field]:g}" for field in ("temperature", "alpha"))}. Effects are relative changes of
perplexity with t intervals over runs; a word is given where Holm's corrected p over all {tests} contrasts is below .05, and
elsewhere the smallest effect that would have been found with a probability of 80 %.

## Results

**Table 1. Test perplexity, mean of runs [95 % interval]**

{_cells(study)}

**Table 2. Doses, {next(iter(study["cells"]))}**

{_doses(study)}

![Doses]({figures}/doses.png)

**Table 3. Planned contrasts: change of perplexity, below 0 is better**

{_effects(study)}

![Effects]({figures}/effects.png)

**Table 4. Perplexity by difficulty**

{_strata(study)}

![Strata]({figures}/strata.png)

**Table 5. One student of each size, from the cell best on validation{_longer(preset)}**

{_finals(study)}

**Table 6. Calibration of the most probable token: root mean square gap, debiased**

{_calibration(study)}

## Discussion

{_claims(study)}

Negative results:

{_negative(study)}

## Limits

{_weak(teacher, alone)}One teacher, one family of proteins and short training: what a longer one would change is not known. Intervals are over runs
(weights and batches), not over proteins, which share relatives.{time} Commit {str(environment["commit"])[:12]}, {environment["device"]}, {environment["threads"]} thread(s)."""


def _longer(preset: Record) -> str:
    times = preset["final_times"]
    return f", trained {times} times as long" if times > 1 else ""


def _all(study: Record, contrast: str) -> str:
    """One word where all sizes agree, else one a size."""
    words = {size: effects[contrast]["word"] for size, effects in study["effects"].items()}
    same = len(set(words.values())) == 1
    parts = [_percent(study["effects"][size][contrast]["value"]) for size in words]
    if same:
        word = next(iter(words.values()))
        where = "any" if word == "no effect found" else "every"
        return f"{word} at {where} size ({', '.join(parts)})"
    return ", ".join(f"{word} at {size} ({p})" for (size, word), p in zip(words.items(), parts))


def _cells(study: Record) -> str:
    rows = [["cell", *study["cells"]]]
    for name in next(iter(study["cells"].values())):
        rows.append(
            [name, *(_value(of[name]["perplexity"]["all"]) for of in study["cells"].values())]
        )
    for name, found in study["references"]["perplexity"].items():
        rows.append([f"*{name}*", *[f"{found['all']:.3f}"] * len(study["cells"])])
    counts = [next(iter(of.values()))["parameters"]["total"] for of in study["cells"].values()]
    return markdown([*rows, ["parameters", *(f"{count:,}" for count in counts)]])


def _doses(study: Record) -> str:
    first = next(iter(study["cells"].values()))
    rows = [
        [field, value, _value(cell["perplexity"]["all"]), _value(cell["perplexity"]["difficult"])]
        for field, of in study["doses"].items()
        for value, cell in of.items()
    ]
    control = first["no teacher"]["perplexity"]
    rows.append(["alpha", "1 (no teacher)", _value(control["all"]), _value(control["difficult"])])
    return markdown([["dose", "value", "perplexity", "difficult third"], *rows])


def _effects(study: Record) -> str:
    head = ["size", "contrast", "change [95 % interval]", "corrected p", "word", "detectable"]
    rows = [
        [
            size,
            name,
            _interval(e),
            f"{e['corrected_p']:.3g}",
            e["word"],
            _percent(e["detectable"], ""),
        ]
        for size, effects in study["effects"].items()
        for name, e in effects.items()
    ]
    return markdown([head, *rows])


def _strata(study: Record) -> str:
    names = [*study["strata"]]
    rows = [
        ["", name, *(f"{found[s]:.3f}" for s in names)]
        for name, found in study["references"]["perplexity"].items()
    ]
    for size, of in study["cells"].items():
        for name in ("no teacher", "distilled", "both", "slice"):
            rows.append([size, name, *(_value(of[name]["perplexity"][s]) for s in names)])
    counts = [f"{name} ({study['strata'][name]:,})" for name in names]
    return markdown([["size", "model", *counts], *rows])


def _finals(study: Record) -> str:
    head = [
        "size",
        "cell",
        "ratio to teacher",
        "threshold",
        "KL to teacher",
        "calibration error",
        "amino-acid KL",
        "novelty (natural)",
        "family (natural)",
        "times faster",
    ]
    return markdown(
        [head, *(_final(study, size, found) for size, found in study["finals"].items())]
    )


def _final(study: Record, size: str, found: Record) -> list[str]:
    written, speeds = found["student"]["generation"], found["speed"]["models"]
    batch = next(reversed([k for k in speeds["teacher"] if k.isdigit()]))
    ratio = (
        speeds["student"][batch]["tokens_per_second"]
        / speeds["teacher"][batch]["tokens_per_second"]
    )
    novelty, family, kl = (written.get(k) for k in ("novelty", "family", "amino_acid_kl"))
    return [
        size,
        found["cell"],
        _value(found["ratio"]),
        _threshold(study, found),
        _value(found["kl_to_teacher"]),
        _value(found["student"]["calibration"]["error"]),
        f"{_value(kl)}{'' if kl['certain'] else ', uncertain'}" if kl else "none valid",
        f"{_value(novelty)} ({novelty['natural']['value']:.2f})" if novelty else "none valid",
        f"{_value(family['generated'])} ({family['natural']['value']:.2f})" if family else "",
        f"{ratio:.1f}",
    ]


def _threshold(study: Record, found: Record) -> str:
    """What is said of a threshold: nothing good where token frequencies alone meet it."""
    limit, reference = found["threshold"], study["references"]["perplexity"]
    if limit is None:
        return ""
    alone = reference["token frequencies"]["all"] / reference["teacher"]["all"]
    if alone < limit:
        return f"< {limit:g}: token frequencies alone meet it ({alone:.2f})"
    low, high = found["ratio"]["low"], found["ratio"]["high"]
    word = "excellent" if high < limit else "missed" if low > limit else "undecided"
    return f"< {limit:g}: {word}"


def _calibration(study: Record) -> str:
    rows = [
        [name, *(_value(of[name]["calibration_error"]) for of in study["cells"].values())]
        for name in next(iter(study["cells"].values()))
    ]
    return markdown([["cell", *study["cells"]], *rows])


def _claims(study: Record) -> str:
    names = next(iter(study["claims"].values()))
    lines = [
        f"The claim *{name}* is {', '.join(f'**{of[name]}** at {size}' for size, of in study['claims'].items())}."
        for name in names
    ]
    order = [of["distilled"]["perplexity"]["all"] for of in study["cells"].values()]
    apart = all(a["low"] > b["high"] for a, b in pairwise(order))
    sizes = " > ".join(study["cells"])
    return "\n".join(
        [
            *lines,
            f"The order of perplexity {sizes} {'holds' if apart else 'does not hold'} with disjoint intervals.",
        ]
    )


def _negative(study: Record) -> str:
    """One line a contrast: where it was not found, or found to harm."""
    lines = []
    for name, (_, _, (below, _)) in CONTRASTS.items():
        found = {
            size: of[name] for size, of in study["effects"].items() if of[name]["word"] != below
        }
        parts = [
            f"{e['word']} at {size}, {_interval(e)}, least to be found {_detectable(e)}"
            for size, e in found.items()
        ]
        lines += [f"* {name}: {'; '.join(parts)}."] * bool(parts)
    return "\n".join(lines) or "* none."


def _hard(study: Record) -> str:
    hard = "; the hard part is of clusters held out at a lower identity"
    return hard if "hard part" in study["strata"] else ""


def _dose(study: Record) -> str:
    low, _, high = study["dose_of_enhancements"]["weight"]
    if high - low > SPREAD:
        return ""
    return " The weights are all but constant: few certain residues set the minimum, and uncertainty as published hardly acts."


def _weak(teacher: float, alone: float) -> str:
    gain = 1 - teacher / alone
    if gain >= WEAK:
        return ""
    return (
        f"**The teacher is weak**: its perplexity is {100 * gain:.1f} % below that of token frequencies alone, so a student has little "
        "to lose and a ratio near 1 is no praise.\n"
    )


def _value(metric: Record, digits: int = 3) -> str:
    return with_interval(metric, f".{digits}f")


def _percent(value: float, sign: str = "+") -> str:
    return f"{100 * value:{sign}.2f} %"


def _detectable(effect: Record) -> str:
    return _percent(effect["detectable"], "") if effect["detectable"] < 1 else "> 100 %"


def _interval(effect: Record) -> str:
    low, high = (f"{100 * effect[k]:+.2f}" for k in ("low", "high"))
    return f"{_percent(effect['value'])} [{low}, {high}]"


def _list(values: Iterable[float]) -> str:
    *rest, last = (f"{v:.3g}" for v in values)
    return f"{', '.join(rest)} and {last}"
