"""Does a nano model know more than composition? Location of proteins by a linear probe.

    python -m benchmarks.nano_deeploc   # writes benchmarks/results/nano_deeploc.json; minutes

Ten locations of the DeepLoc sets. The probe is trained on DeepLoc proteins among the nano models'
training proteins (or related to them) and tested on DeepLoc proteins that were held out: no near
relative of a test protein was seen by the probe or by the language model. Multinomial logistic
regression on standardised features; its strength is chosen for each feature set by cross-validation
on the training proteins. The baseline is the composition of 20 amino acids, and an untrained model
of the same size is given beside it. Intervals: bootstrap over test proteins, the same draws for
all.
"""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.nano_data import DATA, DEEPLOC, input_hashes, split
from distil_rank.core.intervals import bootstrap_counts, percentile_interval
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, environment, interval, sha256, write_json
from distil_rank.proteins.checkpoints import load_model
from distil_rank.proteins.esm2 import ESM2
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_sequence, read_fasta
from distil_rank.proteins.pooling import embed

SCHEMA = "nano-deeploc/1"
MODELS = ("nano-64", "nano-256")
OUT = ROOT / "benchmarks" / "results" / "nano_deeploc.json"


def labelled() -> dict[str, str]:
    """Location of each sequence, from headers like `Q9H400 Cell.membrane-M test`; not of two."""
    found = {}
    for source in DEEPLOC:
        for protein in read_fasta(DATA / source):
            location = protein.header.split()[1].rpartition("-")[0]
            if location != "Cytoplasm-Nucleus":
                found[clean_sequence(protein.sequence)] = location
    return found


def composition(sequences: list[str]) -> NDArray[np.float64]:
    return np.array([[s.count(a) / len(s) for a in AMINO_ACIDS] for s in sequences])


def untrained(model: ESM2) -> ESM2:
    """The same architecture with random matrices of the same standard deviation."""
    weights = generator(0, "untrained")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, float(parameter.std()), generator=weights)
    return model


def probe(x: NDArray, y: NDArray, x_test: NDArray) -> tuple[NDArray, float]:
    """Predicted classes and the chosen regularisation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    grid = {"logisticregression__C": [1e-3, 1e-2, 0.1, 1.0, 10.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unconverged fit of the grid is simply not chosen
        search = GridSearchCV(pipeline, grid, scoring="balanced_accuracy", cv=folds).fit(x, y)
    return search.predict(x_test), search.best_params_["logisticregression__C"]


def main() -> None:
    parts, places = split(), labelled()
    held_out = {protein.sequence for protein in parts.held_out}
    train = [s for s in places if s not in held_out]
    test = [s for s in places if s in held_out]
    classes, codes = np.unique([places[s] for s in train + test], return_inverse=True)
    y, y_test = codes[: len(train)], codes[len(train) :]
    features = {"composition": composition(train + test)}
    for name in MODELS:
        model = load_model(name).model
        features[name] = vectors(model, train + test)
        if name == MODELS[-1]:
            features[f"{name}, untrained"] = vectors(untrained(model), train + test)
    correct, results = {}, {}
    draws = bootstrap_counts(len(test), 1000, generator(0, "bootstrap")).numpy()
    one_hot = np.eye(len(classes))[y_test]
    for name, x in features.items():
        predicted, strength = probe(x[: len(train)], y, x[len(train) :])
        correct[name] = (predicted == y_test).astype(float)
        sampled = (draws @ (correct[name][:, None] * one_hot)) / np.maximum(draws @ one_hot, 1)
        balanced = float(((correct[name] @ one_hot) / one_hot.sum(0)).mean())
        difference = (draws @ (correct[name] - correct["composition"])) / len(test)
        results[name] = {
            "features": x.shape[1],
            "C": strength,
            "accuracy": interval(
                float(correct[name].mean()),
                *percentile_interval(draws @ correct[name] / len(test)),
                True,
            ),
            "balanced_accuracy": interval(balanced, *percentile_interval(sampled.mean(1)), True),
            "accuracy_above_composition": interval(
                float((correct[name] - correct["composition"]).mean()),
                *percentile_interval(difference),
                True,
            ),
        }
        print(
            name,
            {k: round(v["value"], 4) for k, v in results[name].items() if isinstance(v, dict)},
            flush=True,
        )
    counts = {
        str(place): [int((y == i).sum()), int((y_test == i).sum())]
        for i, place in enumerate(classes)
    }
    record = {
        "schema": SCHEMA,
        "data": {
            "sha256": {k: v for k, v in input_hashes().items() if k in DEEPLOC},
            "train_and_test_by_class": counts,
        },
        "weights_sha256": {name: sha256(ROOT / "models" / f"{name}.pt") for name in MODELS},
        "n_train": len(train),
        "n_test": len(test),
        "results": results,
        "environment": environment(),
        "machine_dependent": ["environment"],
    }
    write_json(OUT, record)


def vectors(model: ESM2, sequences: list[str]) -> NDArray[np.float64]:
    """Mean-pooled embeddings (n, d) of the first 512 residues."""
    rows = dict(embed(model, [sequence[:512] for sequence in sequences]))
    return np.stack([rows[i][0, 0].double().numpy() for i in range(len(sequences))])


if __name__ == "__main__":
    main()
