"""The layers of a head in an ONNX file, read backward from its output.

Exporters write one layer in several ways: GELU as Erf and products, LayerNorm and the scaling to
unit length as means, powers and quotients. Each form is one function that returns a layer and the
name of what the layer reads, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.heads import Affine, UnitNorm, batch_norm, layer_norm
from distil_rank.core.linear import linear

SIMPLE: dict[str, Callable[[], nn.Module]] = {
    "Relu": nn.ReLU,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
}
NOTHING = ("Identity", "Dropout", "Flatten")  # for one row of features in evaluation
# forms of several nodes: (kind, inputs); a name is one tensor everywhere, a list any of its forms
GATE = ("Add", ("Erf", [("Div", "x", 2**0.5), ("Mul", "x", 0.5**0.5)]), 1.0)
GELU = [("Mul", ("Mul", a, b), c) for a, b, c in permutations(("x", GATE, 0.5))]
SILU = ("Mul", "x", ("Sigmoid", "x"))
CENTERED = ("Sub", "x", ("ReduceMean", "x"))
SQUARE = [("Pow", CENTERED, 2.0), ("Mul", CENTERED, CENTERED)]
SCALED = ("Mul", ("Div", CENTERED, ("Sqrt", ("Add", ("ReduceMean", SQUARE), "eps"))), "weight")
LAYER_NORM = [("Add", SCALED, "bias"), SCALED]
UNIT_NORM = "/unit_norm/"  # ProteinCLIP's last layer; its heads read inputs of unit length

Found = tuple[nn.Module | None, str] | None


@dataclass(frozen=True)
class Graph:
    """Nodes by what they make, and every constant."""

    nodes: dict[str, Any]
    constants: dict[str, Tensor]

    def is_a(self, name: str, *kinds: str) -> bool:
        return name in self.nodes and self.nodes[name].op_type in kinds

    def inputs(self, name: str) -> list[str]:
        return [x for x in self.nodes[name].input if x]

    def attribute(self, name: str, key: str, default: Any) -> Any:
        from onnx.helper import get_attribute_value

        found = [a for a in self.nodes[name].attribute if a.name == key]
        return get_attribute_value(found[0]) if found else default

    def number(self, name: str) -> float | None:
        value = self.constants.get(name)
        return float(value) if value is not None and value.numel() == 1 else None

    def pair(self, name: str, kind: str) -> tuple[str, Tensor] | None:
        """The variable and the constant of a node with one of each, in any order."""
        if not self.is_a(name, kind):
            return None
        known = [x in self.constants for x in self.inputs(name)]
        if sorted(known) != [False, True]:
            return None
        variable, constant = sorted(self.inputs(name), key=lambda x: x in self.constants)
        return variable, self.constants[constant]

    def over_features(self, name: str) -> bool:
        """Whether the node reduces over the last axis and keeps that axis."""
        axes = self.attribute(name, "axes", None)
        if axes is None and self.inputs(name)[-1] in self.constants:
            axes = self.constants[self.inputs(name)[-1]].tolist()
        return axes in ([-1], [1]) and bool(self.attribute(name, "keepdims", 1))

    def match(self, form: Any, name: str, found: dict[str, str]) -> bool:
        """Whether `name` is made as a form says; `found` then has the tensors that it names."""
        if isinstance(form, list):
            return any(self.match(choice, name, found) for choice in form)
        if isinstance(form, str):
            return found.setdefault(form, name) == name
        if isinstance(form, float):
            return math.isclose(self.number(name) or 0.0, form, rel_tol=1e-5)
        kind, *parts = form
        if not self.is_a(name, kind):
            return False
        if kind.startswith("Reduce") and not self.over_features(name):
            return False
        inputs = self.inputs(name)
        for order in (inputs, inputs[::-1]) if kind in ("Add", "Mul") else (inputs,):
            trial = dict(found)
            if all(self.match(part, x, trial) for part, x in zip(parts, order)):
                found.update(trial)
                return True
        return False


def read_onnx(path: Path, output: str | None = None) -> tuple[list[nn.Module], bool]:
    """Layers in order, and whether the head reads inputs of unit length; InputError."""
    import onnx

    if not path.is_file():
        raise InputError(f"an existing file required, got {path}; check the path")
    try:
        model = onnx.load(str(path))
        found = model.graph.initializer
        constants = {t.name: _tensor(onnx.numpy_helper.to_array(t)) for t in found}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = _tensor(onnx.numpy_helper.to_array(node.attribute[0].t))
    except Exception as error:  # bytes of another kind fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"a readable ONNX file required, got {path}: {reason}") from None
    graph = Graph({name: node for node in model.graph.node for name in node.output}, constants)
    outputs, sources = [o.name for o in model.graph.output], {i.name for i in model.graph.input}
    if output is not None and output not in graph.nodes:
        raise InputError(
            f"an output of {path} as --key required, got {output!r}; it has {', '.join(outputs)}"
        )
    parts, unread = _walk(graph, output or outputs[0], sources - constants.keys())
    if unread:
        raise InputError(
            f"a head of linear layers, activations and normalizations required in {path}, got"
            f" {'; '.join(unread)}; give a file that ends before them, or --key with an output"
        )
    last = [name for name in graph.nodes if name.startswith(UNIT_NORM)]
    return parts, bool(last) and bool(parts) and isinstance(parts[-1], UnitNorm)


def _tensor(array: Any) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def _walk(graph: Graph, name: str, sources: set[str]) -> tuple[list[nn.Module], list[str]]:
    """Layers from the graph's input to `name`, and what cannot be read."""
    parts: list[nn.Module] = []
    unread: list[str] = []
    while name not in sources:
        found = next((x for x in (form(graph, name) for form in FORMS) if x is not None), None)
        if found is not None:
            part, name = found
            parts += [] if part is None else [part]
            continue
        node = graph.nodes.get(name)
        unread.append(f"{node.op_type} ({node.name or name})" if node is not None else name)
        variables = [x for x in graph.inputs(name) if x not in graph.constants] if node else []
        if not variables:
            break
        name = variables[0]
    return parts[::-1], unread[::-1]


