"""The architectures that compression knows by name: how they are built, fed and read.

| kind | class | batch |
|---|---|---|
| `fair-esm` | fair-esm `ESM2` | tokens (B, T) |
| `transformers` | `EsmModel`, `EsmForMaskedLM`, `GPT2Model`, `GPT2LMHeadModel` | {input_ids, attention_mask} |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError
from distil_rank.compress.sites import Batch, call, residue_mask, tokens_of
from distil_rank.core.randomness import generator

CLASSES = ("EsmModel", "EsmForMaskedLM", "GPT2Model", "GPT2LMHeadModel")
AMINO_ACIDS = {letter: 4 + i for i, letter in enumerate("LAGVSERTIDPKQNFYMHWC")}  # ids in ESM-2's alphabet
MASK, PAD = 32, 1  # of ESM-2's alphabet
LINE = 60  # residues a line in ProtGPT2's format


@dataclass(frozen=True)
class Architecture:
    """What has to be known to rebuild, feed and read a model."""

    kind: str  # "fair-esm" or "transformers"
    class_name: str
    config: dict[str, Any]
    tokenizer: Any = None  # of a GPT-2
    source: Path | None = None  # folder with the tokenizer's files

    @property
    def causal(self) -> bool:
        return self.class_name.startswith("GPT2")

    @property
    def has_logits(self) -> bool:
        return self.class_name in ("ESM2", "EsmForMaskedLM", "GPT2LMHeadModel")

    def build(self) -> nn.Module:
        """The dense model with meaningless weights, in evaluation mode; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            if self.kind == "fair-esm":
                import esm

                return esm.ESM2(**self.config, alphabet="ESM-1b").eval()
            import transformers

            cls = getattr(transformers, self.class_name)
            config = cls.config_class.from_dict(self.config)
            return (
                cls(config, add_pooling_layer=self._pooler) if self.class_name == "EsmModel" else cls(config)
            ).eval()

    @property
    def _pooler(self) -> bool:
        return bool(self.config.get("distil_rank_pooler", True))

    def batch(self, tokens: Tensor, mask: Tensor | None = None) -> Batch:
        """A batch from tokens (B, T); mask (B, T) says which are not padding, by default those that are not PAD."""
        if self.kind == "fair-esm":
            return tokens
        return {"input_ids": tokens, "attention_mask": (tokens != PAD if mask is None else mask).long()}

    def batches(self, sequences: Sequence[str], tokens: int = 4096) -> list[Batch]:
        """Tokenised proteins in batches of similar length, at most about `tokens` each, shortest first."""
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        groups: list[list[str]] = []
        for i in order:
            if not groups or (len(groups[-1]) + 1) * (len(sequences[i]) + 2) > tokens:
                groups.append([])
            groups[-1].append(sequences[i])
        return [self.tokenise(group) for group in groups]

    def tokenise(self, sequences: Sequence[str]) -> Batch:
        if not self.causal:
            from distil_rank.proteins.esm2 import tokenise

            return self.batch(tokenise(sequences))
        if self.tokenizer is None:
            raise InputError("a tokenizer beside the GPT-2 required, got none; put tokenizer.json into its folder")
        end = self.tokenizer.eos_token
        texts = ["\n".join([end, *(s[i : i + LINE] for i in range(0, len(s), LINE)), end]) for s in sequences]
        ids = [torch.tensor(row) for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        limit = self.config["n_positions"]
        if max(map(len, ids)) > limit:
            raise InputError(
                f"proteins of at most {limit} tokens required, got {max(map(len, ids))}; leave longer ones out"
            )
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.eos_token_id)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return self.batch(padded, mask)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, T, V)."""
        found = call(model, batch)
        return found["logits"] if self.kind == "fair-esm" else found.logits

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """Last hidden states (B, T, d), after the final layer norm."""
        if self.kind == "fair-esm":
            return model(batch, repr_layers=[model.num_layers])["representations"][model.num_layers]
        base = getattr(model, str(model.base_model_prefix), model)
        return call(base, batch).last_hidden_state

    def both(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and last hidden states of one forward pass."""
        if self.kind == "fair-esm":
            found = model(batch, repr_layers=[model.num_layers])
            return found["logits"], found["representations"][model.num_layers]
        found = model(**batch, output_hidden_states=True)
        return found.logits, found.hidden_states[-1]

    def residues(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mask (B, T) of residues."""
        mask = residue_mask(model, batch)
        assert mask is not None
        return mask

    def masked(self, batch: Batch, where: Tensor) -> Batch:
        """The batch with the mask token at `where` (B, T)."""
        tokens = tokens_of(batch)
        assert tokens is not None
        return self.batch(tokens.masked_fill(where, MASK))

    def calibration(self, model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
        """Batches as the model will be used: of a masked language model a seventh of the residues masked, as in its training.

        Moments of unmasked proteins alone know nothing of what happens at a mask, where all predictions are made.
        """
        if self.causal or not self.has_logits:
            return list(batches)
        kept = [self.residues(model, batch) for batch in batches]
        return [self.masked(b, k & (k.cumsum(1) % 7 == i % 7)) for i, (b, k) in enumerate(zip(batches, kept))]

    def loss(self, model: nn.Module, batch: Batch, where: Tensor | None = None) -> Tensor:
        """Negative log-likelihood summed over the predicted tokens: masked ones at `where` (every seventh residue by default),
        or all next tokens of a causal model."""
        tokens = tokens_of(batch)
        assert tokens is not None
        if self.causal:
            real = batch["attention_mask"][:, 1:].bool()
            return nn.functional.cross_entropy(
                self.logits(model, batch)[:, :-1][real], tokens[:, 1:][real], reduction="sum"
            )
        hidden = tokens == MASK
        if where is None and bool(
            hidden.any()
        ):  # targets unknown: drawn from the model itself, which gives its Fisher matrix
            logs = self.logits(model, batch)[hidden].log_softmax(-1)
            draws = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator(0, "sampled targets")).to(
                logs.device
            )
            return -logs.gather(-1, draws).sum()
        if where is None:
            residues = self.residues(model, batch)
            where = residues & (residues.cumsum(1) % 7 == 3)
        logits = self.logits(model, self.masked(batch, where))
        return nn.functional.cross_entropy(logits[where], tokens[where], reduction="sum")


def describe(model: Any, source: Path | None = None) -> Architecture | None:
    """Architecture of a dense model, None where it is not a known one."""
    name = type(model).__name__
    if name == "ESM2" and hasattr(model, "attention_heads"):
        names = ("num_layers", "embed_dim", "attention_heads", "token_dropout")
        return Architecture("fair-esm", name, {n: getattr(model, n) for n in names})
    if name in CLASSES:
        config = json.loads(model.config.to_json_string(use_diff=False))
        if name == "EsmModel":
            config["distil_rank_pooler"] = model.pooler is not None
        return Architecture("transformers", name, config, _tokenizer(source), source)
    return None


def _tokenizer(folder: Path | None) -> Any:
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    known = {}
    if (folder / "tokenizer_config.json").is_file():
        known = json.loads((folder / "tokenizer_config.json").read_text())
    end = known.get("eos_token") or "<|endoftext|>"
    end = end["content"] if isinstance(end, dict) else end
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=end, bos_token=end)


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Put the tokenizer's files beside a compressed model."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
