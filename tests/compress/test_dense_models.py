"""Dense models are read whole, as what they are, or refused in one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from distil_rank.compress.architectures import Architecture
from distil_rank.compress.dense_models import load_dense
from distil_rank.core.errors import InputError
from distil_rank.proteins.checkpoints import save_model
from tests.compress.small_models import CLASSIFIERS, KINDS, output, small_model, token_batches


@pytest.mark.parametrize("kind", [*KINDS[1:], *CLASSIFIERS])
def test_folders_are_loaded_whole(kind, tmp_path):
    model = small_model(kind)
    model.save_pretrained(tmp_path / "model")
    loaded, architecture, *_ = load_dense(str(tmp_path / "model"))
    assert architecture.class_name == kind
    assert loaded.state_dict().keys() == model.state_dict().keys()
    batch = token_batches(model)[0]
    assert torch.equal(output(model, batch), output(loaded, batch))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("EsmForMaskedLM", "esm.encoder.layer.0.attention.self.query.weight"),
        ("EsmModel", "encoder.layer.1.output.dense.bias"),
        ("GPT2LMHeadModel", "transformer.h.0.attn.c_attn.weight"),
        ("EsmForSequenceClassification", "classifier.out_proj.weight"),
        ("EsmForTokenClassification", "classifier.bias"),
    ],
)
def test_a_folder_with_other_weights_is_refused(kind, name, tmp_path):
    small_model(kind).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    less = {key: value for key, value in whole.items() if key != name}
    others = (less, name), (whole | {"extra.weight": torch.ones(2)}, "extra.weight")
    for tensors, culprit in (*others, (whole | {name: torch.ones(2, 3)}, name)):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"all and no others.*{culprit}"):
            load_dense(str(tmp_path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="readable model"):
        load_dense(str(tmp_path))


def test_other_classes_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertForQuestionAnswering"]}')
    with pytest.raises(InputError, match="got BertForQuestionAnswering"):
        load_dense(str(tmp_path))


def test_fair_esm_checkpoints(tmp_path):
    model = small_model("esm2")
    save_model(model, tmp_path / "nano.pt")
    loaded, *_ = load_dense(str(tmp_path / "nano.pt"))
    batch = token_batches(model)[0]
    expected = output(model, batch)
    torch.testing.assert_close(output(loaded, batch), expected, rtol=1e-2, atol=1e-2)  # float16
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="fair-esm"):
        load_dense(str(tmp_path / "other.pt"))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"])
def test_every_gpt2_reads_proteins_as_protgpt2_was_trained(name):
    class Tokenizer:
        eos_token, eos_token_id, unk_token_id, pad_token_id = "$", 36, 36, None

        def __call__(self, texts, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    config = {"model_type": "gpt2", "n_positions": 100}
    batch = Architecture("transformers", name, config, tokenizer=Tokenizer()).tokenise(["M" * 61])
    lines = "$\n" + "M" * 60 + "\nM\n$"
    assert "".join(map(chr, batch["input_ids"][0].tolist())) == lines
