"""Pretrain a small protein language model of the ESM-2 architecture on a FASTA file.

    distil-rank pretrain proteins.fasta.gz --out small.pt --layers 4 --width 64 --tokens 8e6
    distil-rank pretrain proteins.fasta.gz --out small.pt --layers 4 --width 64 --tokens 8e6   # after a crash: goes on

The model is fair-esm's own ESM2 with its alphabet and token dropout, trained by masked language modelling: 15 % of the
amino acids are chosen, of which 80 % become <mask>, 10 % another one, 10 % stay (Lin et al. 2023, Science 379:1123).
Muon for the matrices of the layers (Jordan 2024; updates of AdamW's size), AdamW for all else, linear warm-up, cosine
decay to zero; heads start at neighbours (`masked.look_at_neighbours`). The checkpoint (float16) has fair-esm's format,
without contact regression. It appears when training is complete; until then OUT.state holds what a killed run needs to
end bit-equal to an undisturbed one (on the same kind of machine, with the same number of threads). A run that goes on
with another --tokens follows the new schedule from there; with any other difference it is refused.
"""

import math
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from distil_rank.core.errors import InputError
from distil_rank.proteins.esm2 import CLS, EOS, PAD, tokenise
from distil_rank.proteins.fasta import clean_proteins, read_fasta
from distil_rank.proteins.masked import logits_at, look_at_neighbours, mask, new_model, save_checkpoint, write_torch
from distil_rank.core.randomness import generator

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
    learning_rate: float = 3e-3  # highest rate of the layers' matrices; wider models want less, 2e-3 from 128 on
    warmup: float = 0.05  # fraction of the tokens with rising rate
    weight_decay: float = 0.01  # of the matrices of layers
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
    if not config.out.parent.is_dir():
        raise InputError(f"required an existing folder for the checkpoint, got {config.out.parent}; create it")


def train(config: Config, sequences: Sequence[str]) -> "ESM2":
    """Train on cleaned sequences; writes `config.out` and, until then, `config.out` + ".state"."""
    model = new_model(config.layers, config.width, config.heads, config.seed)
    look_at_neighbours(model)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or not n.startswith("layers")]
    rates = (config.learning_rate, config.learning_rate / 6)  # the second for all other parameters
    optimizers = [
        torch.optim.Muon(matrices, lr=rates[0], weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    state_path = config.out.with_name(config.out.name + ".state")
    settings = {k: str(v) for k, v in asdict(config).items() if k not in ("out", "tokens", "save_every")}
    settings["recipe"] = "neighbours, muon"
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
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * schedule(seen / config.tokens, config.warmup)
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
            state = {"settings": settings, "step": step, "seen": seen}
            state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            write_torch(state_path, state)
    save_checkpoint(model, config.out)
    state_path.unlink(missing_ok=True)
    return model


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
    """Fraction of the highest rate: linear rise, then cosine decay to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1, (progress - warmup) / (1 - warmup))))
