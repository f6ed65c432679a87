"""A chain: exact prefixes, fitted on what it is applied to, saved whole, clear about its limits."""

import itertools
import os
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.core.resume import Checkpoint
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.rows import TensorRows, is_held_out, joint_moments
from tests import reference_nested as reference
from tests.nested.data import family

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regression", ["ols", "ridge", "pcr"])
def test_every_prefix_is_the_smaller_embedding_bit_for_bit(dtype, regression, tmp_path):
    raws = family(dtype=dtype, widths=(6, 10, 17, 20))
    chain = NestedChain.fit(raws, regression)
    chain.save(tmp_path / "chain")
    for same in (chain, NestedChain.load(tmp_path / "chain")):
        chain = same
        whole = chain.embed(raws)
        assert whole.dtype == dtype and whole.shape[-1] == 20
        assert torch.equal(whole[:, :6], raws["a"])
        for (name, dim), upto in zip(chain.dims.items(), range(1, 5)):
            some = {k: raws[k] for k in list(raws)[:upto]}
            assert name == chain.sizes[upto - 1]
            assert torch.equal(chain.embed(some, dim), whole[:, :dim])
        for dim in range(6, 21):
            torch.testing.assert_close(chain.embed(raws, dim), whole[:, :dim], rtol=2e-3, atol=2e-3)
            assert torch.equal(chain.embed(raws, dim)[:, :6], raws["a"])


def test_equal_to_brute_force():
    raws = family(widths=(6, 10, 17))
    fast = NestedChain.fit(raws, "ols", held_out=0).embed(raws)
    slow = reference.chain([x.numpy() for x in raws.values()], reference.ols, [4, 7])
    np.testing.assert_allclose(fast.numpy(), slow, atol=1e-8)


def test_numpy_arrays_are_taken():
    raws = family()
    arrays = {k: v.numpy() for k, v in raws.items()}
    one, two = NestedChain.fit(raws), NestedChain.fit(arrays)
    z = two.embed(arrays)
    assert torch.equal(z, one.embed(raws))
    assert torch.equal(two.reconstruct(z.numpy(), "c"), one.reconstruct(z, "c"))


