"""Evaluation: sums equal the explicit ones, bits per residue do not know the tokenisation, commands refuse bad
input."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from distil_rank.__main__ import main
from distil_rank.core.errors import InputError
from distil_rank.generators import evaluate, generate, scores, structure
from distil_rank.generators.data import Encoded, amino_acid_tokenizer, bpe_tokenizer, encode
from distil_rank.generators.evaluate import Bed, compare, verdict
from distil_rank.generators.models import fresh, load, parameters, save, weights_sha256
from distil_rank.generators.teachers import Live
from distil_rank.proteins.fasta import read_fasta
from tests.generators.conftest import toy_sequences, write_toy_fasta


def test_nll_and_divergence_equal_the_explicit_sums(teacher, proteins):
    student = fresh(27, 2, 2, 16, 128, 0, 3).eval()
    found = scores.score(student, proteins, Live(teacher), batch_size=7)
    for i in (0, 11, 39):
        ids = torch.from_numpy(proteins.tokens[proteins.offsets[i] : proteins.offsets[i + 1]]).long()
        with torch.no_grad():
            log_q, log_p = (m(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (student, teacher))
        nll = -sum(float(log_q[t, ids[t + 1]]) for t in range(len(ids) - 1))
        assert found.nll[i] == pytest.approx(nll, rel=1e-6)
        assert found.kl[i] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-4)
    assert scores.perplexity(found)["value"] == pytest.approx(math.exp(found.nll.sum() / found.predictions.sum()))
    ratio = scores.perplexity_ratio(found, found)
    assert ratio["value"] == ratio["low"] == ratio["high"] == 1


def test_bits_per_residue_do_not_depend_on_the_tokenisation():
    """A Markov chain over residues written out as one token per residue, and as one token per pair of residues."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.ones(20), 20)
    sequences = [rng.integers(20, size=2 * rng.integers(10, 40)) for _ in range(50)]
    single = [-math.log(1 / 20) - sum(math.log(chain[a, b]) for a, b in pairwise(s)) for s in sequences]

    def pair_nll(s):  # P(pair | previous pair) = P(a | last) P(b | a)
        total, last = 0.0, None
        for a, b in s.reshape(-1, 2):
            total -= math.log((1 / 20 if last is None else chain[last, a]) * chain[a, b])
            last = b
        return total

    empty = np.empty(0)

    def bits(nll, tokens):
        n = np.array([len(s) for s in sequences], float)
        return scores.bits_per_residue(
            scores.Scores(np.array(nll), tokens, n, None, empty, empty, empty, empty, empty.astype(int))
        )["value"]

    lengths = np.array([len(s) for s in sequences], float)
    a, b = bits(single, lengths), bits([pair_nll(s) for s in sequences], lengths / 2)
    assert a == pytest.approx(b, abs=1e-3) and a == pytest.approx(sum(single) / lengths.sum() / math.log(2))


def test_temperature_scaling_control_repairs_a_model_whose_temperature_is_wrong(tokenizer):
    frequencies = np.array([8, 4, 2, 1, 1]) / 16
    rng = np.random.default_rng(0)
    skewed = encode(["".join(rng.choice(list("ACDEF"), 40, p=frequencies)) for _ in range(80)], tokenizer, 64)
    sharpened = np.full(27, -20.0)
    predicted = np.bincount(np.delete(skewed.tokens, skewed.offsets[:-1]), minlength=27)
    sharpened[predicted > 0] = 1.5 * np.log(predicted[predicted > 0] / predicted.sum())

    class Known(torch.nn.Module):
        """The right frequencies to the power 1.5: overconfident."""

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(sharpened, dtype=torch.float32))

        def forward(self, input_ids, use_cache=False):
            return type("Out", (), {"logits": self.logits.expand(*input_ids.shape, 27)})

    model = Known()
    found = scores.calibration_with_control(model, skewed, scores.score(model, skewed))
    assert found["fitted_temperature"] == pytest.approx(1.5, rel=0.1)
    gaps = [abs(found[name]["signed_gap"]["value"]) for name in ("temperature_scaled", "as_is_other_half")]
    assert gaps[0] < 0.5 * gaps[1]


