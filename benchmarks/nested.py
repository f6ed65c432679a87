"""The bars of the nested wing, measured against the obvious alternative in one run.

    python -m benchmarks.nested                  # stream, memory, ridge; several minutes
    python -m benchmarks.nested --only ridge     # some of it; the other figures stay

stream  one stage, 320 -> 480: joint moments and closed form, against scikit-learn's
        Ridge(solver="cholesky") followed by PCA(svd_solver="covariance_eigh") of the residual, the
        fastest it has, on the same float32 arrays; both sides alternate on the CPU, with one and
        with two threads each. CPU seconds are those of the process; the error is that of the
        eigenvalues of all sizes side by side against float64 products.
released  R^2 on held-out proteins of a chain in --chain: its own, and those of scalers fitted pair
        by pair as the released code fits them, applied as it applies them and corrected.
memory  peak resident memory of the same stage read from embedding stores on disk, by number of
        residues.
ridge   nested cross-validation over 5 x 4 folds and 21 penalties, against a loop of scikit-learn's
        Ridge, same predictions.
probe   one-hot and five draws of Gaussian noise as features of every assay in --dms, at most
        --mutants of each drawn at random, beside ProteinGym's leaderboard; the share of simulated
        probes of 12 assays, all alike, in which one of six contrasts gets a verdict.

Writes benchmarks/results/nested.json and prints it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks import DATA
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, environment, read_json, write_json
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.command_fit import HELD_OUT, MOMENTS
from distil_rank.nested.compare import compare
from distil_rank.nested.probe import SCHEMES, RidgePath, one_hot, score_features
from distil_rank.nested.released import chained
from distil_rank.nested.report import decided
from distil_rank.nested.rows import TensorRows, joint_moments
from distil_rank.proteins.store import PROVENANCE, SCHEMA, new_shard, shard_path
from distil_rank.proteins.store_index import INDEX, insert, new_index
from distil_rank.proteins.variants import read_assays

RECORD = "distil-rank/benchmark-nested/1"
OUT = ROOT / "benchmarks" / "results" / "nested.json"
SMALL, LARGE, PROTEIN = 320, 480, 250  # widths, residues per protein


@dataclass(frozen=True)
class Config:
    only: tuple[Literal["stream", "memory", "ridge", "probe", "released"], ...] = (
        "stream",
        "memory",
        "ridge",
    )
    chain: Path = ROOT / "chain"  # folder written by `nested fit`, of `released`
    mutants: int = 2000  # of an assay in `probe`
    dms: Path = DATA / "dms"  # assays of `probe`
    rows: int = 200_000  # residues of the timing; both sides are linear in it
    rounds: int = 3  # interleaved repetitions
    residues: tuple[int, ...] = field(default=(250_000, 1_000_000))  # of the memory measurement


def arrays(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw embeddings (rows, 320) and (rows, 480), float32, with a common part."""
    draw = generator(0, "benchmark")
    latent = torch.randn(rows, 200, generator=draw) * torch.logspace(0, -1, 200)

    def one(width: int) -> np.ndarray:
        mixed = latent @ torch.randn(200, width, generator=draw)
        return (mixed + 0.3 * torch.randn(rows, width, generator=draw) + 1).numpy()

    return one(SMALL), one(LARGE)


