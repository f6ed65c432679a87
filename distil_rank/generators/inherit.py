"""Starting a student from its teacher: the first features, heads and neurons of some layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.generators.models import fresh


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
