"""The architectures that the command knows by name: how they are built, fed and read.

| kind | class | batch |
|---|---|---|
| `esm2` | `proteins.esm2.ESM2`, from fair-esm checkpoints and this repository's names | tokens |
| `transformers` | one of `CLASSES`, from a Hugging Face folder | {input_ids, attention_mask} |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.compress.sites import Batch, tokens_of
from distil_rank.core.errors import InputError
from distil_rank.proteins.esm2 import CLS, EOS, ESM2, MASK, PAD, tokenise

CLASSES = ("EsmModel", "EsmForMaskedLM", "GPT2Model", "GPT2LMHeadModel")
PHASES = 7  # every seventh residue is masked at a time: near the 15 % of training
LINE = 60  # residues a line in ProtGPT2's format


@dataclass(frozen=True)
class Architecture:
    """What has to be known to rebuild, feed and read a model."""

    kind: str  # "esm2" or "transformers"
    class_name: str
    config: dict[str, Any]
    tokenizer: Any = None  # of a GPT-2
    source: Path | None = None  # folder with the tokenizer's files

    @property
    def causal(self) -> bool:
        return self.class_name.startswith("GPT2")

    @property
    def has_logits(self) -> bool:
        named = self.class_name in ("EsmForMaskedLM", "GPT2LMHeadModel")
        return named or bool(self.kind == "esm2" and self.config["head"])

    def build(self) -> nn.Module:
        """The dense model with meaningless weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            if self.kind == "esm2":
                return ESM2(**self.config).eval()
            import transformers

            cls = getattr(transformers, self.class_name)
            config = cls.config_class.from_dict(self.config)
            pooler = self.config.get("distil_rank_pooler", True)
            options = {"add_pooling_layer": pooler} if self.class_name == "EsmModel" else {}
            return cls(config, **options).eval()

    def batch(self, tokens: Tensor, mask: Tensor | None = None) -> Batch:
        """A batch of tokens (B, T); mask (B, T) of what is not PAD, if given."""
        if self.kind == "esm2":
            return tokens
        mask = tokens != PAD if mask is None else mask
        return {"input_ids": tokens, "attention_mask": mask.long()}

    def batches(
        self, sequences: Sequence[str], device: torch.device | str = "cpu", tokens: int = 4096
    ) -> list[Batch]:
        """Proteins in batches of similar length of at most about `tokens`, shortest first."""
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        groups: list[list[str]] = []
        for i in order:
            if not groups or (len(groups[-1]) + 1) * (len(sequences[i]) + 2) > tokens:
                groups.append([])
            groups[-1].append(sequences[i])
        return [self.tokenise(group, device) for group in groups]

    def tokenise(self, sequences: Sequence[str], device: torch.device | str = "cpu") -> Batch:
        """One batch; GPT-2 reads proteins as ProtGPT2 does: end, lines of residues, end."""
        if not self.causal:
            return self.batch(tokenise(sequences).to(device))
        if self.tokenizer is None:
            raise InputError(
                "a tokenizer of the GPT-2 required, got none; put tokenizer.json into its folder"
            )
        end = self.tokenizer.eos_token
        lines = [[s[i : i + LINE] for i in range(0, len(s), LINE)] for s in sequences]
        texts = ["\n".join([end, *parts, end]) for parts in lines]
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [torch.tensor(row, device=device) for row in found]
        limit, longest = self.config["n_positions"], max(map(len, ids))
        if longest > limit:
            raise InputError(
                f"proteins of at most {limit} tokens required, got {longest}; leave longer ones out"
            )
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        end_id = self.tokenizer.eos_token_id
        return self.batch(pad(ids, batch_first=True, padding_value=end_id), mask)

    def read(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Last hidden states (B, T, d), after the final layer norm, and logits (B, T, V)."""
        if self.kind == "esm2":
            output = model(batch)
            return output.hidden[-1], output.logits
        if not self.has_logits:
            return model(**batch).last_hidden_state, None
        base: Any = getattr(model, str(model.base_model_prefix))
        hidden = base(**batch).last_hidden_state
        return hidden, model.lm_head(hidden)  # type: ignore[operator]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, T, V)."""
        found = self.read(model, batch)[1]
        assert found is not None
        return found

    def residues(self, batch: Batch) -> Tensor:
        """Mask (B, T) of residues: not padding, start or end."""
        tokens = _tokens(batch)
        ends = [self.config.get(f"{name}_token_id") for name in ("pad", "bos", "eos")]
        special = [i for i in ends if isinstance(i, int)] if self.causal else [CLS, PAD, EOS]
        mask = ~torch.isin(tokens, torch.tensor(special, device=tokens.device))
        return mask if self.kind == "esm2" else mask & batch["attention_mask"].bool()

    def masked(self, batch: Batch, where: Tensor) -> Batch:
        """The batch with the mask token at `where` (B, T)."""
        tokens = _tokens(batch).masked_fill(where, MASK)
        return self.batch(tokens, None if self.kind == "esm2" else batch["attention_mask"])

    def phase(self, batch: Batch, phase: int) -> Tensor:
        """Mask (B, T) of every seventh residue."""
        residues = self.residues(batch)
        return residues & (residues.cumsum(1) % PHASES == phase % PHASES)

    def calibration(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches as the model will be used: of a masked model with a seventh of residues masked.

        Moments of unmasked proteins know nothing of masks, where all predictions are made.
        """
        if self.causal or not self.has_logits:
            return list(batches)
        return [self.masked(batch, self.phase(batch, i)) for i, batch in enumerate(batches)]

    def loss(self, model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        """Whose gradients make the metric of a layer (`fisher`): - log p of drawn tokens, summed.

        Next tokens of a causal model, or those at masks, drawn from the model itself; a batch
        without masks gets some. Without logits, the last hidden states of residues count.
        """
        if not self.has_logits:
            hidden = self.read(model, batch)[0] * self.residues(batch)[..., None]
            return (torch.randn(hidden.shape, generator=draws).to(hidden) * hidden).sum()
        if self.causal:
            logits = self.logits(model, batch)[:, :-1][batch["attention_mask"][:, 1:].bool()]
        else:
            hidden = _tokens(batch) == MASK
            if not bool(hidden.any()):
                hidden = self.phase(batch, 3)
                batch = self.masked(batch, hidden)
            logits = self.logits(model, batch)[hidden]
        logs = logits.log_softmax(-1)
        chances = logs.detach().float().exp().cpu()
        targets = torch.multinomial(chances, 1, generator=draws).to(logs.device)
        return -logs.gather(-1, targets).sum()


def _tokens(batch: Batch) -> Tensor:
    tokens = tokens_of(batch)
    assert tokens is not None
    return tokens


def describe(model: Any, source: Path | None = None) -> Architecture | None:
    """Architecture of a dense model, None where it is not a known one."""
    name = type(model).__name__
    if isinstance(model, ESM2):
        names = ("width", "heads", "token_dropout", "eps")
        config = {"layers": model.depth} | {n: getattr(model, n) for n in names}
        return Architecture("esm2", name, {**config, "head": model.lm_head is not None})
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

    settings = folder / "tokenizer_config.json"
    known = json.loads(settings.read_text()) if settings.is_file() else {}
    end = known.get("eos_token") or "<|endoftext|>"
    end = end["content"] if isinstance(end, dict) else end
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=end, bos_token=end)


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def tokenizer_files(source: Path | None) -> dict[str, str]:
    """Names and texts of a tokenizer's files, to put beside a compressed model."""
    found = [] if source is None else [source / name for name in TOKENIZER]
    return {path.name: path.read_text() for path in found if path.is_file()}
