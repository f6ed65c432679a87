"""ESM-2 by name, file or folder; nothing but plain containers and tensors is unpickled.

| `--model` | what is loaded |
|---|---|
| `esm2_t6_8M_UR50D` ... `esm2_t48_15B_UR50D` | fair-esm's file, downloaded once by torch hub |
| `nano-64`, `nano-128`, `nano-256` | small models of ESM-2's architecture, in `models/` |
| `path/to/checkpoint.pt` | a local file in fair-esm's format |
| `path/to/folder` | a Hugging Face ESM-2: config.json, model.safetensors or pytorch_model.bin |
| `path/to/folder` | what `distil-rank compress model` made of an ESM-2 |
| `facebook/esm2_t6_8M_UR50D` | such a folder from the Hugging Face hub, cached there |

A parameter that is missing, or that the model has no place for, is an error. ESM-1b and ESM-1v are
other models (learned positions) and are refused.
"""

import argparse
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError, few, hub_errors
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.records import ROOT, Record, atomic, read_json, sha256
from distil_rank.core.weights import read_state_dict, read_tensors
from distil_rank.proteins import compressed, hugging_face
from distil_rank.proteins.esm2 import ESM2, frequencies

FAMILIES = {  # family -> size -> the name that `load_model` takes
    "esm2": {
        "8M": "esm2_t6_8M_UR50D",
        "35M": "esm2_t12_35M_UR50D",
        "150M": "esm2_t30_150M_UR50D",
        "650M": "esm2_t33_650M_UR50D",
        "3B": "esm2_t36_3B_UR50D",
        "15B": "esm2_t48_15B_UR50D",
    },
    "nano": {"64": "nano-64", "128": "nano-128", "256": "nano-256"},
}

# of the checkout, else where an installed wheel puts them
_INSTALLED = Path(sysconfig.get_path("data"), "share", "distil-rank", "models")
MODELS = next((x for x in (ROOT / "models", _INSTALLED) if x.is_dir()), ROOT / "models")
_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"
# what checkpoints hold beside the parameters: of contact prediction, of pooling for other tasks,
# positions that rotary models do not learn
_HARMLESS = re.compile(
    r"contact_head\.|pooler\.|embeddings\.position_embeddings\.|(.*\.)?(position_ids|inv_freq)$"
)


class Loaded(NamedTuple):
    """A model, the name it goes by in results, and the SHA-256 of its weight file(s)."""

    model: ESM2
    name: str
    sha256: str


def load_model(
    name: str, device: torch.device | str = "cpu", dtype: str = "float32", head: bool = False
) -> Loaded:
    """The ESM-2 model `name` (see the table above) in evaluation mode, with its head if asked for.

    `dtype` is that of its linear layers; all else is float32. Raises InputError for an unknown
    name, a missing or damaged checkpoint and one that is not ESM-2.

    >>> loaded = load_model("nano-64")
    >>> loaded.name, loaded.model.width
    ('nano-64', 64)
    """
    path = locate(name)
    factors: dict[str, Record] = {}
    if (path / compressed.DESCRIPTION).is_file():
        files = [path / compressed.WEIGHTS]
        settings, named, factors = compressed.read(path)
    elif path.is_dir():
        files, config = hugging_face.weight_files(path), path / "config.json"
        settings = hugging_face.settings(read_json(config), config)
        key = hugging_face.fair_esm_key
        named = [(key(k), x) for file in files for k, x in read_state_dict(file).items()]
    else:
        files = [path]
        settings, named = _read_fair_esm(path)
    with torch.device("meta"):
        model = ESM2(**settings, head=head)
        _put_factors(model, factors)
    _fill(model, named, path, device, getattr(torch, dtype))
    label = path.stem if path.suffix == ".pt" else name.rstrip("/").rpartition("/")[2]
    return Loaded(model.eval(), label, _sha256_of(files))


