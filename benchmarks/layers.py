"""What experts cost: a forward pass, and a training step, against the bare backbone and against PEFT.

    python benchmarks/layers.py --experts 1,4,8,16,64,256,1024 --shapes 32x32,8x128

MiniLM with experts of rank 8 on all linears, weights random. ``text top-2`` routes each row to two experts (gathered),
``token`` weighs all experts anew for each token (dense). Every figure is the median of rounds in which all variants
take turns, divided by the bare backbone's in the same round. PEFT: one LoRA of rank 8 on the same linears, and its
mixed batches (``adapter_names``), which loop over the adapters of a batch.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from sparse_ft.backbone import load_backbone
from sparse_ft.experts import Expert
from sparse_ft.model import SparseExpertModel
from sparse_ft.routing import Pass, Routing

RANK = 8


def random_expert(model: SparseExpertModel, name: str, generator: torch.Generator) -> Expert:
    deltas = {}
    for module, linear in model.backbone.linears.items():
        lora_a = torch.randn(RANK, linear.in_features, generator=generator) * 0.05
        deltas[module] = (lora_a, torch.randn(linear.out_features, RANK, generator=generator) * 0.05)
    return Expert(name, 16.0, deltas)


def with_experts(number: int) -> tuple[SparseExpertModel, float]:
    """Build a model with so many experts; return it with the seconds that adding them took."""
    model = SparseExpertModel(load_backbone("minilm")).eval()
    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(model, f"e{place}", generator) for place in range(number)]
    started = time.perf_counter()
    model.experts.add(*experts)
    return model, time.perf_counter() - started


def peft_model(adapters: int):
    model = load_backbone("minilm").model
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    wrapped = get_peft_model(model, config, adapter_name="e0")
    for place in range(1, adapters):
        wrapped.add_adapter(f"e{place}", copy.deepcopy(config))
    return wrapped.eval()


def step(run: Callable[[], torch.Tensor]) -> None:
    run().square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", default="1,4,8,16,64,256,1024")
    parser.add_argument("--shapes", default="32x32,8x128", help="rows x tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dense-limit", type=int, default=16, help="most experts of the token gate")
    parser.add_argument("--peft-limit", type=int, default=16, help="most adapters in PEFT's mixed batches")
    parser.add_argument("--train", action="store_true", help="time forward and backward, not forward alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numbers = [int(number) for number in options.experts.split(",")]
    for shape in options.shapes.split(","):
        rows, tokens = (int(part) for part in shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 20000, (rows, tokens), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        variants = build(numbers, inputs, options)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        with torch.set_grad_enabled(options.train):
            for number in range(options.rounds + 2):
                for name, run in variants.items():
                    started = time.perf_counter()
                    step(run) if options.train else run()
                    if number >= 2:  # the first two rounds warm up
                        seconds[name].append(time.perf_counter() - started)
        base = "PEFT, one LoRA" if options.train else "bare backbone"
        for name, values in seconds.items():
            ratios = [value / other for value, other in zip(values, seconds[base], strict=True)]
            print(
                f"{shape} {name}: {statistics.median(values) * 1000:.1f} ms, {statistics.median(ratios):.3f} x {base}"
            )


def build(numbers: list[int], inputs: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, Callable]:
    rows, tokens = inputs["input_ids"].shape
    variants: dict[str, Callable] = {}
    if not options.train:
        bare = load_backbone("minilm").model
        variants["bare backbone"] = lambda: bare(**inputs).last_hidden_state
    single = peft_model(1)
    variants["PEFT, one LoRA"] = lambda: single(**inputs).last_hidden_state
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        model, seconds = with_experts(number)
        print(f"{number} experts added in {seconds:.2f} s", flush=True)
        if options.train:
            for name in model.experts.names[:64]:
                model.experts.parameters(name)
        known = Routing.rows([0] * rows)
        chosen = torch.stack([torch.randperm(number, generator=generator)[:2] for _ in range(rows)])
        text = Routing(chosen, torch.full(chosen.shape, 1 / chosen.shape[1]))
        token = Routing(None, torch.rand(rows, tokens, number, generator=generator))

        def run(model: SparseExpertModel = model, routing: Routing = known) -> torch.Tensor:
            with model.slot.filled(Pass(routing)):
                return model.encoder(**inputs).last_hidden_state

        if number == 1:
            variants["ours, one expert"] = run
            continue
        variants[f"ours, text top-2 of {number}"] = lambda run=run, routing=text: run(routing=routing)
        if number <= options.dense_limit:
            variants[f"ours, token gate over {number}"] = lambda run=run, routing=token: run(routing=routing)
        if number <= options.peft_limit and not options.train:
            mixed = peft_model(number)
            names = [f"e{place}" for place in torch.randint(0, number, (rows,), generator=generator).tolist()]
            variants[f"PEFT, adapter_names of {number}"] = lambda mixed=mixed, names=names: (
                mixed(**inputs, adapter_names=names).last_hidden_state
            )
    return variants


if __name__ == "__main__":
    main()
