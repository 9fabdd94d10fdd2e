"""Attack texts typed by hand, from a file or from standard input, and show what is found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from lightning_robust.attacks import Attack, AttackEngine, AttackResult
from lightning_robust.attacks.blind import rehearse
from lightning_robust.attacks.goal import predicted_class
from lightning_robust.attacks.sanity import sanity_warnings
from lightning_robust.callbacks.attack_plan import check_budget, make_attacks
from lightning_robust.callbacks.item_records import LOGIT_NOISE
from lightning_robust.commands.attack_file import ResultFile
from lightning_robust.commands.attack_input import (
    Given,
    as_items,
    attack_specs,
    check_files,
    parse_label,
    read_texts,
    typed,
)
from lightning_robust.commands.attack_view import name_of, show_result, summary, visible
from lightning_robust.data.items import Item
from lightning_robust.data.sampling import stable_hash
from lightning_robust.errors import RobustError
from lightning_robust.modules.encoding import encode
from lightning_robust.modules.state_key import fingerprint
from lightning_robust.modules.victim import Victim
from lightning_robust.modules.victim_loading import load_victim

_NO_LIMIT = 1 << 30


def attack(out: Console, options: argparse.Namespace) -> None:
    """Attack what the options name, show it, and write it to ``options.output``.

    Raises:
        RobustError: If the model, an attack, a label or the texts cannot be used.
    """
    attacks = make_attacks(attack_specs(options.attack or ["deepwordbug"], options.setting))
    check_budget(options.query_budget)
    check_files(options.file, options.output)
    table = read_texts(options)
    victim, about = load_victim(options.model, options.max_length)
    names = _label_names(victim, about["hyperparameters"].get("label_names"))
    label = None if options.label is None else parse_label(options.label, names)
    file = None if options.output is None else _result_file(options, victim, attacks, names)
    session = _Session(out, victim, names, attacks, options.query_budget, options.seed, file)
    if table is None or len(attacks) > 1:
        session.rehearse()
    try:
        if table is None:
            session.converse(label)
        else:
            session.attack(as_items(table, options, names, label))
        session.summarize()
    finally:
        if file is not None and session.results:
            out.print(f"Results: {options.output}", soft_wrap=True, markup=False)


def _result_file(
    options: argparse.Namespace, victim: Victim, attacks: Sequence[Attack], names: Sequence[str]
) -> ResultFile:
    common = (fingerprint(victim.model), victim.max_length, options.query_budget, options.seed)
    runs = {one.name: stable_hash(*common, one.name, repr(one.settings)) for one in attacks}
    return ResultFile(options.output, runs, names)


@dataclass
class _Session:
    """A victim under attack, and what was found so far, which goes to a file as soon as it is found."""

    out: Console
    victim: Victim
    names: Sequence[str]
    attacks: Sequence[Attack]
    query_budget: int | None
    seed: int
    file: ResultFile | None
    results: list[AttackResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A bar and results on the same terminal would write over each other.
        progress = False if self.out.is_terminal else None
        self.engine = AttackEngine(self.victim, progress=progress, keep_answers=True)

    def rehearse(self) -> None:
        """Load what attacks need: what is missing should not show after another attack's hour of work."""
        rehearse(self.attacks, self.victim)

    def converse(self, label: int | None) -> None:
        """Attack one text after the other as they are typed, until the end of input."""
        self.say("Type a text to attack; end with Ctrl-D.")
        for text in _prompted(self.out):
            try:
                self.attack(typed(text, label))
            except RobustError as error:
                self.say(f"error: {error}")

    def attack(self, given: Given) -> None:
        """Run every attack on the items; without labels, the victim's predictions are the labels."""
        for note in given.notes:
            self.say(note)
        self._tell_what_is_cut(given.items)
        # An instruction's label has no meaning.
        if given.labelled or all(one.kind == "instruction" for one in self.attacks):
            items = given.items
        else:
            items = self._with_predictions(given.items)
        for one in self.attacks:
            done = (
                {} if self.file is None else {r.item_id: r for r in self.file.found if r.attack == one.name}
            )
            keep = self._keeper(one, items)
            found = self.engine.run(one, items, self.query_budget, self.seed, keep, done)
            taken = [result for result in found if done.get(result.item_id) is result]
            self.results += taken
            if taken and self.file is not None:
                self.say(
                    f"{one.name}: {len(taken)} of {len(items)} results were in {self.file.path} already."
                )

    def summarize(self) -> None:
        """Say what each attack did to all items, and what is doubtful about it."""
        groups = {one.name: [r for r in self.results if r.attack == one.name] for one in self.attacks}
        groups = {name: group for name, group in groups.items() if group}
        if max(map(len, groups.values()), default=0) < 2:
            return
        self.out.print()
        for name, group in groups.items():
            self.say(summary(name, group))
        for warning in sanity_warnings(groups, len(self.names), query_budget=self.query_budget):
            self.say(f"warning: {warning.message}")

    def say(self, text: str) -> None:
        """Print lines as they are."""
        for line in text.split("\n"):
            self.out.print(visible(line), soft_wrap=True, markup=False, emoji=False)

    def _keeper(self, attack: Attack, items: Sequence[Item]) -> Callable[[AttackResult], None]:
        numbers = {item.id: f"{number}/{len(items)} " for number, item in enumerate(items, start=1)}
        names = None if attack.kind == "instruction" else self.names

        def keep(result: AttackResult) -> None:
            if self.file is not None:
                self.file.append(result)
            self.results.append(result)
            show_result(self.out, result, names, numbers[result.item_id] if len(items) > 1 else "")

        return keep

    def _with_predictions(self, items: Sequence[Item]) -> list[Item]:
        predicted = [predicted_class(row, LOGIT_NOISE) for row in self.victim([item.text for item in items])]
        shown = f" ({name_of(predicted[0], self.names)})" if len(items) == 1 else ""
        self.say(f"Without labels, what the model predicts{shown} counts as right.")
        return [replace(item, label=label) for item, label in zip(items, predicted, strict=True)]

    def _tell_what_is_cut(self, items: Sequence[Item]) -> None:
        limit = self.victim.max_length
        encoded = encode(self.victim.tokenizer, [item.text for item in items], _NO_LIMIT)
        lengths = [len(one.input_ids) for one in encoded]
        longer = sum(length > limit for length in lengths)
        if longer:
            what = f"{longer} of {len(items)} texts have" if len(items) > 1 else "The text has"
            self.say(
                f"{what} up to {max(lengths)} tokens, of which the model reads {limit}: what is cut off has no "
                "effect and is never changed."
            )


def _prompted(out: Console) -> Iterator[str]:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # lets `input` understand arrow keys
    while True:
        try:
            line = input("> ")
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            out.print()  # what follows would stand behind the prompt
            raise
        if line.strip():
            yield line


def _label_names(victim: Victim, given: Sequence[str] | None) -> list[str]:
    if given:
        return [str(name) for name in given]
    config: Any = victim.model.config
    named = {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}
    names = [named.get(number, str(number)) for number in range(int(config.num_labels))]
    # What transformers calls classes that have no name.
    return [name.removeprefix("LABEL_") for name in names]
