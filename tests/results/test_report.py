from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_robust.results import RecordsError, write_records, write_report, write_run_json
from lightning_robust.results.records import encode_text
from lightning_robust.results.report.examples import changed_spans, choose_examples, load_examples
from lightning_robust.results.study import load_study
from tests.results.synthetic import evaluation, record, write_run

FULL = {"clean/clean": 0.8, "attack/deepwordbug": 0.2, "ood/yelp": 0.7, "ood/imdb": 0.6}
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects what a reader and a browser would meet, and checks that elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(runs: object, tmp_path: Path) -> Page:
    path = write_report(runs, tmp_path / "report.html")  # type: ignore[arg-type]
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert "nan" not in page.text.lower().split()
    return page


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name in ("fgm", "freelb", "vrex"):
        write_run(tmp_path / "study" / name, name, [FULL] * 3, num_items=40, label_names=["neg", "pos"])
    return tmp_path / "study"


def test_report_without_a_baseline_says_what_happened_and_what_to_do(study: Path, tmp_path: Path) -> None:
    page = report(study, tmp_path)
    assert "There is no verdict:" in page.text
    assert "Train without any defense with the same seeds" in page.text
    assert page.text.count("went from its first evaluation (epoch 0) to its last (epoch 2)") == 3
    assert "40 items" in page.text
    assert page.tags.count("svg") == 4  # three panels and the plane
    assert page.tags.count("figcaption") == page.tags.count("figure") == 2
    assert page.tags.count("caption") == page.tags.count("table") == 4
    assert "mark" in page.tags
    assert "del" in page.tags
    assert "pos → neg" in page.text or "neg → pos" in page.text


def test_report_needs_no_network_and_no_script(study: Path, tmp_path: Path) -> None:
    page = report(study, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", html)
    assert all(found in page.ids for found in re.findall(r"url\(#([^)]*)\)", html))


def test_figures_follow_the_page_colours(study: Path, tmp_path: Path) -> None:
    html = write_report(study, tmp_path / "r.html").read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--run-2)" in drawings
    assert "var(--muted)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings)


def test_text_from_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = [
        record(run_id=evil, environment=evil, kind="clean"),
        record(run_id=evil, kind="ood", environment=f'"><img src=x onerror={evil}>'),
        record(
            run_id=evil, kind="attack", attack=evil, status="success", correct=False, predicted=0,
            text=f"a {evil} film", perturbed_text=f"a <b>{evil}</b> flim", words_changed=1,
        ),
    ]  # fmt: skip
    write_records(tmp_path / "run" / "records" / "a.parquet", rows)
    info = {"name": evil, "label_names": [evil, "</title>"], evil: evil, "recipe": {evil: [evil]}}
    write_run_json(tmp_path / "run", info)
    page = report(tmp_path / "run", tmp_path)
    assert not {"script", "img", "b"} & set(page.tags)
    assert page.text.count(evil) >= 8


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([{"clean/clean": 0.8}] * 2, "not measured on adversarial text or under distribution shift"),
        ([{"ood/yelp": 0.8}] * 2, "not measured on clean text or on adversarial text"),
        ([FULL], "was evaluated once (epoch 0)"),
        ([{"clean/clean": 0.8, "adversarial/advglue": 0.3}] * 2, "not measured under distribution shift"),
        ([{"clean/clean": 0.8}, FULL], "not measured at first"),
        ([FULL, {"clean/clean": 0.8}], "not measured on adversarial text or under distribution shift"),
        ([{"clean/clean": 0.0, "attack/deepwordbug": 0.0, "ood/a": 0.0}] * 2, "to 0.0"),
        ([{"clean/clean": 1.0, "attack/deepwordbug": 1.0, "ood/a": 1.0}] * 2, "no successful attack"),
        ([{"clean/clean": 1.0, "attack/embedding_pgd": 0.5}] * 2, "no successful attack on a text"),
        ([{"clean/clean": 0.8}], "No attack ran"),
    ],
)
def test_degenerate_runs_get_words(levels: list[dict[str, float]], words: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "run", levels, num_items=40)
    assert words in report(tmp_path / "run", tmp_path).text


