"""Make PyPI's CUDA build of torch importable on a machine without a GPU and without NVIDIA's packages.

    python tests/xla/cuda_stubs.py [--punch]

For every CUDA library that torch's shared objects link and that is not there, a stub is compiled that has exactly the
symbols torch imports, each returning cudaErrorNoDevice; ``torch.cuda.is_available()`` is then False. ``--punch`` also
gives back the disk space of the device code, which is never read (Linux, fallocate). For test environments only: the
packages that it leaves out are 3 GB to download and 4 GB on disk.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])
LIBRARIES = SITE / "torch" / "lib"
# Library -> beginning of its symbols, where those carry no version.
UNVERSIONED = {
    "libnccl.so.2": "nccl",
    "libcusparseLt.so.0": "cusparseLt",
    "libcufile.so.0": "cuFile",
    "libcurand.so.10": "curand",
    "libnvshmem_host.so.3": "nvshmem",
}
VERSION_NODES = {"NVSHMEM": "libnvshmem_host.so.3"}
NO_DEVICE = "return 100;"
BODIES = {
    "__cudaRegisterFatBinary": "static void *handle[64]; return (long)handle;",
    "cudaGetErrorString": 'return (long)"CUDA stub: no device";',
    "cudaGetErrorName": 'return (long)"cudaErrorNoDevice";',
    "ncclGetErrorString": 'return (long)"NCCL stub";',
    "cudnnGetErrorString": 'return (long)"cuDNN stub";',
    "cudnnGetVersion": "return 0;",
    "cudnnGetCudartVersion": "return 0;",
    "cudaGetLastError": "return 0;",
    "cudaPeekAtLastError": "return 0;",
}


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def imported_symbols(objects: list[Path]) -> dict[str, dict[str, str]]:
    """Library -> symbol -> version node, of everything that the objects import from CUDA's libraries."""
    symbols: dict[str, dict[str, str]] = {}
    for path in objects:
        for line in output("nm", "-D", "--undefined-only", "--with-symbol-versions", str(path)).splitlines():
            name, _, version = line.split()[-1].partition("@")
            version = version.lstrip("@")
            owner = version if version.startswith("lib") else VERSION_NODES.get(version)
            if not version:
                owner = next((so for so, prefix in UNVERSIONED.items() if name.startswith(prefix)), None)
            if owner is not None:
                symbols.setdefault(owner, {})[name] = version
    return symbols


def compile_stub(library: str, symbols: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, versions = Path(folder) / "stub.c", Path(folder) / "stub.map"
        source.write_text("".join(f"long {s}(void){{{BODIES.get(s, NO_DEVICE)}}}\n" for s in sorted(symbols)))
        nodes = sorted(set(filter(None, symbols.values())))
        lines = (f"{n} {{ global: {' '.join(f'{s};' for s, v in sorted(symbols.items()) if v == n)} }};" for n in nodes)
        versions.write_text("\n".join(lines))
        options = [f"-Wl,--version-script={versions}"] if nodes else []
        target = ["-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{library}", "-o", str(LIBRARIES / library)]
        output("gcc", *options, *target, str(source))


def drop_requirements() -> None:
    """Without this, the next ``pip install`` would fetch the packages that the stubs stand for."""
    metadata = next(SITE.glob("torch-*.dist-info")) / "METADATA"
    metadata.write_text(re.sub(r"(?m)^Requires-Dist: (nvidia-|triton).*\n", "", metadata.read_text()))


def punch(path: Path) -> None:
    sections = r"\] (?:\.nv_fatbin|__nv_relfatbin|\.nvFatBinSegment_dev)\s+\S+\s+\w+\s+(\w+)\s+(\w+)"
    for offset, size in re.findall(sections, output("readelf", "-SW", str(path))):
        output("fallocate", "-p", "-o", str(int(offset, 16)), "-l", str(int(size, 16)), str(path))


def main() -> None:
    objects = sorted(LIBRARIES.glob("*.so"))
    needed = {name for path in objects for name in re.findall(r"NEEDED.*\[(.+?)\]", output("readelf", "-d", str(path)))}
    needed -= {path.name for path in LIBRARIES.glob("*.so*")} | {"libcuda.so.1"}
    symbols = imported_symbols(objects)
    for library in sorted(name for name in needed if re.match(r"lib(cu|nccl|nv)", name)):
        compile_stub(library, symbols.get(library, {}))
    drop_requirements()
    if "--punch" in sys.argv:
        for path in LIBRARIES.glob("libtorch_cuda*.so"):
            punch(path)


if __name__ == "__main__":
    main()
