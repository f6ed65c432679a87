import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from distil_rank.core.errors import InputError
from distil_rank.core.records import ROOT, config_record, environment, read_json, require_writable, sha256, write_json


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
    assert record == {"inside": "results/x.json", "outside": "a/b.pt", "named": "a/model", "many": [1, 2]}


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    assert require_writable(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="writable output folder"):
        require_writable(tmp_path / "file" / "out")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
