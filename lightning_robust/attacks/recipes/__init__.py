"""One attack per file; importing it here makes it known."""

from __future__ import annotations

from lightning_robust.attacks.recipes import deepwordbug, embedding_pgd

__all__ = ["deepwordbug", "embedding_pgd"]
