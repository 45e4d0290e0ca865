"""Four tasks' answers for the same texts, against one pass of the bare backbone.

    python benchmarks/all_tasks.py

Three tasks on texts and one on words; MiniLM, experts of rank 8 on all linears, weights random. Every figure is the
median of rounds in which all variants take turns, divided by the bare backbone's pass in the same round.
"""

import argparse
import functools
import statistics

import peers
import torch
from layers import random_expert
from script import run
from timing import measure, ratio

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.backbone.encoding import Example
from sparse_ft.experts.inference import EncodedTexts, logits_by_task
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.experts.routing import ForwardPass, Routing

TASKS = ["mood", "subject", "wish", "names"]


def expert_model(first_block: int, *, shared: bool = False, pool: bool = False) -> SparseExpertModel:
    """Build a model with a head for each task.

    Args:
        first_block: Lowest block with experts of the tasks' own.
        shared: Whether one more expert, of rank 32, serves all tasks in the blocks below.
        pool: Whether the first task's expert serves all tasks.
    """
    model = SparseExpertModel(load_backbone("minilm")).eval()
    own, generator = set(model.backbone.select_linears(first_block=first_block)), torch.Generator().manual_seed(0)
    if shared:
        add_expert(model, "shared", generator, modules=set(model.backbone.linears) - own, rank=32)
    for task in TASKS:
        if not pool or task == TASKS[0]:
            add_expert(model, task, generator, modules=own)
        words, expert = task == "names", TASKS[0] if pool else task
        outputs, level = (9, "word") if words else (4, "text")
        model.add_task(task, expert=expert, level=level, num_outputs=outputs, shared="shared" if shared else None)
    return model


def add_expert(
    model: SparseExpertModel, name: str, generator: torch.Generator, *, modules: set[str], rank: int = 8
) -> None:
    expert = random_expert(model, name, generator, rank=rank)
    deltas = {module: pair for module, pair in expert.deltas.items() if module in modules}
    model.experts.add(Expert(name, expert.alpha, deltas))


def answers(model: SparseExpertModel, texts: dict[str, EncodedTexts]) -> torch.Tensor:
    """Answer every task for every text, in batches and with the plan that ``predict`` makes."""
    return torch.cat([row.flatten() for rows in logits_by_task(model, texts).values() for row in rows])


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
    words = [Example(index, row, word_positions=every, word_indices=every) for index, row in enumerate(ids.tolist())]
    plain = [Example(index, row) for index, row in enumerate(ids.tolist())]
    texts = {task: EncodedTexts(plain, rows, None) for task in TASKS[:-1]}
    texts[TASKS[-1]] = EncodedTexts(words, rows, [tokens] * rows)
    repeated = {name: value.repeat(len(TASKS), 1) for name, value in inputs.items()}
    bare = load_backbone("minilm").model
    copies = [load_backbone("minilm").model for _ in TASKS]
    peft = peers.mixed(len(TASKS))
    names = [f"e{index}" for index in range(len(TASKS)) for _ in range(rows)]
    models = {
        "own experts in all blocks": expert_model(0),
        "own experts in the upper half of the blocks": expert_model(3),
        "own experts in the last block": expert_model(5),
        "one shared expert, own ones in the last block": expert_model(5, shared=True),
        "one expert for all tasks": expert_model(0, pool=True),
    }
    gated = expert_model(0)

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
        **{f"ours, {name}": functools.partial(answers, model, texts) for name, model in models.items()},
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
