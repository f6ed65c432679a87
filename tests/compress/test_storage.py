"""Saved and loaded again: bit-equal, without pickle; dense exports; compiled and exported."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch import nn

import distil_rank
from distil_rank.compress import storage
from distil_rank.compress.architectures import describe
from distil_rank.compress.dense_models import load_dense
from distil_rank.compress.export import save_merged, save_onnx
from distil_rank.compress.heads import compress_head
from distil_rank.compress.quantise import quantise_model
from distil_rank.core.errors import InputError
from distil_rank.core.linear import LowRankLinear
from distil_rank.core.records import ROOT
from distil_rank.proteins.esm2 import tokenise
from tests.compress.small_models import CLASSIFIERS, KINDS, compressed, output, small_model


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("kind", [*KINDS, *CLASSIFIERS])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_reloaded_models_are_bit_equal(kind, bits, tmp_path):
    model, batches, small = compressed(kind)
    if bits:
        small, _ = quantise_model(small, batches, bits)
    storage.save(small, tmp_path / "small", describe(model), certificate={"any": 1}, readme="text")
    state = torch.random.get_rng_state()
    loaded = distil_rank.load(tmp_path / "small")
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(small, loaded)
    assert torch.equal(output(small, batches[0]), output(loaded, batches[0]))
    tokenizer = () if kind.startswith("GPT2") else ("vocab.txt", "tokenizer_config.json")
    assert {f.name for f in (tmp_path / "small").iterdir()} == {
        *("model.safetensors", "compressed.json", "config.json", "certificate.json", "README.md"),
        *tokenizer,
    }
    if kind == "GPT2LMHeadModel":
        assert loaded.lm_head.weight is loaded.transformer.wte.weight  # tied as before


def read(model, batch):
    """Outputs of a model of transformers, also for the batches of an ESM2."""
    if torch.is_tensor(batch):
        batch = describe(model).batch(batch)
    return output(model, batch)


@pytest.mark.parametrize("kind", [*KINDS, *CLASSIFIERS])
def test_transformers_reads_and_writes_the_folder(kind, tmp_path):
    """AutoModel gives the model without its head, the AutoModel of its class all of it."""
    import transformers

    _, batches, small = compressed(kind)
    storage.save(small, tmp_path / "small")
    made = "EsmForMaskedLM" if kind == "esm2" else kind
    end = "ForCausalLM" if "GPT2" in kind else made.removeprefix("Esm").removeprefix("Model")
    whole = getattr(transformers, f"AutoModel{end}")
    loaded = whole.from_pretrained(tmp_path / "small", trust_remote_code=False)
    assert isinstance(loaded, getattr(transformers, made))
    expected = read(small, batches[0]) if kind != "esm2" else output(small, batches[0])
    torch.testing.assert_close(read(loaded, batches[0]), expected, rtol=1e-5, atol=1e-5)
    base = transformers.AutoModel.from_pretrained(tmp_path / "small", dtype="float64")
    hidden = describe(small).read(small, batches[0])[0]
    keep = describe(small).residues(batches[0])
    found = describe(base).read(
        base, describe(base).batch(batches[0]) if kind == "esm2" else batches[0]
    )[0]
    torch.testing.assert_close(found[keep].float(), hidden[keep], rtol=1e-4, atol=1e-5)
    for i, part in enumerate((loaded, base.float())):
        part.save_pretrained(tmp_path / f"again{i}")
        again = distil_rank.load(tmp_path / f"again{i}")
        assert type(again).__name__ == type(part).__name__ and same(again, part)
    if "GPT2" not in kind:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again0")
        assert torch.equal(tokenizer(["MKT"], return_tensors="pt")["input_ids"], tokenise(["MKT"]))
        with pytest.raises(InputError, match="LMHeadModel"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.slow  # transformers from a cold start
def test_importing_the_package_does_not_import_transformers(tmp_path):
    storage.save(small_model("esm2"), tmp_path / "small")
    code = (
        "import sys, distil_rank; assert not {'transformers', 'torch'} & set(sys.modules)\n"
        "from transformers import AutoModel\n"
        f"print(type(AutoModel.from_pretrained({str(tmp_path / 'small')!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "EsmModel", done.stderr[-2000:]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", [*KINDS, *CLASSIFIERS])
def test_dense_export_runs_without_this_package(kind, bits, tmp_path):
    import transformers

    model, batches, small = compressed(kind)
    if bits:
        small, _ = quantise_model(small, batches, bits)
    save_merged(small, describe(model), tmp_path / "merged")
    made = "EsmForMaskedLM" if kind == "esm2" else kind
    options = {"add_pooling_layer": False} if kind == "EsmModel" else {}
    plain = getattr(transformers, made).from_pretrained(tmp_path / "merged", **options).eval()
    expected = output(small, batches[0])
    torch.testing.assert_close(read(plain, batches[0]), expected, rtol=1e-5, atol=2e-5)
    again, architecture, *_ = load_dense(str(tmp_path / "merged"))
    assert (architecture.class_name == made and same(plain, again)) or kind == "EsmModel"
    if "GPT2" not in kind:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert tokenizer("MKT")["input_ids"] == tokenise(["MKT"])[0].tolist()


@pytest.mark.parametrize("kind", ["esm2", *CLASSIFIERS])
def test_models_as_onnx(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _, small = compressed(kind)
    architecture = describe(model)
    save_onnx(small, architecture, ["MKT", "MKTAYIAKQR"], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for sequences in (["GAVLMKT", "MA", "W"], ["GAVLMKTAYIAKQRGAVL"]):
        tokens = tokenise(sequences)
        named = {"input_ids": tokens.numpy(), "attention_mask": (tokens != 1).long().numpy()}
        with torch.no_grad():
            expected = architecture.read(small, architecture.batch(tokens))
        keep = tokens != 1
        for found, y in zip(session.run(["hidden", "logits"], named), expected):
            pair = [t[keep] if t.ndim == 3 else t for t in (torch.from_numpy(found), y)]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


HEAD = nn.Sequential(
    nn.Linear(40, 48),
    nn.GELU(),
    nn.LayerNorm(48),
    nn.Dropout(0.3),
    nn.Linear(48, 40),
    nn.Tanh(),
    nn.Linear(40, 3),
)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("module", [HEAD, nn.Linear(40, 40, bias=False)])
def test_reloaded_heads_are_bit_equal(module, int8, tmp_path):
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    small, certificate = compress_head(module.eval(), x, rank=8, int8=int8)
    storage.save(small, tmp_path / "head", certificate=asdict(certificate))
    loaded = distil_rank.load(tmp_path / "head")
    assert same(small, loaded) and torch.equal(small(x), loaded(x))


def test_an_unknown_class_needs_an_instance(tmp_path):
    class Mine(nn.Linear):
        pass

    storage.save(nn.ModuleDict({"a": Mine(4, 4)}), tmp_path)
    with pytest.raises(InputError, match="model="):
        distil_rank.load(tmp_path)
    factors = LowRankLinear(torch.ones(1, 4), torch.ones(4, 1))
    storage.save(nn.ModuleDict({"a": nn.ModuleDict({"b": factors})}), tmp_path)
    with pytest.raises(InputError, match="has no attribute"):
        distil_rank.load(tmp_path, model=nn.ModuleDict({"c": nn.Linear(4, 4)}))


def test_what_a_module_is_made_from_is_not_replaced(tmp_path):
    for name in ("model.safetensors", "head.safetensors"):
        (tmp_path / name).write_text("")
    storage.require_other_folder(tmp_path, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="another folder"):
        storage.require_other_folder(tmp_path, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="another folder"):
        storage.require_other_folder(tmp_path / ".." / tmp_path.name, tmp_path / "head.safetensors")
    storage.require_other_folder(tmp_path / "small", tmp_path / "model.safetensors")


def test_damaged_folders_are_refused(tmp_path):
    model, _, small = compressed("esm2")
    folder = tmp_path / "small"
    with pytest.raises(InputError, match="compressed"):
        distil_rank.load(folder)
    storage.save(small, folder, describe(model))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="readable"):
        distil_rank.load(folder)
    (folder / "model.safetensors").write_bytes(whole)
    description = json.loads((folder / "compressed.json").read_text())
    description["factors"]["layers.0.fc1"]["d_out"] += 1
    description["factors"].pop("layers.0.fc2")
    (folder / "compressed.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="weights of this"):
        distil_rank.load(folder)
    description["factors"]["layers.0.fc1"]["type"] = "int8"  # of an earlier version
    (folder / "compressed.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="low-rank, linear, pruned required, got int8"):
        distil_rank.load(folder)


def test_nothing_of_an_earlier_module_stays(tmp_path):
    model, _, small = compressed("EsmForMaskedLM")
    storage.save(small, tmp_path, describe(model), certificate={"any": 1}, readme="text")
    save_merged(small, describe(model), tmp_path / "merged")
    for name in ("model.onnx", "report.json", "report.png", "notes.txt"):
        (tmp_path / name).write_text("of the earlier module")
    storage.save(nn.Linear(4, 4), tmp_path)
    left = {"model.safetensors", "compressed.json", "notes.txt"}
    assert {f.name for f in tmp_path.iterdir()} == left
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("of a folder that holds no module")
    storage.save(nn.Linear(4, 4), tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").is_file()
    with pytest.raises(InputError, match="writable"):
        storage.save(nn.Linear(4, 4), tmp_path / "notes.txt" / "small")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models_agree(kind):
    _, batches, small = compressed(kind)
    expected = output(small, batches[0])
    compiled = copy.deepcopy(small)
    compiled.compile()
    torch.testing.assert_close(output(compiled, batches[0]), expected, rtol=1e-5, atol=1e-5)
