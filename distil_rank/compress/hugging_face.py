"""What transformers' folders hold beside weights, and our ESM-2 as a model of transformers."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from distil_rank.compress.quantise import QuantLinear
from distil_rank.core.linear import LowRankLinear, PrunedLinear
from distil_rank.proteins.esm2 import ESM2, MASK, PAD, TOKENS
from distil_rank.proteins.hugging_face import fair_esm_key

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
)


def load_tokenizer(folder: Path | None, model_type: str | None) -> Any:
    """The tokenizer in a folder, None where there is none or ESM-2's alphabet is meant."""
    if folder is None or model_type == "esm" or not _files(folder):
        return None
    import transformers

    fast = (folder / "tokenizer.json").is_file()
    cls: Any = transformers.PreTrainedTokenizerFast if fast else transformers.AutoTokenizer
    found = cls.from_pretrained(folder, local_files_only=True)
    if model_type == "gpt2" and found.eos_token is None:
        found.eos_token = "<|endoftext|>"
    return found


def _files(folder: Path | None) -> list[Path]:
    found = [] if folder is None else [folder / name for name in TOKENIZER]
    return [path for path in found if path.is_file()]


def tokenizer_files(source: Path | None, esm: bool) -> dict[str, bytes]:
    """Names and contents of a tokenizer's files, to put beside a compressed model.

    Those of the source; an ESM-2 has its alphabet and settings in any case.
    """
    made: dict[str, bytes] = {}
    if esm:
        special = {"cls": "<cls>", "pad": "<pad>", "eos": "<eos>", "unk": "<unk>", "mask": "<mask>"}
        settings = {f"{name}_token": token for name, token in special.items()}
        settings = {"tokenizer_class": "EsmTokenizer", **settings}
        made["vocab.txt"] = "\n".join(TOKENS).encode()
        made["tokenizer_config.json"] = json.dumps(settings, indent=1).encode()
    return made | {path.name: path.read_bytes() for path in _files(source)}


def as_transformers(model: ESM2) -> Any:
    """An ESM-2, dense or compressed, as the EsmForMaskedLM or EsmModel of the same function.

    Its contact prediction, which ours does not have, is zero.
    """
    import transformers

    head = model.lm_head is not None
    config = transformers.EsmConfig(
        vocab_size=len(TOKENS),
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        intermediate_size=4 * model.width,
        position_embedding_type="rotary",
        token_dropout=model.token_dropout,
        mask_token_id=MASK,
        pad_token_id=PAD,
        emb_layer_norm_before=False,
        layer_norm_eps=model.eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        architectures=["EsmForMaskedLM" if head else "EsmModel"],
    )
    with torch.random.fork_rng(devices=[]):
        made: Any = (
            transformers.EsmForMaskedLM(config) if head else transformers.EsmModel(config, False)
        )
    for name in [name for name, _ in made.named_modules()]:
        ours = fair_esm_key(f"{name}.weight").removesuffix(".weight")
        with suppress(AttributeError):
            found = model.get_submodule(ours)
            if isinstance(found, LowRankLinear | PrunedLinear | QuantLinear):
                made.set_submodule(name, copy.deepcopy(found))
    state = model.state_dict()
    for name, tensor in made.state_dict().items():
        key = fair_esm_key(name)
        known = state.get("embed_tokens.weight" if key == "lm_head.weight" else key)
        if known is not None:
            tensor.copy_(known)
        elif "contact_head" in name:
            tensor.zero_()
        elif not name.endswith("inv_freq"):  # which is computed
            raise AssertionError(f"no weight of ESM-2 for {name}")
    return made.eval().requires_grad_(False)
