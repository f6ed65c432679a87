"""Pretrain a small protein language model of the ESM-2 architecture on a FASTA file.

    distil-rank pretrain proteins.fasta.gz --out small.pt --layers 4 --width 64 --tokens 8e6
    distil-rank pretrain proteins.fasta.gz --out small.pt --layers 4 --width 64 --tokens 8e6   # after a crash: goes on

The model is fair-esm's own ESM2 with its alphabet and token dropout, trained by masked language modelling: 15 % of the
amino acids are chosen, of which 80 % become <mask>, 10 % another one, 10 % stay (Lin et al. 2023, Science 379:1123).
AdamW, or Muon (Jordan 2024) for the matrices of the layers and AdamW for the rest at the same rate; linear warm-up, cosine
decay to a tenth. The checkpoint (float16) has fair-esm's format, without contact regression. It appears when training is
complete; until then OUT.state holds what a killed run needs to end bit-equal to an undisturbed one (on the same kind of
machine, with the same number of threads). A run that goes on with another --tokens follows the new schedule from there;
with any other difference it is refused.
"""

import math
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from distil_rank.errors import InputError
from distil_rank.proteins.esm2 import CLS, EOS, PAD, tokenise
from distil_rank.proteins.fasta import clean_proteins, read_fasta
from distil_rank.proteins.masked import load_checkpoint, logits_at, mask, new_model, save_checkpoint, write_torch
from distil_rank.randomness import generator

if TYPE_CHECKING:
    from esm.model.esm2 import ESM2

_POOL = 4096  # proteins among which batches of similar length are formed


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # proteins to train on, plain or gzip
    out: Path  # checkpoint to write, for example small.pt
    layers: int = 4  # transformer layers
    width: int = 64  # features d
    heads: int = 4  # attention heads; width must be a multiple of 2 * heads
    tokens: float = 8e6  # residues to train on, all epochs together
    batch_tokens: int = 2048  # residues per step with padding, at most
    crop: int = 256  # longer proteins are seen through random windows of this many residues
    learning_rate: float = 2e-3  # highest rate of the schedule
    warmup: float = 0.05  # fraction of the tokens with rising rate
    weight_decay: float = 0.01  # of matrices; AdamW
    optimizer: Literal["adamw", "muon"] = "adamw"  # of the layers' matrices: Muon learns more per residue, costs time
    start: Path | None = None  # checkpoint of the same shape to begin with, instead of random weights
    bf16: bool = False  # bfloat16 matrix products: 1.5 to 2 times as fast from width 256 on, no gain below
    seed: int = 0  # initial weights, order, crops and masks
    save_every: int = 200  # steps between saved states


def run(config: Config) -> None:
    """Train, from the saved state if there is one, and write the checkpoint. Raises InputError before any work starts."""
    _validate(config)
    proteins = clean_proteins(read_fasta(config.fasta), lambda line: print(f"warning: {line}"))
    train(config, [protein.sequence for protein in proteins])


def _validate(config: Config) -> None:
    for name in ("layers", "width", "heads", "tokens", "batch_tokens", "crop", "learning_rate", "save_every"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"required {name} above 0, got {getattr(config, name)}")
    if config.width % (2 * config.heads):
        raise InputError(f"required a width divisible by 2 * heads, got {config.width} and {config.heads} heads")
    if config.crop > config.batch_tokens:
        raise InputError(
            f"required crop <= batch_tokens, got {config.crop} > {config.batch_tokens}; raise batch_tokens"
        )
    if not 0 <= config.warmup < 1:
        raise InputError(f"required a warmup fraction in [0, 1), got {config.warmup}")
    if config.start is not None and not config.start.is_file():
        raise InputError(f"required a checkpoint to start from, got nothing at {config.start}")
    if not config.out.parent.is_dir():
        raise InputError(f"required an existing folder for the checkpoint, got {config.out.parent}; create it")