def moments_of(small: np.ndarray, large: np.ndarray, exact: bool = False) -> Moments:
    lengths = [PROTEIN] * (len(small) // PROTEIN)
    arrays = {"s": small, "l": large}
    rows = {n: TensorRows(torch.from_numpy(x), lengths) for n, x in arrays.items()}
    return joint_moments(rows, 0, exact=exact)[0]


def ours(small: np.ndarray, large: np.ndarray) -> float:
    """Residual variance kept by 160 directions, from one pass."""
    widths = {"s": SMALL, "l": LARGE}
    (stage,) = NestedChain.fit_moments(moments_of(small, large), widths, "ols").stages
    return float(stage.eigenvalues[: stage.added].sum())


def theirs(small: np.ndarray, large: np.ndarray) -> float:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge

    residual = large - Ridge(1e-6, solver="cholesky").fit(small, large).predict(small)
    pca = PCA(LARGE - SMALL, svd_solver="covariance_eigh").fit(residual)
    return float(pca.explained_variance_.sum() * (len(small) - 1) / len(small))


def stream(config: Config) -> dict[str, Any]:
    from threadpoolctl import threadpool_limits

    small, large = arrays(config.rows - config.rows % PROTEIN)
    ours(small[:5000], large[:5000]), theirs(small[:5000], large[:5000])  # warm
    cases, kept = [], {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        cpu: dict[str, list[float]] = {"ours": [], "theirs": []}
        with threadpool_limits(threads):
            for _ in range(config.rounds):
                for name, run in (("ours", ours), ("theirs", theirs)):
                    start, used = time.perf_counter(), time.process_time()
                    kept[name] = run(small, large)
                    seconds[name].append(time.perf_counter() - start)
                    cpu[name].append(time.process_time() - used)
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"])]
        ratio = {"median": median(ratios), "low": min(ratios), "high": max(ratios), "bar": 2.5}
        per_million = {name: median(values) * 1e6 / len(small) for name, values in cpu.items()}
        case = {"threads": threads, "seconds": seconds, "ratio": ratio}
        cases.append({**case, "cpu_seconds_per_million": {**per_million, "bar": 8}})
    found, exact = (
        torch.linalg.eigvalsh(moments_of(small, large, exact).covariance) for exact in (False, True)
    )
    error = {"largest_relative": float(((found - exact).abs() / exact).max()), "bar": 1e-5}
    return {
        "rows": len(small),
        "cases": cases,
        "condition": float(exact[-1] / exact[0]),
        "error_of_eigenvalues": error,
        "residual_variance_kept": kept,
    }


def released(config: Config) -> dict[str, Any]:
    chain = NestedChain.load(config.chain)
    fitted, held_out = (Moments.load(config.chain / name) for name in (MOMENTS, HELD_OUT))
    stages, start = {}, 0
    for small, large in pairwise(chain.widths):  # a stage from moments of the raw pair alone
        widths = {name: chain.widths[name] for name in (small, large)}
        pair = fitted.part(slice(start, start + sum(widths.values())))
        (stages[large],) = NestedChain.fit_moments(pair, widths, "pcr").stages
        start += widths[small]
    chains = {
        "own": chain,
        "corrected": chained(stages, chain.widths),
        "as_released": chained(stages, chain.widths, as_released=True),
    }
    r2 = {name: found.scores(held_out) for name, found in chains.items()}
    return {"rows": held_out.count, "held_out_r2": r2}


def write_store(folder: Path, width: int, residues: int) -> None:
    """A float32 store of residues in the layout of `distil-rank embed`, filled with noise."""
    folder.mkdir()
    per_shard = 131_072 // PROTEIN
    proteins = residues // PROTEIN
    shards = -(-proteins // per_shard)
    layout = {"pool": "residues", "layers": [1], "dim": width, "dtype": "float32"}
    origin = {"model": f"noise-{width}", "weights_sha256": "", "proteins_sha256": ""}
    options = {"compute": "float32", "long": "error", "max_length": 1022, "shards": shards}
    sizes = {"proteins": proteins, **dict.fromkeys(("residues", "rows"), proteins * PROTEIN)}
    provenance = {"schema": SCHEMA, **layout, **origin, **options, **sizes}
    write_json(folder / PROVENANCE, provenance)
    draw = generator(width, "store")
    noise = torch.randn(per_shard * PROTEIN, width, generator=draw)
    with new_index(folder) as index:
        for shard in range(shards):
            count = min(per_shard, proteins - shard * per_shard)
            path, rows = shard_path(folder, shard), count * PROTEIN
            with new_shard(path, [1], rows, width, torch.float32) as write:
                write(0, noise[None, :rows])
            for i in range(count):
                position = shard * per_shard + i
                place = (PROTEIN, PROTEIN, str(position), shard, i * PROTEIN, str(position))
                insert(index, "protein", position, str(position), *place)
    assert (folder / INDEX).exists()


# VmHWM, because ru_maxrss of a child starts at its parent's
PEAK = """
import re, sys, torch
from distil_rank.nested.chain import NestedChain
from distil_rank.nested.rows import StoreRows
torch.set_num_threads(1)
if len(sys.argv) > 1:
    stores = dict(zip("sl", map(StoreRows, sys.argv[1:])))
    chain = NestedChain.fit(stores, "ols", held_out=0)
    assert chain.dims == {"s": 320, "l": 480}
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def peak(*stores: Path) -> int:
    """Bytes of the largest resident set of a process that fits on these stores, or only imports."""
    command = [sys.executable, "-c", PEAK, *map(str, stores)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def memory(config: Config) -> dict[str, Any]:
    peaks = {}
    for residues in config.residues:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("s", "l")]
            for path, width in zip(paths, (SMALL, LARGE)):
                write_store(path, width, residues)
            peaks[str(residues)] = peak(*paths)
    return {"peak_bytes": peaks, "bytes_after_import": peak(), "bar": 500_000_000}


def ridge_loop(
    x: np.ndarray, y: np.ndarray, folds: np.ndarray, penalties: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Nested cross-validation by scikit-learn, one fit after the other.

    Predictions and the penalty of each outer fold.
    """
    from sklearn.linear_model import Ridge

    predictions, chosen = np.empty(len(y)), []
    numbers = np.unique(folds)
    for outer in numbers:
        errors = [
            sum(
                np.sum(
                    (
                        Ridge(alpha=penalty)
                        .fit(x[train := (folds != outer) & (folds != inner)], y[train])
                        .predict(x[folds == inner])
                        - y[folds == inner]
                    )
                    ** 2
                )
                for inner in numbers
                if inner != outer
            )
            for penalty in penalties
        ]
        chosen.append(penalties[int(np.argmin(errors))])
        model = Ridge(alpha=chosen[-1]).fit(x[folds != outer], y[folds != outer])
        predictions[folds == outer] = model.predict(x[folds == outer])
    return predictions, np.array(chosen)


def ridge(config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)
    draw = generator(0, "ridge benchmark")
    rows = []
    for n, d in ((400, 320), (400, 1280), (1000, 1280)):
        x = torch.randn(n, d, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, d)
        y = x @ torch.randn(d, generator=draw, dtype=torch.float64)
        y += torch.randn(n, generator=draw, dtype=torch.float64)
        fold = torch.arange(n) % 5
        RidgePath(x[:50]).nested(y[:50], fold[:50])  # warm
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(config.rounds):
            start = time.perf_counter()
            path = RidgePath(x)
            fast, chosen = path.nested(y, fold)
            seconds["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            slow, slow_chosen = ridge_loop(
                x.numpy(), y.numpy(), fold.numpy(), path.penalties.numpy()
            )
            seconds["theirs"].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"])]
        assert np.allclose(chosen.numpy(), slow_chosen)
        ratio = {"median": median(ratios), "low": min(ratios), "high": max(ratios), "bar": 10}
        difference = float(np.abs(fast.numpy() - slow).max() / np.abs(slow).max())
        case = {"n": n, "d": d, "seconds": seconds, "ratio": ratio}
        rows.append({**case, "largest_difference": difference})
    return {"threads": 1, "cases": rows}


LEADERBOARD = {"random": 0.58, "modulo": 0.02, "contiguous": 0.06}  # one-hot, of ProteinGym


def probe(config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)
    scores: dict[str, list[dict[str, float]]] = {"one-hot": [], "noise": []}
    mutants = {}
    for assay in read_assays(config.dms, config.mutants):
        mutants[assay.name] = n = len(assay.mutants)
        draw = generator(0, "noise", assay.name)
        noise = [score_features(torch.randn(n, 64, generator=draw), assay) for _ in range(5)]
        scores["noise"].append({s: float(np.mean([found[s] for found in noise])) for s in SCHEMES})
        scores["one-hot"].append(score_features(one_hot(assay), assay))
        print(assay.name, scores["one-hot"][-1], scores["noise"][-1], flush=True)
    rng, names, false, simulated = np.random.default_rng(0), "abcdefg", 0, 500
    for _ in range(simulated):
        drawn = {name: rng.standard_normal(12).tolist() for name in names}
        false += any(map(decided, compare(drawn, [("a", other) for other in names[1:]], seed=0)))
    return {
        "mutants": mutants,
        **{
            name: {s: float(np.mean([row[s] for row in found])) for s in SCHEMES}
            for name, found in scores.items()
        },
        "leaderboard": LEADERBOARD,
        "by_assay": scores,
        "false_verdicts": {"share": false / simulated, "simulated": simulated, "bar": 0.05},
    }


MEASUREMENTS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "stream": stream,
    "memory": memory,
    "ridge": ridge,
    "probe": probe,
    "released": released,
}


def run(config: Config) -> None:
    record: dict[str, Any] = {"schema": RECORD, "widths": [SMALL, LARGE]}
    if OUT.exists():
        record = read_json(OUT, RECORD)
    for name in config.only:
        record[name] = {**MEASUREMENTS[name](config), "environment": environment()}
        OUT.parent.mkdir(exist_ok=True)
        write_json(OUT, record)
        print(
            name,
            json.dumps({k: v for k, v in record[name].items() if k != "environment"}, indent=1),
        )


if __name__ == "__main__":
    run(tyro.cli(Config, description=__doc__))
