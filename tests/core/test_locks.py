import os
import signal
import subprocess
import sys

import pytest

from distil_rank.core.errors import InputError
from distil_rank.core.locks import LOCK, only_writer
from distil_rank.core.records import ROOT

HOLD = """
import sys, time
from distil_rank.core.locks import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_folder_is_refused_with_its_holder_until_that_is_killed(tmp_path, other):
    with pytest.raises(InputError, match=f"is held by process {other.pid} on"):
        only_writer(tmp_path).__enter__()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK).exists()
    with only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_nothing_is_left_and_a_failure_lets_go(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), only_writer(tmp_path):
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path), pytest.raises(InputError), only_writer(tmp_path):
        pass
