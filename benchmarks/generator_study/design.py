"""What the study asks, and at which scale: cells, planned contrasts, presets."""

from dataclasses import dataclass, replace
from typing import Literal

from distil_rank.generators.loss import Objective

Shape = tuple[int, int, int]  # layers, heads, width


@dataclass(frozen=True)
class Preset:
    """Scale of a study; the first size carries the doses."""

    sizes: dict[str, Shape]
    steps: int
    batch_size: int
    rates: tuple[float, ...]  # learning rates that pilots try
    optimizer: Literal["adamw", "muon"] = "muon"
    seeds: int = 5  # runs a cell, paired by their seed
    temperatures: tuple[float, ...] = (1, 2, 4, 8)
    alphas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # beside 1, no teacher
    test_proteins: int = 200  # at most, of test, hard test and validation each
    final_times: int = 1  # a final student has so many times the steps of a run
    generate: int = 100  # proteins that a final student writes


SIZES = {"tiny": (4, 4, 512), "small": (6, 8, 768), "medium": (12, 16, 1024)}
PRESETS = {
    "family": Preset(
        sizes={"tiny": (1, 2, 32), "small": (2, 2, 48), "medium": (2, 3, 96)},
        steps=300,  # as many proteins as 150 of 8, and better: AdamW left the sizes alike there
        batch_size=4,
        rates=(3e-3, 6e-3),
        final_times=5,
    ),
    "protgpt2": Preset(SIZES, 5000, 64, (3e-4, 1e-3), "adamw", test_proteins=10_000, generate=1000),
}
THRESHOLDS = {"tiny": 3.0, "small": 2.5, "medium": 2.0}  # student perplexity over teacher's
CLAIM = (-0.25, -0.15)  # published change of perplexity by the enhancements on difficult proteins
PILOT = 1000  # seed of pilots


def cells(base: Objective) -> dict[str, tuple[Objective, str]]:
    """Objective and initial weights of every cell."""
    alone, both = Objective(alpha=1.0), replace(base, uncertainty=True, calibration=True)
    return {
        "no teacher": (alone, "random"),
        "distilled": (base, "random"),
        "uncertainty": (replace(base, uncertainty=True), "random"),
        "calibration": (replace(base, calibration=True), "random"),
        "both": (both, "random"),
        "slice, no teacher": (alone, "slice"),
        "slice": (base, "slice"),
    }


# name: weights of the cells' log perplexities, the proteins they are of, words for below and above
HELPS = ("helps", "hurts")
CONTRASTS = {
    "teacher": ({"distilled": 1, "no teacher": -1}, "all", HELPS),
    "uncertainty": ({"uncertainty": 1, "distilled": -1}, "all", HELPS),
    "calibration": ({"calibration": 1, "distilled": -1}, "all", HELPS),
    "both": ({"both": 1, "distilled": -1}, "all", HELPS),
    "interaction": (
        {"both": 1, "uncertainty": -1, "calibration": -1, "distilled": 1},
        "all",
        ("synergy", "antagonism"),
    ),
    "both, difficult third": ({"both": 1, "distilled": -1}, "difficult", HELPS),
    "slice": ({"slice": 1, "distilled": -1}, "all", HELPS),
    "teacher, from a slice": ({"slice": 1, "slice, no teacher": -1}, "all", HELPS),
}
