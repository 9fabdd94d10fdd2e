from __future__ import annotations

import copy
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_robust.callbacks import RobustnessMonitor
from lightning_robust.defenses import FreeLB, VREx
from lightning_robust.errors import AttackError, ConfigError
from lightning_robust.results import find_runs, read_records, read_run_json, transfer_deltas
from tests.foreign import PlainEncoder, loader

WORDS = ["good", "bad", "film", "plot", "fine", "awful", "the", "a", "great", "dull"]


def texts(number: int, start: int = 0) -> list[tuple[str, int]]:
    return [
        (f"{WORDS[i % 7]} {WORDS[(i * 3) % 10]} film number {i} {WORDS[i % 10]}", i % 2)
        for i in range(start, start + number)
    ]


def character_victim(module):
    """Reads characters as token ids: enough for attacks to bite on the foreign module."""

    def victim(batch):
        ids = [[1 + ord(c) % 22 for c in text][:40] for text in batch]
        length = max(map(len, ids), default=1) or 1
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        with torch.no_grad():
            return module(padded, (padded != 0).long()).softmax(-1)

    return victim


def monitor(tmp_path, **settings):
    return RobustnessMonitor(
        **{
            "attacks": ["deepwordbug"],
            "num_examples": 6,
            "clean": texts(12),
            "ood": {"shifted": texts(8, 50), "other": texts(5, 90)},
            "adversarial": {"static": texts(5, 70)},
            "victim": character_victim,
            "records_dir": tmp_path,
            "progress": False,
            **settings,
        }
    )


def trainer(tmp_path, callbacks, **settings):
    return Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_epochs": 3, **settings},
    )


def comparable(table):
    return table.drop_columns(["run_id", "seconds"])


def test_metrics_are_logged_and_recorded(tmp_path):
    run = trainer(tmp_path, [monitor(tmp_path)])
    run.fit(PlainEncoder(), loader(), loader())
    keys = set(run.callback_metrics)
    assert keys >= {
        *(f"clean/{m}" for m in ("accuracy", "f1", "precision", "recall")),
        *(f"adv/deepwordbug/{m}" for m in ("accuracy", "success_rate", "queries")),
        "adv/static/accuracy",
        "adv/accuracy",
        "ood/shifted/accuracy",
        "ood/shifted/f1",
        "ood/other/accuracy",
        "ood/accuracy",
        "ood/worst_accuracy",
        "joint/harmonic",
        "joint/min",
        *(f"transfer/{m}_{end}" for m in ("adv", "ood") for end in ("delta", "low", "high")),
        "transfer/ratio",
    }
    table = read_records(tmp_path)
    assert sorted(set(table["epoch"].to_pylist())) == [0, 1, 2]
    assert sorted(set(table["global_step"].to_pylist())) == [4, 8, 12]
    last = table.filter(pc.equal(table["epoch"], 2))
    shifted = last.filter(pc.equal(last["environment"], "shifted"))
    assert shifted.num_rows == 8
    expected = pc.mean(shifted["correct"].cast("float64")).as_py()
    assert float(run.callback_metrics["ood/shifted/accuracy"]) == pytest.approx(expected)
    assert last.filter(pc.equal(last["kind"], "attack")).num_rows == 6
    info = read_run_json(tmp_path)
    assert info["run_id"] == table["run_id"][0].as_py()
    assert [e["epoch"] for e in info["evaluations"]] == [0, 1, 2]
    assert not list((tmp_path / "records").glob(".*"))


