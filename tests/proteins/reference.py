"""The slow, obvious versions: fair-esm itself, one protein at a time."""

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from distil_rank.proteins.esm2 import MASK, tokenise
from distil_rank.proteins.fasta import AMINO_ACIDS, Protein, write_fasta


def fair_esm_model(layers: int, width: int, heads: int, seed: int = 0):
    """A random model of fair-esm's class (biases and norms random too)."""
    from esm.model.esm2 import ESM2

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ESM2(num_layers=layers, embed_dim=width, attention_heads=heads).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def as_fair_esm(model):
    """fair-esm's model with the weights of ours."""
    theirs = fair_esm_model(model.depth, model.width, model.heads)
    missing, surplus = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not surplus and all("contact_head" in k or "inv_freq" in k for k in missing)
    return theirs


def save_fair_esm(model, path: Path) -> None:
    """fair-esm's ESM-2 checkpoint format (what its `_load_model_and_alphabet_core_v2` reads)."""
    state = {}
    for key, tensor in model.state_dict().items():
        if not key.startswith("contact_head"):
            prefix = "encoder." if key.startswith("lm_head") else "encoder.sentence_encoder."
            state[prefix + key] = tensor
    settings = argparse.Namespace(
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
        arch="roberta_large",
    )
    described = {"args": None, "cfg": {"_name": None, "model": settings}}
    torch.save({**described, "model": state, "extra_state": {"epoch": 1}}, path)


def read_fair_esm(path: Path) -> dict:
    """What is in such a file."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@torch.no_grad()
def hidden(model, sequence: str, layer: int) -> Tensor:
    """fair-esm's hidden state (l + 2, d) of one sequence alone, with <cls> and <eos>."""
    _, _, tokens = model.alphabet.get_batch_converter()([("", sequence)])
    return model(tokens, repr_layers=[layer])["representations"][layer][0]


def mean_pooled(model, sequence: str) -> Tensor:
    """The mean over residues, without the rows of <cls> and <eos>."""
    return hidden(model, sequence, model.num_layers)[1:-1].mean(0)


def blended(model, sequence: str, spans: list[tuple[int, int]], ramp: int) -> Tensor:
    """Windows [start, stop) cross-faded (l, d): weights rise to `ramp` from inner ends."""
    total, weight = torch.zeros(len(sequence), model.embed_dim), torch.zeros(len(sequence))
    for start, stop in spans:
        rows = hidden(model, sequence[start:stop], model.num_layers)[1:-1]
        for i in range(stop - start):
            from_left = i + 1 if start > 0 else ramp
            from_right = stop - start - i if stop < len(sequence) else ramp
            w = min(from_left, from_right, ramp)
            total[start + i] += w * rows[i]
            weight[start + i] += w
    return total / weight[:, None]


@torch.no_grad()
def log_odds(model, sequence: str, position: int, masked: bool, window=slice(None)) -> Tensor:
    """log p - log p(wild type) (20,) at one position, from the tokens in the window around it."""
    (tokens,) = tokenise([sequence])
    place = position + 1 - (window.start or 0)
    seen = tokens[window].clone()
    if masked:
        seen[place] = MASK
    logs = model(seen[None]).logits[0, place].log_softmax(-1).double()
    return logs[tokenise([AMINO_ACIDS])[0, 1:-1]] - logs[tokens[position + 1]]


def random_sequence(random: random.Random, length: int) -> str:
    return "".join(random.choices("LAGVSERTIDPKQNFYMHWCXBUZO", k=length))


def random_fasta(path: Path, count: int, longest: int = 120, seed: int = 0) -> list[Protein]:
    """A FASTA of random proteins with lengths 1 ... longest."""
    draw = random.Random(seed)
    proteins = [
        Protein(f"p{i}", f"p{i} random", random_sequence(draw, draw.randint(1, longest)))
        for i in range(count)
    ]
    write_fasta(path, proteins)
    return proteins


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
