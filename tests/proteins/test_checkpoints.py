import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distil_rank.core.errors import InputError
from distil_rank.core.records import ROOT, sha256
from distil_rank.proteins import checkpoints
from distil_rank.proteins.checkpoints import FAMILIES, load_model
from distil_rank.proteins.esm2 import PAD, tokenise
from tests.compress.small_models import small_model
from tests.proteins import reference
from tests.proteins.test_esm2 import distance

PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "GAVLKK", "XBUZO"]


def embedded(model):
    return model(tokenise(PROTEINS)).hidden[0]


def test_the_table_names_the_esm2_models_of_fair_esm():
    import esm

    theirs = {name for name in dir(esm.pretrained) if name.startswith("esm2_")}
    assert set(FAMILIES["esm2"].values()) == theirs
    assert all(f"_{size}_" in name for size, name in FAMILIES["esm2"].items())


def test_fair_esm_checkpoint_gives_what_fair_esm_reads_from_it(checkpoint):
    import esm

    data = reference.read_fair_esm(checkpoint)
    with warnings.catch_warnings(action="ignore"):
        theirs, _ = esm.pretrained.load_model_and_alphabet_core("esm2_tiny", data)
    loaded = load_model(str(checkpoint), head=True)
    assert (loaded.name, loaded.sha256) == ("tiny", sha256(checkpoint))
    assert loaded.model.lm_head.weight is loaded.model.embed_tokens.weight
    for key, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key])


def test_a_name_of_fair_esm_is_downloaded_once(checkpoint, tmp_path, monkeypatch):
    fetched = []

    def download(url, path):
        fetched.append(url)
        shutil.copy(checkpoint, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert load_model("esm2_t6_8M_UR50D").name == "esm2_t6_8M_UR50D"
    assert fetched == ["https://dl.fbaipublicfiles.com/fair-esm/models/esm2_t6_8M_UR50D.pt"]
    assert (tmp_path / "hub/checkpoints/esm2_t6_8M_UR50D.pt").is_file()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Path:
    """A small random transformers.EsmForMaskedLM, saved as transformers saves it."""
    model, draw = small_model("EsmForMaskedLM", 48, 3), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    folder = tmp_path_factory.mktemp("hf") / "esm2_tiny"
    model.save_pretrained(folder)
    return folder


def test_hugging_face_folder_gives_what_transformers_computes(hugging_face):
    import transformers

    theirs = transformers.EsmForMaskedLM.from_pretrained(hugging_face).eval()
    loaded, tokens = load_model(str(hugging_face), head=True), tokenise(PROTEINS)
    real = tokens != PAD
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real, output_hidden_states=True)
        (hidden,), logits = loaded.model(tokens)
    assert distance(hidden[real], expected.hidden_states[-1][real]) < 1e-5
    assert distance(logits[real], expected.logits[real]) < 1e-5
    assert (loaded.name, loaded.sha256) == ("esm2_tiny", sha256(hugging_face / "model.safetensors"))


