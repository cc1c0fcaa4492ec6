"""A language model of three-slot blocks; with encoder blocks alone, a model of masked tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from memshard.models.block import Block
from memshard.models.build_blocks import build_blocks, build_ngrams
from memshard.models.compat import is_compiled
from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.layers.adaptive_softmax import AdaptiveHead
from memshard.models.layers.convolution import RecentRows
from memshard.models.layers.linear import Projection, TokenEmbedding
from memshard.models.layers.norm import build_norm
from memshard.models.layers.position import AxialPositions, near_square, sinusoids
from memshard.models.loss import IGNORE, chunked, places_of, token_losses
from memshard.models.memory.check_input import kind_of
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.mixers.mixer import MixerState
from memshard.models.ngram.memory import NgramMemory
from memshard.models.ngram.recent_tokens import TokenWindow
from memshard.models.random import dropout
from memshard.models.recompute.checkpointing import Recompute, checkpointed, run_block
from memshard.models.recompute.grid import Grid
from memshard.models.recompute.replay import Replay
from memshard.models.recompute.reversible import reversible_blocks

# The number of no block, for the key of the embedding's dropout mask.
_EMBEDDING_LAYER = -1


class Transformer(nn.Module):
    """Embeddings, blocks and an output head. `config.vocab_size` must be set, and
    `config.max_length` for learned positions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError(
                "model.vocab_size is not set: give the size of the tokenizer's vocabulary"
            )
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.dim)
        self.positions = _build_positions(config)
        ngrams = build_ngrams(config)
        blocks = nn.ModuleList(build_blocks(config, ngrams))
        self.blocks = cast("list[Block]", blocks)
        self.window: TokenWindow | None = None
        """Finds the n-grams of a text, for the memories that are addressed by them, if any."""
        self.embedding_ngram: NgramMemory | None = None
        """A memory that is added to the embedding."""
        if config.ngram.layers:
            self.window = TokenWindow(config.ngram, config.vocab_size)
            if config.ngram.place == "embedding":
                self.embedding_ngram = ngrams[0]
        self.grid = Grid() if config.residual == "reversible" else None
        # A tied head has the embedding's width and so reads the mean of two streams.
        width = 2 * config.dim if self.grid is not None and not config.tie_head else config.dim
        # Post-norm blocks end with a norm.
        self.norm = nn.Identity() if config.residual == "post" else build_norm(config.norm, width)
        self.head: Projection | AdaptiveHead | None = (
            None if config.tie_head else Projection(width, config.vocab_size)
        )
        if config.adaptive_cutoffs:
            self.head = AdaptiveHead(
                width, config.vocab_size, config.adaptive_cutoffs, config.adaptive_division
            )
        self.configure(Recompute())
        self.share_sequence: Callable[[Tensor, Context], tuple[Tensor, Context]] | None = None
        """Set by `parallel/` where ranks share the tokens of a sequence: pads its end until the
        ranks' parts are equally long, and adds this rank's part to the context.
        """

    def configure(self, recompute: Recompute, label_smoothing: float = 0.0) -> None:
        """Set how training computes: what backward recomputes, and the share of each target that
        is spread over the whole vocabulary.
        """
        self.recompute, self.label_smoothing = recompute, label_smoothing

    def forward(
        self,
        tokens: Tensor,
        ctx: Context | None = None,
        states: Sequence[MixerState] | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, list[MixerState] | None]:
        """Return logits of the next token at every position, [batch, length, vocabulary], or, with
        targets, their `token_losses`, [batch, length]; and the advanced states.

        tokens: [batch, length] int64. ctx: default: plain unpadded text from position 0. states:
        those of `init_states`, when tokens continue what they have seen. targets: [batch,
        length] int64; the head is then computed `chunk` tokens at a time.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are integers [batch, length], not {kind_of(tokens)}")
        if ctx is None:
            seen = states[0].length if states else 0
            self.check_length(seen + tokens.shape[1])
            ctx = Context.of(tokens, seen)
        if self.recompute.segments > 1 and targets is not None and torch.is_grad_enabled():
            return self._in_segments(tokens, ctx, states, targets)
        return self._pass(tokens, ctx, states, targets)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if the model has no positions for so many tokens."""
        most = self.config.max_length
        if self.positions is not None and most is not None and tokens > most:
            raise ValueError(
                f"the text has {tokens} tokens and the model {most} {self.config.position} "
                "positions: shorten the text, or generate fewer tokens"
            )

    def _in_segments(
        self, tokens: Tensor, ctx: Context, states: Sequence[MixerState] | None, targets: Tensor
    ) -> tuple[Tensor, list[MixerState] | None]:
        """Return the losses of one segment after the other. Gradients flow back through the states;
        a segment keeps only the state before it and is recomputed in backward.
        """
        states, losses = states or self.init_states(len(tokens), tokens.shape[1]), []
        for segment, facts in ctx.split(-(-tokens.shape[1] // self.recompute.segments)):
            # The states carry gradients from one segment to the one before.
            some, states = checkpointed(
                self._pass, tokens[:, segment], facts, states, targets[:, segment]
            )
            losses.append(some)
        return torch.cat(losses, 1), list(states)

    def _pass(
        self,
        tokens: Tensor,
        ctx: Context,
        states: Sequence[MixerState] | None,
        targets: Tensor | None,
        replay: Replay | None = None,
    ) -> tuple[Tensor, list[MixerState] | None]:
        length = tokens.shape[1]
        text: RecentRows | None = None
        if self.window is not None:
            text = cast(RecentRows, states[-1]) if states else None
            window, text = self.window(tokens, ctx, text)
            ctx = replace(ctx, window=window)
        if self.share_sequence is not None:
            if states:
                raise ValueError(
                    "ranks that share a sequence cannot decode token by token: load the "
                    "checkpoint with memshard.load_model"
                )
            tokens, ctx = self.share_sequence(tokens, ctx)
        if self.grid is not None:
            # Pass the embedding directly: a local variable would keep it alive
            # through the whole pass.
            x1, x2, advanced = reversible_blocks(
                self.stack,
                self.grid,
                self._embed(tokens, ctx, replay=replay),
                ctx,
                states,
                self.recompute.check_inversion,
                self.recompute.chunk,
            )
            streams = [x1, x2]
        else:
            x = self._embed(tokens, ctx, replay=replay)
            checkpointing = self.recompute.checkpointing if torch.is_grad_enabled() else "none"
            advanced = []
            traced = ctx
            if ctx.random is not None and any(map(is_compiled, self.stack)):
                traced = replace(ctx, random=ctx.random.on(x.device))
            for layer, block in enumerate(self.stack):
                x, state = run_block(
                    checkpointing,
                    block,
                    x,
                    traced if is_compiled(block) else ctx,
                    states[layer] if states else None,
                    self.recompute.chunk,
                    replay,
                )
                if state is not None:
                    advanced.append(state)
            streams = [x]
        if text is not None:
            advanced.append(cast(MixerState, text))
        if targets is not None:
            assert self.share_sequence is None
            return self._losses(*streams, targets, places=ctx.predicted), advanced or None
        logits = self._logits(*streams)
        # Without what `share_sequence` appended.
        return logits if logits.shape[1] == length else logits[:, :length], advanced or None

    def _losses(self, *inputs: Tensor, places: Tensor | None = None) -> Tensor:
        """Return losses, [batch, length], 0 where a target is IGNORE. inputs: streams, targets.
        places: see `Context.predicted`.
        """
        shape = inputs[-1].shape
        # Sliding windows and masked tokens ask for few losses, and the head is most of a small
        # model's work: compute only those. A language model in training predicts nearly everywhere,
        # and asking would wait for the device.
        if places is None and not torch.is_grad_enabled():
            places = places_of(inputs[-1] != IGNORE)
        if places is not None and len(places) < shape.numel():
            few = (x.flatten(0, 1).index_select(0, places)[None] for x in inputs)
            losses = self._chunked_losses(*few)
            return losses.new_zeros(shape.numel()).index_copy(0, places, losses[0]).view(shape)
        return self._chunked_losses(*inputs)

    def _chunked_losses(self, *inputs: Tensor) -> Tensor:
        return (
            chunked(self._chunk_losses, *inputs, chunk=self.recompute.chunk)
            if self.recompute.chunk
            else self._chunk_losses(*inputs)
        )

    def _chunk_losses(self, *inputs: Tensor) -> Tensor:
        *streams, targets = inputs
        if isinstance(self.head, AdaptiveHead):
            return self.head.losses(self._joined(*streams), targets)
        return token_losses(
            self._logits(*streams), targets, self.label_smoothing if self.training else 0.0
        )

    def _logits(self, *streams: Tensor) -> Tensor:
        x = self._joined(*streams)
        if isinstance(self.head, AdaptiveHead):
            return self.head.logits(x)
        return self.embedding.logits(x) if self.head is None else self.head(x)

    def _joined(self, *streams: Tensor) -> Tensor:
        """Return the head's input."""
        x = streams[0]
        if len(streams) == 2:
            x = (streams[0] + streams[1]) / 2 if self.head is None else torch.cat(streams, dim=-1)
        return cast(Tensor, self.norm(x))

    @property
    def stack(self) -> Sequence[Block]:
        """The blocks that tokens pass; `states` has one entry for each."""
        return self.blocks

    def init_states(self, batch: int, capacity: int) -> list[MixerState]:
        """Return empty states for `batch` rows of at most `capacity` tokens: one of each block, and
        that of the text where n-grams are read.
        """
        states = [block.init_state(batch, capacity) for block in self.stack]
        if self.window is not None:
            device = self.embedding.weight.device
            states.append(cast(MixerState, self.window.init_state(batch, device)))
        return states

    def reorder(self, states: Sequence[MixerState], rows: Tensor) -> list[MixerState]:
        """Return the states whose row i is row rows[i] of these. rows: [new batch] int64."""
        return [
            part.reorder(state, rows) for part, state in zip(self._keepers, states, strict=True)
        ]

    def rollback(self, states: Sequence[MixerState], tokens: int) -> list[MixerState]:
        """Return the states before their last `tokens` tokens. ValueError where they are gone."""
        return [
            part.rollback(state, tokens) for part, state in zip(self._keepers, states, strict=True)
        ]

    def reset(self, states: Sequence[MixerState], rows: Tensor) -> list[MixerState]:
        """Forget everything in the given rows (a document ended there). rows: [batch] bool."""
        return [part.reset(state, rows) for part, state in zip(self._keepers, states, strict=True)]

    @property
    def _keepers(self) -> list[Any]:
        """The parts of the model that have states, in their order."""
        return [*self.stack, *([] if self.window is None else [self.window])]

    def ngrams(self) -> Iterator[tuple[int, NgramMemory]]:
        """Yield (layer, memory) for every memory that is addressed by tokens."""
        if self.embedding_ngram is not None:
            yield 0, self.embedding_ngram
        for block in self.blocks:
            if block.ngram is not None:
                yield block.layer, block.ngram

    def memories(self) -> Iterator[tuple[int, ProductKeyMemory]]:
        """Yield (layer, memory) for every block with a memory."""
        for block in self.blocks:
            if block.memory is not None:
                yield block.layer, block.memory

    def _embed(
        self, tokens: Tensor, ctx: Context, branch: int = 0, replay: Replay | None = None
    ) -> Tensor:
        x = self.embedding(tokens)
        if self.embedding_ngram is not None:
            x = x + self.embedding_ngram(x, ctx.local, None, replay)[0]
        if self.positions is not None:
            x = x + self.positions(ctx.local.positions)
        elif self.config.position == "sinusoidal":
            # Embeddings are small (std 0.02): scale them up to the size of the sinusoids (Vaswani
            # et al. 2017, section 3.4).
            x = x * self.config.dim**0.5 + sinusoids(ctx.local.positions, self.config.dim).to(
                x.dtype
            )
        if self.training and self.config.dropout and ctx.random is not None:
            x = dropout(
                x, self.config.dropout, ctx.random, ctx.local.positions, _EMBEDDING_LAYER, branch
            )
        return x


def _build_positions(config: ModelConfig) -> nn.Module | None:
    if config.position not in ("learned", "axial"):
        return None
    if config.max_length is None:
        raise ValueError(
            f"model.max_length is not set: {config.position} positions need the longest sequence"
        )
    if config.position == "axial":
        return AxialPositions(config.axial or near_square(config.max_length), config.dim)
    return TokenEmbedding(config.max_length, config.dim)
