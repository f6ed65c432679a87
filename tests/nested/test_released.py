"""Released scalers: their forward is reproduced, the default corrects it; our own are known."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from distil_rank.core.errors import InputError
from distil_rank.core.moments import Moments
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.released import read_scalers, write_scalers
from tests.nested.data import family

WIDTHS = (6, 10, 17)


def write_released(folder, raws, regression="pcr", kept=5):
    """Scalers as the released code fits and saves them: each regression is on raw_r."""
    for small, large in pairwise(raws):
        z, x = raws[small].numpy(), raws[large].numpy()
        state, basis = {}, np.eye(z.shape[1])
        if regression == "pcr":
            basis = np.linalg.svd(z - z.mean(0), full_matrices=False)[2].T
            state |= {"input_mean_": z.mean(0), "output_mean_": x.mean(0)}
            state |= {"input_components_": basis, "n_significant_pcs_": np.int64(kept)}
            fit = LinearRegression().fit((z - z.mean(0)) @ basis[:, :kept], x - x.mean(0))
            predicted = fit.predict((z - z.mean(0)) @ basis[:, :kept]) + x.mean(0)
        else:
            fit = LinearRegression().fit(z, x)
            predicted = fit.predict(z)
        state |= {"coef_": fit.coef_, "intercept_": fit.intercept_}
        pca = PCA(x.shape[1] - z.shape[1], svd_solver="full").fit(x - predicted)
        pieces = {"mean_": pca.mean_, "components_": pca.components_}
        named = {f"regressor__{k}": v for k, v in state.items()}
        named |= {f"pca__{k}": v for k, v in pieces.items()}
        np.savez_compressed(
            folder / f"rd-scaler-{small}-{large}-{regression}-fbpca-1k.npz", **named
        )


def released_forward(folder, raws, regression):
    """Their forward from the files alone: the regression is applied to the nested prefix."""
    nested = next(iter(raws.values())).numpy()
    for small, large in pairwise(raws):
        s = dict(np.load(folder / f"rd-scaler-{small}-{large}-{regression}-fbpca-1k.npz"))
        z, output = nested, 0
        if regression == "pcr":
            basis = s["regressor__input_components_"][:, : int(s["regressor__n_significant_pcs_"])]
            z, output = (nested - s["regressor__input_mean_"]) @ basis, s["regressor__output_mean_"]
        predicted = z @ s["regressor__coef_"].T + s["regressor__intercept_"] + output
        residual = raws[large].numpy() - predicted - s["pca__mean_"]
        nested = np.hstack([nested, residual @ s["pca__components_"].T])
    return nested


@pytest.mark.parametrize("regression", ["linear", "pcr"])
def test_the_released_forward_is_reproduced_and_corrected(tmp_path, regression):
    raws = family(2000, WIDTHS)
    write_released(tmp_path, raws, regression)
    as_released, corrected = read_scalers(tmp_path, True), read_scalers(tmp_path)
    forward, scale = released_forward(tmp_path, raws, regression), float(raws["c"].std())
    np.testing.assert_allclose(as_released.embed(raws).numpy(), forward, atol=1e-5 * scale)
    moments = Moments.of(torch.cat(list(raws.values()), 1))
    wrong, right = as_released.scores(moments), corrected.scores(moments)
    ours = NestedChain.fit(raws, "ols", held_out=0).record["r2"]["c"]["fit"]
    assert wrong["b"] == right["b"] and torch.equal(corrected.embed(raws)[:, :6], raws["a"])
    for kind, low in (("regression", 0.2), ("reconstruction", 0.1)):
        assert wrong["c"][kind] < right["c"][kind] <= ours[kind] + 1e-9
        assert right["c"][kind] > ours[kind] - low
    corrected.save(tmp_path / "chain")
    again = NestedChain.load(tmp_path / "chain")
    assert torch.equal(again.embed(raws), corrected.embed(raws))
    assert len(again.record["released"]["sha256"]) == 2


def test_our_scalers_make_the_released_forward_ours(tmp_path):
    raws = family(600, WIDTHS)
    chain = NestedChain.fit(raws)
    write_scalers(chain, tmp_path)
    np.testing.assert_allclose(
        released_forward(tmp_path, raws, "linear"), chain.embed(raws).numpy()
    )
    for as_released in (True, False):  # they were fitted on what they are applied to
        torch.testing.assert_close(
            read_scalers(tmp_path, as_released).embed(raws), chain.embed(raws)
        )


def test_bad_scalers(tmp_path):
    raws = family(200, WIDTHS)
    with pytest.raises(InputError, match=r"one scaler of each pair .* got none"):
        read_scalers(tmp_path)
    write_released(tmp_path, raws)
    write_scalers(NestedChain.fit(raws), tmp_path / "own")
    with pytest.raises(InputError, match="without a hyphen"):
        write_scalers(NestedChain.fit(dict(zip(("a-1", "b"), raws.values()))), tmp_path)
    one = tmp_path / "rd-scaler-b-c-pcr-fbpca-1k.npz"
    state, whole = dict(np.load(one)), one.read_bytes()
    tilted = {**state, "pca__components_": state["pca__components_"] * 2}
    short = {**state, "pca__mean_": state["pca__mean_"][1:]}
    pickled = {**state, "regressor__coef_": np.array([{}], dtype=object)}
    for spoiled in (tilted, short, pickled, {"a": np.ones(1)}):
        np.savez(one, **spoiled)
        with pytest.raises(InputError, match=r"a released scaler \(pcr\) required"):
            read_scalers(tmp_path)
    one.write_bytes(whole[:200])
    with pytest.raises(InputError, match="a released scaler"):
        read_scalers(tmp_path)
    one.write_bytes(whole)
    for other, message in (("a-b-linear", "one scaler of each pair"), ("d-e-pcr", "one scaler of")):
        extra = tmp_path / f"rd-scaler-{other}-fbpca-1k.npz"
        extra.write_bytes(whole)
        with pytest.raises(InputError, match=message):
            read_scalers(tmp_path)
        extra.unlink()
    one.write_bytes((tmp_path / "rd-scaler-a-b-pcr-fbpca-1k.npz").read_bytes())
    with pytest.raises(InputError, match="equal widths in order"):
        read_scalers(tmp_path)
    one.unlink()
    own = tmp_path / "own" / "rd-scaler-b-c-linear-fbpca-1k.npz"
    own.rename(tmp_path / own.name)
    with pytest.raises(InputError, match="by one writer"):
        read_scalers(tmp_path)
