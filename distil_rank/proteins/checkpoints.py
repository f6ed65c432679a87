"""ESM-2 checkpoints by name, file or folder, loaded without unpickling anything but plain containers and tensors.

| `--model` | what is loaded |
|---|---|
| `esm2_t6_8M_UR50D` ... `esm2_t48_15B_UR50D` | fair-esm's file, downloaded once into torch hub's cache |
| `nano-64`, `nano-128`, `nano-256` | small models of this repository, in `models/` (ESM-2's architecture, not ESM-2) |
| `path/to/checkpoint.pt` | a local file in fair-esm's format |
| `path/to/folder` | a Hugging Face ESM-2: `config.json` and `model.safetensors` (or its shards) |
| `facebook/esm2_t6_8M_UR50D` | the same from the Hugging Face hub, cached there |
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.proteins.esm2 import ESM2, TOKENS
from distil_rank.core.records import sha256


class Member(NamedTuple):
    """One size of a model family: the name `load_model` takes, features d, number of layers."""

    name: str
    width: int
    layers: int


FAMILIES: dict[str, dict[str, Member]] = {
    "esm2": {
        "8M": Member("esm2_t6_8M_UR50D", 320, 6),
        "35M": Member("esm2_t12_35M_UR50D", 480, 12),
        "150M": Member("esm2_t30_150M_UR50D", 640, 30),
        "650M": Member("esm2_t33_650M_UR50D", 1280, 33),
        "3B": Member("esm2_t36_3B_UR50D", 2560, 36),
        "15B": Member("esm2_t48_15B_UR50D", 5120, 48),
    },
    "nano": {
        "64": Member("nano-64", 64, 4),
        "128": Member("nano-128", 128, 4),
        "256": Member("nano-256", 256, 4),
    },
}

MODELS = Path(__file__).parents[2] / "models"
_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"
_NAMES = {family: [member.name for member in sizes.values()] for family, sizes in FAMILIES.items()}


class Loaded(NamedTuple):
    """A model, the name it goes by in results, and the SHA-256 of its weight file(s)."""

    model: ESM2
    name: str
    sha256: str


def load_model(name: str, device: torch.device | str = "cpu", compute: str = "float32") -> Loaded:
    """The ESM-2 model `name` (see the table above) in evaluation mode; `compute` is the dtype of its linear layers.

    Raises InputError for an unknown name, a missing or damaged checkpoint and one that is not ESM-2.
    """
    path = locate(name)
    if path.is_dir():
        files = _weight_files(path)
        architecture, state = _read_hugging_face(path, files)
    else:
        files = [path]
        architecture, state = _read_fair_esm(path)
    with torch.device("meta"):
        model = ESM2(**architecture)
    linear = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    if "emb_layer_norm_before.weight" in state:
        raise InputError(f"required an ESM-2 checkpoint, got {path} with a layer norm before the encoder (ESM-1)")
    for key, expected in model.state_dict().items():
        tensor = state.pop(key, None)  # popped one by one: never two copies of a large model
        if tensor is None or tensor.shape != expected.shape:
            got = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise InputError(f"required {key} of shape {tuple(expected.shape)} in {path}, got {got}; download it again")
        dtype = getattr(torch, compute) if key.rpartition(".")[0] in linear else torch.float32
        _assign(model, key, tensor.to(device=device, dtype=dtype))
    label = path.stem if path.suffix == ".pt" else name.rstrip("/").rpartition("/")[2]
    return Loaded(model.eval(), label, _sha256_of(files))


def locate(name: str) -> Path:
    """Checkpoint file or Hugging Face folder for a model name, downloading it when it is a known remote one."""
    if name in _NAMES["nano"]:
        return _existing(MODELS / f"{name}.pt", f"train it with `distil-rank pretrain` or restore {MODELS.name}/")
    if name in _NAMES["esm2"]:
        return _download(name)
    path = Path(name)
    if name and path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith((".pt", ".safetensors")):
        return _download_hugging_face(name)
    known = ", ".join(name for names in _NAMES.values() for name in names)
    raise InputError(
        f"required a model name ({known}), a .pt file or a Hugging Face ESM-2 folder or hub name, got {name}"
    )


def _existing(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise InputError(f"required a checkpoint at {path}, got nothing there; {remedy}")
    return path


def _download(name: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(_URL.format(name), str(path))  # temporary name, then renamed
        except OSError as error:
            raise InputError(
                f"required {path} or its download, got {error}; fetch {_URL.format(name)} elsewhere and give the file"
            ) from error
    return path


def _download_hugging_face(name: str) -> Path:
    import huggingface_hub

    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"required a local model or one on the Hugging Face hub, got {name} ({reason})") from error


def _read_fair_esm(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and weights of a fair-esm checkpoint: tensors, containers and argparse.Namespace, nothing else."""
    remedy = "give an ESM-2 checkpoint of fair-esm, or download it again"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
        settings, state = data["cfg"]["model"], data["model"]
        architecture = {
            "layers": int(settings.encoder_layers),
            "width": int(settings.encoder_embed_dim),
            "heads": int(settings.encoder_attention_heads),
            "token_dropout": bool(settings.token_dropout),
        }
        prefix = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.)")
        return architecture, {prefix.sub("", key): tensor for key, tensor in state.items()}
    except OSError as error:
        raise InputError(f"required a readable checkpoint, got {path} ({error.strerror}); {remedy}") from error
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        raise InputError(
            f"required tensors and plain containers in {path}, got {reason.strip()[:160]!r}; {remedy}"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, LookupError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"required a fair-esm ESM-2 checkpoint, got {path} ({str(error)[:160]}); {remedy}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise InputError(f"required plain shard names in {index}, got {names}; download the model again")
    else:
        names = ["model.safetensors"]
    remedy = "give a folder with config.json and model.safetensors (save_pretrained writes both); pickles are not read"
    return [_existing(folder / name, remedy) for name in names]


def _read_hugging_face(folder: Path, files: list[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _json(_existing(folder / "config.json", "give a folder with config.json and model.safetensors"))
    required = {"model_type": "esm", "position_embedding_type": "rotary", "vocab_size": len(TOKENS)}
    got = {key: config.get(key) for key in required}
    if got != required or config.get("emb_layer_norm_before") or config.get("is_folding_model"):
        raise InputError(f"required an ESM-2 model ({required}), got {got} in {folder / 'config.json'}")
    try:
        architecture = {
            "layers": config["num_hidden_layers"],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "token_dropout": config.get("token_dropout", False),
            "eps": config.get("layer_norm_eps", 1e-12),
        }
        state = {_fair_esm_key(key): tensor for file in files for key, tensor in load_file(file).items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"required a whole ESM-2 model in {folder}, got {error}; download it again") from error
    return architecture, state


_HUGGING_FACE = {
    "embeddings.word_embeddings": "embed_tokens",
    "encoder.emb_layer_norm_after": "emb_layer_norm_after",
    "embeddings.layer_norm": "emb_layer_norm_before",
    "encoder.layer": "layers",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
}


def _fair_esm_key(key: str) -> str:
    """transformers' parameter name -> fair-esm's (the longer names come first in the table)."""
    key = key.removeprefix("esm.")
    key = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))  # as transformers 5 writes layer norms
    for theirs, ours in _HUGGING_FACE.items():
        key = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", key)
    return key


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"required readable JSON, got {path} ({error}); download the model again") from error


def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Put a real tensor in the place of a meta parameter."""
    owner, _, name = key.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))


def _sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of one file as `sha256sum` prints it; of several, the SHA-256 of their hex digests in a row."""
    digests = [sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
