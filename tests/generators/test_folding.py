"""pLDDT of what a generator writes: on a small random ESMFold, whole or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from distil_rank.core.errors import InputError
from distil_rank.generators.folding import confidence, load_esmfold, plddt

TRUNK = {
    "num_blocks": 1,
    "sequence_state_dim": 32,
    "sequence_head_width": 16,
    "pairwise_state_dim": 8,
    "pairwise_head_width": 4,
    "structure_module": {"sequence_dim": 32, "pairwise_dim": 8, "ipa_dim": 4, "resnet_dim": 8}
    | {"num_blocks": 1, "num_heads_ipa": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import EsmConfig, EsmForProteinFolding

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 8, "vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}
    own = {"trunk": TRUNK, "lddt_head_hid_dim": 8, "fp16_esm": False}
    config = EsmConfig(**small, is_folding_model=True, esmfold_config=own)
    torch.manual_seed(0)
    model = EsmForProteinFolding(config)
    torch.nn.init.normal_(model.lddt_head[-1].weight)  # zero at first: every protein at 50
    model.save_pretrained(path := tmp_path_factory.mktemp("esmfold"))
    return path


def test_plddt_is_the_mean_over_atoms_and_each_group_has_its_interval(folder):
    model = load_esmfold(str(folder), torch.device("cpu"))
    found = model.infer(["MKTAYIAKQR"])
    there = found["atom37_atom_exists"][0].bool()
    wanted = 100 * found["plddt"][0][there].mean().item()
    assert plddt(model, "MKTAYIAKQR") == pytest.approx(wanted, rel=1e-5) and wanted != 50
    record = confidence(model, ["MKT", "AYIAK", ""], ["MKTA", "WWYY"])
    assert record["generated"]["n"] == 2  # an empty protein has no structure
    for group in ("generated", "natural", "shuffled"):
        assert record[group]["low"] <= record[group]["value"] <= record[group]["high"]


def test_an_esmfold_without_some_of_its_weights_is_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["lddt_head.1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"all weights .* without lddt_head\.1\.weight"):
        load_esmfold(str(tmp_path), torch.device("cpu"))
    with pytest.raises(InputError, match="none"):
        load_esmfold(str(tmp_path / "none"), torch.device("cpu"))
