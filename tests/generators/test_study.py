"""The study end to end at toy scale: complete, resumable, redrawable."""

import json
from dataclasses import replace

import pytest

from benchmarks.generator_study import presets, report, runs, study
from benchmarks.generator_study.paper import paper
from distil_rank.core.devices import threads
from distil_rank.generators.data import amino_acid_tokenizer
from distil_rank.generators.loss import Objective
from distil_rank.generators.models import fresh, save
from distil_rank.generators.train import Schedule
from tests.generators.conftest import prepare, write_toy_fasta

TOY = replace(
    presets.PRESETS["nano"],
    sizes={"tiny": (1, 2, 16)},
    steps=2,
    final_steps=3,
    rates=(1e-2, 1e-4),
    temperatures=(1, 2),
    alphas=(0.5,),
    generate=4,
    seeds=2,
    pilots=2,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    save(fresh(27, 2, 2, 32, 96, 0, 1), amino_acid_tokenizer(), folder / "teacher")
    prepare(write_toy_fasta(folder / "toy.fasta", 80), folder / "data", train_size_prop=0.5)
    return folder


@pytest.fixture(scope="module")
def conducted(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "nano", replace(TOY, teacher=str(place / "teacher")))
        config = study.Config(place / "data", place / "out", work=place / "work", device="cpu")
        study.run(config)
        first = json.loads((place / "out" / "study.json").read_text())
        patch.setattr(
            runs.Bench, "outcome", lambda *_: pytest.fail("a finished run was made again")
        )
        study.run(config)
    return first, json.loads((place / "out" / "study.json").read_text())


def test_a_second_study_makes_no_run_again_and_finds_the_same(conducted):
    first, again = conducted
    assert first["duration"]["runs_found"] == 0 < again["duration"]["runs_found"]
    assert first["ablation"] == again["ablation"] and first["temperature"] == again["temperature"]
    for name in ("ratio", "kl_to_teacher", "student", "teacher", "verdict"):
        assert first["sizes"]["tiny"][name] == again["sizes"]["tiny"][name]


def test_the_study_is_complete(conducted):
    found = conducted[0]
    assert set(found["ablation"]["schedules"]) == {"short warm-up", "long warm-up"}
    for part in found["ablation"]["schedules"].values():
        assert len(part["cells"]["both"]["log_perplexity"]) == 2
        assert part["contrasts"]["words"]["published_claim"] in (
            "reproduced",
            "contradicted",
            "not reproduced",
        )
    assert (
        found["sizes"]["tiny"]["verdict"]["threshold"] == 3.0
        and found["sizes"]["tiny"]["underpowered"]
    )


def test_learning_rates_are_chosen_by_the_mean_of_pilots_of_other_seeds(conducted, place):
    made = [json.loads(path.read_text()) for path in (place / "work").glob("*.json")]
    pilots = [run for run in made if run["run"]["pilot"]]
    assert (
        len(pilots) == 2 * 4 * 2 * 2
    )  # schedules, cells, rates, seeds; the only size's pilots are among them
    assert all("ratio" not in pilot for pilot in pilots)  # the test proteins were not looked at
    reported = {
        run["run"]["schedule"]["seed"]
        for run in made
        if "ratio" in run and run["run"]["schedule"]["seed"] < 1000
    }
    assert reported == {0, 1} and {pilot["run"]["schedule"]["seed"] for pilot in pilots} == {
        1000,
        1001,
    }
    cell = conducted[0]["ablation"]["schedules"]["long warm-up"]["cells"]["both"]
    for rate, loss in cell["validation_nll_by_rate"].items():
        own = [
            pilot["validation_nll"]
            for pilot in pilots
            if pilot["run"]["schedule"]["learning_rate"] == float(rate)
            and pilot["run"]["schedule"]["warmup"] == 0.4
            and pilot["run"]["objective"]["uncertainty"]
            and pilot["run"]["objective"]["calibration"]
        ]
        assert len(own) == 2 and loss == pytest.approx(sum(own) / 2)
    assert cell["learning_rate"] == float(
        min(cell["validation_nll_by_rate"], key=cell["validation_nll_by_rate"].get)
    )
    assert "8 of the 8 chosen rates lie at the edge" in " ".join(paper(conducted[0]).split())


def test_figures_and_paper_come_from_the_json_alone(conducted, place):
    report.draw(place / "out")
    assert sorted(p.stem for p in (place / "out").glob("*.png")) == sorted(report.FIGURES)
    text = paper(json.loads((place / "out" / "study.json").read_text()), figures=".")
    assert text.count("**Table") == 6 and all(f"(./{name}.png)" in text for name in report.FIGURES)
    assert "underpowered" in text and "nan" not in text.lower().replace("nano", "")
    changed = json.loads(json.dumps(conducted[0]))
    part = changed["ablation"]["schedules"]["short warm-up"]["contrasts"]
    part["words"]["interaction"] = "antagonism"
    part["interaction"]["value"] = 0.4321
    assert "antagonism" in paper(changed) and "+43.21 %" in paper(changed)


def test_the_exact_cache_changes_no_outcome(place):
    run = runs.Run(
        (1, 2, 16),
        Objective(uncertainty=True, calibration=True),
        replace(Schedule(4), batch_size=8),
    )
    material = runs.Material(str(place / "teacher"), str(place / "data"))
    with threads(1):
        cached, live = (
            runs.Bench(replace(material, cache=cache)).outcome(run) for cache in (True, False)
        )
    assert cached == live


def test_two_processes_make_the_runs_of_one(place, tmp_path):
    material = runs.Material(str(place / "teacher"), str(place / "data"))
    plan = [runs.Run((1, 2, 16), Objective(), Schedule(2, 8, seed=seed)) for seed in range(3)]
    bench = runs.Bench(material)
    with threads(1):  # as a worker has; with more, sums are taken in another order
        one, two = (runs.make(plan, material, tmp_path / str(n), n, bench) for n in (1, 2))
    assert one == two


def test_a_run_is_known_by_everything_that_changes_it(place):
    run = runs.Run((1, 2, 16), Objective(), Schedule(4))
    material = runs.Material(str(place / "teacher"), str(place / "data"))
    own = runs.request(run, material)
    for other in (
        runs.request(replace(run, objective=Objective(3.0)), material),
        runs.request(replace(run, schedule=Schedule(4, seed=1)), material),
        runs.request(run, replace(material, data=str(place))),
    ):
        assert other != own
    assert runs.request(run, replace(material, cache=False, device="cuda")) == own


def test_other_proteins_under_the_same_name_are_other_runs(place, tmp_path):
    """A study on a file that was replaced made no run anew and reported those of the old file."""
    run, found = runs.Run((1, 2, 16), Objective(), Schedule(4)), []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        fasta = write_toy_fasta(tmp_path / str(seed) / "toy.fasta", 8, seed)
        data = prepare(fasta, tmp_path / str(seed) / "data")
        material = runs.Material(str(place / "teacher"), str(data))
        found.append(runs.request(run, material))
    assert found[0] != found[1]
