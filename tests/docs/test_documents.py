"""What the documents say is true of the code: names, commands, variables, links, and the snippets run."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pantheraml.cli.parser import COMMANDS, build_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *(ROOT / f"{name}.md" for name in ("README", "MIGRATION_SUMMARY", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "pantheraml" / "assets" / "README.md",
    ]
)
UNSLOTH = "https://github.com/unslothai/unsloth"


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def fenced_blocks(path: Path) -> list[Block]:
    blocks, start, language, lines = [], None, "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if start is None:
                start, language, lines = number, line[3:].strip(), []
            else:
                blocks.append(Block(path, start, language, "\n".join(lines)))
                start = None
        elif start is not None:
            lines.append(line)
    assert start is None, f"{path.name}: the block of line {start} does not end"
    return blocks


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for path in DOCUMENTS for block in fenced_blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
by_name = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(match) for match in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)}


@by_name
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@by_name
def test_files_of_the_repository_that_are_named_exist(path):
    for name in re.findall(r"`((?:pantheraml|tests|docs|examples|\.ci)/[\w./-]+)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@by_name
def test_no_em_dash_and_no_trailing_space(path):
    text = path.read_text(encoding="utf-8")
    assert "\u2014" not in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_compile_and_import_names_that_exist(block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] in ("pantheraml", "trl", "transformers", "datasets", "peft"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@by_name
def test_dotted_names_of_the_package_exist(path):
    for dotted in set(re.findall(r"`(pantheraml(?:\.\w+)+)(?:\([^`]*\))?`", path.read_text(encoding="utf-8"))):
        parts = dotted.split(".")
        value = importlib.import_module(parts[0])
        for position, part in enumerate(parts[1:], start=2):
            try:
                value = getattr(value, part)
            except AttributeError:
                value = importlib.import_module(".".join(parts[:position]))


# What stands in for a reader's own model and data when a snippet runs.
STAND_INS = {"Qwen/Qwen3-0.6B": "model", "train.jsonl": "train.jsonl", "max_steps=60": "max_steps=2"}


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block, tiny_llama_dir, tmp_path, monkeypatch):
    text = block.text
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    (tmp_path / "model").symlink_to(tiny_llama_dir)
    rows = [{"text": f"Question: what is {i} plus three? Answer: {i + 3}."} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "snippet.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("snippet.py", run_name="__main__")


def test_example_runs_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples" / "finetune_lora.py"), run_name="__main__")
    assert "Order: " in capsys.readouterr().out
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "merged/tokenizer.json"):
        assert (tmp_path / "finetuned" / name).is_file(), name


def documented_commands() -> list[str]:
    found = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        found |= {match.strip() for match in re.findall(r"`(pantheraml(?: [^`\n]*)?)`", text)}
    for block in BLOCKS:
        if block.language in ("bash", "console", "sh"):
            for line in block.text.splitlines():
                command = line.split("#")[0].strip().removeprefix("$ ").removeprefix(".venv/bin/")
                if re.match(r"pantheraml( |$)", command):
                    found.add(command)
    return sorted(found)


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_in_the_parser(command):
    words = shlex.split(command)[1:]
    if words[:1] and words[0] in COMMANDS:
        parser, words = build_parser(words[0]), words[1:]
    else:
        parser = build_parser()
    if "--help" in words:
        with pytest.raises(SystemExit) as stopped:
            parser.parse(words)
        assert stopped.value.code == 0
    else:
        parser.parse(words)


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"`make ([a-z-]+)`", text))
        named |= {match for block in fenced_blocks(path) for match in re.findall(r"^make ([a-z-]+)", block.text, re.M)}
    assert {"demo", "test", "lint"} <= named
    assert named <= targets


def test_first_screen_of_the_readme_has_the_two_commands_and_what_they_stand_for():
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:45])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("make demo", "make test", "pip install", "pantheraml demo"):
        assert command in screen
    extras = re.search(r"--editable '([^']+)'", makefile)
    assert extras
    assert extras.group(0) in screen
    marker = re.search(r'pytest .*(-m "[^"]+")', makefile)
    assert marker
    assert marker.group(1) in screen


def section(path: Path, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", path.read_text(encoding="utf-8"), re.M | re.S)
    assert found, heading
    return found.group(1)


def public_names() -> set[str]:
    import pantheraml
    from pantheraml import chat_templates, dataprep, distributed, trainer
    from pantheraml.models.methods import MODEL_METHODS

    for name in pantheraml.__all__:
        getattr(pantheraml, name)
    facades = (pantheraml, trainer, chat_templates, dataprep, distributed)
    return {*(name for module in facades for name in module.__all__), *MODEL_METHODS}


def test_migration_page_names_what_is_there():
    table = section(ROOT / "MIGRATION_SUMMARY.md", "What is there, name by name")
    rows = re.findall(r"^\| (.+?) \| .+ \|$", table, re.MULTILINE)
    stock = {"SFTTrainer", "save_pretrained", "generate"}
    named = {
        name.removeprefix("model.").removeprefix("tokenizer.")
        for row in rows
        for name in re.findall(r"`((?:\w+\.)?\w+)(?:\([^`]*\))?`", row)
        if not name.endswith(".py")
    }
    assert len(named) > 20
    assert named - stock <= public_names()


def test_migration_page_does_not_miss_what_has_come():
    text = section(ROOT / "MIGRATION_SUMMARY.md", "What is not there yet")
    assert not set(re.findall(r"`(\w+)`", text)) & public_names()


def test_unsloth_is_credited_with_its_address():
    for name in ("README.md", "NOTICE", "MIGRATION_SUMMARY.md", "docs/index.md"):
        assert UNSLOTH in (ROOT / name).read_text(encoding="utf-8"), name


def test_licence_is_the_apache_licence_that_the_metadata_names():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_environment_variable_is_documented_and_no_other():
    code = (ROOT / "pantheraml" / "env.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    pattern = r"\bPANTHERAML_[A-Z_]+\b"
    assert set(re.findall(pattern, page)) == set(re.findall(pattern, code))
    for name in re.findall(r'text\("([A-Z_]+)"\)|_first_integer\("([A-Z_]+)", "([A-Z_]+)"', code):
        for variable in filter(None, name):
            assert f"`{variable}`" in page or variable == "PATH", variable


def test_every_role_is_documented_and_no_other():
    from pantheraml.models.roles import Role

    page = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {role.value for role in Role}


def test_every_operation_is_documented():
    from pantheraml import kernels

    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    operations = {name for name, module in kernels._EXPORTS.items() if module not in ("utils", "dispatch")}
    functions = {name for name in operations if name.islower()}
    assert functions <= set(re.findall(r"`(\w+)`", page))


def test_every_error_type_is_documented_with_its_exit_code():
    from pantheraml import errors

    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    types = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PantheraMLError)
    }
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE))
    assert rows == {name: str(value.exit_code) for name, value in types.items()}
