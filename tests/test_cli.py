from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

# First here, not in a test: Lightning's log handler keeps the stderr that it finds, which a test's capture closes.
import lightning.pytorch  # noqa: F401
import pytest
import torch
import yaml

from lightning_robust.cli import main
from lightning_robust.results import find_runs, read_records, read_run_json

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def recipe(tmp_path, **changes):
    """A complete small recipe; ``changes`` replace settings by dotted name."""
    demo = {"path": "demo", "num_examples": 24}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_robust.RobustClassifier",
            "init_args": {"backbone": {"path": "demo"}, "learning_rate": 1e-3},
        },
        "data": {
            "class_path": "lightning_robust.TextDataModule",
            "init_args": {
                "train": [{**demo, "split": "train"}],
                "validation": {**demo, "split": "validation"},
                "clean": {**demo, "split": "test"},
                "ood": {"gadgets": {**demo, "split": "ood_gadgets"}},
                "batch_size": 8,
            },
        },
        "trainer": {
            "max_epochs": 2,
            "callbacks": [
                {
                    "class_path": "lightning_robust.callbacks.RobustnessMonitor",
                    "init_args": {"attacks": ["deepwordbug"], "num_examples": 4},
                }
            ],
        },
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        place[last] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def failure(capsys, arguments) -> str:
    """Run a command that must fail with one clear error; return it."""
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("error: ") == 1
    return error[error.index("error: ") :]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_fit_trains_monitors_and_reports(tmp_path, capsys):
    assert main(["fit", "-c", recipe(tmp_path), *QUIET]) == 0
    folder = tmp_path / "checkpoints" / "mine" / "version_0"
    assert "Report:  checkpoints/mine/version_0/report.html" in capsys.readouterr().out
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert set(read_records(folder)["epoch"].to_pylist()) == {0, 1}
    assert (folder / "config.yaml").is_file()
    assert read_run_json(folder)["recipe"]["model"]["init_args"]["learning_rate"] == 1e-3
    assert "finished" in read_run_json(folder)
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    for stage in ("validate", "test"):
        assert main([stage, "-c", recipe(tmp_path), "--ckpt_path", str(checkpoint), *QUIET]) == 0
    names = {run.parent.name + "/" + run.name for run in find_runs(tmp_path / "checkpoints")}
    assert names == {"mine/version_0", "version_1/validate", "version_2/test"}
    again = ["fit", "-c", recipe(tmp_path, trainer__max_epochs=3), "--ckpt_path", str(checkpoint), *QUIET]
    assert main(again) == 0
    assert set(read_records(folder)["epoch"].to_pylist()) == {0, 1, 2}


def test_evaluate_checkpoint_export_and_adapter(tmp_path, capsys):
    from lightning_robust import Backbone, RobustClassifier

    settings = ["-c", recipe(tmp_path)]
    assert main(["fit", *settings, *QUIET, "--trainer.max_epochs=1"]) == 0
    trained = next((tmp_path / "checkpoints").rglob("*.ckpt"))
    module = RobustClassifier.load_from_checkpoint(trained)
    module.save_pretrained("export")
    RobustClassifier(Backbone("demo", adaptation="lora")).save_pretrained("adapter")
    during = read_records(trained.parents[1]).drop_columns(["run_id", "epoch", "global_step", "seconds"])
    for model in (str(trained), "export", "adapter"):
        assert (
            main(
                [
                    "evaluate",
                    model,
                    *settings,
                    "-o",
                    f"out/{trained.name if model.endswith('ckpt') else model}",
                ]
            )
            == 0
        )
    assert "gadgets" in capsys.readouterr().out
    for name in (trained.name, "export"):
        after = read_records(tmp_path / "out" / name).drop_columns(
            ["run_id", "epoch", "global_step", "seconds"]
        )
        assert after.drop_columns(["probability"]).equals(during.drop_columns(["probability"]))
        assert (tmp_path / "out" / name / "report.html").is_file()
    assert main(["evaluate", "export", *settings, "-o", "out/export", "--no-attack"]) == 0
    assert set(read_records(tmp_path / "out" / "export-2")["attack"].to_pylist()) == {""}
    command = ["evaluate", "export", *settings, "-o", "out/set", "--attack", "deepwordbug", "--setting"]
    assert main([*command, "max_edit_distance=1"]) == 0
    changed = read_records(tmp_path / "out" / "set").to_pylist()
    assert all(row["words_changed"] <= 1 for row in changed)
    assert main([*command, "max_edit_distance=0"]) == 1
    assert "`max_edit_distance` to be >= 1, but got 0" in capsys.readouterr().err
    assert main(["evaluate", "export", *settings, "--setting", "max_edit_distance=1"]) == 1
    assert "Expected --attack with --setting" in capsys.readouterr().err


