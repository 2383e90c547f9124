"""Build llama.cpp, and ``greedy.cpp`` on top of it, from the source package of llama-cpp-python.

Takes about six minutes on two idle cores, once: what is built is kept. Needs a C++ compiler, CMake and Ninja or Make.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.3.36"
HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent.parent / ".work" / "llamacpp"
_OPTIONS = (
    *("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "GGML_CCACHE=OFF", "LLAMA_BUILD_TOOLS=ON"),
    *("LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_APP=OFF"),
    *("LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_OPENSSL=OFF"),
)


def source(folder: Path) -> Path:
    """The source tree of llama.cpp, downloaded when it is not there."""
    tree = folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if not tree.is_dir():
        archive = folder / f"llama_cpp_python-{VERSION}.tar.gz"
        if not archive.is_file():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
            subprocess.run([*command, "--dest", str(folder), f"llama-cpp-python=={VERSION}"], check=True)
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
    return tree


def build(folder: Path, jobs: int) -> None:
    """Build the library, ``llama-quantize`` and ``greedy`` into ``folder``.

    Args:
        folder: Where everything goes.
        jobs: Compilers that run at once.
    """
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"needs {' and '.join(missing)} on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    tree, objects = source(folder), folder / "build"
    if not (objects / "CMakeCache.txt").is_file():
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = [f"-D{option}" for option in _OPTIONS]
        subprocess.run(["cmake", *generator, "-S", str(tree), "-B", str(objects), *options], check=True)
    subprocess.run(
        ["cmake", "--build", str(objects), "--parallel", str(jobs), "--target", "llama", "llama-quantize"], check=True
    )
    libraries = objects / "bin"
    include = ["-I", str(tree / "include"), "-I", str(tree / "ggml" / "include")]
    link = ["-L", str(libraries), "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    program = [str(HERE / "greedy.cpp"), "-o", str(folder / "greedy")]
    subprocess.run(["g++", "-O1", "-std=c++17", *include, *program, *link], check=True)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT, help=f"where to build (default {DEFAULT})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers that run at once")
    arguments = parser.parse_args()
    build(arguments.folder, arguments.jobs)


if __name__ == "__main__":
    main()
