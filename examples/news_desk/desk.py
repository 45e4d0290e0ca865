"""A news desk: topic and names of every article in a folder, as JSON lines.

Train once (a few minutes), then run:

    sparse-ft train --task topic --task ner --output runs/news
    python examples/news_desk/desk.py --checkpoint runs/news --output news.jsonl

An article is a text file; its first line is the headline. Each line of the output has the file, the headline, the
topic, and the names by type, each once, in the order of the text.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import sparse_ft

HERE = Path(__file__).parent


def describe(file: Path, answer: sparse_ft.Prediction) -> dict[str, Any]:
    names: dict[str, list[str]] = {}
    for entity in answer.tasks["ner"]["entities"]:
        known = names.setdefault(entity["type"], [])
        if entity["text"] not in known:
            known.append(entity["text"])
    topic = answer.tasks["topic"]
    headline = answer.text.partition("\n")[0]
    return {
        "file": file.name,
        "headline": headline,
        "topic": topic["label"],
        "score": round(topic["score"], 3),
        **names,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="With the tasks topic and ner.")
    parser.add_argument("--articles", type=Path, default=HERE / "articles", help="Folder of text files.")
    parser.add_argument("--output", type=Path, help="File to write; default: standard output.")
    options = parser.parse_args()

    model = sparse_ft.load(options.checkpoint)
    files = sorted(options.articles.glob("*.txt"))
    answers = model.stream((file.read_text(encoding="utf-8") for file in files), ["topic", "ner"])
    lines = [
        json.dumps(describe(file, answer), ensure_ascii=False) for file, answer in zip(files, answers, strict=True)
    ]
    content = "".join(f"{line}\n" for line in lines)
    if options.output is None:
        sys.stdout.write(content)
    else:
        options.output.write_text(content, encoding="utf-8")
        print(f"{len(lines)} articles: {options.output}")


if __name__ == "__main__":
    main()
