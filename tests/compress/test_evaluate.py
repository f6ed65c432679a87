"""Evaluation against the obvious loops, recovery that resumes exactly, mutation scores, architectures."""

import math

import pytest
import scipy.stats
import torch

from distil_rank.core.errors import InputError
from distil_rank.compress import recovery
from distil_rank.compress.architectures import AMINO_ACIDS, MASK, describe
from distil_rank.compress.dense_models import load_dense
from distil_rank.compress.evaluate import compare, cost, mutation_effects, mutation_scores, perplexity, read_assays
from distil_rank.compress.models import compress_model
from distil_rank.compress.quantise import module_bytes
from tests.compress.small_models import KINDS, output, small_model, token_batches


def pair(kind: str):
    model = small_model(kind)
    batches = token_batches(model)
    return describe(model), model, compress_model(model, batches, ratio=0.5)[0], batches


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_compared_with_itself_has_no_loss(kind):
    architecture, model, _, batches = pair(kind)
    record = compare(architecture, model, model, batches)
    assert record["hidden_fvu"]["value"] == 0
    if architecture.has_logits:
        assert record["logits_kl"]["value"] == 0 and record["perplexity_ratio"]["value"] == 1


def test_pseudo_perplexity_masks_every_residue_once():
    architecture, model, small, batches = pair("fair-esm")
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
                    a, b = (m(masked[None])["logits"][0].log_softmax(-1).double() for m in (model, small))
                for p in chosen:
                    total -= float(b[p, row[p]])
                    divergence += float((a[p].exp() * (a[p] - b[p])).sum())
                    count += 1
    record = compare(architecture, model, small, batches, passes=passes)
    assert record["tokens"] == record["residues"] == count
    assert record["perplexity_after"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert record["logits_kl"]["value"] == pytest.approx(divergence / count, rel=1e-3)
    assert perplexity(architecture, small, batches, passes) == pytest.approx(
        record["perplexity_after"]["value"], rel=1e-6
    )
    ratio = record["perplexity_ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["value"] == pytest.approx(record["perplexity_after"]["value"] / record["perplexity_before"]["value"])


def test_causal_perplexity_counts_real_next_tokens():
    architecture, model, small, batches = pair("GPT2LMHeadModel")
    total, count = 0.0, 0
    for batch in batches:
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"]):
            row = tokens[mask.bool()]
            with torch.no_grad():
                logs = small(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logs.gather(1, row[1:, None]).sum())
            count += len(row) - 1
    record = compare(architecture, model, small, batches)
    assert record["tokens"] == count
    assert record["perplexity_after"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("kind", ["EsmModel", "fair-esm"])
def test_hidden_fvu_is_over_residues(kind):
    architecture, model, small, batches = pair(kind)
    with torch.no_grad():
        before, after = (
            torch.cat([architecture.hidden(m, b)[architecture.residues(m, b)] for b in batches]).double()
            for m in (model, small)
        )
    fvu = float((after - before).square().sum() / (before - before.mean(0)).square().sum())
    assert compare(architecture, model, small, batches)["hidden_fvu"]["value"] == pytest.approx(fvu, rel=1e-6)


@pytest.mark.parametrize("kind", ["fair-esm", "EsmModel", "GPT2LMHeadModel"])
def test_recovery_lowers_the_loss_and_touches_factors_only(kind):
    architecture, model, small, batches = pair(kind)
    key = "logits_kl" if architecture.has_logits else "hidden_fvu"
    before = compare(architecture, model, small, batches)[key]["value"]
    better, losses = recovery.recover(architecture, model, small, batches, steps=80)
    assert len(losses) == 80
    assert compare(architecture, model, better, batches)[key]["value"] < before
    changed = {
        k for (k, a), b in zip(small.state_dict().items(), better.state_dict().values()) if not torch.equal(a, b)
    }
    assert changed and all(".A.weight" in k or ".B." in k for k in changed)


def test_recovery_never_ends_worse_than_it_began():
    architecture, model, _, batches = pair("fair-esm")
    exact, _ = compress_model(model, batches, ranks=1000, never_slower=False)
    kept, losses = recovery.recover(architecture, model, exact, batches, steps=3, lr=0.1)
    assert max(losses) > losses[0]
    assert all(torch.equal(a, b) for a, b in zip(exact.state_dict().values(), kept.state_dict().values()))


def test_recovery_resumes_exactly(tmp_path, monkeypatch):
    architecture, model, small, batches = pair("fair-esm")
    whole, losses = recovery.recover(architecture, model, small, batches, steps=12)
    monkeypatch.setattr(recovery, "SAVE_EVERY", 5)
    path = tmp_path / "state.safetensors"
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*arguments)

    original = recovery._loss
    monkeypatch.setattr(recovery, "_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        recovery.recover(architecture, model, small, batches, steps=12, checkpoint=path)
    monkeypatch.setattr(recovery, "_loss", original)
    assert path.is_file()
    with pytest.raises(InputError, match="very recovery"):
        recovery.recover(architecture, model, small, batches, steps=13, checkpoint=path)
    with pytest.raises(InputError, match="very recovery"):  # other proteins of the same shapes
        recovery.recover(architecture, model, small, [b.flip(0) for b in batches], steps=12, checkpoint=path)
    resumed, again = recovery.recover(architecture, model, small, batches, steps=12, checkpoint=path)
    assert again == losses and not path.exists()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_mutation_scores_mask_one_position_at_a_time(tmp_path):
    architecture, model, small, _ = pair("fair-esm")
    sequence = "MKTAYIAKQR"
    scores = mutation_scores(architecture, model, sequence)
    tokens = architecture.tokenise([sequence])
    for place in (0, 4, 9):
        masked = tokens.clone()
        masked[0, place + 1] = MASK
        with torch.no_grad():
            logs = model(masked)["logits"][0, place + 1].log_softmax(-1).double()
        expected = logs[list(AMINO_ACIDS.values())] - logs[tokens[0, place + 1]]
        torch.testing.assert_close(scores[place], expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "assay.fasta").write_text(f">wild\n{sequence}\n")
    mutants = {f"{sequence[i]}{i + 1}{a}": float(i) for i in range(10) for a in "WC" if a != sequence[i]}
    (tmp_path / "assay.csv").write_text("mutant,score\n" + "".join(f"{m},{s}\n" for m, s in mutants.items()))
    found = mutation_effects(architecture, {"before": model, "after": small}, tmp_path)["assays"]["assay"]
    columns = list(AMINO_ACIDS)
    predicted = [float(scores[int(m[1:-1]) - 1, columns.index(m[-1])]) for m in mutants]
    assert found["before"] == pytest.approx(scipy.stats.spearmanr(predicted, list(mutants.values())).statistic)
    assert found["mutants"] == len(mutants)


def test_bad_assays(tmp_path):
    with pytest.raises(InputError, match="assays"):
        read_assays(tmp_path)
    (tmp_path / "a.csv").write_text("mutant,score\nA1G,1\nA1C,2\nA1D,3\n")
    with pytest.raises(InputError, match="wild-type"):
        read_assays(tmp_path)
    (tmp_path / "a.fasta").write_text(">w\nMK\n")
    with pytest.raises(InputError, match="A1G"):
        read_assays(tmp_path)
    (tmp_path / "a.fasta").write_text(">w\nAK\n")
    assert len(read_assays(tmp_path)["a"][1]) == 3


def test_cost_counts_bytes():
    architecture, model, small, batches = pair("GPT2LMHeadModel")
    found = cost(architecture, model, small, batches[0], rounds=2)
    assert found["bytes_before"] == module_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    assert found["bytes_after"] < found["bytes_before"] and found["before_ms"] > 0


@pytest.mark.parametrize("kind", ["EsmForMaskedLM", "GPT2LMHeadModel"])
def test_folders_and_checkpoints_are_loaded_whole(kind, tmp_path):
    model = small_model(kind)
    model.save_pretrained(tmp_path / "model")
    loaded, architecture = load_dense(str(tmp_path / "model"))
    assert architecture.class_name == kind
    batch = token_batches(model)[0]
    assert torch.equal(output(model, batch), output(loaded, batch))


def test_fair_esm_checkpoints(tmp_path):
    from distil_rank.proteins.pretrain import save_checkpoint

    model = small_model("fair-esm")
    save_checkpoint(model, tmp_path / "nano.pt")
    loaded, _ = load_dense(str(tmp_path / "nano.pt"))
    batch = token_batches(model)[0]
    torch.testing.assert_close(output(loaded, batch), output(model, batch), rtol=1e-2, atol=1e-2)  # float16 on disk
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="fair-esm"):
        load_dense(str(tmp_path / "other.pt"))
