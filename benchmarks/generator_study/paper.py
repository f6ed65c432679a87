"""The paper draft, a block of `docs/generators.md`: prose around the study's numbers.

A pure function of the JSON; no number and no verdict is typed here.
"""

# ruff: noqa: E501 - the lines of the template are those of the text
from collections.abc import Iterable

from benchmarks.generator_study.presets import CELLS
from distil_rank.core.records import Record
from distil_rank.core.tables import markdown, with_interval

SCHEMA = "distil-rank/generator-study/2"
WEAK = 0.3  # a teacher this little below token frequencies is called weak


def paper(study: Record, figures: str = "../results/generators") -> str:
    """A short paper with six tables, from a study record; `figures` is their folder as the paper sees it."""
    data, ablation, teacher = study["data"], study["ablation"], study["teacher"]
    objective, sizes = ablation["objective"], study["sizes"]
    schedules = ablation["schedules"]
    runs = next(iter(schedules.values()))["contrasts"]["interaction"]["runs"]
    claims = {
        name: part["contrasts"]["words"]["published_claim"] for name, part in schedules.items()
    }
    preset = study["config"]["preset_values"]
    gain = 1 - teacher["perplexity"]["value"] / data["token_frequencies_perplexity"]
    weak = (
        f"\n**The teacher is weak**: its perplexity is only {100 * gain:.1f} % below that of token frequencies alone, line breaks "
        "and ends included. Students then have little to lose: a ratio near 1 is no praise, and the ablation tests the "
        "harness more than the enhancements."
        if gain < WEAK
        else ""
    )
    underpowered = (
        " **The evaluation is underpowered: fewer than 1,000 proteins.**"
        if _first(sizes)["underpowered"]
        else ""
    )
    notice = {
        True: "The teacher was trained without these test proteins and their relatives.",
        False: "**The teacher was trained on another split: some test proteins may be known to it.**",
        None: "Whether the teacher knows some of the test proteins is not on record.",
    }[data["teacher_left_these_out"]]
    return f"""# Distilling a protein generator, and what two enhancements are worth

## Question

A published study distilled ProtGPT2 into small GPT-2 students and reported that two enhancements, uncertainty weighting and
calibration smoothing, each hurt alone and together help (perplexity ratio 18.95; alone 36.9 and 39.6; both 8.93), measured on five
proteins with one seed and unequal schedules. Is there such an interaction under equal conditions?

## Methods

Teacher logits z_T, student z_S, p = softmax(z_T / tau), q = softmax(z_S / tau). The student minimizes
`alpha CE(z_S, token) + (1 - alpha) tau^2 mean_t w_t KL(p || q)` over real predictions. *Uncertainty*: w_t = 0.5 + 0.5 (H_t - min) /
(max - min) within a protein, H_t the teacher's entropy at tau = 1. *Calibration*: p is mixed with the uniform distribution by
eps_t = {objective["smoothing"]} (1 - max p). Runs are paired: run i of every cell has the same initial weights and batches. {_rates(schedules, preset)}

The proteins are {data["source"]} ({data["read"]:,} read), split into {data["n_train"]:,} training,
{data["n_validation"]:,} validation and {data["n_test"]:,} test proteins. {notice}{underpowered} The teacher (`{teacher["name"]}`,
{teacher["parameters"]["total"]:,} parameters) has a test perplexity of {_value(teacher["perplexity"], 3)} per token,
{_value(teacher["bits_per_residue"], 3)} bits per residue; token frequencies alone have {data["token_frequencies_perplexity"]:.3f}.

**Table 1. Configurations**

{_table(["student", "layers", "heads", "width", "parameters", "without embeddings", "smaller by"], _configurations(sizes))}

## Results

### Temperature and alpha

Chosen on validation with the baseline: {_chosen(study, "temperature")}, {_chosen(study, "alpha")}. Both enhancements
act on the divergence from the teacher only, {1 - study["alpha"]["chosen"]:.0%} of the loss here.

![Temperature]({figures}/temperature.png)
![Alpha]({figures}/alpha.png)

### The 2 x 2 ablation

**Table 2. Change of perplexity against the baseline, {runs} paired runs a cell, 95 % t interval**

{_table(["schedule", "cell", "learning rate", "perplexity ratio", "change of perplexity", "word"], _ablation_rows(schedules))}

![Ablation]({figures}/ablation.png)

{_claims(claims)} {_power(schedules)} Changing the schedule from {ablation["schedule_effect"]["from"]} to
{ablation["schedule_effect"]["to"]} alone changes the baseline's perplexity by
{_percent(ablation["schedule_effect"])}.

![Uncertainty]({figures}/uncertainty.png)

### Final students

**Table 3. Held-out metrics and thresholds**

{_table(["student", "learning rate", "perplexity", "bits per residue", "ratio to teacher", "KL to teacher (nats)", "threshold", "token frequencies alone"], _metrics(sizes, data["token_frequencies_perplexity"]))}

![Pareto]({figures}/pareto.png)

**Table 4. Calibration of the most probable token**

{_table(["model", "signed gap", "Brier", "scaled: T", "scaled: signed gap"], _calibration(sizes))}

![Reliability]({figures}/reliability.png)

**Table 5. Related work: the published students beside these**

{_table(["study", "teacher", "proteins evaluated", "runs a cell", "baseline ratio", "uncertainty", "calibration", "both"], _related(study, runs))}

**Table 6. Speed and memory (this machine; read the ratios)**

{_table(["student", "batch", "tokens/s", "teacher's tokens/s", "faster by", "weights (MiB)", "peak (MiB)"], _speed(sizes))}

![Speed]({figures}/speed.png)

### What the models write

{_table(["model", "valid", "ended", "median length (natural)", "amino-acid KL (noise floor)", "repeated words (natural)"], _generation(sizes))}

![Amino acids]({figures}/amino_acids.png)

## Limits
{weak}
The numbers above are those of preset `{study["config"]["preset"]}`: they say what holds for this teacher, these
students and {preset["steps"]:,} steps. {_duration(study)}ProtGPT2 itself takes `--preset protgpt2` and a GPU. The weights' extremes were
those of all tokens, line breaks included (since changed to residues), and the words were not corrected for multiple tests. Commit {str(study["environment"]["commit"])[:12]},
{study["environment"]["device"]}, {study["environment"]["threads"]} thread(s)."""


