"""The arrows between the rooms, and a command line that answers at once."""

import subprocess
import sys

from distil_rank.core.records import ROOT


def test_imports_go_one_way_and_only_reports_draw():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from distil_rank.__main__ import main; main(['--help']); "
        "print([m for m in ('torch', 'esm', 'transformers', 'matplotlib', 'scipy', 'tyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "usage: distil-rank" in done.stdout


def test_an_unknown_command_is_named_with_status_2():
    done = subprocess.run([sys.executable, "-m", "distil_rank", "destil"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown command 'destil'" in done.stderr and not done.stdout
