"""Starting a student from its teacher: a slice, or a projection onto principal directions.

`slice` keeps the first features, heads and neurons of evenly spaced layers. `low-rank` first
rotates the residual stream: every matrix that reads or writes it is replaced by its projection onto
the leading right singular vectors of all that is written (embeddings and output projections
stacked), and the heads and neurons of largest weight are kept. LayerNorm's centering is respected
by keeping the all-ones direction as it is; its gains are folded into the matrices that follow. At
full size the projected student equals its teacher (up to the gain of the last LayerNorm, which the
tied head forbids to fold).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.generators.models import fresh

Weights = dict[str, Tensor]


def initial_student(teacher: Any, layers: int, heads: int, width: int, init: str, seed: int) -> Any:
    """A student of the teacher's vocabulary and context: init "random", "slice" or "low-rank"."""
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
    source = {
        name: v.detach().cpu().double() for name, v in teacher.transformer.state_dict().items()
    }
    if init == "slice":
        P, scale = torch.eye(t.n_embd, width, dtype=torch.float64), 1.0
    else:  # LayerNorm gives |x|^2 = width in either space
        P, scale = residual_basis(source, t.n_layer, width), (t.n_embd / width) ** 0.5
    new = {name: source[name] @ P for name in ("wte.weight", "wpe.weight")}
    new["ln_f.bias"] = source["ln_f.bias"] @ P
    gain = source["ln_f.weight"]
    new["ln_f.weight"] = gain[:width] if init == "slice" else scale * (P * gain[:, None] * P).sum(0)
    for i in range(layers):
        j = round(i * (t.n_layer - 1) / max(1, layers - 1))  # evenly spaced, the first and the last
        layer = {k.removeprefix(f"h.{j}."): v for k, v in source.items() if k.startswith(f"h.{j}.")}
        made = _block(layer, t, heads, P, None if init == "slice" else scale)
        new |= {f"h.{i}.{name}": value for name, value in made.items()}
    student.transformer.load_state_dict({k: v.float() for k, v in new.items()}, strict=False)
    return student


def residual_basis(source: Weights, layers: int, width: int) -> Tensor:
    """Orthonormal P (d, width): all-ones onto itself, the rest the leading directions written."""
    written = [source["wte.weight"], source["wpe.weight"]]
    for j in range(layers):
        written += [source[f"h.{j}.attn.c_proj.weight"], source[f"h.{j}.mlp.c_proj.weight"]]
    stacked = torch.cat(written)
    centered = stacked - stacked.mean(1, keepdim=True)
    d = stacked.shape[1]
    leading = torch.linalg.svd(centered, full_matrices=False)[2][: width - 1].T
    ones = torch.full((d, 1), d**-0.5, dtype=stacked.dtype)
    kept = torch.linalg.qr(torch.cat([ones, leading], 1))[0]
    small = torch.eye(width, dtype=stacked.dtype)
    small[:, 0] = width**-0.5
    rotation = torch.linalg.qr(small)[0]  # first column: the student's all-ones, up to sign
    kept[:, 0] *= torch.sign(kept[:, 0].sum()) * torch.sign(rotation[:, 0].sum())
    return kept @ rotation.T


def _block(s: Weights, t: Any, heads: int, P: Tensor, scale: float | None) -> Weights:
    """One layer of the student from the teacher's layer `s`. GPT-2 stores weights as (d_in, d_out).

    With a scale, the gains of LayerNorm are folded into what follows: what is left of it is
    centering and division, which P respects.
    """
    width = P.shape[1]
    size, wide = t.n_embd // t.n_head, width // heads
    new: Weights = {}
    for norm, linear in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
        weight, bias = s[f"{linear}.weight"], s[f"{linear}.bias"]
        gain, shift = s[f"{norm}.weight"], s[f"{norm}.bias"]
        if scale is None:
            new[f"{norm}.weight"], new[f"{norm}.bias"] = gain[:width], shift[:width]
        else:
            weight, bias = gain[:, None] * weight, bias + shift @ weight
            new[f"{norm}.weight"], new[f"{norm}.bias"] = (
                torch.full((width,), scale),
                torch.zeros(width),
            )
        new[f"{linear}.weight"], new[f"{linear}.bias"] = P.T @ weight, bias
    out, down = s["attn.c_proj.weight"], s["mlp.c_proj.weight"]
    if scale is None:
        head, neuron = torch.arange(heads), torch.arange(4 * width)
    else:
        head = out.view(t.n_head, -1).square().sum(1).topk(heads).indices.sort().values
        size_of = new["mlp.c_fc.weight"].square().sum(0) * down.square().sum(1)
        neuron = size_of.topk(4 * width).indices.sort().values
    columns = (head[:, None] * size + torch.arange(wide)).flatten()
    qkv = torch.cat([columns + part * t.n_embd for part in range(3)])
    for kind in ("weight", "bias"):
        joint = new[f"attn.c_attn.{kind}"][..., qkv].clone()
        joint[..., :width] *= (
            wide / size
        ) ** 0.5  # scores are divided by the root of a head's width
        new[f"attn.c_attn.{kind}"] = joint
        new[f"mlp.c_fc.{kind}"] = new[f"mlp.c_fc.{kind}"][..., neuron]
    return new | {
        "attn.c_proj.weight": out[columns] @ P,
        "attn.c_proj.bias": s["attn.c_proj.bias"] @ P,
        "mlp.c_proj.weight": down[neuron] @ P,
        "mlp.c_proj.bias": s["mlp.c_proj.bias"] @ P,
    }