def test_verdict_words_follow_the_numbers():
    def words(value, size=None):
        return verdict({"value": value, "low": value - 0.1, "high": value + 0.1}, size)

    assert [words(v)["word"] for v in (1.2, 1.7, 2.5)] == ["excellent", "good", "poor"]
    assert words(2.9, "tiny")["met"] and not words(2.9, "tiny")["certain"]
    missed = words(2.6, "small")
    assert not missed["met"] and missed["certain"] and missed["try_train_size_prop"] == [0.2, 0.5]
    assert words(1.0, "micro")["threshold"] is None


def test_plddt_counts_only_atoms_that_exist():
    plddt = torch.tensor([[[0.9, 0.8, 0.0], [0.5, 0.1, 0.3]]])
    exists = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    torch.testing.assert_close(structure.mean_plddt(plddt, exists), torch.tensor([(0.9 + 0.8 + 0.5) / 3]))


@pytest.fixture
def folders(tmp_path, teacher, tokenizer):
    save(teacher, tokenizer, tmp_path / "teacher")
    save(fresh(27, 2, 2, 16, 128, 0, 4), tokenizer, tmp_path / "student", torch.float16)
    return tmp_path


def test_models_come_back_as_saved(folders, teacher):
    again, tokenizer = load(str(folders / "teacher"))
    assert weights_sha256(again) == weights_sha256(teacher) and len(tokenizer) == 27
    total = sum(p.numel() for p in teacher.parameters())
    assert parameters(again) == {"total": total, "without_embeddings": total - (27 + 128) * 32}


def test_evaluate_writes_a_whole_record_and_calls_few_proteins_underpowered(folders):
    data = write_toy_fasta(folders / "toy.fasta", 30)
    evaluate.run(
        evaluate.Config(
            str(folders / "student"), str(folders / "teacher"), data, folders / "e.json", generate=6, max_length=30
        )
    )
    record = json.loads((folders / "e.json").read_text())
    assert record["underpowered"] and record["proteins"] == 30
    assert record["ratio"]["low"] <= record["ratio"]["value"] <= record["ratio"]["high"]
    assert record["compression"]["total"] > 1 and record["student"]["generation"]["n"] == 6
    assert "skipped" in record["student"]["generation"]["structure"]
    assert record["speed"]["models"]["student"]["8"]["tokens_per_second"] > 0


