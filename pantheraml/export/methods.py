"""The names of ``save_method``: what there is, and what to do in place of what there is not."""

from __future__ import annotations

from ..errors import ConfigError, UnsupportedError, nearest

SAVE_METHODS = ("merged_16bit", "lora")
_ELSEWHERE = {
    "merged_4bit": "a merge into 4-bit weights rounds the adapter away; use 'merged_16bit', and load it in 4 bit",
    "merged_4bit_forced": "it is not there yet; use 'merged_16bit', and load that with load_in_4bit=True",
    "gguf": "it is not a merged folder; call save_pretrained_gguf",
}
QUANTIZED_METHODS = (
    *("mxfp4", "fp8", "fp8_dynamic", "w8a8_fp8", "fp8_static", "fp8_block", "int8", "w8a8", "w8a8_int8", "w8a16"),
    *("int8_weight", "w4a16", "int4", "w4a16_asym", "w4a8", "w4afp8", "mxfp8", "mxfp4a16", "nvfp4", "nvfp4a16"),
    *("torchao_fp8", "torchao_int8", "portable_fp8", "portable_int8"),
)


def check_save_method(save_method: str | None) -> str:
    """Return the save method that is meant; None means ``"merged_16bit"``.

    Raises:
        UnsupportedError: a method of the API that is not there, with what is.
        ConfigError: no such method.
    """
    method = "merged_16bit" if save_method is None else str(save_method).lower().strip()
    if method in SAVE_METHODS:
        return method
    known = ", ".join(map(repr, SAVE_METHODS))
    if method in _ELSEWHERE:
        raise UnsupportedError(
            f"the save method {save_method!r} cannot be used",
            where="argument save_method",
            why=_ELSEWHERE[method],
            hint=f"the methods are {known}",
        )
    if method in QUANTIZED_METHODS:
        raise UnsupportedError(
            f"writing {save_method!r} checkpoints is not there yet",
            where="argument save_method",
            hint=f"write 'merged_16bit' and quantise that folder; the methods are {known}",
        )
    close = nearest(method, [*SAVE_METHODS, *_ELSEWHERE, *QUANTIZED_METHODS])
    raise ConfigError(
        f"unknown save method {save_method!r}" + (f"; did you mean {close!r}?" if close else ""),
        where="argument save_method",
        hint=f"the methods are {known}",
    )