def test_new_blocks_are_uncorrelated_with_their_prefix():
    raws = family(2000, (8, 12, 20, 26), dtype=torch.float32)
    for exact, most in ((True, 1e-6), (False, 1e-5)):
        chain = NestedChain.fit(raws, "ols", held_out=0, exact=exact)
        correlation = np.corrcoef(chain.embed(raws).double().numpy().T)
        for low, high in itertools.pairwise(chain.dims.values()):
            assert np.abs(correlation[:low, low:high]).max() <= most


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 300), (torch.float16, 3)])
def test_float32_products_keep_the_eigenvalues(dtype, mean):
    """Whatever the mean, and over batches and merged parts; null directions stay null."""
    raws = family(20_000, (8, 12, 20))
    x = torch.cat([*raws.values()], 1)
    x = torch.cat([x / x.std(0) + mean, x[:, :1] * 0 + 7], 1).to(dtype)
    exact = torch.linalg.eigvalsh(Moments.of(x).covariance)
    found, part = Moments(41), Moments(41)
    for i, batch in enumerate(x.split(3000)):
        (part if i % 2 else found).update(batch, exact=False)
    found.merge(part)
    assert found.count == 20_000
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=0, atol=1e-6)
    near = torch.linalg.eigvalsh(found.covariance)
    torch.testing.assert_close(near[1:], exact[1:], rtol=1e-5, atol=0)
    assert abs(float(near[0])) < 1e-8 * float(exact[-1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        found.update(x.masked_fill(x == 7, torch.nan), exact=False)


def test_mean_of_nested_is_nested_of_mean_and_shapes_lead():
    raws = family(120)
    chain = NestedChain.fit(raws)
    pooled = chain.embed({k: v.mean(0) for k, v in raws.items()})
    torch.testing.assert_close(pooled, chain.embed(raws).mean(0))
    folded = chain.embed({k: v.view(4, 30, -1) for k, v in raws.items()})
    torch.testing.assert_close(folded.view(120, -1), chain.embed(raws))
    short = chain.embed(raws, 10, normalize=True)  # after the cut
    assert torch.equal(short, torch.nn.functional.normalize(chain.embed(raws)[:, :10], dim=1))


def test_held_out_r2_is_that_of_the_rows_left_out():
    raws = family()
    rows = {k: TensorRows(v, [3] * 200) for k, v in raws.items()}
    chain = NestedChain.fit(rows, "ols", held_out=0.3)
    fitted, held_out = joint_moments(rows, 0.3)
    assert fitted.count + held_out.count == 600 and held_out.count % 3 == 0
    assert 100 < held_out.count < 260
    out = torch.tensor([is_held_out(str(i), 0.3) for i in range(200)]).repeat_interleave(3)
    other = {k: v[out] for k, v in raws.items()}
    z = chain.embed(other)
    rest = (other["c"] - chain.reconstruct(z[:, :10], "c")).square().sum()  # from the prefix alone
    total = (other["c"] - other["c"].mean(0)).square().sum()
    found = chain.record["r2"]["c"]["held_out"]["regression"]
    assert found == pytest.approx(float(1 - rest / total), abs=1e-9)


def test_directions_may_be_fewer_and_random_ones_are_seeded():
    raws = family(40)
    chain = NestedChain.fit(raws, "pcr", 3, directions={"b": 2, "c": 5}, held_out=0)
    assert chain.dims == {"a": 6, "b": 8, "c": 13}
    assert chain.sizes_for(8) == ["a", "b"] and chain.sizes_for(9) == ["a", "b", "c"]
    moments, _ = joint_moments(raws, 0)
    fit = partial(NestedChain.fit_moments, moments, chain.widths, "ols")
    one, two, three = (fit(random_seed=seed).embed(raws) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(one[:, :6], raws["a"])


def test_merged_shards_are_one_pass():
    raws = {k: TensorRows(v, [5] * 120) for k, v in family().items()}
    whole = joint_moments(raws, 0.2)
    for side in (0, 1):
        merged = Moments(33)
        for i in range(4):
            merged.merge(joint_moments(raws, 0.2, shard=(i, 4))[side])
        assert merged.count == whole[side].count
        torch.testing.assert_close(merged.covariance, whole[side].covariance, rtol=1e-9, atol=1e-9)


def test_kill_and_resume_is_equal(tmp_path, monkeypatch):
    monkeypatch.setattr("distil_rank.nested.rows.BATCH", 16)
    monkeypatch.setattr("distil_rank.nested.rows.SAVE_EVERY", 3)
    raws = family()
    whole = joint_moments(raws, 0.2, Checkpoint(tmp_path / "never-killed"))
    for stop_after in (1, 40, 130, 400, 599):
        checkpoint = Checkpoint(tmp_path / f"{stop_after}", 0.2)
        seen = 0

        def killed(rows, stop_after=stop_after):
            nonlocal seen
            seen += rows
            if seen >= stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            joint_moments(raws, 0.2, checkpoint, progress=killed)
        again = joint_moments(raws, 0.2, checkpoint)
        for a, b in zip(whole, again):
            assert all(torch.equal(a.state()[key], b.state()[key]) for key in a.state())
    with pytest.raises(InputError, match="of this very request"):
        joint_moments(raws, 0.3, Checkpoint(checkpoint.path, 0.3))


def test_sizes_keep_their_order_in_folder_and_file(tmp_path):
    raws = dict(zip(("8M", "35M", "150M"), family().values()))
    chain = NestedChain.fit(raws)
    chain.save(tmp_path)
    for path in (tmp_path, tmp_path / "chain.safetensors"):
        found = NestedChain.load(path)
        assert found.sizes == list(raws) and list(found.record["r2"]) == ["35M", "150M"]
        assert found.config() == chain.config()
        assert torch.equal(found.embed(raws), chain.embed(raws))


def test_esm2_reference_outputs(shared_data):
    """103 residues determine 102 directions: too few for native stages, enough for 20 a stage."""
    raws = {}
    for name in ("8m", "35m", "150m", "650m"):
        file = load_file(shared_data / "esm2_reference_outputs" / f"esm2_{name}.safetensors")
        raws[name] = file["output__last_hidden_state"][file["residue_mask"]]
    assert raws["8m"].shape == (103, 320) and raws["650m"].shape == (103, 1280)
    with pytest.raises(InputError, match=r"8m -> 35m: at least \d+ rows required .*, got 103"):
        NestedChain.fit(raws, "pcr", 20, held_out=0)
    chain = NestedChain.fit(
        raws, "pcr", 20, directions=dict.fromkeys(list(raws)[1:], 20), held_out=0
    )
    assert list(chain.dims.values()) == [320, 340, 360, 380]
    z = chain.embed(raws)
    assert torch.equal(z[:, :320], raws["8m"])
    for upto, dim in enumerate(chain.dims.values(), start=1):
        assert torch.equal(chain.embed({k: raws[k] for k in list(raws)[:upto]}, dim), z[:, :dim])
    for size, stage in zip(list(raws)[1:], chain.stages):
        error = (raws[size].double() - chain.reconstruct(z.double(), size)).square().sum(1).mean()
        tail = float(stage.eigenvalues[20:].sum())
        assert float(error) == pytest.approx(tail, rel=1e-5)  # float32 rows


BAD_FITS = {
    "unaligned rows": (
        lambda r: {**r, "b": TensorRows(r["b"].values[:-1])},
        "others from number 600 on",
    ),
    "other sequences": (
        lambda r: {**r, "b": TensorRows(r["b"].values, keys=["x", *map(str, range(1, 600))])},
        "others from number 1 on",
    ),
    "tokenisation": (
        lambda r: {
            k: TensorRows(v.values, [2, 4] * 100 if k == "b" else [3] * 200) for k, v in r.items()
        },
        "3 rows in a and 2 in b",
    ),
    "NaN": (
        lambda r: {
            **r,
            "c": TensorRows(r["c"].values.masked_fill(torch.eye(600, 17) > 0, torch.nan)),
        },
        "infinity in c",
    ),
    "order": (
        lambda r: {"b": r["b"], "a": r["a"], "c": r["c"]},
        r"growing width required, got b \(10\)",
    ),
    "one size": (lambda r: {"a": r["a"]}, "at least two sizes"),
    "few rows": (lambda r: {k: TensorRows(v.values[:12]) for k, v in r.items()}, "rows required"),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_fit(case):
    spoil, message = BAD_FITS[case]
    rows = {k: TensorRows(v) for k, v in family().items()}
    with pytest.raises(InputError, match=message):
        NestedChain.fit(spoil(rows), "ols", held_out=0)


BAD_EMBEDS = {
    "missing size": (lambda r: {k: r[k] for k in "ac"}, "got none of b"),
    "other width": (lambda r: {**r, "b": r["c"]}, "10 features required for b"),
    "unaligned": (lambda r: {**r, "b": r["b"][:-1]}, "row-wise aligned"),
    "NaN": (lambda r: {**r, "c": r["c"] * torch.nan}, "NaN or infinity in c"),
    "integers": (lambda r: {**r, "a": r["a"].long()}, "float embeddings"),
}


@pytest.mark.parametrize("case", BAD_EMBEDS)
def test_bad_embed(case):
    spoil, message = BAD_EMBEDS[case]
    raws = family()
    chain = NestedChain.fit(raws)
    with pytest.raises(InputError, match=message):
        chain.embed(spoil(raws))


def test_bad_dims_and_folders(tmp_path):
    raws = family()
    chain = NestedChain.fit(raws)
    for dim in (0, 5, 18):
        with pytest.raises(InputError, match="between 6 and 17"):
            chain.embed(raws, dim)
    assert torch.equal(chain.reconstruct(chain.embed(raws), "a"), raws["a"])
    with pytest.raises(InputError, match="one of the sizes"):
        chain.reconstruct(chain.embed(raws), "z")
    with pytest.raises(InputError, match="at least 10 dims"):
        chain.reconstruct(raws["a"], "c")
    with pytest.raises(InputError, match=r"directions of b \(1 to 10\), c"):
        NestedChain.fit(raws, directions={"a": 3})
    with pytest.raises(InputError, match="of a nested chain required"):
        NestedChain.load(tmp_path)
    (tmp_path / "chain.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="of a nested chain required"):
        NestedChain.load(tmp_path)
    assert os.listdir(tmp_path) == ["chain.safetensors"]
    large = {"a": raws["a"].half(), "b": raws["b"] * 1e6}
    with pytest.raises(InputError, match=r"torch\.float16 can hold"):
        NestedChain.fit(large).embed(large)
