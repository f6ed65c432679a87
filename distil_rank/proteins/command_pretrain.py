"""Pretrain a small protein language model of the ESM-2 architecture on a FASTA file.

    distil-rank pretrain proteins.fasta.gz --out small.pt --n-layer 4 --n-embd 64 --tokens 8e6

After a crash, run the same command again: it goes on. The model is trained by masked language
modeling: 15 % of the amino acids are chosen, of which 80 % become <mask>, 10 % another one, 10 %
stay (Lin et al. 2023, Science 379:1123). Muon for the matrices of the layers (Jordan 2024; updates
of AdamW's size), AdamW for all else, linear warm-up, cosine decay to zero; heads start at
neighbors (`pretrain.look_at_neighbours`). The rate of the matrices is 3e-3, from width 128 on
2e-3, where --learning-rate gives no other; all else has a sixth of it. Proteins longer than
--max-length are seen through random windows of that many residues.

The checkpoint (float16) has fair-esm's format, without contact regression. It appears when training
is complete; until then OUT.state holds what a killed run needs to end bit-equal to an undisturbed
one (on the same kind of machine, with the same number of threads). A run that goes on with another
--tokens follows the new schedule from there; with any other difference it is refused.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch.nn import functional as F

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, above, at_least
from distil_rank.core.randomness import generator
from distil_rank.core.resume import Checkpoint
from distil_rank.proteins.checkpoints import save_model
from distil_rank.proteins.esm2 import ESM2, tokenise
from distil_rank.proteins.fasta import clean_proteins, read_fasta
from distil_rank.proteins.masked import logits_at, mask
from distil_rank.proteins.pretrain import batches, look_at_neighbours, new_model, schedule

WARMUP = 0.05  # share of the tokens with rising learning rate
DECAY = 0.01  # of the matrices


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # FASTA of proteins to work on
    out: Path  # where to write
    n_layer: int = 4  # layers of the network
    n_head: int = 4  # attention heads
    n_embd: int = 64  # features d
    tokens: float = 8e6  # residues to train on, all epochs together
    batch_tokens: int = 4096  # tokens in one batch, padding included
    max_length: int = 1022  # longest protein in residues
    learning_rate: float | None = None  # peak; None: the command's own, named in its help
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # arithmetic
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one
    seed: int = 0  # of everything random
    save_every: int = 200  # steps between checkpoints

    @property
    def rate(self) -> float:
        """Highest rate of the layers' matrices; wider models want less."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-3 if self.n_embd < 128 else 2e-3


def run(config: Config) -> None:
    """Train, from the saved state if there is one, and write the checkpoint."""
    _validate(config)
    proteins = clean_proteins(read_fasta(config.fasta), lambda line: print(f"warning: {line}"))
    train(config, [protein.sequence for protein in proteins])


def _validate(config: Config) -> None:
    above(0, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    above(0, tokens=config.tokens, learning_rate=config.rate, save_every=config.save_every)
    at_least(1, max_length=config.max_length)
    if config.n_embd % (2 * config.n_head):
        raise InputError(
            f"n_embd divisible by 2 * n_head required, got {config.n_embd} and {config.n_head}"
        )
    if config.max_length > config.batch_tokens:
        raise InputError(
            f"max_length <= batch_tokens required, got {config.max_length} > {config.batch_tokens};"
            " raise batch_tokens"
        )
    if config.dtype == "float16":
        raise InputError("float32 or bfloat16 required for training, got float16")
    if not config.out.parent.is_dir() or config.out.is_dir():
        got = config.out if config.out.is_dir() else config.out.parent
        raise InputError(f"a file in an existing folder required for --out, got {got}")


def train(config: Config, sequences: Sequence[str]) -> ESM2:
    """Train on cleaned sequences; writes `config.out` and, until then, `config.out` + ".state"."""
    device = pick_device(config.device)
    model = new_model(config.n_layer, config.n_embd, config.n_head, config.seed)
    look_at_neighbours(model)
    model.to(device)
    optimizers = _optimizers(model, config)
    may_change = ("fasta", "out", "tokens", "save_every", "device")
    settings = {key: value for key, value in asdict(config).items() if key not in may_change}
    path = config.out.with_name(config.out.name + ".state")
    checkpoint = Checkpoint(path, "neighbours, muon", settings, list(sequences))
    step = seen = 0
    if (state := checkpoint.load()) is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen = state["step"], state["seen"]
    started, seen_before = time.perf_counter(), seen
    encoded = [tokenise([sequence])[0, 1:-1] for sequence in sequences]
    for batch in batches(encoded, config.max_length, config.batch_tokens, config.seed, skip=step):
        if seen >= config.tokens:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * schedule(seen / config.tokens, WARMUP)
        tokens, chosen = mask(batch, generator(config.seed, "mask", step))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = logits_at(model, tokens, chosen)
        loss = F.cross_entropy(logits.float(), batch[chosen].to(device), reduction="sum")
        loss = loss / max(1, int(chosen.sum()))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, seen = step + 1, seen + int((batch > 3).sum())
        if step % config.save_every == 0:
            speed = f"{(seen - seen_before) / (time.perf_counter() - started):.0f} tokens/s"
            print(f"step {step}  tokens {seen}  loss {loss.item():.3f}  {speed}", flush=True)
            states = [optimizer.state_dict() for optimizer in optimizers]
            saved = {"model": model.state_dict(), "optimizers": states}
            checkpoint.save({"step": step, "seen": seen, **saved})
    save_model(model, config.out)
    checkpoint.clear()
    return model


def _optimizers(model: ESM2, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW with a sixth of the rate for all else."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or not n.startswith("layers")]
    fast = [{"params": matrices, "highest": config.rate}]
    slow = [{"params": others, "highest": config.rate / 6}]
    return [
        torch.optim.Muon(fast, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(slow, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
