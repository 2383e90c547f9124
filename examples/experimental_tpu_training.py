"""Fine-tune a model with LoRA on all cores of a TPU, save it, and say what was compiled. Experimental.

On a TPU host:

    PJRT_DEVICE=TPU python examples/experimental_tpu_training.py --model Qwen/Qwen3-0.6B --steps 100

Without a TPU, with torch_xla's CPU backend as eight devices, and the embedded demo model and data (a few minutes):

    PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 python examples/experimental_tpu_training.py
"""

from __future__ import annotations

import argparse

from datasets import load_dataset

from pantheraml import (
    FastLanguageModel,
    PantheraMLTPUTrainer,
    PantheraMLTrainingArguments,
    get_tpu_status,
    setup_tpu_training,
)
from pantheraml.assets import DEMO, demo_data, demo_model_dir

parser = argparse.ArgumentParser(description="LoRA on all cores of a TPU.")
parser.add_argument("--model", default=str(demo_model_dir()), help="hub id or folder (default: the demo's model)")
parser.add_argument("--data", default=str(demo_data("train")), help="JSON-lines file with prompt and completion")
parser.add_argument("--out", default="finetuned-tpu", help="folder for the results (default: %(default)s)")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
parser.add_argument("--batch", type=int, default=2, help="rows of each core (default: %(default)s)")
arguments = parser.parse_args()

# 1. Set up the mesh: all cores, weights divided among them.
setup_tpu_training()

# 2. Load in bf16, sent to the cores in parts, and add LoRA.
model, tokenizer = FastLanguageModel.from_pretrained(
    arguments.model, max_seq_length=DEMO.max_seq_length, load_in_4bit=False, use_tpu=True
)
model = FastLanguageModel.get_peft_model(model, r=DEMO.r, lora_alpha=DEMO.lora_alpha, random_state=DEMO.seed)

# 3. Train. Batches have one shape, so one program is compiled for a step and none after the third.
trainer = PantheraMLTPUTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
    args=PantheraMLTrainingArguments(
        output_dir=f"{arguments.out}/checkpoints",
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=1,
        learning_rate=DEMO.learning_rate,
        max_steps=arguments.steps,
        max_length=DEMO.max_seq_length,
        logging_steps=10,
        save_strategy="no",
        seed=DEMO.seed,
    ),
)
trainer.train()
trainer.print_memory_stats()
status = get_tpu_status()
print(f"{status['world_size']} cores, {status['compiled_functions']} programs compiled")

# 4. Save the adapter and the merged model; both load on any machine.
model.save_pretrained(f"{arguments.out}/adapter")
model.save_pretrained_merged(f"{arguments.out}/merged", tokenizer)
print(f"adapter and merged model are in {arguments.out}/")
trainer.cleanup()
