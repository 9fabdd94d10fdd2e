"""Attacks written as searches, and the engine that advances many of them together."""

from __future__ import annotations

from lightning_robust.attacks.base import Attack, AttackResult, attack_class, get_attack, list_attacks
from lightning_robust.attacks.engine import AttackEngine
from lightning_robust.data.items import Item

__all__ = ["Attack", "AttackEngine", "AttackResult", "Item", "attack_class", "get_attack", "list_attacks"]
