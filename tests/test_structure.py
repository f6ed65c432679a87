"""The arrows between the rooms, one place for each concept, and a command line that answers."""

import ast
import doctest
import importlib
import subprocess
import sys

import pytest

import distil_rank
from distil_rank.core.records import PACKAGE, ROOT

LIBRARY = [*sorted(PACKAGE.rglob("*.py")), ROOT / "main.py"]
PROGRAMS = sorted((ROOT / "benchmarks").rglob("*.py"))
CORE = {
    "torch",
    "huggingface_hub",
    "numpy",
    "scipy",
    "statsmodels",
    "safetensors",
    "tqdm",
    "matplotlib",
    "onnx",
    "distil_rank",
}
LONGEST_FILE, LONGEST_FUNCTION = 300, 60


def name(path):
    return str(path.relative_to(ROOT))


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_imports_go_one_way_and_only_reports_draw():
    done = run("-c", "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_core_needs_little():
    for path in sorted((PACKAGE / "core").glob("*.py")):
        found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
        found |= {node.module or "" for node in nodes(path, ast.ImportFrom)}
        tops = {module.split(".")[0] for module in found}
        assert tops <= CORE | set(sys.stdlib_module_names), name(path)
        assert path.name == "figures.py" or "matplotlib" not in tops, name(path)
        assert path.name == "onnx_graph.py" or "onnx" not in tops, name(path)
        assert path.name == "errors.py" or "huggingface_hub" not in tops, name(path)


def moves(path):
    """Lines that put a file in another's place: os.replace, shutil.move, Path.replace(target)."""
    for call in nodes(path, ast.Call):
        if isinstance(call.func, ast.Attribute):
            method, owner = call.func.attr, ast.unparse(call.func.value)
            one = len(call.args) == 1 and not call.keywords  # str.replace takes two
            path_moves = method in ("replace", "rename") and one
            if path_moves or (owner, method) in (("shutil", "move"), ("os", "replace")):
                yield call.lineno


@pytest.mark.parametrize("path", [*LIBRARY, *PROGRAMS], ids=name)
def test_files_reach_their_place_by_the_one_atomic_write(path):
    found = [] if path.name == "records.py" else list(moves(path))
    assert found == [], "lines that move files; use core.records.atomic"


def length(function):
    """Lines of a function without its docstring, where formulas and examples stand."""
    text = ast.get_docstring(function, clean=False) or ""
    return function.end_lineno - function.lineno + 1 - (text.count("\n") + 1 if text else 0)


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_a_file_is_one_room(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_FILE
    long = {function.name: length(function) for function in nodes(path, ast.FunctionDef)}
    assert {f: n for f, n in long.items() if n > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("public", distil_rank.__all__)
def test_a_public_name_has_an_example_that_runs(public):
    found = getattr(distil_rank, public)
    module = importlib.import_module(found.__module__)
    tests = doctest.DocTestFinder(recurse=False).find(found, public, module, vars(module).copy())
    examples = sum(len(test.examples) for test in tests)
    assert examples, f"{public} needs an example in its docstring"
    failed = sum(doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(t).failed for t in tests)
    assert failed == 0


def test_help_loads_nothing_heavy():
    heavy = ("torch", "esm", "transformers", "matplotlib", "scipy", "tyro", "accelerate")
    code = "import sys; from distil_rank.__main__ import main; main(['--help']); "
    done = run("-c", f"{code}print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.splitlines()[-1] == "[]" and "usage: distil-rank" in done.stdout


def test_an_unknown_command_is_named_with_status_2():
    done = run("-m", "distil_rank", "destil")
    assert done.returncode == 2 and "unknown command 'destil'" in done.stderr and not done.stdout
