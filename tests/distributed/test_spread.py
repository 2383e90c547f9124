"""One process with a model spread over two GPUs trains what one GPU trains."""

from __future__ import annotations

import pytest
import torch
from runs import losses_of, save_tiny, train, trained_weights

from pantheraml import FastLanguageModel, create_device_map

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-4


def adapted(folder, device_map):
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, dtype=torch.float32, device_map=device_map
    )
    return FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("wish", ["dict", "balanced", "sequential"])
def test_a_spread_model_trains_what_one_gpu_trains(wish, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, and this host has {torch.cuda.device_count()}")
    save_tiny(tmp_path / "tiny")
    alone, _ = train(tmp_path / "alone", ranks=1, model=adapted(tmp_path / "tiny", {"": 0}), watched=False)
    placed = create_device_map(alone.model.config, 2) if wish == "dict" else wish
    model = adapted(tmp_path / "tiny", placed)
    if wish == "dict":
        assert {p.device.index for p in model.parameters()} == {0, 1}
    spread, _ = train(tmp_path / "spread", ranks=1, model=model, watched=False)
    assert losses_of(spread) == pytest.approx(losses_of(alone), abs=TOLERANCE)
    found, wanted = trained_weights(spread.model), trained_weights(alone.model)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    assert spread.evaluate()["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], abs=TOLERANCE)
