"""What a study runs at which scale, and which perplexity ratio it asks of which size."""

from dataclasses import dataclass
from typing import Any

ENHANCEMENTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "uncertainty": {"uncertainty": True},
    "calibration": {"calibration": True},
    "both": {"uncertainty": True, "calibration": True},
}


@dataclass(frozen=True)
class Preset:
    """What is run at which scale."""

    teacher: str
    sizes: dict[
        str, tuple[int, int, int]
    ]  # name: layers, heads, width; the first is the one swept and ablated
    steps: int
    final_steps: int
    batch_size: int
    rates: tuple[
        float, ...
    ]  # learning rates tried in every cell under every schedule; the sweeps take the middle one
    temperatures: tuple[float, ...] = (1, 2, 4, 6, 8, 10)
    alphas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    warmups: tuple[tuple[str, float], ...] = (("short warm-up", 0.05), ("long warm-up", 0.4))
    seeds: int = 5  # 0, 1, ... of the runs that are reported
    pilots: int = 3  # runs behind the choice of a learning rate, of other seeds
    generate: int = 200


CELLS = tuple(ENHANCEMENTS)  # of the 2 x 2 ablation
THRESHOLDS = {"tiny": 3.0, "small": 2.5, "medium": 2.0}  # student perplexity over teacher's
FIRST_PILOT = 1000  # seeds of pilots count from here
STUDENTS = {
    "micro": (4, 4, 256),
    "tiny": (4, 4, 512),
    "small": (6, 8, 768),
    "medium": (12, 16, 1024),
}
PRESETS = {
    "nano": Preset(
        teacher="models/nano-teacher",
        sizes={"tiny": (1, 2, 32), "small": (2, 2, 48), "medium": (2, 4, 96)},
        steps=200,
        final_steps=500,
        batch_size=16,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        temperatures=(1, 2, 4, 8),
        alphas=(0.1, 0.5, 0.9),
        generate=100,
    ),
    "micro": Preset(
        teacher="nferruz/ProtGPT2",
        sizes={"micro": STUDENTS["micro"]},
        steps=2000,
        final_steps=5000,
        batch_size=32,
        rates=(3e-4, 1e-3, 3e-3),
    ),
    "protgpt2": Preset(
        teacher="nferruz/ProtGPT2",
        sizes=STUDENTS,
        steps=5000,
        final_steps=50000,
        batch_size=64,
        rates=(1e-4, 3e-4, 1e-3),
    ),
}
