"""Four tasks' answers for the same texts, against one pass of the bare backbone.

    python benchmarks/all_tasks.py

Three tasks on texts and one on words; MiniLM, experts of rank 8 on all linears, weights random. Every figure is the
median of rounds in which all variants take turns, divided by the bare backbone's pass in the same round.
"""

import argparse
import statistics

import peers
import torch
from layers import random_expert
from script import run
from timing import measure, ratio

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.batching import collate
from sparse_ft.backbone.encoding import Example
from sparse_ft.experts.inference import with_trunks
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.routing import ForwardPass, Routing

TASKS = ["mood", "subject", "wish", "names"]


def expert_model(first_block: int) -> SparseExpertModel:
    """Build a model with an expert and a head for each task, from a block upwards."""
    model = SparseExpertModel(load_backbone("minilm")).eval()
    modules = set(model.backbone.select_linears(first_block=first_block))
    generator = torch.Generator().manual_seed(0)
    for task in TASKS:
        expert = random_expert(model, task, generator)
        expert.deltas = {module: pair for module, pair in expert.deltas.items() if module in modules}
        expert.__post_init__()
        model.experts.add(expert)
        words = task == "names"
        model.add_task(task, expert=task, level="word" if words else "text", num_outputs=9 if words else 4)
    return model


def shared_trunk(model: SparseExpertModel, examples: list[Example]) -> torch.Tensor:
    """Answer every task with its own expert; what lies below the experts is computed once."""
    rows = with_trunks(model, examples)
    answers = []
    for task in TASKS:
        batch = collate([(task, row) for row in rows], pad_id=model.backbone.pad_id, device=model.device)
        answers.append(model(batch)[task].flatten())
    return torch.cat(answers)


def gated_pass(model: SparseExpertModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Answer every task from one pass in which each token uses all experts, with one set of weights."""
    rows, tokens = inputs["input_ids"].shape
    with model.slot.filled(ForwardPass(Routing(None, torch.full((rows, tokens, len(TASKS)), 1 / len(TASKS))))):
        hidden = model.encoder(**inputs).last_hidden_state
        read = [hidden if model.tasks[task].level == "word" else hidden.mean(1) for task in TASKS]
        return torch.cat([model.head(task)(states).flatten() for task, states in zip(TASKS, read, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="32x32", help="rows x tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, tokens = (int(part) for part in options.shape.split("x"))
    ids = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    every = list(range(tokens))  # each token is a word
    examples = [
        Example(row=index, input_ids=row, word_positions=every, word_indices=every)
        for index, row in enumerate(ids.tolist())
    ]
    repeated = {name: value.repeat(len(TASKS), 1) for name, value in inputs.items()}
    bare = load_backbone("minilm").model
    copies = [load_backbone("minilm").model for _ in TASKS]
    peft = peers.mixed(len(TASKS))
    names = [f"e{index}" for index in range(len(TASKS)) for _ in range(rows)]
    upper, top, gated = expert_model(3), expert_model(5), expert_model(0)

    def switched() -> torch.Tensor:
        answers = []
        for index in range(len(TASKS)):
            peft.set_adapter(f"e{index}")
            answers.append(peft(**inputs).last_hidden_state.mean(1))
        return torch.stack(answers)

    variants = {
        "bare backbone, one pass": lambda: bare(**inputs).last_hidden_state.mean(1),
        "four separate models": lambda: torch.stack([model(**inputs).last_hidden_state.mean(1) for model in copies]),
        "PEFT, set_adapter x 4": switched,
        "PEFT, adapter_names, the batch x 4": lambda: peft(**repeated, adapter_names=names).last_hidden_state.mean(1),
        "ours, own experts in the upper half of the blocks": lambda: shared_trunk(upper, examples),
        "ours, own experts in the last block": lambda: shared_trunk(top, examples),
        "ours, one gated pass over all experts in all blocks": lambda: gated_pass(gated, inputs),
    }
    with torch.no_grad():
        seconds = measure(variants, rounds=options.rounds)
    print(f"| four tasks, {options.shape} | ms | / one bare pass |\n|---|---:|---:|")
    for name, values in seconds.items():
        median = statistics.median(values) * 1000
        print(f"| {name} | {median:.1f} | {ratio(seconds, name, 'bare backbone, one pass'):.2f} |")


if __name__ == "__main__":
    run(main)