def train(config: Config, sequences: Sequence[str]) -> "ESM2":
    """Train on cleaned sequences; writes `config.out` and, until then, `config.out` + ".state"."""
    model = _first(config)
    optimizers = _optimizers(model, config)
    state_path = config.out.with_name(config.out.name + ".state")
    settings = {k: str(v) for k, v in asdict(config).items() if k not in ("out", "tokens", "save_every")}
    step = seen = 0
    if state_path.exists():
        state = _read_state(state_path, settings)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen = state["step"], state["seen"]
    started, seen_before = time.perf_counter(), seen
    for batch in batches([tokenise([sequence])[0, 1:-1] for sequence in sequences], config, skip=step):
        if seen >= config.tokens:
            break
        rate = config.learning_rate * schedule(seen / config.tokens, config.warmup)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        tokens, chosen = mask(batch, generator(config.seed, "mask", step))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            logits = logits_at(model, tokens, chosen)
        loss = F.cross_entropy(logits.float(), batch[chosen], reduction="sum") / max(1, int(chosen.sum()))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, seen = step + 1, seen + int((batch > 3).sum())
        if step % config.save_every == 0:
            speed = (seen - seen_before) / (time.perf_counter() - started)
            print(f"step {step}  tokens {seen}  loss {loss.item():.3f}  {speed:.0f} tokens/s", flush=True)
            state = {"settings": settings, "step": step, "seen": seen, "model": model.state_dict()}
            write_torch(state_path, {**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    save_checkpoint(model, config.out)
    state_path.unlink(missing_ok=True)
    return model


def _first(config: Config) -> "ESM2":
    """Random weights, or those of the checkpoint to begin with."""
    fresh = new_model(config.layers, config.width, config.heads, config.seed)
    if config.start is None:
        return fresh
    model = load_checkpoint(config.start).train()
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (fresh, model)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"a checkpoint of {config.layers} layers x {config.width} required to start from, got {config.start}; "
            "give its --layers, --width and --heads"
        )
    return model.requires_grad_(True)


def _optimizers(model: "ESM2", config: Config) -> list[torch.optim.Optimizer]:
    rate, decay = config.learning_rate, config.weight_decay
    muon = [p for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2]
    muon = muon if config.optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in muon)]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.0 if muon else decay},
        {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    return (
        [adamw, torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]
        if muon
        else [adamw]
    )


def _read_state(path: Path, settings: dict[str, str]) -> dict:
    try:
        state = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"required the state of a training run, got {path}, damaged; remove it to start anew"
        ) from error
    different = [name for name, value in settings.items() if state["settings"].get(name) != value]
    if different:
        raise InputError(f"{path} is of a run with another {', '.join(different)}; remove it or choose another --out")
    return state


def batches(encoded: Sequence[Tensor], config: Config, skip: int = 0) -> Iterator[Tensor]:
    """Endless padded batches (n, l + 2) with <cls> and <eos>; every epoch has new crops and a new order.

    Proteins of similar length share a batch, at most `batch_tokens` residues with padding each. The first `skip` batches
    are left out, at no cost.
    """
    lengths = torch.tensor([min(len(tokens), config.crop) for tokens in encoded])
    number, epoch = 0, 0
    while True:
        order = torch.randperm(len(encoded), generator=generator(config.seed, "order", epoch))
        cuts = torch.rand(len(encoded), generator=generator(config.seed, "crop", epoch))
        groups: list[list[int]] = []
        for pool in order.split(_POOL):
            group: list[int] = []
            for i in pool[lengths[pool].argsort(stable=True)].tolist():
                if group and (len(group) + 1) * int(lengths[i]) > config.batch_tokens:
                    groups.append(group)
                    group = []
                group.append(i)
            groups.append(group)
        for g in torch.randperm(len(groups), generator=generator(config.seed, "batches", epoch)).tolist():
            if number >= skip:
                yield _padded([_crop(encoded[i], config.crop, float(cuts[i])) for i in groups[g]])
            number += 1
        epoch += 1


def _crop(tokens: Tensor, crop: int, where: float) -> Tensor:
    start = int(where * (len(tokens) - crop + 1)) if len(tokens) > crop else 0
    return tokens[start : start + crop]


def _padded(rows: Sequence[Tensor]) -> Tensor:
    batch = torch.full((len(rows), max(map(len, rows)) + 2), PAD)
    batch[:, 0] = CLS
    for out, row in zip(batch, rows):
        out[1 : len(row) + 1], out[len(row) + 1] = row, EOS
    return batch


def schedule(progress: float, warmup: float) -> float:
    """Fraction of the highest rate: linear rise, then cosine decay to a tenth."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, (progress - warmup) / (1 - warmup))))
