"""Compare low-rank students of a linear layer on protein embeddings with the best possible one.

python main.py                                # the full comparison, writes results/
python main.py --quick                        # the same in seconds, writes results/quick/
python main.py --train a.pt --val b.npy       # your embeddings: .pt, .npy, .npz (key X), ...
python main.py --teacher head.safetensors --key classifier.dense --rank 32    # and your layer
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, at_least, one_line_errors
from distil_rank.core.intervals import bootstrap_counts
from distil_rank.core.latency import compare_latency
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.lowrank import optimum, refit_bias, truncated_svd
from distil_rank.core.moments import Moments
from distil_rank.core.randomness import generator
from distil_rank.core.records import Record, atomic_files, require_writable, write_json
from distil_rank.core.tables import framed
from distil_rank.core.weights import load_layer
from distil_rank.experiment import report
from distil_rank.experiment.data import load_pair
from distil_rank.experiment.fidelity import cosine_bound, fvu, rank_curves, row_errors, summarize
from distil_rank.experiment.students import Constant, Recipe, distill
from distil_rank.experiment.summary import familiar_keys, header, passport, plotted, ranks_for
from distil_rank.experiment.teachers import random_teacher, spectral_teacher, task_trained_teachers
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
    teacher: Path | None = None  # your own layer, .pt or .safetensors, beside the three teachers
    key: str | None = None  # which layer of a file, for instance classifier.dense
    rank: int | None = None  # rank of every student; default: d / 20, at least 1
    seeds: int = 5  # number of seeds: each has its own teachers and batches
    steps: int = 1000  # steps of the optimizer
    teacher_steps: int = 500  # training steps of the task-trained teacher
    latency_batches: tuple[int, ...] = ()  # batch sizes to time beside 1, 32 and 512
    rounds: int = 50  # interleaved timings of teacher and student
    bootstrap: int = 1000  # bootstrap draws behind every interval
    threads: int = 1  # threads while timing on a CPU
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    out: Path | None = None  # where to write; default: results, with --quick results/quick
    quick: bool = False  # few steps, seeds and draws


PLAIN = Recipe()  # constant learning rate, AdamW's default decay, the teacher's bias
# warm-up and schedule, no decay, centered inputs, and a bias refitted before
IMPROVED = replace(PLAIN, weight_decay=0.0, warmup=0.1, decay_lr=True, center=True)
FVU_TARGETS = (0.10, 0.05, 0.01)
SYNTHETIC = "synthetic, matched to published statistics of ESM-2 650M"
SYNTHETIC_NOTICE = (
    "SYNTHETIC embeddings are used: asked for, or embeddings_train.pt and _val.pt are not here.",
    "They match published statistics of ESM-2 650M; no figure below is about real proteins.",
)
CONSTANT, SVD, SVD_BIAS = "constant (mean output)", "truncated SVD", "truncated SVD, bias refitted"
PLAIN_DISTILLED, DISTILLED = "distilled, plain recipe", "distilled"
OPTIMUM, FLOOR = "optimum", "floor (held out)"
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
def make_teachers(config: Config, x: Tensor, user: nn.Linear | None) -> dict[str, Layers]:
    """Each teacher once a seed; of the user's own layer only the students' batches differ."""
    dim, seeds = x.shape[1], list(range(config.seeds))
    teachers = {
        "Random": [random_teacher(dim, seed) for seed in seeds],
        "Task-Trained": task_trained_teachers(x, seeds, config.teacher_steps),
        "Spectral": [spectral_teacher(dim, seed) for seed in seeds],
    }
    if user is not None and config.teacher is not None:
        teachers[f"User ({config.teacher.stem})"] = [user] * config.seeds
    return {name: [t.to(x.device, torch.float32) for t in ts] for name, ts in teachers.items()}


# 4. Students --------------------------------------------------------------------------------------
def make_students(
    name: str, teachers: Layers, x: Tensor, x_val: Tensor, rank: int, steps: int, bar: tqdm
) -> tuple[Students, dict[str, Tensor], dict[str, Tensor]]:
    """Fit every student on the training rows; only the floor sees the held-out ones.

    Returns the students, the loss of every distillation step (seeds, steps) and the curves over
    all ranks (d + 1,), averaged over seeds.
    """
    moments, held_out = Moments.of(x), Moments.of(x_val)
    weights = [t.weight.detach() for t in teachers]
    biases = [x.new_zeros(len(t.weight)) if t.bias is None else t.bias.detach() for t in teachers]
    outputs = torch.stack([torch.addmm(c, x, w.T) for w, c in zip(weights, biases)])

    # truncated SVD: as it is, with the bias refitted, and as the warm start of distillation
    svd = [truncated_svd(w, rank) for w in weights]
    mean = moments.mean.float()
    refitted = [refit_bias(w, c, A, B, mean) for w, c, (A, B) in zip(weights, biases, svd)]
    students: Students = {
        CONSTANT: [Constant(y.mean(0)) for y in outputs],
        SVD: [LowRankLinear(A, B, c) for (A, B), c in zip(svd, biases)],
        SVD_BIAS: [LowRankLinear(A, B, c) for (A, B), c in zip(svd, refitted)],
    }
    A, B = (torch.stack(factors) for factors in zip(*svd))
    losses = {}
    for label, recipe, bias in ((PLAIN_DISTILLED, PLAIN, biases), (DISTILLED, IMPROVED, refitted)):
        batches = [generator(seed, "batches", name) for seed in range(len(teachers))]  # the same
        start, recipe = (A, B, torch.stack(bias)), replace(recipe, steps=steps)
        *trained, losses[label] = distill(x, outputs, start, recipe, batches, bar.update)
        students[label] = [LowRankLinear(*parts) for parts in zip(*trained)]

    # the closed form, and the curve over all ranks from the same eigendecomposition
    solutions = [optimum(w, c, moments) for w, c in zip(weights, biases)]
    students[OPTIMUM] = [solution.student(rank, torch.float32) for solution in solutions]
    floors = [optimum(w, c, held_out, rank) for w, c in zip(weights, biases)]
    students[FLOOR] = [floor.student(rank) for floor in floors]
    curves = [rank_curves(solution, t(x_val)) for solution, t in zip(solutions, teachers)]
    mean_curve = {key: torch.stack([c[key] for c in curves]).mean(0) for key in curves[0]}
    return students, losses, mean_curve


# 5. Fidelity on held-out rows ---------------------------------------------------------------------
def measure(
    students: Students,
    teachers: Layers,
    x: Tensor,
    x_val: Tensor,
    rank: int,
    draws: Tensor,
) -> tuple[dict[str, Record], Record]:
    """Every metric of every student, paired with the optimum; and the bound on any cosine."""
    outputs = [(teacher(x), teacher(x_val)) for teacher in teachers]
    rows, measured = {}, {}
    for label, layers in students.items():
        dtype = torch.float64 if label == FLOOR else torch.float32  # a bound is not rounded
        pairs = list(zip(outputs, layers))
        train_fvu = [fvu(y, layer(x.to(dtype))) for (y, _), layer in pairs]
        rows[label] = [row_errors(y_val, layer(x_val.to(dtype))) for (_, y_val), layer in pairs]
        measured[label] = {"train_fvu": train_fvu}
    for label, errors in rows.items():
        for found, floor in zip(errors, rows[FLOOR]):
            if found.fvu < floor.fvu * (1 - 1e-6) - 1e-12:
                raise AssertionError(f"{label}: FVU {found.fvu} is below its floor {floor.fvu}")
        reference = None if label in (OPTIMUM, FLOOR) else rows[OPTIMUM]
        measured[label] = summarize(errors, draws, reference) | measured[label]
    bounds = [cosine_bound(y_val, rank) for _, y_val in outputs]
    mean = sum(bounds) / len(bounds)
    return measured, {"value": mean, "per_seed": bounds, "higher_is_better": True}


# 6. The whole experiment --------------------------------------------------------------------------
@torch.no_grad()
def run(config: Config) -> tuple[Record, Record]:
    """Validate, compare, measure and time: the summary and the curves."""
    device = pick_device(config.device)
    x, x_val, data = load_data(config)
    user = None if config.teacher is None else load_layer(config.teacher, config.key)
    rank = max(1, x.shape[1] // 20) if config.rank is None else config.rank
    check_layer(x, user, rank)
    if data["source"] == SYNTHETIC:
        print(framed(*SYNTHETIC_NOTICE))
    x, x_val = x.to(device), x_val.to(device)
    draws = bootstrap_counts(len(x_val), config.bootstrap, generator(0, "bootstrap")).to(device)
    teachers = make_teachers(config, x, user)
    inputs = [x[:1].repeat(n, 1) for n in sorted({1, 32, 512, *config.latency_batches})]
    experiments, curves, timings = {}, {}, {}
    total = 2 * len(teachers) * config.steps
    with tqdm(total=total, desc="distilling", unit="step", disable=None, leave=False) as bar:
        for name, layers in teachers.items():
            arguments = layers, x, x_val, rank
            students, losses, curve = make_students(name, *arguments, config.steps, bar)
            measured, bound = measure(students, *arguments, draws)
            teacher, student = layers[0], students[DISTILLED][0]
            shape = teacher.weight.shape
            if shape not in timings:  # latency depends on the shape alone
                limits = config.rounds, config.threads
                timings[shape] = compare_latency(teacher, student, inputs, *limits)
            svd, distilled, best = (measured[label] for label in (SVD, DISTILLED, OPTIMUM))
            experiments[name] = {
                **familiar_keys(svd, distilled, timings[shape], teacher, student),
                "students": measured,
                "verdict": report.verdict(distilled["fvu_minus_optimum"], best["fvu"]),
                "cosine_bound": bound,
                "rank_for_fvu": ranks_for(FVU_TARGETS, curve),
                "latency": timings[shape],
            }
            curves[name] = plotted(curve, losses, teacher.weight)
    head = header(data, x, x_val, rank)
    made = passport(config, {PLAIN_DISTILLED: asdict(PLAIN), DISTILLED: asdict(IMPROVED)}, device)
    seeds = list(range(config.seeds))
    summary = {"schema": report.SCHEMA, **head, "seeds": seeds, "experiments": experiments, **made}
    return summary, {"schema": report.CURVES_SCHEMA, **head, "experiments": curves}


# 7. What the user may ask for ---------------------------------------------------------------------
def check(config: Config) -> Config:
    """Reject impossible options, then apply --quick."""
    counts = ("seeds", "steps", "teacher_steps", "rounds", "bootstrap", "threads")
    at_least(1, **{name: getattr(config, name) for name in counts})
    at_least(1, latency_batches=min(config.latency_batches, default=1))
    if (config.train is None) != (config.val is None):
        raise InputError("--train and --val required, got one of them; give the other, or neither")
    if config.synthetic and config.train:
        raise InputError("--synthetic or --train and --val required, got both; choose one")
    if config.key is not None and config.teacher is None:
        raise InputError("--teacher FILE required, in which --key chooses a layer; give it")
    out = config.out or Path("results", "quick" if config.quick else "")
    if not config.quick:
        return replace(config, out=out)
    seeds, steps = min(config.seeds, 2), min(config.steps, 100)
    few = replace(config, out=out, seeds=seeds, steps=steps, teacher_steps=50)
    return replace(few, bootstrap=200, rounds=20)


def check_layer(x: Tensor, user: nn.Linear | None, rank: int) -> None:
    """The user's layer must take these embeddings, and the rank must fit every layer."""
    dim = x.shape[1]
    if user is not None and user.in_features != dim:
        raise InputError(f"a teacher of {dim} inputs required, got one of {user.in_features}")
    outputs = None if user is None else user(x.to(user.weight))
    if outputs is not None and bool((outputs == outputs[0]).all()):
        raise InputError("a teacher whose output varies required, got a constant; check --key")
    limit = min(dim, dim if user is None else user.out_features)
    if not 1 <= rank <= limit:
        raise InputError(f"--rank must be between 1 and {limit} for these layers, got {rank}")


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, prog="python main.py", description=__doc__, args=arguments)
    with one_line_errors("main.py"):
        config = check(config)
        out = require_writable(config.out or "")
        summary, curves = run(config)
        with atomic_files(out) as folder:  # the three files change together, at the end
            write_json(folder / report.CURVES, curves)
            write_json(folder / report.SUMMARY, summary)
            report.draw(folder)
        print(report.closing_table(summary))
        print(f"written: {out}/{report.SUMMARY}, {report.CURVES}, {report.PNG}")


if __name__ == "__main__":
    main()
