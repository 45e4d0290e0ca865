"""Load in a new process gives the logits that were there at save, bit for bit.

Kill at any moment, resume, and end where the uninterrupted run ends: training/test_resume.py.
"""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from toys import JOINT

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint

TEXTS = ["the table loved", "", "Ada Lovelace met Mozart in London", "at six " * 60]

SCRIPT = """
import json, sys, torch, safetensors.torch, sparse_ft
torch.set_num_threads(1)
texts, paths = json.loads(sys.argv[1]), sys.argv[2:]
for path in paths:
    model = sparse_ft.load(path, device="cpu")
    rows = {"mood": model.logits(texts, "mood")}
    rows |= {f"names/{index}": row for index, row in enumerate(model.logits(texts, "names"))}
    sys.stdout.buffer.write(safetensors.torch.save(rows).hex().encode() + b"\\n")
"""


def test_a_new_process_computes_the_same_logits(toys, joint_toys):
    paths = [toys, *map(joint_toys, JOINT)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(TEXTS), *map(str, paths)],
        check=True, stdout=subprocess.PIPE, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for path, line in zip(paths, done.stdout.split(), strict=True):
        there, model = safetensors.torch.load(bytes.fromhex(line)), sparse_ft.load(path, device="cpu")
        assert torch.equal(there["mood"], model.logits(TEXTS, "mood"))
        for index, row in enumerate(model.logits(TEXTS, "names")):
            assert torch.equal(there[f"names/{index}"], row)


@pytest.mark.parametrize("kind", ["own experts", *JOINT])
def test_saving_what_was_loaded_gives_the_same_bytes(toys, joint_toys, tmp_path, kind):
    path = joint_toys(kind) if kind in JOINT else toys
    loaded = load_checkpoint(path)
    save_checkpoint(
        tmp_path / "out", model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics
    )
    contents = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (path, tmp_path / "out")
    ]
    assert contents[0] == contents[1]
