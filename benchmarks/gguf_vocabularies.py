"""Compares tokenizers that `convert` makes of GGUF files with ids that the models' own tokenizers made.

    python benchmarks/gguf_vocabularies.py DIR

DIR is the directory `models` of llama.cpp's source: `ggml-vocab-NAME.gguf`, with texts beside it in `.gguf.inp` and the
ids of each in a line of `.gguf.out`, which transformers made.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from elm_mlx.errors import InputError
from elm_mlx_convert import gguf_vocabulary
from elm_mlx_convert.gguf_file import read_header

BETWEEN = "\n__ggml_vocab_test__\n"


def differing(path: Path) -> str:
    """Returns in words how many texts have other ids."""
    from tokenizers import Tokenizer

    vocabulary = gguf_vocabulary.read(read_header(path))
    if vocabulary is None:
        return "no tokenizer"
    with tempfile.TemporaryDirectory() as place:
        gguf_vocabulary.write(vocabulary, Path(place), 2048)
        tokenizer = Tokenizer.from_file(f"{place}/tokenizer.json")
    tokenizer.encode_special_tokens = True
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split(BETWEEN)
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    pairs = list(zip(texts, ([int(token) for token in line.split()] for line in lines), strict=False))
    wrong = sum(tokenizer.encode(text, add_special_tokens=False).ids != ids for text, ids in pairs)
    return f"{vocabulary.describe()}: {wrong} of {len(pairs)} texts differ"


def main(directory: Path) -> None:
    """Prints of each vocabulary how many texts have other ids, or why it is refused."""
    for path in sorted(directory.glob("ggml-vocab-*.gguf")):
        if path.with_suffix(".gguf.out").exists():
            try:
                print(path.name, differing(path))
            except InputError as error:
                print(path.name, "refused:", str(error).removeprefix(f"{path}: "))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
