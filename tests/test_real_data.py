"""Public data arrive whole, as they were measured on, and once."""

import gzip
import io
import json
import zipfile
from email.message import Message
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import real_data, repack
from benchmarks.real_data import Set, content, known, main, sha256
from distil_rank.core.errors import InputError
from distil_rank.core.records import ROOT
from distil_rank.proteins.fasta import read_fasta

SETS = {s.path: s for s in known()}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """One set of two sources on the local disk; its folder, the set, and its sources."""
    sources = tmp_path / "a.fa", tmp_path / "b.fa.gz"
    sources[0].write_text(">a\nMKT\n>b\nGAV\n")
    with gzip.open(sources[1], "wt") as file:
        file.write(">c\nMKT\n>d\nWWY\n")
    wanted = tmp_path / "wanted.fasta.gz"
    repack.write_gzip(wanted, ">a\nMKT\n>b\nGAV\n>d\nWWY\n")
    addresses = tuple(path.as_uri() for path in sources)
    s = Set("x/y.fasta.gz", content(wanted), "fasta_of_fastas", addresses, "a/b", "MIT", "c")
    monkeypatch.setattr(real_data, "known", lambda: [s])
    return tmp_path / "data", s, sources


def no_network(*arguments, **options):
    raise URLError("no network")


def test_the_list_names_a_license_and_a_digest_of_every_set_without_network(monkeypatch, capsys):
    monkeypatch.setattr(real_data, "urlopen", no_network)
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for s in SETS.values():
        assert s.license and s.path in text and s.sha256 in text
        assert callable(getattr(repack, s.made)) and len(s.sha256) == 64
        assert all(address.startswith("https://") for address in s.addresses)


def test_digests_are_those_that_committed_results_record():
    heads = json.loads((ROOT / "benchmarks/results/heads.json").read_text())["data"]
    recorded = {found["file"]: found["sha256"] for found in heads.values()}
    for name in ("esm2_8m_peptides", "esm2_8m_gb1"):
        summary = json.loads((ROOT / f"results/{name}/distil_rank_summary.json").read_text())
        recorded |= dict(zip(summary["data"]["files"], summary["data"]["sha256"].values()))
    deeploc = json.loads((ROOT / "benchmarks/results/nano_deeploc.json").read_text())["data"]
    recorded |= {f"proteins/{name}": digest for name, digest in deeploc["sha256"].items()}
    compressed = {"esm2_8m_viral/viral_555.npz", "esm2_650m/activation_domains_148.npz"}
    assert recorded.keys() <= SETS.keys()
    for path in recorded.keys() - compressed:
        assert SETS[path].sha256 == recorded[path], path


@pytest.mark.parametrize("path", SETS)
def test_digests_are_those_of_the_data_measured(path, shared_data):
    assert content(shared_data / path) == SETS[path].sha256


def test_a_set_is_made_once_and_then_kept(mirror, monkeypatch, capsys):
    folder, s, _ = mirror
    assert main([str(folder)]) == 0
    assert "made: x/y.fasta.gz (MIT, a/b)" in capsys.readouterr().out
    assert content(folder / s.path) == s.sha256 and not (folder / ".downloads").exists()
    monkeypatch.setattr(real_data, "urlopen", no_network)
    assert main([str(folder), "x"]) == 0
    assert "kept" in capsys.readouterr().out
    (folder / s.path).write_bytes(b"damaged")
    assert main([str(folder)]) == 1
    monkeypatch.undo()
    monkeypatch.setattr(real_data, "known", lambda: [s])
    assert main([str(folder)]) == 0 and content(folder / s.path) == s.sha256


def test_other_content_than_was_measured_is_not_put_in_place(mirror, capsys):
    folder, s, sources = mirror
    sources[0].write_text(">a\nMKV\n")
    assert main([str(folder)]) == 1
    assert "run it again" in capsys.readouterr().err and not (folder / s.path).exists()
    sources[0].write_text(">a\nMKT\n>b\nGAV\n")
    assert main([str(folder)]) == 0


