"""SIGTERM when no step follows that could agree on it."""

from __future__ import annotations

import signal

import pytest
from conftest import build_tokenizer
from training_support import panthera_model, texts
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


class AtTheEnd(TrainerCallback):
    """Signals the process when all steps are made."""

    def on_train_end(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_after_the_last_step_is_told_and_ends_nothing(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    trainer = SFTTrainer(
        model=panthera_model(),
        args=SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True),
        train_dataset=texts(),
        processing_class=build_tokenizer(),
        callbacks=[AtTheEnd()],
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert "SIGTERM came after the last step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
