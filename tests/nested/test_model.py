"""A chain and its models in one module, from a folder, a file or a hub that is not there."""

import json
import shutil

import pytest
import torch

from distil_rank.core.errors import InputError
from distil_rank.nested import command_embed
from distil_rank.nested.chain import FILE, NestedChain
from distil_rank.nested.model import NestedESM
from distil_rank.proteins.esm2 import tokenise
from distil_rank.proteins.store import EmbeddingStore
from tests.nested.data import proteins


@pytest.fixture(scope="module")
def model(folder):
    return NestedESM.from_pretrained(folder / "chain")


def test_all_levels_in_one_call_and_each_model_once(model):
    sequences = [protein.sequence for protein in proteins(3)]
    calls = [module.register_forward_hook(lambda *_: ran.append(1)) for module in model.models]
    ran: list[int] = []
    levels = model(tokenise(sequences))
    assert len(ran) == len(calls) == 3
    for call in calls:
        call.remove()
    assert {size: x.shape[-1] for size, x in levels.items()} == {"a": 16, "b": 24, "c": 32}
    small = model.models[0](tokenise(sequences)).hidden[0]
    for row, sequence in enumerate(sequences):
        end = len(sequence) + 1
        assert torch.equal(levels["a"][row, 1:end], small[row, 1:end])
        assert not levels["c"][row, 0].any() and not levels["c"][row, end:].any()
    assert torch.equal(levels["c"][..., :24], levels["b"])


def test_encode_is_the_commands_embedding_and_runs_what_it_needs(model, folder, tmp_path):
    command_embed.run(
        command_embed.Config(folder / "proteins.fasta", folder / "chain", tmp_path / "store")
    )
    store = EmbeddingStore(tmp_path / "store")[:]
    sequences = [protein.sequence for protein in proteins()]
    torch.testing.assert_close(model.encode(sequences), store, rtol=1e-4, atol=1e-5)
    last = model.models[2].register_forward_hook(lambda *_: pytest.fail("not needed"))
    short = model.encode(sequences, truncate_dim=24, normalize=True)
    last.remove()
    expected = torch.nn.functional.normalize(store[:, :24], dim=1)
    torch.testing.assert_close(short, expected, rtol=1e-4, atol=1e-5)


def test_hub_there_and_back_without_one(folder, tmp_path, monkeypatch):
    import huggingface_hub

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            assert repo == "you/chain" and private and exist_ok

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://huggingface.co/{repo_id}"

    def get(repo, file, revision=None):
        if repo != "you/chain":
            raise OSError("404 not found\nand more")
        return str(tmp_path / repo / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    chain = NestedChain.load(folder / "chain")
    assert chain.push_to_hub("you/chain", private=True).endswith("you/chain")
    assert {p.name for p in (tmp_path / "you/chain").iterdir()} == {
        FILE,
        "README.md",
        "config.json",
    }
    card = (tmp_path / "you/chain" / "README.md").read_text()
    uploaded = (tmp_path / "you/chain" / "config.json").read_text()
    assert str(folder) not in uploaded and str(folder) in json.dumps(chain.config())
    assert "| c" in card and card.startswith("---\n") and "truncate_dim=16" in card
    assert huggingface_hub.ModelCard(card).data.library_name == "distil-rank"
    for name in ("you/chain", folder / "chain", folder / "chain" / FILE):
        again = NestedChain.from_pretrained(name)
        assert again.dims == chain.dims and again.kind == chain.kind
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(again.stages, chain.stages))
    with pytest.raises(InputError, match=r"nobody/none as a local chain .* got: 404 not found;"):
        NestedChain.from_pretrained("nobody/none")
    with pytest.raises(InputError, match="like owner/name"):
        chain.push_to_hub("chain")


def test_bad_models(model, folder, tmp_path):
    chain = model.chain
    few = dict(zip(chain.sizes[:2], model.models))
    with pytest.raises(InputError, match=r"models of .* required, got a"):
        NestedESM(chain, few)
    with pytest.raises(InputError, match="got none for c"):
        NestedESM.from_pretrained(folder / "chain", [str(folder / f"{n}.pt") for n in "ab"])
    with pytest.raises(InputError, match="between 16 and 32"):
        model.encode(["ACD"], truncate_dim=8)
    with pytest.raises(InputError, match="a list of sequences"):
        model.encode("ACD")  # not three proteins of one letter
    assert model.encode([], truncate_dim=24).shape == (0, 24)
