"""From PEFT and back: an expert leaves as a PEFT adapter with its head, and comes back as a checkpoint.

Train once (a few minutes), then run:

    sparse-ft train --task topic --output runs/topic
    python examples/peft_round_trip/round_trip.py --checkpoint runs/topic --output runs/returned

1. The expert and its head are exported, and PEFT reads them; its logits are compared with ours.
2. PEFT saves the adapter into the same folder, as it would save what you train with it there.
3. The adapter is imported as a checkpoint of its own, which must give the same answers.

The command line's ways: `sparse-ft export --format peft` and `sparse-ft import`.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import logging

import sparse_ft
from sparse_ft.resources import packaged_minilm_dir

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="With the task topic.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    parser.add_argument(
        "--backbone",
        default=packaged_minilm_dir() or "sentence-transformers/all-MiniLM-L6-v2",
        help="Folder, or name on the hub.",
    )
    parser.add_argument("--texts", type=Path, default=HERE / "texts.txt", help="One text a line.")
    options = parser.parse_args()
    texts = options.texts.read_text(encoding="utf-8").splitlines()

    model = sparse_ft.load(options.checkpoint, device="cpu")
    adapter = sparse_ft.export(model, format="peft", task="topic", output=options.output / "adapter").path
    labels = model.tasks["topic"].label_names
    logging.set_verbosity_error()  # the head that the backbone lacks comes with the adapter
    base = AutoModelForTokenClassification.from_pretrained(options.backbone, num_labels=len(labels))
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    batch = AutoTokenizer.from_pretrained(adapter)(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        classifier = theirs.get_base_model()
        tokens = classifier.base_model(**batch).last_hidden_state
        real = batch["attention_mask"].unsqueeze(-1)
        mean = (tokens * real).sum(1) / real.sum(1)
        logits = classifier.classifier(mean / mean.square().mean(-1, keepdim=True).sqrt())  # experts.pooling is unit
    ours = model.logits(texts, "topic")
    print(f"Largest difference of the logits in PEFT: {(ours - logits).abs().max():.1e}")

    theirs.save_pretrained(adapter)
    back = sparse_ft.import_adapter(adapter, output=options.output / "checkpoint", backbone=str(options.backbone))
    again = sparse_ft.load(back.path, device="cpu")
    print(f"… and when it is back: {(again.logits(texts, 'topic') - ours).abs().max():.1e}")
    for answer in again.predict(texts, ["topic"]):
        print(f"{answer.tasks['topic']['label']:<10}{answer.text}")


if __name__ == "__main__":
    main()
