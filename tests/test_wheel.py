"""Every command of the documents, run from an installed wheel outside the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.documents import documents
from distil_rank.core.records import ROOT
from distil_rank.proteins.synthetic import synthetic_embeddings
from tests.test_documents import commands

pytestmark = pytest.mark.slow

# what a command that cannot run here starts with, and why
NOT_RUN = {
    "python -m benchmarks": "of the checkout, minutes to hours",
    "python main.py": "of the checkout; the forms with data of their own are run below",
    "distil-rank generator": "a teacher of the hub, or hours; tests/generators runs each command",
    "distil-rank nested probe": "needs the public scans; tests/nested runs it on small ones",
    "distil-rank nested fit human_yeast": "needs the public proteins, minutes",
}
# public names of weights that cannot be had here -> the small models of the wheel
SMALL = {"esm2_t33_650M_UR50D": "nano-64", "--family esm2 --upto 650M": "--family nano --upto 128"}
SMALL["--dim 640"] = "--dim 64"


def printed() -> list[str]:
    found = [shlex.join(arguments) for document in documents() for arguments in commands(document)]
    return [c for c in dict.fromkeys(found) if len(c.split()) > 3 and "--help" not in c]


def reason(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with data, and the environment of a wheel installed apart from the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # a build writes beside what it builds
    ignored = shutil.ignore_patterns(".git", ".venv", "results", "build", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = "pip wheel --no-deps --no-build-isolation --quiet --wheel-dir"
    subprocess.run([sys.executable, "-m", *build.split(), place, source], check=True)
    (wheel,) = place.glob("*.whl")
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "env"], check=True)
    python = place / "env" / "bin" / "python"
    packages = Path(next((place / "env" / "lib").iterdir()), "site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    install = f"pip --python {python} install --no-deps --no-index --quiet --force-reinstall"
    subprocess.run([sys.executable, "-m", *install.split(), wheel], check=True)
    work = place / "work"
    work.mkdir()
    make_data(work)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DISTIL_RANK_DATA")}
    return work, kept | {"PATH": f"{python.parent}:{os.environ['PATH']}"}


def make_data(work: Path) -> None:
    """The files that the documents name."""
    source = torch.Generator().manual_seed(0)
    letters = "ACDEFGHIKLMNPQRSTVWY"
    with (work / "proteins.fasta").open("w") as file:
        for i in range(40):
            length = int(torch.randint(30, 60, (1,), generator=source))
            chosen = torch.randint(20, (length,), generator=source).tolist()
            file.write(f">p{i}\n{''.join(letters[c] for c in chosen)}\n")
    x = synthetic_embeddings(260, 0, "train")[:, :96].contiguous()
    for name, rows in (("train", x[:200]), ("val", x[200:]), ("x", x), ("embeddings", x)):
        torch.save(rows, work / f"{name}.pt")
    head = nn.Sequential(nn.Linear(96, 80), nn.GELU(), nn.Linear(80, 70)).eval()
    save_file(
        {f"classifier.dense.{k}": v for k, v in nn.Linear(96, 96).state_dict().items()},
        work / "head.safetensors",
    )
    torch.onnx.export(head, (x[:2],), work / "head.onnx", dynamo=False, verbose=False)


def test_the_documents_have_commands_of_every_kind_and_each_reason_is_needed():
    found = printed()
    run = [command for command in found if reason(command) is None]
    assert {c.split()[1] for c in run} >= {"embed", "moments", "compress", "nested"}
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in found), start


def test_they_run(installed):
    work, environment = installed
    place = "import distil_rank, sys; print(distil_rank.__file__)"
    done = subprocess.run(["python", "-c", place], cwd=work, env=environment, capture_output=True)
    assert str(work.parent / "env") in done.stdout.decode(), done.stderr.decode()[-500:]
    failed = {}
    for command in [c for c in printed() if reason(c) is None]:
        for public, small in SMALL.items():
            command = command.replace(public, small)
        command = re.sub(r"--rank 64\b", "--rank 32", command)
        done = subprocess.run(
            shlex.split(command), cwd=work, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            failed[command] = done.stderr[-600:]
    assert not failed, "\n".join(f"{c}: {e}" for c, e in failed.items())
    assert {"store", "moments.safetensors", "small"} <= {f.name for f in work.iterdir()}


def test_main_runs_on_data_of_its_own(installed):
    work, environment = installed
    given = "--train train.pt --val val.pt --teacher head.onnx --quick --out mine"
    command = ["python", str(ROOT / "main.py"), *given.split()]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Head head" in done.stdout, done.stderr[-600:]
