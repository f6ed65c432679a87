"""Heads from ONNX as exporters write them, and from state dicts; what cannot be read is named."""

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.core.heads import UnitNorm, load_head
from tests.core.rows import draw

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from onnx.numpy_helper import from_array  # noqa: E402
from onnx.parser import parse_model  # noqa: E402


def network(*parts: nn.Module) -> nn.Sequential:
    """A head with weights and running statistics that are not the initial ones."""
    made = nn.Sequential(*parts).eval()
    for i, (name, tensor) in enumerate(made.state_dict().items()):
        if tensor.is_floating_point():
            value = 0.4 * draw(*tensor.shape, seed=i).float()
            tensor.copy_(value.abs() + 0.5 if "var" in name or tensor.ndim == 1 else value)
    return made


def graph(path, nodes):
    """An ONNX file of nodes from x (rows, 6) to y; each is named /OUTPUT."""
    signature = "head (float[rows, 6] x) => (float[rows, columns] y)"
    model = parse_model(f'<ir_version: 8, opset_import: ["": 17]> {signature} {{ {nodes} }}')
    for node in model.graph.node:
        node.name = f"/{node.output[0]}"
    model.graph.initializer.extend(from_array(t.numpy(), name) for name, t in CONSTANTS.items())
    onnx.save(model, str(path))
    return path


def expected(path, x: Tensor) -> Tensor:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def rows(d: int, n: int = 40) -> Tensor:
    return draw(n, d, seed=9).float()


W, V, B = (draw(*shape, seed=i).float() for i, shape in enumerate([(5, 6), (6, 5), (5,)]))
HALF, ROOT, ONE, EPS = (torch.tensor(v) for v in (0.5, 2**0.5, 1.0, 1e-3))
FIRST = "m = MatMul(x, V) h = Add(b, m)"
FORMS = {
    "gemm": "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, W, b)",
    "gemm of the transpose": "y = Gemm(x, V)",
    "matmul and add": f"{FIRST} y = Relu(h)",
    "erf, half last": f"{FIRST} d = Div(h, root) e = Erf(d) a = Add(e, one)"
    " p = Mul(h, a) y = Mul(p, half)",
    "erf, half first": f"{FIRST} d = Mul(h, inverse) e = Erf(d) a = Add(one, e)"
    " p = Mul(half, h) y = Mul(a, p)",
    "silu": f"{FIRST} s = Sigmoid(h) y = Mul(h, s)",
    "layer norm, decomposed": f"{FIRST} mean = ReduceMean<axes=[-1]>(h) c = Sub(h, mean)"
    " c2 = Mul(c, c) v = ReduceMean<axes=[-1]>(c2) ve = Add(v, eps) s = Sqrt(ve)"
    " n = Div(c, s) g = Mul(n, b) y = Add(g, b)",
    "unit norm": f"{FIRST} n = ReduceL2<axes=[-1]>(h) y = Div(h, n)",
    "unit norm, not below": f"{FIRST} n = ReduceL2<axes=[-1]>(h) c = Clip(n, root) y = Div(h, c)",
    "standardized inputs": "c = Sub(x, shift) z = Div(c, scale) y = MatMul(z, V)",
}
CONSTANTS = {"W": W, "V": V, "b": B, "half": HALF, "root": ROOT, "one": ONE, "eps": EPS}
CONSTANTS |= {"inverse": 1 / ROOT, "shift": V[:, 0], "scale": V[:, 1].abs() + 0.5}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_layer_is_read(tmp_path, form):
    path = graph(tmp_path / "head.onnx", FORMS[form])
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
    path = tmp_path / "odd.onnx"
    norm = "m = MatMul(x, V) n = ReduceL2<axes=[-1]>(m)"
    for nodes, unread in (
        ("first = Abs(x) h = MatMul(first, V) y = Elu(h)", r"Abs \(/first\); Elu \(/y\)"),
        # a norm that is cut from above is another layer
        (f'{norm} c = Clip(n, "", one) y = Div(m, c)', r"Div \(/y\)"),
        (f"{norm} c = Clip(n, half, one) y = Div(m, c)", r"Div \(/y\)"),
        (f"{norm} c = Clip<min=0.5, max=1.0>(n) y = Div(m, c)", r"Div \(/y\)"),  # to opset 10
    ):
        with pytest.raises(InputError, match=f"got {unread}"):
            load_head(graph(path, nodes))
    assert load_head(graph(path, f"{FIRST} y = Elu(h)"), "h")[0].bias[0] == B[0]
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
    shapes = {"a": (6, 9), "b": (9, 6), "c": (6, 6), "d": (6, 2)}  # a b c d, and also c a b d
    made = network(OrderedDict((name, nn.Linear(*shape)) for name, shape in shapes.items()))
    save_file(made.state_dict(), tmp_path / "head.safetensors")
    with pytest.raises(InputError, match=r"the layers a, b, c, d required"):
        load_head(tmp_path / "head.safetensors", None, "tanh")
    made = network(OrderedDict(dense=nn.Linear(6, 6), out_proj=nn.Linear(6, 2)))
    save_file(made.state_dict(), tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors", None, "tanh")
    torch.testing.assert_close(head(rows(6)), made[1](made[0](rows(6)).tanh()))


def test_published_heads(shared_data):
    for layers, width in ((6, 320), (12, 480), (30, 640)):
        path = shared_data / "heads" / f"proteinclip_esm2_{layers}.onnx"
        x = nn.functional.normalize(rows(width))
        head = load_head(path)
        torch.testing.assert_close(head(x), expected(path, x), rtol=0, atol=1e-5)
        assert head.unit_norm_inputs and isinstance(head[-1], UnitNorm) and len(head.raw) == 4
    path = shared_data / "heads" / "hatspot_towers_650m.safetensors"
    assert load_head(path, ("domain_fc1", "domain_bn1"))[0].weight.shape == (16, 1280)
