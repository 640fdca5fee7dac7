"""Writes CLIP's byte-level tokenizer: a token for every byte, and merges that make one token of each given word."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from engines.demo.checkpoint import write_json

_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


TOKENS = 514
"""Without words: every byte, every byte at a word's end, the start and the end."""


def write_tokenizer(folder: Path, words: Sequence[str] = ()) -> int:
    """words: any other is a token a letter. Returns the number of tokens; the start is the last but one, the end the last."""
    merges = learn_merges(words)
    vocabulary = [*_symbols(), *("".join(pair) for pair in merges), _SPECIAL["bos_token"], _SPECIAL["eos_token"]]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    write_json(folder / "special_tokens_map.json", _SPECIAL)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **_SPECIAL})
    return len(vocabulary)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding of a word list, until every word is one token: the most frequent pair first, then by the alphabet."""
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in spelt for pair in pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelt:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], word[i]) == best and i < len(word):
                    word[i - 1 : i + 1] = ["".join(best)]


def _symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, and the same marked as a word's end."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    return [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
