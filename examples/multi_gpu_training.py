"""Fine-tune on every GPU of a host, or of several hosts. The script is the one for a single GPU; the launch is not:

    torchrun --nproc_per_node=4 examples/multi_gpu_training.py

Without a launch it trains on one device. Without arguments it uses the embedded demo model and data, needs no network,
and runs on a CPU too (``PANTHERAML_DEVICE=cpu torchrun --nproc_per_node=2 ...`` tries two processes out).

``--advanced`` chooses the timeout itself, checks the number of processes and prints the memory of every GPU.
``--advanced --strategy fsdp`` shards the model over the GPUs instead of copying it.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset

from pantheraml import FastLanguageModel
from pantheraml.assets import DEMO, demo_data, demo_model_dir
from pantheraml.distributed import MultiGPUConfig, get_world_size, is_main_process, setup_distributed_training
from pantheraml.trainer import PantheraMLDistributedTrainer, PantheraMLTrainer, PantheraMLTrainingArguments

parser = argparse.ArgumentParser(description="LoRA fine-tune on several GPUs.")
parser.add_argument("--model", default=str(demo_model_dir()), help="hub id or folder (default: the demo's model)")
parser.add_argument("--data", default=str(demo_data("train")), help="JSON-lines file with prompt and completion")
parser.add_argument("--out", default="multi-gpu", help="folder for the results (default: %(default)s)")
parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
parser.add_argument("--advanced", action="store_true", help="use PantheraMLDistributedTrainer and a MultiGPUConfig")
parser.add_argument("--strategy", choices=("auto", "ddp", "fsdp"), default="auto", help="for --advanced")
arguments = parser.parse_args()

config = MultiGPUConfig(timeout_minutes=60, num_gpus=get_world_size(), strategy=arguments.strategy)
if arguments.advanced:
    # Needed only for choices that have to be made before the processes meet: backend, address, timeout.
    setup_distributed_training(config)

# Each process loads its own copy onto its own GPU, or its shard of the model where the config says so.
model, tokenizer = FastLanguageModel.from_pretrained(
    arguments.model,
    max_seq_length=DEMO.max_seq_length,
    load_in_4bit=False,
    multi_gpu_config=config if arguments.advanced else None,
)
model = FastLanguageModel.get_peft_model(model, r=DEMO.r, lora_alpha=DEMO.lora_alpha, random_state=DEMO.seed)

# The batch of a step is per_device_train_batch_size x gradient_accumulation_steps x the number of processes.
settings = PantheraMLTrainingArguments(
    output_dir=arguments.out,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    max_steps=arguments.steps,
    learning_rate=DEMO.learning_rate,
    save_strategy="no",
    auto_scale_lr=False,  # True multiplies learning_rate by the number of processes
)
rows = load_dataset("json", data_files=arguments.data, split="train")
options = {"model": model, "processing_class": tokenizer, "args": settings, "train_dataset": rows}
if arguments.advanced:
    trainer = PantheraMLDistributedTrainer(**options, multi_gpu_config=config)
else:
    trainer = PantheraMLTrainer(**options)
trainer.train()

if arguments.advanced:
    trainer.print_memory_stats()  # every process has to call it

# Every process has to call this; the first one writes.
trainer.save_model(f"{arguments.out}/adapter")
if is_main_process():
    print(f"trained on {get_world_size()} process(es); the adapter is in {arguments.out}/adapter")
