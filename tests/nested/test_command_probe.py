"""`nested probe`, end to end on synthetic assays; its figure is a function of its record."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.tables_nested import documentation
from distil_rank.core.errors import InputError
from distil_rank.core.resume import Cache
from distil_rank.nested import command_probe as probe
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.features import raw_features, representations
from distil_rank.nested.report import draw
from distil_rank.nested.rows import joint_moments
from distil_rank.nested.sources import chain_models
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.esm2 import tokenise
from distil_rank.proteins.variants import read_assays
from tests.nested.data import family, write_locations, write_residues
from tests.proteins.test_variants import WILD_TYPE, synthetic, write_assay


@pytest.fixture(scope="module")
def probed(folder, tmp_path_factory):
    """A probe of three synthetic assays, and of tasks that the letters decide."""
    out = tmp_path_factory.mktemp("probe")
    for i in range(3):
        write_assay(out / "dms", f"TOY{i}", synthetic(i, 4))
    tasks = {"locations": write_locations(out), "residues": (write_residues(out),)}
    chain = folder / "chain"
    run = probe.Config(out / "dms", chain, out / "results", mutants=30, max_proteins=60, **tasks)
    probe.run(run)
    return run


def summary(run):
    return json.loads((run.out / "nested_summary.json").read_text())


def test_record(probed):
    record = summary(probed)
    names = {r["name"] for r in record["representations"]}
    expected = {"one-hot", "raw_a", "raw_b", "raw_c", "concatenation", "nested-pcr_a"}
    expected |= {"nested-pcr_c", "nested-ols_c", "naive-pca_dim32", "random-completion_c"}
    assert expected <= names and record["assays"] == ["TOY0", "TOY1", "TOY2"]
    assert [a["used"] for a in record["data"]["assays"]] == [30] * 3
    for pool in ("mean", "site"):
        assert set(record["spearman"][pool]) == names
        by_assay = record["spearman_by_assay"][pool]
        for name, cell in record["spearman"][pool].items():
            value = cell["mean"]["value"]
            assert value == pytest.approx(sum(by_assay[name]) / 3)
            assert value == pytest.approx(sum(cell[s]["value"] for s in record["schemes"]) / 3)
        assert by_assay["nested-pcr_a"] == by_assay["raw_a"]  # the first prefix is the small model
    against = ("raw_c", "naive-pca_dim32", "random-completion_c")
    tested = [(r["ours"], r["theirs"]) for r in record["comparisons"] if "holm_p" in r]
    assert tested == [(f"{p}/nested-pcr_c", f"{p}/{n}") for p in ("mean", "site") for n in against]
    described = {r["theirs"] for r in record["comparisons"] if "holm_p" not in r}
    assert described >= {"mean/raw_b", "site/nested-ols_c", "site/one-hot"}
    location, structure = record["tasks"]["location"], record["tasks"]["toy"]
    assert location["classes"] == ["Cell.membrane", "Nucleus"] and structure["classes"] == [
        "E",
        "H",
    ]
    assert location["results"]["composition"]["accuracy"]["value"] > 0.9
    assert structure["results"]["one-hot"]["macro_f1"]["value"] > 0.9
    assert {r["name"] for r in record["representations"]} - {"one-hot"} <= set(location["results"])
    assert record["environment"]["torch"] == torch.__version__


def test_second_run_reads_what_was_kept_and_agrees(probed, monkeypatch):
    first, picture = summary(probed), (probed.out / "nested_report.png").read_bytes()
    for name in ("command_probe.score_assay", "features.pooled"):  # nothing is done again
        monkeypatch.setattr(f"distil_rank.nested.{name}", lambda *_: pytest.fail("again"))
    monkeypatch.setattr(
        "distil_rank.proteins.command_embed.embed", lambda *_, **__: pytest.fail("again")
    )
    probe.run(probed)
    assert summary(probed) == first
    assert (probed.out / "nested_report.png").read_bytes() == picture


def test_tables_and_figure_show_the_record_with_and_without_tasks(probed, tmp_path):
    record = summary(probed)
    text = documentation(record)
    assert f"{record['spearman']['site']['concatenation']['mean']['value']:.3f}" in text
    for row in record["comparisons"]:
        assert f"{row['difference']['value']:+.3f}" in text
        assert row["theirs"].partition("/")[2] in text
    words = ("cannot be told apart from", "is better than", "is worse than")
    assert sum(map(text.count, words)) == 6 and "Toy, 2 classes" in text
    del record["tasks"]
    record["chain"]["held_out_r2"] = {}  # as after --held-out 0
    cell = {"mean": 0.25, "Binding": 0.125, "random": 0.5}
    record["leaderboard"] = {"site": {"one-hot": cell}}  # as with the reference file
    assert "0.125" in documentation(record)
    (tmp_path / "nested_summary.json").write_text(json.dumps(record))
    assert draw(tmp_path).stat().st_size > 50_000 and len(list(tmp_path.iterdir())) == 2


def test_features_stand_at_the_mutated_position(folder, probed, tmp_path):
    assay = read_assays(probed.dms, 20)[0]
    loaders = list(chain_models(NestedChain.load(folder / "chain")).values())
    raws = raw_features("x", assay.sequences, assay.positions, loaders, Cache(tmp_path))
    assert set(raws["mean"]) == set(raws["site"]) == {"a", "b", "c"}
    with torch.no_grad():
        (alone,) = load_model(str(folder / "b.pt")).model(tokenise([assay.sequences[3]])).hidden
    site = alone[0, 1 + assay.positions[3][0]]
    torch.testing.assert_close(raws["mean"]["b"][3], alone[0, 1:-1].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raws["site"]["b"][3], site, rtol=1e-4, atol=1e-5)


def test_baselines_are_what_they_are_called():
    raws = family(400, (6, 10, 17))
    moments, _ = joint_moments(raws, 0)
    chain = NestedChain.fit(raws, "pcr", held_out=0)
    found = {r.name: r for r in representations(chain, moments)}
    everything = torch.cat(list(raws.values()), 1)
    for r in found.values():
        assert r.features(raws).shape == (400, r.dim), r.name
    assert torch.equal(found["concatenation"].features(raws), everything)
    assert torch.equal(found["nested-pcr_b"].features(raws), chain.embed(raws, 10))
    ols = NestedChain.fit(raws, "ols", held_out=0).embed(raws)
    assert torch.equal(found["nested-ols_c"].features(raws), ols)
    for upto, dim in enumerate((6, 8, 10, 13, 17)):  # no model beyond those that the chain needs
        some = torch.cat(list(raws.values())[: 1 + (upto + 1) // 2], 1)
        assert some.shape[1] == sum(chain.widths[size] for size in chain.sizes_for(dim))
        centered = some - some.mean(0)
        expected = centered @ torch.linalg.svd(centered, full_matrices=False)[2][:dim].T
        features = found[f"naive-pca_dim{dim}"].features(raws)
        torch.testing.assert_close(features.abs(), expected.abs(), rtol=1e-6, atol=1e-6)
    random = [found[f"random-completion_c#{i}"].features(raws) for i in range(3)]
    assert all(torch.equal(x[:, :6], raws["a"]) for x in random)
    assert not torch.equal(random[0], random[1])


def test_bad_input(probed, folder, tmp_path):
    run = replace(probed, out=tmp_path / "results")
    (tmp_path / "nowhere.fasta").write_text(f">a\n{WILD_TYPE}\n")
    for changes, message in [
        ({"dms": tmp_path / "absent"}, "at least one assay"),
        ({"mutants": -5}, "--mutants must be at least 1"),  # not all but five
        ({"max_proteins": -5}, "--max-proteins must be at least 1"),
        ({"chain": tmp_path}, "of a nested chain required"),
        ({"models": (str(folder / "a.pt"),)}, "models for a, b, c required, got none for b, c"),
        ({"locations": probed.locations[:1]}, "two FASTA files"),
        ({"locations": (tmp_path / "nowhere.fasta",) * 2}, "a location as second word"),
        ({"locations": probed.locations[:1] * 2}, "in no other part required, got 60 in location"),
        ({"residues": (tmp_path / "nowhere.fasta",)}, "a file NAME_sampled.fasta"),
        ({"residues": probed.residues * 2}, "tasks of different names required, got location, toy"),
    ]:
        with pytest.raises(InputError, match=message):
            probe.run(replace(run, **changes))
    assert not (tmp_path / "results").exists()
