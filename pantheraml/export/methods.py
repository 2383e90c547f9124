"""The names of ``save_method``: what there is, and what to do in place of what there is not."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, UnsupportedError, nearest

# save_method -> the preset of compressed-tensors that it means; see ``compressed``.
COMPRESSED: dict[str, str] = {
    **dict.fromkeys(("fp8", "fp8_dynamic", "w8a8_fp8"), "FP8_DYNAMIC"),
    "fp8_block": "FP8_BLOCK",
    **dict.fromkeys(("int8", "w8a8", "w8a8_int8"), "W8A8"),
    **dict.fromkeys(("w8a16", "int8_weight"), "W8A16"),
    **dict.fromkeys(("w4a16", "int4"), "W4A16"),
    "w4a8": "W4A8",
    "w4afp8": "W4AFP8",
    "mxfp8": "MXFP8",
    "mxfp4a16": "MXFP4A16",
}
# save_method -> torchao's configuration class and its arguments; see ``requantized``.
TORCHAO: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("torchao_fp8", "portable_fp8"), ("Float8WeightOnlyConfig", {})),
    **dict.fromkeys(("torchao_int8", "portable_int8"), ("Int8WeightOnlyConfig", {"version": 2})),
}
BNB_4BIT = "merged_4bit_forced"
SAVE_METHODS = ("merged_16bit", "lora", BNB_4BIT, *COMPRESSED, *TORCHAO)

_CALIBRATED = "its scales come from a run over data; quantise a 'merged_16bit' folder with llm-compressor"
_ELSEWHERE = {
    "merged_4bit": "rounding the merged weights to 4 bits takes away a part of what the adapter learnt; "
    "'merged_4bit_forced' does it all the same, and loading a 'merged_16bit' folder with load_in_4bit=True gives the "
    "same weights",
    "gguf": "it is not a merged folder; call save_pretrained_gguf",
    "mxfp4": "gpt-oss is written in 16 bit, or by save_pretrained_gguf with quantization_method='mxfp4'",
    "w4a16_asym": "transformers does not load its zero points as they are packed, so that it could not be verified; "
    "use 'w4a16'",
    **dict.fromkeys(("fp8_static", "nvfp4", "nvfp4a16"), _CALIBRATED),
}


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
    close = nearest(method, [*SAVE_METHODS, *_ELSEWHERE])
    raise ConfigError(
        f"unknown save method {save_method!r}" + (f"; did you mean {close!r}?" if close else ""),
        where="argument save_method",
        hint=f"the methods are {known}",
    )