def test_report_of_two_runs(tmp_path, capsys):
    for _ in range(2):
        assert main(["fit", "-c", recipe(tmp_path), *QUIET, "--trainer.max_epochs=1"]) == 0
    assert (
        main(["report", "checkpoints/mine/version_0", "checkpoints/mine/version_1", "-o", "both.html"]) == 0
    )
    assert "version_1" in (tmp_path / "both.html").read_text()
    assert "does not exist" in failure(capsys, ["report", "checkpoints/mini", "-o", "none.html"])
    assert not (tmp_path / "none.html").exists()


def test_ls_show_cp(tmp_path, capsys):
    assert main(["ls"]) == 0
    listed = capsys.readouterr().out
    assert "sentiment/freelb_lora" in listed
    assert "early_stop_joint" in listed
    assert main(["show", "sentiment/freelb"]) == 0
    shown = capsys.readouterr().out
    assert (
        "lightning_robust.defenses.FreeLB" in yaml.safe_load(shown)["trainer"]["callbacks"][0]["class_path"]
    )
    assert main(["cp", "sentiment/freelb", "my.yaml"]) == 0
    assert (tmp_path / "my.yaml").read_text() == shown
    (tmp_path / "my.yaml").write_text("mine")
    assert "--force" in failure(capsys, ["cp", "monitor", "my.yaml"])
    assert (tmp_path / "my.yaml").read_text() == "mine"
    assert "Did you mean «sentiment/freelb»" in failure(capsys, ["show", "sentiment/freelbb"])


def test_check_names_all_faults_at_once(tmp_path, capsys):
    path = recipe(
        tmp_path,
        model__init_args={"backbone": {"pth": "demo"}, "learning_rat": 1},
        data__init_args__train=[{"path": "demo", "splitt": "train"}],
        data__init_args__ood={"x": {"path": "demo", "subsett": "a"}},
        trainer__max_epoch=3,
        trainer__callbacks=[
            {"class_path": "lightning_robust.defenses.FreeLBB"},
            {"class_path": "FreeLB", "init_args": {"steps": 1}},
        ],
        optimiser={},
    )
    for command in (["check", path], ["fit", "-c", path]):
        error = failure(capsys, command)
        assert "9 faults" in error
        for hint in ("path", "learning_rate", "split", "subset", "max_epochs", "FreeLB", "optimizer"):
            assert f"Did you mean «{hint}»" in error
        assert "Backbone needs `path`" in error
        assert "no setting 'steps'" in error
    assert not (tmp_path / "checkpoints").exists()
    assert main(["check", "sentiment/freelb", "monitor", "checkpoint_joint"]) == 0


def test_bad_values_fail_before_anything_is_written(tmp_path, capsys):
    error = failure(capsys, ["fit", "-c", recipe(tmp_path, data__init_args__batch_size="many")])
    assert "batch_size" in error
    error = failure(capsys, ["fit", "-c", recipe(tmp_path), "--trainer.max_epochz=3"])
    assert "max_epochz" in error
    assert "Name a recipe" in failure(capsys, ["fit", "--trainer.max_epochs=1"])
    error = failure(capsys, ["fit", "-c", "sentiment/freelbb"])
    assert "Did you mean «sentiment/freelb»" in error
    assert not (tmp_path / "checkpoints").exists()