def test_hugging_face_shards_and_base_model_give_the_same(hugging_face, tmp_path):
    import transformers

    whole = transformers.EsmForMaskedLM.from_pretrained(hugging_face)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    whole.esm.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    expected = embedded(load_model(str(hugging_face)).model)
    as_pickle(hugging_face, tmp_path / "pickled")
    for name in ("sharded", "base", "pickled"):
        assert torch.equal(embedded(load_model(str(tmp_path / name)).model), expected)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_hub_name_is_fetched_pickles_only_where_there_is_nothing_else(
    hugging_face, tmp_path, monkeypatch, pickled
):
    import huggingface_hub

    folder, asked = hugging_face, []
    if pickled:
        folder = tmp_path / "esm2_tiny"
        as_pickle(hugging_face, folder)

    def snapshot(name, allow_patterns):
        asked.append(" ".join(allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = load_model("facebook/esm2_tiny")
    assert loaded.name == "esm2_tiny" and ".bin" not in asked[0] and len(asked) == 1 + pickled
    assert torch.equal(embedded(loaded.model), embedded(load_model(str(hugging_face)).model))


def as_pickle(source, folder):
    """The same model with pytorch_model.bin."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "someone/esm2"])
def test_no_network_is_one_sentence(name, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=rf"{name}.*no route"):
        load_model(name)


def test_loading_a_model_does_not_import_the_compiler():
    code = "import sys; from distil_rank import load_model; load_model('nano-64'); "
    code += "print([m for m in ('sympy', 'torch._dynamo', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["alone", "in a checkpoint", "plain pickle", "folder"])
def test_a_pickle_is_never_executed(hugging_face, tmp_path, place):
    path, trap = tmp_path / "model.pt", tmp_path / "executed"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    elif place == "folder":
        path = tmp_path / "folder"
        as_pickle(hugging_face, path)
        torch.save({"x": Malicious(trap)}, path / "pytorch_model.bin")
    else:
        inside = {"cfg": {"model": Malicious(trap)}, "model": {}}
        torch.save(Malicious(trap) if place == "alone" else inside, path)
    with pytest.raises(InputError):
        load_model(str(path))
    assert not trap.exists()


def test_damaged_checkpoints_are_one_sentence(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a model\n" * 99):
        (tmp_path / "damaged.pt").write_bytes(content)
        with pytest.raises(InputError):
            load_model(str(tmp_path / "damaged.pt"))
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="fair-esm ESM-2 checkpoint"):
        load_model(str(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "an ESM-2 model required, with model_type 'esm', got 'bert'"),
        ({"rope_theta": 500.0}, "rope_theta"),
        ({"pad_token_id": None}, "pad_token_id 1"),
        ({"intermediate_size": 100}, "intermediate_size 192 required"),
        ({"num_hidden_layers": 2}, r"2 layers required, all and no others, got also layers\.2\."),
        ({"num_hidden_layers": 4}, r"4 layers required, all and no others, got no layers\.3\."),
        ({"hidden_size": "48"}, "whole numbers required for hidden_size"),
        ({"attention_window": 7}, "settings of ESM-2 required .* got attention_window"),
    ],
    ids=str,
)
def test_settings_of_other_models_are_refused(hugging_face, tmp_path, change, message):
    shutil.copytree(hugging_face, tmp_path / "model")
    config = json.loads((hugging_face / "config.json").read_text()) | change
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.fc1.weight": None}, r"got no layers\.1\.fc1\.weight in"),
        ({"layers.1.self_attn.gate": torch.ones(4)}, r"got also layers\.1\.self_attn\.gate in"),
        ({"emb_layer_norm_before.weight": torch.ones(48)}, "also emb_layer_norm_before"),
        ({"layers.1.fc1.bias": torch.ones(7)}, r"mismatch for layers\.1\.fc1\.bias.*\[7\]"),
        ({"encoder.layers.0.fc1.bias": torch.ones(192)}, "two different"),
    ],
    ids=["missing", "surplus", "ESM-1b", "shape", "twice"],
)
def test_every_parameter_is_read_once(checkpoint, tmp_path, change, message, head):
    data = reference.read_fair_esm(checkpoint)
    for key, tensor in change.items():
        key = key if key.startswith("encoder") else f"encoder.sentence_encoder.{key}"
        data["model"].pop(key, None)
        if tensor is not None:
            data["model"][key] = tensor
    torch.save(data, tmp_path / "changed.pt")
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "changed.pt"), head=head)


def test_a_head_is_required_where_it_is_asked_for(hugging_face, checkpoint, tmp_path):
    import transformers

    transformers.EsmModel.from_pretrained(hugging_face).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"3 layers and a head required.*no lm_head\.bias"):
        load_model(str(tmp_path / "base"), head=True)
    data = reference.read_fair_esm(checkpoint)
    data["model"]["encoder.lm_head.weight"] = torch.zeros(33, 48)
    torch.save(data, tmp_path / "untied.pt")
    with pytest.raises(InputError, match="a head with the embedding's weights required"):
        load_model(str(tmp_path / "untied.pt"), head=True)
    load_model(str(tmp_path / "untied.pt"))


def test_missing_models_are_one_sentence(tmp_path, hugging_face, monkeypatch):
    for name in ("esm2_t6_9M_UR50D", "esm1b_t33_650M_UR50S", "models/nothing.pt", "/no/folder", ""):
        with pytest.raises(InputError, match=r"a model name .* required"):
            load_model(name)
    with pytest.raises(InputError, match=r"config\.json required"):
        load_model(str(tmp_path))
    monkeypatch.setattr(checkpoints, "MODELS", tmp_path)
    with pytest.raises(InputError, match="a checkpoint required at"):
        load_model("nano-64")
