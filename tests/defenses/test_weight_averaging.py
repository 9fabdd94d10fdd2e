from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_robust.callbacks import AdapterCheckpoint, RobustnessMonitor
from lightning_robust.defenses.sam import SAM
from lightning_robust.defenses.weight_averaging import WeightAveraging
from lightning_robust.defenses.wise_ft import WiSEFT
from lightning_robust.errors import ConfigError
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches
from tests.defenses.training import assert_same_weights
from tests.foreign import PlainEncoder, loader


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(ours, theirs):
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


class Noted(PlainEncoder):
    """Notes its weights after each batch, in training."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.path, self.began_with = [], []

    def on_train_batch_start(self, batch, batch_idx):
        self.began_with.append(weights_of(self))

    def on_train_batch_end(self, *args):
        self.path.append(weights_of(self))


class Spy(Callback):
    """Notes the weights that a callback sees wherever evaluation, saving and exporting happen."""

    def __init__(self):
        self.seen = {}

    def note(self, hook, trainer, module):
        if not trainer.sanity_checking:
            self.seen.setdefault(hook, []).append(weights_of(module))

    def on_sanity_check_end(self, trainer, module):
        self.seen["sanity"] = [weights_of(module)]

    def on_validation_start(self, trainer, module):
        self.note("validation_start", trainer, module)

    def on_validation_epoch_end(self, trainer, module):
        self.note("validation_epoch_end", trainer, module)

    def on_validation_end(self, trainer, module):
        self.note("validation_end", trainer, module)

    def on_train_epoch_end(self, trainer, module):
        self.note("epoch_end", trainer, module)

    def on_train_end(self, trainer, module):
        self.note("train_end", trainer, module)

    def on_fit_end(self, trainer, module):
        self.note("fit_end", trainer, module)

    def on_train_epoch_start(self, trainer, module):
        self.note("epoch_start", trainer, module)

    def on_train_batch_start(self, trainer, module, *args):
        self.note("batch_start", trainer, module)


def fit(module, callbacks, *, data=None, val=None, ckpt_path=None, **settings):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, **settings},
    )
    trainer.fit(module, data or loader(), val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def ema(copies, decay, *, warmup):
    average = copies[0]
    for n, weights in enumerate(copies[1:], start=1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = {name: d * average[name] + (1 - d) * weights[name] for name in average}
    return average


def mean(copies):
    return {name: torch.stack([c[name] for c in copies]).mean(0) for name in copies[0]}


def assert_close(ours, theirs, **tolerance):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name, **{"rtol": 1e-10, "atol": 1e-12, **tolerance})


@pytest.mark.parametrize(
    ("settings", "copies", "average"),
    [
        ({"decay": 0.8}, slice(0, None), lambda c: ema(c, 0.8, warmup=True)),
        ({"decay": 0.8, "warmup": False}, slice(0, None), lambda c: ema(c, 0.8, warmup=False)),
        ({"decay": 0.5, "every_n_steps": 3}, slice(2, None, 3), lambda c: ema(c, 0.5, warmup=True)),
        ({"decay": 0.5, "start_epoch": 1}, slice(4, None), lambda c: ema(c, 0.5, warmup=True)),
        ({"mode": "swa"}, slice(3, None, 4), mean),
        ({"mode": "swa", "start_epoch": 1, "every_n_steps": 2}, slice(5, None, 2), mean),
    ],
)
def test_equals_the_average_written_out(settings, copies, average):
    module = Noted().double()
    fit(module, [WeightAveraging(**settings)], precision="64-true")
    assert_close(weights_of(module), average(module.path[copies]))
    assert not same(weights_of(module), module.path[-1])


def test_counts_optimizer_steps_not_batches():
    module = Noted().double()
    fit(module, [WeightAveraging(decay=0.5)], precision="64-true", accumulate_grad_batches=2)
    assert_close(weights_of(module), ema(module.path[1::2], 0.5, warmup=True))


def test_half_precision_weights_are_averaged_in_float32():
    module = Noted()
    defense = WeightAveraging(decay=0.999, warmup=False)
    fit(module, [defense], precision="bf16-true")
    copies = [{name: w.float() for name, w in c.items()} for c in module.path]
    expected = ema(copies, 0.999, warmup=False)
    assert_close(defense.state_dict()["average"], expected, rtol=1e-5, atol=1e-6)
    assert module.head.weight.dtype == torch.bfloat16


def test_zero_strength_is_plain_training():
    plain, defended = PlainEncoder(), PlainEncoder()
    fit(plain, [])
    fit(defended, [WeightAveraging(decay=0.0)], val=loader())
    assert same(weights_of(defended), weights_of(plain))


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}, {"limit_val_batches": 0}])
def test_training_goes_on_as_without(settings):
    plain, averaged = Noted(dropout=0.3), Noted(dropout=0.3)
    torch.manual_seed(0)
    fit(plain, [], val=loader(), **settings)
    torch.manual_seed(0)
    fit(averaged, [WeightAveraging(), WiSEFT()], val=loader(), **settings)
    assert len(plain.path) == len(averaged.path) == 12
    assert all(same(*pair) for pair in zip(plain.path, averaged.path, strict=True))
    assert all(same(*pair) for pair in zip(plain.began_with, averaged.began_with, strict=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("validates", [True, False])
def test_every_callback_sees_the_average_wherever_it_stands(first, validates):
    module, spy = Noted().double(), Spy()
    defense = WeightAveraging(decay=0.7)
    fit(
        module,
        [defense, spy] if first else [spy, defense],
        val=loader() if validates else None,
        precision="64-true",
    )
    expected = [ema(module.path[: 4 * (epoch + 1)], 0.7, warmup=True) for epoch in range(3)]
    hooks = ["epoch_end"] + ["validation_start", "validation_epoch_end", "validation_end"] * validates
    for hook in hooks:
        assert len(spy.seen[hook]) == 3
        for seen, average in zip(spy.seen[hook], expected, strict=True):
            assert_close(seen, average)
    for hook in ("train_end", "fit_end"):
        assert_close(spy.seen[hook][0], expected[-1])
    assert all(same(*pair) for pair in zip(spy.seen["batch_start"], module.began_with, strict=True))
    assert all(same(*pair) for pair in zip(spy.seen["epoch_start"], module.began_with[::4], strict=True))
    if validates:
        assert same(spy.seen["sanity"][0], module.began_with[0])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("validates", [True, False])
def test_the_monitor_measures_the_average(first, validates, tmp_path):
    measured = []

    def victim(pl_module):
        def predict(texts):
            measured.append(weights_of(pl_module))
            return torch.full((len(texts), 2), 0.5)

        return predict

    module = Noted().double()
    monitor = RobustnessMonitor(
        clean=[("a good film", 1), ("a bad film", 0)], victim=victim, records_dir=tmp_path, progress=False
    )
    defense = WeightAveraging(decay=0.7)
    fit(
        module,
        [defense, monitor] if first else [monitor, defense],
        val=loader() if validates else None,
        precision="64-true",
    )
    expected = [ema(module.path[: 4 * (epoch + 1)], 0.7, warmup=True) for epoch in range(3)]
    assert len(measured[-3:]) == 3
    for seen, average in zip(measured[-3:], expected, strict=True):
        assert_close(seen, average)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("when", ["epoch", "steps"])
def test_checkpoints_hold_the_average(bare, when, tmp_path):
    plain, module = Noted().double(), Noted().double()
    fit(plain, [], precision="64-true")
    trigger = {"every_n_train_steps": 2} if when == "steps" else {"every_n_epochs": 1}
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_weights_only=bare, **trigger)
    fit(module, [keep, WeightAveraging(decay=0.7)], precision="64-true")
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) == (6 if when == "steps" else 3)
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        step = int(file.stem.split("=")[1])
        assert_close(checkpoint["state_dict"], ema(plain.path[:step], 0.7, warmup=True))
        if not bare:
            (state,) = (s for key, s in checkpoint["callbacks"].items() if "WeightAveraging" in key)
            assert same(state["training_weights"], plain.path[step - 1])


def test_a_checkpoint_saved_by_the_user_in_training_holds_the_average_and_changes_nothing(tmp_path):
    class Saves(Noted):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 5:
                self.trainer.save_checkpoint(tmp_path / "own.ckpt")

    plain, module = Noted(), Saves()
    fit(plain, [])
    fit(module, [WeightAveraging(decay=0.7)])
    assert all(same(*pair) for pair in zip(plain.path, module.path, strict=True))
    state = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert_close(state, ema(module.path[:5], 0.7, warmup=True), rtol=1e-5, atol=1e-6)


def test_state_dicts_with_other_names_and_tied_weights(tmp_path):
    class Renamed(Noted):
        def __init__(self):
            super().__init__()
            self.tied = self.hidden

        def state_dict(self, *args, **kwargs):
            return {f"mine.{k}": v for k, v in super().state_dict(*args, **kwargs).items()}

    module = Renamed().double()
    keep = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=7)
    fit(module, [WeightAveraging(decay=0.7), keep], precision="64-true", max_epochs=2)
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    expected = ema(module.path[:7], 0.7, warmup=True)
    torch.testing.assert_close(state["mine.hidden.weight"], expected["hidden.weight"])
    torch.testing.assert_close(state["mine.tied.weight"], expected["hidden.weight"])


@pytest.mark.parametrize(
    "defenses",
    [
        lambda: [WeightAveraging(decay=0.7)],
        lambda: [WeightAveraging(mode="swa", start_epoch=1)],
        lambda: [WiSEFT(0.3)],
        lambda: [WiSEFT(0.3), SAM(), WeightAveraging(decay=0.7)],
    ],
)
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_ends_with_the_same_weights(defenses, validates, accumulate, tmp_path):
    settings = {"val": loader() if validates else None, "accumulate_grad_batches": accumulate}
    whole = Noted()
    fit(whole, [*defenses(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)], **settings)
    resumed = Noted()
    with torch.no_grad():
        for p in resumed.parameters():
            p.add_(1.0)
    fit(resumed, defenses(), ckpt_path=tmp_path / "epoch=1.ckpt", **settings)
    assert same(resumed.began_with[0], whole.began_with[8])
    assert same(resumed.path[-1], whole.path[-1])
    assert same(weights_of(resumed), weights_of(whole))


def test_resuming_what_is_finished_ends_with_the_average(tmp_path):
    whole, again = Noted(), Noted()
    trainer = fit(whole, [WeightAveraging(decay=0.7)])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fit(again, [WeightAveraging(decay=0.7)], ckpt_path=tmp_path / "end.ckpt")
    assert not again.path
    assert same(weights_of(again), weights_of(whole))
    longer = Noted()
    fit(longer, [WeightAveraging(decay=0.7)], ckpt_path=tmp_path / "end.ckpt", max_epochs=4)
    assert same(longer.began_with[0], whole.path[-1])


def test_evaluation_of_a_checkpoint_sees_the_average_and_a_second_fit_starts_afresh(tmp_path):
    module, spy = Noted(), Spy()
    trainer = fit(module, [WeightAveraging(decay=0.7), ModelCheckpoint(tmp_path, filename="last"), spy])
    expected = weights_of(module)
    with torch.no_grad():
        module.head.weight.zero_()
    spy.seen.clear()
    trainer.validate(module, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert same(spy.seen["validation_epoch_end"][0], expected)
    assert same(weights_of(module), expected)
    other = Noted()
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(other, loader())
    assert_close(weights_of(other), expected, rtol=1e-6, atol=1e-7)


def test_an_exception_leaves_the_training_weights():
    class Breaks(Noted):
        def validation_step(self, batch, batch_idx):
            if self.path:
                raise RuntimeError("user code broke")

    module = Breaks()
    with pytest.raises(RuntimeError, match="user code broke"):
        fit(module, [WeightAveraging(decay=0.7)], val=loader())
    assert same(weights_of(module), module.path[-1])


@pytest.mark.parametrize("order", [1, -1])
def test_together_the_average_is_interpolated_whatever_the_order(order, tmp_path):
    module = Noted().double()
    defenses = [WeightAveraging(decay=0.7), WiSEFT(0.25)][::order]
    keep = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=5)
    fit(module, [*defenses, keep], precision="64-true", val=loader())
    start = module.began_with[0]

    def expected(steps):
        average = ema(module.path[:steps], 0.7, warmup=True)
        return {name: start[name] + 0.25 * (average[name] - start[name]) for name in average}

    assert_close(weights_of(module), expected(12))
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert_close(state, expected(10))


def test_two_averages_are_refused():
    with pytest.raises(ConfigError, match="Expected one WeightAveraging, but got 2"):
        fit(PlainEncoder(), [WeightAveraging(), WeightAveraging(decay=0.5)])


def test_training_that_ends_before_the_first_update_is_refused():
    with pytest.raises(ConfigError, match=r"max_epochs. to be more than start_epoch=3, .*but got 3"):
        fit(PlainEncoder(), [WeightAveraging(start_epoch=3)])
    fit(PlainEncoder(), [WeightAveraging(start_epoch=3)], fast_dev_run=True)


def test_only_what_trains_is_copied_and_the_export_holds_the_average(tmp_path):
    from peft import PeftModel

    from tests.attacks.tiny import tiny_model

    module = HuggingFaceProject(lora=True)
    before = weights_of(module)
    defense = WeightAveraging(decay=0.7)
    fit(
        module, [AdapterCheckpoint(dirpath=str(tmp_path)), defense], data=batches(module), val=batches(module)
    )
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(defense.state_dict()["average"]) == trainable
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name not in trainable)
    exported = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "export-last")
    ours = {n: p for n, p in module.model.named_parameters() if "lora_B" in n}
    theirs = dict(exported.named_parameters())
    assert ours
    assert all(torch.equal(theirs[name], p) for name, p in ours.items())
    assert any(p.any() for p in ours.values())


def test_layers_that_are_unfrozen_later_are_averaged_from_then_on():
    class Unfreezes(Noted):
        def on_train_epoch_start(self):
            self.embed.weight.requires_grad_(self.current_epoch >= 1)

    module = Unfreezes().double()
    fit(module, [WeightAveraging(decay=0.0), WiSEFT(0.25)], precision="64-true")
    start, end = module.began_with[0], module.path[-1]
    expected = {name: start[name] + 0.25 * (end[name] - start[name]) for name in end}
    assert not torch.equal(start["embed.weight"], end["embed.weight"])
    assert_close(weights_of(module), expected)


def test_same_weights_as_without_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    fit(PlainEncoder(), [WeightAveraging()], val=loader())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    fit(PlainEncoder(), [], val=loader())
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.slow
def test_processes_evaluate_the_same_average():
    from tests.defenses.test_sam import Sharded

    class Checked(Sharded):
        def on_train_end(self):
            flat = torch.cat([p.detach().flatten() for p in self.parameters()])
            gathered = self.all_gather(flat)
            assert torch.equal(gathered[0], gathered[1])

    two, one = Checked().double(), Sharded().double()
    defenses = [WeightAveraging(decay=0.7), WiSEFT(0.25)]
    settings = {"precision": "64-true", "use_distributed_sampler": False}
    for module, more in ((two, {"devices": 2, "strategy": "ddp_fork"}), (one, {})):
        trainer = Trainer(
            accelerator="cpu", callbacks=defenses, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, max_epochs=2, **settings, **more,
        )  # fmt: skip
        trainer.fit(module)
    assert_same_weights(two, one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": -0.1}, "Expected `decay` to be a number from 0 to 1"),
        ({"decay": float("nan")}, "Expected `decay`"),
        ({"mode": "emma"}, "Expected `mode` to be ema or swa, but got 'emma'. Did you mean «ema»"),
        ({"start_epoch": -1}, "Expected `start_epoch`"),
        ({"every_n_steps": 0}, "Expected `every_n_steps` to be a whole number >= 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        WeightAveraging(**settings)
