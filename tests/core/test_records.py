import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.core.records import (
    ROOT,
    atomic,
    config_record,
    environment,
    load_tensors,
    read_json,
    require_writable,
    save_tensors,
    write_json,
)


def test_a_record_comes_back_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / "r.json", {"schema": "a/1", "x": 0.1})
    assert read_json(tmp_path / "r.json", "a/1")["x"] == 0.1
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, object()])
def test_a_record_that_cannot_be_written_leaves_the_previous_one_whole(tmp_path, bad):
    write_json(tmp_path / "r.json", {"schema": "a/1"})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "r.json", {"schema": "a/1", "x": bad})
    assert json.loads((tmp_path / "r.json").read_text()) == {"schema": "a/1"}
    assert os.listdir(tmp_path) == ["r.json"]


def test_another_schema_or_no_json_is_refused(tmp_path):
    write_json(tmp_path / "r.json", {"schema": "a/1"})
    (tmp_path / "t.json").write_text("[1]")
    for name, schema in (("r.json", "a/2"), ("none.json", "a/1"), ("t.json", "a/1")):
        with pytest.raises(InputError, match="required, got"):
            read_json(tmp_path / name, schema)


def test_the_passport_names_code_and_machine_but_no_place(tmp_path):
    passport = environment()
    assert set(passport) == {"commit", "dirty", "python", "torch", "threads", "cpu", "device"}
    text = json.dumps(passport)
    assert os.uname().nodename not in text and str(ROOT) not in text

    @dataclass
    class Config:
        inside: Path = ROOT / "results" / "x.json"
        outside: Path = tmp_path / "a" / "b.pt"
        named: str = str(tmp_path / "a" / "model")  # a folder or a name of the hub
        many: tuple[int, ...] = (1, 2)

    record = config_record(Config())
    assert record == {
        "inside": "results/x.json",
        "outside": "a/b.pt",
        "named": "a/model",
        "many": [1, 2],
    }


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    assert require_writable(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="writable output folder"):
        require_writable(tmp_path / "file" / "out")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("inner", ["", "a"])
def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path, inner):
    def fill(place, text):
        if inner:
            place.mkdir()
        (place / inner).write_text(text)

    path = tmp_path / "made"
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        fill(temporary, "half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with atomic(path) as temporary:
        fill(temporary, "whole")
        assert not path.exists()
    assert (path / inner).read_text() == "whole" and os.listdir(tmp_path) == ["made"]
    assert inner or path.stat().st_mode & 0o777 == 0o644


def test_equal_tensors_and_metadata_are_equal_files(tmp_path):
    files = [tmp_path / str(i) for i in range(8)]
    for file in files:
        save_tensors(file, {"é": torch.ones(3)}, "a/1", rows="ä\n", sizes=["a"], more=None)
    assert len({file.read_bytes() for file in files}) == 1
    assert load_tensors(files[0], "a/1", "things")[1] == {
        "rows": "ä\n",
        "sizes": ["a"],
        "more": None,
    }


def test_tensors_come_back_with_their_header(tmp_path):
    x = torch.arange(6).reshape(2, 3).T  # not contiguous
    save_tensors(tmp_path / "x.safetensors", {"x": x}, "a/1", rows=[1, 2])
    tensors, header = load_tensors(tmp_path / "x.safetensors", "a/1", "things")
    assert torch.equal(tensors["x"], x) and header == {"rows": [1, 2]}
    with pytest.raises(InputError, match="a file of things required"):
        load_tensors(tmp_path / "x.safetensors", "a/2", "things")
