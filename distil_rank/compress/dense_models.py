"""Dense models read from where users have them. Nothing is unpickled."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from distil_rank.compress.architectures import TASKS, Architecture, describe
from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear, PrunedLinear
from distil_rank.core.lowrank import require_finite
from distil_rank.core.records import sha256
from distil_rank.core.resume import fingerprint
from distil_rank.proteins.checkpoints import load_model, locate
from distil_rank.proteins.hugging_face import weight_files

USUAL = {"esm": "EsmForMaskedLM", "gpt2": "GPT2LMHeadModel", "t5": "T5EncoderModel"}
# computed anew by the class, or of ESM-2's contact prediction, which is not run
HARMLESS = re.compile(r"contact_head\.|(position_ids|inv_freq|\.attn\.(masked_)?bias)$")


class Dense(NamedTuple):
    """A model to compress, its weight file (or first shard) and the SHA-256 of all of them."""

    model: nn.Module
    architecture: Architecture
    source: Path
    sha256: str
    bytes: int  # of all weight files


def as_narrow_as(source: nn.Module, small: nn.Module) -> nn.Module:
    """Copy of `small` with factors that a dtype holds exactly, if it holds all of the source."""

    def holds(dtype: torch.dtype) -> bool:
        return all(torch.equal(p.to(dtype).to(p.dtype), p) for p in source.parameters())

    dtype = next(filter(holds, (torch.float16, torch.bfloat16)), torch.float32)
    result = copy.deepcopy(small)
    for part in result.modules():
        if isinstance(part, LowRankLinear | PrunedLinear):
            with torch.no_grad():
                for p in part.parameters():
                    p.copy_(p.to(dtype))
            require_finite(part)
    return result


def load_dense(name: str, device: torch.device | str = "cpu") -> Dense:
    """A model with its head, by name, fair-esm checkpoint or Hugging Face folder; InputError."""
    path = Path(name) if (Path(name) / "config.json").is_file() else locate(name)
    if path.is_dir():
        model: nn.Module = _from_folder(path).eval().requires_grad_(False)
        files = weight_files(path)
        source, digests = files[0], [sha256(file) for file in files]
        digest = digests[0] if len(digests) == 1 else fingerprint(digests)
    else:
        model, _, digest = load_model(name, head=True)
        source, files = path, [path]
    architecture = describe(model, path if path.is_dir() else None)
    assert architecture is not None
    size = sum(file.stat().st_size for file in files)
    return Dense(model.to(device), architecture, source, digest, size)


def _from_folder(folder: Path) -> nn.Module:
    import transformers

    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"a folder with config.json and model.safetensors required, got {folder} ({error})"
        ) from None
    found = config.get("architectures") or [USUAL.get(config.get("model_type"), "none named")]
    cls = getattr(transformers, found[0], None)
    if cls is None or not any(found[0].endswith(end) for end in TASKS):
        raise InputError(
            f"a class of transformers whose name ends with one of {', '.join(TASKS)} required,"
            f" got {found[0]} in {folder}; use compress_model in Python, which takes any module"
        )
    model, unlike = _read(cls, folder)
    if unlike and all(key.startswith("pooler.") for key in unlike):
        model, unlike = _read(cls, folder, add_pooling_layer=False)
    if unlike:
        raise InputError(
            f"the weights of {found[0]}, all and no others, required in {folder};"
            f" missing, unexpected or of another shape: {', '.join(unlike[:5])}"
        )
    return model


def _read(cls: Any, folder: Path, **options: Any) -> tuple[nn.Module, list[str]]:
    """A model and the names of the weights that are missing, unexpected or of another shape."""
    from safetensors import SafetensorError

    settings = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, found = cls.from_pretrained(folder, **settings, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"a readable model in {folder} required, got: {reason}") from None
    unlike = [*found["missing_keys"], *found["unexpected_keys"]]
    unlike += [mismatch[0] for mismatch in found["mismatched_keys"]]
    return model, sorted(key for key in unlike if not HARMLESS.search(key))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and load reports."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
