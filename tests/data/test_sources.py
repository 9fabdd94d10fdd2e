from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_robust.data.items import Item
from lightning_robust.data.sources import TextSource
from lightning_robust.errors import ConfigError, DataError

ROWS = [("a fine film", 1), ("a poor film", 0), ("no plot", 0), ("great cast", 1)]
SENTIMENT = {"Positive": 1, "Negative": 0}
RTE = {"entailment": 0, "not_entailment": 1, "non-entailment": 1}


def tsv(path: Path, rows: list[Any], header: str = "text\tlabel") -> str:
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def pairs_of(items: list[Item]) -> list[tuple[Any, int]]:
    return [(item.text, item.label) for item in items]


@pytest.fixture
def formats(tmp_path: Path) -> dict[str, dict[str, Any]]:
    texts, labels = zip(*ROWS, strict=True)
    records = [{"text": text, "label": label} for text, label in ROWS]
    tsv(tmp_path / "a.tsv", ROWS)
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"{t}",{n}\n' for t, n in ROWS))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "nested.json").write_text(json.dumps({"data": {"dev": records}, "version": 1}))
    (tmp_path / "columns.json").write_text(json.dumps({"text": texts, "label": labels}))
    pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "a.parquet")
    names = ["a.tsv", "a.csv", "a.jsonl", "a.json", "columns.json", "a.parquet"]
    sources: dict[str, dict[str, Any]] = {name: {"path": str(tmp_path / name)} for name in names}
    return {**sources, "nested": {"path": str(tmp_path / "nested.json"), "subset": "data.dev"}}


def test_every_format_reads_the_same(formats: dict[str, dict[str, Any]]) -> None:
    for settings in formats.values():
        assert pairs_of(TextSource(**settings).items()) == ROWS
    same_name = {tuple(i.id for i in TextSource(**s, name="a").items()) for s in formats.values()}
    assert len(same_name) == 1


def test_ids_are_the_same_everywhere(tmp_path: Path) -> None:
    items = TextSource(tsv(tmp_path / "a.tsv", [*ROWS, ROWS[0]])).items()
    assert [item.id for item in items[:2]] == ["44ca323a120600d2", "7bdfbd3cda56d6cb"]
    assert items[-1].id == "44ca323a120600d2-2"
    (tmp_path / "elsewhere").mkdir()
    moved = TextSource(tsv(tmp_path / "elsewhere" / "a.tsv", [ROWS[0], *ROWS[::-1]])).items()
    assert {item.id for item in moved} == {item.id for item in items}
    renamed = TextSource(str(tmp_path / "a.tsv"), name="b").items()
    assert not {item.id for item in renamed} & {item.id for item in items}


def test_repeated_texts_keep_their_label_with_their_id(tmp_path: Path) -> None:
    first = TextSource(tsv(tmp_path / "a.tsv", [("same", 1), ("same", 0)])).items()
    second = TextSource(tsv(tmp_path / "a.tsv", [("same", 0), ("same", 1)])).items()
    assert {item.id: item.label for item in first} == {item.id: item.label for item in second}


