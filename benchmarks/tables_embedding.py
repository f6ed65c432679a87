"""What the benchmarks of embedding and of splits found, as markdown."""

from benchmarks.embedding import SCHEMA
from distil_rank.core.records import Record
from distil_rank.core.tables import markdown, with_interval

__all__ = ["SCHEMA", "SPLITS", "bars", "splits"]
SPLITS = "split-recall/2"


def bars(record: Record) -> str:
    """Speed against fair-esm's loop, peak memory, random reads."""
    speed, memory, reading = (record[part] for part in ("speed", "memory", "reading"))
    rows = [["what", "measured"]]
    for name, ratio in speed["speedup"].items():
        what = f"speed of fair-esm's loop in float32 / ours in {name}, {speed['threads']} threads"
        rows.append([what, f"{with_interval(ratio, '.2f')} x"])
    rows.append(
        ["peak memory of ten times the proteins", f"{memory['ten_times_the_proteins']:.2f} x"]
    )
    for how in ("position", "id"):
        read = reading[f"microseconds_by_{how}"]
        rows.append([f"random read of {reading['features']:,} features by {how}", f"{read:.1f} µs"])
    return markdown(rows)


def splits(record: Record) -> str:
    """Held-out proteins with a near relative in training, by a search independent of the split."""
    pairs = record["every_pair"]
    head = ["proteins", "clusters", "held out", "with a near relative in training", "share"]
    more = ["by aligning every pair*", "seconds of the split", "processor seconds", "peak memory"]
    rows = [[*head, *more]]
    for found in record["splits"]:
        counts = [
            found[k] for k in ("proteins", "clusters", "n_val", "val_with_a_relative_in_train")
        ]
        rows.append([*(f"{n:,}" for n in counts), f"{found['share']:.2%}"])
        alike = found["proteins"] == pairs["proteins"]
        rows[-1].append(f"{pairs['share']['split']:.2%}" if alike else "")
        rows[-1] += [f"{found[k]:,.0f}" for k in ("seconds", "processor_seconds")]
        rows[-1].append(f"{found['peak_megabytes']:,} MB")
    drawn = record["random"]
    rows.append([f"{drawn['proteins']:,}, drawn at random", "", f"{drawn['n_val']:,}", ""])
    rows[-1] += [f"{drawn['share']:.2%}", f"{pairs['share']['random']:.2%}", "", "", ""]
    return markdown(rows)
