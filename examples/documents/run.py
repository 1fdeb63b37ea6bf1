"""This project's own documentation asked questions: `python examples/documents/run.py [--model MODEL]`.

Indexes docs/, shows the passages that each question finds, and has a chat model answer from them, once with documents
and once without.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from command import elm

from elm_mlx.documents.retrieval import DocumentIndex

ROOT = Path(__file__).parents[2]
SMOL = ROOT.parent / "shared" / "data" / "smollm2-135m-instruct"
QUESTIONS = (
    "Where does elm-mlx chat keep the lines that were typed?",
    "How many requests may wait in the queue of serve?",
    "Which option of generate ends the text before a string?",
    "How large may a chat template be?",
    "What is the largest PDF that is indexed?",
    "What does a walrus eat?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOL, help="a chat model, a directory or OWNER/NAME; none: passages alone")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="what is indexed")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs.db")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    elm("index", args.docs, "--out", args.out)
    documents = DocumentIndex(args.out)
    for question in QUESTIONS:
        print(f"\n{question}")
        for number, passage in enumerate(documents.search(question, count=3), 1):
            print(f"  [{number}] {passage.title}")
    if str(args.model) == "none":
        return
    for question in QUESTIONS:
        for documents_too in (["--docs", args.out], []):
            elm("generate", args.model, question, *documents_too, "--max-tokens", args.max_tokens)


if __name__ == "__main__":
    main()
