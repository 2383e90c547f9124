"""Names of GGUF types, and the command that is given to ``llama-quantize``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from pantheraml.errors import ArgumentError, CheckpointError, ConfigError, UnsupportedError
from pantheraml.export.gguf import quantize
from pantheraml.export.gguf.api import print_quantization_methods
from pantheraml.export.gguf.types import ALIASES, FILE_TYPES, resolve_types

Q4 = FILE_TYPES["q4_k_m"]
# A program that writes down its arguments, and copies its input to its output.
FAKE = """#!{python}
import json, pathlib, shutil, sys
pathlib.Path({record!r}).write_text(json.dumps(sys.argv))
if {code}:
    sys.stderr.write("something is wrong\\n")
    raise SystemExit({code})
shutil.copyfile(sys.argv[-3], sys.argv[-2])
"""


def fake_tool(folder: Path, *, code: int = 0) -> tuple[Path, Path]:
    """A stand-in for ``llama-quantize``, and the file in which it notes its arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    tool, record = folder / "llama-quantize", folder / "argv.json"
    tool.write_text(FAKE.format(python=sys.executable, record=str(record), code=code))
    tool.chmod(0o755)
    return tool, record


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, ["q8_0"]),
        ("fast_quantized", ["q8_0"]),
        ("quantized", ["q4_k_m"]),
        ("not_quantized", ["bf16"]),
        ("Q8_0", ["q8_0"]),
        (" F16 ", ["f16"]),
        (["Q4_K_M", "q8_0", "q5_k_m"], ["q4_k_m", "q8_0", "q5_k_m"]),
        (["q8_0", "fast_quantized"], ["q8_0"]),
        (("iq2_xxs",), ["iq2_xxs"]),
    ],
    ids=str,
)
def test_names_aliases_and_lists(given, names):
    assert [entry.name for entry in resolve_types(given, unquantized="bf16")] == names


@pytest.mark.parametrize("given", [5, ["q8_0", 3], {"q8_0": 1}], ids=str)
def test_other_than_names_is_a_type_error(given):
    with pytest.raises(ArgumentError) as caught:
        resolve_types(given)
    assert isinstance(caught.value, TypeError)


def test_unknown_names_list_all():
    with pytest.raises(ConfigError, match="did you mean 'q4_k_m'") as caught:
        resolve_types("q4_k_mm")
    assert all(name in str(caught.value) for name in [*ALIASES, *FILE_TYPES])
    with pytest.raises(ConfigError, match="empty"):
        resolve_types([])
    with pytest.raises(UnsupportedError, match="q3_k_s"):
        resolve_types("q3_k_xs")


def test_printed_methods_name_every_type(capsys):
    print_quantization_methods()
    printed = capsys.readouterr().err
    assert all(name in printed for name in [*ALIASES, *FILE_TYPES])


HOSTILE = ["plain", "with space", "a; rm -rf b", "-dash", "$(touch x)", "quote\"'", "line\nbreak"]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_paths_reach_the_tool_as_they_are(name, tmp_path, monkeypatch):
    folder = tmp_path / name
    tool, record = fake_tool(folder)
    monkeypatch.chdir(folder)
    Path(name + ".in").write_bytes(b"weights")
    imatrix = folder / (name + ".dat")
    imatrix.touch()
    before = {entry.name for entry in folder.iterdir()}
    source, target = Path(name + ".in"), Path(name + ".out")
    quantize.run(tool, source, target, FILE_TYPES["q2_k_l"], quantize.check_imatrix(Q4, imatrix))
    assert target.read_bytes() == b"weights"
    assert {entry.name for entry in folder.iterdir()} - before == {name + ".out", record.name}
    options = ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
    paths = [str(folder / (name + suffix)) for suffix in (".in", ".out")]
    assert json.loads(record.read_text()) == [str(tool), "--imatrix", str(imatrix), *options, *paths, "Q2_K"]
    assert all(path.startswith("/") for path in paths)


def test_shown_command_reads_back_in_a_shell(tmp_path):
    paths = tmp_path / "a b; rm", tmp_path / "-c"
    command = quantize.arguments("llama-quantize", *paths, Q4, None, requantize=True)
    assert shlex.split(quantize.shown(command)) == command
    assert command == ["llama-quantize", "--allow-requantize", *map(str, paths), "Q4_K_M"]


def test_failing_tool_is_quoted(tmp_path):
    tool, _ = fake_tool(tmp_path, code=3)
    (tmp_path / "in").touch()
    with pytest.raises(CheckpointError, match=r"exit code 3(.|\n)*something is wrong"):
        quantize.run(tool, tmp_path / "in", tmp_path / "out", Q4, None)


def test_finding_the_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert quantize.find_tool() is None
    tool, _ = fake_tool(tmp_path / "llama.cpp" / "build" / "bin")
    assert quantize.find_tool(tmp_path / "llama.cpp") == tool
    assert quantize.find_tool(tool) == tool
    monkeypatch.setenv("PATH", str(tool.parent))
    assert quantize.find_tool() == tool
    with pytest.raises(ConfigError, match="no program llama-quantize"):
        quantize.find_tool(tmp_path / "missing")


def test_importance_matrix_rules(tmp_path):
    assert quantize.check_imatrix(Q4, None) is None
    with pytest.raises(ConfigError, match="needs an importance matrix"):
        quantize.check_imatrix(FILE_TYPES["iq1_s"], None)
    with pytest.raises(ConfigError, match="not looked for on the hub"):
        quantize.check_imatrix(FILE_TYPES["iq1_s"], True)
    with pytest.raises(ConfigError, match="there is no file"):
        quantize.check_imatrix(Q4, tmp_path / "missing.dat")
