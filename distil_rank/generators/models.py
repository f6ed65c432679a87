"""GPT-2 models of proteins: loading with clear errors, new students, and what a model weighs."""

import hashlib
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError, few, hub_errors
from distil_rank.core.randomness import generator
from distil_rank.core.records import atomic

Dtype = Literal["float32", "bfloat16", "float16"]
MUON_RATE = 3.0  # the rate of the matrices under Muon, over that of the rest under AdamW


def autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[Any]:
    """Arithmetic in `dtype` with weights in float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def load(name: str) -> tuple[Any, Any]:
    """Model (eval mode, float32) and tokenizer from a folder or the Hugging Face hub."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with hub_errors("a GPT-2 with safetensors", f"check {name}"):
        how: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
        found: Any = GPT2LMHeadModel.from_pretrained(name, **how, output_loading_info=True)
        model, info = found
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise InputError(f"all weights of a GPT-2 required, got {name} without {few(missing)}")
    tokenizer = load_tokenizer(name)
    if len(tokenizer) > model.config.vocab_size:
        size = model.config.vocab_size
        raise InputError(f"a tokenizer of {size} tokens required for {name}, got {len(tokenizer)}")
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer from a folder or the Hugging Face hub."""
    from transformers import AutoTokenizer

    with hub_errors("a tokenizer", f"check {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise InputError(f"a tokenizer of the fast kind with an end token required, got {name}")
    return tokenizer


def require_same_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> None:
    """InputError unless both tokenizers give every token the same id."""
    a, b = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if a != b:
        differing = len(dict(a.items() ^ b.items()))
        raise InputError(
            f"one vocabulary for teacher and student required, got {len(a)} and {len(b)} tokens "
            f"of which {differing} differ; use models and proteins of one tokenizer"
        )


def fresh(
    vocabulary: int, layers: int, heads: int, width: int, context: int, end: int, seed: int
) -> Any:
    """A GPT-2 with transformers' own random weights, without dropout: small students underfit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config: Any = GPT2Config(vocab_size=vocabulary, bos_token_id=end, eos_token_id=end)
    config.n_layer, config.n_head, config.n_embd, config.n_positions = layers, heads, width, context
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(generator(seed, "initial weights").initial_seed())
        return GPT2LMHeadModel(config).eval()


def initial_student(teacher: Any, layers: int, heads: int, width: int, init: str, seed: int) -> Any:
    """A student of the teacher's vocabulary and context: init "random" or "slice".

    A slice takes evenly spaced layers, the first and the last among them.
    """
    t = teacher.config
    student = fresh(t.vocab_size, layers, heads, width, t.n_positions, t.eos_token_id, seed)
    if init == "random":
        return student
    given = (layers, heads, width // heads, width)
    largest = (t.n_layer, t.n_head, t.n_embd // t.n_head, t.n_embd)
    if any(size > limit for size, limit in zip(given, largest)):
        raise InputError(
            f"a student not larger than its teacher {largest} in layers, heads, width of a head "
            f"and width required for --init {init}, got {given}; use --init random"
        )
    source = {name: v.detach().cpu() for name, v in teacher.transformer.state_dict().items()}
    new = {name: v[..., :width] for name, v in source.items() if not name.startswith("h.")}
    for i in range(layers):
        j = round(i * (t.n_layer - 1) / max(1, layers - 1))
        layer = {k.removeprefix(f"h.{j}."): v for k, v in source.items() if k.startswith(f"h.{j}.")}
        new |= {f"h.{i}.{name}": value for name, value in _block(layer, t, heads, width).items()}
    student.transformer.load_state_dict(new, strict=False)
    return student


def _block(s: dict[str, Tensor], t: Any, heads: int, width: int) -> dict[str, Tensor]:
    """One layer of the student from the teacher's `s`. GPT-2 stores weights as (d_in, d_out)."""
    size, wide = t.n_embd // t.n_head, width // heads
    columns = (torch.arange(heads)[:, None] * size + torch.arange(wide)).flatten()  # of the heads
    qkv = torch.cat([columns + part * t.n_embd for part in range(3)])
    new = {name: v[:width] for name, v in s.items() if name.startswith("ln_")}
    for kind in ("weight", "bias"):
        joint = s[f"attn.c_attn.{kind}"][..., qkv].clone()
        joint[..., :width] *= (wide / size) ** 0.5  # scores are divided by its root
        new[f"attn.c_attn.{kind}"] = joint
        new[f"mlp.c_fc.{kind}"] = s[f"mlp.c_fc.{kind}"][..., : 4 * width]
        for name in ("attn.c_proj", "mlp.c_proj"):
            new[f"{name}.{kind}"] = s[f"{name}.{kind}"][..., :width]
    for name in ("attn.c_attn.weight", "mlp.c_fc.weight"):
        new[name] = new[name][:width]
    new["attn.c_proj.weight"] = new["attn.c_proj.weight"][columns]
    new["mlp.c_proj.weight"] = new["mlp.c_proj.weight"][: 4 * width]
    return new


def make_optimizers(student: Any, kind: str, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices between the embeddings and the head.

    Muon (Jordan 2024) with updates scaled to the size of AdamW's (Liu et al. 2025), torch's own.
    """
    inner = [p for p in student.transformer.h.parameters() if p.ndim == 2 and kind == "muon"]
    known = {id(p) for p in inner}
    outer = {"params": [p for p in student.parameters() if id(p) not in known], "scale": 1.0}
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "fused": student.device.type == "cuda"}
    muon: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}
    made: list[Any] = [torch.optim.AdamW([outer], weight_decay=weight_decay, **adamw)]
    if inner:
        group = {"params": inner, "scale": MUON_RATE}
        made.append(torch.optim.Muon([group], weight_decay=weight_decay, **muon))
    return made


def parameters(model: Any) -> dict[str, int]:
    """Parameters with and without the embeddings of tokens and positions (the head is tied)."""
    inner = model.num_parameters(exclude_embeddings=True)
    return {"total": model.num_parameters(), "without_embeddings": inner}


def save(model: Any, tokenizer: Any, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write model and tokenizer; the weights come last, so a folder with weights is complete."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.config.to_json_file(folder / "config.json")
    state = {k: v.to("cpu", dtype or v.dtype).contiguous() for k, v in own_weights(model).items()}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, without the head, which is the table of tokens again."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


def weights_sha256(model: nn.Module) -> str:
    """Hash of names, types, shapes and values: equal models, equal hash, whatever the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(own_weights(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
