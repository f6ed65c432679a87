import argparse
import itertools
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.nano_perplexity import perplexity
from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator
from distil_rank.proteins import command_pretrain
from distil_rank.proteins.checkpoints import load_model, save_model
from distil_rank.proteins.command_pretrain import Config, run, train
from distil_rank.proteins.esm2 import CLS, EOS, MASK, PAD, tokenise
from distil_rank.proteins.fasta import AMINO_ACIDS
from distil_rank.proteins.masked import logits_at, mask
from distil_rank.proteins.pretrain import batches, look_at_neighbours, new_model, schedule
from tests.proteins import reference


def proteins(count: int, longest: int = 60, seed: int = 0) -> list[str]:
    """Proteins with a rule to learn: residues repeat with period three."""
    rng = random.Random(seed)
    return [
        ("".join(rng.choices(AMINO_ACIDS, k=3)) * longest)[: rng.randint(1, longest)]
        for _ in range(count)
    ]


SMALL = Config(
    *(Path("x"), Path("y")),
    **{"n_layer": 2, "n_embd": 16, "n_head": 2, "tokens": 4000},
    **{"batch_tokens": 200, "max_length": 40, "save_every": 3, "device": "cpu"},
)
OPTIONS = (SMALL.max_length, SMALL.batch_tokens, SMALL.seed)  # of `batches`


def test_masks_have_the_published_shares():
    batch = tokenise([AMINO_ACIDS * 50, "XUBZO" * 200] * 100)
    tokens, chosen = mask(batch, generator(0, "mask"))
    residues = torch.isin(batch, tokenise([AMINO_ACIDS])[0, 1:-1])
    assert not (chosen & ~residues).any()
    assert torch.equal(tokens[~chosen], batch[~chosen])
    n = int(chosen.sum())
    share = {
        "chosen": (n / int(residues.sum()), 0.15),
        "masked": (int((tokens == MASK).sum()) / n, 0.8),
        # 10 % are redrawn from 20 amino acids: one in twenty of those comes out as it was
        "other": (int((chosen & (tokens != MASK) & (tokens != batch)).sum()) / n, 0.1 * 19 / 20),
        "kept": (int((chosen & (tokens == batch)).sum()) / n, 0.1 + 0.1 / 20),
    }
    for got, expected in share.values():
        assert got == pytest.approx(expected, abs=5 * (expected * (1 - expected) / n) ** 0.5)
    assert torch.isin(tokens[chosen & (tokens != MASK)], batch[residues]).all()


def test_an_epoch_shows_every_protein_once_within_the_budget():
    sequences = proteins(300)
    encoded = [tokenise([s])[0, 1:-1] for s in sequences]
    seen: list[str] = []
    letters = {int(i): a for a, i in zip(AMINO_ACIDS, tokenise([AMINO_ACIDS])[0, 1:-1])}
    for batch in batches(encoded, 60, 250, seed=0):
        assert (batch[:, 0] == CLS).all()
        assert (batch == EOS).sum() == len(batch)
        assert batch.shape[0] * (batch.shape[1] - 2) <= 250
        for row in batch:
            end = int((row == EOS).nonzero())
            assert (row[end + 1 :] == PAD).all()
            seen.append("".join(letters[int(i)] for i in row[1:end]))
        if len(seen) == len(sequences):
            break
    assert sorted(seen) == sorted(sequences)


def test_crops_are_windows_and_differ_between_epochs():
    whole = tokenise([AMINO_ACIDS * 5])[0, 1:-1]
    crops = [b[0, 1:-1] for b in itertools.islice(batches([whole], 30, 200, seed=0), 6)]
    assert all(any(torch.equal(crop, whole[i : i + 30]) for i in range(71)) for crop in crops)
    assert len({tuple(crop.tolist()) for crop in crops}) > 1


@pytest.mark.parametrize("skip", [1, 13, 60])
def test_skipping_batches_changes_none_of_the_later_ones(skip):
    encoded = [tokenise([s])[0, 1:-1] for s in proteins(100)]
    expected = list(itertools.islice(batches(encoded, *OPTIONS), skip, skip + 5))
    for got, batch in zip(batches(encoded, *OPTIONS, skip), expected):
        assert torch.equal(got, batch)


def test_fresh_models_come_from_their_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, same, other = (new_model(1, 16, 2, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])


@pytest.mark.parametrize("width, heads", [(64, 4), (128, 8), (256, 8)])
def test_heads_start_at_one_neighbour_each(width, heads):
    """In fair-esm's own layers, in any place; the last head of each layer sees all."""
    model, length = new_model(4, width, heads, seed=0), 70
    look_at_neighbours(model)
    offsets = itertools.cycle(sign * distance for distance in range(1, 13) for sign in (-1, 1))
    tokens = tokenise(["".join(random.Random(0).choices(AMINO_ACIDS, k=length))])
    with torch.no_grad():
        x = torch.zeros_like(model.embed_tokens(tokens)).transpose(0, 1)
        for layer in reference.as_fair_esm(model).layers:
            # queries and keys of nothing: their biases, where a head looks whatever it reads
            weights = layer.self_attn(x, x, x, need_weights=True, need_head_weights=True)[1][:, 0]
            for head in range(heads - 1):
                offset = next(offsets)
                there = torch.arange(max(0, -offset), length + 2 - max(0, offset))
                assert (weights[head, there, there + offset] > 0.8).all()
            torch.testing.assert_close(weights[-1], torch.full_like(weights[-1], 1 / (length + 2)))