def test_ids_of_a_column(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", [("x", 0, "q1"), ("y", 1, "q2")], "text\tlabel\tkey")
    assert [item.id for item in TextSource(path, id_column="key").items()] == ["q1", "q2"]
    path = tsv(tmp_path / "a.tsv", [("x", 0, "q1"), ("y", 1, "q1")], "text\tlabel\tkey")
    with pytest.raises(DataError, match="occur once, but 'q1' does not"):
        TextSource(path, id_column="key").items()


def test_sampling_depends_on_the_seed_and_not_on_order(tmp_path: Path) -> None:
    rows = [(f"text {n}", n % 2) for n in range(100)]
    path = str(tmp_path / "a.tsv")
    tsv(tmp_path / "a.tsv", rows)
    sample = TextSource(path, num_examples=20).items()
    larger = TextSource(path, num_examples=40).items()
    other = TextSource(path, num_examples=20, seed=1).items()
    random.Random(0).shuffle(rows)
    tsv(tmp_path / "a.tsv", rows)
    assert TextSource(path, num_examples=20).items() == sample
    assert larger[:20] == sample
    assert {item.id for item in other} != {item.id for item in sample}


def test_more_asked_than_there_is(tmp_path: Path) -> None:
    source = TextSource(tsv(tmp_path / "a.tsv", ROWS), num_examples=5)
    with pytest.warns(UserWarning, match="`num_examples` is 5, but there are 4; using all"):
        assert len(source.items()) == 4


def test_load_returns_the_columns_of_the_contract(tmp_path: Path) -> None:
    single = TextSource(tsv(tmp_path / "a.tsv", ROWS), domain="films").load()
    assert single.column_names == ["id", "text", "label", "domain"]
    assert single[1]["text"] == "a poor film"
    assert single[1]["label"] == 0
    assert single[1]["domain"] == "films"
    path = tsv(tmp_path / "b.tsv", [("p", "h", 1)], "premise\thypothesis\tlabel")
    assert TextSource(path).load()[0]["text"] == ["p", "h"]
    assert TextSource(path).items()[0].text == ("p", "h")


def test_domains_of_a_column(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", [("x", 0, "q"), ("y", 1, "r")], "text\tlabel\tgroup")
    assert [item.domain for item in TextSource(path, domain_column="group").items()] == ["q", "r"]
    assert [item.domain for item in TextSource(path).items()] == ["a", "a"]
    with pytest.raises(ConfigError, match="one of `domain` and `domain_column`"):
        TextSource(path, domain="x", domain_column="group")


def test_label_map_renames_and_leaves_out(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", [("x", "good"), ("y", "bad"), ("z", "so-so")])
    source = TextSource(path, label_map={"good": 1, "bad": 0, "so-so": None})
    assert pairs_of(source.items()) == [("x", 1), ("y", 0)]
    assert source.items_and_names()[1] == ["bad", "good"]
    numbers: dict[Any, int | None] = {0: 1, 1: 0}
    assert TextSource(tsv(tmp_path / "a.tsv", [("x", "0.0")]), label_map=numbers).items()[0].label == 1


@pytest.mark.parametrize("quoting", ["auto", "none"])
def test_quotes_of_glue_files_are_ordinary_characters(tmp_path: Path, quoting: Any) -> None:
    rows = [('"open', 1), ('said "so" and', 0), ('"whole"', 1)]
    assert pairs_of(TextSource(tsv(tmp_path / "a.tsv", rows), quoting=quoting).items()) == rows


def test_quoted_fields_of_tsv_files(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", [('"say ""no"" now"', 1), ("plain", 0), ('"two\nlines\tand a tab"', 1)])
    expected = [('say "no" now', 1), ("plain", 0), ("two\nlines\tand a tab", 1)]
    assert pairs_of(TextSource(path).items()) == expected


def test_long_emoji_and_right_to_left_texts(tmp_path: Path) -> None:
    rows = [("x" * 1_000_000, 1), ("👩🏽‍🚀🔥", 0), ("فيلم رائع", 1), ("two\u2028lines\x85here", 0)]
    path = tsv(tmp_path / "a.tsv", rows)
    assert pairs_of(TextSource(path).items()) == rows
    assert TextSource(path).load()[1]["text"] == "👩🏽‍🚀🔥"


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes('text\tlabel\r\n"x\t1\r\n'.encode("utf-8-sig"))
    assert pairs_of(TextSource(str(tmp_path / "a.tsv")).items()) == [('"x', 1)]


BAD_ROWS = {
    "missing label": ([("x", "1"), ("y", "")], {}, "label is missing in row 2"),
    "nan label": ([("x", "nan"), ("y", "1")], {}, "label is missing in row 1"),
    "label no integer": ([("x", "1"), ("y", "0.5")], {}, r"expected whole numbers, but got '0.5' in row 2"),
    "names without a map": ([("x", "p"), ("y", "n")], {}, r'label_map: {"n": 0, "p": 1}'),
    "outside the map": (
        [("x", "pos"), ("y", "pso")],
        {"label_map": {"pos": 1, "neg": 0}},
        "label 'pso' in row 2 is not in `label_map`. Did you mean «pos»",
    ),
    "negative label": ([("x", "1"), ("y", "-1")], {}, "0 or more, but got '-1' in row 2"),
    "empty text": ([("x", "1"), (" ", "1")], {}, "'text': empty text in row 2"),
    "ragged row": ([("x", "1"), ("y", "1", "z")], {}, r"row 2: expected 2 columns .text, label., but got 3"),
    "no such column": ([("x", "1")], {"text_columns": "txt"}, "'txt'.*Did you mean «text».*: text, label"),
    "no such label": ([("x", "1")], {"label_column": "y"}, "no column 'y' .`label_column`.*: text, label"),
    "no such id": ([("x", "1")], {"id_column": "key"}, "no column 'key' .`id_column`"),
    "no such domain": ([("x", "1")], {"domain_column": "g"}, "no column 'g' .`domain_column`"),
    "header only": ([], {}, "a header but no rows"),
    "all left out": ([("x", "1")], {"label_map": {"1": None}}, "no row is left"),
    "subset of a table": ([("x", "1")], {"subset": "sst2"}, "has no subsets"),
}


@pytest.mark.parametrize(("rows", "settings", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        TextSource(tsv(tmp_path / "a.tsv", rows), **settings).items()
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "empty": ("a.tsv", b"", "is empty"),
    "blank": ("a.csv", b"\n \n", "is empty"),
    "latin": ("a.tsv", b"text\tlabel\ncaf\xe9\t1\n", "not UTF-8: byte 0xe9 at offset 14 .line 2"),
    "open quote": ("a.csv", b'text,label\n"open,1\n', "quoting: none"),
    "no usual text": ("a.tsv", b"words\tlabel\nx\t1\n", "Set `text_columns` to one or two of: words, label"),
    "no usual label": ("a.tsv", b"text\ty\nx\t1\n", "Set `label_column` to one of: text, y"),
    "twice": ("a.tsv", b"text\ttext\tlabel\nx\ty\t1\n", "'text' stand twice"),
    "broken json": ("a.json", b"[{", "line 1: not JSON"),
    "broken jsonl": ("a.jsonl", b'{"text": "x", "label": 1}\n{"text"\n', "line 2: not JSON"),
    "no record": ("a.jsonl", b"[1]\n", "row 1: expected an object, but got .1."),
    "no list": ("a.json", b'{"dev": [{"text": "x"}]}', "the keys dev. Choose one with `subset`"),
    "scalar": ("a.json", b"3", "expected a list of records in the file, but got 3"),
    "no records": ("a.json", b"[]", "expected a list of records"),
    "null label": ("a.jsonl", b'{"text": "x", "label": null}\n', "label is missing in row 1"),
    "key missing": ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": "y"}\n', "label is missing in row 2"),
    "null text": ("a.jsonl", b'{"text": null, "label": 1}\n', "empty text in row 1"),
    "no text": ("a.jsonl", b'{"text": ["x"], "label": 1}\n', "expected text in row 1, but got list"),
    "broken parquet": ("a.parquet", b"PAR1", "not a Parquet file"),
    "unknown suffix": ("a.xlsx", b"x", "to end on one of .csv, .tsv"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        TextSource(str(tmp_path / name)).items()


def test_missing_file_names_its_siblings(tmp_path: Path) -> None:
    tsv(tmp_path / "train.tsv", ROWS)
    with pytest.raises(DataError, match=r"Did you mean «train.tsv»\?.* holds: train.tsv"):
        TextSource(str(tmp_path / "trian.tsv")).items()
    with pytest.raises(DataError, match=r"Its folder .* does not exist"):
        TextSource(str(tmp_path / "nowhere" / "train.tsv")).items()


def test_missing_subset_and_split(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"sst2": [{"text": "x", "label": 1}]}))
    with pytest.raises(DataError, match=r"no `subset` 'sst3'. Did you mean «sst2»"):
        TextSource(str(tmp_path / "a.json"), subset="sst3").items()
    with pytest.raises(DataError, match=r"no split 'tests'. Did you mean «test»"):
        TextSource("demo", split="tests").items()


def test_empty_texts_can_be_left_out(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", [("x", 1), (" ", 0), ("nan", 0)])
    assert pairs_of(TextSource(path, skip_empty=True).items()) == [("x", 1), ("nan", 0)]


def test_hub_id_while_offline_names_the_alternative() -> None:
    with pytest.raises(
        DataError, match=r"Cannot load the hub data set stanfordnlp/sst2.*a local file"
    ) as caught:
        TextSource("stanfordnlp/sst2", split="validation").items()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_examples": 0}, "`num_examples` to be >= 1"), ({"quoting": "all"}, "`quoting` to be one of")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextSource("demo", **settings)


SHARED: list[tuple[str, dict[str, Any], int]] = [
    ("sst2/train.tsv", {}, 67349),
    ("sst2/dev.tsv", {}, 872),
    ("imdb/train_4000.tsv", {}, 4000),
    ("imdb/test_4000.tsv", {}, 4000),
    ("yelp/dev_6000.tsv", {}, 6000),
    *((f"amazon/{name}.tsv", {}, 2000) for name in ("books", "dvd", "electronics")),
    *((f"contrast/dev_{twin}.tsv", {"label_map": SENTIMENT}, 100) for twin in ("original", "contrast")),
    *((f"contrast/test_{twin}.tsv", {"label_map": SENTIMENT}, 488) for twin in ("original", "contrast")),
    *((f"cad/{twin}_train.tsv", {"label_map": SENTIMENT}, 1707) for twin in ("orig", "new")),
    *((f"cad/{twin}_dev.tsv", {"label_map": SENTIMENT}, 245) for twin in ("orig", "new")),
    *((f"cad/{twin}_test.tsv", {"label_map": SENTIMENT}, 488) for twin in ("orig", "new")),
    (
        "flipkart/flipkart_review.csv",
        {"text_columns": "Summary", "label_map": {"positive": 1, "negative": 0, "neutral": 2}},
        331,
    ),
    *((f"style_shift/{name}.tsv", {}, 872) for name in ("base", "augment", "tweet_p0", "romantic_p0")),
    ("advglue/dev.json", {"subset": "sst2"}, 148),
    ("advglue/dev.json", {"subset": "qqp"}, 78),
    ("advglue/dev.json", {"subset": "mnli"}, 121),
    ("advglue/dev.json", {"subset": "mnli-mm"}, 162),
    ("advglue/dev.json", {"subset": "qnli"}, 148),
    ("advglue/dev.json", {"subset": "rte"}, 81),
    *((f"advglue_pp/advglueplusplus_{task}.csv", {}, 300) for task in ("sst2", "qnli", "mnli", "qqp")),
    ("promptrobust/sst2_instructions.csv", {}, 600),
    ("mbib/gender-bias.csv", {"skip_empty": True}, 17939),
    ("mbib/text-level-bias.csv", {}, 9018),
    ("mbib/fake-news.csv", {}, 8542),
    ("mbib/cognitive-bias.csv", {}, 7092),
    ("mbib/hatexplain.csv", {}, 20148),
    ("rte/train.tsv", {"label_map": RTE}, 2490),
    ("rte/dev.tsv", {"label_map": RTE}, 277),
    ("hans/hans_3000.tsv", {"label_map": RTE}, 3000),
]


@pytest.mark.parametrize(
    ("path", "settings", "size"), SHARED, ids=[f"{p}:{s.get('subset')}" for p, s, _ in SHARED]
)
def test_real_files_load_whole(shared: Path, path: str, settings: dict[str, Any], size: int) -> None:
    items = TextSource(str(shared / "data" / path), **settings).items()
    assert len(items) == size
    assert len({item.id for item in items}) == size
    paired = any(name in path or name in settings.get("subset", "") for name in ("rte", "nli", "qqp", "hans"))
    assert all(isinstance(item.text, tuple) == paired for item in items)


def test_real_names_of_classes(shared: Path) -> None:
    path = str(shared / "data" / "ddxplus" / "ddxplus_100.csv")
    settings: dict[str, Any] = {"text_columns": "Information", "label_column": "Diagnosis"}
    with pytest.raises(DataError, match="label_map: ") as caught:
        TextSource(path, **settings).items()
    shown = str(caught.value).split("label_map: ")[1].rsplit("`", 1)[0]
    assert len(TextSource(path, label_map=json.loads(shown), **settings).items()) == 100


def test_sources_import_neither_lightning_nor_torch() -> None:
    code = (
        "import sys; from lightning_robust.data.sources import TextSource; TextSource('demo').items(); "
        "sys.exit(bool({'lightning', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextSource(tsv(tmp_path / "a.tsv", ROWS), num_examples=2).items()
