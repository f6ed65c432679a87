"""Small random models of every architecture, token batches with padding and special tokens."""

from functools import cache

import torch
from torch import Tensor, nn

from distil_rank.compress.architectures import describe
from distil_rank.compress.models import compress_model
from distil_rank.compress.sites import find_sites
from distil_rank.core.lowrank import truncated_svd
from distil_rank.proteins.esm2 import ESM2

KINDS = ("esm2", "EsmModel", "EsmForMaskedLM", "GPT2LMHeadModel")
CLASSIFIERS = ("EsmForSequenceClassification", "EsmForTokenClassification")


def small_model(kind: str, width: int = 32, layers: int = 2, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(kind, width, layers).eval().requires_grad_(False)


def _build(kind: str, width: int, layers: int) -> nn.Module:
    if kind == "esm2":
        return ESM2(layers, width, 4, head=True)
    if kind == "fair-esm":  # any nn.Module to compression; its activations are (T, B, d)
        import esm

        return esm.ESM2(layers, width, 4, "ESM-1b")
    import transformers

    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(
            vocab_size=33,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        position_embedding_type="rotary",
        token_dropout=True,
        mask_token_id=32,
        pad_token_id=1,
        max_position_embeddings=128,
        emb_layer_norm_before=False,
        num_labels=3,
    )
    if kind == "EsmModel":
        return transformers.EsmModel(config, add_pooling_layer=False)
    return getattr(transformers, kind)(config)


def thin(model: nn.Module, rank: int = 4) -> nn.Module:
    """The model, all of whose linear layers now have this rank: its own students can be exact."""
    with torch.no_grad():
        for site in find_sites(model):
            A, B = truncated_svd(site.weight, min(rank, *site.weight.shape))
            site.weight.copy_(B @ A)
    return model


def token_batches(
    model: nn.Module, count: int = 3, rows: int = 4, length: int = 14, seed: int = 0
) -> list:
    """Batches of random proteins: <cls> residues <eos> padding, or for GPT-2 end residues end."""
    architecture = describe(model)
    source = torch.Generator().manual_seed(seed)
    causal = architecture is not None and architecture.task == "causal"
    start, end, pad = (0, 0, 0) if causal else (0, 2, 1)
    batches = []
    for _ in range(count):
        lengths = torch.randint(length // 2, length - 1, (rows,), generator=source)
        lengths[0] = length - 2
        tokens = torch.full((rows, length), pad)
        for row, n in zip(tokens, lengths.tolist()):
            row[0], row[n + 1] = start, end
            row[1 : n + 1] = torch.randint(4, 24, (n,), generator=source)
        mask = torch.arange(length) < lengths[:, None] + 2
        batches.append(tokens if architecture is None else architecture.batch(tokens, mask))
    return batches


def output(model: nn.Module, batch) -> Tensor:
    """Last hidden states or logits, whatever the model ends in, at residues only."""
    architecture = describe(model)
    assert architecture is not None
    with torch.no_grad():
        hidden, logits = architecture.read(model, batch)
        found = hidden if logits is None else logits
        return found[architecture.residues(batch)] if found.ndim == 3 else found


@cache
def compressed(kind: str) -> tuple[nn.Module, list, nn.Module]:
    """A model, batches for it and its half as large version; not to be changed."""
    model = small_model(kind)
    batches = token_batches(model)
    return model, batches, compress_model(model, batches, ratio=0.5)[0]
