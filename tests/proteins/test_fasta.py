import gzip
import io
import os
import threading
from codecs import BOM_UTF8

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distil_rank.core.errors import InputError
from distil_rank.proteins.fasta import (
    ALPHABET,
    Protein,
    clean_proteins,
    clean_sequence,
    read_fasta,
    write_fasta,
)

ODD = [
    Protein("a", "a b  c", "ACDEF"),
    Protein("a", "a", "AC"),
    Protein("", "", "ACD"),
    Protein("../../etc/x", "../../etc/x y", "WY"),
    Protein("é", "é ü", "ACDEFGHIKLMNPQRSTVWY" * 20),
    Protein("", "  two spaces", "AA"),
    Protein("empty", "empty", ""),
    Protein("last", "last", "acd*"),
]


@pytest.mark.parametrize("name", ["odd.fasta", "odd.fasta.gz", "no_suffix"])
def test_written_records_are_read_back_in_order_and_nothing_else_appears(tmp_path, name):
    write_fasta(tmp_path / name, ODD)
    assert list(read_fasta(tmp_path / name)) == ODD
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_gzip_is_recognised_by_content_and_written_without_a_time_stamp(tmp_path):
    (tmp_path / "a.fasta").write_bytes(
        gzip.compress(b">a\nAC\n", mtime=0) + gzip.compress(b">b\nDE\n")
    )
    assert [p.sequence for p in read_fasta(tmp_path / "a.fasta")] == ["AC", "DE"]
    for name in ("x.gz", "y.gz"):
        write_fasta(tmp_path / name, ODD)
    assert (tmp_path / "x.gz").read_bytes() == (tmp_path / "y.gz").read_bytes()


AB = [Protein("a", "a b\tc", "ACDE"), Protein("b", "b", "WY")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "old mac"])
@pytest.mark.parametrize("mark", [b"", BOM_UTF8], ids=["", "byte order mark"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_line_ends_and_byte_order_mark(tmp_path, end, mark, pack):
    content = mark + b"\n>a b\tc\nAC\nDE\n>b\nWY".replace(b"\n", end)
    (tmp_path / "a.fasta").write_bytes(pack(content))
    assert list(read_fasta(tmp_path / "a.fasta")) == AB


def test_a_pipe_and_standard_input_are_read_as_often_as_asked(tmp_path, monkeypatch):
    content = b">a b\tc\nAC\nDE\n>b\nWY\n"
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(
        target=(tmp_path / "pipe").write_bytes, args=(gzip.compress(content),)
    )
    writer.start()
    assert [list(read_fasta(tmp_path / "pipe")) for _ in range(2)] == [AB, AB]
    writer.join()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [list(read_fasta("-")) for _ in range(2)] == [AB, AB]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "nothing there"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"ACDEF\n", "does not begin with '>'"),
        (b"@a\nACD\n+\nIII\n", "does not begin with '>'"),
        (b"  >a\nACD\n", "does not begin with '>'"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "UTF-8"),
        (">é\nACD\n".encode("latin-1"), "UTF-8"),
        ("folder", "a folder"),
        (b">a\nAC\0DE\n", "binary"),
        (gzip.compress(b">a\n" + bytes(range(65, 91)) * 999)[:-20], "whole and readable"),
        (gzip.compress(b">a\nACD\n", mtime=0)[:-8] + bytes(8), "whole and readable"),
    ],
)
def test_what_is_no_fasta_is_refused(tmp_path, content, says):
    if content == "folder":
        (tmp_path / "a.fasta").mkdir()
    elif content is not None:
        (tmp_path / "a.fasta").write_bytes(content)
    with pytest.raises(InputError, match=says):
        list(read_fasta(tmp_path / "a.fasta"))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("acdX", "ACDX"),
        ("XUZOB", "XUZOB"),
        ("A C\nD\t", "ACD"),
        ("ACD*", "ACD"),
        ("AC*D**", "ACXDX"),
        ("A-C.D", "ACD"),
        ("AJj", "AXX"),
    ],
)
def test_documented_letters(raw, clean):
    assert clean_sequence(raw) == clean


@pytest.mark.parametrize("raw", ["", "-*", " \n"])
def test_a_sequence_without_residues_is_an_error(raw):
    with pytest.raises(InputError, match="at least one residue"):
        clean_sequence(raw)


@given(st.text())
def test_cleaning_ends_in_the_alphabet_or_in_an_error(raw):
    try:
        clean = clean_sequence(raw)
    except InputError:
        return
    assert set(clean) <= set(ALPHABET)
    assert clean_sequence(clean) == clean


def test_every_kept_letter_has_its_own_token():
    import esm

    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    tokens = alphabet.encode(ALPHABET)
    assert len(set(tokens)) == len(ALPHABET) == len(tokens)
    assert alphabet.unk_idx not in tokens


def test_changes_are_counted_and_named():
    said: list[str] = []
    proteins = [
        Protein("p", "p", "A-C.D"),
        Protein("q", "q", "AJ"),
        Protein("r", "r", "A-"),
        Protein("s", "s", "acd*"),
    ]
    assert [p.sequence for p in clean_proteins(proteins, said.append)] == ["ACD", "AX", "A", "ACD"]
    assert said == [
        "gaps removed: 3 in 2 proteins: p, r",
        "J or inner * read as X: 1 in 1 protein: q",
    ]


@pytest.mark.parametrize(
    ("sequences", "says"),
    [
        (["ACD", "", "-"], r"none in 2 proteins: p1, \(record 3, no id\)"),
        (["A1C", "ACD", "Aé"], r"2 proteins: p0 \(1\), \(record 3, no id\) \(É\)"),
    ],
)
def test_empty_and_meaningless_sequences_are_named(sequences, says):
    proteins = [Protein(f"p{i}" if i < 2 else "", "", s) for i, s in enumerate(sequences)]
    with pytest.raises(InputError, match=says):
        list(clean_proteins(proteins, print))


def test_listing_is_short_however_many_fail():
    with pytest.raises(InputError, match=r"1000 proteins: a, a, a, a, a, and 995 more") as error:
        list(clean_proteins([Protein("a", "a", "")] * 1000, print))
    assert len(str(error.value)) < 200
