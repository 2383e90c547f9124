"""The specification of every op in plain eager torch: no Triton, differentiable by autograd, any device and dtype.

Each module holds one op under the name that the fused one has. Reductions accumulate in float32 (float64 for float64
input), as the docstrings state.
"""
