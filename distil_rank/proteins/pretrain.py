"""Pretrain a small protein language model of the ESM-2 architecture on a FASTA file.

    distil-rank pretrain proteins.fasta.gz --out small.pt --layers 4 --width 64 --tokens 8e6
    distil-rank pretrain proteins.fasta.gz --out small.pt --layers 4 --width 64 --tokens 8e6   # after a crash: goes on

The model is fair-esm's own `ESM2` with its alphabet and token dropout, trained by masked language modelling: 15 % of the residues are
chosen, of which 80 % become <mask>, 10 % another amino acid, 10 % stay (Lin et al. 2023, after Devlin et al. 2019). AdamW,
linear warm-up, cosine decay to a tenth. The checkpoint (float16) has fair-esm's format, without contact regression. It
appears when training is complete; until then `OUT.state` holds what a killed run needs to end bit-equal to an
undisturbed one (same machine, same number of threads).
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from distil_rank.errors import InputError
from distil_rank.proteins.fasta import AMINO_ACIDS, clean_proteins, read_fasta
from distil_rank.randomness import generator

if TYPE_CHECKING:
    from esm.model.esm2 import ESM2


@dataclass(frozen=True)
class Config:
    fasta: Annotated[Path, tyro.conf.Positional]  # proteins to train on, plain or gzip
    out: Path  # checkpoint to write, for example small.pt
    layers: int = 4  # transformer layers
    width: int = 64  # features d
    heads: int = 4  # attention heads; width must be a multiple of 2 * heads
    tokens: float = 8e6  # residues to train on, all epochs together
    batch_tokens: int = 4096  # residues per step, at most
    crop: int = 256  # longer proteins are seen through random windows of this many residues
    learning_rate: float = 2e-3  # highest rate of the schedule
    warmup: float = 0.05  # fraction of the steps with rising rate
    weight_decay: float = 0.01  # of matrices; AdamW
    bf16: bool = False  # bfloat16 matrix products (autocast)
    seed: int = 0  # initial weights, order, crops and masks
    save_every: int = 200  # steps between saved states


def run(config: Config) -> None:
    """Train, from the saved state if there is one, and write the checkpoint. Raises InputError before any work starts."""
    _validate(config)
    proteins = clean_proteins(read_fasta(config.fasta), lambda line: print(f"warning: {line}"))
    train(config, [protein.sequence for protein in proteins])


def _validate(config: Config) -> None:
    if config.width % (2 * config.heads) or config.width <= 0:
        raise InputError(f"required a width divisible by 2 * heads, got {config.width} and {config.heads} heads")
    for name in ("layers", "heads", "tokens", "batch_tokens", "crop", "learning_rate", "save_every"):
        if getattr(config, name) <= 0:
            raise InputError(f"required {name} above 0, got {getattr(config, name)}")
    if config.crop > config.batch_tokens:
        raise InputError(
            f"required crop <= batch_tokens, got {config.crop} > {config.batch_tokens}; raise batch_tokens"
        )
    if not config.out.parent.is_dir():
        raise InputError(f"required an existing folder for the checkpoint, got {config.out.parent}; create it")


def train(config: Config, sequences: Sequence[str]) -> "ESM2":
    """Train on cleaned sequences; writes `config.out` and, until then, `config.out` + ".state"."""
    model = new_model(config.layers, config.width, config.heads, config.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    state_path = config.out.with_name(config.out.name + ".state")
    meaning = {k: str(v) for k, v in asdict(config).items() if k not in ("out", "save_every")}
    step = seen = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["config"] != meaning:
            raise InputError(f"{state_path} is the state of a run with other settings; remove it or name another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seen = state["step"], state["seen"]
    encoded = encode(sequences)
    started = time.perf_counter(), seen
    for batch in batches(encoded, config, skip=step):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(seen / config.tokens, config.warmup)
        tokens, chosen = mask(batch, generator(config.seed, "mask", step))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            logits = logits_at(model, tokens, chosen)
        loss = F.cross_entropy(logits.float(), batch[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + int((batch > 3).sum())
        if step % config.save_every == 0 or seen >= config.tokens:
            speed = (seen - started[1]) / (time.perf_counter() - started[0])
            print(f"step {step}  tokens {seen}  loss {loss.item():.3f}  {speed:.0f} tokens/s", flush=True)
            _write(
                state_path,
                dict(config=meaning, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, seen=seen),
            )
        if seen >= config.tokens:
            break
    save_checkpoint(model, config.out)
    state_path.unlink()
    return model


def new_model(layers: int, width: int, heads: int, seed: int) -> "ESM2":
    """fair-esm's ESM2 with matrices drawn from N(0, 1 / (4 width)), biases 0; the global generator is left as it was."""
    from esm.model.esm2 import ESM2

    with torch.random.fork_rng(devices=[]):
        model = ESM2(layers, width, heads)
    weights = generator(seed, "weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 * width**-0.5, generator=weights)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def encode(sequences: Sequence[str]) -> list[Tensor]:
    """fair-esm token ids of each sequence, without <cls> and <eos>."""
    from esm.data import Alphabet

    index = torch.full((128,), -1)
    for letter, token in Alphabet.from_architecture("ESM-1b").tok_to_idx.items():
        if len(letter) == 1:
            index[ord(letter)] = token
    return [index[torch.frombuffer(bytearray(sequence.encode()), dtype=torch.uint8).long()] for sequence in sequences]


def batches(encoded: Sequence[Tensor], config: Config, skip: int = 0) -> Iterator[Tensor]:
    """Endless padded batches (n, l + 2) with <cls> and <eos>; each epoch has new crops and a new order; `skip` costs no work.

    Proteins of similar length share a batch (they are sorted within random pools), at most `batch_tokens` residues each.
    """
    lengths = torch.tensor([min(len(tokens), config.crop) for tokens in encoded])
    number, epoch = 0, 0
    while True:
        order = torch.randperm(len(encoded), generator=generator(config.seed, "order", epoch))
        cuts = torch.rand(len(encoded), generator=generator(config.seed, "crop", epoch))
        groups: list[list[int]] = []
        for pool in order.split(4096):
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
    """<cls> residues <eos>, padded on the right: fair-esm's ids 0, 2 and 1."""
    batch = torch.ones(len(rows), max(map(len, rows)) + 2, dtype=torch.long)
    for out, row in zip(batch, rows):
        out[0], out[1 : len(row) + 1], out[len(row) + 1] = 0, row, 2
    return batch


def mask(batch: Tensor, masks: torch.Generator, changed: tuple[float, float] = (0.8, 0.1)) -> tuple[Tensor, Tensor]:
    """Masked tokens and the chosen positions (bool), both like `batch`: 15 % of the 20 amino acids (X, B, ... never).

    Of those, `changed[0]` become <mask>, `changed[1]` a random amino acid, the others stay.
    """
    amino_acids = encode([AMINO_ACIDS])[0]
    dice, fate = (torch.rand(batch.shape, generator=masks) for _ in range(2))
    other = amino_acids[torch.randint(20, batch.shape, generator=masks)]
    chosen = torch.isin(batch, amino_acids) & (dice < 0.15)
    tokens = torch.where(chosen & (fate < changed[0]), 32, batch)
    tokens = torch.where(chosen & (fate >= changed[0]) & (fate < sum(changed)), other, tokens)
    return tokens, chosen


def schedule(progress: float, warmup: float) -> float:
    """Fraction of the highest rate: linear rise, then cosine decay to a tenth."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, (progress - warmup) / (1 - warmup))))


def logits_at(model: "ESM2", tokens: Tensor, chosen: Tensor) -> Tensor:
    """model(tokens)["logits"][chosen], with scaled-dot-product attention and the head only where asked: about twice as fast."""
    padding = tokens.eq(model.padding_idx)
    x = model.embed_tokens(tokens).masked_fill((tokens == model.mask_idx).unsqueeze(-1), 0.0)
    observed = (tokens == model.mask_idx).sum(-1) / (~padding).sum(-1)
    x = x * ((1 - 0.15 * 0.8) / (1 - observed) * ~padding.T).T.unsqueeze(-1)
    visible = ~padding[:, None, None, :] if padding.any() else None
    for layer in model.layers:
        attention = layer.self_attn
        h = layer.self_attn_layer_norm(x)
        q, k, v = (
            project(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (r.unflatten(0, q.shape[:2]) for r in attention.rot_emb(q.flatten(0, 1), k.flatten(0, 1)))
        h = _attend(q.to(v.dtype), k.to(v.dtype), v, visible)
        x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    return model.lm_head(model.emb_layer_norm_after(x[chosen]))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention (n, heads, l, d / heads); in bfloat16 two plain products, whose backward is twice as fast on CPU."""
    if v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def save_checkpoint(model: "ESM2", path: Path) -> None:
    """float16 weights in the format of fair-esm's ESM-2 checkpoints; loads with weights_only=True and Namespace allowed."""
    described = argparse.Namespace(
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
    )
    state = {
        f"encoder.{'' if name.startswith('lm_head') else 'sentence_encoder.'}{name}": value.half()
        for name, value in model.state_dict().items()
        if not name.startswith("contact_head")
    }
    _write(path, {"cfg": {"model": described}, "model": state})


def _write(path: Path, content: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, temporary)
    temporary.replace(path)
