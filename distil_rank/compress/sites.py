"""The linear layers of a model: which there are, how they run, and the rows they read and write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.core.errors import InputError

Batch = Any  # a token tensor (model(batch)), a mapping (model(**batch)) or a tuple (model(*batch))
Hook = Callable[["Site", Tensor, Tensor], Tensor | None]
Read = Callable[..., Tensor]  # "input" or "output", proteins (B,) or None -> rows that count (n, d)
TRACED = 4  # batches, to find layers that some batches alone call (experts)


@dataclass(frozen=True)
class Site:
    """One linear layer, `nn.Linear` or GPT-2's `Conv1D` (whose weight is stored transposed).

    `trace` fills in how the layer is called.
    """

    name: str
    module: nn.Module
    input: tuple[int, int] = (0, 0)  # equal for sites that read one tensor in one state
    layout: str = "all"  # of rows: "bt", "tb", "flat" or "all" (not by position: each one counts)
    of_inputs: bool = False  # whether the moments of its inputs are needed, not of either side

    @property
    def weight(self) -> Tensor:
        """W (d_out, d_in)."""
        weight = cast(Tensor, self.module.weight).detach()
        return weight if isinstance(self.module, nn.Linear) else weight.T

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


def find_sites(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[Site]:
    """Linear layers whose names match a pattern (`*` matches anything).

    Layers whose weight is tied to another's are left out.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    linear = {}
    for name, module in model.named_modules():
        conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # of transformers
        if isinstance(module, nn.Linear) or conv1d:
            linear[name] = module
    if not linear:
        raise InputError(
            "a model with at least one linear layer required,"
            f" got {type(model).__name__} without any"
        )
    chosen = [
        Site(name, module)
        for name, module in linear.items()
        if any(fnmatchcase(name, p) for p in include)
        and not any(fnmatchcase(name, p) for p in exclude)
        and uses[id(module.weight)] == 1
    ]
    if not chosen:
        raise InputError(
            f"patterns that leave a linear layer required, got {include} without {exclude};"
            f" layers are {', '.join(linear)}"
        )
    return chosen


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch, whatever form it has."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def tokens_of(batch: Batch) -> Tensor | None:
    """Token ids (B, T) of a batch, None where it has none."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    found = batch[0] if isinstance(batch, tuple | list) else batch
    whole = isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point()
    return found if whole else None


def read_mask(model: nn.Module, batch: Batch) -> Tensor | None:
    """Which positions (B, T) count: all that the model reads, so start and end too, not padding.

    Padding is what the attention mask says, or the model's token embedding. Where only an end token
    could be padding (GPT-2 without a mask), it is left out. None where the batch holds no tokens.
    """
    tokens = tokens_of(batch)
    if tokens is None:
        return None
    if isinstance(batch, Mapping) and "attention_mask" in batch:
        return batch["attention_mask"].bool()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return tokens != module.padding_idx
    ends = [
        getattr(getattr(model, "config", None), f"{x}_token_id", None)
        for x in ("pad", "bos", "eos")
    ]
    known = [i for i in ends if isinstance(i, int)]
    return ~torch.isin(tokens, torch.tensor(known, dtype=tokens.dtype, device=tokens.device))


def trace(model: nn.Module, batches: Sequence[Batch], sites: Sequence[Site]) -> list[Site]:
    """The sites that the first batches call, in running order, with how they call them."""
    found: dict[str, Site] = {}
    kept: list[Tensor] = []  # alive until the end, so that no id is used twice
    for batch in batches[:TRACED]:
        tokens = tokens_of(batch)
        if tokens is not None and tokens.shape[0] == tokens.shape[1] > 1:
            batch = first_rows(batch, len(tokens) - 1)  # else (B, T) and (T, B) look alike
            tokens = tokens_of(batch)
        shape = None if tokens is None else tuple(tokens.shape)

        def see(site: Site, x: Tensor, _: Tensor, shape: tuple[int, ...] | None = shape) -> None:
            rows, layout = x.numel() // x.shape[-1], "all"
            if site.name in found or not rows:
                return
            kept.append(x)
            if shape is not None and x.ndim == 3 and x.shape[:2] in (shape, shape[::-1]):
                layout = "bt" if x.shape[:2] == shape else "tb"
            elif shape is not None and x.ndim == 2 and rows == shape[0] * shape[1] > shape[0]:
                layout = "flat"
            found[site.name] = replace(site, input=(id(x), x._version), layout=layout)

        with evaluating(model), watching(sites, see), torch.no_grad():
            call(model, batch)
        if len(found) == len(sites):
            break
    return list(found.values())


def first_rows(batch: Batch, count: int) -> Batch:
    """The first proteins of a batch of tokens; of another one all rows."""
    tokens = tokens_of(batch)
    rows = -1 if tokens is None else len(tokens)

    def shorter(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim and len(value) == rows
        return value[:count] if whole else value

    if isinstance(batch, Tensor):
        return shorter(batch)
    if isinstance(batch, Mapping):
        return {k: shorter(v) for k, v in batch.items()}
    return tuple(shorter(v) for v in batch)


def observe(
    model: nn.Module, batch: Batch, sites: Iterable[Site], see: Callable[[Site, Read], None]
) -> None:
    """Run one batch: see(site, read) as each site runs, read("input") or read("output") its rows.

    read(side, proteins): of these proteins of the batch (B,) alone, where rows lie by position.
    Rows may be views of what the model changes later: use them at once, or keep a copy.
    """
    kept = read_mask(model, batch)

    def hook(site: Site, x: Tensor, y: Tensor) -> None:
        def read(side: str, proteins: Tensor | None = None) -> Tensor:
            mask = kept if proteins is None or kept is None else kept & proteins[:, None].to(kept)
            return rows_of(x if side == "input" else y, site, mask)

        see(site, read)

    with evaluating(model), watching(sites, hook), torch.no_grad():
        call(model, batch)


def rows_of(x: Tensor, site: Site, mask: Tensor | None) -> Tensor:
    """The rows (n, d) of an activation at positions (B, T) that count; all, if not by position."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or site.layout == "all" or len(rows) != mask.numel():
        return rows
    return rows[(mask.T if site.layout == "tb" else mask).reshape(-1)]


@contextmanager
def watching(sites: Iterable[Site], see: Hook) -> Iterator[None]:
    """Call see(site, input, output) whenever a site runs; what it returns replaces the output."""

    def hook(site: Site, _: nn.Module, inputs: Any, named: Any, output: Tensor) -> Tensor | None:
        return see(site, inputs[0] if inputs else next(iter(named.values())), output)

    handles = []
    try:
        for site in sites:
            handle = site.module.register_forward_hook(partial(hook, site), with_kwargs=True)
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Deep copy of the model with other modules at these names; what they replace is not copied."""
    return copy.deepcopy(
        model, {id(model.get_submodule(name)): part for name, part in modules.items()}
    )
