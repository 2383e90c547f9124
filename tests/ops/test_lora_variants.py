"""The script that times the ways of adding low-rank updates calls the kernels as they are."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels"


def test_every_piece_runs(device, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import lora_variants

    monkeypatch.setattr(lora_variants, "SHAPES", {"q": (48, 48), "gate": (96, 48), "down": (48, 96)})
    monkeypatch.setattr(lora_variants, "TOKENS", 40)
    first = slice(1) if device.type == "cpu" else slice(None)
    for name in ("NARROW", "WIDEN", "GRADIENTS", "FORWARD", "BACKWARD"):
        monkeypatch.setattr(lora_variants, name, getattr(lora_variants, name)[first])
    sources = [lora_variants.whole(["gate", "gate"], device), lora_variants.activation(device)]
    sources += [lora_variants.pieces(name, device) for name in ("q", "down")]
    called = set()
    for rows in sources:
        for piece, way, call, _ in rows:
            # Of torch's own products one has a form for GPUs alone.
            if way != "torch" or device.type != "cpu":
                call()
                called.add(piece)
    assert {"forward", "backward", "gate+gate backward", "dy·B and dyᵀ·s"} <= called
