"""Several GPUs, as far as one process on a CPU can tell: options, batches, device maps, launches."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from training_support import panthera_model, texts

from pantheraml import distributed
from pantheraml.device import Device, get_device
from pantheraml.distributed import MultiGPUConfig, create_device_map, get_optimal_device_map
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, DeviceMemoryError, UnsupportedError
from pantheraml.models.record import record_of
from pantheraml.models.resolve import resolve_placement
from pantheraml.models.stream import layers_of
from pantheraml.parallel import fsdp
from pantheraml.parallel.batches import EvenBatches, evened
from pantheraml.parallel.ddp import ddp_options
from pantheraml.parallel.fsdp import shard
from pantheraml.parallel.launch import launch_module, processes_for
from pantheraml.parallel.parts import in_parts
from pantheraml.training import sharded
from pantheraml.training.ranks import settle

FOUR = Device("cuda", "cuda", 0, 4, "H100", (9, 0), 80 * 1024**3, True, True, True)


@pytest.fixture
def four_gpus(monkeypatch):
    for module in ("launch", "process_group", "device_map"):
        monkeypatch.setattr(f"pantheraml.parallel.{module}.get_device", lambda: FOUR)


def test_without_a_launch_everything_is_a_single_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.is_distributed_available()
    assert (distributed.get_rank(), distributed.get_local_rank(), distributed.get_world_size()) == (0, 0, 1)
    assert distributed.is_main_process()
    config = MultiGPUConfig()
    assert distributed.setup_distributed_training(config) is config
    assert isinstance(distributed.setup_multi_gpu(), MultiGPUConfig)
    assert not torch.distributed.is_initialized()
    with distributed.distributed_context(config) as inner:
        assert inner is config
    distributed.barrier()
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.all_reduce_scalar(torch.tensor(2.5)) == 2.5
    distributed.cleanup_distributed_training()
    distributed.cleanup_multi_gpu()
    model = make_tiny()
    assert distributed.wrap_model_for_distributed(model) is model
    assert distributed.get_sampler_for_distributed([1, 2]) is None


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 1, 4)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "2", "SLURM_NTASKS": "8"}, (5, 2, 8)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1)),
    ],
    ids=["torchrun", "srun", "a batch script itself"],
)
def test_ranks_before_the_group_are_the_launchers(launcher, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert (distributed.get_rank(), distributed.get_local_rank(), distributed.get_world_size()) == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tensor_parallel": True}, UnsupportedError),
        ({"pipeline_parallel": True}, UnsupportedError),
        ({"strategy": "zero"}, ConfigError),
        ({"backend": "nvlink"}, ConfigError),
        ({"timeout_minutes": 0}, ConfigError),
        ({"num_gpus": 0}, ConfigError),
        ({"shard_size": 2}, ConfigError),
        ({"context_parallel": 0}, ConfigError),
        ({"context_parallel": True}, ConfigError),
        ({"context_parallel": 2, "strategy": "device_map"}, ConfigError),
        ({"strategy": "fsdp", "shard_size": 1}, ConfigError),
        ({"use_gradient_checkpointing": "unsloth"}, ConfigError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_honoured_raise(options, error):
    with pytest.raises(error):
        MultiGPUConfig(**options)


@pytest.mark.parametrize("options", [{"num_gpus": 2}, {"strategy": "ddp"}, {"strategy": "fsdp"}], ids=str)
def test_asking_for_ranks_that_are_not_there_names_the_command(options):
    with pytest.raises((ConfigError, ConflictError), match="torchrun --nproc_per_node=2"):
        distributed.setup_distributed_training(MultiGPUConfig(**options))


def test_a_launch_without_an_address(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="where to meet"):
        distributed.setup_distributed_training()


# ---- batches


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 23], ids=lambda n: f"{n} rows")
@pytest.mark.parametrize(("batch", "ranks"), [(4, 2), (2, 3), (1, 4)], ids=["4x2", "2x3", "1x4"])
def test_batches_hold_every_row_once_and_rounds_are_whole(rows, batch, ranks):
    sampler = EvenBatches(SequentialSampler(range(rows)), batch, ranks)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-rows // (batch * ranks)) * ranks
    assert [index for one in batches for index in one if index >= 0] == list(range(rows))
    for one in batches:
        assert 1 <= len(one) <= batch
        assert min(one) >= 0 or len(one) == 1
    rounds = [[i for one in batches[at : at + ranks] for i in one if i >= 0] for at in range(0, len(batches), ranks)]
    plain = list(BatchSampler(SequentialSampler(range(rows)), batch * ranks, drop_last=False))
    assert rounds == plain, "the rows of a step are those of one process with the whole batch"


def test_an_idle_row_has_no_labels():
    rows = texts(3).map(lambda row, i: {"x": i}, with_indices=True, remove_columns=["text"])

    def collate(batch):
        return {"x": torch.tensor([row["x"] for row in batch]), "labels": torch.ones(len(batch), 2)}

    loader = evened(DataLoader(rows, batch_size=1, sampler=SequentialSampler(rows), collate_fn=collate), 2)
    batches = list(loader)
    assert [batch["x"].tolist() for batch in batches] == [[0], [1], [2], [2]]
    assert [bool((batch["labels"] == -100).all()) for batch in batches] == [False, False, False, True]


def test_loaders_that_are_dealt_out_otherwise_stay():
    for loader in (DataLoader(range(5), batch_size=2, drop_last=True), DataLoader(range(5), batch_sampler=[[1], [2]])):
        assert evened(loader, 2) is loader
    kept = evened(DataLoader(range(5), batch_size=2, sampler=RandomSampler(range(5)), pin_memory=False), 2)
    assert isinstance(kept.batch_sampler, EvenBatches)


# ---- device maps


def test_device_map_by_number_of_layers():
    config = make_tiny(num_hidden_layers=5).config
    placed = create_device_map(config, 2)
    assert [placed[f"model.layers.{i}"] for i in range(5)] == [0, 0, 0, 1, 1]
    assert (placed["model.embed_tokens"], placed["model.norm"], placed["lm_head"]) == (0, 1, 1)
    names = {name.split(".layers.")[0] for name in placed}
    assert all(any(name.startswith(part) for part in names) for name, _ in make_tiny().named_parameters())
    for wrong in (0, 6):
        with pytest.raises(ConfigError):
            create_device_map(config, wrong)
    with pytest.raises(ArgumentError):
        create_device_map(object(), 2)


def bytes_on(model, placed) -> dict:
    totals: dict = {}
    for name, parameter in model.named_parameters():
        owner = max((part for part in placed if name.startswith(part)), key=len)
        totals[placed[owner]] = totals.get(placed[owner], 0) + parameter.numel() * parameter.element_size()
    return totals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimal_device_map_keeps_the_caps_and_the_layers_whole(dtype):
    model = make_tiny(num_hidden_layers=8, hidden_size=128, dtype=dtype)
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    cap = int(0.7 * total)
    placed = get_optimal_device_map(model, max_memory={0: cap, 1: cap})
    held = bytes_on(model, placed)
    assert held.keys() == {0, 1}
    assert max(held.values()) <= cap
    assert not any(".self_attn" in name or ".mlp" in name for name in placed)
    with pytest.raises(DeviceMemoryError, match="does not fit into 0: "):
        get_optimal_device_map(model, max_memory={0: total // 4, 1: total // 4})
    with pytest.raises(ConfigError, match="names 2 devices"):
        get_optimal_device_map(model, 3, {0: cap, 1: cap})


def test_optimal_device_map_of_one_device(four_gpus, monkeypatch):
    model = make_tiny()
    assert get_optimal_device_map(model, 1) == {"": 0}
    with pytest.raises(ConfigError, match="sees 4 GPUs"):
        get_optimal_device_map(model, 5)
    monkeypatch.setattr("pantheraml.parallel.device_map.get_device", get_device)
    if get_device().type == "cpu":
        assert get_optimal_device_map(model) == {"": "cpu"}


@pytest.mark.parametrize("wish", ["cuda", "cuda:1", 1, {"": 1}, {"model": "cuda:1", "lm_head": "cpu"}], ids=str)
def test_a_process_of_a_launch_loads_onto_its_own_device_or_the_host(wish, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    placed = resolve_placement(dataclasses.replace(FOUR, index=1), device_map=wish)
    assert placed == (wish if isinstance(wish, dict) else {"": "cuda:1" if wish == "cuda" else wish})


@pytest.mark.parametrize("wish", ["cuda:0", 0, {"": 0}, {"model": 1, "lm_head": 2}], ids=str)
def test_a_device_of_another_process_is_refused(wish, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConflictError, match="its own device"):
        resolve_placement(dataclasses.replace(FOUR, index=1), device_map=wish)


def test_staying_on_one_gpu_can_be_insisted_on():
    assert resolve_placement(FOUR, weight_bytes=200 * 1024**3) == "balanced"
    assert resolve_placement(FOUR, weight_bytes=200 * 1024**3, use_multi_gpu=False) == {"": "cuda:0"}


# ---- options of the trainer


def test_unused_weights_are_looked_for_where_a_step_may_leave_some():
    assert not ddp_options(panthera_model())["find_unused_parameters"]
    assert ddp_options(panthera_model(), MultiGPUConfig(find_unused_parameters=True))["find_unused_parameters"]
    experts = make_tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert ddp_options(experts)["find_unused_parameters"]


def test_gradients_of_adapters_travel_at_once_and_buffers_stay():
    options = ddp_options(panthera_model())
    assert options["bucket_cap_mb"] == 1
    assert not options["broadcast_buffers"]
    assert ddp_options(torch.nn.Sequential(torch.nn.BatchNorm1d(2)))["broadcast_buffers"]
    large = torch.nn.Linear(1, 1)
    large.weight = torch.nn.Parameter(torch.empty(300 * 2**18, 1, device="meta"))
    assert "bucket_cap_mb" not in ddp_options(large)


@pytest.mark.filterwarnings("ignore")
class TestTrainer:
    @staticmethod
    def made(folder, tokenizer, *, model=None, config=None, count=1, monkeypatch=None):
        from pantheraml.trainer import PantheraMLDistributedTrainer, PantheraMLTrainingArguments

        args = PantheraMLTrainingArguments(output_dir=str(folder), max_steps=1, optim="adamw_torch")
        if count > 1:
            args._setup_devices  # noqa: B018
            args._n_gpu = count
        return PantheraMLDistributedTrainer(
            model=model or panthera_model(),
            args=args,
            train_dataset=texts(8),
            processing_class=tokenizer,
            multi_gpu_config=config,
        )

    def test_one_process_with_several_gpus_uses_one_and_says_how_to_use_all(self, tmp_path, tiny_tokenizer, capsys):
        trainer = self.made(tmp_path, tiny_tokenizer, count=4)
        assert trainer.args.n_gpu == 1
        assert trainer.args.train_batch_size == trainer.args.per_device_train_batch_size
        told = capsys.readouterr().err
        assert f"training on one of 4 GPUs; for all of them: torchrun --nproc_per_node=4 {sys.argv[0]}" in told

    def test_the_config_is_applied(self, tmp_path, tiny_tokenizer, capsys):
        config = MultiGPUConfig(use_gradient_checkpointing=False, find_unused_parameters=True)
        trainer = self.made(tmp_path, tiny_tokenizer, model=panthera_model(checkpointing=True), config=config)
        assert trainer.args.ddp_find_unused_parameters is True
        trainer.train()
        assert trainer.args.gradient_checkpointing is False
        usage = trainer.get_model_memory_usage()
        assert all(row.keys() == {"allocated", "cached", "max_allocated"} for row in usage.values())
        trainer.print_memory_stats()
        assert "max_allocated" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("places", "options"),
        [
            ({"model": 0, "lm_head": 1}, {"auto_device_map": False}),
            ({"": 0}, {"strategy": "device_map"}),
        ],
        ids=["spread and not wanted", "wanted and not spread"],
    )
    def test_a_model_on_other_devices_than_the_config_says(self, places, options, tmp_path, tiny_tokenizer):
        model = panthera_model()
        object.__setattr__(model, "hf_device_map", places)
        with pytest.raises(ConflictError, match="device"):
            self.made(tmp_path, tiny_tokenizer, model=model, config=MultiGPUConfig(**options))

    def test_processes_that_the_trainer_does_not_see_are_an_error(self, tmp_path, tiny_tokenizer, monkeypatch):
        from pantheraml.trainer import PantheraMLTrainer, PantheraMLTrainingArguments

        args = PantheraMLTrainingArguments(output_dir=str(tmp_path), max_steps=1)
        assert args.world_size == 1
        monkeypatch.setattr("pantheraml.training.ranks.env.world_size", lambda: 2)
        with pytest.raises(ConflictError, match="2 processes, and the trainer sees one"):
            PantheraMLTrainer(
                model=panthera_model(), args=args, train_dataset=texts(8), processing_class=tiny_tokenizer
            )

    @pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
    def test_other_dimensions_are_refused(self, name, tmp_path):
        args = SimpleNamespace(world_size=1, n_gpu=1, parallelism_config=SimpleNamespace(**{name: 2}))
        with pytest.raises(UnsupportedError, match=f"{name}=2"):
            settle(args, panthera_model(), frozenset())


SHARDED = {"world_size": 2, "fsdp": True, "optim": "adamw_torch", "fsdp_config": {}}


@pytest.mark.parametrize(
    ("options", "quantization", "explicit", "error", "told"),
    [
        ({"fsdp_config": {"version": 1}}, "none", (), UnsupportedError, "FSDP1"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "none", (), ConflictError, "a plan of its own"),
        ({}, "int8", (), UnsupportedError, "int8 cannot be sharded"),
        ({}, "fp8", (), UnsupportedError, "fp8 cannot be sharded"),
        ({"optim": "adamw_8bit"}, "none", ("optim",), ConflictError, "adamw_torch_fused"),
    ],
    ids=["FSDP1", "checkpointing", "int8", "fp8", "optimizer"],
)
def test_what_does_not_go_with_sharding_raises(options, quantization, explicit, error, told):
    record = SimpleNamespace(quantization=quantization)
    with pytest.raises(error, match=told):
        sharded.settle(SimpleNamespace(**SHARDED | options), torch.nn.Linear(1, 1), record, frozenset(explicit))
    sharded.settle(
        SimpleNamespace(**SHARDED | options | {"fsdp": None}), torch.nn.Linear(1, 1), record, frozenset(explicit)
    )


def test_the_default_optimizer_of_a_sharded_run_has_sharded_state():
    args = SimpleNamespace(**SHARDED | {"optim": "adamw_8bit"})
    sharded.settle(args, torch.nn.Linear(1, 1), SimpleNamespace(quantization="nf4"), frozenset())
    assert args.optim.value == ("adamw_torch_fused" if get_device().is_gpu else "adamw_torch")


# ---- launching


def test_how_many_processes_a_wish_for_gpus_means(four_gpus):
    assert [processes_for(wish) for wish in ("auto", 1, 4)] == [4, 1, 4]
    with pytest.raises(ConfigError, match="sees 4"):
        processes_for(5)


def test_processes_on_a_cpu_have_to_be_asked_for(monkeypatch):
    cpu = dataclasses.replace(FOUR, type="cpu", torch_type="cpu", count=1)
    monkeypatch.setattr("pantheraml.parallel.launch.get_device", lambda: cpu)
    monkeypatch.delenv("PANTHERAML_DEVICE", raising=False)
    assert processes_for("auto") == 1
    with pytest.raises(UnsupportedError, match="PANTHERAML_DEVICE=cpu"):
        processes_for(2)
    monkeypatch.setenv("PANTHERAML_DEVICE", "cpu")
    assert processes_for(2) == 2


def test_the_exit_code_of_a_launch_is_that_of_the_process_that_failed_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "failing.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(6)\ntime.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert launch_module("failing", [], 2) == 6
    assert "rank 1 of 2 ended with exit code 6" in capsys.readouterr().err


# ---- loading in shards


def test_layers_that_share_weights_are_not_sharded():
    shared = torch.nn.Linear(2, 2)
    layers = [torch.nn.Sequential(shared), torch.nn.Sequential(shared)]
    with pytest.raises(UnsupportedError, match="share weights"):
        shard(torch.nn.Sequential(*layers), layers)


def test_a_model_in_parts_is_whole_in_host_memory_with_the_vectors_that_no_rank_divides(monkeypatch):
    monkeypatch.setattr(fsdp, "in_parts", lambda _: True)
    model = make_tiny().eval().requires_grad_(False)
    rows = torch.arange(5)[None]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 1:
                    elsewhere = FakeTensor(mode, parameter.detach().to("meta"), torch.device("cuda", 0))
                    module._parameters[name] = torch.nn.Parameter(elsewhere, requires_grad=False)
        before = list(model.parameters())
        assert {parameter.device.type for parameter in before} == {"cpu", "cuda"}
        with fsdp.whole(model) as here:
            assert here
            assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
            assert model(rows).logits.device.type == "cpu"
        assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_a_layer_of_a_checkpoint_is_read_at_a_time():
    expected = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.weight", "model.norm.weight"]
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.weight",
        "model.layers.0.mlp.weight.absmax",
        "model.layers.0.experts.7.up.weight",
        "model.layers.10.mlp.weight",
        "lm_head.weight",
        "lm_head.weight.quant_state.bitsandbytes__nf4",
        "other.a",
        "other.b",
    ]
    assert layers_of(names, expected) == [names[:1], names[1:4], names[4:5], names[5:7], names[7:]]


def test_shards_need_a_launch_and_the_config_speaks_for_the_loader(tiny_llama_dir):
    from pantheraml import FastLanguageModel

    with pytest.raises(ConflictError, match="one process for each GPU"):
        FastLanguageModel.from_pretrained(str(tiny_llama_dir), multi_gpu_config=MultiGPUConfig(strategy="fsdp"))
    config = MultiGPUConfig(use_gradient_checkpointing=False)
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), load_in_4bit=False, multi_gpu_config=config)
    assert record_of(model).gradient_checkpointing is False
    assert record_of(model).multi_gpu_config is config
    assert not in_parts(model)
