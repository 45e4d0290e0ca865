"""What experts cost: a forward pass, and a training step, against the bare backbone and against PEFT.

    python benchmarks/layers.py                      forward, then forward and backward; fp32
    python benchmarks/layers.py --bf16 --passes forward

MiniLM with experts of rank 8 on all linears, weights random. ``text top-2`` routes each row to two experts that are
given, ``text gate`` lets the default gate read the lower half of the blocks first, ``token gate`` weighs all experts
for each token, with weights that are given, too: asking a gate in every block is not in it. Every figure is the median
of rounds in which all variants take turns, divided by the bare backbone's in the same round; its backward pass goes
down to the embeddings. PEFT: one LoRA of rank 8 on the same linears; mixed batches (``adapter_names``), which loop over
the adapters of a batch and cannot train; Arrow, whose top 2 of each token are computed with all others; X-LoRA. A peer
that fails is named with its error.
"""

import argparse
import statistics

import peers
import torch
from script import chosen, listed, numbers, run
from timing import Run, measure, ratio

from sparse_ft.backbone.backbone import Backbone, load_backbone, set_training_attention
from sparse_ft.backbone.encoding import Example
from sparse_ft.config import GateConfig
from sparse_ft.experts.gates import SequenceGate
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.experts.named_experts import Expert
from sparse_ft.experts.routing import ForwardPass, Routing
from sparse_ft.experts.selection import Selection
from sparse_ft.prediction.routes import Route
from sparse_ft.training.fit_gate import gate_block


def random_expert(model: SparseExpertModel, name: str, generator: torch.Generator, *, rank: int = peers.RANK) -> Expert:
    deltas = {}
    for module, linear in model.backbone.linears.items():
        lora_a = torch.randn(rank, linear.in_features, generator=generator) * 0.05
        deltas[module] = (lora_a, torch.randn(linear.out_features, rank, generator=generator) * 0.05)
    return Expert(name, 16.0, deltas)


def loaded(dtype: torch.dtype) -> Backbone:
    """Load the backbone as a training run does on a CPU."""
    backbone = load_backbone("minilm", dtype=dtype)
    set_training_attention(backbone, torch.device("cpu"))
    return backbone


def with_experts(number: int, *, dtype: torch.dtype) -> SparseExpertModel:
    model = SparseExpertModel(loaded(dtype)).eval()
    generator = torch.Generator().manual_seed(0)
    model.experts.add(*(random_expert(model, f"e{index}", generator) for index in range(number)))
    return model


def ours(
    numbers: list[int], inputs: dict[str, torch.Tensor], *, dense_limit: int, train: bool, dtype: torch.dtype
) -> dict[str, Run]:
    rows, tokens = inputs["input_ids"].shape
    variants: dict[str, Run] = {}
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        model = with_experts(number, dtype=dtype)
        chosen = torch.stack([torch.randperm(number, generator=generator)[:2] for _ in range(rows)])
        if train:  # the experts that the batch goes to
            for index in range(number) if number <= dense_limit else chosen.unique().tolist():
                model.experts.parameters(model.experts.names[index])
        weights = torch.rand(rows, tokens, number, generator=generator)
        # A routing keeps what layers made of it, so every pass gets a fresh one, as it does from a gate.
        choices = {
            f"ours, text top-2 of {number}": lambda chosen=chosen: Routing(chosen, torch.full(chosen.shape, 0.5)),
            f"ours, token gate over {number}": lambda weights=weights: Routing(None, weights),
        }
        if number > dense_limit:
            del choices[f"ours, token gate over {number}"]
        if 2 <= number <= dense_limit and not train:
            gated, examples = (
                with_gate(model),
                [Example(row, ids) for row, ids in enumerate(inputs["input_ids"].tolist())],
            )
            choices[f"ours, text gate over {number}"] = lambda model=gated, rows=examples: Route("gate", model).rows(
                rows
            )
        if number == 1:
            choices = {"ours, one expert": lambda: Routing.one_hot([0] * rows)}
        for name, routing in choices.items():
            variants[name] = lambda model=model, routing=routing: _hidden(model, routing(), inputs)
    return variants


