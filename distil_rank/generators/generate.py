"""Write new proteins with a generator, as FASTA with the perplexity of each in its header.

    distil-rank generator generate --model models/nano-student -n 100 --max-length 200 --out new.fasta

Protein i depends on the seed and i alone, so a run that was interrupted goes on with the next protein when the same
command is given again, and the batch size changes nothing (in float64, the default).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from distil_rank.core.errors import InputError
from distil_rank.generators.sampling import Dtype, Sampler, draw
from distil_rank.proteins.fasta import Protein, write_fasta
from distil_rank.core.records import require_writable


@dataclass(frozen=True)
class Config:
    model: str  # folder of the generator
    out: Path  # FASTA file to write
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 100  # proteins
    max_length: int = 200  # tokens per protein at most, the start token counted
    temperature: float = 1.0  # below 1: safer, above 1: more varied
    top_k: int = 0  # draw among the k most probable tokens; 0: among all
    repetition_penalty: float = 1.0  # above 1: fewer repeats
    seed: int = 0
    batch_size: int = 16  # proteins drawn together
    dtype: Dtype = "float64"  # arithmetic; float32 is about twice as fast, see above
    device: str = "auto"


def run(config: Config) -> None:
    from distil_rank.generators.models import load, weights_sha256
    from distil_rank.generators.training import choose_device

    if config.n < 1:
        raise InputError(f"n must be at least 1, got {config.n}")
    if config.out.is_dir():
        raise InputError(f"a file to write required, got the folder {config.out}; add a file name")
    device = choose_device(config.device)
    sampler = Sampler(config.max_length, config.temperature, config.top_k, config.repetition_penalty)
    model, tokenizer = load(config.model)
    sampler.check(model.config.n_positions)
    require_writable(config.out.parent)
    head = {"sampler": asdict(sampler), "seed": config.seed, "dtype": config.dtype, "weights": weights_sha256(model)}
    partial = config.out.with_name(config.out.name + ".partial.jsonl")
    records = _resume(partial, head)
    index, empty = (records[-1]["index"] + 1 if records else 0), 0
    with partial.open("a", buffering=1) as file:
        if not records and not partial.stat().st_size:
            file.write(json.dumps(head) + "\n")
        for drawn in _endless(model.to(device), tokenizer, index, sampler, config):
            if sum(bool(r["sequence"]) for r in records) >= config.n:
                break
            records.append({"index": drawn.index, "sequence": drawn.sequence, "header": _header(drawn)})
            file.write(json.dumps(records[-1]) + "\n")
    kept = [r for r in records if r["sequence"]][: config.n]
    empty = sum(not r["sequence"] for r in records)
    if empty:
        print(f"note: {empty} empty protein{'s' * (empty > 1)} replaced by the next", file=sys.stderr)
    write_fasta(config.out, (Protein(r["header"].split()[0], r["header"], r["sequence"]) for r in kept))
    partial.unlink()
    print(f"{config.out}: {len(kept)} proteins")


def _endless(model: Any, tokenizer: Any, start: int, sampler: Sampler, config: Config) -> Iterator[Any]:
    """Proteins from index `start` on; InputError when the model writes nothing but empty ones."""
    limit = 10 * config.n + 100
    yield from draw(model, tokenizer, range(start, limit), sampler, config.seed, config.batch_size, config.dtype)
    raise InputError(f"a model that writes proteins required, got mostly empty ones in {limit} draws; train it further")


def _header(drawn: Any) -> str:
    end = "yes" if drawn.ended else "no"
    return f"generated_{drawn.index} length={len(drawn.sequence)} perplexity={drawn.perplexity:.3f} ended={end}"


def _resume(partial: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole records of an interrupted run with the same settings and weights; a torn last line is dropped."""
    if not partial.exists():
        return []
    lines = []
    for line in partial.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    if lines and lines[0] != head:
        raise InputError(
            f"the settings and weights that {partial} was begun with required to go on, got others; repeat them "
            f"or remove it"
        )
    temporary = partial.with_name(f"{partial.name}.tmp{os.getpid()}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, partial)
    return lines[1:]
