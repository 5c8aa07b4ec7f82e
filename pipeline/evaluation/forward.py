"""Log-probabilities of given tokens and greedy continuations, from a network that may be sharded over ranks.

A sharded network has collectives inside, so all ranks run the same number of forward passes. Rank 0 has the questions: it
calls `log_likelihoods` and `greedy`, the others `follow`, which learn from a broadcast what rank 0 called and do the same.
Rows are dealt by their tokens, batches of prompts round robin; a rank without one runs an idle pass; one all-reduce or
gather a call brings the answers together. `end` lets the others go, with the result or with what went wrong. One process alone does
all of it without a message.

Rows are padded on the right: attention is causal and padding is not routed, so it changes nothing. Rows with the same inputs go through the
network once, whatever is asked about them: the choices of a question often differ in their last token only. What rows
begin with alike goes through it once, too (shared_prefix.py), and so does every token of a generated text: both by the
latent cache (pipeline/model/cache.py).

Legend: B rows, S tokens of the longest, N tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist

from pipeline.evaluation.result import EvaluationProgress
from pipeline.evaluation.shared_prefix import LEAST_SAVED, SHORTEST, Pass, common_length, deal, passes, share
from pipeline.generation.decode import Decoder
from pipeline.model.cache import CachedPass, LatentCache
from pipeline.tokenizer import Encoder

Tokens = Sequence[int]
Report = Callable[[EvaluationProgress], None]
CPU = torch.device("cpu")  # messages between ranks go through gloo, also beside NCCL


class Forward:
    """`model(inputs_BS, labels_N, at_N=..., cached=...)` gives `TokenScores`; `batch`: rows of one pass, or as many
    shorter ones as have no more tokens."""

    def __init__(self, model: torch.nn.Module, encoder: Encoder, *, batch: int, report: Report) -> None:
        self._model, self._encoder, self._batch, self._report = model, encoder, batch, report
        self._special = set(encoder.special_tokens.values())
        self._device = next(model.parameters()).device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def log_likelihoods(self, requests: Sequence[tuple[Tokens, int]], doing: str) -> list[tuple[float, bool]]:
        """Of (tokens, n): log p(last n tokens | those before), and whether each of the n is the likeliest. Rank 0 only.

        n is at least 1: the sum over nothing would be the best of all scores. Raises ValueError where the network gives
        no finite number, which no comparison of answers would notice."""
        assert all(0 < scored < len(tokens) for tokens, scored in requests)
        self._send("log_likelihoods", requests, doing)
        found = self._log_likelihoods(requests, doing)
        _check_finite(sum(not isfinite(log_p) for log_p, _ in found), len(found), "log-likelihoods")
        return found

    def greedy(self, prompts: Sequence[Tokens], until: Sequence[str], max_new_tokens: int, doing: str) -> list[str]:
        """The likeliest text after each prompt, up to an EOS, one of `until` (which may still be in it), or so many tokens.

        Rank 0 only. Raises ValueError where the network gives no finite number: the likeliest token would mean nothing."""
        self._send("greedy", prompts, until, max_new_tokens, doing)
        texts, bad = self._greedy(prompts, until, max_new_tokens, doing)
        _check_finite(bad, len(prompts), "prompts' next tokens")
        return texts

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
        rows = list(asked.items())
        roots = share([(inputs, max(requests[index][1] for index in indices)) for inputs, indices in rows])
        most_tokens = self._batch * max((len(inputs) for inputs, _ in rows), default=1)
        shares = deal(roots, self.world)
        sizes = [[each.tokens for each in passes(spans, most_tokens)] for spans in shares]
        sums = torch.zeros(len(requests), dtype=torch.float64, device=self._device)
        misses = torch.zeros(len(requests), dtype=torch.int64, device=self._device)
        done, total = 0, sum(map(sum, sizes))
        mine = passes(shares[self.rank], most_tokens)
        for turn in zip_longest(*sizes, fillvalue=0):
            this = next(mine, None)
            if this is None:  # nothing left for this rank: keep the others' collectives company
                self._pass([[self._encoder.eos_id]], [0], [0])
            else:
                self._score(this, rows, requests, sums, misses)
            done += sum(turn)
            self._tell(sum(turn), done, total, doing)
        if self.world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(misses)
        return list(zip(sums.tolist(), (misses == 0).tolist()))

    def _score(
        self,
        this: Pass,
        rows: list[tuple[tuple[int, ...], list[int]]],
        requests: Sequence[tuple[Tokens, int]],
        sums: torch.Tensor,
        misses: torch.Tensor,
    ) -> None:
        """Run one pass, add up what its rows' labels score, and keep for its children what they go on from."""
        width = max(len(span.own) for span in this.spans)
        at: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        for place, span in enumerate(this.spans):
            for index in () if span.row is None else rows[span.row][1]:
                tokens, scored = requests[index]
                end = place * width + len(span.own)
                at += range(end - scored, end)
                labels += tokens[len(tokens) - scored :]
                owners += [index] * scored
        cached = None
        if this.parent is not None or this.kept:
            past = None if this.parent is None else this.parent.cache
            cached = CachedPass(past, [len(span.own) for span in this.spans], this.continues if past else None)
        scores = self._pass([span.own for span in this.spans], at, labels, cached)
        if cached is not None and this.kept:
            this.cache = cached.result(this.kept)
        owner_N = torch.tensor(owners, dtype=torch.int64, device=self._device)
        sums.index_add_(0, owner_N, scores.log_p_N.double())
        misses.index_add_(0, owner_N, (scores.likeliest_N != self._tensor(labels)).long())

    def _greedy(
        self, prompts: Sequence[Tokens], until: Sequence[str], max_new_tokens: int, doing: str
    ) -> tuple[list[str], int]:
        """The texts, and how many of them end where the network gave no finite number."""
        shared, prompts = self._shared_prompt(prompts)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        texts: dict[int, str] = {}
        bad = 0
        done, left = 0, max_new_tokens * len(prompts)
        for turn, group, mine in self._deal(order):
            written: list[list[int]] = [[] for _ in group]
            going = set(range(len(group))) if mine else set()
            decoder = Decoder(self._model, [prompts[index] for index in group], room=max_new_tokens, shared=shared)
            logits_BV = decoder.first()
            while True:
                largest_B, likeliest_B = logits_BV.max(-1)  # NaN is larger than any number
                likeliest = dict(zip(decoder.rows, likeliest_B.tolist()))
                finite = dict(zip(decoder.rows, largest_B.isfinite().tolist()))
                for row in going & likeliest.keys():
                    written[row].append(likeliest[row])
                    bad += not finite[row]
                    if not finite[row] or self._is_done(written[row], until, max_new_tokens):
                        going.remove(row)
                if not self._any(bool(going)):
                    break
                chosen = {row: token for row, token in likeliest.items() if row in going}
                logits_BV = decoder.following(chosen or dict([*likeliest.items()][:1]))  # a rank without rows keeps up
            if mine:
                texts |= {index: self._text(tokens) for index, tokens in zip(group, written)}
            new = self._sum(sum(map(len, written)) if mine else 0)
            done, left = done + new, left - max_new_tokens * sum(map(len, turn))
            self._tell(new, done, done + left, doing)
        if self.world > 1:
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, texts)
            texts = {index: text for part in gathered for index, text in part.items()}
        return [texts[index] for index in range(len(prompts))], self._sum(bad)

    def _shared_prompt(self, prompts: Sequence[Tokens]) -> tuple[LatentCache | None, Sequence[Tokens]]:
        """What all prompts begin with, run once (by every rank), and what is left of each."""
        common = min(map(len, prompts), default=1) - 1
        for prompt in prompts:
            common = min(common, common_length(prompts[0], prompt))
        if common < SHORTEST or (len(prompts) - 1) * common < LEAST_SAVED:
            return None, prompts
        cached = CachedPass(None, [common])
        self._pass([prompts[0][:common]], [0], [0], cached)
        return cached.result(), [prompt[common:] for prompt in prompts]

    def _is_done(self, tokens: list[int], until: Sequence[str], max_new_tokens: int) -> bool:
        if tokens[-1] == self._encoder.eos_id or len(tokens) >= max_new_tokens:
            return True
        stops = [stop for stop in until if stop]
        if not stops:
            return False
        last = tokens[
            -max(len(stop.encode()) for stop in stops) - 4 :
        ]  # a token is a byte at least, a character four at most
        text = self._text(last)
        return any(stop in text for stop in stops)

    def _text(self, tokens: Tokens) -> str:
        return self._encoder.decode([token for token in tokens if token not in self._special])

    def _deal(self, rows: list[Any]) -> Iterator[tuple[list[list[Any]], list[Any], bool]]:
        """(the batches of all ranks, this rank's, is there one for it); where there is none, one that does not count."""
        batches = [rows[start : start + self._batch] for start in range(0, len(rows), self._batch)]
        for start in range(0, len(batches), self.world):
            turn = batches[start : start + self.world]
            mine = self.rank < len(turn)
            yield turn, turn[self.rank] if mine else turn[-1][:1], mine

    def _pass(self, rows: Sequence[Tokens], at: list[int], labels: list[int], cached: CachedPass | None = None) -> Any:
        width = max(map(len, rows))
        inputs_BS = torch.full((len(rows), width), self._encoder.eos_id)
        for row, tokens in enumerate(rows):
            inputs_BS[row, : len(tokens)] = torch.tensor(tokens)
        with torch.no_grad():
            return self._model(
                inputs_BS.to(self._device),
                self._tensor(labels),
                at_N=self._tensor(at),
                cached=cached,
                lengths=[len(tokens) for tokens in rows] if cached is None else None,
            )

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


def _check_finite(bad: int, asked: int, what: str) -> None:
    if bad:
        raise ValueError(
            f"{bad:,} of {asked:,} {what} are not finite numbers: the checkpoint's weights are damaged or have diverged; "
            "evaluate an earlier one (evaluation.checkpoint)"
        )
