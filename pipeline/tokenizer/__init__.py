"""Train, load, save and run the tokenizer: byte-level BPE, by default with Moonlight's split pattern.

A trained tokenizer, or Moonshot's rank file (`tiktoken.model`: one base64 token and its rank a line), becomes a
`tokenizer.json` (`files.py`); a given `tokenizer.json` is taken whole or refused by name (`given.py`). Who encodes, so that
the ids are the published tokenizer's, is found by comparing engines (`agreement.py`, `engines.py`, `encoder.py`).
"""

from pipeline.tokenizer.agreement import find_engines
from pipeline.tokenizer.encoder import Encoder
from pipeline.tokenizer.files import special_tokens_of
from pipeline.tokenizer.given import read_given, read_tokenizer
from pipeline.tokenizer.train import train_tokenizer

__all__ = ["Encoder", "find_engines", "read_given", "read_tokenizer", "special_tokens_of", "train_tokenizer"]