def test_run_json_names_the_training_seed_and_what_each_defense_aims_at(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    defenses = [FreeLB(step_size=0.2), VREx()]
    trainer(tmp_path, [*defenses, monitor(tmp_path, seed=5)], max_epochs=1).fit(
        PlainEncoder(), loader(), loader()
    )
    info = read_run_json(tmp_path)
    assert (info["seed"], info["evaluation_seed"]) == (17, 5)
    assert [(one["name"], one["aim"]) for one in info["defenses"]] == [
        ("FreeLB", "adversarial"),
        ("VREx", "ood"),
    ]
    assert info["defenses"][0]["settings"]["step_size"] == 0.2
    assert 10**7 < info["finished"]["peak_memory"] < 10**11  # bytes


@pytest.mark.parametrize("defenses", [list, lambda: [FreeLB(), VREx()]])
def test_training_is_bit_for_bit_the_same_with_the_monitor(tmp_path, defenses):
    def train(callbacks):
        module = PlainEncoder(dropout=0.3)
        torch.manual_seed(0)
        trainer(tmp_path, [*defenses(), *callbacks]).fit(
            module, torch.utils.data.DataLoader(loader().dataset, batch_size=4, shuffle=True), loader()
        )
        return module.state_dict()

    without, watched = train([]), train([monitor(tmp_path)])
    assert without.keys() == watched.keys()
    for name in without:
        assert torch.equal(without[name], watched[name]), name


def test_every_submodule_gets_its_mode_back(tmp_path):
    modes = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.hidden.eval()

        def on_validation_end(self, trainer, pl_module):
            modes.append((pl_module.training, pl_module.hidden.training))

        def on_train_epoch_end(self, trainer, pl_module):
            modes.append((pl_module.training, pl_module.hidden.training))

    trainer(tmp_path, [Look(), monitor(tmp_path)], max_epochs=1, limit_val_batches=0).fit(
        PlainEncoder(), loader()
    )
    assert modes == [(True, False)]


def test_runs_without_a_validation_loop(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "c", monitor="joint/min", mode="max")
    run = trainer(
        tmp_path, [EarlyStopping("joint/min", mode="max"), checkpoint, monitor(tmp_path)], max_epochs=2
    )
    run.fit(PlainEncoder(), loader())
    assert checkpoint.best_model_score is not None
    assert set(read_records(tmp_path)["epoch"].to_pylist()) == {0, 1}


def test_val_check_interval_evaluates_each_time(tmp_path):
    trainer(tmp_path, [monitor(tmp_path)], max_epochs=1, val_check_interval=0.5).fit(
        PlainEncoder(), loader(), loader()
    )
    assert set(read_records(tmp_path)["global_step"].to_pylist()) == {2, 4}


def test_no_old_score_is_credited_to_new_weights(tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path / "c", monitor="joint/harmonic", mode="max", save_top_k=1, filename="{epoch}"
    )
    seen = []

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics["joint/harmonic"]))

    run = trainer(tmp_path, [Look(), monitor(tmp_path, every_n_epochs=2), checkpoint], max_epochs=5)
    run.fit(PlainEncoder(), loader(), loader())
    assert [value == value for value in seen] == [False, True, False, True, True]
    measured = {1: seen[1], 3: seen[3], 4: seen[4]}
    best = max(measured, key=lambda epoch: (measured[epoch], -epoch))
    assert checkpoint.best_model_path.endswith(f"epoch={best}.ckpt")


def test_changes_have_intervals_which_are_nan_between_evaluations(tmp_path):
    seen = []
    keys = [f"transfer/{m}_{end}" for m in ("adv", "ood") for end in ("delta", "low", "high")]
    keys += ["transfer/ratio", "transfer/ratio_low", "transfer/ratio_high"]
    prefixed = [f"same/{key}" for key in keys]

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append({key: float(trainer.callback_metrics.get(key, -9)) for key in keys + prefixed})

    settings = {"num_examples": 40, "clean": texts(40), "ood": {"a": texts(40, 50), "b": texts(50, 90)}}
    settings["inference_defenses"] = {"same": lambda victim: victim}
    watch = monitor(tmp_path, every_n_epochs=2, **settings)
    trainer(tmp_path, [Look(), watch], max_epochs=5).fit(PlainEncoder(), loader(), loader())
    assert all(value != value for epoch in (0, 2) for value in seen[epoch].values())
    table = read_records(tmp_path)
    first, last = (table.filter(pc.equal(table["epoch"], epoch)) for epoch in (1, 4))
    expected = transfer_deltas(first, last)
    assert list(expected) == keys
    for key, name in zip(keys, prefixed, strict=True):
        assert seen[4][key] == pytest.approx(expected[key], nan_ok=True), key
        assert seen[4][name] == pytest.approx(expected[key], nan_ok=True), key
    for measure in ("adv", "ood"):
        low, delta, high = (seen[4][f"transfer/{measure}_{end}"] for end in ("low", "delta", "high"))
        assert low < delta < high


def test_early_stopping_between_evaluations_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="check_val_every_n_epoch=2"):
        trainer(tmp_path, [EarlyStopping("joint/min"), monitor(tmp_path, every_n_epochs=2)]).fit(
            PlainEncoder(), loader(), loader()
        )


