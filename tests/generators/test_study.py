"""The study end to end at toy scale: controls everywhere, resumable, redrawable."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.generator_study import __main__ as study
from benchmarks.generator_study import design, figures, runs
from benchmarks.generator_study.paper import paper
from distil_rank.core.devices import threads
from distil_rank.core.errors import InputError
from distil_rank.core.records import ROOT
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import fresh, initial_student, load, save
from distil_rank.generators.prepared import SPLIT, Prepared, digest
from distil_rank.generators.train import Schedule
from tests.generators.conftest import prepare, write_toy_fasta

SHAPE = (1, 2, 16)
TOY = design.Preset(
    {"tiny": SHAPE},
    2,
    8,
    (1e-2, 1e-4),
    seeds=2,
    temperatures=(1, 2),
    alphas=(0.5, 0.1),
    test_proteins=10,
    final_times=2,
    generate=3,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, data, tokenizer):
    folder, first = tmp_path_factory.mktemp("study"), Prepared(data)
    save(fresh(27, 2, 2, 32, 96, 0, 1), tokenizer, folder / "teacher")
    listed = {part: [digest(s) for s in first.sequences(part)] for part in ("validation", "test")}
    listed["hard"] = [listed["test"].pop() for _ in range(5)]
    (folder / "split.json").write_text(json.dumps({"schema": SPLIT, **listed}))
    prepare(
        data.with_name("toy.fasta"),
        folder / "data",
        train_size_prop=0.5,
        split_by=str(folder / "split.json"),
    )
    return folder


def bench(place, cache=True, data="data"):
    return runs.Bench(str(place / "teacher"), place / data, 10, "cpu", cache)


@pytest.fixture(scope="module")
def conducted(place):
    given = {"teacher": str(place / "teacher"), "work": place / "work", "device": "cpu"}
    config = study.Config(place / "data", out=place / "out", workers=2, **given)
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setitem(design.PRESETS, "family", TOY)
        study.run(config)
        first = json.loads((place / "out" / "study.json").read_text())
        patch.setattr(runs.Bench, "student", lambda *_: pytest.fail("a run was made again"))
        study.run(config)
    return first, json.loads((place / "out" / "study.json").read_text())


def test_a_second_study_makes_no_run_again_and_finds_the_same(conducted):
    first, again = conducted
    assert first["duration"]["runs_found"] == 0 < again["duration"]["runs_found"]
    assert first | {"duration": 0} == again | {"duration": 0}


def test_every_table_has_its_controls_and_every_contrast_a_verdict(conducted, place):
    found = conducted[0]
    cells = found["cells"]["tiny"]
    assert set(cells) == set(design.cells(Objective()))
    assert set(found["strata"]) == {"all", "easy", "middle", "difficult", "hard part"}
    for name in ("teacher", "token frequencies"):
        by_stratum = found["references"]["perplexity"][name]
        assert set(by_stratum) == set(found["strata"])
    teacher = found["references"]["perplexity"]["teacher"]
    assert teacher["easy"] < teacher["middle"] < teacher["difficult"]
    assert all(len(cell["log_perplexity"]["hard part"]) == 2 for cell in cells.values())
    for effect in found["effects"]["tiny"].values():
        assert (effect["word"] == "no effect found") == (effect["corrected_p"] >= 0.05)
        assert effect["detectable"] > 0
    assert found["objective"]["temperature"] in (1, 2) and found["objective"]["alpha"] in (0.5, 0.1)
    final = found["finals"]["tiny"]
    least = min(cells, key=lambda name: cells[name]["validation_nll"])
    assert final["cell"] == least and final["student"]["generation"]["n"] == 3
    text = paper(found)
    assert (
        "trained 2 times as long" in text
        and text.count("no teacher") >= 4
        and text.count("token frequencies") >= 4
    )


def test_rates_are_chosen_by_pilots_of_another_seed_that_never_see_the_test(conducted, place):
    made = [json.loads(path.read_text()) for path in (place / "work").glob("run.*.json")]
    pilots = [run for run in made if run["run"]["pilot"]]
    assert len(pilots) == 2 * 2 * 2  # rates, with and without teacher, random and slice
    assert all("log_perplexity" not in run for run in pilots)
    assert {run["run"]["schedule"]["seed"] for run in pilots} == {design.PILOT}
    assert {run["run"]["schedule"]["seed"] for run in made if run not in pilots} == {0, 1}
    for tried in conducted[0]["rates"].values():
        assert tried["chosen"] == TOY.rates[int(np.argmin(tried["validation_nll"]))]


def test_figures_and_paper_come_from_the_json_alone(conducted, place):
    figures.draw(place / "out")
    assert sorted(p.stem for p in (place / "out").glob("*.png")) == sorted(figures.FIGURES)
    text = (place / "out" / "paper.md").read_text()
    assert all(f"(./{name}.png)" in text for name in figures.FIGURES)
    assert "nan" not in text.lower().replace("nano", "")
    changed = json.loads(json.dumps(conducted[0]))
    changed["effects"]["tiny"]["interaction"] |= {"word": "antagonism", "value": 0.4321}
    assert "+43.21 %" in paper(changed) and "* interaction: antagonism at tiny" in paper(changed)


@pytest.mark.parametrize(
    "teacher,alone,ratio,word",
    [
        (10, 19, (1.0, 1.2), "token frequencies alone meet"),
        (5, 19, (1.0, 1.2), "excellent"),
        (5, 19, (3.9, 4.1), "missed"),
        (5, 19, (2.9, 3.1), "undecided"),
    ],
)
def test_praise_needs_more_than_token_frequencies(conducted, teacher, alone, ratio, word):
    changed = json.loads(json.dumps(conducted[0]))
    for name, value in (("teacher", teacher), ("token frequencies", alone)):
        changed["references"]["perplexity"][name]["all"] = value
    low, high = ratio
    changed["finals"]["tiny"]["ratio"] = {"value": low, "low": low, "high": high}
    words = ("alone meet", "excellent", "missed", "undecided")
    said = [w for w in words if w in paper(changed).split("## Res")[1]]
    assert len(said) == 1 and said[0] in word
    assert ("teacher is weak" in paper(changed)) == (1 - teacher / alone < 0.3)


def test_the_cache_and_a_second_process_change_no_outcome(place, tmp_path):
    enhanced = Objective(uncertainty=True, calibration=True)
    plan = [runs.Run(SHAPE, enhanced, Schedule(2, 8, seed=seed), "slice") for seed in range(3)]
    with threads(1):  # as a worker has; with more, sums are taken in another order
        kept, live = bench(place), bench(place, cache=False)
        one, two = (runs.make(plan, kept, tmp_path / str(n), n) for n in (1, 2))
        assert one == two and json.loads(json.dumps(live.outcome(plan[0]))) == one[0]


def test_a_run_is_known_by_everything_that_changes_it(place):
    run, known = runs.Run(SHAPE, Objective(), Schedule(4)), bench(place)
    own = known.request(run)
    assert bench(place, cache=False).request(run) == own
    prepare(write_toy_fasta(place / "toy.fasta", 60, seed=1), place / "other")  # of the same name
    for other in (
        known.request(replace(run, objective=Objective(3.0))),
        known.request(replace(run, schedule=Schedule(4, seed=1))),
        known.request(replace(run, init="slice")),
        bench(place, data="other").request(run),
    ):
        assert other != own


@pytest.mark.parametrize(
    "bad,message",
    [({"seeds": 1}, "--seeds"), ({"steps": 0}, "--steps"), ({"workers": 0}, "--workers")],
)
def test_bad_flags_are_refused_before_anything_is_read(tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        study.run(study.Config(tmp_path / "none", out=tmp_path / "out", **bad))
    assert not (tmp_path / "out").exists()


def test_the_committed_teacher_has_a_slice_of_every_size():
    teacher, _ = load(str(ROOT / "models" / "family-teacher"))
    for shape in design.PRESETS["family"].sizes.values():
        initial_student(teacher, *shape, "slice", seed=0)
