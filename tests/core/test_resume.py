"""Work that goes on where it was killed, and never on what another request left."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.core.resume import Cache, Checkpoint, fingerprint


@dataclass(frozen=True)
class Request:
    steps: int = 3
    data: Path = Path("x.fasta")


def state(step: int) -> dict:
    return {"step": step, "model": {"weight": torch.full((3,), float(step))}, "losses": [0.1, 0.2]}


def test_a_checkpoint_comes_back_to_its_own_request_only(tmp_path):
    kept = Checkpoint(tmp_path / "run" / "state.pt", Request(), torch.ones(3))
    assert kept.load() is None
    kept.save(state(1))
    kept.save(state(2))
    found = Checkpoint(tmp_path / "run" / "state.pt", Request(), torch.ones(3)).load()
    assert found["step"] == 2 and torch.equal(found["model"]["weight"], torch.full((3,), 2.0))
    for other in ((Request(steps=4), torch.ones(3)), (Request(), torch.zeros(3)), ()):
        with pytest.raises(InputError, match="this very request"):
            Checkpoint(tmp_path / "run" / "state.pt", *other).load()
    kept.clear()
    kept.clear()
    assert kept.load() is None and list((tmp_path / "run").iterdir()) == []


def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_is_unpickled(tmp_path):
    kept = Checkpoint(tmp_path / "state.pt", "a")
    kept.save(state(1))
    whole = kept.path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"nonsense"):
        kept.path.write_bytes(damage)
        with pytest.raises(InputError, match="whole checkpoint"):
            kept.load()
    torch.save({"identity": kept.identity, "state": torch.nn.Linear}, kept.path)
    with pytest.raises(InputError, match="whole checkpoint"):
        kept.load()
    torch.save([1, 2], kept.path)
    with pytest.raises(InputError, match="whole checkpoint"):
        kept.load()


def test_fingerprints_tell_requests_apart():
    same = [fingerprint(Request(), [1, 2], torch.arange(3)) for _ in range(2)]
    assert same[0] == same[1]
    others = [
        fingerprint(Request(steps=4), [1, 2], torch.arange(3)),
        fingerprint(Request(), [2, 1], torch.arange(3)),
        fingerprint(Request(), [1, 2], torch.arange(3).float()),
        fingerprint(Request(), [1, 2], torch.arange(3)[:, None]),
    ]
    assert len({*same, *others}) == 5


def test_a_cache_makes_once_what_it_is_asked_for(tmp_path):
    cache, made = Cache(tmp_path / "cache"), []

    def record() -> dict:
        made.append(1)
        return {"value": 0.5}

    def tensors() -> dict:
        made.append(2)
        return {"x": torch.arange(3)}

    for _ in range(2):
        assert cache.json("a", Request(), record) == {"value": 0.5}
        assert torch.equal(cache.tensors("a", Request(), tensors)["x"], torch.arange(3))
    assert made == [1, 2]
    cache.json("a", Request(steps=4), record)  # another request
    cache.json("b", Request(), record)
    assert made == [1, 2, 1, 1]
    with pytest.raises(ValueError):  # a result that failed is not kept
        cache.json("c", 1, lambda: {"value": float("nan")})
    assert cache.json("c", 1, lambda: {"value": 1}) == {"value": 1}


LOOP = """
import sys, torch
from pathlib import Path
from distil_rank.core.resume import Checkpoint
from distil_rank.core.records import write_json
kept = Checkpoint(Path(sys.argv[1]) / "state.pt", "loop")
state = kept.load() or {"step": 0, "x": torch.zeros(300_000)}
print("from", state["step"], flush=True)
while state["step"] < int(sys.argv[2]):
    state = {"step": state["step"] + 1, "x": state["x"] + 1}
    kept.save(state)
    write_json(Path(sys.argv[1]) / "record.json", {"step": state["step"], "fill": [0] * 50_000})
    print(state["step"], flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_state(tmp_path):
    """Killed again and again in the middle of its writes, the loop always goes on."""
    reached = 0
    for turn in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path), "1000000"],
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = [process.stdout.readline().split() for _ in range(4 + 3 * turn)]
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        assert int(lines[0][1]) >= reached  # it went on where the last one was killed
        reached = int(rest[-1] if rest else lines[-1][-1])
        found = Checkpoint(tmp_path / "state.pt", "loop").load()
        assert found["step"] >= reached and bool((found["x"] == found["step"]).all())
    last = found["step"]
    done = [sys.executable, "-c", LOOP, str(tmp_path), str(last + 1)]
    done = subprocess.run(done, capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["from", str(last)]
