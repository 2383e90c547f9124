"""Uploads against a local stand-in of the hub, in a process of its own as users have it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from safetensors.torch import load

import pantheraml

TOKEN = "hf_" + "s" * 30  # not a real one
SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.DEBUG)
from pantheraml import FastLanguageModel
from pantheraml.errors import PantheraMLError
torch.set_num_threads(1)
folder, token, out = sys.argv[1:4]
model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=64, dtype=torch.float32, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=4, use_rslora=True)
"""


def push(tiny_llama_dir: Path, tmp_path: Path, hub: HubStandIn, body: str, token: str = TOKEN):
    """Run ``body`` with a model at hand; returns the finished process."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    root = str(Path(pantheraml.__file__).parent.parent)
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(body), str(tiny_llama_dir), token, str(tmp_path / "out")],
        env={**environment, **home, "PYTHONPATH": root, "HF_HUB_DISABLE_TELEMETRY": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_models_adapters_and_gguf_files_are_pushed(tiny_llama_dir, tmp_path):
    pytest.importorskip("gguf")
    with HubStandIn(TOKEN) as hub:
        done = push(
            tiny_llama_dir,
            tmp_path,
            hub,
            """
            print(model.push_to_hub_merged(
                "mine", tokenizer, private=True, token=token, commit_message="All of it", commit_description="More",
                revision="v2", tags=["fun"], datasets=["org/data"], max_shard_size="60KB"))
            print(model.push_to_hub_merged("org/lora", tokenizer, save_method="lora", token=token))
            print(model.push_to_hub_gguf("org/files", tokenizer, ["q8_0", "f16"], token=token, tags=["small"]))
            print(model.push_to_hub_ggml("org/files", token=token))
            """,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["someone/mine", "org/lora", "org/files", "org/files"]
    assert TOKEN not in done.stdout + done.stderr
    assert hub.authorizations == {f"Bearer {TOKEN}"}

    merged = hub.repositories["someone/mine"]
    assert merged.private is True
    assert [(c["revision"], c["summary"], c["description"]) for c in merged.commits] == [("v2", "All of it", "More")]
    shards = [name for name in merged.files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"} <= merged.files.keys()
    assert {name for shard in shards for name in load(merged.files[shard])} >= {"model.embed_tokens.weight"}
    card = ModelCard(merged.files["README.md"].decode())
    assert {"fun", "pantheraml", "llama", "transformers"} <= set(card.data.tags)
    assert card.data.datasets == ["org/data"]
    assert "r 4, lora_alpha 16" in card.text
    assert "use_rslora True" in card.text
    assert f"pantheraml {pantheraml.__version__}" in card.text
    assert "float32, none" in card.text

    lora = hub.repositories["org/lora"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= lora.files.keys()
    assert lora.commits[0]["revision"] == "main"
    files = hub.repositories["org/files"].files
    assert {"files.Q8_0.gguf", "files.F16.gguf", "files.F16-LoRA.gguf", "Modelfile", "README.md"} == files.keys()
    assert all(content.startswith(b"GGUF") for name, content in files.items() if name.endswith("gguf"))
    assert not [
        content
        for repository in hub.repositories.values()
        for content in repository.files.values()
        if TOKEN.encode() in content
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) in (["home"], [])


def test_a_wrong_token_costs_no_work_and_is_not_shown(tiny_llama_dir, tmp_path):
    with HubStandIn(TOKEN) as hub:
        done = push(
            tiny_llama_dir,
            tmp_path,
            hub,
            """
            import pantheraml.export.merge as merge
            merge.save_merged = None
            for call in (model.push_to_hub_merged, model.push_to_hub_gguf):
                try:
                    call("mine", tokenizer, token=token)
                except PantheraMLError as error:
                    print(type(error).__name__, error.what)
                    print(error)
            """,
            token="hf_wrong_one",
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("CheckpointError cannot create or open the repository 'mine'") == 2
    assert "hf_wrong_one" not in done.stdout + done.stderr
    assert hub.repositories == {}


def test_the_command_line_pushes(tiny_llama_dir, tmp_path):
    with HubStandIn(TOKEN) as hub:
        done = push(
            tiny_llama_dir,
            tmp_path,
            hub,
            """
            from pantheraml.cli import main
            model.save_pretrained(out + "-adapter")
            tokenizer.save_pretrained(out + "-adapter")
            flags = ["--push-to-hub", "--repo-id", "org/cli", "--private", "--datasets", "org/data", "--json"]
            raise SystemExit(main(["export", out + "-adapter", out, "--hub_token", token, *flags]))
            """,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    assert '"repository": "org/cli"' in done.stdout
    repository = hub.repositories["org/cli"]
    assert repository.private is True
    assert {"model.safetensors", "README.md", "config.json"} <= repository.files.keys()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == repository.files["model.safetensors"]
    assert ModelCard(repository.files["README.md"].decode()).data.datasets == ["org/data"]
    assert load(io.BytesIO(repository.files["model.safetensors"]).read())
