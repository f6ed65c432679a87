"""One style for every figure, and the way it reaches the disk. For `report` modules only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_rank.core.records import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, QUIET, PALE = "#22262b", "#6f7680", "#9aa3ad"
PALETTE = ("#3767a6", "#c4502f", "#2f8f63", "#7c4fa0", "#b8860b", "#3a9aa8", "#a0476f", "#6b7a2f")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


@contextmanager
def drawn(path: str | Path, size: tuple[float, float], dpi: int = 110) -> Iterator["Figure"]:
    """A figure of `size` inches in the house style, written to `path` when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=dpi, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        yield figure
        with atomic(path) as temporary, temporary.open("wb") as file:
            canvas.print_png(file, metadata={"Software": None})