def test_too_few_items_give_the_reason_and_no_number(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "run", [FULL] * 2, num_items=7)
    text = report(tmp_path / "run", tmp_path).text
    assert "No accuracy is given on clean text" in text
    assert "7 items are too few for an interval (30 are needed)" in text
    assert "nothing to draw" in text
    shares = [f"{100 * right / 7:.1f}" for right in (1, 2, 3, 5, 6)]  # 4 of 7 have the most frequent label
    assert not [share for share in shares if f" {share} " in text]


def test_evaluation_outside_training(tmp_path: Path) -> None:
    rows = evaluation("hub-model", None, None, FULL, num_items=40)
    write_records(tmp_path / "hub-model" / "records" / "evaluate.parquet", rows)
    page = report(tmp_path / "hub-model", tmp_path)
    assert "hub-model was evaluated once:" in page.text
    assert "no run.json" in page.text


def test_runs_of_unlike_length_and_items(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a", [FULL] * 3, num_items=8)
    write_run(tmp_path / "b", "b", [{"clean/clean": 0.5, "ood/other": 0.4}], num_items=5)
    text = report([tmp_path / "a", tmp_path / "b"], tmp_path).text
    assert "5 to 8" in text
    assert "b was evaluated once (epoch 0)" in text
    assert "common to all" in text


def test_truncated_records_are_named_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "run", [FULL] * 2, num_items=4)
    last = sorted(run.glob("records/*.parquet"))[-1]
    last.write_bytes(b"PAR1 torn")
    page = report(run, tmp_path)
    assert last.name in page.text
    assert "was evaluated once (epoch 0)" in page.text


def test_nothing_to_report_is_an_error_and_keeps_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    write_records(tmp_path / "run" / "records" / "a.parquet", [])
    with pytest.raises(RecordsError, match="hold no rows"):
        write_report(tmp_path / "run", tmp_path / "report.html")
    with pytest.raises(RecordsError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"


def test_same_records_make_the_same_page(study: Path, tmp_path: Path) -> None:
    pages = [write_report(study, tmp_path / f"{i}" / "report.html") for i in range(2)]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    folders = [page.with_name("report_files") for page in pages]
    names = sorted(file.name for file in folders[0].iterdir())
    assert names == sorted(file.name for file in folders[1].iterdir())
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


def test_long_texts_are_cut_to_the_edits() -> None:
    words = [f"w{i}" for i in range(200)]
    edited = [*words[:100], "EDIT", *words[101:]]
    spans = changed_spans(" ".join(words), " ".join(edited))[1]
    assert [span.text for span in spans if span.changed] == ["EDIT"]
    assert spans[0].text.startswith("… w88")
    assert spans[-1].text.endswith("w112 …")
    assert len(changed_spans("x" * 10_000, "y")[0][0].text) == 60


def test_examples_are_found_in_records_with_columns_of_other_types(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "run", [FULL])
    expected = load_examples(load_study(tmp_path).conditions, 3, "last")
    (path,) = (tmp_path / "run" / "records").glob("*.parquet")
    table = pq.read_table(path)
    types = {"label": pa.float64(), "predicted": pa.int64(), "text": pa.large_string(), "attack": pa.string()}
    pq.write_table(table.cast(pa.schema([(f.name, types.get(f.name, f.type)) for f in table.schema])), path)
    found = load_examples(load_study(tmp_path).conditions, 3, "last")
    assert [example for _, example in found] == [example for _, example in expected]
    assert len(found) == 3
    at = table.column_names.index("label")
    pq.write_table(table.set_column(at, "label", pa.nulls(len(table), pa.int32())), path)
    assert load_examples(load_study(tmp_path).conditions, 3, "last") == []


def test_examples_prefer_small_edits_and_show_pairs() -> None:
    def row(
        item: str, text: str, perturbed: str | None, changed: int, attack: str = "a"
    ) -> dict[str, object]:
        return {
            "item_id": item, "text": text, "perturbed_text": perturbed, "words_changed": changed, "label": 1,
            "predicted": 0, "probability": 0.2, "status": "success", "attack": attack,
        }  # fmt: skip

    rows = [
        row("big", "one two", "eins zwei", 2),
        row("pair", str(encode_text(("p q r s", "h"))), str(encode_text(("p q r z", "h"))), 1),
        row("embedding", "one", None, 0, "pgd"),
        row("endless", "x " * 20_000, "y", 1),
    ]
    found = choose_examples(rows, 5)
    assert [example.words_changed for example in found] == [1, 2]
    assert [[span.text for span in part if span.changed] for part in found[0].perturbed] == [["z"], []]
