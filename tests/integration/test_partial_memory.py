"""A client's memory holds its own part of a backbone, and never the rest: measured on a sharded checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from .processes import environment

CONFIG = LlamaConfig(
    vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
)
MEASURE = """
import json, re, sys, torch
from pathlib import Path
from fellrec.models.partial import load_partial

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

def load(folder, side):
    return load_partial(Path(folder), side, 1, 1, torch.float32)

load(sys.argv[2], "client")  # whatever the libraries load at their first use
before = peak()
part = load(sys.argv[1], sys.argv[3])
print(json.dumps({"bytes": sum(p.nbytes for p in part.parameters()), "grown": peak() - before}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A checkpoint in many files, a tiny one, and the bytes of the first one's weights."""
    large, tiny = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("tiny")
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.save_pretrained(large, max_shard_size="30MB")
    small = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    AutoModelForCausalLM.from_config(small).save_pretrained(tiny)
    return large, tiny, sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("side", ["client", "server"])
def test_no_side_ever_holds_the_whole_model(folders: tuple[Path, Path, int], side: str) -> None:
    """12 layers of 28 MB in files of 30 MB: the client's two layers and vocabulary are 18 % of 345 MB.

    The bound is the partial model, the largest tensor once more (as it is read), and 16 MB for the allocator.
    """
    large, tiny, whole = folders
    assert len(list(large.glob("*.safetensors"))) > 10
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), str(tiny), side],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    largest = 2048 * 768 * torch.float32.itemsize
    assert found["bytes"] < (0.19 if side == "client" else 0.84) * whole
    assert found["bytes"] <= found["grown"] < found["bytes"] + largest + 16e6
