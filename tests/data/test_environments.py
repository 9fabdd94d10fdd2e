from __future__ import annotations

import datasets
import pytest

from lightning_robust.data import Environment, Item, TextSource
from lightning_robust.data.environments import as_environment
from lightning_robust.errors import ConfigError, DataError

PAIRS = [("a fine film", 1), ("a dull film", 0), ("a fine film", 1)]


def test_every_kind_of_source_gives_the_same_items():
    texts, labels = zip(*PAIRS, strict=True)
    data = datasets.Dataset.from_dict({"sentence": list(texts), "label": list(labels)})
    from_list, from_dataset = (as_environment(source, "e", "ood").items for source in (PAIRS, data))
    assert from_list == from_dataset
    assert [(item.text, item.label) for item in from_list] == PAIRS
    assert len({item.id for item in from_list}) == 3
    source = TextSource("demo", split="test", num_examples=3)
    given = as_environment({"path": "demo", "split": "test", "num_examples": 3}, "e", "clean")
    assert list(given.items) == source.items() == list(as_environment(source, "e", "clean").items)
    assert as_environment(given, "other", "ood") == Environment("other", "ood", given.items)


def test_pairs_of_texts():
    rows = [(("it rains", "it is wet"), 0), (["a", "b"], 1)]
    assert [item.text for item in as_environment(rows, "nli", "clean").items] == [
        ("it rains", "it is wet"),
        ("a", "b"),
    ]
    with pytest.raises(DataError, match="to be a pair"):
        as_environment([(("a", "b"), 0), ("c", 1)], "nli", "clean")


def test_a_data_set_keeps_its_ids_and_domains():
    data = datasets.Dataset.from_dict(
        {"id": ["x", "y"], "text": ["a", "b"], "label": [0, 1], "domain": ["d", "e"]}
    )
    assert as_environment(data, "e", "ood").items == (Item("x", "a", 0, "d"), Item("y", "b", 1, "e"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "it is empty"),
        ([("a", 1), ("b",)], "row 2"),
        ([("a", 1), ("b", "one")], "row"),
        ([("a", 1), ("b", None)], "row 2"),
        ([("a", 1), ("", 0)], "row 2"),
        ([Item("x", "a", 0), Item("x", "b", 1)], "'x' occurs again"),
    ],
)
def test_bad_items(source, message):
    with pytest.raises(DataError, match=message):
        as_environment(source, "e", "clean")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "but got int"),
        ("file.tsv", "but got str"),
        ({"pth": "demo"}, "Did you mean «path»"),
        ({"split": "test"}, "needs `path`"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(ConfigError, match=message):
        as_environment(source, "e", "clean")


def test_one_class_is_a_warning():
    with pytest.warns(UserWarning, match="F1 is undefined"):
        as_environment([("a", 1), ("b", 1)], "e", "clean")
