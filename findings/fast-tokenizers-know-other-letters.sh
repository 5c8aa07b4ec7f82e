#!/usr/bin/env bash
# Version: gigatoken 0.10.0, fastokens 0.3.5, tokenizers 0.23.3
# Behaviour: "the same ids as Hugging Face" holds up to the Unicode tables. gigatoken splits by Unicode 17, tokenizers and
#   fastokens by 16, so around a letter of Unicode 17 ids differ. With an NFC normalizer (Qwen, NeoX) they differ around
#   much older marks, too: tokenizers (and fastokens) orders and composes by the table of Unicode 9, so U+1DF6 of 2017
#   keeps its place there and is moved by gigatoken. And gigatoken reads an added token's `single_word` without obeying it.
# Seen: letters split otherwise: {'gigatoken': ['U+10940', 'U+323B0'], 'fastokens': []}; NFC otherwise: {'gigatoken': ['U+0897',
#   'U+1DF6'], 'fastokens': []}; single_word inside a word: [False, True, False]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gigatoken==0.10.0 fastokens==0.3.5 tokenizers==0.23.3
"$folder/venv/bin/python" - <<'EOF' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import json

import fastokens
import gigatoken
import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
byte = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]))
spare = iter(range(256, 512))
byte |= {b: chr(next(spare)) for b in range(256) if b not in byte}
pairs = [("a", byte[b]) for b in range(0xC2, 0xF5)] + [(byte[b], "b") for b in range(0x80, 0xC0)]
vocabulary = {token: number for number, token in enumerate([*alphabet, *map("".join, pairs)])}
tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def ids(text):
    """Of tokenizers, gigatoken, fastokens; merges of "a" and "b" with a character happen only within a piece."""
    data = tokenizer.to_str()
    flat, _ = fastokens.Tokenizer.from_json_str(data).encode_batch_flat([text])
    return tokenizer.encode(text).ids, gigatoken.Tokenizer.from_json(data).encode(text).tolist(), np.frombuffer(flat, "<u4").tolist()


def differ(points, text):
    found = {"gigatoken": [], "fastokens": []}
    for point in points:
        reference, *others = ids(text.replace("{}", chr(point)))
        for name, other in zip(found, others):
            if other != reference:
                found[name].append(f"U+{point:04X}")
    return found


letters = differ((0x10940, 0x323B0, 0x105C0), "a{}b")
tokenizer.normalizer = normalizers.NFC()
composed = differ((0x0897, 0x1DF6, 0x0301), "a{}\u0334b")
tokenizer.normalizer = None
tokenizer.add_tokens([AddedToken("tic", single_word=True)])
number = tokenizer.token_to_id("tic")
whole = [number in found for found in ids("attics")]
print(f"letters split otherwise: {letters}; NFC otherwise: {composed}; single_word inside a word: {whole}")
assert letters == {"gigatoken": ["U+10940", "U+323B0"], "fastokens": []}, "this has changed"
assert composed == {"gigatoken": ["U+0897", "U+1DF6"], "fastokens": []}, "this has changed"
assert whole == [False, True, False], "this has changed"
EOF
