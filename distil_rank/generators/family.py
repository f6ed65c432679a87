"""Do written proteins belong to a family? A profile HMM of it finds them, or not (HMMER)."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from distil_rank.core.errors import InputError
from distil_rank.core.records import Record
from distil_rank.generators.quality import shares, shuffled

MOST = 500  # proteins that the HMM is built from
ROUNDS = 3  # of searching the family with the HMM and building it again from what is found
REACH = 1e-3  # largest E-value of a member, for a database of this many proteins:
DATABASE = 10_000


def membership(
    generated: Sequence[str], natural: Sequence[str], family: Sequence[str], seed: int = 0
) -> Record:
    """Share of hits of an HMM of `family` among written, held-out and shuffled proteins."""
    hmm, members = profile(family[:MOST])
    groups = {"generated": generated, "natural": natural, "shuffled": shuffled(natural, seed)}
    found = {name: shares(hits(hmm, group), len(group)) for name, group in groups.items()}
    return {**found, "built_from": members, "e_value": REACH, "database": DATABASE}


def profile(family: Sequence[str]) -> tuple[Any, int]:
    """HMM of a family and the number of proteins in it; the search starts from a median one."""
    import pyhmmer

    if not family:
        raise InputError("at least one protein of the family required, got none")
    alphabet = pyhmmer.easel.Alphabet.amino()
    block = digital(family, alphabet)
    order = sorted(range(len(family)), key=lambda i: len(family[i]))
    pipeline = pyhmmer.plan7.Pipeline(alphabet, incE=REACH, seed=42)
    search = pipeline.iterate_seq(block[order[len(order) // 2]], block)
    for result in islice(search, ROUNDS):
        if result.converged:
            break
    return result.hmm, len(result.hits.included)


def hits(hmm: Any, sequences: Sequence[str]) -> int:
    """How many proteins the HMM finds; an empty one is not found."""
    import pyhmmer

    pipeline = pyhmmer.plan7.Pipeline(hmm.alphabet, Z=DATABASE, incE=REACH, E=REACH, seed=42)
    block = digital([sequence for sequence in sequences if sequence], hmm.alphabet)
    return sum(hit.included for hit in pipeline.search_hmm(hmm, block))


def digital(sequences: Sequence[str], alphabet: Any) -> Any:
    """Sequences as HMMER reads them, called by their number."""
    from pyhmmer.easel import DigitalSequenceBlock, TextSequence

    texts = [TextSequence(name=str(i), sequence=s) for i, s in enumerate(sequences)]
    return DigitalSequenceBlock(alphabet, [text.digitize(alphabet) for text in texts])
