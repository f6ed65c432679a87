"""Write new proteins with a generator, as FASTA with the perplexity of each in its header.

    distil-rank generator generate --model models/nano-student -n 100 --out new.fasta
    distil-rank generator generate --model nferruz/ProtGPT2 --top-k 950 --repetition-penalty 1.2 \\
        --prompt MKTAYI --out new.fasta

Protein i depends on the seed and i; with `--dtype float64` the batch size changes nothing either. A
run that was interrupted goes on with the next proteins when the same command is given again.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from distil_rank.core.devices import pick_device
from distil_rank.core.errors import InputError, at_least
from distil_rank.core.records import require_writable
from distil_rank.core.resume import Checkpoint
from distil_rank.generators.models import load, weights_sha256
from distil_rank.generators.sample import Dtype, Sampler, draw
from distil_rank.proteins.fasta import Protein, write_fasta


@dataclass(frozen=True, kw_only=True)
class Config(Sampler):
    model: str  # a model by name, file or folder
    out: Path  # where to write
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 100  # proteins to write
    batch_size: int = 32  # proteins per step
    dtype: Dtype = "float32"  # arithmetic
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes CUDA where there is one


def run(config: Config) -> None:
    at_least(1, n=config.n, batch_size=config.batch_size)
    if config.out.is_dir():
        raise InputError(f"a file to write required, got the folder {config.out}; add a file name")
    device = pick_device(config.device)
    config.check()
    model, tokenizer = load(config.model)
    require_writable(config.out.parent)
    partial = config.out.with_name(config.out.name + ".partial")
    checkpoint = Checkpoint(partial, config, weights_sha256(model))
    records = (checkpoint.load() or {"drawn": []})["drawn"]
    wanted, how = range(len(records), config.n), (config.seed, config.batch_size, config.dtype)
    for drawn in draw(model.to(device), tokenizer, wanted, config, *how):
        records.append(asdict(drawn))
        if len(records) % config.batch_size == 0:
            checkpoint.save({"drawn": records})
    kept = [r for r in records if r["sequence"]]
    if len(kept) < config.n:
        print(f"note: {config.n - len(kept)} empty protein(s) left out", file=sys.stderr)
    if not kept:
        raise InputError(f"a model that writes proteins required, got {config.model}; train it on")
    write_fasta(config.out, (Protein(*header(r), r["sequence"]) for r in kept))
    checkpoint.clear()
    print(f"{config.out}: {len(kept)} proteins")


def header(record: dict[str, Any]) -> tuple[str, str]:
    """Identifier and FASTA header of a drawn protein."""
    name, end = f"generated_{record['index']}", "yes" if record["ended"] else "no"
    length, perplexity = len(record["sequence"]), f"{record['perplexity']:.3f}"
    return name, f"{name} length={length} perplexity={perplexity} ended={end}"
