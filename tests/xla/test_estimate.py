"""The trainer's step, compiled by libtpu for TPU chips on a machine without any.

The model has the widths of Llama 3.2 1B and two or four of its sixteen layers, so that the compiler needs a minute.
"""

from __future__ import annotations

import importlib.util

import pytest
from transformers import LlamaConfig

from pantheraml import xla_runtime  # noqa: F401  # named in a condition
from pantheraml.training.tpu_estimate import estimate_tpu_step

MISSING = [name for name in ("libtpu", "jax") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} is not installed, so nothing compiles for a TPU"),
    pytest.mark.skipif(
        "xla_runtime.device_count() > 1",
        reason="processes of its own have as many devices as there are chips: run with one device",
    ),
    pytest.mark.timeout(900),
]
GIB = 1024**3
WIDTHS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
# Of a layer's seven matrices, in two passes.
GATHERS = 2 * 7
# Weights of one layer: attention, MLP, two norms.
LAYER = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192 + 2 * 2048


def billion(path, tokenizer, layers, **others):
    config = LlamaConfig(
        **(WIDTHS | others),
        num_hidden_layers=layers,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory, tiny_tokenizer):
    model = billion(tmp_path_factory.mktemp("two"), tiny_tokenizer, 2)
    return estimate_tpu_step(model, ["v5e:2x4", "v6e:2x4"], max_seq_length=1024, lora_r=16)


@pytest.mark.parametrize(("index", "name", "memory"), [(0, "v5e-8", 16), (1, "v6e-8", 32)])
def test_a_lora_step_is_placed_on_eight_chips(two_layers, index, name, memory):
    estimate = two_layers[index]
    assert (estimate.tpu, estimate.chips, estimate.hbm) == (name, 8, memory * GIB)
    assert (estimate.rows, estimate.seq_length) == (8, 1024)
    frozen = estimate.parameters - estimate.trainable
    assert frozen == 128256 * 2048 + 2 * LAYER + 2048
    assert estimate.trainable == 2 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
    # bf16 weights are divided; float32 adapters and their two moments are too small to be.
    divided, states = 2 * frozen / 8, 3 * 4 * estimate.trainable
    assert divided + states < estimate.arguments < divided + states + 2**20
    # What the step updates takes its place, and nothing else comes out but a few numbers.
    assert 0 < estimate.updated <= estimate.outputs < estimate.updated + 2**16
    assert states <= estimate.updated < states + 2**16
    # A row's logits in bf16 and float32.
    assert estimate.temporaries > 6 * 1023 * 128256
    assert estimate.needed == (
        estimate.arguments + estimate.temporaries + estimate.outputs - estimate.updated + estimate.code
    )
    assert estimate.fits
    assert estimate.needed < estimate.hbm
    assert estimate.kernels == 0
    # The weights of two layers are gathered once in the forward and once for the backward, and beside them few numbers.
    assert 2 * GATHERS <= estimate.collectives["all-gather"] <= 2 * GATHERS + 6
    # Gradients are summed, all in a few calls; the head passes hidden states on, whatever the number of layers.
    assert 0 < estimate.collectives["all-reduce"] + estimate.collectives.get("reduce-scatter", 0) <= 12
    assert estimate.collectives.get("collective-permute", 0) <= 16


def test_memory_grows_by_the_layers(two_layers, tmp_path, tiny_tokenizer):
    [four] = estimate_tpu_step(billion(tmp_path, tiny_tokenizer, 4), "v5e-8", max_seq_length=1024, lora_r=16)
    two = two_layers[0]
    assert four.parameters - four.trainable == two.parameters - two.trainable + 2 * LAYER
    grown = 2 * 2 * LAYER / 8 + (two.updated - 4)
    assert four.arguments - two.arguments == pytest.approx(grown, rel=0.01)
    # Layers are gathered one after another, and their activations computed again: each keeps its input.
    assert four.temporaries - two.temporaries < 2 * 2 * LAYER / 2
    assert four.collectives == two.collectives | {"all-gather": two.collectives["all-gather"] + 2 * GATHERS}


def test_long_rows_take_the_kernel_for_attention(tmp_path, tiny_tokenizer):
    narrow = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    model = billion(tmp_path, tiny_tokenizer, 2, **narrow, num_attention_heads=4, num_key_value_heads=2)
    [long] = estimate_tpu_step(model, "v5e-8", max_seq_length=4096)
    # Forward, recomputation, and two for the gradients, of two layers.
    assert long.kernels == 2 * 4
    # The scores of a chip's row would be four heads by 4096 by 4096.
    assert long.temporaries < 2 * 4 * 4096**2


def test_one_chip_needs_no_communication(tiny_llama_dir):
    [estimate] = estimate_tpu_step(str(tiny_llama_dir), "v5e-1", max_seq_length=256, lora_r=None)
    assert estimate.chips == 1
    assert estimate.trainable == estimate.parameters
    assert estimate.fits
    assert estimate.collectives == {}


def test_a_step_that_is_too_large_is_told(tiny_llama_dir):
    # Scores of 65536 by 65536 of four heads are 64 GiB in float32.
    [estimate] = estimate_tpu_step(str(tiny_llama_dir), "v5e-1", max_seq_length=65536)
    assert not estimate.fits
    assert estimate.arguments is None
    assert estimate.collectives == {}
    assert estimate.needed >= 64 * GIB
