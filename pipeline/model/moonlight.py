"""The Moonlight network (arXiv 2502.16982, section 3.1): DeepSeek-V3's small sister, here complete and exact.

embed -> `num_hidden_layers` blocks (the first `first_k_dense_replace` dense, the others mixture-of-experts) -> RMSNorm ->
untied head. `transformers`' `DeepseekV3ForCausalLM` with the same weights gives the same numbers; pipeline/model/hf.py
carries weights both ways.

With labels the forward pass ends in the loss; see pipeline/model/loss.py. Weights are drawn per parameter name
(pipeline/model/init.py), so a rank that holds a shard draws the same numbers as a process that holds everything.

Legend: B rows, S tokens, D hidden, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.model.attention import Attention
from pipeline.model.block import Block
from pipeline.model.cache import CachedPass
from pipeline.model.experts import MoE
from pipeline.model.init import initialise
from pipeline.model.loss import IGNORE, Head, LossOutput, TokenScores
from pipeline.model.norm import RMSNorm
from pipeline.model.router import Router
from pipeline.model.sequences import sequence_layout


class Moonlight(nn.Module):
    """`config` is the network; `aux_loss_weight` the weight of the sequence-wise balance loss (1e-4 in the recipe)."""

    def __init__(self, config: ModelConfig, *, aux_loss_weight: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.interleave = False  # whether training takes the two halves of a micro-batch in turn (interleave.py)
        # Not drawn here, as it is drawn below: on the meta device torch would import its compiler for that, 0.7 CPU seconds a process.
        embedding_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer, aux_loss_weight) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        if self.embed_tokens.weight.device.type != "meta":
            self.reset_parameters(0)

    def forward(
        self,
        input_ids_BS: Tensor,
        labels: Tensor | None = None,
        doc_lens: Sequence[Sequence[int]] | None = None,
        at_N: Tensor | None = None,
        cached: CachedPass | None = None,
        lengths: Sequence[int] | None = None,
    ) -> LossOutput | TokenScores | Tensor:
        """With `labels` [B, S] (-100: no loss) the summed loss, else logits [B, S, V] in fp32.

        With `at_N`, flat positions in [B * S] that may repeat, `labels` are the [N] tokens to score there, one by one;
        without labels the result is the logits there, [N, V].

        `cached`: the rows continue cached ones, and what they add stays there; without gradients only.

        `doc_lens`: per row the lengths of its documents, laid end to end; attention then stays inside a document and
        positions restart. None: each row is one sequence. `lengths`: per row the tokens of its text; what follows is
        padding, which is not routed and changes nothing else. None: those of the documents, or whole rows. In training
        mode each router's `tokens_per_expert` grows by this batch's counts.
        """
        B, S = input_ids_BS.shape
        rope_dim, rope_theta = self.config.qk_rope_head_dim, self.config.rope_theta
        if cached is None:
            device = input_ids_BS.device
            halves = self.interleave and self.training
            layout = sequence_layout(
                B, S, doc_lens, lengths, rope_dim=rope_dim, rope_theta=rope_theta, device=device, halves=halves
            )
        else:
            assert doc_lens is None
            assert lengths is None
            layout = cached.layout(S, rope_dim, rope_theta, input_ids_BS.device)
        x_BSD = self.embed_tokens(input_ids_BS)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x_BSD.device)
        counts = []
        for index, block in enumerate(self.layers):
            layer = None if cached is None else cached.layer(index)
            x_BSD, block_aux_loss, counts_E = block(x_BSD, layout, layer)
            if block_aux_loss is not None:
                aux_loss = aux_loss + block_aux_loss
                counts.append(counts_E)
        if cached is not None:
            cached.finish()
        if self.training:
            for (_, router), counts_E in zip(self.routers(), counts, strict=True):
                router.tokens_per_expert += counts_E
        x_BSD = self.norm(x_BSD)
        if labels is None or at_N is not None:
            return self.lm_head(x_BSD, labels, at_N)
        return LossOutput(self.lm_head(x_BSD, labels), aux_loss, (labels != IGNORE).sum())

    def routers(self) -> Iterator[tuple[str, Router]]:
        """The routers by name (`layers.1.mlp.router`), first layer first."""
        for index, block in enumerate(self.layers):
            if isinstance(block.mlp, MoE):
                yield f"layers.{index}.mlp.router", block.mlp.router

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw all weights; reset router biases, counts and observed logits. Works on shards, after `to_empty`, and needs no communication."""
        for name, parameter in self.named_parameters():
            initialise(parameter, name, seed, self.config.initializer_range)
        for _, router in self.routers():
            router.e_score_correction_bias.zero_()
            router.tokens_per_expert.zero_()
        for module in self.modules():
            if isinstance(module, Attention):
                module.max_logits.fill_(-torch.inf)
