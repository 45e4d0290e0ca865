"""What many experts cost before they answer anything: time to load them, and memory of each.

    python benchmarks/loading.py --experts 4,64,256,1024

Every row is a process of its own. Experts of rank 8 on all linears of MiniLM, read from PEFT adapter folders, which lie
in the page cache. Memory is what the process keeps resident after loading, by each expert, divided by the bytes of its
matrices. PEFT: ``load_adapter`` on the same folders. Seconds are of CPU time: nothing waits for a disk here.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
import psutil
import torch
from script import listed, run

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.checkpoint.foreign_adapters import read_adapter
from sparse_ft.experts.model import SparseExpertModel


def load_ours(paths: list[Path]) -> str:
    model = SparseExpertModel(load_backbone("minilm")).eval()
    model.experts.add(
        read_adapter(paths[0], name="first", backbone=model.backbone).expert
    )  # so that everything is imported
    model.experts.remove("first")
    before, started = psutil.Process().memory_info().rss, time.process_time()
    experts = [read_adapter(path, name=f"e{index}", backbone=model.backbone).expert for index, path in enumerate(paths)]
    read = time.process_time()
    own = sum(part.nbytes for expert in experts for pair in expert.deltas.values() for part in pair)
    model.experts.add(*experts)
    added = time.process_time()
    del experts
    ratio = (psutil.Process().memory_info().rss - before) / own
    return f"{added - started:.2f} (read {read - started:.2f}, add {added - read:.2f}) | {ratio:.2f}"


def load_peft(paths: list[Path]) -> str:
    model = peers.mixed(1)
    model.load_adapter(str(paths[0]), adapter_name="first")  # so that everything is imported
    model.delete_adapter("first")
    own = sum(value.nbytes for name, value in model.named_parameters() if ".lora_" in name) * len(paths)
    before, started = psutil.Process().memory_info().rss, time.process_time()
    for index, path in enumerate(paths):
        model.load_adapter(str(path), adapter_name=f"loaded{index}")
    seconds = time.process_time() - started
    return f"{seconds:.2f} | {(psutil.Process().memory_info().rss - before) / own:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", default="4,64,256,1024")
    parser.add_argument("--peft", default="4,64", help="numbers of adapters for PEFT, whose time grows with the square")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=3, metavar=("WHO", "NUMBER", "FOLDER"), help="a single measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        who, number, folder = options.one
        paths = [Path(folder) / f"e{index}" / "e0" for index in range(int(number))]
        print({"ours": load_ours, "PEFT": load_peft}[who](paths))
        return
    wanted = [("ours", number) for number in listed(options.experts)]
    wanted += [("PEFT", number) for number in listed(options.peft)]
    print("| who | experts | CPU seconds | resident / own bytes |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        peers.saved(Path(folder), max(int(number) for _, number in wanted))
        for number in range(options.rounds):
            for who, count in wanted:
                command = [sys.executable, __file__, "--threads", str(options.threads), "--one", who, count, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                print(f"| {who}, round {number + 1} | {count} | {done.stdout.strip()} |", flush=True)


if __name__ == "__main__":
    run(main)