def test_evaluating_a_teacher_against_itself_finds_no_loss(teacher, tokenizer, proteins):
    sequences = toy_sequences(40)
    record = compare(teacher, teacher, Bed(tokenizer, proteins, sequences, sequences, generate=0), speed=False)
    assert record["ratio"]["value"] == 1 and record["kl_to_teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert record["verdict"]["word"] == "excellent"


def test_generate_resumes_and_its_batch_size_changes_nothing(folders, monkeypatch):
    def config(out, **more):
        return generate.Config(str(folders / "student"), folders / out, n=9, max_length=40, **more)

    generate.run(config("whole.fasta", batch_size=9))
    generate.run(config("single.fasta", batch_size=1))
    assert (folders / "whole.fasta").read_bytes() == (folders / "single.fasta").read_bytes()
    original = generate.draw

    def interrupted(*arguments):
        for count, drawn in enumerate(original(*arguments)):
            if count == 4:
                raise KeyboardInterrupt
            yield drawn

    monkeypatch.setattr(generate, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate.run(config("torn.fasta"))
    monkeypatch.setattr(generate, "draw", original)
    partial = folders / "torn.fasta.partial.jsonl"
    partial.write_text(partial.read_text()[:-5])  # as if killed while writing
    with pytest.raises(InputError, match="begun with"):
        generate.run(config("torn.fasta", seed=1))
    generate.run(config("torn.fasta", batch_size=2))
    assert (folders / "torn.fasta").read_bytes() == (folders / "whole.fasta").read_bytes() and not partial.exists()
    records = list(read_fasta(folders / "whole.fasta"))
    assert len(records) == 9 and all(
        "perplexity=" in r.header and f"length={len(r.sequence)}" in r.header for r in records
    )


def test_bad_input_of_the_commands_is_one_line_and_status_2(folders, capsys):
    data = write_toy_fasta(folders / "toy.fasta", 30)
    save(fresh(60, 1, 1, 8, 64, 0, 0), bpe_tokenizer(toy_sequences(20), 60), folders / "other")
    student, out = str(folders / "student"), str(folders / "x.json")
    given = ["generator", "evaluate", "--data", str(data), "--out", out]
    train = [
        "generator",
        "train",
        "--teacher",
        str(folders / "teacher"),
        "--data",
        str(data),
        "--out",
        str(folders / "m"),
    ]
    for arguments, message in [
        ([*given, "--student", student, "--teacher", str(folders / "other")], "one vocabulary"),
        ([*given, "--student", str(folders / "none"), "--teacher", student], "none"),
        ([*given, "--student", str(folders), "--teacher", student], "config.json"),
        ([*train, "--alpha", "1.5"], "alpha"),
        ([*train, "--temperature", "0"], "temperature"),
        ([*train, "--train-size-prop", "2"], "train-size-prop"),
        ([*train, "--n-embd", "30", "--n-head", "4"], "divisible"),
        ([*train[:-4], "--data", str(folders / "none.fasta"), "--out", str(folders / "m")], "none.fasta"),
        (["generator", "generate", "--model", student, "-n", "0", "--out", str(folders / "a.fasta")], "n must be"),
        (["generator", "generate", "--model", student, "--out", str(folders)], "file name"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert not (folders / "x.json").exists() and not (folders / "m").exists()


def test_train_distils_from_a_folder_and_records_it(folders):
    data = write_toy_fasta(folders / "toy.fasta", 40)
    main(
        ["generator", "train", "--teacher", str(folders / "teacher"), "--data", str(data), "--out", str(folders / "m"),
         "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--steps", "4", "--batch-size", "8", "--uncertainty",
         "--init", "low-rank", "--teacher-cache", "exact"]
    )  # fmt: skip
    record = json.loads((folders / "m" / "training.json").read_text())
    model, _ = load(str(folders / "m"))
    assert record["weights_sha256"] == weights_sha256(model) and record["objective"]["uncertainty"] is True
    assert record["teacher"]["weights_sha256"] == weights_sha256(load(str(folders / "teacher"))[0])


def test_fine_tuning_on_a_toy_family_learns_to_end(tmp_path):
    rng = np.random.default_rng(0)
    parent = "MKTAYIAKQRQISFVKSHFSRQ"
    family = ["".join(rng.choice(list("ACDEFGHIKL")) if rng.random() < 0.1 else a for a in parent) for _ in range(60)]
    (tmp_path / "family.fasta").write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(family)))
    tokenizer = amino_acid_tokenizer()
    save(fresh(27, 2, 2, 32, 64, 0, 0), tokenizer, tmp_path / "start")
    main(
        ["generator", "finetune", "--model", str(tmp_path / "start"), "--data", str(tmp_path / "family.fasta"),
         "--out", str(tmp_path / "tuned"), "--identity", "1.0", "--steps", "120", "--learning-rate", "1e-2",
         "--batch-size", "16"]
    )  # fmt: skip
    main(
        [
            "generator",
            "generate",
            "--model",
            str(tmp_path / "tuned"),
            "-n",
            "60",
            "--max-length",
            "64",
            "--out",
            str(tmp_path / "new.fasta"),
        ]
    )
    headers = [p.header for p in read_fasta(tmp_path / "new.fasta")]
    assert sum("ended=yes" in h for h in headers) >= 0.95 * 60


def test_encoded_of_nothing_is_empty():
    assert len(Encoded(np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int64), 0)) == 0
