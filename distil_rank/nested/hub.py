"""A chain on the Hugging Face hub: one safetensors file, its configuration, a card."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from distil_rank.core.errors import InputError, hub_errors
from distil_rank.core.records import write_text
from distil_rank.core.tables import markdown
from distil_rank.nested.chain import FILE, NestedChain

REMEDY = "check the name, the network and your token"


def download(name: str, revision: str | None = None) -> Path:
    """The local path of a chain, downloaded where `name` is that of a repository."""
    if Path(name).exists():
        return Path(name)
    import huggingface_hub

    with hub_errors(f"{name} as a local chain or on the Hugging Face hub", REMEDY):
        return Path(huggingface_hub.hf_hub_download(name, FILE, revision=revision))


def upload(chain: NestedChain, repo: str, private: bool = False) -> str:
    import huggingface_hub

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise InputError(f"a repository like owner/name required, got {repo}")
    api = huggingface_hub.HfApi()
    models = {  # a local path means nothing elsewhere, and is nobody's business
        size: {**known, "source": known["model"]} if Path(known["source"]).exists() else known
        for size, known in chain.record.get("models", {}).items()
    }
    with TemporaryDirectory() as folder:
        replace(chain, record={**chain.record, "models": models}).save(folder)
        write_text(Path(folder) / "README.md", card(chain, repo))
        with hub_errors(f"the hub and the right to write {repo}", REMEDY):
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder))


def card(chain: NestedChain, repo: str) -> str:
    """What the chain is, how it is used, which models it needs."""
    known = chain.record.get("models", {})
    head = ["size", "model", "features", "nested dims", "SHA-256 of its weights"]
    rows = [head]
    for size, dim in chain.dims.items():
        model = known.get(size, {})
        sha256 = model.get("weights_sha256", "")[:16]
        rows.append([size, model.get("model", ""), str(chain.widths[size]), str(dim), sha256])
    return f"""---
library_name: distil-rank
tags: [protein, embeddings, matryoshka, reverse-distillation]
---

# {repo}

A nested embedding of {", ".join(chain.sizes)} ({chain.kind}): the first columns are those of the
smaller models, bit for bit, by Reverse Distillation (Catrina et al., ICLR 2026).

{markdown(rows)}

```python
from distil_rank import NestedChain
from distil_rank.nested.model import NestedESM

model = NestedESM.from_pretrained("{repo}")  # or the chain alone: NestedChain.from_pretrained
model.encode(["MKTAYIAKQR"], truncate_dim={next(iter(chain.dims.values()))})
```
"""