def test_schedule_rises_then_falls_to_zero():
    rates = [schedule(i / 100, 0.1) for i in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_training_learns_the_rule(tmp_path):
    held_out = proteins(50, seed=1)
    before = perplexity(new_model(2, 16, 2, 0), held_out)
    options = {"tokens": 60_000, "batch_tokens": 500, "learning_rate": 1e-2, "save_every": 10**6}
    config = replace(SMALL, out=tmp_path / "m.pt", **options)
    after = perplexity(train(config, proteins(400)), held_out)
    assert before["low"] > 15 and after["low"] < after["value"] < after["high"] < 8
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_bfloat16_trains_too(tmp_path):
    config = replace(SMALL, dtype="bfloat16", out=tmp_path / "m.pt", tokens=1000)
    assert all(torch.isfinite(p).all() for p in train(config, proteins(30)).parameters())


def test_perplexity_of_a_model_without_opinion_is_the_size_of_its_alphabet():
    model = new_model(1, 16, 2, 0)
    torch.nn.init.zeros_(model.embed_tokens.weight)
    assert perplexity(model, proteins(20))["value"] == pytest.approx(33, rel=1e-5)


def test_fair_esm_loads_the_checkpoint_by_its_own_code_and_so_do_we(tmp_path):
    import esm

    model, path = new_model(2, 16, 2, seed=3), tmp_path / "esm2_small.pt"
    save_model(model, path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # the file's precision
    theirs = reference.as_fair_esm(model)
    regression = {k: v for k, v in theirs.state_dict().items() if "contact_head" in k}
    torch.save({"model": regression}, path.with_name("esm2_small-contact-regression.pt"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded, _ = esm.pretrained.load_model_and_alphabet_local(path)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    tokens, ours = tokenise(["MKTAYIAKQR", "GAVL"]), load_model(str(path), head=True).model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert torch.equal(ours(tokens).logits, model(tokens).logits)


def on_one_thread(config: Config, sequences: list[str]) -> None:
    torch.set_num_threads(1)
    train(config, sequences)


def test_killed_at_any_time_it_ends_bit_equal(tmp_path, processes):
    sequences, rng, state = proteins(300), random.Random(0), tmp_path / "killed.pt.state"
    whole = replace(SMALL, out=tmp_path / "whole.pt", tokens=12_000, save_every=5)
    killed = replace(whole, out=tmp_path / "killed.pt")

    def saved() -> int:
        return state.stat().st_mtime_ns if state.exists() else 0

    for _ in range(3):
        before = saved()
        process = processes.Process(target=on_one_thread, args=(killed, sequences))
        process.start()
        while saved() == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not killed.out.exists()
    for config in (killed, whole):
        process = processes.Process(target=on_one_thread, args=(config, sequences))
        process.start()
        process.join()
    assert killed.out.read_bytes() == whole.out.read_bytes()
    left = {path.name for path in tmp_path.iterdir() if ".tmp" not in path.name}
    assert left == {"killed.pt", "whole.pt"}


def interrupted(config: Config, monkeypatch) -> None:
    """Leave the state of three steps, as a kill in the fourth would."""
    steps = iter(range(3))

    def stumbling(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return logits_at(*arguments)

    monkeypatch.setattr(command_pretrain, "logits_at", stumbling)
    with pytest.raises(KeyboardInterrupt):
        train(config, proteins(30))
    monkeypatch.undo()


def test_a_state_with_other_settings_or_damage_is_refused(tmp_path, monkeypatch):
    config = replace(SMALL, out=tmp_path / "m.pt")
    interrupted(config, monkeypatch)
    for other in (replace(config, n_embd=32), replace(config, seed=1)):
        with pytest.raises(InputError, match="a checkpoint of this very request"):
            train(other, proteins(30))
    with pytest.raises(InputError, match="a checkpoint of this very request"):
        train(config, proteins(31))
    state = tmp_path / "m.pt.state"
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(InputError, match="a whole checkpoint required"):
        train(config, proteins(30))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_embd": 20, "n_head": 4}, "divisible"),
        ({"n_head": 0}, "--n-head must be above 0"),
        ({"tokens": float("nan")}, "--tokens must be above 0"),
        ({"max_length": 300}, "max_length <= batch_tokens"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"learning_rate": 0.0}, "rate must be above 0"),
        ({"out": Path("nowhere/m.pt")}, "existing folder"),
        ({"out": Path(".")}, "a file in an existing folder"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(tmp_path, change, says):
    config = replace(SMALL, out=tmp_path / "m.pt")
    with pytest.raises(InputError, match=says):
        run(replace(config, **change))
    assert not list(tmp_path.iterdir())


def test_a_run_may_go_on_with_another_budget(tmp_path, monkeypatch, capsys):
    config = replace(SMALL, out=tmp_path / "m.pt", save_every=1)
    interrupted(config, monkeypatch)
    capsys.readouterr()
    train(replace(config, tokens=1000), proteins(30))
    steps = capsys.readouterr().out.splitlines()
    assert steps[0].startswith("step 4 ")
    assert 1000 <= int(steps[-1].split()[3]) < 1000 + config.batch_tokens
