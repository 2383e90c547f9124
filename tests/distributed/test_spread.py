"""One process with a model spread over two devices trains what one device trains."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from runs import losses_of, save_tiny, train, trained_weights
from second_device import SECOND, OnSecond, held, second_device
from torch import nn
from training_support import panthera_model

from pantheraml import FastLanguageModel, create_device_map
from pantheraml.device import get_device

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-4


def adapted(folder, device_map):
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, dtype=torch.float32, device_map=device_map
    )
    return FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.gpu
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


class Aligned(AlignDevicesHook):
    """accelerate's hook, of a module whose weights are in place."""

    def init_hook(self, module):
        return module


def spread_over_a_stand_in(*, lora):
    """A model whose last layer and head are on the second device, with the hooks that loading leaves on one."""
    model = panthera_model(lora=lora)
    inner = model.get_base_model() if lora else model
    here = [inner.model.embed_tokens, inner.model.rotary_emb, inner.model.layers[0]]
    there = [inner.model.layers[1], inner.model.norm, inner.lm_head]
    for device, parts in ((torch.device("cpu"), here), (SECOND, there)):
        for module in [module for part in parts for module in part.modules()]:
            for name, weight in module._parameters.items():
                if device is SECOND and weight is not None:
                    trained = weight.requires_grad
                    module._parameters[name] = nn.Parameter(OnSecond(weight.detach().clone()), requires_grad=trained)
            if module in parts or module._parameters:
                add_hook_to_module(module, Aligned(execution_device=device))
    add_hook_to_module(inner, Aligned(execution_device=torch.device("cpu"), io_same_device=True))
    inner.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    return model


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_model_spread_over_a_stand_in_trains_and_evaluates_as_on_one_device(lora, tmp_path, monkeypatch):
    if get_device().is_gpu:
        pytest.skip("stands in for the second GPU that this host may have")
    options = {"max_steps": 3} | ({} if lora else {"optim": "sgd", "learning_rate": 0.1})
    alone, _ = train(tmp_path / "alone", ranks=1, lora=lora, watched=False, options=options)
    with second_device(monkeypatch):
        model = spread_over_a_stand_in(lora=lora)
        assert {weight.device for weight in model.parameters()} == {SECOND, torch.device("cpu")}
        spread, _ = train(tmp_path / "spread", ranks=1, model=model, watched=False, options=options)
        evaluated = spread.evaluate()["eval_loss"]
        found = {name: held(weight) for name, weight in spread.model.named_parameters() if weight.requires_grad}
    assert losses_of(spread) == pytest.approx(losses_of(alone), abs=1e-5)
    assert evaluated == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-5)
    for name, weight in trained_weights(alone.model).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
