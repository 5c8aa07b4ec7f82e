#!/usr/bin/env bash
# Version: transformers 5.23.0, tokenizers 0.23.3
# Behaviour: the `tokenizer_class` of tokenizer_config.json decides how much of the tokenizer.json beside it counts. With
#   PreTrainedTokenizerFast (or LlamaTokenizerFast, if the file is byte-level) AutoTokenizer runs the file as it is. With
#   GPT2Tokenizer, Qwen2Tokenizer or GPTNeoXTokenizer it takes vocabulary, merges and post-processor from the file and builds
#   normalizer and pre-tokenizer from code: a Lowercase in the file is gone, Qwen2's own pattern and NFC come instead, and ids
#   differ from tokenizers.Tokenizer.from_file and from every engine that reads the file. No warning is printed.
# Seen: normalizer after loading: PreTrainedTokenizerFast Lowercase, GPT2Tokenizer None, Qwen2Tokenizer NFC,
#   GPTNeoXTokenizer NFC, LlamaTokenizerFast Lowercase; ids as tokenizers gives them: yes, no, no, no, yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'EOF' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocabulary, []))
tokenizer.normalizer = normalizers.Lowercase()
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
expected = tokenizer.encode("Don't SHOUT 123", add_special_tokens=False).ids
seen = {}
for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizerFast"):
    folder = pathlib.Path(name)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": name, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(folder)
    same = loaded("Don't SHOUT 123", add_special_tokens=False)["input_ids"] == expected
    seen[name] = (type(loaded.backend_tokenizer.normalizer).__name__, same)
    print(f"{name:24} normalizer {seen[name][0]:10} ids as tokenizers gives them: {'yes' if same else 'no'}")
assert list(seen.values()) == [
    ("Lowercase", True), ("NoneType", False), ("NFC", False), ("NFC", False), ("Lowercase", True)
], "this has changed"
EOF
