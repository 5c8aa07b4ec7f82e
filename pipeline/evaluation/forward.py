"""Log-probabilities of given tokens and greedy continuations, from a network that may be sharded over ranks.

A sharded network has collectives inside, so all ranks run the same number of forward passes. Rank 0 has the questions: it
calls `log_likelihoods` and `greedy`, the others `follow`, which learn from a broadcast what rank 0 called and do the same.
Batches are sorted by length and dealt round robin; a rank without one runs an empty pass; one all-reduce or gather a call
brings the answers together. `end` lets the others go, with the result or with what went wrong. One process alone does
all of it without a message.

Rows are padded on the right: attention is causal, so padding changes nothing. Rows with the same inputs go through the
network once, whatever is asked about them: the choices of a question often differ in their last token only.

Generation has no key-value cache: T tokens cost T passes over the rows that are not done (see publishing/sample.py).

Legend: B rows, S tokens of the longest, N tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipeline.evaluation.result import EvaluationProgress
from pipeline.tokenizer import Encoder

Tokens = Sequence[int]
Report = Callable[[EvaluationProgress], None]
CPU = torch.device("cpu")  # messages between ranks go through gloo, also beside NCCL


class Forward:
    """`model(inputs_BS, labels_N, at_N=...)` gives `TokenScores`; `batch` is rows of one pass."""

    def __init__(self, model: torch.nn.Module, encoder: Encoder, *, batch: int, report: Report) -> None:
        self._model, self._encoder, self._batch, self._report = model, encoder, batch, report
        self._special = set(encoder.special_tokens.values())
        self._device = next(model.parameters()).device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def log_likelihoods(self, requests: Sequence[tuple[Tokens, int]], doing: str) -> list[tuple[float, bool]]:
        """Of (tokens, n): log p(last n tokens | those before), and whether each of the n is the likeliest. Rank 0 only."""
        self._send("log_likelihoods", requests, doing)
        return self._log_likelihoods(requests, doing)

    def greedy(self, prompts: Sequence[Tokens], until: Sequence[str], max_new_tokens: int, doing: str) -> list[str]:
        """The likeliest text after each prompt, up to an EOS, one of `until` (which may still be in it), or so many tokens.

        Rank 0 only."""
        self._send("greedy", prompts, until, max_new_tokens, doing)
        return self._greedy(prompts, until, max_new_tokens, doing)

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """No more questions. Rank 0 only."""
        self._send("end", result, None if error is None else f"{type(error).__name__}: {error}")

    def follow(self) -> Any:
        """On every other rank: run rank 0's passes with it until it ends; returns its result. Raises RuntimeError if it failed."""
        while True:
            call, *arguments = self._receive()
            match call:
                case "log_likelihoods":
                    self._log_likelihoods(*arguments)
                case "greedy":
                    self._greedy(*arguments)
                case "end":
                    result, error = arguments
                    if error is not None:
                        raise RuntimeError(f"rank 0 failed: {error}")
                    return result

    # -- what all ranks do -------------------------------------------------------------------------------------------

    def _log_likelihoods(self, requests: Sequence[tuple[Tokens, int]], doing: str) -> list[tuple[float, bool]]:
        asked: dict[tuple[int, ...], list[int]] = {}
        for index, (tokens, _) in enumerate(requests):
            asked.setdefault(tuple(tokens[:-1]), []).append(index)
        rows = sorted(asked.items(), key=lambda row: -len(row[0]))
        sums = torch.zeros(len(requests), dtype=torch.float64, device=self._device)
        misses = torch.zeros(len(requests), dtype=torch.int64, device=self._device)
        done, total = 0, sum(len(inputs) for inputs, _ in rows)
        for turn, group, mine in self._deal(rows):
            width = len(group[0][0])
            at: list[int] = []
            labels: list[int] = []
            owners: list[int] = []
            for row, (inputs, indices) in enumerate(group):
                for index in indices:
                    tokens, scored = requests[index]
                    end = row * width + len(inputs)
                    at += range(end - scored, end)
                    labels += tokens[len(tokens) - scored :]
                    owners += [index] * scored
            scores = self._pass([inputs for inputs, _ in group], at, labels)
            if mine:
                owner_N = torch.tensor(owners, device=self._device)
                sums.index_add_(0, owner_N, scores.log_p_N.double())
                misses.index_add_(0, owner_N, (scores.likeliest_N != self._tensor(labels)).long())
            new = sum(len(inputs) for others in turn for inputs, _ in others)
            done += new
            self._tell(new, done, total, doing)
        if self.world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(misses)
        return list(zip(sums.tolist(), (misses == 0).tolist()))

    def _greedy(self, prompts: Sequence[Tokens], until: Sequence[str], max_new_tokens: int, doing: str) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        texts: dict[int, str] = {}
        done, left = 0, max_new_tokens * len(prompts)
        for turn, group, mine in self._deal(order):
            written: dict[int, list[int]] = {index: [] for index in group}
            going = list(group) if mine else []
            while self._any(bool(going)):
                rows = [[*prompts[index], *written[index]] for index in going or group[:1]]
                width = max(map(len, rows))
                last = [row * width + len(tokens) - 1 for row, tokens in enumerate(rows)]
                likeliest = self._pass(rows, last, [0] * len(rows)).likeliest_N.tolist()
                for index, token in zip(list(going), likeliest):
                    written[index].append(token)
                    if self._is_done(written[index], until, max_new_tokens):
                        going.remove(index)
            if mine:
                texts |= {index: self._text(tokens) for index, tokens in written.items()}
            new = self._sum(sum(map(len, written.values())) if mine else 0)
            done, left = done + new, left - max_new_tokens * sum(map(len, turn))
            self._tell(new, done, done + left, doing)
        if self.world > 1:
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, texts)
            texts = {index: text for part in gathered for index, text in part.items()}
        return [texts[index] for index in range(len(prompts))]

    def _is_done(self, tokens: list[int], until: Sequence[str], max_new_tokens: int) -> bool:
        if tokens[-1] == self._encoder.eos_id or len(tokens) >= max_new_tokens:
            return True
        text = self._text(tokens)
        return any(stop in text for stop in until if stop)

    def _text(self, tokens: Tokens) -> str:
        return self._encoder.decode([token for token in tokens if token not in self._special])

    def _deal(self, rows: list[Any]) -> Iterator[tuple[list[list[Any]], list[Any], bool]]:
        """(the batches of all ranks, this rank's, is there one for it); where there is none, one that does not count."""
        batches = [rows[start : start + self._batch] for start in range(0, len(rows), self._batch)]
        for start in range(0, len(batches), self.world):
            turn = batches[start : start + self.world]
            mine = self.rank < len(turn)
            yield turn, turn[self.rank] if mine else turn[-1][:1], mine

    def _pass(self, rows: Sequence[Tokens], at: list[int], labels: list[int]) -> Any:
        width = max(map(len, rows))
        inputs_BS = torch.full((len(rows), width), self._encoder.eos_id)
        for row, tokens in enumerate(rows):
            inputs_BS[row, : len(tokens)] = torch.tensor(tokens)
        with torch.no_grad():
            return self._model(inputs_BS.to(self._device), self._tensor(labels), at_N=self._tensor(at))

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    # -- between ranks -----------------------------------------------------------------------------------------------

    def _send(self, *message: Any) -> None:
        assert self.rank == 0
        if self.world > 1:
            dist.broadcast_object_list([message], src=0, device=CPU)

    def _receive(self) -> Any:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]

    def _any(self, flag: bool) -> bool:
        return self._sum(int(flag)) > 0

    def _sum(self, number: int) -> int:
        if self.world == 1:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total)
        return int(total)

    def _tell(self, new: int, done: int, total: int, doing: str) -> None:
        if self.rank == 0:
            self._report(EvaluationProgress(new, done, total, doing=doing))
