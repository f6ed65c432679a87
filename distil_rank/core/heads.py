"""A trained head from a file: plain linear layers, activations and normalizations in order.

    head = load_head("head.onnx")
    head(x), head.raw(x)  # with and without the final scaling to unit length

A state dict names its layers but not its activation, which is said beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.linear import linear
from distil_rank.core.weights import layer_names, layer_of, read_state_dict

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
RUNNING = ("weight", "bias", "running_mean", "running_var")


class UnitNorm(nn.Module):
    """x / |x| for every row; rows shorter than eps are divided by eps."""

    def __init__(self, eps: float = 0.0):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp_min(self.eps)


class Affine(nn.Module):
    """scale x + shift by feature: a BatchNorm in evaluation, or a standardization, to be folded."""

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.scale, self.shift = scale.double(), shift.double()


class Head(nn.Sequential):
    """Layers in order, frozen, in evaluation mode."""

    unit_norm_inputs = False  # whether it was trained on inputs scaled to unit length
    name = ""  # of its file

    @property
    def raw(self) -> nn.Sequential:
        """The head without a final scaling to unit length."""
        parts = list(self)
        return nn.Sequential(*(parts[:-1] if isinstance(parts[-1], UnitNorm) else parts)).eval()

    @property
    def whole(self) -> nn.Sequential:
        """The head for inputs of any length: with their scaling, where it was trained on such."""
        return nn.Sequential(*([UnitNorm()] if self.unit_norm_inputs else []), *self).eval()


def load_head(
    path: str | Path, key: str | Sequence[str] | None = None, activation: str | None = None
) -> Head:
    """The head in an ONNX file, or in a state dict (.pt, .safetensors); InputError names the rest.

    key: in a state dict, the layers in order or their common prefix; in ONNX, the output (the first
    one unless given). activation: between the linear layers of a state dict.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "head.pt"
    >>> torch.save(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)).state_dict(), path)
    >>> load_head(path, activation="relu")(torch.zeros(1, 8)).shape
    torch.Size([1, 2])
    """
    keys = (key,) if isinstance(key, str) else tuple(key or ())
    if Path(path).suffix == ".onnx":
        from distil_rank.core.onnx_graph import read_onnx

        if len(keys) > 1:
            raise InputError(f"one output of {path} as --key required, got {', '.join(keys)}")
        parts, unit_norm_inputs = read_onnx(Path(path), keys[0] if keys else None)
    else:
        parts, unit_norm_inputs = _from_state_dict(path, keys, activation), False
    head = Head(*_folded(parts, path))
    head.unit_norm_inputs, head.name = unit_norm_inputs, Path(path).stem
    if not any(isinstance(part, nn.Linear) for part in head):
        raise InputError(f"a head with a linear layer required in {path}, got none")
    return head.eval().requires_grad_(False)


def _from_state_dict(
    path: str | Path, keys: tuple[str, ...], activation: str | None
) -> list[nn.Module]:
    tensors = read_state_dict(path)
    names = layer_names(tensors)
    chosen: list[str] = []
    guessed = False  # safetensors sorts names: only numbers tell the order of the module
    for key in keys or ("",):
        key = key.removesuffix(".weight")
        under = [x for x in names if not key or x.startswith(f"{key}.")]
        if key in names or not under:  # a key that names nothing is refused by layer_of
            under = [key]
        elif Path(path).suffix == ".safetensors":
            under.sort(key=_natural)
            guessed |= len({re.sub(r"\d+", "", name) for name in under}) > 1
        chosen += under
    parts = [_layer(tensors, name, path) for name in chosen]
    places = [i for i, part in enumerate(parts) if isinstance(part, nn.Linear)]
    layers = [part for part in parts if isinstance(part, nn.Linear)]
    for a, b in pairwise(layers):
        if a.out_features != b.in_features:
            raise InputError(
                f"layers that fit together required in {path}, one has {a.out_features} outputs and"
                f" the next reads {b.in_features} features; name them in order with --key"
            )
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    if guessed and (len({*shapes}) < len(parts) or _orders(shapes) > 1):
        raise InputError(
            f"an order of the layers {', '.join(chosen)} required, which {path} sorts by name;"
            " name them in order with --key"
        )
    if len(places) > 1 and activation is None:
        raise InputError(
            f"an activation between the {len(places)} layers {', '.join(chosen)} required;"
            " say --activation relu"
        )
    for first, second in reversed(list(pairwise(places))):
        assert activation is not None
        at = _gap(chosen, first, second)
        parts.insert(at, ACTIVATIONS[activation]())
    return parts


def _gap(names: Sequence[str], first: int, second: int) -> int:
    """Where the activation between two layers stands: at the first gap of numbered names."""
    for i in range(first + 1, second + 1):
        numbers = [name.rpartition(".")[2] for name in (names[i - 1], names[i])]
        if all(n.isdigit() for n in numbers) and int(numbers[1]) - int(numbers[0]) > 1:
            return i
    return second


def _layer(tensors: Mapping[str, Tensor], name: str, path: str | Path) -> nn.Module:
    """A linear layer, or a LayerNorm or BatchNorm as its tensors tell."""
    found = {field: tensors.get(f"{name}.{field}") for field in RUNNING}
    weight, bias, mean, variance = found.values()
    if weight is None or bias is None or weight.ndim != 1 or weight.shape != bias.shape:
        return layer_of(tensors, name, path)
    if mean is not None and variance is not None:
        return batch_norm(weight, bias, mean, variance)
    return layer_norm(weight, bias)


def batch_norm(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-5
) -> Affine:
    """Of torch's default eps, which a state dict does not hold."""
    scale = weight.double() / (variance.double() + eps).sqrt()
    return Affine(scale, bias.double() - scale * mean.double())