def test_a_cut_download_is_refused_kept_and_goes_on(mirror, monkeypatch, capsys):
    folder, s, sources = mirror
    asked = []

    def answer(request, timeout):
        path = next(path for path in sources if path.as_uri() == request.full_url)
        start = int(request.get_header("Range", "bytes=0-")[6:-1])
        asked.append((path.name, start))
        sent = io.BytesIO(path.read_bytes()[start : None if start else 6])
        sent.status, sent.headers = (206 if start else 200), Message()
        sent.headers["Content-Length"] = str(path.stat().st_size - start)
        return sent

    monkeypatch.setattr(real_data, "urlopen", answer)
    for missing in ("6 of 14 bytes", "6 of"):
        assert main([str(folder)]) == 1
        assert missing in capsys.readouterr().err and not (folder / s.path).exists()
    assert main([str(folder)]) == 0 and content(folder / s.path) == s.sha256
    assert asked == [("a.fa", 0), ("a.fa", 6), ("b.fa.gz", 0), ("b.fa.gz", 6)]


def test_a_pickle_may_hold_arrays_and_call_nothing(tmp_path):
    class Calls:
        def __reduce__(self):
            return (print, ("called",))

    rows = [{"Variant_ID": f"p{i}", "pooled_embedding": np.full(3, i, "f4")} for i in range(2)]
    np.save(tmp_path / "good.npy", rows)
    np.save(tmp_path / "bad.npy", [*rows, Calls()])
    repack.means([tmp_path / "good.npy"], tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["X"].tolist() == [[0, 0, 0], [1, 1, 1]]
    with pytest.raises(InputError, match=r"calls builtins\.print"):
        repack.means([tmp_path / "bad.npy"], tmp_path / "y.npz")


def upstream(kind: str, ours: Path, folder: Path) -> list[Path]:
    """Files as the repository has them, made back from ours."""
    a, b = folder / "a", folder / "b"
    if kind == "peptides":
        every = [torch.load(ours.with_name(f"embeddings_{part}.pt")) for part in ("val", "train")]
        lines = (",".join(map(repr, [0, *row])) for row in torch.cat(every).tolist())
        a.write_text("\n".join([",0,1", *lines]))
        return [a]
    if kind == "tensors":
        torch.save({k: t[0] if "num_b" in k else t for k, t in load_file(ours).items()}, a)
        return [a]
    if kind == "means":
        held = np.load(ours)
        rows = [{"Variant_ID": i, "pooled_embedding": x} for i, x in zip(held["ids"], held["X"])]
        np.save(folder / "a.npy", rows)
        return [folder / "a.npy"]
    if kind == "table":
        pandas, held = pytest.importorskip("pandas"), np.load(ours)
        frame = pandas.DataFrame(held["X"])
        frame["sequence"] = pandas.Series(held["seq"].tolist(), dtype=object)
        frame["label"] = held["y"].astype("f8")
        frame.to_pickle(a)
        return [a]
    text = gzip.decompress(ours.read_bytes()).decode()
    if kind == "families":
        a.write_text(text.replace("sequence\tfamily", "sequence,labels").replace("\t", ","))
        return [a]
    if kind == "member":
        with zipfile.ZipFile(a, "w") as archive:
            archive.writestr(f"splits/{ours.name[:-3].rpartition('_')[2]}", text)
        return [a]
    form = "{}\t{}\n" if kind == "fasta_of_tables" else ">{}\n{}\n"
    lines = [form.format(p.id, p.sequence) for p in read_fasta(ours)]
    a.write_text("".join(lines[:2000]))
    b.write_text("".join(lines[1900:]))  # some twice
    return [a, b]


MADE = [path for path, s in SETS.items() if s.made not in ("copy", "genomes")]


@pytest.mark.parametrize("path", MADE)
def test_what_the_repositories_hold_becomes_what_was_measured(path, shared_data, tmp_path):
    sources = upstream(SETS[path].made, shared_data / path, tmp_path)
    made = tmp_path / "made" / Path(path).name
    made.parent.mkdir()
    getattr(repack, SETS[path].made)(sources, made)
    assert content(made) == SETS[path].sha256


def test_a_file_is_its_bytes_and_a_compressed_one_what_it_unpacks_to(tmp_path):
    a, b = tmp_path / "a.gz", tmp_path / "b.gz"
    a.write_bytes(gzip.compress(b"MKT" * 99, 1, mtime=1))
    b.write_bytes(gzip.compress(b"MKT" * 99, 9, mtime=2))
    assert content(a) == content(b) and sha256(a) != sha256(b)
    torch.save(torch.ones(2), tmp_path / "x.pt")
    assert content(tmp_path / "x.pt") == sha256(tmp_path / "x.pt")