def _chosen(study: Record, field: str) -> str:
    tried, value = [entry[field] for entry in study[field]["baseline"]], study[field]["chosen"]
    return (
        f"{field} {value:g}{' (the edge of its grid)' if value in (min(tried), max(tried)) else ''}"
    )


def _configurations(sizes: Record) -> Iterable[list[str]]:
    for name, record in sizes.items():
        shape, count = record["student"]["shape"], record["student"]["parameters"]
        yield [
            name, *(str(shape[k]) for k in ("n_layer", "n_head", "n_embd")), f"{count['total']:,}",
            f"{count['without_embeddings']:,}", f"{record['compression']['total']:.1f}x",
        ]  # fmt: skip


def _ablation_rows(schedules: Record) -> Iterable[list[str]]:
    for name, part in schedules.items():
        for cell in CELLS:
            entry = part["cells"][cell]
            change, word = (
                ("", "")
                if cell == "baseline"
                else (_percent(part["contrasts"][cell]), part["contrasts"]["words"][cell])
            )
            yield [
                name,
                cell,
                f"{entry['learning_rate']:g}",
                _value(entry["ratio"], 4),
                change,
                word,
            ]
        yield [
            name,
            "interaction",
            "",
            "",
            _percent(part["contrasts"]["interaction"]),
            part["contrasts"]["words"]["interaction"],
        ]


def _claims(claims: dict[str, str]) -> str:
    said = "; ".join(f"under the {name} it is **{word}**" for name, word in claims.items())
    return f"The published claim (each alone hurts, both together help): {said}."


def _rates(schedules: Record, preset: Record) -> str:
    chosen = [part["cells"][cell]["learning_rate"] for part in schedules.values() for cell in CELLS]
    edge = sum(rate in (min(preset["rates"]), max(preset["rates"])) for rate in chosen)
    at = (
        f"{edge} of the {len(chosen)} chosen rates lie"
        if edge != 1
        else f"One of the {len(chosen)} chosen rates lies"
    )
    return (
        f"The learning rate of each\ncell and schedule is the one of {_list(preset['rates'])} with the lowest mean loss on "
        f"validation proteins over {preset['pilots']} pilots, whose\nseeds are not those of the runs reported. "
        f"{at if edge else 'None of the chosen rates lies'} at the edge of that grid. Final students take the rate\nof the best of one pilot per rate."
    )


