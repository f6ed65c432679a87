"""Dense models read from where users have them: a name, a fair-esm checkpoint, a Hugging Face folder. Nothing is unpickled."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from distil_rank.core.errors import InputError
from distil_rank.compress.architectures import CLASSES, Architecture, describe


def load_dense(name: str) -> tuple[nn.Module, Architecture]:
    """A model with its head, by name (nano-64, esm2_t6_8M_UR50D), fair-esm checkpoint or Hugging Face folder; InputError."""
    from distil_rank.proteins.checkpoints import locate

    path = Path(name) if (Path(name) / "config.json").is_file() else locate(name)
    model = _from_folder(path) if path.is_dir() else _from_fair_esm(path)
    architecture = describe(model, path if path.is_dir() else None)
    assert architecture is not None
    return model.eval().requires_grad_(False), architecture


def weights_file(name: str) -> Path:
    """The file, or first shard, that `load_dense` reads for this name."""
    from distil_rank.proteins.checkpoints import locate

    path = Path(name) if (Path(name) / "config.json").is_file() else locate(name)
    return sorted(path.glob("model*.safetensors"))[0] if path.is_dir() else path


def _from_fair_esm(path: Path) -> nn.Module:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
        settings = data["cfg"]["model"]
        config = {
            "num_layers": int(settings.encoder_layers),
            "embed_dim": int(settings.encoder_embed_dim),
            "attention_heads": int(settings.encoder_attention_heads),
            "token_dropout": bool(settings.token_dropout),
        }
        state = {
            re.sub(r"^(encoder\.sentence_encoder\.|encoder\.)", "", k): v.float() for k, v in data["model"].items()
        }
    except (OSError, pickle.UnpicklingError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise InputError(
            f"a fair-esm ESM-2 checkpoint required, got {path} ({reason}); nothing was unpickled"
        ) from None
    model = Architecture("fair-esm", "ESM2", config).build()
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.startswith("contact_head.") and not k.endswith("inv_freq")]
    if missing or [k for k in unexpected if not k.startswith("contact_head.")]:
        raise InputError(
            f"a whole ESM-2 with its language-model head required, {path} lacks {missing[:3] or unexpected[:3]}"
        )
    return model


def _from_folder(folder: Path) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise InputError(
            "the package transformers required for this model; pip install 'distil-rank[transformers]'"
        ) from None
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"a folder with config.json and model.safetensors required, got {folder} ({error})") from None
    kind = config.get("model_type")
    if kind not in ("esm", "gpt2"):
        raise InputError(
            f"an ESM-2 or GPT-2 required, got model_type {kind!r} in {folder}; use compress_model in Python"
        )
    named = (config.get("architectures") or [""])[0]
    name = named if named in CLASSES else {"esm": "EsmForMaskedLM", "gpt2": "GPT2LMHeadModel"}[kind]
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            cls = getattr(transformers, name)
            return cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"a readable model in {folder} required, got: {reason}") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and load reports."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
