from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_robust.defenses.alum import ALUM
from lightning_robust.defenses.freelb import FreeLB
from lightning_robust.defenses.r3f import R3F
from lightning_robust.defenses.sift import SIFT
from lightning_robust.defenses.smart import SMART
from lightning_robust.defenses.trades import TRADES
from lightning_robust.defenses.vrex import VREx
from lightning_robust.errors import ConfigError
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import DictLoss, PlainEncoder, loader

ALL = [SMART, SIFT, ALUM, R3F, TRADES]
# Perturbations as large as the embeddings, so that a wrong one shows.
STRONG = [
    (SMART, {"weight": 2.0, "noise": 0.2, "step_size": 0.5, "num_steps": 1}),
    (SMART, {"weight": 2.0, "noise": 0.2, "step_size": 0.5, "num_steps": 3}),
    (SIFT, {"weight": 2.0, "noise": 0.3, "step_size": 0.7, "num_steps": 1}),
    (SIFT, {"weight": 2.0, "noise": 0.3, "step_size": 0.7, "num_steps": 2}),
    (ALUM, {"weight": 3.0, "epsilon": 0.8, "xi": 0.2}),
    (R3F, {"weight": 4.0, "epsilon": 0.6, "noise": "uniform"}),
    (R3F, {"weight": 4.0, "epsilon": 0.6, "noise": "normal"}),
    (TRADES, {"weight": 3.0, "epsilon": 0.6, "step_size": 0.5, "num_steps": 3, "noise": 0.1}),
    (TRADES, {"weight": 3.0, "epsilon": 0.2, "step_size": 0.5, "num_steps": 1, "noise": 0.3}),
]
IDS = [f"{cls.__name__}-{number}" for number, (cls, _) in enumerate(STRONG)]


def mask_of(batch):
    return batch["attention_mask"].unsqueeze(-1).double()


def logits_at(module, batch, delta):
    embedded = module.embed(batch["input_ids"]) + delta
    mask = mask_of(batch)
    return module.head((torch.tanh(module.hidden(embedded)) * mask).sum(1) / mask.sum(1))


def kl(p, q):
    p, q = p.softmax(1), q.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def symmetric(p, q):
    return kl(p, q) + kl(q, p)


def draw(kind, batch, epoch, index, seed=0):
    """The noise of one batch of one process, apart from the global generator."""
    mixed = 0
    for part in (seed, epoch, index, 0):
        mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
    generator = torch.Generator().manual_seed(mixed)
    return kind((*batch["input_ids"].shape, 6), generator=generator, dtype=torch.float64)


def lengths(delta):
    return delta.flatten(1).norm(dim=1)[:, None, None]


def ball(delta, radius):
    return torch.where(lengths(delta) > radius, delta * radius / lengths(delta), delta)


def gradient_of(divergence, module, batch, delta, clean):
    delta = delta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(clean.detach(), logits_at(module, batch, delta)), delta)
    return gradient * mask_of(batch)


