"""What the results were measured by, against the obvious alternatives."""

import os
from pathlib import Path

from distil_rank.core.records import ROOT

# public data, which is not part of this repository (`python -m benchmarks.real_data`)
DATA = Path(os.environ.get("DISTIL_RANK_DATA", ROOT.parent / "shared" / "data"))
