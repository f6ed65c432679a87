"""Publish a student on the Hugging Face hub: card, safetensors, tokenizer, evaluation.

    distil-rank generator publish models/tiny --repo you/tiny --evaluation tiny.json --out upload --dry-run
    distil-rank generator publish models/tiny --repo you/tiny --evaluation tiny.json --out upload

`--dry-run` works offline and leaves in `--out` exactly what would be uploaded. An evaluation made on other weights is refused.
"""

# ruff: noqa: E501 - the lines of the template are those of the text
from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from distil_rank.core.errors import InputError
from distil_rank.generators.evaluate import SCHEMA as EVALUATION
from distil_rank.generators.training import SCHEMA as TRAINING
from distil_rank.core.records import read_json, require_writable

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
SHOWN = {  # metric in the card: where it stands in an evaluation
    "perplexity": ("student", "perplexity"),
    "perplexity ratio to the teacher": ("ratio",),
    "bits per residue": ("student", "bits_per_residue"),
    "KL to the teacher (nats)": ("kl_to_teacher",),
    "debiased ECE": ("student", "calibration", "as_is", "ece_debiased"),
}
CITATION = """@article{ferruz2022protgpt2,
  title = {ProtGPT2 is a deep unsupervised language model for protein design},
  author = {Ferruz, Noelia and Schmidt, Steffen and H{\\"o}cker, Birte},
  journal = {Nature Communications}, volume = {13}, pages = {4348}, year = {2022}
}"""


@dataclass(frozen=True)
class Config:
    model: Annotated[Path, tyro.conf.Positional]  # folder of the student
    repo: str  # owner/name on the hub
    evaluation: Path  # JSON of `generator evaluate` on these weights
    out: Path  # folder for what is uploaded; must be new or empty
    dry_run: bool = False  # write the folder and stop
    licence: str = "mit"  # licence of the weights
    previous: Path | None = None  # card to compare with; without --dry-run the repository's own


def run(config: Config) -> None:
    if config.repo.count("/") != 1 or not all(config.repo.split("/")):
        raise InputError(f"a repository like owner/name required, got {config.repo}")
    content = prepare_upload(config.model, config.evaluation)
    previous = config.previous.read_text() if config.previous else None
    if previous is None and not config.dry_run:
        previous = _card_on_the_hub(config.repo)
    folder = require_writable(config.out)
    if any(folder.iterdir()):
        raise InputError(f"an empty or new folder required, got {folder} with files; choose another --out")
    for name in FILES:
        shutil.copyfile(config.model / name, folder / name)
    (folder / "evaluation.json").write_text(json.dumps(content["evaluation"], indent=1) + "\n")
    (folder / "README.md").write_text(card(config.repo, content, config.licence, previous))
    if config.dry_run:
        print(f"{folder}: {len(FILES) + 2} files; nothing was uploaded")
        return
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(config.repo, exist_ok=True)
    print(api.upload_folder(folder_path=folder, repo_id=config.repo, commit_message="Weights, card and evaluation"))


def prepare_upload(model: Path, evaluation: Path) -> dict[str, Any]:
    """Records and hash of a student, checked against each other. InputError when something is missing or does not fit."""
    from distil_rank.generators.models import load, weights_sha256

    missing = [name for name in (*FILES, "training.json") if not (model / name).is_file()]
    if missing:
        raise InputError(f"a folder that `generator train` finished required, {model} lacks {', '.join(missing)}")
    training, evaluated = read_json(model / "training.json", TRAINING), read_json(evaluation, EVALUATION)
    own, other = weights_sha256(load(str(model))[0]), evaluated["student"]["weights_sha256"]
    if own != other:
        raise InputError(
            f"an evaluation of the weights in {model} ({own[:12]}) required, got one of other weights ({other[:12]}) in "
            f"{evaluation}; run `generator evaluate` again"
        )
    return {"training": training, "evaluation": evaluated}


def card(repo: str, content: dict[str, Any], licence: str, previous: str | None = None) -> str:
    """The model card with its model-index."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    training, evaluation = content["training"], content["evaluation"]
    data, teacher = evaluation["data"], training.get("teacher", {})
    metrics = {name: _at(evaluation, path) for name, path in SHOWN.items()}
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="proteins", dataset_name=data["source"], metric_type=name.replace(" ", "_").lower(),
            metric_name=name, metric_value=round(m["value"], 6),
        )
        for name, m in metrics.items()
    ]  # fmt: skip
    meta = ModelCardData(
        language=None, license=licence, library_name="transformers", pipeline_tag="text-generation",
        tags=["protein", "gpt2", "distillation"], base_model=_hub_name(teacher.get("name")), model_name=repo.split("/")[1],
        eval_results=results,
    )  # fmt: skip
    objective = training.get("objective", {})
    lines = [f"| {name} | {m['value']:.4f} | {m['low']:.4f} to {m['high']:.4f} |" for name, m in metrics.items()]
    flags = {k: v for k, v in training["config"].items() if k not in ("out", "log_to", "device")}
    text = f"""---
{meta.to_yaml()}
---

# {repo}

A GPT-2 for proteins with {evaluation["student"]["parameters"]["total"]:,} parameters, distilled from {teacher.get("name", "its teacher")} ({evaluation["compression"]["total"]:.1f} times smaller).

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{repo}")
generator("<|endoftext|>", max_length={min(200, evaluation["student"]["shape"]["n_positions"])}, do_sample=True)
```

## Evaluation

On {evaluation["proteins"]:,} held-out proteins of {data["source"]}{" (**underpowered**: fewer than 1,000)" if evaluation["underpowered"] else ""}; verdict: {evaluation["verdict"]["word"]}.

| metric | value | 95 % interval |
| --- | --- | --- |
{chr(10).join(lines)}

{_comparison(metrics, previous)}## Training

{training["data"]["n_train"]:,} proteins, {training["steps"]:,} steps; temperature {objective.get("temperature", "-")}, alpha {objective.get("alpha", "-")},
uncertainty weighting {"on" if objective.get("uncertainty") else "off"}, calibration smoothing {"on" if objective.get("calibration") else "off"}.

```json
{json.dumps(flags, indent=1)}
```

Weights (hash of names, shapes and values): `{evaluation["student"]["weights_sha256"]}`

## Citation

```bibtex
{CITATION}
```
"""
    return str(ModelCard(text))


def _comparison(metrics: dict[str, Any], previous: str | None) -> str:
    """Old against new, from the model-index of the card that is there now."""
    if previous is None:
        return ""
    from huggingface_hub import ModelCard

    old = getattr(ModelCard(previous, ignore_metadata_errors=True).data, "eval_results", None) or []
    before = {result.metric_name: result.metric_value for result in old}
    rows = [f"| {name} | {before[name]:.4f} | {m['value']:.4f} |" for name, m in metrics.items() if name in before]
    if not rows:
        return ""
    return "\n".join(
        ["### Against the version before", "", "| metric | before | now |", "| --- | --- | --- |", *rows, "", ""]
    )


def _at(record: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        record = record[name]
    return record


def _hub_name(name: str | None) -> str | None:
    """A teacher that can be linked on the hub; a local folder cannot."""
    return name if name and name.count("/") == 1 and not Path(name).exists() else None


def _card_on_the_hub(repo: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, "README.md")).read_text()
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return None
