"""Embeddings moved inside the convex hull of their words and these words' synonyms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks.neighbors import Neighbors
from lightning_robust.defenses.chain import DefenseChain
from lightning_robust.defenses.perturbation import CallNumbers, Key, _token_ids
from lightning_robust.defenses.vocabulary import Vocabulary, real_tokens
from lightning_robust.errors import ConfigError


class SynonymTable:
    """The ids of each token's synonyms, of words that are one token with synonyms that are one token.

    Args:
        vocabulary: What the ids stand for.
        neighbors: Where synonyms are looked up, when a word is first met.
        max_synonyms: Kept for each word, the nearest ones.
    """

    def __init__(self, vocabulary: Vocabulary, neighbors: Neighbors, max_synonyms: int) -> None:
        self._vocabulary = vocabulary
        self._neighbors = neighbors
        self._max = max_synonyms
        self._word_of = {value: word for word, value in vocabulary.words.items()}
        self._known: dict[int, list[int]] = {}

    def row(self, token: int) -> list[int]:
        """Return a word's own id and its synonyms', nearest first, then -1 up to ``1 + max_synonyms``."""
        if token not in self._known:
            word, ids = self._word_of.get(token), self._vocabulary.words
            near = [] if word is None else self._neighbors.nearest(word, self._max)
            found = list(dict.fromkeys([token, *(ids[n] for n in near if n in ids)]))
            self._known[token] = found + [-1] * (1 + self._max - len(found))
        return self._known[token]

    def has_any(self) -> bool:
        """Whether any word has a synonym."""
        return any(self.row(token)[1] >= 0 for token in self._word_of)

    def candidates(self, ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return where words can move ``(rows, seq)``, and their `row` ``(words, 1 + max_synonyms)``."""
        numbers = self._vocabulary.word_numbers(ids, real).cpu()
        whole = numbers >= 0
        same_as_next = numbers[:, 1:] == numbers[:, :-1]
        whole[:, 1:] &= ~same_as_next
        whole[:, :-1] &= ~same_as_next
        rows = [self.row(token) for token in ids.cpu()[whole].tolist()]
        table = torch.tensor(rows, dtype=torch.long).reshape(-1, 1 + self._max)
        movable = table[:, 1] >= 0
        whole[whole.clone()] = movable
        return whole.to(ids.device), table[movable].to(ids.device)


class ConvexHull:
    """Mixtures Σ_s w_s · E(s) in place of the embeddings E(x) of words, s over each word and its synonyms.

    The weights are softmax(logits), the same for each as long as the logits are zero, where they start: at the
    first call of the embedding layer, one for each set of rows that the step is called on and each time
    that it calls the layer. Everything else keeps its embedding.

    Args:
        chain: The running composition of defenses.
        layer: The embedding layer; it must embed each id for itself.
        table: The synonyms.
    """

    def __init__(self, chain: DefenseChain, layer: nn.Module, table: SynonymTable) -> None:
        self._chain = chain
        self._layer = layer
        self._table = table
        self._numbers = CallNumbers(chain)
        self.logits: dict[Key, Tensor] = {}
        """``(words, 1 + max_synonyms)``, -inf where there is no synonym."""
        self._where: dict[Key, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Mix the output of every call of the layer inside this context.

        Raises:
            ConfigError: If the step never called it.
        """
        self._numbers.restart()
        handle = self._layer.register_forward_hook(self._mix, with_kwargs=True)
        try:
            with self._chain.perturbing():
                yield
        finally:
            handle.remove()
        if not self._numbers.were_called():
            raise ConfigError(
                f"Expected the training step to call the layer {self._layer}, but it did not. "
                'Name the layer that embeds the input: embeddings="path.to.submodule".'
            )

    def weights(self, key: Key) -> tuple[Tensor, Tensor]:
        """Return w ``(words, 1 + max_synonyms)`` and its logarithm, both 0 where there is no synonym."""
        there = self._where[key][1] >= 0
        log = self.logits[key].masked_fill(~there, -torch.inf).log_softmax(-1)
        return log.exp(), log.masked_fill(~there, 0.0)

    def entropy(self) -> Tensor:
        """Return the mean entropy of a row's w in nats, summed over the rows."""
        total: Tensor | float = 0.0
        for key, (where, _) in self._where.items():
            weights, log = self.weights(key)
            words = where.sum(dim=1)[where.nonzero()[:, 0]]
            total = total - (weights * log).sum(-1).div(words).sum()
        assert isinstance(total, Tensor)
        return total

    def _mix(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        key = self._numbers.next()
        if key not in self.logits:
            self._where[key] = self._candidates(args, kwargs, output)
            ids = self._where[key][1]
            dtype = torch.promote_types(output.dtype, torch.float32)
            self.logits[key] = torch.zeros(ids.shape, dtype=dtype, device=ids.device, requires_grad=True)
        where, ids = self._where[key]
        # Past the layer's hooks, among them this one and those of other defenses.
        embedded = layer.forward(ids.clamp_min(0))
        change = (self.weights(key)[0].unsqueeze(-1) * embedded).sum(dim=1) - embedded[:, 0]
        # Added, so that what another defense has added stays.
        return output + torch.zeros_like(output).masked_scatter(where.unsqueeze(-1), change.to(output.dtype))

    def _candidates(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor]:
        batch = self._chain.batch
        ids = _token_ids(args, kwargs, batch)
        if ids is None or not isinstance(output, Tensor) or ids.shape != output.shape[:2] or output.ndim != 3:
            raise ConfigError(
                f"Expected the layer {self._layer} to map token ids (rows, seq) to embeddings (rows, seq, hidden). "
                'Name the one that does: embeddings="path.to.submodule".'
            )
        return self._table.candidates(ids, real_tokens(batch, ids))
