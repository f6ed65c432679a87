"""What `python -m benchmarks.generators` measured, as a table. A pure function of its JSON."""

# ruff: noqa: E501 - the lines of the text are long
from collections.abc import Iterable

from distil_rank.core.records import Record
from distil_rank.core.tables import markdown

SCHEMA = "distil-rank/generators-benchmark/3"


def bars(record: Record) -> str:
    """A block of `docs/generators.md`: what was demanded of the code and what was measured."""
    table = markdown([["measured", "demanded", "found"], *_rows(record)])
    loss = record["loss"]
    return f"""{table}

The loss is worked through {loss["positions_at_a_time"]} positions at a time with the whole vocabulary of each, not in slices of the vocabulary: a
slice would need the normalizer of all others first, a second pass, and the purpose, that V = {loss["vocabulary"]:,} fits, is served by
{loss["peak_mib"]["ours"]:.0f} MiB beside the logits where the direct formula takes {loss["peak_mib"]["direct"]:.0f}. Ratios are of processor time on {record["environment"]["threads"]} thread of
{record["environment"]["cpu"]}, commit {str(record["environment"]["commit"])[:12]}."""


def _rows(record: Record) -> Iterable[tuple[str, str, str]]:
    loss = record["loss"]
    tokens = "V = {vocabulary:,}, 2 x 256 tokens".format(**loss)
    yield (
        f"{tokens}: peak memory of the loss / direct formula",
        "at most 0.3",
        f"{loss['memory_ratio']:.3f}",
    )
    yield f"{tokens}: time / direct formula", "at most 1.2", f"{loss['time_ratio']:.2f}"
    yield (
        f"{tokens}: difference of value; of gradient",
        "at most 1e-5",
        f"{loss['value_difference']:.1e}; {loss['largest_gradient_difference']:.1e}",
    )
    covered = [100 * row["covered"] for row in record["calibration"]]
    yield (
        f"calibration error at gaps 0 to .04, 2,000 and 20,000 tokens ({record['calibration'][0]['trials']:,} trials each): intervals that hold it",
        "93 to 97 %",
        f"{min(covered):.1f} to {max(covered):.1f} %",
    )
    novelty, states, prepare = record["novelty"], record["states"], record["prepare"]
    yield "novelty of copies of 70 residues", "below .05", f"{novelty['value']:.3f}"
    yield (
        "novelty of unrelated proteins; of shuffled ones",
        "",
        f"{novelty['natural']['value']:.3f}; {novelty['shuffled']['value']:.3f}",
    )
    yield "the same, 200 against 1,000", "", f"{novelty['processor_seconds']:.2f} s"
    yield (
        "V = 50,257, 2 x 256 tokens: peak memory from states / from all logits",
        "at most 0.5",
        f"{states['memory_ratio']:.3f}",
    )
    yield (
        f"preparing {prepare['proteins']:,} proteins; extrapolated to 6 million",
        "at most 30 min",
        f"{prepare['seconds']:.0f} s, {prepare['peak_mib']:.0f} MiB; {prepare['minutes_for_6_million']:.0f} min",
    )
