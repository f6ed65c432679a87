"""Generation: the same for any batch size, faithful to the distribution; and what is written."""

import numpy as np
import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.generators import quality, sample
from distil_rank.generators.sample import Sampler, choose, draw
from tests.toys import mutated, toy_sequences

SHORT = Sampler(max_new_tokens=59)


def drawn(teacher, tokenizer, n=13, sampler=SHORT, **more):
    return list(draw(teacher, tokenizer, range(n), sampler, **({"dtype": "float64"} | more)))


def test_the_same_seed_gives_the_same_proteins_for_any_batch_size(teacher, tokenizer):
    whole = drawn(teacher, tokenizer, batch_size=13)
    for size in (1, 4, 16):
        other = drawn(teacher, tokenizer, batch_size=size)
        assert [d.sequence for d in other] == [d.sequence for d in whole]
        assert [d.perplexity for d in other] == pytest.approx([d.perplexity for d in whole])
    later = draw(teacher, tokenizer, range(5, 9), SHORT, dtype="float64")
    assert [d.sequence for d in later] == [d.sequence for d in whole[5:9]]
    other = drawn(teacher, tokenizer, seed=1)
    assert [d.sequence for d in other] != [d.sequence for d in whole]
    assert next(teacher.parameters()).dtype == torch.float32


def test_perplexity_in_the_header_is_that_of_the_model_on_its_tokens(
    teacher, tokenizer, monkeypatch
):
    chosen = []
    monkeypatch.setattr(
        sample, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1]
    )
    sampler = Sampler(19, temperature=0.7, top_k=9)
    (generated,) = drawn(teacher, tokenizer, 1, sampler, seed=3)
    ids = torch.tensor([[0, *map(int, chosen)]])
    with torch.no_grad():
        log_p = torch.log_softmax(teacher.double()(input_ids=ids).logits[0, :-1], -1)
    nll = -log_p[torch.arange(len(chosen)), ids[0, 1:]].mean()
    assert generated.perplexity == pytest.approx(float(nll.exp()), rel=1e-9)
    assert generated.tokens == len(chosen)


def test_tokens_are_drawn_with_their_probabilities():
    n = 20000
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)).expand(n, 4)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.zeros(n, 1, dtype=torch.long)

    def shares(**how):
        counts = torch.bincount(choose(logits, tokens, uniform, Sampler(**how)), minlength=4)
        return (counts / n).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.012)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.012)
    assert shares(temperature=1e-3) == [1, 0, 0, 0]
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.012)
    assert shares(top_p=0.5) == [1, 0, 0, 0]
    penalized = shares(repetition_penalty=2.0)[0]  # log .5 doubled is log .25
    assert penalized == pytest.approx(0.25 / 0.75, abs=0.012)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 128},
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
    ],
)
def test_bad_settings_are_refused(teacher, tokenizer, bad):
    with pytest.raises(InputError, match=next(iter(bad)).replace("_", "-")):
        drawn(teacher, tokenizer, sampler=Sampler(**({"max_new_tokens": 60} | bad)))


def test_a_protein_continues_its_prompt(teacher, tokenizer):
    sampler = Sampler(20, prompt="mktayiakqr" * 7)
    for protein in drawn(teacher, tokenizer, 5, sampler):
        assert protein.sequence.startswith("MKTAYIAKQR" * 7) and protein.tokens <= 20
    with pytest.raises(InputError, match="at most 55 required"):
        drawn(teacher, tokenizer, sampler=Sampler(59, prompt="MKTAYIAKQR" * 7))
    with pytest.raises(InputError, match="letters"):
        drawn(teacher, tokenizer, sampler=Sampler(9, prompt="MK1"))


def test_copied_pieces_are_not_new_and_other_proteins_are():
    training = toy_sequences(60, low=120, high=250)
    copies = [s[20:90] for s in training[:5]]  # a copy of 70 residues of a longer protein
    longer = "W" * 5 + training[7][:100] + "C" * 5
    found = quality.nearest_identity([*copies, longer, "UOX" * 10], training)
    assert (1 - found[:5] < 0.05).all() and found[5] == pytest.approx(100 / 110, abs=0.03)
    record = quality.novelty(copies, toy_sequences(20, 9), training)
    assert record["value"] < 0.05 < 0.6 < min(record[k]["value"] for k in ("natural", "shuffled"))


def test_an_hmm_of_a_family_finds_its_members_and_no_others():
    pytest.importorskip("pyhmmer")
    rng = np.random.default_rng(0)
    (ancestor,) = toy_sequences(1, low=120, high=121)
    members = [mutated(ancestor, 0.4, rng) for _ in range(75)]
    written = [*members[:15], *toy_sequences(5, 3, 100, 140), ""]
    found = quality.membership(written, members[15:35], members[35:])
    shares = [found[name]["value"] for name in ("generated", "natural", "shuffled")]
    assert shares == [pytest.approx(15 / 21), 1.0, 0.0] and found["built_from"] >= 38


def test_amino_acid_divergence_knows_its_noise():
    rng = np.random.default_rng(0)
    natural = toy_sequences(600, 3, 40, 120)
    alike = quality.amino_acid_divergence(toy_sequences(150, 4, 40, 120), natural)
    assert alike["value"] < 0.005 and alike["low"] == 0 and alike["met"]
    skewed = ["".join(rng.choice(list("AAAACDEFGHIKLMNPQRSTVWY"), 60)) for _ in range(150)]
    found = quality.amino_acid_divergence(skewed, natural)
    p = np.full(20, 1 / 23)
    p[0] = 4 / 23
    truth = (p * np.log(p * 20)).sum()
    assert 0.05 < found["low"] <= truth <= found["high"]
    assert found["low"] <= found["value"] <= found["high"] and not found["met"] and found["certain"]


def test_length_matching_gives_natural_residues_of_the_lengths_asked_for():
    natural = toy_sequences(50, 5, 30, 90)
    matched = quality.length_matched([10, 45, 45], natural, np.random.default_rng(0))
    assert [len(s) for s in matched] == [10, 45, 45]
    assert all(any(t.startswith(s) for t in natural) for s in matched)


def test_description_counts_what_is_wrong():
    natural = toy_sequences(100, 6)
    written, ended = ["ACDEFGHIKL", "AAAAAAAAAA", "AXA", ""], [True, True, False, True]
    found = quality.describe(written, ended, natural, natural)
    shares = [found[name]["value"] for name in ("validity", "ended")]
    assert shares == [0.5, 0.75]
    assert found["validity"]["low"] < 0.5 < found["validity"]["high"]
    nothing = quality.describe(["", "X"], [True, True], natural, natural)
    assert nothing["validity"]["value"] == 0 and "novelty" not in nothing
