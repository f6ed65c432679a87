"""Heads from ONNX as exporters write them, and from state dicts; what cannot be read is named."""

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import DATA
from distil_rank.core.errors import InputError
from distil_rank.core.heads import UnitNorm, load_head
from tests.core.rows import draw

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def network(*parts: nn.Module) -> nn.Sequential:
    """A head with weights and running statistics that are not the initial ones."""
    made = nn.Sequential(*parts).eval()
    for i, (name, tensor) in enumerate(made.state_dict().items()):
        if tensor.is_floating_point():
            value = 0.4 * draw(*tensor.shape, seed=i).float()
            tensor.copy_(value.abs() + 0.5 if "var" in name or tensor.ndim == 1 else value)
    return made


def graph(path, nodes, constants, d_in=6, opset=17):
    """An ONNX file of (kind, inputs, output, attributes) and named constants."""
    made = helper.make_graph(
        [helper.make_node(k, i, [o], name=f"/{o}", **a) for k, i, o, a in nodes],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", d_in])],
        [helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def expected(path, x: Tensor) -> Tensor:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def rows(d: int, n: int = 40) -> Tensor:
    return draw(n, d, seed=9).float()


W, V, B = (draw(*shape, seed=i).float() for i, shape in enumerate([(5, 6), (6, 5), (5,)]))
HALF, ROOT, ONE, EPS = (torch.tensor(v) for v in (0.5, 2**0.5, 1.0, 1e-3))
FIRST = [("MatMul", ["x", "V"], "m", {}), ("Add", ["b", "m"], "h", {})]
FORMS = {
    "gemm": [("Gemm", ["x", "W", "b"], "y", {"transB": 1, "alpha": 0.5, "beta": 2.0})],
    "gemm of the transpose": [("Gemm", ["x", "V"], "y", {})],
    "matmul and add": [*FIRST, ("Relu", ["h"], "y", {})],
    "erf, half last": [
        *FIRST,
        ("Div", ["h", "root"], "d", {}),
        ("Erf", ["d"], "e", {}),
        ("Add", ["e", "one"], "a", {}),
        ("Mul", ["h", "a"], "p", {}),
        ("Mul", ["p", "half"], "y", {}),
    ],
    "erf, half first": [
        *FIRST,
        ("Mul", ["h", "inverse"], "d", {}),
        ("Erf", ["d"], "e", {}),
        ("Add", ["one", "e"], "a", {}),
        ("Mul", ["half", "h"], "p", {}),
        ("Mul", ["a", "p"], "y", {}),
    ],
    "silu": [*FIRST, ("Sigmoid", ["h"], "s", {}), ("Mul", ["h", "s"], "y", {})],
    "layer norm, decomposed": [
        *FIRST,
        ("ReduceMean", ["h"], "mean", {"axes": [-1]}),
        ("Sub", ["h", "mean"], "c", {}),
        ("Mul", ["c", "c"], "c2", {}),
        ("ReduceMean", ["c2"], "v", {"axes": [-1]}),
        ("Add", ["v", "eps"], "ve", {}),
        ("Sqrt", ["ve"], "s", {}),
        ("Div", ["c", "s"], "n", {}),
        ("Mul", ["n", "b"], "g", {}),
        ("Add", ["g", "b"], "y", {}),
    ],
    "unit norm": [*FIRST, ("ReduceL2", ["h"], "n", {"axes": [-1]}), ("Div", ["h", "n"], "y", {})],
    "unit norm, not below": [
        *FIRST,
        ("ReduceL2", ["h"], "n", {"axes": [-1]}),
        ("Clip", ["n", "root"], "c", {}),
        ("Div", ["h", "c"], "y", {}),
    ],
    "standardized inputs": [
        ("Sub", ["x", "shift"], "c", {}),
        ("Div", ["c", "scale"], "z", {}),
        ("MatMul", ["z", "V"], "y", {}),
    ],
}
CONSTANTS = {"W": W, "V": V, "b": B, "half": HALF, "root": ROOT, "one": ONE, "eps": EPS}
CONSTANTS |= {"inverse": 1 / ROOT, "shift": V[:, 0], "scale": V[:, 1].abs() + 0.5}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_layer_is_read(tmp_path, form):
    path = graph(tmp_path / "head.onnx", FORMS[form], CONSTANTS)
    torch.testing.assert_close(load_head(path)(rows(6)), expected(path, rows(6)))


@pytest.mark.parametrize("modern", [False, True])
def test_an_exported_network_is_the_same_function(tmp_path, modern):
    pytest.importorskip("onnxscript")
    parts = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.LayerNorm(8, 1e-3), nn.Dropout()]
    parts += [nn.Linear(8, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 4), nn.Tanh()]
    made, path = network(*parts, nn.Linear(4, 3), UnitNorm()), tmp_path / "head.onnx"
    torch.onnx.export(made, (rows(6),), path, dynamo=modern, verbose=False, external_data=False)
    head = load_head(path)
    torch.testing.assert_close(head(rows(6)), made(rows(6)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.raw(rows(6)), made[:-1](rows(6)), rtol=1e-5, atol=1e-5)
    assert not head.training and not any(p.requires_grad for p in head.parameters())


def test_what_cannot_be_read_is_named_layer_by_layer(tmp_path):
    nodes = [("Abs", ["x"], "first", {}), ("MatMul", ["first", "V"], "h", {})]
    path = graph(tmp_path / "odd.onnx", [*nodes, ("Elu", ["h"], "last", {})], CONSTANTS)
    with pytest.raises(InputError, match=r"got Abs \(/first\); Elu \(/last\)"):
        load_head(path)
    norm = ("ReduceL2", ["m"], "n", {"axes": [-1]})
    for bounds in (["", "one"], ["half", "one"]):  # a norm that is cut from above is another layer
        clip = [norm, ("Clip", ["n", *bounds], "c", {}), ("Div", ["m", "c"], "y", {})]
        with pytest.raises(InputError, match=r"got Div \(/y\)"):
            load_head(graph(path, [FIRST[0], *clip], CONSTANTS))
    assert (
        load_head(graph(path, [*FIRST, ("Elu", ["h"], "y", {})], CONSTANTS), "h")[0].bias[0] == B[0]
    )
    with pytest.raises(InputError, match="it has y"):
        load_head(path, "z")
    (tmp_path / "text.onnx").write_text("not a graph")
    for name, message in (("text.onnx", "readable ONNX"), ("absent.onnx", "existing file")):
        with pytest.raises(InputError, match=message):
            load_head(tmp_path / name)


@pytest.mark.parametrize(
    "parts",
    [
        (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)),
        (nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)),
        (nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False)),
    ],
)
def test_a_state_dict_with_its_activation(tmp_path, parts):
    """Gaps in the numbers of the layers say where the activation stands."""
    made = network(*parts)
    save_file(made.state_dict(), tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors", activation="relu")
    torch.testing.assert_close(head(rows(6)), made(rows(6)))
    assert not head.unit_norm_inputs


def test_layers_come_in_the_order_of_the_module_or_of_the_keys(tmp_path):
    """A .pt file keeps it; safetensors sorts names, which is an order only where no other fits."""
    names = "input", "hidden", "output"
    made = network(OrderedDict((name, nn.Linear(6, 6)) for name in names))
    expected = made[2](made[1](made[0](rows(6)).tanh()).tanh())
    torch.save(made.state_dict(), tmp_path / "head.pt")
    save_file(made.state_dict(), tmp_path / "head.safetensors")
    for name, key in (("head.pt", None), ("head.safetensors", names)):
        torch.testing.assert_close(load_head(tmp_path / name, key, "tanh")(rows(6)), expected)
    with pytest.raises(InputError, match=r"the layers hidden, input, output required"):
        load_head(tmp_path / "head.safetensors", None, "tanh")
    made = network(OrderedDict(dense=nn.Linear(6, 6), out_proj=nn.Linear(6, 2)))
    save_file(made.state_dict(), tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors", None, "tanh")
    torch.testing.assert_close(head(rows(6)), made[1](made[0](rows(6)).tanh()))


def test_published_heads():
    for layers, width in ((6, 320), (12, 480), (30, 640)):
        path = DATA / "heads" / f"proteinclip_esm2_{layers}.onnx"
        if not path.is_file():
            pytest.skip("public heads are not at hand")
        x = nn.functional.normalize(rows(width))
        head = load_head(path)
        torch.testing.assert_close(head(x), expected(path, x), rtol=0, atol=1e-5)
        assert head.unit_norm_inputs and isinstance(head[-1], UnitNorm) and len(head.raw) == 4
    path = DATA / "heads" / "hatspot_towers_650m.safetensors"
    assert load_head(path, ("domain_fc1", "domain_bn1"))[0].weight.shape == (16, 1280)
