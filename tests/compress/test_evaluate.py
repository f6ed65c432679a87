"""Evaluation against the obvious loops, exact resumption, mutation scores."""

import math

import pytest
import scipy.stats
import torch

from distil_rank.compress import recover as recovery
from distil_rank.compress.architectures import describe
from distil_rank.compress.evaluate import compare, mutation_effects
from distil_rank.compress.models import compress_model
from distil_rank.core.resume import Checkpoint
from distil_rank.proteins.esm2 import MASK, tokenise
from distil_rank.proteins.variants import read_assays
from tests.compress.small_models import (
    CLASSIFIERS,
    KINDS,
    compressed,
    small_model,
    thin,
    token_batches,
)


@pytest.mark.parametrize("kind", [*KINDS, *CLASSIFIERS])
def test_a_model_compared_with_itself_has_no_loss(kind):
    model, batches, _ = compressed(kind)
    architecture = describe(model)
    record = compare(architecture, model, model, batches)
    assert record["hidden_fvu"]["value"] == 0
    if architecture.task != "hidden":
        assert record["logits_kl"]["value"] == 0
        assert record.get("perplexity_ratio", {"value": 1})["value"] == 1


def test_pseudo_perplexity_masks_every_residue_once():
    model, batches, small = compressed("esm2")
    architecture = describe(model)
    passes = 3
    total, divergence, count = 0.0, 0.0, 0
    for tokens in batches:
        for row in tokens:
            places = [i for i, t in enumerate(row.tolist()) if t not in (0, 1, 2)]
            for turn in range(passes):
                masked = row.clone()
                chosen = [p for k, p in enumerate(places) if k % passes == turn]
                masked[chosen] = MASK
                with torch.no_grad():
                    a, b = (
                        m(masked[None]).logits[0].log_softmax(-1).double() for m in (model, small)
                    )
                for p in chosen:
                    total -= float(b[p, row[p]])
                    divergence += float((a[p].exp() * (a[p] - b[p])).sum())
                    count += 1
    record = compare(architecture, model, small, batches, passes=passes)
    assert record["predictions"] == record["residues"] == count
    assert record["perplexity_after"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert record["logits_kl"]["value"] == pytest.approx(divergence / count, rel=1e-3)
    ratio = record["perplexity_ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["value"] == pytest.approx(
        record["perplexity_after"]["value"] / record["perplexity_before"]["value"]
    )


def test_causal_perplexity_counts_real_next_tokens():
    model, batches, small = compressed("GPT2LMHeadModel")
    architecture = describe(model)
    total, count = 0.0, 0
    for batch in batches:
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"]):
            row = tokens[mask.bool()]
            with torch.no_grad():
                logs = small(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logs.gather(1, row[1:, None]).sum())
            count += len(row) - 1
    record = compare(architecture, model, small, batches)
    assert record["predictions"] == count
    assert record["perplexity_after"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_is_judged_by_its_own_likelihood(kind, problem):
    """KL of its class probabilities; of independent labels the sum of theirs; of numbers FVU."""
    model, other = (small_model(kind, seed=seed) for seed in (0, 1))
    for m in (model, other):
        m.config.problem_type = problem
    architecture, batches = describe(model), token_batches(model)
    pairs = []
    for batch in batches:
        with torch.no_grad():
            logits = [m(**batch).logits for m in (model, other)]
        if kind == "EsmForTokenClassification":
            logits = [y[architecture.residues(batch)] for y in logits]
        pairs.append(torch.stack(logits).double())
    p, q = torch.cat(pairs, 1)
    record = compare(architecture, model, other, batches)
    assert "perplexity_after" not in record
    if problem == "regression":
        expected = (p - q).square().sum() / (p - p.mean(0)).square().sum()
        assert record["output_fvu"]["value"] == pytest.approx(float(expected), rel=1e-5)
        return
    if problem is None:
        divergence = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
        )
    else:
        pairs = ([x.sigmoid(), (-x).sigmoid()] for x in (p, q))
        divergence = sum(a * (a / b).log() for a, b in zip(*pairs))
    assert record["predictions"] == len(p)
    assert record["logits_kl"]["value"] == pytest.approx(float(divergence.sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["EsmModel", "esm2"])
def test_hidden_fvu_is_over_residues(kind):
    model, batches, small = compressed(kind)
    architecture = describe(model)
    with torch.no_grad():
        before, after = (
            torch.cat(
                [architecture.read(m, b)[0][architecture.residues(b)] for b in batches]
            ).double()
            for m in (model, small)
        )
    fvu = float((after - before).square().sum() / (before - before.mean(0)).square().sum())
    assert compare(architecture, model, small, batches)["hidden_fvu"]["value"] == pytest.approx(
        fvu, rel=1e-6
    )


@pytest.mark.parametrize("kind", ["esm2", "EsmModel", "GPT2LMHeadModel", *CLASSIFIERS])
def test_recovery_lowers_the_loss_and_touches_factors_only(kind):
    model, batches, _ = compressed(kind)
    architecture = describe(model)
    small, _ = compress_model(model, batches, ratio=0.5, loss=None)
    key = "logits_kl" if architecture.task != "hidden" else "hidden_fvu"
    before = compare(architecture, model, small, batches)[key]["value"]
    better, losses = recovery.recover(architecture, model, small, batches, steps=40)
    assert len(losses) == 40
    assert compare(architecture, model, better, batches)[key]["value"] < before
    changed = {
        k
        for (k, a), b in zip(small.state_dict().items(), better.state_dict().values())
        if not torch.equal(a, b)
    }
    assert changed and all(".A.weight" in k or ".B." in k for k in changed)


def test_recovery_never_ends_worse_than_it_began():
    model = thin(small_model("esm2"))
    architecture, batches = describe(model), token_batches(model)
    exact, _ = compress_model(model, batches, ranks=4)
    kept, losses = recovery.recover(architecture, model, exact, batches, steps=3, learning_rate=0.1)
    assert max(losses) > losses[0]
    assert all(
        torch.equal(a, b) for a, b in zip(exact.state_dict().values(), kept.state_dict().values())
    )


def test_recovery_resumes_exactly(tmp_path, monkeypatch):
    model, batches, small = compressed("esm2")
    architecture = describe(model)
    whole, losses = recovery.recover(architecture, model, small, batches, steps=12)
    monkeypatch.setattr(recovery, "SAVE_EVERY", 5)
    saved = Checkpoint(tmp_path / "state.pt", "this request")
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*arguments)

    original = recovery._loss
    monkeypatch.setattr(recovery, "_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        recovery.recover(architecture, model, small, batches, steps=12, checkpoint=saved)
    monkeypatch.setattr(recovery, "_loss", original)
    assert saved.path.is_file()
    resumed, again = recovery.recover(
        architecture, model, small, batches, steps=12, checkpoint=saved
    )
    assert again == losses and not saved.path.exists()
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values())
    )


