"""Every command of README.md and docs/, run from an installed wheel outside the checkout."""

import gzip
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.documents import documents
from distil_rank.__main__ import COMMANDS, main
from distil_rank.core.records import ROOT, write_json
from distil_rank.generators.prepared import SPLIT, digest
from distil_rank.proteins.synthetic import synthetic_embeddings
from tests.test_documents import commands
from tests.toys import toy_sequences

# what a command that is not run starts with, and why
NOT_RUN = {
    "make": "a verb of the checkout; tests/test_documents.py looks for it in the Makefile",
    "python -m benchmarks.": "no part of a wheel; minutes to hours, on public data",
}
# what costs a download, a GPU or hours -> what stands for it here
SMALLER = {
    r"(facebook/)?esm2_t\d+_\w+_UR50D": "nano-64",
    r"--family esm2 --upto \w+": "--family nano --upto 128",
    r"--dim \d+": "--dim 100",
    "nferruz/ProtGPT2": "protgpt2",
    r"--steps \d+": "--steps 2",
    r"(generator (?:pre)?train (?!.*--steps)|generator finetune )": r"\1--steps 2 ",
    r"--batch-size \d+": "--batch-size 4",
    r"generator evaluate ": "generator evaluate --generate 3 ",
    r"generator generate (.*)-n \d+": r"generator generate \1-n 3 --max-new-tokens 20",
    r"--subset \d+": "--subset 20",
    "--device cuda": "--device cpu",
    r"torchrun --nproc-per-node \d+": "python -m torch.distributed.run --nproc-per-node 2",
    r"(python main.py(?!.*(?:--quick|--help)))": r"\1 --quick",
}
# word of a command -> what must be there for it, and the command that makes that
BEFORE = {
    "shards": ("shards", "distil-rank generator prepare uniref50.fasta.gz --out shards"),
    "report": ("results", "python main.py --quick"),
}
# one of each kind runs with the fast tests
FAST = ("--help", "embed", "moments", "export", "score", "compress head", "compress model")
FAST += ("nested fit", "nested embed")


def printed(document: Path) -> list[str]:
    """Commands that can be called as they stand; a mere name such as `distil-rank score` cannot."""
    found = [c for c in commands(document) if " ".join(c[1:]) not in COMMANDS.keys() - {"report"}]
    return list(dict.fromkeys(map(shlex.join, found)))


