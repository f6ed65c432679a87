"""Compare low-rank students of a linear layer on protein embeddings, against the best that is possible.

python main.py                                   # the full comparison, writes results/
python main.py --quick                           # the same in seconds, writes results/quick/
python main.py --train a.pt --val b.npy          # your embeddings: .pt, .npy, .npz (key X), .safetensors
python main.py --teacher head.safetensors --key classifier.dense --rank 32    # and your own layer
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from distil_rank.core.errors import InputError, one_line_errors
from distil_rank.experiment import report, tables
from distil_rank.experiment.cosine import cosine_aware_optimum, cosine_bound
from distil_rank.experiment.fidelity import RowErrors, fvu, row_errors, summarise
from distil_rank.experiment.latency import compare_latency, parameters
from distil_rank.core.lowrank import LowRankLinear, optimum, refit_bias, smallest_rank, truncated_svd
from distil_rank.experiment.rank_curve import floor_curve, held_out_curve
from distil_rank.experiment.students import Constant, Recipe, distil
from distil_rank.experiment.teachers import load_teacher, random_teacher, spectral_teacher, task_trained_teachers
from distil_rank.proteins.embedding_files import load_matrix, provenance
from distil_rank.proteins.synthetic import synthetic_embeddings
from distil_rank.core.randomness import generator
from distil_rank.core.records import ROOT, config_record, environment, require_writable, sha256, shown_path, write_json
from distil_rank.core.intervals import bootstrap_counts
from distil_rank.core.moments import Moments


# 1. What is compared ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    train: Path | None = None  # embeddings to fit on (n, d); default: embeddings_train.pt, or synthetic without it
    val: Path | None = None  # held-out embeddings (n, d); every reported figure is measured on them
    source: str = ""  # name of the data in tables and figures; default: from embeddings.json, or the file name
    model: str = ""  # name of the model behind the embeddings; default: from embeddings.json
    synthetic: bool = False  # synthetic embeddings even where embeddings_train.pt is here
    teacher: Path | None = None  # your own layer beside the three: .pt or .safetensors with weight and bias
    key: str | None = None  # which layer of that file, for instance classifier.dense
    rank: int | None = None  # rank of every student; default: d / 20, at least 1
    seeds: int = 5  # number of seeds: each has its own teachers and batches
    steps: int = 1000  # distillation steps
    teacher_steps: int = 500  # training steps of the task-trained teacher
    batch: tuple[int, ...] = ()  # batch sizes to time beside 1, 32 and 512
    rounds: int = 50  # interleaved timings of teacher and student
    bootstrap: int = 1000  # bootstrap draws behind every interval
    threads: int = 1  # threads while timing on a CPU
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto takes CUDA where there is one
    out: Path = Path("results")  # folder for the JSON files and the PNG
    quick: bool = False  # few steps, seeds and draws; writes OUT/quick


PLAIN = Recipe()  # constant learning rate, AdamW's default decay, the teacher's bias
IMPROVED = replace(PLAIN, weight_decay=0.0, warmup=0.1, decay_lr=True, centre=True)  # and a bias refitted before
FVU_TARGETS = (0.10, 0.05, 0.01)
TIMED = ("latency", "latency_teacher_ms", "latency_student_ms", "speedup")
SYNTHETIC = "synthetic, matched to published statistics of ESM-2 650M"
SYNTHETIC_NOTICE = (
    "SYNTHETIC embeddings are used: asked for, or embeddings_train.pt and embeddings_val.pt are not here.",
    "They match published statistics of ESM-2 650M; no figure below is about real proteins.",
)
CONSTANT, SVD, SVD_BIAS = "constant (mean output)", "truncated SVD", "truncated SVD, bias refitted"
PLAIN_DISTILLED, DISTILLED = "distilled, plain recipe", "distilled"
OPTIMUM, COSINE_AWARE, FLOOR = "optimum", "optimum, cosine-aware", "floor (held out)"


# 2. Data ---------------------------------------------------------------------------------------------------------------
def load_data(config: Config) -> tuple[Tensor, Tensor, dict[str, object]]:
    """Training and held-out embeddings in float32, and what is known about them."""
    if (config.train is None) != (config.val is None):
        raise InputError("both --train and --val are required, got one of them; give the other, or neither")
    paths = [config.train or ROOT / "embeddings_train.pt", config.val or ROOT / "embeddings_val.pt"]
    if config.synthetic or (config.train is None and not any(path.exists() for path in paths)):
        n_train, n_val = (1500, 500) if config.quick else (4000, 1000)
        x, x_val = synthetic_embeddings(n_train, 0, "train"), synthetic_embeddings(n_val, 0, "val")
        return x, x_val, {"source": SYNTHETIC, "model": None, "sha256": None, "files": None}
    x, x_val = (load_matrix(path).float() for path in paths)
    if x.shape[1] != x_val.shape[1]:
        raise InputError(f"train and val of one width required, got {x.shape[1]} and {x_val.shape[1]} features")
    known = provenance(paths[0])
    record = {
        "source": config.source or known.get("source") or shown_path(paths[0]),
        "model": config.model or known.get("model"),
        "sha256": {"train": sha256(paths[0]), "val": sha256(paths[1])},
        "files": [shown_path(path) for path in paths],
    }
    return x, x_val, record


# 3. Teachers -----------------------------------------------------------------------------------------------------------
def make_teachers(config: Config, x: Tensor, user: nn.Linear | None) -> dict[str, list[nn.Linear]]:
    """Each teacher once a seed. The user's own layer is the same for every seed: only its students' batches differ."""
    dim, seeds = x.shape[1], list(range(config.seeds))
    teachers = {
        "Random": [random_teacher(dim, seed) for seed in seeds],
        "Task-Trained": task_trained_teachers(x, seeds, config.teacher_steps),
        "Spectral": [spectral_teacher(dim, seed) for seed in seeds],
    }
    if user is not None and config.teacher is not None:
        teachers[f"User ({config.teacher.stem})"] = [user] * config.seeds
    return {name: [layer.to(x.device, torch.float32) for layer in layers] for name, layers in teachers.items()}


# 4. Students -----------------------------------------------------------------------------------------------------------
@dataclass
class Comparison:
    """The students of one teacher, a list over seeds each, and what is known of every rank."""

    teachers: list[nn.Linear]
    students: dict[str, list[Any]]
    losses: dict[str, Tensor]  # distillation loss (seeds, steps)
    curves: list[dict[str, Tensor]]  # FVU and cosine at rank 0 ... d


def compare(
    name: str, teachers: list[nn.Linear], x: Tensor, x_val: Tensor, rank: int, config: Config, bar: tqdm
) -> Comparison:
    """Fit every student on the training rows; only the floor sees the held-out ones."""
    moments, held_out = Moments.of(x), Moments.of(x_val)
    weights = [t.weight.detach() for t in teachers]
    biases = [x.new_zeros(len(t.weight)) if t.bias is None else t.bias.detach() for t in teachers]
    outputs = torch.stack([torch.addmm(c, x, w.T) for w, c in zip(weights, biases)])

    # truncated SVD: as it is, with the bias refitted, and as the warm start of distillation
    factors = [truncated_svd(w, rank) for w in weights]
    refitted = [refit_bias(w, c, A, B, moments.mean.float()) for w, c, (A, B) in zip(weights, biases, factors)]
    students: dict[str, list[Any]] = {
        CONSTANT: [Constant(y.mean(0)) for y in outputs],
        SVD: [LowRankLinear(A, B, c) for (A, B), c in zip(factors, biases)],
        SVD_BIAS: [LowRankLinear(A, B, c) for (A, B), c in zip(factors, refitted)],
    }
    A, B = (torch.stack(f) for f in zip(*factors))
    losses = {}
    for label, recipe, start in ((PLAIN_DISTILLED, PLAIN, biases), (DISTILLED, IMPROVED, refitted)):
        recipe = replace(recipe, steps=config.steps)
        batches = [generator(seed, "batches", name) for seed in range(config.seeds)]  # both recipes see the same
        *trained, losses[label] = distil(x, outputs, A, B, torch.stack(start), recipe, batches, bar.update)
        students[label] = [LowRankLinear(*parts) for parts in zip(*trained)]

    # the closed forms, and the whole curve from the same eigendecomposition
    students |= {OPTIMUM: [], COSINE_AWARE: [], FLOOR: []}
    curves = []
    for teacher, weight, bias, y in zip(teachers, weights, biases, outputs):
        solution = optimum(weight, bias, moments)
        *aware, _ = cosine_aware_optimum(weight, bias, y, rank, PLAIN.cosine_weight)
        students[OPTIMUM].append(solution.student(rank, torch.float32))
        students[COSINE_AWARE].append(LowRankLinear(*(part.float() for part in aware)))
        students[FLOOR].append(optimum(weight, bias, held_out, rank).student(rank))
        y_val = teacher(x_val)
        achieved, cosine = held_out_curve(solution, y_val)
        curves.append({"train_fvu": solution.fvu, "fvu": achieved, "floor_fvu": floor_curve(y_val), "cosine": cosine})
    return Comparison(teachers, students, losses, curves)


# 5. Fidelity on held-out rows ------------------------------------------------------------------------------------------
def measure(comparison: Comparison, x: Tensor, x_val: Tensor, rank: int, counts: Tensor) -> dict[str, Any]:
    """Every metric of every student with intervals, paired with the optimum; and the ranks that reach the FVU targets."""
    rows: dict[str, list[RowErrors]] = {label: [] for label in comparison.students}
    train_fvu: dict[str, list[float]] = {label: [] for label in comparison.students}
    bounds = []
    for seed, teacher in enumerate(comparison.teachers):
        y, y_val = teacher(x), teacher(x_val)
        bounds.append(cosine_bound(y_val, rank))
        for label, layers in comparison.students.items():
            dtype = torch.float64 if label == FLOOR else torch.float32  # the floor is a bound: it is not rounded
            rows[label].append(row_errors(y_val, layers[seed](x_val.to(dtype))))
            train_fvu[label].append(fvu(y, layers[seed](x.to(dtype))))
    floors = [float(curve["floor_fvu"][rank]) for curve in comparison.curves]
    for label, errors in rows.items():
        for found, floor in zip((error.fvu for error in errors), floors):
            if found < floor * (1 - 1e-6) - 1e-12:
                raise AssertionError(f"{label} is below the floor ({found} < {floor}): a bug, please report it")
    students: dict[str, dict[str, Any]] = {}
    for label, errors in rows.items():
        reference = None if label in (OPTIMUM, FLOOR) else rows[OPTIMUM]
        students[label] = summarise(errors, counts, reference) | {"train_fvu": train_fvu[label]}
    mean = mean_curve(comparison)
    return {
        "students": students,
        "verdict": tables.verdict(students[DISTILLED]["fvu_minus_optimum"], students[OPTIMUM]["fvu"]),
        "cosine_bound": {"value": sum(bounds) / len(bounds), "per_seed": bounds, "higher_is_better": True},
        "rank_for_fvu": {
            f"{target:.2f}": {key: smallest_rank(mean[key], target) for key in ("train_fvu", "fvu", "floor_fvu")}
            for target in FVU_TARGETS
        },
    }


def mean_curve(comparison: Comparison) -> dict[str, Tensor]:
    """The rank curves averaged over seeds."""
    return {key: torch.stack([curve[key] for curve in comparison.curves]).mean(0) for key in comparison.curves[0]}


def familiar_keys(
    students: dict[str, Any], timing: dict[str, Any], teacher: nn.Module, student: nn.Module
) -> dict[str, Any]:
    """The keys that readers of this file have always had: `student` is the distilled one, times are at batch 32."""
    svd, distilled = students[SVD], students[DISTILLED]
    return {
        "svd_cosine": svd["cosine"]["value"],
        "svd_rel_mse": svd["relative_mse"]["value"],
        "student_cosine": distilled["cosine"]["value"],
        "student_rel_mse": distilled["relative_mse"]["value"],
        "cosine_improvement": distilled["cosine"]["value"] - svd["cosine"]["value"],
        "mse_reduction": 1 - distilled["relative_mse"]["value"] / svd["relative_mse"]["value"],
        "latency_teacher_ms": timing["teacher_ms"]["median"],
        "latency_student_ms": timing["student_ms"]["median"],
        "speedup": timing["speedup"]["median"],
        "params_teacher": parameters(teacher),
        "params_student": parameters(student),
        "compression": parameters(teacher) / parameters(student),
    }


# 6. The whole experiment -----------------------------------------------------------------------------------------------
@torch.no_grad()
def run(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Validate, compare, measure and time: the summary and the curves."""
    device = pick_device(config.device)
    x, x_val, data = load_data(config)
    user = None if config.teacher is None else load_teacher(config.teacher, config.key)
    rank = max(1, x.shape[1] // 20) if config.rank is None else config.rank
    check_shapes(config, x.shape[1], user, rank)
    if data["source"] == SYNTHETIC:
        print(tables.framed(*SYNTHETIC_NOTICE))
    x, x_val = x.to(device), x_val.to(device)
    counts = bootstrap_counts(len(x_val), config.bootstrap, generator(0, "bootstrap")).to(device)
    teachers = make_teachers(config, x, user)
    experiments, curves = {}, {}
    timings: dict[torch.Size, list[dict[str, Any]]] = {}
    with tqdm(total=2 * len(teachers) * config.steps, desc="distilling", unit="step", disable=None, leave=False) as bar:
        for name, layers in teachers.items():
            comparison = compare(name, layers, x, x_val, rank, config, bar)
            teacher, student = comparison.teachers[0], comparison.students[DISTILLED][0]
            if teacher.weight.shape not in timings:  # latency depends on the shape alone
                batches = [x[:1].repeat(batch, 1) for batch in sorted({1, 32, 512, *config.batch})]
                timings[teacher.weight.shape] = compare_latency(
                    teacher, student, batches, config.rounds, config.threads
                )
            timing = timings[teacher.weight.shape]
            record = measure(comparison, x, x_val, rank, counts)
            at_32 = next(row for row in timing if row["batch"] == 32 and row["mode"] == "eager")
            experiments[name] = (
                familiar_keys(record["students"], at_32, teacher, student) | record | {"latency": timing}
            )
            curves[name] = {
                "rank": {key: rounded(values) for key, values in mean_curve(comparison).items()},
                "loss": {label: rounded(thinned(losses.mean(0))) for label, losses in comparison.losses.items()},
                "singular_values": rounded(torch.linalg.svdvals(teacher.weight)),
            }
    head = {
        "schema": tables.SCHEMA,
        "real_data": data["source"] != SYNTHETIC,
        "target_rank": rank,
        "input_dim": x.shape[1],
    }
    head["data"] = data | {"n_train": len(x), "n_val": len(x_val), "dim": x.shape[1]}
    summary = head | {
        "seeds": list(range(config.seeds)),
        "experiments": experiments,
        "config": config_record(config),
        "recipes": {PLAIN_DISTILLED: asdict(PLAIN), DISTILLED: asdict(IMPROVED)},
        "environment": environment(device),
        "machine_dependent": ["environment", *(f"experiments.*.{key}" for key in TIMED)],
    }
    return summary, head | {"schema": tables.CURVES_SCHEMA, "experiments": curves}


def thinned(losses: Tensor, points: int = 100) -> Tensor:
    """The first value, then the mean of each of at most `points` stretches of a loss curve."""
    return torch.cat([losses[:1], torch.stack([part.mean() for part in losses.tensor_split(min(points, len(losses)))])])


def rounded(values: Tensor) -> list[float]:
    """As many digits as a figure can show."""
    return [float(f"{value:.6g}") for value in values.tolist()]


# 7. What the user may ask for ------------------------------------------------------------------------------------------
def check(config: Config) -> Config:
    """Reject impossible options, then apply --quick."""
    for name in ("seeds", "steps", "teacher_steps", "rounds", "bootstrap", "threads"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if any(batch < 1 for batch in config.batch):
        raise InputError(f"--batch must be at least 1, got {min(config.batch)}")
    if config.key is not None and config.teacher is None:
        raise InputError("--key chooses a layer of --teacher, which is missing; give --teacher FILE")
    if config.synthetic and (config.train or config.val):
        raise InputError("--synthetic or --train and --val required, got both; choose one")
    if config.quick:
        config = replace(config, seeds=min(config.seeds, 2), steps=min(config.steps, 100), teacher_steps=50,
                         bootstrap=200, rounds=20, out=config.out / "quick")  # fmt: skip
    return config


def check_shapes(config: Config, dim: int, user: nn.Linear | None, rank: int) -> None:
    """The user's layer must take these embeddings, and the rank must fit every layer."""
    if user is not None and user.in_features != dim:
        raise InputError(
            f"a teacher of {dim} inputs required for these embeddings, got {user.in_features} in {config.teacher}"
        )
    limit = min(dim, dim if user is None else user.out_features)
    if not 1 <= rank <= limit:
        raise InputError(f"--rank must be between 1 and {limit} for these layers, got {rank}")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device must name a device that is here, got {name!r}: {str(error).splitlines()[0]}"
        ) from None
    return device


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, prog="python main.py", description=__doc__, args=arguments)
    with one_line_errors("main.py"):
        config = check(config)
        out = require_writable(config.out)
        summary, curves = run(config)
        with TemporaryDirectory(
            prefix=".unfinished-", dir=out
        ) as folder:  # the three files change together, at the end
            write_json(Path(folder) / "distil_rank_curves.json", curves)
            write_json(Path(folder) / "distil_rank_summary.json", summary)
            report.draw(folder)
            for path in Path(folder).iterdir():
                path.replace(out / path.name)
        print(tables.closing_table(summary))
        print(f"written: {out}/distil_rank_summary.json, distil_rank_curves.json, distil_rank_final_report.png")


if __name__ == "__main__":
    main()