def test_resumed_run_has_the_records_and_weights_of_an_uninterrupted_one(tmp_path):
    def train(folder, epochs, module, ckpt_path=None):
        keep = ModelCheckpoint(folder / "c", save_top_k=-1, filename="{epoch}")
        run = trainer(tmp_path, [FreeLB(), monitor(folder, warm_start=True), keep], max_epochs=epochs)
        run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return run

    whole, first, second = PlainEncoder(), PlainEncoder(), PlainEncoder()
    run = train(tmp_path / "whole", 3, whole)
    train(tmp_path / "parts", 1, first)
    again = train(tmp_path / "parts", 3, second, tmp_path / "parts" / "c" / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    expected, measured = (read_records(tmp_path / name) for name in ("whole", "parts"))
    assert comparable(expected).equals(comparable(measured))
    assert len(set(measured["run_id"].to_pylist())) == 1
    for key in ("transfer/adv_delta", "transfer/ood_delta"):
        assert torch.equal(run.callback_metrics[key], again.callback_metrics[key])
    assert [e["epoch"] for e in read_run_json(tmp_path / "parts")["evaluations"]] == [0, 1, 2]


def test_a_new_run_does_not_touch_the_records_of_an_earlier_one(tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        trainer(tmp_path, [monitor(folder)], max_epochs=1).fit(PlainEncoder(), loader())
    assert [run.name for run in find_runs(tmp_path)] == ["run", "run-2"]
    assert read_run_json(folder)["run_id"] != read_run_json(tmp_path / "run-2")["run_id"]


def test_checkpoints_load_without_this_package(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_last=True)
    module = PlainEncoder()
    trainer(tmp_path, [FreeLB(), VREx(), monitor(tmp_path), keep], max_epochs=1).fit(
        module, loader(), loader()
    )
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    restored = PlainEncoder()
    restored.load_state_dict(checkpoint["state_dict"], strict=True)
    assert torch.equal(restored.head.weight, module.head.weight)
    assert torch.equal(
        PlainEncoder.load_from_checkpoint(tmp_path / "last.ckpt").head.weight, module.head.weight
    )


def test_validate_and_test_have_runs_of_their_own(tmp_path):
    module, watch = PlainEncoder(), monitor(tmp_path)
    module.test_step = lambda batch, batch_idx: None
    run = trainer(tmp_path, [watch], max_epochs=1)
    run.fit(module, loader(), loader())
    during = dict(run.callback_metrics)
    for stage in (run.validate, run.test):
        stage(module, loader(), verbose=False)
        for key in ("clean/accuracy", "adv/accuracy", "ood/worst_accuracy"):
            assert torch.equal(run.callback_metrics[key], during[key])
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet")}
    assert names == {
        "records/epoch=000-step=00000004.parquet",
        "validate/records/validate.parquet",
        "test/records/test.parquet",
    }


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, caplog):
    calls = []

    def breaking(module):
        inner = character_victim(module)

        def victim(batch):
            calls.append(len(batch))
            if len(calls) == 9:
                raise KeyboardInterrupt
            return inner(batch)

        return victim

    settings = {"max_batch_tokens": 400, "num_examples": 12, "attacks": [{"name": "deepwordbug"}]}
    with pytest.raises(SystemExit):
        trainer(tmp_path, [monitor(tmp_path, victim=breaking, **settings)], max_epochs=1).fit(
            PlainEncoder(), loader()
        )
    (partial,) = (tmp_path / "records").glob(".*.jsonl")
    finished = len(partial.read_text().splitlines()) - 1
    assert "the same evaluation goes on from there" in caplog.text
    resumed = monitor(tmp_path, **settings)
    trainer(tmp_path, [resumed], max_epochs=1).fit(PlainEncoder(), loader())
    whole = monitor(tmp_path / "whole", **settings)
    trainer(tmp_path, [whole], max_epochs=1).fit(PlainEncoder(), loader())
    assert 0 < finished < 12
    assert comparable(read_records(tmp_path / "records")).equals(comparable(read_records(tmp_path / "whole")))
    assert not partial.exists()


def test_warm_start_retries_the_last_perturbation(tmp_path):
    def spots_a_word(module):
        return lambda batch: torch.tensor([[0.1, 0.9] if "film" in text else [0.8, 0.2] for text in batch])

    settings = {"warm_start": True, "num_examples": 12, "victim": spots_a_word}
    trainer(tmp_path, [monitor(tmp_path, **settings)], max_epochs=2).fit(PlainEncoder(), loader())
    table = read_records(tmp_path).filter(pc.field("kind") == "attack")
    first, second = (table.filter(pc.equal(table["epoch"], epoch)).to_pylist() for epoch in (0, 1))
    assert any(row["status"] == "success" for row in first)
    for before, after in zip(first, second, strict=True):
        assert before["status"] == after["status"]
        assert after["warm_started"] == (before["status"] == "success")
        if after["warm_started"]:
            assert (after["queries"], after["perturbed_text"]) == (2, before["perturbed_text"])


def test_two_processes_give_the_records_of_one(tmp_path):
    class Still(PlainEncoder):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    for devices in (1, 2):
        settings = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
        trainer(tmp_path, [monitor(tmp_path / str(devices))], max_epochs=1, **settings).fit(
            Still(), loader(batch_size=16 // devices), loader()
        )
    one, two = (comparable(read_records(tmp_path / str(devices))) for devices in (1, 2))
    assert one.drop_columns(["global_step"]).equals(two.drop_columns(["global_step"]))


def test_two_processes_print_and_draw_once(tmp_path, capfd):
    logger = CSVLogger(tmp_path, version=0)
    run = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=2, logger=logger,
        callbacks=[monitor(tmp_path / "run", progress=True)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(PlainEncoder(), loader(batch_size=8), loader())
    assert capfd.readouterr().err.count("ood (mean)") == 2
    assert [path.name for path in Path(logger.log_dir).glob("*.png")] == ["robustness_path.png"]
    assert set(read_records(tmp_path / "run")["epoch"].to_pylist()) == {0, 1}


def test_a_resumed_run_counts_changes_from_its_first_evaluation(tmp_path, capfd):
    def train(folder, epochs, ckpt_path=None):
        keep = ModelCheckpoint(folder / "c", save_top_k=-1, filename="{epoch}")
        watch = monitor(
            folder,
            progress=True,
            num_examples=40,
            clean=texts(40),
            ood={"a": texts(40, 50), "b": texts(50, 90)},
        )
        run = trainer(tmp_path, [watch, keep], max_epochs=epochs)
        run.fit(PlainEncoder(), loader(), loader(), ckpt_path=ckpt_path)
        printed = capfd.readouterr().err
        return run, printed[printed.index(f"Epoch {epochs - 1}, accuracy") :].split("INFO")[0]

    whole, table = train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 2)
    again, same = train(tmp_path / "parts", 3, tmp_path / "parts" / "c" / "epoch=1.ckpt")
    assert "changes since the first evaluation" in table
    assert table == same
    for key, value in whole.callback_metrics.items():
        if key.startswith("transfer/"):
            torch.testing.assert_close(again.callback_metrics[key], value, rtol=0, atol=0, equal_nan=True)
    checkpoint = torch.load(tmp_path / "parts" / "c" / "epoch=1.ckpt", weights_only=True)
    assert len(checkpoint["callbacks"]["RobustnessMonitor"]["path"]) == 2


def test_nothing_to_evaluate_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        trainer(tmp_path, [RobustnessMonitor()]).fit(PlainEncoder(), loader())


def test_attacks_need_clean_items(tmp_path):
    with pytest.raises(ConfigError, match="no environment with the role `clean`"):
        trainer(tmp_path, [monitor(tmp_path, clean=None)]).fit(PlainEncoder(), loader())


def test_module_without_a_victim_fails_when_fit_starts(tmp_path):
    with pytest.raises(ConfigError, match="predict_proba"):
        trainer(tmp_path, [monitor(tmp_path, victim=None)]).fit(PlainEncoder(), loader())


def test_what_an_attack_lacks_shows_when_fit_starts(tmp_path):
    attacks = ["deepwordbug", {"name": "textbugger", "neighbors": "nowhere.json"}]
    callback, module = monitor(tmp_path, attacks=attacks), PlainEncoder()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(ConfigError, match=r"none at nowhere\.json"):
        trainer(tmp_path, [callback]).fit(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert callback.folder is None


def test_bad_settings():
    with pytest.raises(ConfigError, match="Expected `num_examples` to be >= 1, but got 0"):
        RobustnessMonitor(num_examples=0)
    with pytest.raises(ConfigError, match="Did you mean «deepwordbug»"):
        RobustnessMonitor(attacks=["deepwordbgu"])
    with pytest.raises(ConfigError, match="every attack once"):
        RobustnessMonitor(attacks=["deepwordbug", {"name": "deepwordbug"}])


def test_callback_can_be_copied(tmp_path):
    copy.deepcopy(monitor(tmp_path))


def test_an_empty_validation_loader_is_no_validation(tmp_path):
    class Empty(PlainEncoder):
        def val_dataloader(self):
            return []

    trainer(tmp_path, [monitor(tmp_path)], max_epochs=2).fit(Empty(), loader())
    assert set(read_records(tmp_path)["epoch"].to_pylist()) == {0, 1}


def test_a_victim_that_always_fails_is_no_score_of_zero(tmp_path):
    def broken(module):
        def victim(batch):
            raise ZeroDivisionError("no luck")

        return victim

    with pytest.raises(AttackError, match="ZeroDivisionError: no luck"):
        trainer(tmp_path, [monitor(tmp_path, victim=broken)], max_epochs=1).fit(PlainEncoder(), loader())


def test_names_that_would_share_a_key(tmp_path):
    watch = monitor(tmp_path, adversarial={"deepwordbug": texts(4)})
    with pytest.raises(ConfigError, match="'deepwordbug' is both"):
        trainer(tmp_path, [watch], max_epochs=1).fit(PlainEncoder(), loader())
    with pytest.raises(ConfigError, match="query_budget"):
        monitor(tmp_path, query_budget=0)


def _fit(root, folder, epochs, ckpt_path=None, **settings):
    keep = ModelCheckpoint(root / f"checkpoints-{epochs}", save_top_k=-1, filename="{epoch}")
    run = trainer(root, [monitor(folder, attacks=[]), keep], max_epochs=epochs, **settings)
    run.fit(PlainEncoder(), loader(), loader(), ckpt_path=ckpt_path)


def test_a_resumed_run_leaves_other_runs_of_its_records_dir_alone(tmp_path):
    _fit(tmp_path, tmp_path / "out", 2)
    _fit(tmp_path, tmp_path / "out", 1)
    ids = [read_run_json(tmp_path / name)["run_id"] for name in ("out", "out-2")]
    _fit(tmp_path, tmp_path / "out", 3, tmp_path / "checkpoints-1" / "epoch=0.ckpt")
    for name, run_id, epochs in (("out", ids[0], [0, 1]), ("out-2", ids[1], [0, 1, 2])):
        assert read_run_json(tmp_path / name)["run_id"] == run_id
        records = read_records(tmp_path / name)
        assert set(records["run_id"].to_pylist()) == {run_id}
        assert sorted(set(records["epoch"].to_pylist())) == epochs


def test_evaluations_later_than_the_checkpoint_gone_on_from_are_set_aside(tmp_path):
    _fit(tmp_path, tmp_path / "out", 4)
    _fit(tmp_path, tmp_path / "out", 3, tmp_path / "checkpoints-4" / "epoch=0.ckpt")
    assert sorted(set(read_records(tmp_path / "out")["epoch"].to_pylist())) == [0, 1, 2]
    assert [one["epoch"] for one in read_run_json(tmp_path / "out")["evaluations"]] == [0, 1, 2]
    kept = [path.name for path in (tmp_path / "out" / "records").glob("*.abandoned")]
    assert sorted(name[:9] for name in kept) == ["epoch=001", "epoch=002", "epoch=003"]


def test_the_last_epoch_is_evaluated_where_it_is_not_validated(tmp_path):
    _fit(tmp_path, tmp_path / "out", 3, check_val_every_n_epoch=2)
    assert sorted(set(read_records(tmp_path / "out")["epoch"].to_pylist())) == [1, 2]


def _fails_on(rank):
    def victim(module):
        def predict(batch):
            if torch.distributed.get_rank() == rank:
                raise ValueError("no such word")
            return torch.full((len(batch), 2), 0.5)

        return predict

    return victim


def test_what_one_process_runs_into_ends_all(tmp_path):
    watch = monitor(
        tmp_path / "out", attacks=[], adversarial=None, ood={"two": texts(2)}, victim=_fails_on(1)
    )
    run = trainer(tmp_path, [watch], max_epochs=1, devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match=r"could be predicted: .*no such word"):
        run.fit(PlainEncoder(), loader(), loader())