def divergence_by_hand(cls, settings, module, batch, clean, noise):
    """Each rule as its docstring states it. ``noise(kind)`` is what is drawn for the batch."""
    mask = mask_of(batch)
    if cls is R3F:
        if settings["noise"] == "normal":
            delta = settings["epsilon"] * noise(torch.randn) * mask
        else:
            delta = settings["epsilon"] * (2 * noise(torch.rand) - 1) * mask
        return symmetric(clean, logits_at(module, batch, delta))
    start = noise(torch.randn) * mask
    if cls is ALUM:
        probe = settings["xi"] * start / lengths(start)
        gradient = gradient_of(kl, module, batch, probe, clean)
        delta = settings["epsilon"] * gradient / lengths(gradient)
        return kl(clean.detach(), logits_at(module, batch, delta))
    if cls is TRADES:
        delta = ball(settings["noise"] * start, settings["epsilon"])
        for _ in range(settings["num_steps"]):
            gradient = gradient_of(kl, module, batch, delta, clean)
            delta = ball(delta + settings["step_size"] * gradient / lengths(gradient), settings["epsilon"])
        return kl(clean, logits_at(module, batch, delta))
    scale = torch.ones_like(mask)
    if cls is SIFT:
        embedded = module.embed(batch["input_ids"]).detach()
        scale = (((embedded - embedded.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + 1e-7).sqrt()
    normalised = settings["noise"] * start
    for _ in range(settings["num_steps"]):
        # By the chain rule, ∂/∂δ of f(e + scale · δ).
        gradient = scale * gradient_of(symmetric, module, batch, scale * normalised, clean)
        normalised = normalised + settings["step_size"] * gradient / lengths(gradient)
    return symmetric(clean, logits_at(module, batch, scale * normalised))


def train_by_hand(module, loss_of, *, accumulate=1, epochs=2):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch in range(epochs):
        for index, batch in enumerate(loader()):
            (loss_of(module, batch, epoch, index) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


def parts_of(batch):
    for domain in batch["domain"].unique():
        rows = batch["domain"] == domain
        yield rows, {key: value[rows] for key, value in batch.items()}


def vrex(risks, beta=2.0):
    return risks.mean() + beta * ((risks - risks.mean()) ** 2).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("cls", "settings"), STRONG, ids=IDS)
def test_equals_the_rule_written_out(cls, settings, accumulate):
    ours = DictLoss().double()
    theirs = copy.deepcopy(ours)

    def loss_of(module, batch, epoch, index):
        clean = logits_at(module, batch, 0.0)
        added = divergence_by_hand(
            cls, settings, module, batch, clean, lambda kind: draw(kind, batch, epoch, index)
        )
        return nn.functional.cross_entropy(clean, batch["labels"]) + settings["weight"] * added

    defense = cls(**settings, head="head")
    fit(ours, [defense], accumulate_grad_batches=accumulate, precision="64-true")
    train_by_hand(theirs, loss_of, accumulate=accumulate)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(("cls", "settings"), STRONG, ids=IDS)
def test_inside_a_domain_defense(cls, settings):
    ours = PlainEncoder().double()
    theirs = copy.deepcopy(ours)

    def loss_of(module, batch, epoch, index):
        risks = []
        for _, part in parts_of(batch):
            clean = logits_at(module, part, 0.0)
            noise = lambda kind, part=part: draw(kind, part, epoch, index)  # noqa: E731
            added = divergence_by_hand(cls, settings, module, part, clean, noise)
            risks.append(nn.functional.cross_entropy(clean, part["labels"]) + settings["weight"] * added)
        return vrex(torch.stack(risks))

    fit(ours, [VREx(beta=2.0, warmup_steps=0), cls(**settings, head="head")], precision="64-true")
    train_by_hand(theirs, loss_of)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(("cls", "settings"), STRONG, ids=IDS)
def test_around_a_domain_defense(cls, settings):
    ours = PlainEncoder().double()
    theirs = copy.deepcopy(ours)

    def loss_of(module, batch, epoch, index):
        def noise(kind):
            drawn = torch.empty(*batch["input_ids"].shape, 6, dtype=torch.float64)
            for rows, part in parts_of(batch):
                drawn[rows] = draw(kind, part, epoch, index)
            return drawn

        clean = logits_at(module, batch, 0.0)
        each = nn.functional.cross_entropy(clean, batch["labels"], reduction="none")
        risks = torch.stack([each[rows].mean() for rows, _ in parts_of(batch)])
        return vrex(risks) + settings["weight"] * divergence_by_hand(
            cls, settings, module, batch, clean, noise
        )

    fit(ours, [cls(**settings, head="head"), VREx(beta=2.0, warmup_steps=0)], precision="64-true")
    train_by_hand(theirs, loss_of)
    assert_same_weights(ours, theirs)


def test_freelb_around_smart_perturbs_all_of_its_passes_alike():
    settings = {"weight": 2.0, "noise": 0.2, "step_size": 0.5, "num_steps": 1}
    ours = PlainEncoder().double()
    theirs = copy.deepcopy(ours)

    def loss_of(module, batch, epoch, index):
        outer = torch.zeros(*batch["input_ids"].shape, 6, dtype=torch.float64)
        total = 0.0
        for _ in range(2):
            outer = outer.detach().requires_grad_()
            clean = logits_at(module, batch, outer)
            delta = settings["noise"] * draw(torch.randn, batch, epoch, index) * mask_of(batch)
            inner = delta.clone().requires_grad_()
            climbed = symmetric(clean.detach(), logits_at(module, batch, outer + inner))
            (gradient,) = torch.autograd.grad(climbed, inner)
            gradient = gradient * mask_of(batch)
            delta = delta + settings["step_size"] * gradient / lengths(gradient)
            added = symmetric(clean, logits_at(module, batch, outer + delta))
            loss = nn.functional.cross_entropy(clean, batch["labels"]) + settings["weight"] * added
            total = total + loss / 2
            (gradient,) = torch.autograd.grad(loss, outer, retain_graph=True)
            gradient = gradient * mask_of(batch)
            outer = outer + 0.25 * gradient / lengths(gradient)
        return total

    freelb = FreeLB(num_steps=2, step_size=0.25, init_magnitude=0.0)
    fit(ours, [freelb, SMART(**settings, head="head")], precision="64-true")
    train_by_hand(theirs, loss_of)
    assert_same_weights(ours, theirs)


def test_one_inside_another_adds_both_divergences_of_the_clean_pass():
    first = {"weight": 2.0, "epsilon": 0.6, "noise": "normal"}
    second = {"weight": 3.0, "noise": 0.2, "step_size": 0.5, "num_steps": 2}
    ours = PlainEncoder().double()
    theirs = copy.deepcopy(ours)

    def loss_of(module, batch, epoch, index):
        clean = logits_at(module, batch, 0.0)
        loss = nn.functional.cross_entropy(clean, batch["labels"])
        for seed, (cls, settings) in enumerate([(R3F, first), (SMART, second)]):
            noise = lambda kind, seed=seed: draw(kind, batch, epoch, index, seed)  # noqa: E731
            loss = loss + settings["weight"] * divergence_by_hand(cls, settings, module, batch, clean, noise)
        return loss

    fit(ours, [SMART(**second, head="head", seed=1), R3F(**first, head="head")], precision="64-true")
    train_by_hand(theirs, loss_of)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("around", [FreeLB(), FreeLB(same_dropout_mask=True)])
@pytest.mark.parametrize("cls", ALL)
def test_around_and_inside_freelb_with_dropout(cls, around):
    for order in ([around, cls(head="head")], [cls(head="head"), around]):
        module = PlainEncoder(dropout=0.5)
        fit(module, order, max_epochs=1)
        assert all(p.isfinite().all() for p in module.parameters())


def perturbations(cls, settings, tokenizer=None, base=PlainEncoder, **options):
    """What the last pass of each batch saw, minus the embeddings, and the batches."""
    seen = []

    class Spy(base):
        def training_step(self, batch, batch_idx):
            handle = self.embed.register_forward_hook(lambda *a: moved.append(a[2].detach()))
            moved = []
            loss = super().training_step(batch, batch_idx)
            handle.remove()
            seen.append((batch["input_ids"], moved[0] - self.embed.weight[batch["input_ids"]].detach()))
            return loss

    module = Spy(**options).double()
    if tokenizer is not None:
        module.tokenizer = tokenizer
    defense = cls(**settings, head="head")
    fit(module, [defense], max_epochs=1, precision="64-true")
    calls = 2 + defense.num_steps
    return seen[calls - 1 :: calls], seen[::calls]


class Tokenizer:
    all_special_ids = (0, 3, 5)
    unk_token_id = 5


@pytest.mark.parametrize(("cls", "settings"), STRONG, ids=IDS)
def test_moves_words_only_and_leaves_the_clean_pass_alone(cls, settings):
    last, first = perturbations(cls, settings, Tokenizer())
    assert len(last) == 4
    for ids, delta in last:
        assert torch.equal(delta.abs().sum(-1) > 0, (ids != 0) & (ids != 3))
    assert all(not delta.any() for _, delta in first)


@pytest.mark.parametrize(
    ("cls", "settings"), [(c, s) for c, s in STRONG if c in (ALUM, R3F, TRADES)], ids=lambda v: str(v)[:40]
)
def test_stays_in_its_ball(cls, settings):
    last, _ = perturbations(cls, settings)
    for _, delta in last:
        if cls is ALUM:
            torch.testing.assert_close(
                lengths(delta).flatten(), torch.full((4,), settings["epsilon"]).double()
            )
        elif cls is TRADES:
            assert lengths(delta).max() <= settings["epsilon"] * (1 + 1e-12)
        elif settings["noise"] == "uniform":
            assert 0.9 * settings["epsilon"] < delta.abs().max() <= settings["epsilon"]


class Scaled(PlainEncoder):
    """The same function of the input, from embeddings a hundred times as large."""

    def __init__(self):
        super().__init__(learning_rate=0.0)
        with torch.no_grad():
            self.embed.weight *= 100
            self.hidden.weight /= 100


def test_sift_moves_relative_to_the_scale_of_the_embeddings():
    settings = {"noise": 0.1, "step_size": 0.5}
    ours, _ = perturbations(SIFT, settings, base=PlainEncoder, learning_rate=0.0)
    large, _ = perturbations(SIFT, settings, base=Scaled)
    for (_, delta), (_, other) in zip(ours, large, strict=True):
        torch.testing.assert_close(other, 100 * delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", ALL)
def test_ascent_steps_compute_no_gradient_of_weights(cls):
    backs = []
    module = PlainEncoder()
    module.hidden.weight.register_hook(lambda gradient: backs.append(1))
    defense = cls(head="head", **({} if cls in (R3F, ALUM) else {"num_steps": 3}))
    fit(module, [defense], max_epochs=1)
    assert len(backs) == (8 if cls is ALUM else 4)  # ALUM's clean loss is back-propagated at once


def test_of_a_fixed_target_only_one_graph_is_alive():
    """The most tensors that graphs hold at a time."""

    def most_held(defenses):
        held, most = set(), [0]

        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor
                held.add(id(self))
                most[0] = max(most[0], len(held))

            def __del__(self):
                held.discard(id(self))

        module = PlainEncoder()
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            fit(module, defenses, max_epochs=1, limit_train_batches=2)
        return most[0]

    plain, fixed, both = (most_held(d) for d in ([], [ALUM(head="head")], [TRADES(head="head")]))
    assert fixed < 1.5 * plain
    assert both > 1.6 * plain


@pytest.mark.parametrize(
    ("cls", "warns"), [(R3F, True), (SMART, True), (SIFT, False), (ALUM, False), (TRADES, False)]
)
def test_default_noise_that_half_precision_rounds_away_is_warned_of(cls, warns):
    def messages(precision, **settings):
        module = PlainEncoder()
        with torch.no_grad():
            module.embed.weight.mul_(0.1)  # as large as those of small language models
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, [cls(**settings, head="head")], precision=precision, max_epochs=1)
        return [str(w.message) for w in caught if "rounded away" in str(w.message)]

    assert len(messages("bf16-true")) == warns
    assert not messages("bf16-mixed")
    assert not messages("bf16-true", weight=0.0)


@pytest.mark.parametrize("cls", ALL)
def test_zero_strength_is_exactly_plain_training(cls):
    plain = PlainEncoder(dropout=0.3)
    torch.manual_seed(0)
    fit(plain, [])
    zeros = [{"weight": 0.0}] + [{"epsilon": 0.0}] * (cls in (ALUM, R3F, TRADES))
    for settings in zeros:
        defended = PlainEncoder(dropout=0.3)
        torch.manual_seed(0)
        fit(defended, [cls(**settings, head="head")])
        assert all(map(torch.equal, plain.state_dict().values(), defended.state_dict().values()))


@pytest.mark.parametrize("cls", ALL)
def test_same_seed_same_weights_and_global_rng_untouched(cls):
    strength = next(settings for known, settings in STRONG if known is cls)

    def run(seed):
        module = PlainEncoder()
        torch.manual_seed(1)
        fit(module, [cls(**strength, head="head", seed=seed)])
        return module.head.weight.detach(), torch.rand(1)

    first, second, other = run(0), run(0), run(1)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    undefended = PlainEncoder()
    torch.manual_seed(1)
    fit(undefended, [])
    assert torch.equal(torch.rand(1), first[1])
    assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("cls", ALL)
def test_defaults(cls):
    defense = cls()
    assert set(defense.settings) >= {"weight", "embeddings", "head", "seed"}
    assert defense.aim == "adversarial"
    assert defense.needs == ("embeddings", "logits")
    assert cls(weight=2.0).state_key != defense.state_key


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        *[(cls, {"weight": -1.0}, "Expected `weight` to be a number >= 0, but got -1.0") for cls in ALL],
        *[(cls, {"weight": float("nan")}, "Expected `weight`") for cls in ALL],
        *[
            (cls, {"num_steps": 0}, "Expected `num_steps` to be a whole number >= 1, but got 0")
            for cls in (SMART, SIFT, TRADES)
        ],
        *[(cls, {"epsilon": -0.1}, "Expected `epsilon` to be a number >= 0") for cls in (ALUM, R3F, TRADES)],
        *[(cls, {"step_size": float("inf")}, "Expected `step_size`") for cls in (SMART, SIFT, TRADES)],
        *[
            (cls, {"noise": 0}, "Expected `noise` to be a number > 0, but got 0")
            for cls in (SMART, SIFT, TRADES)
        ],
        (ALUM, {"xi": 0.0}, "Expected `xi` to be a number > 0"),
        (R3F, {"noise": "gauss"}, "Expected `noise` to be one of uniform, normal, but got 'gauss'"),
        (R3F, {"noise": "norml"}, "Did you mean «normal»"),
    ],
)
def test_bad_settings(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        cls(**settings)


@pytest.mark.parametrize("cls", ALL)
def test_what_is_missing_is_said_when_fit_starts(cls):
    module = PlainEncoder()
    module.on_train_batch_start = lambda *args: pytest.fail("training started")
    with pytest.raises(ConfigError, match=r"whose output is the logits, but found 0.*hidden, head"):
        fit(module, [cls()])
    with pytest.raises(ConfigError, match="Did you mean «head»"):
        fit(module, [cls(head="heed")])
    with pytest.raises(ConfigError, match="Did you mean «embed»"):
        fit(module, [cls(head="head", embeddings="embd")])
    module.embed = nn.Sequential()
    with pytest.raises(ConfigError, match="Expected one input embedding layer in PlainEncoder, but found 0"):
        fit(module, [cls(head="head")])


def test_a_detached_embedding_is_refused():
    class Detached(PlainEncoder):
        def forward(self, input_ids, attention_mask):
            pooled = self.hidden(self.embed(input_ids).detach()).mean(1)
            return self.head(pooled)

    with pytest.raises(ConfigError, match="but no gradient reaches them"):
        fit(Detached(), [SMART(head="head")])
