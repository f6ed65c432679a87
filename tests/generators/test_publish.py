"""Publication: of the weights that were evaluated, and of nothing else."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from distil_rank.__main__ import main
from distil_rank.core.errors import InputError
from distil_rank.generators import command_evaluate, command_publish, command_train
from distil_rank.generators.models import fresh, save


@pytest.fixture(scope="module")
def place(tmp_path_factory, data, tokenizer):
    """A teacher, two students and the evaluation of the first."""
    folder = tmp_path_factory.mktemp("publish")
    save(fresh(27, 2, 2, 32, 96, 0, 1), tokenizer, folder / "teacher")
    teacher = str(folder / "teacher")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 8, "device": "cpu"}
    for name, steps in (("m", 2), ("other", 3)):
        given = {"data": data, "out": folder / name, "steps": steps}
        command_train.run(command_train.Config(teacher=teacher, **given, **shape))
    pair = {"student": str(folder / "m"), "teacher": teacher, "device": "cpu"}
    out = {"data": data, "out": folder / "m.json", "generate": 0}
    command_evaluate.run(command_evaluate.Config(**pair, **out))
    return folder


@pytest.fixture
def config(place, tmp_path):
    given = {"model": str(place / "m"), "repo": "you/tiny", "evaluation": place / "m.json"}
    return command_publish.Config(**given, out=tmp_path / "upload", dry_run=True)


def test_a_dry_run_leaves_what_would_be_uploaded(config):
    command_publish.run(config)
    names = {p.name for p in config.out.iterdir()}
    assert names == {*command_publish.FILES, "README.md", "evaluation.json"}
    text = (config.out / "README.md").read_text()
    for part in ("model-index", "license: mit", "underpowered", "some may be of training"):
        assert part in text
    with pytest.raises(InputError, match="empty or new"):
        command_publish.run(config)


def test_the_files_can_be_read_by_others_whatever_the_umask(config):
    before = os.umask(0o077)
    try:
        command_publish.run(config)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in config.out.iterdir()} == {0o644}


@pytest.mark.parametrize("given_back", ["m", "other"])
def test_what_the_hub_gives_back_must_be_what_was_sent(config, place, monkeypatch, given_back):
    import huggingface_hub

    uploaded = []

    class Hub:
        def create_repo(self, repo, exist_ok):
            pass

        def upload_folder(self, folder_path, repo_id, commit_message):
            uploaded.append((sorted(p.name for p in folder_path.iterdir()), repo_id))
            return SimpleNamespace(oid="abc")

        def snapshot_download(self, repo, revision, local_dir):
            shutil.copytree(place / given_back, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    refused = pytest.raises(InputError, match="the upload to you/tiny")
    with refused if given_back == "other" else nullcontext():
        command_publish.run(replace(config, dry_run=False))
    sent = sorted([*command_publish.FILES, "README.md", "evaluation.json"])
    assert uploaded == [(sent, "you/tiny")] and "training.json" in sent


def test_only_the_evaluated_and_recorded_weights_are_published(config, place, tmp_path):
    for change, match in (
        ({"model": str(place / "other")}, "other weights"),
        ({"repo": "tiny"}, "owner/name"),
        ({"model": str(place / "teacher")}, "lacks"),
    ):
        with pytest.raises(InputError, match=match):
            command_publish.run(replace(config, **change))
    assert not config.out.exists()


def test_a_training_record_of_other_weights_is_refused(config, place, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(place / "m", mixed)
    shutil.copy(place / "other" / "training.json", mixed / "training.json")
    with pytest.raises(InputError, match="a training record required"):
        command_publish.run(replace(config, model=str(mixed)))


@pytest.mark.parametrize("offline", ["1", "0"], ids=["offline mode", "no way to the hub"])
def test_publishing_offline_ends_in_one_line(config, capfd, monkeypatch, offline):
    import huggingface_hub

    def unreachable(*_, **__):
        raise huggingface_hub.errors.HfHubHTTPError.__bases__[0]("Connection refused")

    if offline == "1":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    given = f"--model {config.model} --repo you/tiny --evaluation {config.evaluation}"
    with pytest.raises(SystemExit) as stop:
        main(f"generator publish {given} --out {config.out}".split())
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--dry-run" in error, error
