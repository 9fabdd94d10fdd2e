"""The plain and defended predictors side by side, in one training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_robust.callbacks import RobustnessMonitor
from lightning_robust.callbacks.evaluation import Evaluation, When
from lightning_robust.cli import main
from lightning_robust.data import Environment, Item
from lightning_robust.defenses.inference import Certificate, RandomMaskVote, TestTimeAugmentation
from lightning_robust.errors import ConfigError
from lightning_robust.results import find_runs, metrics, read_records, read_run_json
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches, labelled
from tests.callbacks.test_monitor import character_victim, comparable, monitor, trainer
from tests.foreign import PlainEncoder, loader

VOTE = {"name": "RandomMaskVote", "share": 0.7, "num_copies": 9, "certificate_copies": 30, "mask_token": "_"}
DEFENSES: dict[str, Any] = {"vote": VOTE, "tta": lambda victim: TestTimeAugmentation(victim, num_copies=2)}


def test_plain_and_defended_predictors_are_measured_side_by_side(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", monitor="vote/joint/min", mode="max")
    watch = monitor(tmp_path / "run", inference_defenses=DEFENSES)
    run = trainer(tmp_path, [watch, keep], max_epochs=2)
    module = PlainEncoder()
    run.fit(module, loader(), loader())
    plain = {
        key
        for key in run.callback_metrics
        if key.startswith(("clean/", "adv/", "ood/", "joint/", "transfer/"))
    }
    for name in DEFENSES:
        assert {f"{name}/{key}" for key in plain} <= set(run.callback_metrics)
    assert keep.best_model_score is not None

    folders = [tmp_path / "run", tmp_path / "run" / "vote", tmp_path / "run" / "tta"]
    assert watch.folders == folders
    assert sorted(find_runs(tmp_path)) == sorted(folders)
    tables = [read_records(folder) for folder in folders]
    infos = [read_run_json(folder) for folder in folders]
    assert len({table["run_id"][0].as_py() for table in tables}) == 3
    for table, info in zip(tables, infos, strict=True):
        assert set(table["run_id"].to_pylist()) == {info["run_id"]}
        assert table["item_id"].equals(tables[0]["item_id"])
        assert [one["epoch"] for one in info["evaluations"]] == [0, 1]
    assert [info["name"] for info in infos] == ["run", "run + vote", "run + tta"]
    assert [info["plain_run_id"] for info in infos] == [None, infos[0]["run_id"], infos[0]["run_id"]]
    assert infos[0]["inference_defense"] is None
    assert infos[1]["inference_defense"]["class"] == "RandomMaskVote"
    assert infos[1]["inference_defense"]["aim"] == "adversarial"
    assert infos[1]["inference_defense"]["settings"]["certificate_copies"] == 30

    # What was recorded is what the defended victim says of the weights as they are now.
    last = tables[1].filter(pc.and_(pc.equal(tables[1]["epoch"], 1), pc.equal(tables[1]["kind"], "clean")))
    defended = RandomMaskVote(character_victim(module), **{k: v for k, v in VOTE.items() if k != "name"})
    texts = last["text"].to_pylist()
    answers = defended(texts)[torch.arange(len(texts)), torch.tensor(last["label"].to_pylist())]
    torch.testing.assert_close(torch.tensor(last["probability"].to_pylist()), answers)
    radii = [one.radius for one in defended.certificates(texts) if one is not None]
    assert last["certified_radius"].to_pylist() == radii
    assert set(last["certificate_confidence"].to_pylist()) == {0.95}
    assert 1 in radii
    attacked = tables[1].filter(pc.equal(tables[1]["kind"], "attack"))
    for table in (tables[0], tables[2], attacked):
        assert table["certified_radius"].null_count == table.num_rows
        assert table["certificate_confidence"].null_count == table.num_rows
    logged = float(run.callback_metrics["vote/clean/accuracy"])
    assert logged == pytest.approx(pc.mean(last["correct"].cast("float64")).as_py())


def test_the_plain_run_is_as_without_defenses(tmp_path: Path) -> None:
    weights = []
    for name, defenses in (("without", None), ("with", DEFENSES)):
        module = PlainEncoder(dropout=0.3)
        torch.manual_seed(0)
        watch = monitor(tmp_path / name, inference_defenses=defenses)
        trainer(tmp_path, [watch], max_epochs=2).fit(module, loader(), loader())
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert comparable(read_records(tmp_path / "without")).equals(comparable(read_records(tmp_path / "with")))


def test_resumed_run_goes_on_in_every_folder(tmp_path: Path) -> None:
    def train(folder: Path, epochs: int, ckpt_path: Path | None = None) -> Trainer:
        keep = ModelCheckpoint(folder / "c", save_top_k=-1, filename="{epoch}")
        watch = monitor(folder, inference_defenses=DEFENSES, warm_start=True)
        run = trainer(tmp_path, [watch, keep], max_epochs=epochs)
        run.fit(PlainEncoder(), loader(), loader(), ckpt_path=ckpt_path)
        return run

    whole = train(tmp_path / "whole", 2)
    train(tmp_path / "parts", 1)
    again = train(tmp_path / "parts", 2, tmp_path / "parts" / "c" / "epoch=0.ckpt")
    for part in ("", "vote", "tta"):
        tables = [read_records(tmp_path / name / part) for name in ("whole", "parts")]
        assert comparable(tables[0]).equals(comparable(tables[1]))
        assert len(set(tables[1]["run_id"].to_pylist())) == 1
    for key in ("vote/transfer/adv_delta", "vote/transfer/ood_delta", "tta/clean/accuracy"):
        assert torch.equal(whole.callback_metrics[key], again.callback_metrics[key])
    checkpoint = torch.load(tmp_path / "parts" / "c" / "epoch=1.ckpt", weights_only=True)
    assert set(checkpoint["callbacks"]["RobustnessMonitor"]["defended"]) == {"vote", "tta"}


def test_a_checkpoint_of_a_monitor_without_defenses_can_be_resumed_with_them(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", save_last=True)
    trainer(tmp_path, [monitor(tmp_path / "run"), keep], max_epochs=1).fit(PlainEncoder(), loader(), loader())
    watch = monitor(tmp_path / "run", inference_defenses={"vote": VOTE})
    trainer(tmp_path, [watch], max_epochs=2).fit(
        PlainEncoder(), loader(), loader(), ckpt_path=tmp_path / "c" / "last.ckpt"
    )
    assert set(read_records(tmp_path / "run")["epoch"].to_pylist()) == {0, 1}
    assert set(read_records(tmp_path / "run" / "vote")["epoch"].to_pylist()) == {1}


def test_no_old_score_is_credited_to_new_weights(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, [monitor(tmp_path, every_n_epochs=2, inference_defenses={"vote": VOTE})], max_epochs=2
    )
    seen = []
    watch: Any = run.callbacks[0]  # type: ignore[attr-defined]
    during = watch._during_fit

    def look(*arguments: Any) -> None:
        during(*arguments)
        seen.append(float(run.callback_metrics["vote/clean/accuracy"]))

    watch._during_fit = look
    run.fit(PlainEncoder(), loader(), loader())
    assert seen[0] != seen[0]
    assert 0 <= seen[1] <= 1
    with pytest.raises(ConfigError, match=r"'vote/joint/min'.*check_val_every_n_epoch=2"):
        trainer(tmp_path, [EarlyStopping("vote/joint/min"), watch]).fit(PlainEncoder(), loader(), loader())


def test_validate_has_runs_of_its_own(tmp_path: Path) -> None:
    watch = monitor(tmp_path, inference_defenses={"vote": VOTE})
    run = trainer(tmp_path, [watch], max_epochs=1)
    module = PlainEncoder()
    run.fit(module, loader(), loader())
    during = dict(run.callback_metrics)
    run.validate(module, loader(), verbose=False)
    for key in ("clean/accuracy", "vote/clean/accuracy", "vote/adv/accuracy"):
        assert torch.equal(run.callback_metrics[key], during[key])
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet")}
    fit = "records/epoch=000-step=00000004.parquet"
    assert names == {
        fit,
        f"vote/{fit}",
        "validate/records/validate.parquet",
        "validate/vote/records/validate.parquet",
    }


def test_what_a_defense_lacks_shows_when_fit_starts(tmp_path: Path) -> None:
    module = PlainEncoder()
    before = module.head.weight.clone()
    watch = monitor(tmp_path, inference_defenses={"vote": "RandomMaskVote"})
    with pytest.raises(ConfigError, match="`mask_token`"):
        trainer(tmp_path, [watch]).fit(module, loader(), loader())
    assert torch.equal(module.head.weight, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clean": "RandomMaskVote"}, "none of which is clean, .* but got 'clean'"),
        ({"a/b": "RandomMaskVote"}, "letters, digits"),
        ({"vote": "RandomMask"}, "Did you mean «RandomMaskVote»"),
        ({"vote": {"name": "RandomMaskVote", "shares": 0.3}}, "Did you mean «share»"),
        ({"vote": 3}, "inference defense's name"),
        (["RandomMaskVote"], "`inference_defenses` to map names"),
    ],
)
def test_bad_settings(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RobustnessMonitor(inference_defenses=given)


def test_a_hugging_face_project_and_attacks_on_gradients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = HuggingFaceProject()
    other = HuggingFaceProject().model
    from lightning_robust.modules.victim import Victim

    watch = RobustnessMonitor(
        attacks=["deepwordbug", {"name": "embedding_pgd", "num_steps": 2}],
        num_examples=3,
        clean=labelled(5, 1),
        records_dir=tmp_path,
        progress=False,
        inference_defenses={
            "vote": {"name": "RandomMaskVote", "num_copies": 5},
            "pair": {"name": "Ensemble", "members": [Victim(other, module.tokenizer)]},
        },
    )
    run = trainer(tmp_path, [watch], max_epochs=1)
    run.fit(module, batches(module))
    assert {"adv/embedding_pgd/accuracy", "vote/adv/deepwordbug/accuracy"} <= set(run.callback_metrics)
    assert "vote/adv/embedding_pgd/accuracy" not in run.callback_metrics
    assert "pair/adv/accuracy" in run.callback_metrics
    assert set(read_run_json(tmp_path / "vote")["attacks"]) == {"deepwordbug"}


def test_a_text_that_cannot_be_answered_has_no_certificate() -> None:
    class Proving:
        def __call__(self, texts: list[str]) -> torch.Tensor:
            if "broken" in texts:
                raise ZeroDivisionError
            return torch.tensor([[0.2, 0.8]] * len(texts))

        def certificates(self, texts: list[str], *_: Any) -> list[Certificate]:
            assert "broken" not in texts
            return [Certificate(len(text.split()), 0.9) for text in texts]

    items = [Item(str(i), text, i % 2) for i, text in enumerate(["one two", "broken", "one"])]
    records = Evaluation([Environment("clean", "clean", tuple(items))]).run(Proving(), When("run"))
    assert [(r.certified_radius, r.certificate_confidence) for r in records] == [
        (2, 0.9),
        (None, None),
        (1, 0.9),
    ]
    assert metrics(records)["clean/accuracy"] == 0


def test_what_fails_in_a_certificate_costs_that_item_its_certificate_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def victim(texts: list[str]) -> torch.Tensor:
        if any(text.startswith("_ _") for text in texts):
            raise ZeroDivisionError("no word")
        return torch.tensor([[0.2, 0.8]] * len(texts))

    vote = RandomMaskVote(victim, 0.5, num_copies=1, mask_token="_", seed=1)
    texts = ["one two three four five", "film"]
    assert not any(copy.startswith("_ _") for text in texts for copy in vote.copies(text))
    items = tuple(Item(str(i), text, 1) for i, text in enumerate(texts))
    records = Evaluation([Environment("clean", "clean", items)]).run(vote, When("run"))
    assert [r.correct for r in records] == [True, True]
    assert [r.certificate_confidence for r in records] == [None, 0.95]
    assert [r.getMessage() for r in caplog.records if "certificate" in r.getMessage()] == [
        "1 of 2 items of «clean» have no certificate; the first: the victim raised ZeroDivisionError: no word."
    ]


def test_from_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = {"path": "demo", "num_examples": 12}
    monitored = {
        "attacks": ["deepwordbug"],
        "num_examples": 2,
        "query_budget": 10,
        "inference_defenses": {
            "vote": {"name": "RandomMaskVote", "share": 0.7, "num_copies": 3, "certificate_copies": 5},
            "tta": "TestTimeAugmentation",
        },
    }
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_robust.RobustClassifier",
            "init_args": {"backbone": {"path": "demo"}},
        },
        "data": {
            "class_path": "lightning_robust.TextDataModule",
            "init_args": {"train": [{**demo, "split": "train"}], "clean": {**demo, "split": "test"}},
        },
        "trainer": {
            "max_epochs": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "lightning_robust.callbacks.RobustnessMonitor", "init_args": monitored}
            ],
        },
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert main(["check", "mine.yaml"]) == 0
    assert main(["fit", "-c", "mine.yaml"]) == 0
    folder = tmp_path / "checkpoints" / "mine" / "version_0"
    clean = read_records(folder / "vote").filter(pc.field("kind") == "clean")
    assert clean["certificate_confidence"].to_pylist() == [0.95] * 12
    assert read_records(folder / "tta").num_rows == read_records(folder).num_rows == 14
    assert "+ vote" in (folder / "report.html").read_text()
    assert main(["fit", "-c", "mine.yaml", "--trainer.fast_dev_run=true"]) == 0