@pytest.mark.parametrize("kind", ["esm2", "EsmForMaskedLM"])
def test_mutation_effects_mask_one_position_at_a_time(kind, tmp_path):
    model, _, small = compressed(kind)
    architecture = describe(model)
    sequence, letters = "MKTAYIAKQR", {"W": 22, "C": 23}  # ids of ESM-2's alphabet
    (tmp_path / "assay.fasta").write_text(f">wild\n{sequence}\n")
    mutants = [f"{old}{i + 1}{new}" for i, old in enumerate(sequence) for new in letters]
    rows = [f"{m},{i * i % 7}\n" for i, m in enumerate(mutants)]
    (tmp_path / "assay.csv").write_text("mutant,score\n" + "".join(rows))
    found = mutation_effects(architecture, model, small, read_assays(tmp_path))["assays"]["assay"]
    predicted = []
    for mutant in mutants:
        tokens = tokenise([sequence])
        place = int(mutant[1:-1])
        old = int(tokens[0, place])
        tokens[0, place] = MASK
        with torch.no_grad():
            logs = architecture.read(model, architecture.batch(tokens))[1][0, place].log_softmax(-1)
        predicted.append(float(logs[letters[mutant[-1]]] - logs[old]))
    expected = scipy.stats.spearmanr(predicted, [i * i % 7 for i in range(len(mutants))])
    assert found["before"] == pytest.approx(expected.statistic)
    assert found["mutants"] == len(mutants)
