"""Evaluation: sums equal the explicit ones, the test part is the stored one, commands refuse."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distil_rank.__main__ import main
from distil_rank.core.errors import InputError
from distil_rank.generators import command_evaluate, command_generate, metrics, sample
from distil_rank.generators.data import amino_acid_tokenizer
from distil_rank.generators.models import fresh, load, parameters, save, weights_sha256
from distil_rank.generators.prepared import Prepared
from distil_rank.generators.teachers import Live
from distil_rank.proteins.fasta import read_fasta
from tests.generators.conftest import prepare, write_fasta
from tests.toys import mutated


def test_nll_and_divergence_equal_the_explicit_sums(teacher, proteins):
    student = fresh(27, 2, 2, 16, 128, 0, 3).eval()
    found = metrics.score(student, proteins, Live(teacher))
    for i in (0, 11, 39):
        ids = torch.from_numpy(proteins.row(i))
        with torch.no_grad():
            logits = [m(input_ids=ids[None]).logits[0, :-1].double() for m in (student, teacher)]
        log_q, log_p = (z.log_softmax(-1) for z in logits)
        nll = -sum(float(log_q[t, ids[t + 1]]) for t in range(len(ids) - 1))
        assert found.nll[i] == pytest.approx(nll, rel=1e-6)
        kl = float((log_p.exp() * (log_p - log_q)).sum())
        assert found.kl[i] == pytest.approx(kl, rel=1e-4)
    wanted = math.exp(found.nll.sum() / found.predictions.sum())
    assert metrics.perplexity(found)["value"] == pytest.approx(wanted)
    ratio = metrics.perplexity_ratio(found, found)
    assert ratio["value"] == ratio["low"] == ratio["high"] == 1


def test_bits_per_residue_do_not_depend_on_the_tokenization():
    """The same probability written as a token a residue, or a token a pair."""
    rng = np.random.default_rng(0)
    lengths, none = 2.0 * rng.integers(10, 40, 50), (None, *[np.empty(0)] * 3)
    nll = lengths * rng.uniform(2, 3, 50)
    found = [metrics.Scores(nll, lengths / k, lengths, *none) for k in (1, 2)]
    a, b = map(metrics.bits_per_residue, found)
    assert a == b and a["value"] == pytest.approx(nll.sum() / lengths.sum() / math.log(2))
    perplexities = [metrics.perplexity(scores)["value"] for scores in found]
    assert perplexities[1] == pytest.approx(perplexities[0] ** 2)


@pytest.fixture
def folders(tmp_path, data, teacher, tokenizer):
    """Data, a teacher and a student."""
    (tmp_path / "data").symlink_to(data)
    save(teacher, tokenizer, tmp_path / "teacher")
    save(fresh(27, 2, 2, 16, 128, 0, 4), tokenizer, tmp_path / "student", torch.float16)
    return tmp_path


def evaluation(folders, **more):
    pair = {name: str(folders / name) for name in ("student", "teacher")}
    given = pair | {"data": folders / "data", "out": folders / "e.json", "device": "cpu"}
    command_evaluate.run(command_evaluate.Config(**(given | {"generate": 0} | more)))
    return json.loads((folders / "e.json").read_text())


def test_models_come_back_as_saved(folders, teacher):
    again, tokenizer = load(str(folders / "teacher"))
    assert weights_sha256(again) == weights_sha256(teacher) and len(tokenizer) == 27
    total = sum(p.numel() for p in teacher.parameters())
    assert parameters(again) == {"total": total, "without_embeddings": total - (27 + 128) * 32}


def test_evaluate_writes_a_whole_record_and_calls_few_proteins_underpowered(folders, data):
    record = evaluation(folders, generate=6, family_fasta=data.with_name("toy.fasta"))
    assert record["underpowered"] and record["proteins"] == 80
    assert record["ratio"]["low"] <= record["ratio"]["value"] <= record["ratio"]["high"]
    assert record["compression"]["total"] > 1 and record["student"]["generation"]["n"] == 6
    assert 0 <= record["student"]["generation"]["family"]["natural"]["value"] <= 1
    assert record["speed"]["models"]["student"]["8"]["tokens_per_second"] > 0


def test_a_model_without_some_of_its_weights_is_refused(folders):
    path = folders / "student" / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.0.mlp.c_fc.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"all weights .* without transformer\.h\.0\.mlp"):
        load(str(folders / "student"))


def test_the_test_part_is_only_measured_where_the_training_left_it_out(folders, data, capsys):
    prepared = Prepared(data)
    with pytest.raises(InputError, match="no record of its training"):
        evaluation(folders, part="test")
    with pytest.raises(InputError, match="a file to write required"):
        evaluation(folders, out=folders)
    record = {"data": prepared.summary()}
    (folders / "student" / "training.json").write_text(json.dumps(record))
    found = evaluation(folders, part="test", seed=1, generate=3)
    assert found["proteins"] == len(prepared.part("test")) == found["data"]["n_test"]
    assert found["left_out"] == {"student": True, "teacher": False}
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and "teacher has no record of its training" in said
    prepare(data.with_name("toy.fasta"), folders / "other", seed=1)
    with pytest.raises(InputError, match="other test proteins"):
        evaluation(folders, part="test", data=folders / "other")
    assert evaluation(folders)["left_out"] == {"student": False, "teacher": False}
    assert "--part all" in capsys.readouterr().err


def test_generate_resumes_and_its_batch_size_changes_nothing(folders, monkeypatch):
    def generate(out, **more):
        given = {"n": 9, "max_new_tokens": 39, "dtype": "float64", "device": "cpu"} | more
        model = str(folders / "student")
        command_generate.run(command_generate.Config(model=model, out=folders / out, **given))
        return (folders / out).read_bytes()

    whole = generate("whole.fasta", batch_size=9)
    original = command_generate.draw

    def interrupted(*arguments):
        for count, drawn in enumerate(original(*arguments)):
            if count == 5:
                raise KeyboardInterrupt
            yield drawn

    monkeypatch.setattr(command_generate, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate("torn.fasta", batch_size=2)
    started = []
    noted = lambda *a: started.append(a[2].start) or original(*a)  # noqa: E731
    monkeypatch.setattr(command_generate, "draw", noted)
    with pytest.raises(InputError, match="of another"):
        generate("torn.fasta", batch_size=2, seed=1)
    assert generate("torn.fasta", batch_size=2) == whole and started == [4]
    assert not list(folders.glob("torn.fasta.*"))
    records = list(read_fasta(folders / "whole.fasta"))
    assert len(records) == 9
    assert all(f"length={len(r.sequence)} perplexity=" in r.header for r in records)


def test_empty_proteins_are_left_out_and_said(folders, monkeypatch, capsys):
    drawn = [sample.Drawn(i, "MK" * (i % 2), True, 9.0, 2) for i in range(4)]
    monkeypatch.setattr(command_generate, "draw", lambda *_: drawn)
    given = {"model": str(folders / "student"), "max_new_tokens": 9, "device": "cpu"}
    command_generate.run(command_generate.Config(**given, out=folders / "a.fasta", n=4))
    assert [p.sequence for p in read_fasta(folders / "a.fasta")] == ["MK", "MK"]
    assert "2 empty" in capsys.readouterr().err
    monkeypatch.setattr(command_generate, "draw", lambda *_: drawn[::2])
    with pytest.raises(InputError, match="a model that writes proteins"):
        command_generate.run(command_generate.Config(**given, out=folders / "b.fasta", n=2))


def test_bad_input_of_the_commands_is_one_line_and_status_2(folders, capsys):
    more = amino_acid_tokenizer()
    more.add_tokens(["MK"])
    save(fresh(60, 1, 1, 8, 128, 0, 0), more, folders / "other")
    student, teacher = (str(folders / name) for name in ("student", "teacher"))
    evaluate = f"evaluate --data {folders}/data --out {folders}/x.json"
    generate = f"generate --model {student} --out"
    for arguments, message in [
        (f"{evaluate} --student {student} --teacher {folders}/other", "one vocabulary"),
        (f"{evaluate} --student {folders}/none --teacher {student}", "none"),
        (f"{evaluate} --student {folders} --teacher {student}", "no file named model.safetensors"),
        (f"{evaluate} --student {student} --teacher {teacher} --generate -1", "--generate"),
        (f"{evaluate} --student {student} --teacher {teacher} --generate 0 --esmfold x", "above 0"),
        (f"{evaluate} --student {student} --teacher {teacher} --device gpu", "--device"),
        (f"{generate} {folders}/a.fasta -n 0", "--n must be"),
        (f"{generate} {folders}/a.fasta --batch-size 0", "--batch-size"),
        (f"{generate} {folders}", "file name"),
        (f"{evaluate} --student {student} --teacher {teacher} --data {folders}", "data.json"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["generator", *arguments.split()])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert not (folders / "x.json").exists()


def test_fine_tuning_on_a_family_works_out_of_the_box_and_learns_to_end(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    family = [mutated("MKTAYIAKQRQISFVKSHFSRQ", 0.2, rng) for _ in range(60)]
    write_fasta(tmp_path / "family.fasta", family)
    save(fresh(27, 2, 2, 32, 64, 0, 0), tokenizer, tmp_path / "start")
    given = f"--tokenizer {tmp_path}/start --context 64 --out {tmp_path}/data"
    main(f"generator prepare {tmp_path}/family.fasta {given}".split())
    flags = "--steps 120 --learning-rate 1e-2 --batch-size 16 --device cpu"
    given = f"--model {tmp_path}/start --data {tmp_path}/data --out {tmp_path}/tuned"
    main(f"generator finetune {given} {flags}".split())
    out = tmp_path / "new.fasta"
    flags = f"-n 60 --max-new-tokens 60 --prompt MK --top-p 0.95 --device cpu --out {out}"
    main(f"generator generate --model {tmp_path}/tuned {flags}".split())
    assert sum("ended=yes" in p.header for p in read_fasta(out)) >= 0.95 * 60
    assert all(p.sequence.startswith("MK") for p in read_fasta(out))