BAD_DATA = {
    "column": ("a\tb\nx\t1\n", "a, b"),
    "map": ("text\tlabel\ngood\tfine\nbad\tawful\n", "rows 1, 2"),
    "missing label": ("text\tlabel\ngood\t1\nbad\t\n", "row 2"),
    "fraction": ("text\tlabel\ngood\t1\nbad\t0.5\n", "row 2"),
    "empty text": ("text\tlabel\ngood\t1\n\t0\n", "row 2"),
    "empty file": ("", "empty"),
    "header only": ("text\tlabel\n", "no row"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_clear_error(case, tmp_path, capsys):
    content, expected = BAD_DATA[case]
    (tmp_path / "bad.tsv").write_text(content)
    path = recipe(tmp_path, data__init_args__train=[{"path": str(tmp_path / "bad.tsv")}])
    error = failure(capsys, ["fit", "-c", path, *QUIET])
    assert expected in error
    assert "bad.tsv" in error
    assert not list(tmp_path.rglob("*.ckpt"))


def test_missing_file_and_broken_encoding(tmp_path, capsys):
    (tmp_path / "reviews.tsv").write_bytes(b"text\tlabel\nfine\t1\nb\xffd\t0\n")
    path = recipe(tmp_path, data__init_args__train=[{"path": "reviews.tsv"}])
    assert "UTF-8" in failure(capsys, ["fit", "-c", path, *QUIET])
    path = recipe(tmp_path, data__init_args__train=[{"path": "review.tsv"}])
    assert "Did you mean «reviews.tsv»" in failure(capsys, ["fit", "-c", path, *QUIET])


def test_odd_texts_go_through(tmp_path, capsys):
    rows = [("x" * 1_000_000, 1), ("👍🏽 عظيم جدا", 1), ("سيئ للغاية", 0), ("word " * 5000, 0)]
    (tmp_path / "odd.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    path = recipe(
        tmp_path, data__init_args__train=[{"path": "odd.tsv"}], data__init_args__clean={"path": "odd.tsv"}
    )
    arguments = ["fit", "-c", path, *QUIET, "--trainer.max_epochs=1"]
    assert main([*arguments, "--trainer.callbacks.query_budget=3"]) == 0


def test_model_faults(tmp_path, capsys):
    def fails(**changes):
        return failure(capsys, ["fit", "-c", recipe(tmp_path, **changes), *QUIET])

    error = fails(model__init_args__backbone={"path": "demo", "adaptation": "lora", "lora_targets": ["quer"]})
    assert "Did you mean" in error
    error = fails(model__init_args__backbone={"path": "demo", "quantization": "4bit"})
    assert "4bit" in error
    error = fails(model__init_args__backbone={"path": "nobody/nothing"})
    assert "local" in error
    error = fails(data__init_args__train=[{"path": "nobody/nothing"}])
    assert "local" in error
    vrex = [{"class_path": "lightning_robust.defenses.VREx"}]
    error = fails(data__init_args__train=[{"path": "demo", "domain": "one"}], trainer__callbacks=vrex)
    assert "2 or more domains" in error
    assert not list(tmp_path.rglob("*.ckpt"))


def test_checkpoint_of_another_label_count_or_backbone(tmp_path, capsys):
    assert main(["fit", "-c", recipe(tmp_path), *QUIET, "--trainer.max_epochs=1"]) == 0
    checkpoint = str(next((tmp_path / "checkpoints").rglob("*.ckpt")))
    other = recipe(tmp_path, model__init_args__num_labels=3)
    assert "num_labels" in failure(capsys, ["fit", "-c", other, "--ckpt_path", checkpoint, *QUIET])
    assert "no checkpoint" in failure(capsys, ["evaluate", "missing.ckpt", "-c", other])


def test_evaluate_says_that_defended_predictors_are_left_out(tmp_path, capsys):
    from lightning_robust import Backbone, RobustClassifier

    RobustClassifier(Backbone("demo")).save_pretrained("export")
    path = recipe(tmp_path)
    assert main(["evaluate", "export", "-c", path, "--no-attack"]) == 0
    assert "inference_defenses" not in capsys.readouterr().out
    content = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    content["trainer"]["callbacks"][0]["init_args"]["inference_defenses"] = {
        "vote": {"name": "RandomMaskVote"}
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert main(["evaluate", "export", "-c", path, "--no-attack"]) == 0
    told = capsys.readouterr().out
    assert "warning: The recipe's inference_defenses (vote) are left out" in told
    assert "lightning-robust test" in told


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    assert "nothing to evaluate" in failure(capsys, ["evaluate", "export"])
    (tmp_path / "clean.tsv").write_text("text\tlabel\ngood\t1\nbad\t0\n")
    error = failure(capsys, ["evaluate", "nowhere", "--clean", "clean.tsv"])
    assert "no model 'nowhere'" in error
    error = failure(capsys, ["evaluate", "nowhere", "--clean", "clean.tsv", "--attack", "deepwordbgu"])
    assert "Did you mean «deepwordbug»" in error
    assert "NAME=FILE" in failure(capsys, ["evaluate", "nowhere", "--ood", "x.tsv"])


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/dev/full"), reason="root may write anywhere")
def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    error = failure(capsys, ["fit", "-c", recipe(tmp_path, trainer__default_root_dir="taken"), *QUIET])
    assert "taken" in error
    assert (tmp_path / "taken").read_text() == "a file"


def test_ls_imports_no_heavy_package():
    code = (
        "import sys, lightning_robust\nfrom lightning_robust.cli import main\nmain(['ls'])\n"
        "print([m for m in ('torch', 'transformers', 'lightning', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def test_interrupt_during_an_attack_keeps_what_was_finished(tmp_path):
    """Ctrl-C as a terminal sends it, then the same command again."""
    demo = {"path": "demo", "split": "test"}
    path = recipe(tmp_path, data__init_args__clean=demo)
    from lightning_robust import Backbone, RobustClassifier

    RobustClassifier(Backbone("demo")).save_pretrained("export")
    program = tmp_path / "slow.py"
    program.write_text(
        "import os, signal, sys\n"
        "from lightning_robust.attacks.engine import AttackEngine\n"
        "from lightning_robust.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without\n"
        "run = AttackEngine.run\n"
        "def stopping(self, attack, items, budget=None, seed=0, on_result=None, **more):\n"
        "    finished = []\n"
        "    def count(result):\n"
        "        on_result(result)\n"
        "        finished.append(result)\n"
        "        if len(finished) == 10 and sys.argv[1] == 'stop':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "    return run(self, attack, items, budget, seed, count, **more)\n"
        "AttackEngine.run = stopping\n"
        f"sys.exit(main(['evaluate', 'export', '-c', {path!r}, '-o', 'out', '--num-examples', '40']))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(how):
        return subprocess.run(
            [sys.executable, str(program), how], capture_output=True, text=True, env=environment, check=False
        )

    stopped = run("stop")
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    assert "goes on from there" in stopped.stderr
    assert not list((tmp_path / "out" / "records").glob("*.parquet"))
    (partial,) = (tmp_path / "out" / "records").glob(".*.jsonl")
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    assert len(kept) == 10
    resumed = run("go on")
    assert resumed.returncode == 0, resumed.stderr
    table = read_records(tmp_path / "out")
    attacked = [row for row in table.to_pylist() if row["kind"] == "attack"]
    assert len(attacked) == 40
    seconds = {row["item_id"]: row["seconds"] for row in attacked}
    assert all(seconds[row["item_id"]] == pytest.approx(row["seconds"], rel=1e-5) for row in kept)


def test_labels_that_the_model_does_not_have(tmp_path, capsys):
    (tmp_path / "three.tsv").write_text("text\tlabel\ngood\t1\nbad\t0\nso so\t2\n")
    (tmp_path / "huge.tsv").write_text("text\tlabel\ngood\t1\nbad\t20261121\n")
    for place in ("train", "clean"):
        source = {"path": "three.tsv"}
        changes = {f"data__init_args__{place}": [source] if place == "train" else source}
        assert "num_labels" in failure(capsys, ["fit", "-c", recipe(tmp_path, **changes), *QUIET])
    path = recipe(tmp_path, data__init_args__train=[{"path": "huge.tsv"}])
    assert "Is it the label?" in failure(capsys, ["fit", "-c", path, *QUIET])
    mapped = {"path": "three.tsv", "label_map": {0: -1, 1: 0, 2: 1}}
    path = recipe(tmp_path, data__init_args__train=[mapped])
    assert "got -1 for '0'" in failure(capsys, ["fit", "-c", path, *QUIET])


def test_without_a_logger_the_working_folder_is_left_alone(tmp_path):
    path = recipe(tmp_path)
    (tmp_path / "config.yaml").write_text("mine")
    arguments = ["fit", "-c", path, *QUIET, "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    for _ in range(2):
        assert main([*arguments, "--trainer.max_epochs=1"]) == 0
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert {run.name for run in find_runs(tmp_path)} == {"robustness", "robustness-2"}


def test_evaluate_of_damaged_and_foreign_files(tmp_path, capsys):
    (tmp_path / "clean.tsv").write_text("text\tlabel\ngood\t1\nbad\t0\n")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name in ("empty.ckpt", "torn.ckpt", "foreign.ckpt", "clean.tsv"):
        assert "cannot be loaded" in failure(capsys, ["evaluate", name, "--clean", "clean.tsv"])
    assert "no config.json" in failure(capsys, ["evaluate", "folder", "--clean", "clean.tsv"])


def test_monitors_that_are_missing_or_doubled(tmp_path, capsys):
    assert "expected one RobustnessMonitor" in failure(capsys, ["check", "demo", "monitor"])
    assert "Add: -c monitor" in failure(capsys, ["fit", "-c", "sentiment/erm", "-c", "early_stop_joint"])


def test_a_full_disk_leaves_no_torn_checkpoint(tmp_path, capsys, monkeypatch):
    def full(checkpoint, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_robust.commands.train.torch.save", full)
    error = failure(capsys, ["fit", "-c", recipe(tmp_path), *QUIET])
    assert "Free some space" in error
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".ckpt", ".tmp"))]


def test_training_that_ends_early_is_measured_at_its_end(tmp_path):
    assert main(["fit", "-c", recipe(tmp_path), *QUIET, "--trainer.max_steps=2"]) == 0
    assert set(read_records(tmp_path / "checkpoints")["global_step"].to_pylist()) == {2}


def test_check_knows_suites(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    for settings, fault in (
        ("{suite: advglue, task: sst2}", None),
        ("{suite: advglue, task: sst}", "Did you mean «sst2»?"),
        ("{suite: advgleu, task: sst2}", "Did you mean «advglue»?"),
        ("{suite: advglue, taks: sst2}", "SuiteSource has no setting 'taks'. Did you mean «task»?"),
    ):
        file.write_text(
            "model:\n  class_path: lightning_robust.RobustClassifier\n  init_args: {backbone: {path: x}}\n"
            "data:\n  class_path: lightning_robust.TextDataModule\n"
            f"  init_args:\n    train:\n      - {{path: demo}}\n    adversarial:\n      one: {settings}\n"
        )
        assert main(["check", str(file)]) == (fault is not None)
        assert fault is None or fault in capsys.readouterr().err


def monitored_with(tmp_path, attacks):
    return recipe(tmp_path, trainer__callbacks__0__init_args__attacks=attacks)


def test_attacks_with_settings_in_a_recipe(tmp_path):
    name = monitored_with(tmp_path, ["deepwordbug", {"name": "embedding_pgd", "epsilon": 0.15}])
    assert main(["fit", "-c", name, "--trainer.fast_dev_run=true", *QUIET]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "embedding_pgd", "epsilom": 1.0}, "has no setting 'epsilom'. Did you mean «epsilon»?"),
        ({"name": "embeding_pgd"}, "Did you mean «embedding_pgd»?"),
        ({"epsilon": 1.0}, "expected the settings of an attack with its `name`"),
    ],
)
def test_faulty_settings_of_attacks_are_found(settings, message, tmp_path, capsys):
    assert message in failure(capsys, ["check", monitored_with(tmp_path, [settings])])
