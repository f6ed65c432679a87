"""Compare low-rank students of a linear layer on protein embeddings with the best possible one.

python main.py                                # the full comparison, writes results/
python main.py --quick                        # the same in seconds, writes results/quick/
python main.py --train a.pt --val b.npy       # your embeddings: .pt, .npy, .npz (key X), ...
python main.py --teacher head.safetensors --key classifier.dense --rank 32    # and your layer
python main.py --train a.pt --val b.pt --teacher head.onnx --labels y.npy     # or a whole head
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from distil_rank.compress.head_students import compare
from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, at_least, one_line_errors
from distil_rank.core.heads import Head, load_head
from distil_rank.core.intervals import bootstrap_counts
from distil_rank.core.latency import compare_latency
from distil_rank.core.linear import LowRankLinear, linear
from distil_rank.core.lowrank import optimum, refit_bias, truncated_svd
from distil_rank.core.randomness import generator
from distil_rank.core.records import Record, atomic_files, require_writable, write_json
from distil_rank.core.tables import framed
from distil_rank.experiment import fidelity, report, students, summary, tables, teachers
from distil_rank.experiment.data import Rows, fitting_rank, load_pair
from distil_rank.proteins.synthetic import synthetic_embeddings

ROOT = Path(__file__).resolve().parent


# 1. What is compared ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    train: Path | None = None  # embeddings to fit on (n, d)
    val: Path | None = None  # held-out embeddings (n, d)
    data_source: str = ""  # name of the data in tables; default: from embeddings.json
    embedding_model: str = ""  # model behind the embeddings; default: from embeddings.json
    synthetic: bool = False  # synthetic embeddings even where embeddings_train.pt is here
    teacher: Path | None = None  # your own layer or head (.onnx, .pt, .safetensors) beside three
    key: tuple[str, ...] = ()  # names of the layers in order, or a common prefix
    # between the layers of a head
    activation: Literal["relu", "gelu", "tanh", "silu", "sigmoid", "identity"] | None = None
    labels: Path | None = None  # one label a row of --val, else of --train: .npy, .npz, .pt, .csv
    rank: int | None = None  # rank of every student; default: d / 20, at least 1
    seeds: int = 5  # number of seeds: each has its own teachers and batches
    steps: int = 1000  # steps of the optimizer
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    out: Path | None = None  # where to write; default: results, with --quick results/quick
    quick: bool = False  # few steps, seeds and draws


PLAIN = students.Recipe()  # constant learning rate, AdamW's default decay, the teacher's bias
# warm-up and schedule, no decay, centered inputs, and a bias refitted before
IMPROVED = replace(PLAIN, weight_decay=0.0, warmup=0.1, decay_lr=True, center=True)
EFFORT = {False: (500, 50, 1000), True: (50, 20, 200)}  # denoisers' steps, timings, draws; --quick
BATCHES = [1, 32, 512]  # rows whose latency is measured
SYNTHETIC = "synthetic, matched to published statistics of ESM-2 650M"
CONSTANT, SVD, SVD_BIAS = "constant (mean output)", "truncated SVD", "truncated SVD, bias refitted"
PLAIN_DISTILLED, DISTILLED = "distilled, plain recipe", "distilled"
OPTIMUM, SHRUNK, FLOOR = "optimum", "optimum, shrunk", "floor (held out)"
Layers = list[nn.Linear]  # one a seed
Students = dict[str, list[nn.Module]]  # by label, one a seed


# 2. Data ------------------------------------------------------------------------------------------
def load_data(config: Config) -> tuple[Tensor, Tensor, Record]:
    """Training and held-out embeddings in float32, and what is known about them."""
    train = config.train or ROOT / "embeddings_train.pt"
    val = config.val or ROOT / "embeddings_val.pt"
    if config.synthetic or not (config.train or train.exists() or val.exists()):
        n_train, n_val = (1500, 500) if config.quick else (4000, 1000)
        x, x_val = synthetic_embeddings(n_train, 0, "train"), synthetic_embeddings(n_val, 0, "val")
        return x, x_val, {"source": SYNTHETIC, "model": None, "sha256": None, "files": None}
    return load_pair(train, val, config.data_source, config.embedding_model)


# 3. Teachers --------------------------------------------------------------------------------------
def make_teachers(
    config: Config, rows: Rows, user: Head | None
) -> tuple[dict[str, Layers], dict[str, Record]]:
    """Each teacher once a seed (the user's layer is the same), and what a task-trained is worth."""
    dim, seeds = rows.x.shape[1], list(range(config.seeds))
    denoisers = teachers.task_trained_teachers(rows.x, seeds, EFFORT[config.quick][0])
    task = teachers.denoising(denoisers, rows.moments, rows.held_out)
    denoiser = "Task-Trained" if task["trained"] else "Denoiser (not trained)"
    made = {
        "Random": [teachers.random_teacher(dim, seed) for seed in seeds],
        denoiser: denoisers,
        "Spectral": [teachers.spectral_teacher(dim, seed) for seed in seeds],
    }
    if user is not None and len(user) == 1 and isinstance(user[0], nn.Linear):
        made[f"User ({user.name})"] = [user[0]] * config.seeds
    moved = {name: [t.to(rows.x.device, torch.float32) for t in ts] for name, ts in made.items()}
    return moved, {denoiser: {"task": task}}


# 4. Students --------------------------------------------------------------------------------------
def make_students(
    name: str, layers: Layers, rows: Rows, rank: int, steps: int, bar: tqdm
) -> tuple[Students, Record, dict[str, Tensor], dict[str, Tensor]]:
    """Fit every student on the training rows; only the floor sees the held-out ones.

    Also what was chosen, the loss of every step (seeds, steps), and mean curves by rank (d + 1,).
    """
    x, mean = rows.x, rows.moments.mean.float()
    weights = [t.weight.detach() for t in layers]
    biases = [x.new_zeros(len(t.weight)) if t.bias is None else t.bias.detach() for t in layers]
    outputs = x.new_empty(len(layers), len(x), len(weights[0]))
    for i, (w, c) in enumerate(zip(weights, biases)):
        torch.addmm(c, x, w.T, out=outputs[i])

    # truncated SVD: as it is, with the bias refitted, and as the warm start of distillation
    svd = [truncated_svd(w, rank) for w in weights]
    refitted = [refit_bias(w, c, A, B, mean) for w, c, (A, B) in zip(weights, biases, svd)]
    made: Students = {
        CONSTANT: [linear(torch.zeros_like(w), y.mean(0)) for w, y in zip(weights, outputs)],
        SVD: [LowRankLinear(A, B, c) for (A, B), c in zip(svd, biases)],
        SVD_BIAS: [LowRankLinear(A, B, c) for (A, B), c in zip(svd, refitted)],
    }
    A, B = (torch.stack(factors) for factors in zip(*svd))
    plain, best = (replace(recipe, steps=steps) for recipe in (PLAIN, IMPROVED))
    start, source = (A, B, torch.stack(refitted)), partial(generator, 0, "pilot", name)
    best, chosen = students.pilot(x, outputs, start, best, source, bar.update)
    losses = {}
    for label, recipe, bias in ((PLAIN_DISTILLED, plain, biases), (DISTILLED, best, refitted)):
        batches = [generator(seed, "batches", name) for seed in range(len(layers))]  # the same
        start = A, B, torch.stack(bias)
        *trained, losses[label] = students.distill(x, outputs, start, recipe, batches, bar.update)
        made[label] = [LowRankLinear(*parts) for parts in zip(*trained)]
    del outputs  # as large as the rows, times seeds

    # the closed form, and the curve over all ranks from the same eigendecomposition
    solutions = [optimum(w, c, rows.moments) for w, c in zip(weights, biases)]
    made[OPTIMUM] = [solution.student(rank, torch.float32) for solution in solutions]
    made[SHRUNK], weight = students.shrunk(layers, rows.folds, rank)
    floors = [optimum(w, c, rows.held_out, rank) for w, c in zip(weights, biases)]
    made[FLOOR] = [floor.student(rank) for floor in floors]
    curves = [fidelity.rank_curves(s, t(rows.x_val)) for s, t in zip(solutions, layers)]
    mean_curve = {key: torch.stack([c[key] for c in curves]).mean(0) for key in curves[0]}
    return made, {"pilot": chosen, "shrinkage": weight}, losses, mean_curve


# 5. Fidelity on held-out rows ---------------------------------------------------------------------
def measure(
    made: Students, layers: Layers, rows: Rows, rank: int, draws: Tensor
) -> tuple[dict[str, Record], Record]:
    """Every metric of every student, paired with the optimum; and the bound on any cosine."""
    outputs = [teacher(rows.x_val) for teacher in layers]
    train_fvu: dict[str, list[float]] = {label: [] for label in made}
    for i, teacher in enumerate(layers):  # outputs of one seed at a time
        y = teacher(rows.x)
        for label, fitted in made.items():
            train_fvu[label].append(fidelity.fvu(y, fitted[i], rows.x))
    errors, measured = {}, {}
    for label, fitted in made.items():
        dtype = torch.float64 if label == FLOOR else torch.float32  # a bound is not rounded
        x_val = rows.x_val.to(dtype)
        errors[label] = [fidelity.row_errors(y, s(x_val)) for y, s in zip(outputs, fitted)]
    for label, found in errors.items():
        for seed, floor in zip(found, errors[FLOOR]):
            if seed.fvu < floor.fvu * (1 - 1e-6) - 1e-12:
                raise AssertionError(f"{label}: FVU {seed.fvu} is below its floor {floor.fvu}")
        reference = None if label in (OPTIMUM, FLOOR) else errors[OPTIMUM]
        metrics = fidelity.summarize(found, draws, reference)
        metrics = fidelity.without_intervals(metrics) if label == FLOOR else metrics
        measured[label] = metrics | {"train_fvu": train_fvu[label]}
    bounds = [fidelity.cosine_bound(y, rank) for y in outputs]
    bound = sum(bounds) / len(bounds)
    return measured, {"value": bound, "per_seed": bounds, "higher_is_better": True}


# 6. The whole experiment --------------------------------------------------------------------------
@torch.no_grad()
def run(config: Config) -> tuple[Record, Record]:
    """Validate, compare, measure and time: the summary and the curves."""
    device = pick_device(config.device)
    x, x_val, data = load_data(config)
    given = load_head(config.teacher, config.key, config.activation) if config.teacher else None
    rank = fitting_rank(x, given, config.rank)
    rows = Rows.of(x.to(device), x_val.to(device))
    _, rounds, count = EFFORT[config.quick]
    own: Record = {}
    if given and (len(given) > 1 or config.labels):  # a head, whose function is to be kept
        whole = given.whole.to(device)
        own["head"] = {"name": given.name, **compare(whole, rows.x, rows.x_val, config.labels)}
    draws = bootstrap_counts(len(x_val), count, generator(0, "bootstrap")).to(device)
    taught, known = make_teachers(config, rows, given)
    head = summary.header(data, x, x_val, rank, known)
    if head["notices"]:
        print(framed(*head["notices"]))
    claim = summary.claim(BATCHES, rounds, device)
    timings = {(summary.CLAIM, summary.CLAIM_RANK): claim["latency"]}  # of a shape and a rank
    experiments, curves = {}, {}
    total = len(taught) * (2 * config.steps + students.pilot_steps(config.steps))
    with tqdm(total=total, desc="distilling", unit="step", disable=None, leave=False) as bar:
        for name, layers in taught.items():
            fitted = make_students(name, layers, rows, rank, config.steps, bar)
            made, chosen, losses, curve = fitted
            measured, bound = measure(made, layers, rows, rank, draws)
            teacher, student = layers[0], made[DISTILLED][0]
            shape = (tuple(teacher.weight.shape), rank)
            if shape not in timings:
                inputs = [rows.x[:1].repeat(n, 1) for n in BATCHES]
                timings[shape] = compare_latency(teacher, student, inputs, rounds)
            svd, distilled, best = (measured[label] for label in (SVD, DISTILLED, OPTIMUM))
            experiments[name] = {
                **summary.familiar_keys(svd, distilled, timings[shape], teacher, student),
                "shape": list(teacher.weight.shape),
                **known.get(name, {}),
                **chosen,
                "students": measured,
                "verdict": tables.verdict(distilled["fvu_minus_optimum"], best["fvu"]),
                "bracket": summary.bracket(best),
                "cosine_bound": bound,
                "rank_for_fvu": summary.ranks_for((0.10, 0.05, 0.01), curve),
                "latency": timings[shape],
            }
            curves[name] = summary.plotted(curve, losses, teacher.weight)
    recipes = {PLAIN_DISTILLED: asdict(PLAIN), DISTILLED: asdict(IMPROVED) | {"lr": students.RATES}}
    found = {
        "schema": report.SCHEMA,
        **head,
        **own,
        "seeds": list(range(config.seeds)),
        "experiments": experiments,
        "claim": claim,
        **summary.passport(config, recipes, device),
    }
    return found, {"schema": report.CURVES_SCHEMA, **head, "experiments": curves}


# 7. What the user may ask for ---------------------------------------------------------------------
def check(config: Config) -> Config:
    """Reject impossible options, then apply --quick."""
    at_least(1, seeds=config.seeds, steps=config.steps)
    if (config.train is None) != (config.val is None):
        raise InputError("--train and --val required, got one of them; give the other, or neither")
    if config.synthetic and config.train:
        raise InputError("--synthetic or --train and --val required, got both; choose one")
    if (config.key or config.activation or config.labels) and config.teacher is None:
        raise InputError("--teacher FILE required beside --key, --activation, --labels; give it")
    seeds, steps = (2, 100) if config.quick else (config.seeds, config.steps)
    out = config.out or Path("results", "quick" if config.quick else "")
    return replace(config, out=out, seeds=min(seeds, config.seeds), steps=min(steps, config.steps))


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, prog="python main.py", description=__doc__, args=arguments)
    with one_line_errors("main.py"):
        config = check(config)
        out = require_writable(config.out or "")
        found, curves = run(config)
        with atomic_files(out) as folder:  # the three files change together, at the end
            write_json(folder / report.CURVES, curves)
            write_json(folder / report.SUMMARY, found)
            report.draw(folder)
        print(tables.closing_table(found))
        print(f"written: {out}/{report.SUMMARY}, {report.CURVES}, {report.PNG}")


if __name__ == "__main__":
    main()
