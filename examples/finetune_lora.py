"""Fine-tune a model with LoRA, look at what it writes, save it, and load it again.

Without arguments it uses the embedded demo model and data, needs no network, and takes about a minute on a CPU:

    python examples/finetune_lora.py

With your own model and data (a JSON-lines file with the columns ``prompt`` and ``completion``):

    python examples/finetune_lora.py --model path/or/hub-id --data my_rows.jsonl --steps 200
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from pantheraml import FastLanguageModel
from pantheraml.assets import DEMO, demo_data, demo_model_dir

parser = argparse.ArgumentParser(description="LoRA fine-tune from loading to reloading.")
parser.add_argument("--model", default=str(demo_model_dir()), help="hub id or folder (default: the demo's model)")
parser.add_argument("--data", default=str(demo_data("train")), help="JSON-lines file (default: the demo's rows)")
parser.add_argument("--out", default="finetuned", help="folder for the results (default: %(default)s)")
parser.add_argument("--steps", type=int, default=DEMO.max_steps, help="optimizer steps (default: %(default)s)")
arguments = parser.parse_args()

# 1. Load. load_in_4bit=True would keep the frozen weights in nf4, which saves memory for a model of ordinary size.
model, tokenizer = FastLanguageModel.from_pretrained(
    arguments.model, max_seq_length=DEMO.max_seq_length, load_in_4bit=False
)

# 2. Add trainable low-rank matrices to the projections. All other weights stay as they are.
model = FastLanguageModel.get_peft_model(
    model,
    r=DEMO.r,
    lora_alpha=DEMO.lora_alpha,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    random_state=DEMO.seed,
)
print(model.adapt_report.summary())  # which modules run on fused operations, and which do not

# 3. Train with TRL's own trainer. The loss counts the completion's tokens only, since the rows name their prompt.
dataset = load_dataset("json", data_files=arguments.data, split="train")
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        output_dir=f"{arguments.out}/checkpoints",
        per_device_train_batch_size=DEMO.per_device_train_batch_size,
        learning_rate=DEMO.learning_rate,
        lr_scheduler_type=DEMO.lr_scheduler_type,
        warmup_steps=DEMO.warmup_steps,
        max_steps=arguments.steps,
        max_length=DEMO.max_seq_length,
        logging_steps=25,
        save_strategy="no",
        seed=DEMO.seed,
    ),
)
trainer.train()

# 4. Ask it something.
FastLanguageModel.for_inference(model)
inputs = tokenizer(dataset[0]["prompt"], return_tensors="pt").to(model.device)
written = model.generate(**inputs, max_new_tokens=DEMO.max_new_tokens, do_sample=False)
print(dataset[0]["prompt"].strip())
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# 5. Save the adapter alone (small; any PEFT program loads it) and the merged model (an ordinary transformers folder).
model.save_pretrained(f"{arguments.out}/adapter")
tokenizer.save_pretrained(f"{arguments.out}/adapter")
model.save_pretrained_merged(f"{arguments.out}/merged", tokenizer)

# 6. Load the adapter again, on top of its base, ready to train on.
again, tokenizer = FastLanguageModel.from_pretrained(f"{arguments.out}/adapter", load_in_4bit=False)
print(f"adapter, merged model and checkpoints are in {arguments.out}/")
