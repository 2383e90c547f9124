"""Ranks of a launcher that stops nobody end by themselves when one has failed, and say why."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
from launching import ENVIRONMENT, HERE

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def started(folder, how: str) -> tuple[list[int], list[str]]:
    """Exit codes of two ranks, and what they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [sys.executable, HERE / "unattended_worker.py", folder, how],
                env=ENVIRONMENT | {name: str(value) for name, value in about.items()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], told


@pytest.mark.parametrize(
    ("how", "failed", "fault", "told"),
    [
        ("prepare", 0, "LookupError: the fault of rank zero", "while this one waited for it"),
        ("step", 1, "LookupError: the fault of rank one", "another rank has failed, and this one"),
    ],
)
def test_a_rank_that_waits_for_one_that_failed_ends(how, failed, fault, told, tmp_path):
    start = time.monotonic()
    codes, texts = started(tmp_path, how)
    assert all(codes)
    assert fault in texts[failed]
    assert told in texts[1 - failed]
    assert time.monotonic() - start < 60


def test_ranks_go_on_from_the_checkpoint_of_the_main_process_or_not_at_all(tmp_path):
    codes, texts = started(tmp_path, "resume")
    assert all(codes)
    # Whoever is slower may find the other gone.
    (told, *_) = [text for text in texts if "rank 1 of 2 does not see the checkpoint" in text]
    assert "where: run/checkpoint-2" in told
