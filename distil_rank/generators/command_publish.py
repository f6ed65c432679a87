"""Publish a student on the Hugging Face hub: card, weights, tokenizer, evaluation.

    distil-rank generator publish --model models/tiny --repo you/tiny --evaluation tiny.json \\
        --out upload --dry-run
    distil-rank generator publish --model models/tiny --repo you/tiny --evaluation tiny.json \\
        --out upload

`--dry-run` works offline and leaves in `--out` exactly what would be uploaded. An evaluation of
other weights is refused.
"""

import json
import shutil
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from tempfile import TemporaryDirectory

from distil_rank.core.errors import InputError, hub_errors
from distil_rank.core.records import Record, atomic, read_json, require_writable
from distil_rank.core.tables import markdown, with_interval
from distil_rank.generators.command_evaluate import SCHEMA as EVALUATION
from distil_rank.generators.models import load, weights_sha256
from distil_rank.generators.train import SCHEMA as TRAINING

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FILES = ("config.json", *TOKENIZER, "model.safetensors", "training.json")
SHOWN = {  # metric in the card: where it stands in an evaluation
    "perplexity": ("student", "perplexity"),
    "perplexity ratio to the teacher": ("ratio",),
    "bits per residue": ("student", "bits_per_residue"),
    "KL to the teacher (nats)": ("kl_to_teacher",),
    "calibration error": ("student", "calibration", "error"),
}


@dataclass(frozen=True)
class Config:
    model: str  # a model by name, file or folder
    repo: str  # owner/name on the hub
    evaluation: Path  # JSON of `generator evaluate` on these weights
    out: Path  # where to write
    dry_run: bool = False  # stop before anything is trained or uploaded
    license: str = "mit"  # of the weights


def run(config: Config) -> None:
    if config.repo.count("/") != 1 or not all(config.repo.split("/")):
        raise InputError(f"a repository like owner/name required, got {config.repo}")
    training, evaluation = records(Path(config.model), config.evaluation)
    if config.out.is_dir() and any(config.out.iterdir()):
        raise InputError(
            f"an empty or new folder required, got {config.out} with files; choose another --out"
        )
    require_writable(config.out.parent)
    with atomic(config.out) as folder:
        folder.mkdir()
        for name in FILES:
            shutil.copyfile(Path(config.model) / name, folder / name)
        (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
        text = card(config.repo, training, evaluation, config.license)
        (folder / "README.md").write_text(text)
        for path in (folder, *folder.iterdir()):  # whatever the umask: others read what is uploaded
            path.chmod(0o755 if path.is_dir() else 0o644)
    if config.dry_run:
        print(f"{config.out}: {len(FILES) + 2} files; nothing was uploaded")
        return
    print(upload(config.out, config.repo, evaluation["student"]["weights_sha256"]))


def upload(folder: Path, repo: str, wanted: str) -> str:
    """Send the folder, then load what the hub gives back: it must have the hash of the weights."""
    from huggingface_hub import HfApi

    api, message = HfApi(), "Weights, card and evaluation"
    remedy = "log in, or use --dry-run to work offline"
    with hub_errors(f"the hub and the right to write {repo}", remedy):
        api.create_repo(repo, exist_ok=True)
        done = api.upload_folder(folder_path=folder, repo_id=repo, commit_message=message)
        with TemporaryDirectory() as fetched:
            api.snapshot_download(repo, revision=done.oid, local_dir=fetched)
            require_weights(Path(fetched), wanted, f"the upload to {repo}", "publish")
    return str(done)


def require_weights(model: Path, wanted: str, what: str, remedy: str) -> None:
    """InputError where the weights in a folder have another hash than `what` is of."""
    found = weights_sha256(load(str(model))[0])
    if found != wanted:
        raise InputError(
            f"{what} required to be of the weights in {model} ({found[:12]}), got one of other"
            f" weights ({wanted[:12]}); {remedy} again"
        )


def records(model: Path, evaluation: Path) -> tuple[Record, Record]:
    """Training and evaluation of a student. InputError where one is missing or of other weights."""
    missing = [name for name in FILES if not (model / name).is_file()]
    if missing:
        raise InputError(
            f"a folder that `generator train` finished required, {model} lacks {', '.join(missing)}"
        )
    trained = read_json(model / "training.json", TRAINING)
    evaluated = read_json(evaluation, EVALUATION)
    require_weights(model, trained["weights_sha256"], "a training record", "train")
    require_weights(model, evaluated["student"]["weights_sha256"], "an evaluation", "evaluate")
    return trained, evaluated


def card(repo: str, training: Record, evaluation: Record, license: str) -> str:
    """The model card with its model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    student, source = evaluation["student"], evaluation["data"]["source"]
    origin = training.get("teacher") or training.get("started_from") or {"name": "random weights"}
    metrics = {name: reduce(getitem, path, evaluation) for name, path in SHOWN.items()}
    place = {"task_type": "text-generation", "dataset_type": "proteins", "dataset_name": source}
    results = [
        EvalResult(**place, metric_type=name, metric_name=name, metric_value=metric["value"])
        for name, metric in metrics.items()
    ]
    meta = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["protein", "gpt2", "distillation"],
        model_name=repo.split("/")[1],
        eval_results=results,
    )
    flags = {k: v for k, v in training["config"].items() if k not in ("out", "log_to", "device")}
    shown = [[name, with_interval(metric, ".4f")] for name, metric in metrics.items()]
    few = " (**underpowered**: fewer than 1,000)" if evaluation["underpowered"] else ""
    held = "held-out " if evaluation["left_out"]["student"] else "(**some may be of training**) "
    return f"""---
{meta.to_yaml()}
---

# {repo}

A GPT-2 for proteins with {student["parameters"]["total"]:,} parameters, {training["kind"]} from
{origin["name"]} ({evaluation["compression"]["total"]:.1f} times smaller than its teacher here).

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{repo}")
generator("<|endoftext|>", max_length={min(200, student["shape"]["n_positions"])}, do_sample=True)
```

## Evaluation

On {evaluation["proteins"]:,} {held}proteins of {source}{few}.

{markdown([["metric", "value [95 % interval]"], *shown])}

## Training

{training["data"]["n_train"]:,} proteins, {training["steps"]:,} steps. All settings:

```json
{json.dumps(flags, indent=1)}
```

Weights (hash of names, shapes and values): `{student["weights_sha256"]}`
"""
