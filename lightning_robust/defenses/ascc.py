"""ASCC: consistent predictions over the convex hull of each word's synonyms."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_robust.defenses.base import Batch, Defense, Step
from lightning_robust.defenses.checks import check_inner_gradients, expect
from lightning_robust.defenses.divergences import kl, over_calls
from lightning_robust.defenses.head import ClassifierHead, Seen
from lightning_robust.defenses.hull import ConvexHull, SynonymTable
from lightning_robust.defenses.synonyms import Synonyms, load_synonyms
from lightning_robust.defenses.texts import needed_tokenizer
from lightning_robust.defenses.vocabulary import Vocabulary
from lightning_robust.errors import ConfigError
from lightning_robust.modules.embeddings import input_embeddings


class ASCC(Defense):
    """Minimise L(e) + weight · KL(f(e) ‖ f(ê)), ê in the convex hull of each word's synonyms.

    ê = Σ_s w_s · E(s) over a word and its synonyms s, w = softmax(v). v starts at 0 and takes ``num_steps``
    of Adam up KL(f(e) ‖ f(ê)) − ``sparsity`` · H̄(w), where H̄ is the mean entropy over the words of a row: a
    sparse w is close to a real substitution. In the last pass w is fixed, and gradients reach
    the embeddings of all synonyms.

    Only words that are one token, with synonyms that are one token, move. Synonyms are the
    counter-fitted neighbours.

    Source: Dong et al. 2021, arXiv 2107.13541. Its code starts v at small random numbers and without dropout in
    the ascent; its step is 1 for BERT and 10 elsewhere.

    Args:
        weight: Of the divergence; 0 is training without the defense.
        num_steps: Steps of Adam; each costs one forward pass and a backward pass to the embeddings.
        step_size: Adam's learning rate.
        sparsity: Weight of the entropy of w.
        max_synonyms: Of each word.
        synonyms: ``{"word": ["synonym", ...]}``, or the path of a file of neighbours or vectors; by default
            the counter-fitted neighbours.
        embeddings: Name of the embedding submodule, where it cannot be found.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        tokenizer: By default that of the module or its data module; a name or path is loaded.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no embeddings, no logits, no
            tokenizer or no synonyms.
    """

    aim = "adversarial"
    needs: ClassVar[tuple[str, ...]] = ("embeddings", "logits", "tokenizer", "synonyms")
    cost = 8.37

    def __init__(
        self,
        weight: float = 4.0,
        num_steps: int = 10,
        step_size: float = 1.0,
        sparsity: float = 10.0,
        max_synonyms: int = 8,
        synonyms: Synonyms = None,
        embeddings: str | None = None,
        head: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.weight = expect("weight", weight, at_least=0)
        self.num_steps = expect("num_steps", num_steps, at_least=1, whole=True)
        self.step_size = expect("step_size", step_size, at_least=0)
        self.sparsity = expect("sparsity", sparsity, at_least=0)
        self.max_synonyms = expect("max_synonyms", max_synonyms, at_least=1, whole=True)
        self.synonyms = synonyms
        self.embeddings = embeddings
        self.head = head
        self.tokenizer = tokenizer
        self._layer: nn.Module | None = None
        self._head: ClassifierHead | None = None
        self._table: SynonymTable | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.weight == 0:
            return
        self._layer = input_embeddings(pl_module, self.embeddings)
        self._head = ClassifierHead(pl_module, self.head)
        vocabulary = Vocabulary(needed_tokenizer(self, pl_module, self.tokenizer))
        self._table = SynonymTable(vocabulary, load_synonyms(self.synonyms), self.max_synonyms)
        if not self._table.has_any():
            raise ConfigError(
                f"Expected words that are one token, with synonyms that are one token, but none of the "
                f"tokenizer's {len(vocabulary.words)} words has any. Give others: "
                'synonyms={"good": ["fine", "great"]}.'
            )
        check_inner_gradients(self, pl_module)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.weight == 0:
            return step(batch)
        assert self._layer is not None
        assert self._head is not None
        assert self._table is not None
        with self._head.watch(self.chain) as clean:
            loss = step(batch)
        hull = ConvexHull(self.chain, self._layer, self._table)
        self._ascend(hull, step, batch, clean, self._head)
        for logits in hull.logits.values():
            logits.requires_grad_(False)
        with hull.apply(), self._head.watch(self.chain) as moved:
            step(batch)
        return loss + self.weight * over_calls(kl, clean, moved)

    def _ascend(self, hull: ConvexHull, step: Step, batch: Batch, clean: Seen, head: ClassifierHead) -> None:
        fixed = Seen({key: logits.detach() for key, logits in clean.logits.items()})
        rows = sum(map(len, fixed.logits.values()))
        adam: torch.optim.Adam | None = None
        for _ in range(self.num_steps):
            with hull.apply(), head.watch(self.chain) as moved:
                step(batch)
            leaves = list(hull.logits.values())
            # Sums over rows, so that no row's steps depend on the others in the batch.
            objective = rows * over_calls(kl, fixed, moved) - self.sparsity * hull.entropy()
            gradients = torch.autograd.grad(objective * self.chain.loss_scale, leaves)
            adam = adam or torch.optim.Adam(leaves, lr=self.step_size, maximize=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient / self.chain.loss_scale
            adam.step()
