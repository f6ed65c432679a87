"""Generation: reproducible for any batch size, faithful to the distribution, and described by metrics known in
advance."""

import time

import numpy as np
import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.generators import quality, sampling
from distil_rank.generators.sampling import Sampler, choose, draw
from tests.generators.conftest import toy_sequences

TOP = Sampler(max_length=60)


def drawn(teacher, tokenizer, n=13, **more):
    return list(draw(teacher, tokenizer, range(n), more.pop("sampler", TOP), **more))


def test_the_same_seed_gives_the_same_proteins_for_any_batch_size(teacher, tokenizer):
    whole = drawn(teacher, tokenizer, batch_size=13)
    for size in (1, 4, 16):
        other = drawn(teacher, tokenizer, batch_size=size)
        assert [d.sequence for d in other] == [d.sequence for d in whole]
        assert [d.perplexity for d in other] == pytest.approx([d.perplexity for d in whole])
    assert [d.sequence for d in draw(teacher, tokenizer, range(5, 9), TOP)] == [d.sequence for d in whole[5:9]]
    assert [d.sequence for d in drawn(teacher, tokenizer, seed=1)] != [d.sequence for d in whole]
    assert next(teacher.parameters()).dtype == torch.float32


def test_perplexity_in_the_header_is_that_of_the_model_on_its_tokens(teacher, tokenizer, monkeypatch):
    chosen = []
    monkeypatch.setattr(sampling, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    generated = next(iter(draw(teacher, tokenizer, range(1), Sampler(20, temperature=0.7, top_k=9), seed=3)))
    ids = torch.tensor([[0, *map(int, chosen)]])
    with torch.no_grad():
        log_p = torch.log_softmax(teacher.double()(input_ids=ids).logits[0, :-1], -1)
    nll = -log_p[torch.arange(len(chosen)), ids[0, 1:]].mean()
    assert generated.perplexity == pytest.approx(float(nll.exp()), rel=1e-9) and generated.tokens == len(chosen)


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)).expand(20000, 4)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.zeros(20000, 1, dtype=torch.long)
    counts = torch.bincount(choose(logits, tokens, uniform, Sampler()), minlength=4) / 20000
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.012)
    counts = torch.bincount(choose(logits, tokens, uniform, Sampler(top_k=2)), minlength=4) / 20000
    assert counts.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.012)
    counts = torch.bincount(choose(logits, tokens, uniform, Sampler(temperature=1e-3)), minlength=4)
    assert counts.tolist() == [20000, 0, 0, 0]
    penalised = torch.bincount(choose(logits, tokens, uniform, Sampler(repetition_penalty=2.0)), minlength=4) / 20000
    assert float(penalised[0]) == pytest.approx(0.25 / 0.75, abs=0.012)  # log .5 doubled is log .25


@pytest.mark.parametrize(
    "bad", [{"max_length": 1}, {"max_length": 500}, {"temperature": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}]
)
def test_bad_settings_are_refused(teacher, tokenizer, bad):
    with pytest.raises(InputError, match=next(iter(bad)).replace("_", "-")):
        drawn(teacher, tokenizer, sampler=Sampler(**({"max_length": 60} | bad)))


def test_novelty_and_diversity_of_known_sets():
    training = toy_sequences(30)
    assert quality.novelty([training[4], "A" * 20], training)[0] == 0
    assert quality.novelty(["AAAA"], ["AAAC", "WWWW"])[0] == pytest.approx(0.25)
    assert quality.diversity(["AAAA", "AAAC"]) == pytest.approx(0.25)
    assert quality.diversity(["AAAA"] * 3) == 0


def test_novelty_of_200_against_1000_is_fast():
    generated, training = toy_sequences(200, 1, 60, 250), toy_sequences(1000, 2, 60, 250)
    quality.novelty(generated[:2], training[:2])
    start = time.process_time()  # of this process alone, whatever else the machine does
    assert quality.novelty(generated, training).shape == (200,)
    assert time.process_time() - start <= 2.0


def test_repeats_and_runs_of_known_sequences():
    assert quality.repeated("ACDEFGHIKL") == 0 and quality.repeated("AAAAAAAA") == pytest.approx(0.8)
    assert quality.repeated("ACD") == 0 and quality.longest_run("MAAAK") == 3 and quality.longest_run("") == 0


def test_amino_acid_divergence_knows_its_noise():
    rng = np.random.default_rng(0)
    natural = toy_sequences(600, 3, 40, 120)
    alike = quality.amino_acid_divergence(toy_sequences(150, 4, 40, 120), natural)
    assert alike["value"] < 4 * alike["noise_floor"] and alike["low"] == 0
    skewed = ["".join(rng.choice(list("AAAACDEFGHIKLMNPQRSTVWY"), 60)) for _ in range(150)]
    found = quality.amino_acid_divergence(skewed, natural)
    p = np.full(20, 1 / 23)
    p[0] = 4 / 23
    truth = (p * np.log(p * 20)).sum()
    assert found["low"] <= truth <= found["high"] and found["low"] > found["noise_floor"]


def test_length_matching_gives_natural_residues_of_the_lengths_asked_for():
    natural = toy_sequences(50, 5, 30, 90)
    matched = quality.length_matched([10, 45, 45], natural, np.random.default_rng(0))
    assert [len(s) for s in matched] == [10, 45, 45] and all(any(s == t[: len(s)] for t in natural) for s in matched)


def test_description_counts_what_is_wrong():
    natural = toy_sequences(100, 6)
    found = quality.describe(["ACDEFGHIKL", "AAAAAAAAAA", "AXA", ""], [True, True, False, True], natural, natural)
    assert found["validity"]["value"] == 0.5 and found["ended"]["value"] == 0.75 and found["long_runs"]["value"] == 0.25
    assert found["validity"]["low"] < 0.5 < found["validity"]["high"] and found["exact_copies"] == 0
    nothing = quality.describe(["", "X"], [True, True], natural, natural)
    assert nothing["validity"]["value"] == 0 and "novelty" not in nothing
