#!/bin/sh
# Make the environment of the XLA tests: make_environment.sh DIR. About a minute and 1 GB of downloads.
#
# torch_xla 2.9.0 is built for torch 2.9.0. Where PyTorch's index of CPU builds can be reached (TORCH_INDEX), torch comes
# from there; else from PyPI, whose build links CUDA's libraries: without the 3 GB of them, stubs take their place.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python3.11 -m venv "$1"
pip="$1/bin/python -m pip install --quiet --disable-pip-version-check"
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
if $pip --no-deps --index-url "$index" "torch==2.9.0+cpu" 2>/dev/null; then
    stubs=
else
    $pip --no-deps torch==2.9.0
    stubs=yes
fi
[ -z "$stubs" ] || "$1/bin/python" "$here/cuda_stubs.py" --punch
$pip --no-deps torch_xla==2.9.0
$pip numpy absl-py pyyaml requests filelock typing-extensions sympy networkx jinja2 fsspec setuptools
constraint() { sed -n "s/^\($1==[^ ;]*\).*/\1/p" "$here/../../constraints.txt"; }
# shellcheck disable=SC2046  # one argument a package
$pip $(constraint transformers) $(constraint trl) $(constraint peft) $(constraint accelerate) $(constraint datasets) \
    wrapt rich psutil pytest pytest-timeout pytest-socket
# The TPU compiler, which needs no TPU to compile.
$pip jax==0.7.1 jaxlib==0.7.1 libtpu==0.0.21
PJRT_DEVICE=CPU "$1/bin/python" -c 'import torch, torch_xla; assert (torch.ones(2, device="xla") * 2).sum().item() == 4'
