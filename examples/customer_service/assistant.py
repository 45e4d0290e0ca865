"""A customer-service assistant: what does a customer want, and which names are in the message?

Train once (a few minutes), then run:

    sparse-ft train --task intent --task ner --output runs/desk
    python examples/customer_service/assistant.py --checkpoint runs/desk

One call answers both tasks. A message goes to a human if the intent is out of scope, asks for one, or is unsure.
"""

import argparse
from pathlib import Path

import sparse_ft

HERE = Path(__file__).parent
REPLIES = {
    "track_order": "Look up the parcel and send the tracking link.",
    "cancel_order": "Cancel if it has not left the warehouse.",
    "change_address": "Ask for the new address again, then change it.",
    "return_item": "Send a return label.",
    "refund_status": "Look up the refund.",
    "report_damage": "Ask for a photo, offer a replacement.",
    "missing_item": "Compare the packing list, send what is missing.",
    "payment_problem": "Check the payment log.",
    "invoice_request": "Send the invoice with the name given.",
    "product_question": "Answer from the data sheet.",
    "availability": "Answer from the stock list.",
    "account_access": "Send a link to reset the password.",
    "cancel_subscription": "End the subscription at the next date.",
}
FOR_A_HUMAN = {"oos", "speak_to_human"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="With the tasks intent and ner.")
    parser.add_argument("--messages", type=Path, default=HERE / "messages.txt", help="One message a line.")
    parser.add_argument("--least", type=float, default=0.5, help="Below this probability a human decides.")
    options = parser.parse_args()

    model = sparse_ft.load(options.checkpoint)
    messages = options.messages.read_text(encoding="utf-8").splitlines()
    handed_over = 0
    for answer in model.predict(messages, ["intent", "ner"]):
        intent = answer.tasks["intent"]
        names = [f"{entity['text']} ({entity['type']})" for entity in answer.tasks["ner"]["entities"]]
        unsure = intent["score"] < options.least
        to_human = intent["label"] in FOR_A_HUMAN or unsure
        handed_over += to_human
        reply = "→ a human" + (", unsure" if unsure else "") if to_human else REPLIES[intent["label"]]
        print(f"{answer.text}\n  {intent['label']} {intent['score']:.2f}: {reply}")
        if names:
            print(f"  names: {', '.join(names)}")
    print(f"\n{len(messages)} messages, {handed_over} handed to a human.")


if __name__ == "__main__":
    main()
