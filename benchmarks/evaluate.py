"""Generation and log-likelihoods on a CPU, side by side with lm-eval's own `hf` model and with transformers.

    python -m benchmarks.evaluate [--rounds 7] [--only five-shot,endings]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m benchmarks.evaluate    # as on AVX2

generate_until  8 prompts of 100 to 350 tokens, 48 tokens each, greedy, one batch
few-shot        8 prompts that begin with the same 300 tokens, 16 tokens each
log-likelihood  6 contexts with an answer of about 100 tokens each; nothing is shared
five-shot       8 questions with 4 answers of one token, after the same examples (MMLU)
endings         8 contexts with 4 endings of 10 to 40 tokens each (HellaSwag)
one by one      20 prompts without a batch, 32 tokens each, greedy: `pipeline.generation` against `transformers.generate`

The network is the demo's with random weights, the same in both, in fp32; the tokenizer is trained on Python's library. No
figure is printed before texts were found equal and log-likelihoods within 1e-4. One thread, CPU seconds of the process,
medians over rounds that alternate between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from benchmarks.arguments import positive, some_of
from benchmarks.train_step import _for_transformers
from pipeline.config.load import load_config
from pipeline.evaluation.forward import Forward
from pipeline.evaluation.harness import HarnessModel
from pipeline.generation.sample import Sampling, generate
from pipeline.model.hf import hf_config
from pipeline.model.moonlight import Moonlight
from pipeline.tokenizer import Encoder, train_tokenizer

BATCH = 8
CLOSE = 1e-4  # nats
TARGETS = {
    "generate_until": 1.2,
    "few-shot": 1.2,
    "log-likelihood": 1.0,
    "five-shot": 3.0,
    "endings": 1.0,
    "one by one": 1.0,
}
Answers = list[Any]
Side = Callable[[], Answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument(
        "--only", type=some_of(TARGETS), default=",".join(TARGETS), help="comparisons, with commas between"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    library = Path(os.__file__).parent
    text = (library / "argparse.py").read_text() + (library / "subprocess.py").read_text()
    files = train_tokenizer(
        (path.read_text() for path in sorted(library.glob("*.py"))[:60]), load_config("debug").tokenizer
    )
    print(
        f"{torch.cpu.get_capabilities().get('cpu_name', 'unknown processor')}, torch runs as {torch.backends.cpu.get_cpu_capability()}"
    )
    found = pairs(files, text)
    results = [compare(name, *found[name], given.rounds) for name in given.only]
    print(json.dumps(results))


def compare(name: str, ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    check(name, ours(), theirs())
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side, run in (("ours", ours), ("theirs", theirs)):
            start = time.process_time()
            run()
            seconds[side].append(time.process_time() - start)
    mine, peer = (statistics.median(times) for times in seconds.values())
    print(f"{name:16} ours {mine:7.3f} s   peer {peer:7.3f} s   {peer / mine:5.2f} times as fast", flush=True)
    return {
        "benchmark": f"evaluate/{name}",
        "ours": round(mine, 4),
        "peer": round(peer, 4),
        "ratio": round(peer / mine, 3),
        "target": TARGETS[name],
        "met": peer / mine >= TARGETS[name],
        "unit": "CPU seconds",
    }


def check(name: str, ours: Answers, theirs: Answers) -> None:
    assert len(ours) == len(theirs) > 0
    for found, expected in zip(ours, theirs):
        if isinstance(found, tuple):
            assert abs(found[0] - expected[0]) < CLOSE, (name, found, expected)
            assert found[1] == expected[1], (name, found, expected)
        else:
            assert found == expected, (name, found, expected)


def pairs(files: dict[str, bytes], text: str) -> dict[str, tuple[Side, Side]]:
    """(ours, the peer's) by name."""
    config = load_config("debug").model
    torch.manual_seed(0)
    model = Moonlight(config).eval().requires_grad_(False)
    length, encoder = config.max_position_embeddings, Encoder(files)
    eos = encoder.eos_id
    fields = hf_config(config, bos_token_id=None, eos_token_id=eos, dtype="float32")
    peer = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(fields))
    peer.load_state_dict(dict(_for_transformers(model.state_dict())))
    peer.eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(files["tokenizer.json"].decode()), eos_token="[EOS]", pad_token="[EOS]"
    )
    begin = TemplateProcessing(single="[EOS] $A", special_tokens=[("[EOS]", eos)])
    tokenizer.backend_tokenizer.post_processor = begin
    ours = HarnessModel(Forward(model, encoder, batch=BATCH, report=lambda _: None), encoder, length)
    theirs = HFLM(
        peer,
        tokenizer=tokenizer,
        device="cpu",
        dtype="float32",
        max_length=length,
        batch_size=BATCH,
        prefix_token_id=eos,
    )

    def piece(number: int, tokens: int) -> str:
        ids = encoder.encode([text[4000 * number :][: 12 * tokens].encode()])[0][:tokens]
        return encoder.decode(ids)

    def asked(*arguments: tuple[Any, ...]) -> list[Any]:
        return [SimpleNamespace(args=each, task_name="t") for each in arguments]

    def until(tokens: int) -> dict[str, Any]:
        return {"until": [], "max_gen_toks": tokens, "do_sample": False}

    def generated(*requests: tuple[Any, ...]) -> tuple[Side, Side]:
        return (
            lambda: ours.generate_until(asked(*requests)),
            lambda: theirs.generate_until(asked(*requests), disable_tqdm=True),
        )

    def scored(*requests: tuple[Any, ...]) -> tuple[Side, Side]:
        return (
            lambda: ours.loglikelihood(asked(*requests)),
            lambda: theirs.loglikelihood(asked(*requests), disable_tqdm=True),
        )

    examples = piece(9, 340)
    prompts = [encoder.encode([piece(n, 20 + 12 * n).encode()])[0].tolist() for n in range(20)]
    greedy = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=eos, pad_token_id=eos)

    def our_texts() -> Answers:
        return [
            generate(model, [prompt], [Sampling()], eos=eos, max_new_tokens=32, max_positions=length)[0]
            for prompt in prompts
        ]

    def their_texts() -> Answers:
        found = []
        for prompt in prompts:
            ids = torch.tensor([[eos, *prompt]])
            with torch.no_grad():
                out = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
            found.append([token for token in out[0, ids.shape[1] :].tolist() if token != eos])
        return found

    return {
        "generate_until": generated(*((piece(n, 100 + 35 * n), until(48)) for n in range(BATCH))),
        "few-shot": generated(*((piece(9, 300) + piece(n, 50 + 5 * n), until(16)) for n in range(BATCH))),
        "log-likelihood": scored(*((piece(n, 230), piece(n + 1, 100)) for n in range(6))),
        "five-shot": scored(
            *((f"{examples}{piece(n, 100)}\nAnswer {n}:", f" {choice}") for n in range(8) for choice in "ABCD")
        ),
        "endings": scored(
            *((piece(n, 120), f" {piece(n + 7 * choice, 10 + 8 * choice)}") for n in range(8) for choice in range(1, 5))
        ),
        "one by one": (our_texts, their_texts),
    }


if __name__ == "__main__":
    main()