def _linear(graph: Graph, name: str) -> Found:
    """Gemm, or MatMul without its bias: an Add is an Affine, which the layer takes in."""
    if not graph.is_a(name, "Gemm", "MatMul"):
        return None
    x, *names = graph.inputs(name)
    if graph.attribute(name, "transA", 0) or not graph.constants.keys() >= set(names):
        return None
    weight, *shift = (graph.constants[k] for k in names)
    if weight.ndim != 2:
        return None
    weight = weight * graph.attribute(name, "alpha", 1.0)
    weight = weight if graph.attribute(name, "transB", 0) else weight.T
    bias = None
    if shift:
        bias = shift[0].reshape(-1) * graph.attribute(name, "beta", 1.0)
        if len(bias) not in (1, len(weight)):
            return None
        bias = bias.expand(len(weight)).contiguous()
    return linear(weight.contiguous(), bias), x


def _activation(graph: Graph, name: str) -> Found:
    found: dict[str, str] = {}
    for form, activation in ((GELU, nn.GELU), (SILU, nn.SiLU)):
        if graph.match(form, name, found):
            return activation(), found["x"]
    if graph.is_a(name, *SIMPLE):
        return SIMPLE[graph.nodes[name].op_type](), graph.inputs(name)[0]
    if graph.is_a(name, "Gelu"):
        approximate = graph.attribute(name, "approximate", b"none").decode()
        return nn.GELU(approximate), graph.inputs(name)[0]
    if graph.is_a(name, "Softmax") and graph.attribute(name, "axis", -1) in (-1, 1):
        return nn.Softmax(-1), graph.inputs(name)[0]
    if graph.is_a(name, *NOTHING):
        return None, graph.inputs(name)[0]
    return None


def _layer_norm(graph: Graph, name: str) -> Found:
    found: dict[str, str] = {}
    if graph.match(LAYER_NORM, name, found):
        eps = graph.number(found["eps"])
    elif graph.is_a(name, "LayerNormalization") and graph.attribute(name, "axis", -1) in (-1, 1):
        found = dict(zip(("x", "weight", "bias"), graph.inputs(name)))
        eps = graph.attribute(name, "epsilon", 1e-5)
    else:
        return None
    weight, bias = (graph.constants.get(found.get(key, "")) for key in ("weight", "bias"))
    if weight is None or weight.ndim != 1 or eps is None or (bias is None and "bias" in found):
        return None
    bias = torch.zeros_like(weight) if bias is None else bias.expand_as(weight)
    return layer_norm(weight, bias, eps), found["x"]


def _unit_norm(graph: Graph, name: str) -> Found:
    if graph.is_a(name, "LpNormalization"):
        fits = graph.attribute(name, "p", 2) == 2 and graph.attribute(name, "axis", -1) in (-1, 1)
        return (UnitNorm(), graph.inputs(name)[0]) if fits else None
    if not graph.is_a(name, "Div"):
        return None
    x, norm = graph.inputs(name)
    eps = 0.0
    while graph.is_a(norm, "Clip", "Max", "Expand"):
        inner, *bounds = graph.nodes[norm].input
        if not graph.is_a(norm, "Expand"):  # min, and of a Clip also max
            least = graph.number(bounds[0]) if bounds else graph.attribute(norm, "min", None)
            if least is None or any(bounds[1:]) or graph.attribute(norm, "max", 3e38) < 3e38:
                return None
            eps = least
        norm = inner
    return (UnitNorm(eps), x) if graph.match(("ReduceL2", "x"), norm, {"x": x}) else None


def _scale(graph: Graph, name: str) -> Found:
    """BatchNormalization, and products, sums, differences and quotients with a constant."""
    if graph.is_a(name, "BatchNormalization"):
        x, *names = graph.inputs(name)
        if not graph.constants.keys() >= set(names):
            return None
        weight, bias, mean, variance = (graph.constants[k] for k in names)
        return batch_norm(weight, bias, mean, variance, graph.attribute(name, "epsilon", 1e-5)), x
    for kind in ("Add", "Mul", "Sub", "Div"):
        found = graph.pair(name, kind)
        if found is None:
            continue
        x, value = found[0], found[1].double().reshape(-1)
        one, first = torch.ones_like(value), graph.inputs(name)[0] == found[0]
        if kind == "Div" and not first:
            return None
        scale, shift = {
            "Add": (one, value),
            "Mul": (value, 0 * one),
            "Sub": (one, -value) if first else (-one, value),
            "Div": (1 / value, 0 * one),
        }[kind]
        return Affine(scale, shift), x
    return None


FORMS = (_linear, _activation, _layer_norm, _unit_norm, _scale)
