"""One flag, one meaning: a name has one type, one default and one help text in every command."""

import ast
import importlib
import inspect
from collections import defaultdict
from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest

import main
from distil_rank.__main__ import COMMANDS

CONFIGS = {"python main.py": main.Config}
CONFIGS |= {f"distil-rank {c}": importlib.import_module(m).Config for c, (m, _) in COMMANDS.items()}

# flag -> commands in which it differs from the others, and why
EXCEPTIONS = {
    "out": ({"python main.py"}, "its default is results, and results/quick with --quick"),
    "rank": ({"python main.py"}, "its default is a twentieth of the width"),
    "teacher": ({"python main.py"}, "a layer or head beside three teachers"),
    "fasta": ({"distil-rank nested fit"}, "may be missing: --stores holds the embeddings"),
    "dms": ({"distil-rank nested probe"}, "what the command is about, elsewhere one more measure"),
    "dtype": ({"distil-rank generator generate"}, "also float64, for exact comparisons"),
    "store_dtype": (
        {f"distil-rank generator {c}" for c in ("train", "finetune", "pretrain")},
        "weights, not embeddings: checkpoints are float32 or float16",
    ),
    "n_embd": ({"distil-rank pretrain"}, "its default is the smallest model of models/"),
    "learning_rate": (
        {"distil-rank pretrain", "distil-rank generator finetune"},
        "the default depends on the width there; a trained model takes smaller steps",
    ),
}
# commands without --device, and why
WITHOUT_DEVICE = {
    "distil-rank report": "draws from JSON",
    "distil-rank export": "copies vectors",
    "distil-rank generator publish": "copies files",
    "distil-rank generator prepare": "tokenizes",
}


def comments(config):
    """The help text of every field: the comment on its line, else the comment lines above it."""
    found = {}
    for owner in reversed(config.__mro__[:-1]):
        lines = inspect.getsource(owner).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            text = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
            above, line = [], node.lineno - 2
            while not text and lines[line].lstrip().startswith("#"):
                above.insert(0, lines[line].strip(" #"))
                line -= 1
            found[node.target.id] = text or " ".join(above)
    return found


def flags(aspect):
    """name -> {value of the aspect: commands}, without the exceptions."""
    table = defaultdict(lambda: defaultdict(list))
    for command, config in CONFIGS.items():
        texts, types = comments(config), get_type_hints(config)
        for field in fields(config):
            if command in EXCEPTIONS.get(field.name, ((), ""))[0]:
                continue
            required = field.default is MISSING and field.default_factory is MISSING
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = {
                "type": str(types[field.name]),
                "default": "required" if required else repr(default),
                "help": texts[field.name],
            }[aspect]
            table[field.name][value].append(command)
    return table


@pytest.mark.parametrize("aspect", ["type", "default", "help"])
def test_a_flag_means_the_same_everywhere(aspect):
    differing = {flag: dict(values) for flag, values in flags(aspect).items() if len(values) > 1}
    assert not differing, "\n".join(f"{flag}: {values}" for flag, values in differing.items())


@pytest.mark.parametrize("command", CONFIGS)
def test_every_flag_has_a_meaning(command):
    assert not [flag for flag, text in comments(CONFIGS[command]).items() if not text]


@pytest.mark.parametrize("command", sorted(CONFIGS.keys() - WITHOUT_DEVICE.keys()))
def test_a_command_that_computes_has_a_device(command):
    assert "device" in {field.name for field in fields(CONFIGS[command])}


def test_exceptions_are_still_needed():
    for flag, (commands, reason) in EXCEPTIONS.items():
        assert commands <= CONFIGS.keys() and reason
        rest = CONFIGS.keys() - commands
        others = [c for c in rest if flag in {field.name for field in fields(CONFIGS[c])}]
        assert others, f"{flag} is in no other command"
