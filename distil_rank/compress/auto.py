"""Compressed folders in transformers' own classes, once this package is imported.

    import distil_rank
    model = transformers.AutoModel.from_pretrained("small/")

gives the model that was compressed, of its own class with low-rank layers; a fair-esm ESM-2 as
EsmForMaskedLM. `register` is called after transformers' own modules (`core.imports`): importing
distil_rank does not import transformers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from distil_rank.compress.hugging_face import as_transformers
from distil_rank.compress.storage import MODEL_TYPE, load, savable
from distil_rank.core.errors import InputError
from distil_rank.proteins.esm2 import ESM2

CLASSES = {
    "AutoModel": "",
    "AutoModelForMaskedLM": "ForMaskedLM",
    "AutoModelForCausalLM": "LMHeadModel",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
}
# of downloads and of code in the folder, of which there is none
IGNORED = {"revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder"}
IGNORED |= {"proxies", "code_revision", "trust_remote_code", "adapter_kwargs", "_from_auto"}
IGNORED |= {"use_safetensors", "low_cpu_mem_usage"}


class DistilRankConfig(PretrainedConfig):
    """Points to compressed.json; a loaded model has the configuration of its dense class."""

    model_type = MODEL_TYPE


def register(module: str) -> None:
    """Make the type of these folders known to a module of transformers, just imported."""
    if module.endswith("configuration_auto"):
        from transformers import AutoConfig

        AutoConfig.register(MODEL_TYPE, DistilRankConfig, exist_ok=True)
        return
    import transformers

    for name, end in CLASSES.items():
        members = {"config_class": DistilRankConfig, "from_pretrained": partial(load_as, end)}
        cls = type(f"DistilRank{name.removeprefix('Auto')}", (), members)
        getattr(transformers, name).register(DistilRankConfig, cls, exist_ok=True)


def load_as(
    end: str,
    folder: str | Path,
    *,
    config: Any = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Any:
    """The model of a folder: of a class with this end, or ("") without its head."""
    if unknown := {key for key, value in options.items() if value and key not in IGNORED}:
        raise InputError(
            f"no option but dtype required for a compressed model, got {', '.join(unknown)};"
            " set it on the model"
        )
    found: Any = load(folder)
    if isinstance(found, ESM2):
        found = as_transformers(found)
    if not type(found).__name__.endswith(end):
        raise InputError(
            f"a folder of a model ...{end} required, got {type(found).__name__} in {folder};"
            " use the AutoModel of that class"
        )
    found = found if end else found.base_model
    dtype = dtype or torch_dtype
    if dtype not in (None, "auto"):
        found = found.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    found.config._name_or_path = str(folder)
    return savable(found)
