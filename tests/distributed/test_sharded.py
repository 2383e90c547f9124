"""Sharded and copied, over two ranks and over four whose checkpoints two go on with: all train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import DEVICES, launch_once, of
from runs import GLOBAL_BATCH, losses_of, ragged_rows, save_tiny, tiny_qlora, train, trained_weights
from training_support import panthera_model
from transformers import AutoModelForCausalLM, TrainerCallback

STEPS, MIDDLE, LAYERS = 20, 10, 2
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}

# The first test waits for both launches.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=DEVICES)
def four(request, tmp_path_factory):
    """What four ranks found."""
    return launch_once("sharded_worker.py", 4, request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=DEVICES)
def two(request, tmp_path_factory):
    """What two ranks found; on a CPU they go on with what four wrote."""
    earlier = [launch_once("sharded_worker.py", 4, "cpu", tmp_path_factory).folder] if request.param == "cpu" else []
    return launch_once("sharded_worker.py", 2, request.param, tmp_path_factory, *earlier)


class Middle(TrainerCallback):
    """Remembers the weights in the middle of a run."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == MIDDLE:
            self.weights = trained_weights(kwargs["model"])


class Alone:
    """One process with the same global batch, trained once for each kind of model."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.tiny = folder, tiny
        self.known: dict[str, tuple] = {}

    def __call__(self, kind: str) -> tuple:
        """Losses, weights, evaluation loss, and weights in the middle."""
        if kind not in self.known:
            options = {"max_steps": STEPS, "lr_scheduler_type": "constant"}
            given = {
                "lora": lambda: {"options": options},
                "full": lambda: {"options": options | SGD, "lora": False},
                "tied": lambda: {
                    "options": options | SGD | {"max_steps": MIDDLE},
                    "model": panthera_model(lora=False, tied=True),
                },
                "qlora": lambda: {"options": options, "model": tiny_qlora(self.tiny)},
                "twice": lambda: {"options": options | {"per_device_train_batch_size": 2 * GLOBAL_BATCH}},
            }[kind]()
            middle = Middle()
            trainer, _ = train(self.folder / kind, ranks=1, watched=False, callbacks=(middle,), **given)
            evaluated = trainer.evaluate()["eval_loss"]
            self.known[kind] = losses_of(trainer), trained_weights(trainer.model), evaluated, middle.weights
        return self.known[kind]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    save_tiny(folder / "tiny")
    return Alone(folder, folder / "tiny")


RUNS = ["lora", "lora, accumulated", "qlora", "qlora, accumulated", "full", "full, accumulated", "tied"]
COPIED = [f"copied{kind}{how}" for kind in ("", " full", " qlora") for how in ("", ", accumulated")]
OF_FOUR = ["lora", "full", "copied", "hybrid", "qlora", "twice, accumulated"]
OF_FOUR += ["copied full", "copied qlora", "copied twice, accumulated"]
GONE_ON = ["lora, fewer", "full, fewer", "copied, fewer"]


def kind_of(run: str) -> str:
    name = run.split(",")[0]
    return "lora" if name in ("copied", "hybrid") else name.removeprefix("copied ")


def compare(launched, run: str, weights: dict[str, torch.Tensor]) -> None:
    """The weights of every rank are those, and those of the first rank to the last bit."""
    first, *others = (of(found, run) for found in launched.weights)
    assert first.keys() == weights.keys()
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    for name, weight in weights.items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=launched.tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("run", [*RUNS, "full, resumed", *GONE_ON, *COPIED])
def test_two_ranks_train_what_one_process_trains(run, two, alone):
    two.need(run)
    losses, weights, evaluated, _ = alone(kind_of(run))
    compare(two, run, weights)
    for facts in two.facts:
        assert facts[run]["losses"] == pytest.approx(losses, abs=two.tolerance)
        assert facts[run]["eval"] == pytest.approx(evaluated, abs=two.tolerance)
        assert facts[run]["steps"] == len(losses)


@pytest.mark.parametrize("run", RUNS)
def test_weights_and_optimizer_state_are_shards_and_every_layer_runs_as_one_node(run, two):
    two.need(run)
    for facts in two.facts:
        found = facts[run]
        assert found["sharded"]
        assert found["state sharded"]
        calls = LAYERS * found["steps"]
        assert found["node calls"] > calls if "accumulated" in run else found["node calls"] == calls


@pytest.mark.parametrize("run", OF_FOUR)
def test_four_ranks_train_what_one_process_trains(run, four, alone):
    four.need(run)
    losses, _, _, weights = alone(kind_of(run))
    compare(four, run, weights)
    for facts in four.facts:
        assert facts[run]["losses"] == pytest.approx(losses[:MIDDLE], abs=four.tolerance)
        assert facts[run]["sharded"] == (not run.startswith("copied"))


def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(two):
    whole, resumed = (of(two.weights[0], run) for run in ("full", "full, resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert two.facts[0]["full, resumed"]["losses"] == two.facts[0]["full"]["losses"]


def test_a_checkpoint_holds_shards_of_every_rank(four):
    checkpoint = four.folder / "full" / f"checkpoint-{MIDDLE}"
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert len(list((checkpoint / part).glob("*.distcp"))) == len(four.facts)
    assert not list(checkpoint.glob("*.safetensors"))
    assert (four.folder / "lora" / f"checkpoint-{MIDDLE}" / "adapter_model.safetensors").is_file()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ragged_rows(1)["input_ids"][0]])).logits.float()


@pytest.mark.parametrize(
    ("folder", "kind"), [("lora merged", "lora"), ("full by trainer", "full"), ("full merged", "full")]
)
def test_what_is_saved_whole_is_the_model_of_one_process(folder, kind, two, alone):
    model = panthera_model(lora=kind == "lora")
    model.load_state_dict(alone(kind)[1], strict=False)
    saved = AutoModelForCausalLM.from_pretrained(two.folder / folder)
    torch.testing.assert_close(logits(saved), logits(model), rtol=0, atol=10 * two.tolerance)


def test_adapters_are_saved_by_the_model_and_by_the_trainer(two):
    from peft import PeftModel

    weights = of(two.weights[0], "lora")
    for folder in ("lora saved", "lora by trainer"):
        base = AutoModelForCausalLM.from_pretrained(two.folder / "tiny")
        loaded = dict(PeftModel.from_pretrained(base, two.folder / folder).named_parameters())
        assert all(torch.equal(loaded[name].cpu(), weight) for name, weight in weights.items())


def test_saving_leaves_the_model_as_it_was(two):
    for facts in two.facts:
        for run in ("lora", "qlora, accumulated"):
            assert facts[run]["eval after saving"] == facts[run]["eval"]