def _duration(study: Record) -> str:
    spent = study["duration"]
    if spent["runs_found"]:
        return ""  # some runs were made before
    processes = f"{spent['workers']} processes" if spent["workers"] > 1 else "one process"
    return f"The study took {spent['minutes']:.1f} minutes\nwith {processes}. "


def _power(schedules: Record) -> str:
    parts = [
        f"{100 * part['detectable_interaction']:.2f} % ({name})" for name, part in schedules.items()
    ]
    return (
        f"An interaction of {' or '.join(parts)} would have been found with a probability of 80 %."
    )


def _metrics(sizes: Record, frequencies: float) -> Iterable[list[str]]:
    """`frequencies` is the perplexity of token frequencies alone."""
    for name, record in sizes.items():
        student, verdict = record["student"], record["verdict"]
        alone, limit = frequencies / record["teacher"]["perplexity"]["value"], verdict["threshold"]
        met = ""
        if limit is not None:
            met = f"< {limit:g}: {'met' if verdict['met'] else 'missed'}"
        yield [
            name,
            f"{record['learning_rate']:g}",
            _value(student["perplexity"], 3),
            _value(student["bits_per_residue"], 3),
            _value(record["ratio"], 4),
            _value(record["kl_to_teacher"], 4),
            met,
            f"{alone:.3f}{': met' if limit is not None and alone < limit else ''}",
        ]


def _calibration(sizes: Record) -> Iterable[list[str]]:
    models = {"teacher": _first(sizes)["teacher"]} | {
        name: record["student"] for name, record in sizes.items()
    }
    for name, model in models.items():
        plain, scaled = model["calibration"]["as_is"], model["calibration"]["temperature_scaled"]
        yield [
            name, _value(plain["signed_gap"], 4),
            f"{plain['brier']['value']:.4f}", f"{model['calibration']['fitted_temperature']:.3f}", _value(scaled["signed_gap"], 4),
        ]  # fmt: skip


def _related(study: Record, runs: int) -> Iterable[list[str]]:
    yield [
        "ewijaya/protein-lm-distill, micro",
        "ProtGPT2",
        "5",
        "1",
        "18.95",
        "36.9",
        "39.6",
        "8.93",
    ]
    for name, part in study["ablation"]["schedules"].items():
        ratios = [f"{part['cells'][cell]['ratio']['value']:.4f}" for cell in CELLS]
        yield [
            f"here, {name}",
            study["teacher"]["name"],
            f"{study['data']['n_test']:,}",
            str(runs),
            *ratios,
        ]


def _speed(sizes: Record) -> Iterable[list[str]]:
    for name, record in sizes.items():
        student, teacher = (record["speed"]["models"][k] for k in ("student", "teacher"))
        for batch in (k for k in student if k.isdigit()):
            fast, slow = student[batch]["tokens_per_second"], teacher[batch]["tokens_per_second"]
            yield [
                name, batch, f"{fast:,.0f}", f"{slow:,.0f}", f"{fast / slow:.2f}x", f"{student['weights_mib']:.2f}", f"{student['peak_mib']:.1f}"
            ]  # fmt: skip


def _generation(sizes: Record) -> Iterable[list[str]]:
    models = {"teacher": _first(sizes)["teacher"]} | {
        name: record["student"] for name, record in sizes.items()
    }
    for name, model in models.items():
        g = model["generation"]
        kl = g.get("amino_acid_kl")
        yield [
            name, _value(g["validity"], 3), _value(g["ended"], 3), f"{g['lengths']['generated'][2]:.0f} ({g['lengths']['natural'][2]:.0f})",
            f"{_value(kl, 4)} ({kl['noise_floor']:.4f})" if kl else "none valid",
            f"{g['repeated_words']['value']:.4f} ({g['repeated_words_natural']['value']:.4f})",
        ]  # fmt: skip


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return markdown([head, *rows])


def _value(metric: Record, digits: int) -> str:
    return with_interval(metric, f".{digits}f")


def _percent(metric: Record) -> str:
    return (
        f"{100 * metric['value']:+.2f} % [{100 * metric['low']:+.2f}, {100 * metric['high']:+.2f}]"
    )


def _list(values: Iterable[float]) -> str:
    *rest, last = (f"{v:g}" for v in values)
    return f"{', '.join(rest)} or {last}" if rest else last


def _first(sizes: Record) -> Record:
    return next(iter(sizes.values()))