def _put_factors(model: ESM2, factors: Mapping[str, Record]) -> None:
    """Smaller layers in the place of those that were compressed, as far as the model has them."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in linear & factors.keys():
        shape = factors[name]
        d_in, d_out = shape["d_in"], shape["d_out"]
        small: nn.Module = nn.Linear(d_in, d_out, shape["bias"])  # of fewer neurons or in few bits
        if "rank" in shape:
            A, B = torch.empty(shape["rank"], d_in), torch.empty(d_out, shape["rank"])
            small = LowRankLinear(A, B, torch.empty(d_out) if shape["bias"] else None)
        model.set_submodule(name, small)


def save_model(model: ESM2, path: str | Path) -> None:
    """Write float16 weights in fair-esm's format, without contact regression.

    Rotary frequencies stay float32: rounding them would turn far residues by a wrong angle.
    """
    if model.eps != 1e-5:
        raise InputError(
            f"layer norms with eps 1e-5 required by fair-esm's format, got {model.eps}"
        )
    described = argparse.Namespace(
        encoder_layers=model.depth,
        encoder_embed_dim=model.width,
        encoder_attention_heads=model.heads,
        token_dropout=model.token_dropout,
    )
    state = {}
    for name, value in model.state_dict().items():
        prefix = "encoder." if name.startswith("lm_head") else "encoder.sentence_encoder."
        state[prefix + name] = value.half().cpu()
    for layer in range(model.depth):
        name = f"encoder.sentence_encoder.layers.{layer}.self_attn.rot_emb.inv_freq"
        state[name] = frequencies(model.width // model.heads)
    # torch.save writes the name of a path, here that of a process, into the file
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save({"cfg": {"model": described}, "model": state}, file)


def locate(name: str) -> Path:
    """Checkpoint file or folder of a model; a known remote one is downloaded."""
    if name in FAMILIES["nano"].values():
        path = MODELS / f"{name}.pt"
        if not path.is_file():
            raise InputError(
                f"a checkpoint required at {path}, got nothing there; train it with"
                f" `distil-rank pretrain` or restore {MODELS.name}/"
            )
        return path
    if name in FAMILIES["esm2"].values():
        return _download(name)
    path = Path(name)
    if name and path.exists():
        return path
    remote = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    if remote and not name.endswith((".pt", ".safetensors")):
        return _download_hugging_face(name)
    known = ", ".join(name for sizes in FAMILIES.values() for name in sizes.values())
    raise InputError(
        f"a model name ({known}), a .pt file or a Hugging Face ESM-2 folder or hub name required,"
        f" got {name}"
    )


def _download(name: str) -> Path:
    url, path = _URL.format(name), Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    if not path.is_file():
        with hub_errors(f"{path} or its download", f"fetch {url} elsewhere and give the file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))  # under a temporary name, then renamed
    return path


def _download_hugging_face(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "compressed.json", "model*.safetensors", "*.safetensors.index.json"]
    pickled = ["config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"]
    with hub_errors(f"{name} as a local model or on the Hugging Face hub", "check the name"):
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=pickled))
        return folder


def _read_fair_esm(path: Path) -> tuple[Record, list[tuple[str, Tensor]]]:
    """Architecture and weights of a fair-esm checkpoint."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        data: Any = read_tensors(path)
    try:
        found, state = data["cfg"]["model"], data["model"]
        settings = {
            "layers": int(found.encoder_layers),
            "width": int(found.encoder_embed_dim),
            "heads": int(found.encoder_attention_heads),
            "token_dropout": bool(found.token_dropout),
        }
        prefix = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.)")
        return settings, [(prefix.sub("", key), x.detach()) for key, x in state.items()]
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"a fair-esm ESM-2 checkpoint required, got {path} ({error!r:.160}); download it again"
        ) from None


def _fill(
    model: ESM2,
    named: list[tuple[str, Tensor]],
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Put the tensors in the places of the model's meta parameters, every one of them once."""
    state: dict[str, Tensor] = {}
    while named:  # moved one by one: never two copies of a large model
        key, tensor = named.pop()
        if _HARMLESS.match(key) or (model.lm_head is None and key.startswith("lm_head.")):
            continue
        if key in state and not torch.equal(state[key], tensor):
            raise InputError(f"one value of {key} required in {path}, got two different ones")
        state[key] = tensor
    if model.lm_head is not None and (embedding := state.get("embed_tokens.weight")) is not None:
        if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], embedding):
            raise InputError(f"a head with the embedding's weights required, got others in {path}")
        state["lm_head.weight"] = embedding
    try:
        missing, surplus = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # its first line names the class
        shapes = str(error).splitlines()[1].strip()
        raise InputError(f"parameters of other shapes required in {path}, got {shapes}") from None
    if missing or surplus:
        found = [f"no {few(sorted(missing))}"] if missing else []
        found += [f"also {few(sorted(surplus))}"] if surplus else []
        what = f"{model.depth} layers" + (" and a head" if model.lm_head is not None else "")
        raise InputError(
            f"the parameters of an ESM-2 of {what} required, all and no others,"
            f" got {' and '.join(found)} in {path}"
        )
    state.clear()
    if model.lm_head is not None:
        model.lm_head.weight = model.embed_tokens.weight
    linear = {id(p) for x in model.modules() if isinstance(x, nn.Linear) for p in x.parameters()}
    for parameter in model.requires_grad_(False).parameters():
        kind = dtype if id(parameter) in linear else torch.float32
        parameter.data = parameter.data.to(device=device, dtype=kind)


def _sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of one file as `sha256sum` prints it; of several, that of their digests in a row."""
    first, *more = [sha256(path) for path in files]
    return hashlib.sha256("".join([first, *more]).encode()).hexdigest() if more else first