def to_run(document: Path) -> list[str]:
    return [command for command in printed(document) if not command.startswith(tuple(NOT_RUN))]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with data, and the environment of a wheel installed apart from the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    source, data, python = place / "source", place / "data", place / "env" / "bin" / "python"
    source.mkdir()  # a build writes beside what it builds
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("distil_rank", "models"):
        shutil.copytree(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source]
    subprocess.run([*pip, *build], check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python.parents[1]], check=True)
    install = ["--python", python, "install", "--no-deps", "--no-index", *place.glob("*.whl")]
    subprocess.run([*pip, *install], check=True)
    (packages,) = place.glob("env/lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))  # torch and the like
    data.mkdir()
    make_data(data)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DISTIL_RANK_DATA")}
    kept |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return data, kept


def make_data(folder: Path) -> None:
    """The files that the documents name."""
    from distil_rank.generators.data import amino_acid_tokenizer
    from distil_rank.generators.models import fresh, save

    proteins = toy_sequences(300, low=30, high=60)
    text = "".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(proteins))
    (folder / "work").mkdir()
    for name in ("proteins", "family", "work/train", "uniref50", "luciferase_like"):
        (folder / f"{name}.fasta").write_text(text)
        with gzip.open(folder / f"{name}.fasta.gz", "wt") as file:
            file.write(text)
    shutil.copy(folder / "proteins.fasta.gz", folder / "human_yeast_ecoli.fasta.gz")
    kept = {"validation": proteins[:30], "test": proteins[30:60]}
    for name in ("family", "nano"):
        (folder / "models" / f"{name}-teacher").mkdir(parents=True)
        parts = {part: list(map(digest, some)) for part, some in kept.items()}
        write_json(folder / f"models/{name}-teacher/split.json", {"schema": SPLIT, **parts})
    save(fresh(27, 1, 2, 32, 1024, 0, 0), amino_acid_tokenizer(), folder / "protgpt2")
    make_scans(folder, proteins)
    make_classes(folder, proteins)
    x = synthetic_embeddings(460, 0, "train")[:, :320].contiguous()
    parts = {"train": x[:400], "val": x[400:], "x_val": x[400:], "x": x, "embeddings": x}
    for name, rows in parts.items():
        torch.save(rows, folder / f"{name}.pt")
    peptides, gb1 = (folder / "data" / f"esm2_8m_{name}" for name in ("peptides", "gb1"))
    for place in (peptides, gb1):
        place.mkdir(parents=True)
    for name, rows in (("train", x[:400]), ("val", x[400:])):
        torch.save(rows, peptides / f"embeddings_{name}.pt")
        np.savez(gb1 / f"{name.replace('val', 'valid')}.npz", X=rows.numpy())
    layer = nn.Linear(320, 320).state_dict()
    named = {f"classifier.dense.{name}": tensor for name, tensor in layer.items()}
    save_file(named, folder / "head.safetensors")
    head = nn.Sequential(nn.Linear(320, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    torch.onnx.export(head, (x[:2],), folder / "head.onnx", dynamo=False, verbose=False)
    for name in ("main.py", "embeddings_train.pt", "embeddings_val.pt"):
        shutil.copy(ROOT / name, folder)


def make_scans(folder: Path, proteins: list[str]) -> None:
    """Two scans of a protein each, and the variants of a third."""
    (folder / "dms").mkdir()
    for name, wild_type in (("dms/a", proteins[0]), ("dms/b", proteins[1]), ("hba", proteins[2])):
        (folder / f"{name}.fasta").write_text(f">{name[-3:]}\n{wild_type}\n")
        changes = [(i, a) for i in range(1, 25) for a in "AG" if wild_type[i] != a]
        rows = [f"{wild_type[i]}{i + 1}{a},{i % 7}.{i}" for i, a in changes]
        (folder / f"{name}.csv").write_text("\n".join(["mutant,score", *rows]))
    (folder / "hba.csv").rename(folder / "variants.csv")


def make_classes(folder: Path, proteins: list[str]) -> None:
    """Proteins with a location, and with a class of every residue."""
    for name, some in (("our_val", proteins[:60]), ("test", proteins[60:100])):
        lines = (f">p{i} {'NM'[i % 2]}-U\n{sequence}\n" for i, sequence in enumerate(some))
        (folder / f"deeploc_{name}_set.fasta").write_text("".join(lines))
    sides = "SET=train VALIDATION=False", "SET=train VALIDATION=True", "SET=test VALIDATION=False"
    letters, classes = (
        "".join(
            f">p{i} {sides[i % 3]}\n{form(sequence)}\n" for i, sequence in enumerate(proteins[:90])
        )
        for form in (str, lambda sequence: "".join("HE"[a in "AGILMV"] for a in sequence))
    )
    for name in ("secondary_structure", "conservation"):
        for kind, text in (("sequences", letters), ("sampled", classes)):
            path = folder / f"{name}_{kind}.fasta.gz"
            path.write_bytes(gzip.compress(text.encode()))


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What a command said on standard error if it failed, else nothing."""
    for pattern, small in SMALLER.items():
        command = re.sub(pattern, small, command)
    words = shlex.split(command)
    for word, (path, before) in BEFORE.items():
        asked = any(w.rstrip("/") == word for w in words)
        if asked and not (folder / path).exists() and f"--out {path}" not in command:
            assert not run(before, folder, environment)
    if "--out" in words:  # where an alternative to this command may have written
        shutil.rmtree(folder / words[words.index("--out") + 1], ignore_errors=True)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return f"{command}: {done.stderr[-800:] or done.returncode}" if done.returncode else ""


def test_what_is_not_run_is_printed_somewhere():
    everything = [command for document in documents() for command in printed(document)]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in everything), start


def test_one_command_of_each_kind_runs_from_a_wheel(installed, tmp_path):
    data, environment = installed
    folder = shutil.copytree(data, tmp_path / "here")
    place = ["python", "-c", "import distil_rank; print(distil_rank.__file__)"]
    done = subprocess.run(place, cwd=folder, env=environment, capture_output=True, text=True)
    assert str(data.parent) in done.stdout, done.stdout + done.stderr
    every = [command for document in documents() for command in to_run(document)]
    for kind in FAST:
        command = next(c for c in every if c.startswith(f"distil-rank {kind}"))
        assert not run(command, folder, environment)


@pytest.mark.slow
@pytest.mark.parametrize("document", documents(), ids=lambda path: path.stem)
def test_every_command_of_a_document_runs_from_a_wheel(document, installed, tmp_path):
    data, environment = installed
    folder = shutil.copytree(data, tmp_path / "here")
    failed = [run(command, folder, environment) for command in to_run(document)]
    assert not any(failed), "\n".join(filter(None, failed))


MODEL = f"{ROOT}/models/nano-student"
WITHOUT = {
    "generator prepare PROTEINS --out new": "transformers",
    "generator pretrain --data d --out new": "accelerate",
    "generator train --teacher t --data d --out new": "accelerate",
    "generator finetune --model m --data d --out new": "accelerate",
    "generator evaluate --student s --teacher t --data d --out new": "transformers",
    f"generator generate --model {MODEL} --out new": "transformers",
    f"generator publish --model {MODEL} --repo a/b --out new --dry-run --evaluation"
    f" {ROOT}/results/generators/nano-student.json": "transformers",
    "compress head PROTEINS.onnx --train x --rank 2 --out new": "onnx",
    f"compress model {MODEL} --fasta PROTEINS --ratio 0.5 --out new": "transformers",
}


@pytest.mark.parametrize("command", WITHOUT)
def test_a_command_without_its_extra_ends_in_one_line(command, monkeypatch, tmp_path, capsys):
    package = WITHOUT[command]
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("p.fasta").write_text(">a\nMKTAYIAK\n>b\nGAVLIMKT\n")
    with pytest.raises(SystemExit) as stopped:
        main(command.replace("PROTEINS", "p.fasta").split())
    text = capsys.readouterr().err
    extra = "generators" if command.startswith("generator") else package
    assert stopped.value.code == 2 and text.count("\n") == 1
    assert package in text and f"distil-rank[{extra}]" in text
