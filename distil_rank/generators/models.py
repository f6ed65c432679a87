"""GPT-2 models of proteins: loading with clear errors, fresh students, and what a model weighs."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.randomness import generator

# name: layers, heads, width
SIZES = {"micro": (4, 4, 256), "tiny": (4, 4, 512), "small": (6, 8, 768), "medium": (12, 16, 1024)}
RATIO_THRESHOLDS = {"tiny": 3.0, "small": 2.5, "medium": 2.0}  # student perplexity over teacher perplexity


def load(name: str) -> tuple[Any, Any]:
    """Model (eval mode, float32) and tokenizer from a folder or the Hugging Face hub. InputError when there is none."""
    from transformers import AutoTokenizer, GPT2LMHeadModel
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if os.path.sep in name and not Path(name).exists() and name.count("/") != 1:
        raise InputError(f"a model folder required, got {name}, which does not exist; check the path")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(
            f"a model folder with config.json required, got {name}; give the folder a training finished in"
        )
    try:
        model = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"a GPT-2 model with safetensors and tokenizer required, got {name} ({reason}); check it"
        ) from None
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"a tokenizer of at most {model.config.vocab_size} tokens required for {name}, got {len(tokenizer)}"
        )
    return model.eval(), tokenizer


def require_same_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> None:
    """InputError unless both tokenizers give every token the same id."""
    a, b = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if a != b:
        differing = sum(a.get(token) != i for token, i in b.items()) + len(a.keys() - b.keys())
        raise InputError(
            f"one vocabulary for teacher and student required, got {len(a)} and {len(b)} tokens of which "
            f"{differing} differ; "
            "use a student that was made from this teacher"
        )


def fresh(vocabulary: int, layers: int, heads: int, width: int, context: int, end: int, seed: int) -> Any:
    """A GPT-2 with random weights (transformers' own initialisation), without dropout: small students underfit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    check_shape(layers, heads, width)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=context,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        bos_token_id=end,
        eos_token_id=end,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(generator(seed, "initial weights").initial_seed())
        return GPT2LMHeadModel(config)


def check_shape(layers: int, heads: int, width: int) -> None:
    if min(layers, heads, width) < 1:
        raise InputError(f"n-layer, n-head and n-embd must be at least 1, got {layers}, {heads} and {width}")
    if width % heads:
        remedy = f"{width // heads * heads or heads} or {(width // heads + 1) * heads} would do"
        raise InputError(f"n-embd must be divisible by n-head, got n-embd={width} and n-head={heads}; {remedy}")


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters with and without the embeddings of tokens and positions (the output head is tied)."""
    total = sum(p.numel() for p in model.parameters())
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return {"total": total, "without_embeddings": total - sum(tables.values())}


def save(model: Any, tokenizer: Any, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write model and tokenizer into a folder; the weights come last and whole, so a folder with weights is
    complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    state = {
        k: v.detach().to(dtype or v.dtype).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"
    }
    model.config.to_json_file(folder / "config.json")
    write_safetensors(state, folder / "model.safetensors")


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save_file({k: v.cpu() for k, v in state.items()}, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def weights_sha256(model: nn.Module) -> str:
    """Hash of names, types, shapes and values of the weights: equal models, equal hash, whatever the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name == "lm_head.weight":
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