def layer_norm(weight: Tensor, bias: Tensor, eps: float = 1e-5) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weight), eps)
    norm.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return norm


def _folded(parts: Sequence[nn.Module], path: str | Path) -> list[nn.Module]:
    """Every Affine made part of the linear layer beside it."""
    done: list[nn.Module] = []
    for part in parts:
        match (done[-1] if done else None), part:
            case Affine() as first, Affine() as then:
                shift = then.scale * first.shift + then.shift
                done[-1] = Affine(then.scale * first.scale, shift)
            case nn.Linear() as layer, Affine() as affine:
                done[-1] = _after(layer, affine)
            case Affine() as affine, nn.Linear() as layer:
                done[-1] = _before(affine, layer)
            case _:
                done.append(part)
    if any(isinstance(part, Affine) for part in done):
        raise InputError(
            f"a scale and shift (BatchNorm) beside a linear layer required in {path}, got one"
            " between other layers, which no linear layer can take in"
        )
    return done


def _after(layer: nn.Linear, affine: Affine) -> nn.Linear:
    weight, bias = layer.weight.double(), layer.bias
    shift = affine.shift + (0 if bias is None else affine.scale * bias.double())
    return _linear(affine.scale.expand(len(weight))[:, None] * weight, shift, layer)


def _before(affine: Affine, layer: nn.Linear) -> nn.Linear:
    weight = layer.weight.double()
    shift = weight @ affine.shift.expand(weight.shape[1])
    shift = shift if layer.bias is None else shift + layer.bias.double()
    return _linear(weight * affine.scale, shift, layer)


def _linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> nn.Linear:
    return linear(weight.to(like.weight), bias.expand(len(weight)).to(like.weight))


def _orders(shapes: list[tuple[int, int]], width: int | None = None) -> int:
    """In how many orders layers fit together, of which the first reads `width` features."""
    starts = [i for i, (d_in, _) in enumerate(shapes) if width in (None, d_in)]
    return sum(_orders(shapes[:i] + shapes[i + 1 :], shapes[i][1]) for i in starts) or not shapes


def _natural(name: str) -> list[str | int]:
    """Sorting key in which layer 10 follows layer 2."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
