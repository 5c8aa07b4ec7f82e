#!/usr/bin/env bash
# Version: tokenizers 0.23.3
# Behaviour: the `id` of an added token in tokenizer.json is read only as a wish. A token that the vocabulary has not gets the next
#   free number, so behind a hole, or where ordinary ids have one, every added token is renumbered: without an error, and saving
#   writes the new ids. (Reserved rows that a model keeps between vocabulary and special tokens must have names in the file.) Of a
#   token with `normalized` under a decomposing normalizer, `id_to_token` gives the normalized content, not the given.
# Seen: file says {'<eos>': 300, '<pad>': 400}, given {'<eos>': 256, '<pad>': 257}, saved {'<eos>': 256, '<pad>': 257};
#   'étude' of 5 characters comes back with 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'EOF' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import json

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocabulary, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.add_special_tokens(["<eos>", "<pad>"])
document = json.loads(tokenizer.to_str())
for token, number in zip(document["added_tokens"], (300, 400)):
    token["id"] = number
said = {token["content"]: token["id"] for token in document["added_tokens"]}
loaded = Tokenizer.from_str(json.dumps(document))
given = {name: loaded.token_to_id(name) for name in said}
saved = {token["content"]: token["id"] for token in json.loads(loaded.to_str())["added_tokens"]}
tokenizer.normalizer = normalizers.NFD()
tokenizer.add_tokens([AddedToken("\u00e9tude", normalized=True)])
back = tokenizer.id_to_token(tokenizer.token_to_id("\u00e9tude"))
print(f"file says {said}, given {given}, saved {saved}; 'étude' of 5 characters comes back with {len(back)}")
assert (given, saved, len(back)) == ({"<eos>": 256, "<pad>": 257}, given, 6), "this has changed"
EOF
