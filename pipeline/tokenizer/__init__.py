"""Train, load, save and run the tokenizer: byte-level BPE with Moonlight's split pattern.

The rank file (`tiktoken.model`: one base64 token and its rank a line) is the one source of truth. `tokenizer.json` for
Hugging Face is derived from it (`files.py`), the encoder runs on it (`encoder.py`), training produces it (`train.py`).
"""

from pipeline.tokenizer.encoder import Encoder
from pipeline.tokenizer.files import read_tokenizer, special_tokens_of
from pipeline.tokenizer.train import train_tokenizer

__all__ = ["Encoder", "read_tokenizer", "special_tokens_of", "train_tokenizer"]
