"""The linear layers of a model: which there are, in which order they run, who shares an input, how rows lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError

Batch = Any  # a token tensor (model(batch)), a mapping (model(**batch)) or a tuple (model(*batch))


@dataclass(frozen=True)
class Site:
    """One linear layer, `nn.Linear` or GPT-2's `Conv1D` (whose weight is stored transposed)."""

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """W (d_out, d_in)."""
        weight = cast(Tensor, self.module.weight).detach()
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        bias = cast("Tensor | None", self.module.bias)
        return None if bias is None else bias.detach()

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.weight.shape[0]

    @property
    def parameters(self) -> int:
        return self.d_in * self.d_out


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear`, or a `Conv1D` of transformers (recognised without importing it)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def find_sites(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[Site]:
    """Linear layers whose names match a pattern (`*` matches anything), except those whose weight is tied to another's."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if not linear:
        raise InputError(f"a model with at least one linear layer required, got {type(model).__name__} without any")
    chosen = [
        Site(name, module)
        for name, module in linear.items()
        if any(fnmatchcase(name, p) for p in include)
        and not any(fnmatchcase(name, p) for p in exclude)
        and uses[id(module.weight)] == 1
    ]
    if not chosen:
        raise InputError(
            f"a pattern that matches a linear layer required, got {include}; layers are {', '.join(linear)}"
        )
    return chosen


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch, whatever form it has; `special_tokens_mask` is for the mask, not for the model."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**{k: v for k, v in batch.items() if k != "special_tokens_mask"})
    return model(*batch)


def tokens_of(batch: Batch) -> Tensor | None:
    """Token ids (B, T) of a batch, None where it has none."""
    found = batch if isinstance(batch, Tensor) else batch.get("input_ids") if isinstance(batch, Mapping) else batch[0]
    return found if isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point() else None


def special_ids(model: nn.Module) -> set[int]:
    """Ids of padding, start and end tokens, as far as the model says."""
    if hasattr(model, "padding_idx") and hasattr(model, "cls_idx"):  # fair-esm
        return {cast(int, getattr(model, name)) for name in ("padding_idx", "cls_idx", "eos_idx")}
    config = getattr(model, "config", None)
    if config is None:
        return set()
    if getattr(config, "model_type", "") == "esm":
        return {0, 1, 2}
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {i for name in names if isinstance(i := getattr(config, name, None), int) and i < config.vocab_size}


def residue_mask(model: nn.Module, batch: Batch) -> Tensor | None:
    """Which positions (B, T) are residues: not padding, not special; None where the batch holds no tokens."""
    tokens = tokens_of(batch)
    if tokens is None:
        return None
    special = torch.tensor(sorted(special_ids(model)), dtype=tokens.dtype, device=tokens.device)
    mask = ~torch.isin(tokens, special)
    if isinstance(batch, Mapping):
        if "attention_mask" in batch:
            mask &= batch["attention_mask"].bool()
        if "special_tokens_mask" in batch:
            mask &= ~batch["special_tokens_mask"].bool()
    return mask


def read_mask(model: nn.Module, batch: Batch) -> Tensor | None:
    """Which positions (B, T) count in moments: all that the model reads, so residues, start and end, not padding.

    Without start and end the layers would be fitted to nothing there, while every residue attends to them. Where only an
    end token could tell padding (GPT-2 without an attention mask), both are left out. None where the batch holds no tokens.
    """
    tokens = tokens_of(batch)
    if tokens is not None and isinstance(batch, Mapping) and "attention_mask" in batch:
        return batch["attention_mask"].bool()
    hugging_face_esm = getattr(getattr(model, "config", None), "model_type", "") == "esm"
    padding = 1 if hugging_face_esm else getattr(model, "padding_idx", None)
    return residue_mask(model, batch) if tokens is None or padding is None else tokens != padding


@dataclass(frozen=True)
class Call:
    """How a site is called in a forward pass."""

    order: int
    input: int  # equal for sites that read the same tensor
    layout: str  # of its rows: "bt", "tb", "flat" or "all" (not per position: every row counts)
    rows: float  # rows per position of the batch


def trace(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> dict[str, Call]:
    """Run one forward pass and see how each site is called; sites that are never called are absent."""
    tokens = tokens_of(batch)
    if tokens is not None and tokens.shape[0] == tokens.shape[1] > 1:  # else (B, T) and (T, B) look alike
        batch = _without_last_row(batch, len(tokens))
        tokens = tokens_of(batch)
    shape = None if tokens is None else tuple(tokens.shape)
    calls: dict[str, Call] = {}
    kept: list[Tensor] = []  # alive until the end, so that no id is used twice

    def see(site: Site, x: Tensor, _: Tensor) -> None:
        if site.name in calls:
            return
        kept.append(x)
        rows = x.numel() // x.shape[-1]
        layout = "all"
        if shape is not None:
            if x.shape[:2] == shape and x.ndim == 3:
                layout = "bt"
            elif x.shape[:2] == shape[::-1] and x.ndim == 3:
                layout = "tb"
            elif x.ndim == 2 and rows == shape[0] * shape[1] and shape[1] > 1:
                layout = "flat"
        positions = rows if shape is None else shape[0] * shape[1]
        calls[site.name] = Call(len(calls), id(x), layout, rows / positions)

    with watching(sites, see), torch.no_grad():
        call(model, batch)
    return calls


def _without_last_row(batch: Batch, rows: int) -> Batch:
    def shorter(value: Any) -> Any:
        return value[:-1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

    if isinstance(batch, Tensor):
        return shorter(batch)
    if isinstance(batch, Mapping):
        return {k: shorter(v) for k, v in batch.items()}
    return tuple(shorter(v) for v in batch)


@contextmanager
def watching(sites: Iterable[Site], see: Callable[[Site, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call see(site, input, output) whenever a site runs; what it returns replaces the output. Hooks never stay."""
    handles = []

    def hook_for(site: Site) -> Callable:
        return lambda _module, inputs, output: see(site, inputs[0], output)

    try:
        for site in sites:
            handles.append(site.module.register_forward_hook(hook_for(site)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_of(x: Tensor, layout: str, mask: Tensor | None) -> Tensor:
    """The rows (n, d) of an activation that belong to residues."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or layout == "all":
        return rows
    mask = mask.T if layout == "tb" else mask
    return rows[mask.reshape(-1)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then the previous mode of every module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
