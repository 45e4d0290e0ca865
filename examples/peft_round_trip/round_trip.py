"""From PEFT and back: an expert is a PEFT adapter, and a PEFT adapter becomes an expert.

Train once (a few minutes), then run:

    sparse-ft train --task topic --output runs/topic
    python examples/peft_round_trip/round_trip.py --checkpoint runs/topic --output runs/returned

1. PEFT reads the expert from the folder where it stands, and its hidden states are compared with ours.
2. PEFT saves the adapter, as it saves what you train with it. (The command line's way: `sparse-ft edit --add FOLDER`.)
3. The adapter is added to the checkpoint as a second expert; an expert from PEFT has no head, so the head of the task
   reads it (`--route`), and the scores must be those of the first.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

import sparse_ft
from sparse_ft.batching import collate
from sparse_ft.editing import edit
from sparse_ft.resources import packaged_minilm_dir

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="With the task topic.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    parser.add_argument("--backbone", type=Path, default=packaged_minilm_dir(), help="Folder of the backbone.")
    parser.add_argument("--texts", type=Path, default=HERE / "texts.txt", help="One text a line.")
    options = parser.parse_args()
    texts = options.texts.read_text(encoding="utf-8").splitlines()

    adapter = PeftModel.from_pretrained(
        AutoModel.from_pretrained(options.backbone), options.checkpoint / "experts" / "topic"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.backbone)
    loaded = sparse_ft.load(options.checkpoint, device="cpu", backbone=str(options.backbone))
    with torch.no_grad():
        theirs = adapter(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state
        batch = collate(
            [("topic", example) for example in loaded.encoder.texts(texts)],
            pad_id=loaded.checkpoint.model.backbone.pad_id,
            device="cpu",
        )
        ours = loaded.checkpoint.model.hidden_states(batch)
    real = batch.attention_mask.bool()
    print(f"Largest difference of the hidden states: {(ours - theirs)[real].abs().max():.1e}")

    adapter.save_pretrained(options.output / "adapter")
    added = edit(
        options.checkpoint,
        output=options.output / "checkpoint",
        add=[("returned", str(options.output / "adapter"))],
        backbone=str(options.backbone),
    )
    for route in ("topic", "returned"):
        scored = sparse_ft.evaluate(added.path, tasks=["topic"], route=route, backbone=str(options.backbone))
        print(f"Accuracy with the expert {route!r}: {scored.tasks['topic'].score.metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
