"""Compressed modules on disk: weights (safetensors), what to rebuild (JSON), certificate, README.

    model = distil_rank.load("small/")

Bit-equal to what was saved; nothing is unpickled. A module whose class is not known here is loaded
into a dense instance of it: `load("small/", model=MyModel())`. Files of a folder:

| file | what |
|---|---|
| `compressed.json` | schema; kind ("esm2", "transformers", "head", "module"), class, config; |
| | factors: name of a layer -> type "low-rank", d_in, d_out, rank, bias, |
| | or type "linear", d_in, d_out, bits, bias, or "pruned" (dense), d_in, d_out, bias; |
| | NAME.A and NAME.B may be such layers; |
| | tied: name -> name with the same tensor; float32: names stored narrower than computed |
| `model.safetensors` | the state dict; of a low-rank layer NAME.A.weight (r, d_in), |
| | NAME.B.weight (d_out, r), NAME.B.bias; |
| | linear: NAME.packed, int8 or two to a byte (low half first, plus 8), .scale, .bias |
| `config.json` | of a model: type "distil_rank", for `AutoModel.from_pretrained` |
| tokenizer files | of a model: as in the source; an ESM-2 always has `vocab.txt` |
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distil_rank.compress.architectures import Architecture, describe
from distil_rank.compress.hugging_face import TOKENIZER, tokenizer_files
from distil_rank.compress.quantise import QuantLinear, on_integers
from distil_rank.core.errors import InputError
from distil_rank.core.heads import ACTIVATIONS, UnitNorm
from distil_rank.core.linear import LowRankLinear, PrunedLinear
from distil_rank.core.narrow import PartGELU
from distil_rank.core.records import atomic, read_json, require_writable
from distil_rank.proteins.compressed import DESCRIPTION, SCHEMA, WEIGHTS

MODEL_TYPE = "distil_rank"
# what may lie beside an earlier module, and would pass for that of the next one
STALE = ("certificate.json", "README.md", "report.json", "report.png", "merged", "config.json")
EXPORTS = ("model.onnx", "model.onnx.data", *TOKENIZER)
PARTS: dict[str, type[nn.Module]] = {
    **ACTIVATIONS,
    "linear": nn.Linear,
    "layernorm": nn.LayerNorm,
    "dropout": nn.Dropout,
    "softmax": nn.Softmax,
    "unit norm": UnitNorm,
    "part gelu": PartGELU,
}
SMALL = {"low-rank": LowRankLinear, "linear": QuantLinear, "pruned": PrunedLinear}
SETTINGS = {  # of the parts that have some, in their order, and what they are called in the file
    nn.Linear: {"d_in": "in_features", "d_out": "out_features"},
    nn.LayerNorm: {"shape": "normalized_shape", "eps": "eps"},
    nn.GELU: {"approximate": "approximate"},
    nn.Dropout: {"p": "p"},
    nn.Softmax: {"dim": "dim"},
    UnitNorm: {"eps": "eps"},
    PartGELU: {"linear": "linear"},
}


def save(
    module: nn.Module,
    folder: str | Path,
    architecture: Architecture | None = None,
    certificate: Mapping[str, Any] | None = None,
    readme: str = "",
) -> None:
    """Write a compressed layer, head or model; an earlier one in the folder is replaced whole.

    architecture: of a model, with its tokenizer; without one it is recognized by its class.

    Files are put in place when all are written, the description last. What was put beside the
    earlier module (reports, exports) goes with it; files of other names stay.
    """
    folder = Path(folder)
    architecture = architecture or describe(module)
    tensors, tied = untied(module.state_dict())
    description = {"schema": SCHEMA, **describe_module(module, architecture)}
    description |= {"factors": factors(module), "tied": tied}
    if architecture is not None:
        tensors, description["float32"] = narrowed(tensors)
    texts = {DESCRIPTION: json.dumps(description, indent=1) + "\n"}
    if certificate is not None:
        texts["certificate.json"] = json.dumps(certificate, indent=1, allow_nan=False) + "\n"
    if readme:
        texts["README.md"] = readme
    files = {name: text.encode() for name, text in texts.items()}
    if architecture is not None:
        known = {"model_type": MODEL_TYPE, "architectures": [architecture.class_name]}
        files |= {
            # what transformers reads first: a type that only this package registers (`auto`)
            "config.json": json.dumps(known, indent=1).encode(),
            **tokenizer_files(architecture.source, architecture.is_esm),
        }
    require_writable(folder)
    with ExitStack() as last_in_first_out:
        for name, content in files.items():
            last_in_first_out.enter_context(atomic(folder / name)).write_bytes(content)
        save_file(tensors, last_in_first_out.enter_context(atomic(folder / WEIGHTS)))
        if (folder / DESCRIPTION).is_file():
            for stale in [folder / name for name in (*STALE, *EXPORTS) if name not in files]:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)


def require_other_folder(folder: Path, source: Path) -> None:
    """InputError where a module saved in this folder would replace what it is made from."""
    replaced = source.name == WEIGHTS or (source.parent / "config.json").is_file()
    if replaced and source.resolve().parent == folder.resolve():
        raise InputError(
            f"another folder than that of {source}, which would be replaced, required for --out"
        )


def describe_module(module: nn.Module, architecture: Architecture | None) -> dict[str, Any]:
    if architecture is not None:
        kind, name = architecture.kind, architecture.class_name
        return {"kind": kind, "class": name, "config": architecture.config}
    if isinstance(module, LowRankLinear | nn.Linear):
        return {"kind": "head", "modules": [_head_part(module)], "single": True}
    if type(module) is nn.Sequential:
        return {"kind": "head", "modules": [_head_part(part) for part in module], "single": False}
    return {"kind": "module", "class": type(module).__name__}


def _head_part(part: nn.Module) -> dict[str, Any]:
    if isinstance(part, LowRankLinear | PrunedLinear):
        return {"type": "factors"}
    kind = next((kind for kind, cls in PARTS.items() if type(part) is cls), None)
    if kind is None:
        raise InputError(f"a head of {', '.join(PARTS)} required, got {type(part).__name__}")
    settings = {key: getattr(part, name) for key, name in SETTINGS.get(PARTS[kind], {}).items()}
    bias = {"bias": part.bias is not None} if hasattr(part, "bias") else {}
    return {"type": kind} | settings | bias


def _build_head(description: Mapping[str, Any]) -> nn.Module:
    parts: list[nn.Module] = []
    for part in description["modules"]:
        # factors are put in place later, with those of models
        cls = PARTS["identity" if part["type"] == "factors" else part["type"]]
        bias = {"bias": part["bias"]} if "bias" in part else {}
        with torch.device("meta"):
            parts.append(cls(*(part[key] for key in SETTINGS.get(cls, {})), **bias))
    return parts[0] if description["single"] else nn.Sequential(*parts)


def factors(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Shapes of all layers that compression made, by name."""
    found = {}
    for name, part in module.named_modules():
        kind = next((kind for kind, cls in SMALL.items() if isinstance(part, cls)), None)
        if kind is not None:
            p: Any = part
            found[name] = {"type": kind, "d_in": p.in_features, "d_out": p.out_features}
            extra = {"linear": ("bits",), "pruned": ()}.get(kind, ("rank",))
            found[name] |= {key: getattr(p, key) for key in extra} | {"bias": p.bias is not None}
    return found