def with_gate(model: SparseExpertModel) -> SparseExpertModel:
    """Give a model a gate for texts as it is by default, at random."""
    block = gate_block(model, GateConfig())
    gate = SequenceGate(model.experts.names, model.backbone.hidden_size, block=block, selection=Selection(top_k=2))
    gate.standardise(torch.randn(64, block + 1, model.backbone.hidden_size, generator=torch.Generator().manual_seed(0)))
    gate.initialise(torch.Generator().manual_seed(0))
    model.gate = gate.eval()
    return model


def _hidden(model: SparseExpertModel, routing: Routing, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with model.slot.filled(ForwardPass(routing)):
        return model.encoder(**inputs).last_hidden_state


def theirs(numbers: list[int], inputs: dict[str, torch.Tensor], *, train: bool, dtype: torch.dtype) -> dict[str, Run]:
    bare = loaded(dtype).model
    bare.embeddings.LayerNorm.bias.requires_grad_(train)
    models = {"bare backbone": bare, "PEFT, one LoRA": peers.mixed(1, model=loaded(dtype).model)}
    variants: dict[str, Run] = {}
    for number in numbers:
        for name, build in (("Arrow", peers.arrow), ("X-LoRA", peers.xlora)):
            try:
                model = build(number, model=loaded(dtype).model)
                model(**inputs)
                models[f"PEFT, {name} of {number}"] = model
            except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
                print(f"PEFT, {name} of {number}: fails with {error!r}"[:160], flush=True)
        if not train:
            model = peers.mixed(number, model=loaded(dtype).model)
            names = [f"e{index % number}" for index in range(len(inputs["input_ids"]))]
            variants[f"PEFT, adapter_names of {number}"] = lambda model=model, names=names: (
                model(**inputs, adapter_names=names).last_hidden_state
            )
    plain = {name: lambda model=model: model(**inputs).last_hidden_state for name, model in models.items()}
    return plain | variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", default="1,4,8,16,64,256,1024")
    parser.add_argument("--shapes", default="32x32,8x128", help="rows x tokens")
    parser.add_argument("--passes", default="forward,both", help="forward, and both: forward and backward")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dense-limit", type=int, default=16, help="most experts of the token gate")
    parser.add_argument("--peers", default="4,8,16", help="numbers of adapters for PEFT")
    parser.add_argument("--bf16", action="store_true", help="frozen weights in bf16, adapters in fp32, as in training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experts, adapters = numbers(options.experts), numbers(options.peers)
    for train in [name == "both" for name in chosen(options.passes, ("forward", "both"), what="pass")]:
        for shape in listed(options.shapes):
            rows, tokens = (int(part) for part in shape.split("x"))
            ids = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            dtype = torch.bfloat16 if options.bf16 else torch.float32
            variants = theirs(adapters, inputs, train=train, dtype=dtype)
            variants |= ours(experts, inputs, dense_limit=options.dense_limit, train=train, dtype=dtype)
            if train:
                variants = {
                    name: lambda run=run: run().float().square().mean().backward() for name, run in variants.items()
                }
            with torch.set_grad_enabled(train):
                seconds = measure(variants, rounds=options.rounds)
            print(f"\n| {shape}, {'forward and backward' if train else 'forward'} | ms | / bare | / PEFT, one LoRA |")
            print("|---|---:|---:|---:|")
            for name, values in seconds.items():
                shown = [ratio(seconds, name, base) for base in ("bare backbone", "PEFT, one LoRA")]
                median = statistics.median(values) * 1000
                print(f"| {name} | {median:.1f} | {shown[0]:.2f} | {shown[1]:.2f} |", flush=True)


if __name__ == "__main__":
    run(main)
