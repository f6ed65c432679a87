"""ESM-2 as transformers saves it: config.json and weights, read without transformers.

A setting that this reader neither reads nor knows to be harmless is an error: it may change what
the model computes.
"""

import re
from pathlib import Path
from typing import Any

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record, read_json
from distil_rank.proteins.esm2 import MASK, PAD, TOKENS

# what ESM-2 is, and of that what transformers takes for granted where it is not said
_GRANTED: dict[str, Any] = {
    "hidden_act": "gelu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "emb_layer_norm_before": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "is_folding_model": False,
    "vocab_list": list(TOKENS),
}
_FIXED = _GRANTED | {
    "model_type": "esm",
    "position_embedding_type": "rotary",
    "vocab_size": len(TOKENS),
    "pad_token_id": PAD,
    "mask_token_id": MASK,
}
_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_OPTIONAL = ("token_dropout", "layer_norm_eps")
# of training, of other tasks, of the library: no weight and no hidden state depends on them
_HARMLESS = """_name_or_path architectures attention_probs_dropout_prob bos_token_id
    chunk_size_feed_forward classifier_dropout cls_token_id dtype eos_token_id
    esmfold_config gradient_checkpointing hidden_dropout_prob id2label initializer_range
    is_encoder_decoder label2id
    max_position_embeddings output_attentions output_hidden_states problem_type return_dict
    torch_dtype transformers_version use_cache""".split()  # noqa: SIM905

# transformers' parameter names -> fair-esm's; the longer names come first
_NAMES = {
    "embeddings.word_embeddings": "embed_tokens",
    "encoder.emb_layer_norm_after": "emb_layer_norm_after",
    "encoder.layer": "layers",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
    "lm_head.decoder": "lm_head",
}


def settings(config: Record, path: Path) -> Record:
    """The arguments of `ESM2` that a configuration describes; InputError for what is not ESM-2."""
    for key, value in _FIXED.items():
        got = _GRANTED.get(key) if config.get(key) is None else config[key]
        if got != value:
            shown = f"got {str(got)[:60]!r} in {path}"
            raise InputError(f"an ESM-2 model required, with {key} {value!r}, {shown}")
    unread = sorted(set(config) - set(_FIXED) - set(_SHAPE) - set(_OPTIONAL) - set(_HARMLESS))
    if unread:
        raise InputError(
            f"settings of ESM-2 required in {path}, got {', '.join(unread)}, which may change what"
            " the model computes; remove them if they do not"
        )
    missing = [key for key in _SHAPE if not isinstance(config.get(key), int)]
    if missing:
        raise InputError(f"whole numbers required for {', '.join(missing)} in {path}")
    layers, width, heads, inner = (config[key] for key in _SHAPE)
    if inner != 4 * width:
        raise InputError(f"intermediate_size {4 * width} required in {path}, got {inner}")
    return {
        "layers": layers,
        "width": width,
        "heads": heads,
        "token_dropout": bool(config.get("token_dropout", False)),
        "eps": float(config.get("layer_norm_eps", 1e-12)),
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors or, without any, pytorch_model.bin of a folder, whole or in shards."""
    whole = "model.safetensors"
    if not any(folder.glob("model*.safetensors*")) and any(folder.glob("pytorch_model*.bin*")):
        whole = "pytorch_model.bin"
    index, names = folder / f"{whole}.index.json", [whole]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise InputError(
                f"plain shard names required in {index}, got {names}; download the model again"
            )
    for name in ("config.json", *names):
        if not (folder / name).is_file():
            raise InputError(
                f"{name} required in {folder}, got nothing there; give a folder with config.json"
                " and model.safetensors (save_pretrained writes both)"
            )
    return [folder / name for name in names]


def fair_esm_key(key: str) -> str:
    """transformers' parameter name -> fair-esm's, which stays as it is."""
    key = key.removeprefix("esm.")
    # as transformers 5 writes layer norms
    key = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))
    for theirs, ours in _NAMES.items():
        key = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", key)
    return key