def _empty_factors(shape: Mapping[str, Any]) -> nn.Module:
    if shape["type"] not in SMALL:
        known = ", ".join(SMALL)
        raise InputError(f"layers of type {known} required, got {shape['type']}; compress it again")
    d_in, d_out = shape["d_in"], shape["d_out"]
    if shape["type"] == "linear":
        return QuantLinear.empty(d_in, d_out, shape["bits"], shape["bias"])
    bias = torch.zeros(d_out) if shape["bias"] else None
    if shape["type"] == "pruned":
        return PrunedLinear(torch.zeros(d_out, d_in), bias)
    return LowRankLinear(torch.zeros(shape["rank"], d_in), torch.zeros(d_out, shape["rank"]), bias)


def untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, each stored once, and alias -> name for those that share memory."""
    seen: dict[tuple[int, torch.Size], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def narrowed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """float32 tensors in a half precision that holds them exactly, and the names of those."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        for dtype in (torch.float16, torch.bfloat16):
            if tensor.dtype == torch.float32 and torch.equal(tensor.to(dtype).float(), tensor):
                found[name] = tensor.to(dtype)
                break
    return found, [name for name in found if found[name].dtype != tensors[name].dtype]


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The module saved in a folder, in evaluation mode.

    `model` is a dense instance where its class is not known here.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), folder)
    >>> load(folder)(torch.zeros(1, 8)).shape
    torch.Size([1, 4])
    """
    folder = Path(path)
    description = read_json(folder / DESCRIPTION, SCHEMA)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"a readable {WEIGHTS} required in {folder}, got: {error}") from None
    tensors |= {name: tensors[name].float() for name in description.get("float32", ())}
    tensors |= {alias: tensors[name] for alias, name in description["tied"].items()}
    kind = description["kind"]
    if kind == "head":
        module: nn.Module = _build_head(description)
    elif kind in ("esm2", "transformers"):
        module = Architecture(kind, description["class"], description["config"]).build()
    elif model is None:
        raise InputError(
            f"a dense {description['class']} required to load {folder}; call load(path, model=...)"
        )
    else:
        module = copy.deepcopy(model)
    try:
        for name, shape in description["factors"].items():
            if name:
                module.set_submodule(name, _empty_factors(shape))
            else:
                module = _empty_factors(shape)
    except AttributeError as error:
        raise InputError(f"a model with layer {name} required for {folder}, got: {error}") from None
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise InputError(
            f"weights of this {kind} required in {folder}, got others: {reason}"
        ) from None
    if hasattr(module, "tie_weights"):
        cast(Any, module).tie_weights()
    for alias, name in description["tied"].items():  # one parameter again
        owner, _, attribute = alias.rpartition(".")
        setattr(module.get_submodule(owner), attribute, attrgetter(name)(module))
    if kind == "transformers":
        cast(Any, module).config._name_or_path = str(folder)  # whose tokenizer it is
    on_integers(module, kind != "head")  # a head stays what its certificate measured
    return savable(module).eval().requires_grad_(False)


def savable(model: nn.Module) -> nn.Module:
    """The model itself; one of transformers now writes this format in `save_pretrained`."""
    cls: Any = type(model)
    if hasattr(cls, "save_pretrained") and cls.save_pretrained is not _save_pretrained:
        members = {"save_pretrained": _save_pretrained, "__module__": cls.__module__}
        model.__class__ = type(cls.__name__, (cls,), members)
    return model


def _save_pretrained(
    self: nn.Module, save_directory: str | Path, safe_serialization: bool = True
) -> None:
    """Write the model so that `AutoModel.from_pretrained` and `distil_rank.load` read it."""
    if not safe_serialization:
        raise InputError("safetensors required, got safe_serialization=False; leave it out")
    save(self, save_directory)
