"""How a model that the command knows is built, fed and read, and what it predicts.

| kind | class | batch |
|---|---|---|
| `esm2` | `proteins.esm2.ESM2`, from fair-esm checkpoints and this repository's names | tokens |
| `transformers` | any class of transformers | {input_ids, attention_mask} |

What a model predicts, its task, is the end of its class's name (`TASKS`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.compress.hugging_face import load_tokenizer
from distil_rank.compress.sites import Batch, tokens_of
from distil_rank.core.errors import InputError
from distil_rank.proteins.esm2 import CLS, EOS, ESM2, MASK, PAD, tokenise

TASKS = {
    "ForMaskedLM": "masked",
    "LMHeadModel": "causal",
    "ForSequenceClassification": "protein",
    "ForTokenClassification": "residue",
    "Model": "hidden",
}
PHASES = 7  # every seventh residue is masked at a time: near the 15 % of training
LINE = 60  # residues a line in ProtGPT2's format
POOLER = "distil_rank_pooler"  # in a configuration: whether the model has one


@dataclass(frozen=True)
class Architecture:
    """What has to be known to rebuild, feed and read a model."""

    kind: str  # "esm2" or "transformers"
    class_name: str
    config: dict[str, Any]
    source: Path | None = None  # folder with the tokenizer's files
    tokenizer: Any = None  # of a model that does not read ESM-2's alphabet

    @property
    def task(self) -> str:
        """Predicted: "masked" or next ("causal") tokens, classes or numbers of a "protein" or a
        "residue", nothing ("hidden") or what is not known here ("")."""
        if self.kind == "esm2":
            return "masked" if self.config["head"] else "hidden"
        return next((t for end, t in TASKS.items() if self.class_name.endswith(end)), "")

    @property
    def predicts_numbers(self) -> bool:
        """Whether a classifier is a regression: numbers, not probabilities of classes."""
        labels, problem = self.config.get("id2label"), self.config.get("problem_type")
        one = problem is None and labels is not None and len(labels) == 1
        return self.task in ("protein", "residue") and (one or problem == "regression")

    @property
    def is_esm(self) -> bool:
        return self.kind == "esm2" or self.config.get("model_type") == "esm"

    def build(self) -> nn.Module:
        """The dense model with meaningless weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            if self.kind == "esm2":
                return ESM2(**self.config).eval()
            import transformers

            cls = getattr(transformers, self.class_name)
            config = cls.config_class.from_dict(self.config)
            options = {} if self.config.get(POOLER, True) else {"add_pooling_layer": False}
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
        groups: list[list[str]] = []
        for sequence in sorted(sequences, key=len):
            if not groups or (len(groups[-1]) + 1) * (len(sequence) + 2) > tokens:
                groups.append([])
            groups[-1].append(sequence)
        return [self.tokenise(group, device) for group in groups]

    def tokenise(self, sequences: Sequence[str], device: torch.device | str = "cpu") -> Batch:
        """One batch. GPT-2 reads proteins as ProtGPT2 does: end, lines of residues, end; other
        models with a tokenizer of their own as ProtTrans does: residues with spaces between."""
        if self.is_esm:
            return self.batch(tokenise(sequences).to(device))
        if self.tokenizer is None:
            raise InputError(
                f"a tokenizer of the {self.class_name} required, got none; put its files into the"
                " folder"
            )
        texts = [" ".join(s) for s in sequences]
        as_protgpt2 = self.config.get("model_type") == "gpt2"
        if as_protgpt2:
            end = self.tokenizer.eos_token
            lines = [[s[i : i + LINE] for i in range(0, len(s), LINE)] for s in sequences]
            texts = ["\n".join([end, *parts, end]) for parts in lines]
        found = self.tokenizer(texts, add_special_tokens=not as_protgpt2)["input_ids"]
        ids = [torch.tensor(row, device=device) for row in found]
        unknown = self.tokenizer.unk_token_id
        if not as_protgpt2 and any(bool((row == unknown).any()) for row in ids):
            raise InputError(
                f"letters that the tokenizer of {self.class_name} knows required, got others;"
                " leave those proteins out"
            )
        known = (self.config.get(key) for key in ("n_positions", "max_position_embeddings"))
        limits, longest = [n for n in known if n], max(map(len, ids))
        if limits and longest > limits[0] and self.config.get("model_type") != "t5":
            raise InputError(
                f"proteins of at most {limits[0]} tokens required, got {longest}; leave longer"
                " ones out"
            )
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        fill = self.tokenizer.pad_token_id
        fill = self.tokenizer.eos_token_id if fill is None else fill
        return self.batch(pad(ids, batch_first=True, padding_value=fill), mask)

    def read(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Last hidden states (B, T, d), after the final layer norm, and what the head makes of
        them: logits (B, T, V) of tokens, (B, C) of a protein or (B, T, C) of residues."""
        if self.kind == "esm2":
            output = model(batch)
            return output.hidden[-1], output.logits
        base: Any = model.base_model
        if base is model:
            return model(**batch).last_hidden_state, None
        kept: list[Tensor] = []
        handle = base.register_forward_hook(lambda *a: kept.append(a[-1].last_hidden_state))
        try:
            logits = model(**batch).logits
            return kept[0], logits
        finally:
            handle.remove()

    def residues(self, batch: Batch) -> Tensor:
        """Mask (B, T) of residues: not padding, start or end."""
        tokens = _tokens(batch)
        names = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")]
        ids = [getattr(self.tokenizer, n, None) or self.config.get(n) for n in names]
        special = [CLS, PAD, EOS] if self.is_esm else [i for i in ids if isinstance(i, int)]
        mask = ~torch.isin(tokens, torch.tensor(special, device=tokens.device))
        return mask if self.kind == "esm2" else mask & batch["attention_mask"].bool()

    @property
    def mask_id(self) -> int:
        return MASK if self.is_esm else int(self.tokenizer.mask_token_id)

    def masked(self, batch: Batch, where: Tensor) -> Batch:
        """The batch with the mask token at `where` (B, T)."""
        tokens = _tokens(batch).masked_fill(where, self.mask_id)
        return self.batch(tokens, None if self.kind == "esm2" else batch["attention_mask"])

    def phase(self, batch: Batch, phase: int) -> Tensor:
        """Mask (B, T) of every seventh residue."""
        residues = self.residues(batch)
        return residues & (residues.cumsum(1) % PHASES == phase % PHASES)

    def calibration(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches as the model will be used: of a masked model with a seventh of residues masked.

        Moments of unmasked proteins know nothing of masks, where all predictions are made.
        """
        if self.task != "masked":
            return list(batches)
        return [self.masked(batch, self.phase(batch, i)) for i, batch in enumerate(batches)]

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log probabilities (B, P, ..., k), and the mask (B, P) of the predictions that count.

        Next tokens, tokens at masks, classes; of independent labels each is or is not.
        """
        if self.config.get("problem_type") == "multi_label_classification":
            logits = torch.stack([torch.zeros_like(logits), logits], -1)
        if self.task == "protein":
            every = torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
            return logits.log_softmax(-1)[:, None], every
        if self.task == "causal":
            return logits[:, :-1].log_softmax(-1), batch["attention_mask"][:, 1:].bool()
        where = self.residues(batch) if self.task == "residue" else _tokens(batch) == self.mask_id
        return logits.log_softmax(-1), where

    def loss(self, model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        """Whose gradients make the metric of a layer (`fisher`): - log p of drawn labels, summed.

        Labels are drawn from the model itself; a batch without masks gets some. Without
        probabilities, the last hidden states of residues count, or the numbers predicted.
        """
        if self.task == "masked" and not bool((_tokens(batch) == self.mask_id).any()):
            batch = self.masked(batch, self.phase(batch, 3))
        hidden, logits = self.read(model, batch)
        if logits is None or self.predicts_numbers:
            y = hidden if logits is None else logits
            if y.ndim == 3:
                y = y * self.residues(batch)[..., None]
            return (torch.randn(y.shape, generator=draws).to(y) * y).sum()
        logs, where = self.scored(logits, batch)
        logs = logs[where].flatten(0, -2)
        chances = logs.detach().float().exp().cpu()
        targets = torch.multinomial(chances, 1, generator=draws).to(logs.device)
        return -logs.gather(-1, targets).sum()


def _tokens(batch: Batch) -> Tensor:
    tokens = tokens_of(batch)
    assert tokens is not None
    return tokens


def describe(model: Any, source: Path | None = None) -> Architecture | None:
    """Architecture of a model, dense or compressed; None where its class is not a known one."""
    name = type(model).__name__
    if isinstance(model, ESM2):
        names = ("width", "heads", "token_dropout", "eps")
        config = {"layers": model.depth} | {n: getattr(model, n) for n in names}
        return Architecture("esm2", name, {**config, "head": model.lm_head is not None})
    if not hasattr(model, "base_model_prefix"):
        return None
    import transformers

    known = getattr(transformers, name, None)
    if known is None or not isinstance(model, known):
        return None
    config = json.loads(model.config.to_json_string(use_diff=False))
    folder = Path(config.pop("_name_or_path", None) or model.config._name_or_path or "-")
    if hasattr(model, "pooler") and model.pooler is None:
        config[POOLER] = False
    source = source or (folder if folder.is_dir() else None)
    return Architecture(
        "transformers", name, config, source, load_tokenizer(source, config.get("model_type"))
    )
