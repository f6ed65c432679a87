"""A hook runs once, after somebody else's import, and imports nothing itself."""

import importlib
import sys

from distil_rank.core.imports import AfterImport


def test_a_hook_runs_once_when_its_module_was_imported(tmp_path, monkeypatch):
    for name in ("wanted_a", "wanted_b", "other"):
        (tmp_path / f"{name}.py").write_text("value = 1")
    (tmp_path / "hook.py").write_text(
        "import sys\nseen = []\ndef call(name): seen.append((name, sys.modules[name].value))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.import_module("wanted_a")
    monkeypatch.setitem(sys.modules, "wanted_a", sys.modules["wanted_a"])
    AfterImport(("wanted_b",), "hook", "call")
    assert "hook" not in sys.modules and "wanted_b" not in sys.modules
    importlib.import_module("other")
    assert "hook" not in sys.modules
    for _ in range(2):
        importlib.reload(importlib.import_module("wanted_b"))
    seen = sys.modules["hook"].seen
    assert seen == [("wanted_b", 1)]
    AfterImport(("wanted_a",), "hook", "call")  # was imported before
    assert seen[1:] == [("wanted_a", 1)]
    for name in ("wanted_a", "wanted_b", "other", "hook"):
        sys.modules.pop(name, None)
