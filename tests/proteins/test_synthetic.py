import pytest
import torch

from distil_rank.proteins.synthetic import (
    CUMULATED_VARIANCE,
    MEAN_ENERGY,
    OUTLIER_MEANS,
    standardised_spectrum,
    synthetic_embeddings,
)


def test_they_match_the_published_statistics_of_esm2_650m():
    x = synthetic_embeddings(12_000, 0, "train").double()
    mean = x.mean(0)
    assert float(mean.square().sum() / x.square().sum(1).mean()) == pytest.approx(
        MEAN_ENERGY, rel=0.01
    )
    for feature, value in OUTLIER_MEANS.items():
        assert float(mean[feature]) == pytest.approx(value, rel=0.02)
    others = [i for i in range(1280) if i not in OUTLIER_MEANS]
    assert float(mean[others].abs().max()) < 1.1
    z = (x - mean) / x.std(0)
    spectrum = torch.linalg.eigvalsh(z.T @ z / len(z)).flip(0)
    cumulated = spectrum.cumsum(0) / spectrum.sum()
    for components, share in CUMULATED_VARIANCE.items():
        if components:
            assert float(cumulated[components - 1]) == pytest.approx(share, rel=0.03)
    assert float(spectrum[99:].mean()) == pytest.approx(0.208, rel=0.03)


def test_the_spectrum_is_descending_and_sums_to_the_number_of_features():
    spectrum = standardised_spectrum()
    assert bool((spectrum.diff() <= 0).all()) and bool((spectrum > 0).all())
    assert float(spectrum.sum()) == pytest.approx(1280)


def test_rows_differ_by_purpose_and_the_population_by_seed():
    a, b = synthetic_embeddings(50, 0, "train"), synthetic_embeddings(50, 0, "val")
    assert not torch.equal(a, b)
    assert torch.equal(a, synthetic_embeddings(50, 0, "train"))
    same = torch.cosine_similarity(a.mean(0), b.mean(0), dim=0)
    other = torch.cosine_similarity(a.mean(0), synthetic_embeddings(50, 1, "train").mean(0), dim=0)
    assert same > 0.99 > other
