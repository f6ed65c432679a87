"""Starting a student from its teacher's weights: a slice, or a projection onto the teacher's principal directions.

`slice` keeps the first features, heads and neurons of evenly spaced layers. `low-rank` first rotates the residual
stream: every matrix that reads or writes it is replaced by its projection onto the leading right singular vectors of
all that is written (embeddings and output projections stacked), and the heads and neurons of largest weight are kept.
LayerNorm's centring is respected by keeping the all-ones direction as it is, its gains are folded into the matrices
that follow. At full size the projected student equals its teacher (up to the gain of the last LayerNorm, which the
tied head forbids to fold).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distil_rank.core.errors import InputError
from distil_rank.generators.models import fresh


def initial_student(teacher: Any, layers: int, heads: int, width: int, init: str, seed: int) -> Any:
    """A student of the teacher's vocabulary and context: init "random", "slice" or "low-rank"."""
    t = teacher.config
    student = fresh(t.vocab_size, layers, heads, width, t.n_positions, t.eos_token_id, seed)
    if init == "random":
        return student
    if layers > t.n_layer or width > t.n_embd or heads > t.n_head or width // heads > t.n_embd // t.n_head:
        raise InputError(
            f"a student not larger than its teacher ({t.n_layer} layers, {t.n_head} heads of "
            f"{t.n_embd // t.n_head}, width "
            f"{t.n_embd}) required for --init {init}, got {layers}, {heads} of {width // heads}, {width}; use "
            f"--init random"
        )
    source = {k: v.detach().to("cpu", torch.float64) for k, v in teacher.transformer.state_dict().items()}
    state = student.transformer.state_dict()
    P = torch.eye(t.n_embd, width, dtype=torch.float64) if init == "slice" else residual_basis(source, t.n_layer, width)
    scale = 1.0 if init == "slice" else (t.n_embd / width) ** 0.5  # LayerNorm gives |x|^2 = width in either space
    new: dict[str, Tensor] = {"wte.weight": source["wte.weight"] @ P, "wpe.weight": source["wpe.weight"] @ P}
    chosen = [0] if layers == 1 else [round(i * (t.n_layer - 1) / (layers - 1)) for i in range(layers)]
    for i, j in enumerate(chosen):
        new |= {f"h.{i}.{k}": v for k, v in _block(source, f"h.{j}.", t, heads, width, P, scale, init).items()}
    gain, shift = source["ln_f.weight"], source["ln_f.bias"]
    new["ln_f.weight"] = gain[:width] if init == "slice" else scale * (P * gain[:, None] * P).sum(0)
    new["ln_f.bias"] = shift @ P
    student.transformer.load_state_dict({k: v.to(state[k].dtype) for k, v in new.items()}, strict=False)
    return student


def residual_basis(source: dict[str, Tensor], layers: int, width: int) -> Tensor:
    """Orthonormal P (d, width): the all-ones direction onto itself, the others onto the leading directions of what is
    written."""
    written = [source["wte.weight"], source["wpe.weight"]]
    for j in range(layers):
        written += [source[f"h.{j}.attn.c_proj.weight"], source[f"h.{j}.mlp.c_proj.weight"]]
    stacked = torch.cat(written)
    centred = stacked - stacked.mean(1, keepdim=True)
    d = stacked.shape[1]
    leading = torch.linalg.svd(centred, full_matrices=False)[2][: width - 1].T
    ones = torch.full((d, 1), d**-0.5, dtype=stacked.dtype)
    kept = torch.linalg.qr(torch.cat([ones, leading], 1))[0]
    small = torch.eye(width, dtype=stacked.dtype)
    small[:, 0] = width**-0.5
    rotation = torch.linalg.qr(small)[0]  # first column is the all-ones direction of the student, up to sign
    sign = torch.sign(kept[:, 0].sum()) * torch.sign(rotation[:, 0].sum())
    kept[:, 0] *= sign
    return kept @ rotation.T


def _block(
    s: dict[str, Tensor], name: str, t: Any, heads: int, width: int, P: Tensor, scale: float, init: str
) -> dict[str, Tensor]:
    """One layer of the student from the teacher's layer `name`. GPT-2 stores weights as (d_in, d_out)."""
    size, wide = t.n_embd // t.n_head, width // heads
    folded = init == "low-rank"  # fold the gains: what LayerNorm leaves is centring and division, which P respects
    reads, read_bias = {}, {}
    for norm, linear in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
        weight, bias = s[f"{name}{linear}.weight"], s[f"{name}{linear}.bias"]
        if folded:
            bias = bias + s[f"{name}{norm}.bias"] @ weight
            weight = s[f"{name}{norm}.weight"][:, None] * weight
        reads[linear], read_bias[linear] = P.T @ weight, bias
    out, down = s[name + "attn.c_proj.weight"], s[name + "mlp.c_proj.weight"]
    if init == "slice":
        head, neuron = torch.arange(heads), torch.arange(4 * width)
    else:
        head = out.view(t.n_head, -1).square().sum(1).topk(heads).indices.sort().values
        size_of = reads["mlp.c_fc"].square().sum(0) * down.square().sum(1)
        neuron = size_of.topk(4 * width).indices.sort().values
    columns = (head[:, None] * size + torch.arange(wide)).flatten()
    qkv = torch.cat([columns + part * t.n_embd for part in range(3)])
    reads["attn.c_attn"][:, : t.n_embd] *= (wide / size) ** 0.5  # scores are divided by the root of the head's width
    read_bias["attn.c_attn"] = read_bias["attn.c_attn"].clone()
    read_bias["attn.c_attn"][: t.n_embd] *= (wide / size) ** 0.5

    def norm_of(part: str) -> dict[str, Tensor]:
        if folded:
            return {f"{part}.weight": torch.full((width,), scale), f"{part}.bias": torch.zeros(width)}
        return {f"{part}.{kind}": s[f"{name}{part}.{kind}"][:width] for kind in ("weight", "bias")}

    return (
        norm_of("ln_1")
        | norm_of("ln_2")
        | {
            "attn.c_attn.weight": reads["attn.c_attn"][:, qkv],
            "attn.c_attn.bias": read_bias["attn.c_attn"][qkv],
            "attn.c_proj.weight": out[columns] @ P,
            "attn.c_proj.bias": s[name + "attn.c_proj.bias"] @ P,
            "mlp.c_fc.weight": reads["mlp.c_fc"][:, neuron],
            "mlp.c_fc.bias": read_bias["mlp.c_fc"][neuron],
            "mlp.c_proj.weight": down[neuron] @ P,
            "mlp.c_proj.bias": s[name + "mlp.c_proj.bias"] @ P,
        }
    )
