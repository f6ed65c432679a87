"""No number in the documents that no committed file shows, and no command that does not run."""

import doctest
import importlib.util
import re
import shlex
import subprocess

import pytest
import tyro

import main
from benchmarks.documents import BLOCK, documents, filled
from distil_rank.__main__ import COMMANDS
from distil_rank.core.records import ROOT

# figures that define something, rather than report it
DEFINITIONS = {"95 %", "1 %", "99 %", "0.1", "0.3", "0.01", "0.003", "0.25", "4.0", "3.11"}
DEFINITIONS |= {"CC-BY-4.0", "0.1.0", ".0"}
# published figures of ESM-2 650M that synthetic embeddings match (docs/methods.md names the source)
PUBLISHED = {".402", ".532", ".710", ".808", ".87", "6.85", "2.03", "3.08"}
NUMBER = re.compile(r"\d*\.\d+|\d+(?:\.\d+)? ?%|\d{1,3}(?:,\d{3})+")
COMMAND = re.compile(r"(?:python main\.py|python -m |torchrun |distil-rank |make )[^\n`]*")

each_document = pytest.mark.parametrize(
    "document", documents(), ids=lambda path: str(path.relative_to(ROOT))
)


@each_document
def test_generated_blocks_are_what_the_json_says(document):
    renewed = ["git", "status", "--porcelain", "-uno", "--", "results/**.json"]
    renewed.append("benchmarks/results/**.json")
    if subprocess.run(renewed, cwd=ROOT, capture_output=True, text=True).stdout:
        pytest.skip("results were renewed and the documents are of the committed: make report")
    text = document.read_text()
    assert filled(text) == text, "run `make report`"


@each_document
def test_prose_reports_no_figure_of_its_own(document):
    prose = BLOCK.sub("", document.read_text())
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.DOTALL)
    assert set(NUMBER.findall(prose)) <= DEFINITIONS | PUBLISHED


@each_document
def test_every_link_to_a_file_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), target


def commands(document):
    """Commands in code blocks and in `code`, without comments, as lists of arguments."""
    text = BLOCK.sub("", document.read_text()).replace("\\\n", " ")
    blocks, prose = [], []
    for i, part in enumerate(re.split(r"^```", text, flags=re.M)):
        (blocks if i % 2 else prose).append(part.partition("\n")[2] if i % 2 else part)
    lines = "\n".join(blocks).splitlines() + re.findall(r"`([^`\n]*)`", "".join(prose))
    lines = [line.strip().removeprefix("$ ") for line in lines]
    found = [line for line in lines if COMMAND.match(line)]
    return [shlex.split(line, comments=True) for line in found if "COMMAND" not in line]


def understood(arguments):
    """Whether the program and its flags exist; nothing is run."""
    match arguments:
        case ["make", *words]:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
            return all(word in targets or "=" in word for word in words)
        case ["python", "main.py", *flags]:
            return parsed(main.Config, flags)
        case ["torchrun", *words]:
            return understood(["distil-rank", *words[words.index("distil_rank") + 1 :]])
        case ["python", "-m", module, *_]:
            return importlib.util.find_spec(module) is not None
        case ["distil-rank", *words]:
            length = next((n for n in (2, 1) if " ".join(words[:n]) in COMMANDS), 0)
            if not length:
                groups = {command.split()[0] for command in COMMANDS}
                return words == ["--help"] or (len(words) == 1 and words[0] in groups)
            module = importlib.import_module(COMMANDS[" ".join(words[:length])][0])
            return parsed(module.Config, words[length:])
    return False


def parsed(config, flags):
    # without flags a command is only named in the text
    if not flags or flags == ["--help"]:
        return True
    return tyro.cli(config, args=flags) is not None


@each_document
def test_every_command_printed_is_understood(document):
    for arguments in commands(document):
        try:
            assert understood(arguments), shlex.join(arguments)
        except SystemExit:
            pytest.fail(shlex.join(arguments))


def test_the_example_of_the_readme_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    example = doctest.DocTestParser().get_doctest(
        (ROOT / "README.md").read_text().replace("```", ""), {}, "README", "README.md", 0
    )
    assert len(example.examples) >= 10
    assert doctest.DocTestRunner().run(example).failed == 0
