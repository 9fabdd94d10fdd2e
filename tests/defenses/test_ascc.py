from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from lightning_robust.defenses.ascc import ASCC
from lightning_robust.defenses.chain import DefenseChain
from lightning_robust.defenses.freelb import FreeLB
from lightning_robust.defenses.vrex import VREx
from lightning_robust.errors import ConfigError
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches
from tests.defenses.toy_words import SYNONYMS, Reader, text_loader, toy_tokenizer
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import PlainEncoder

TOKENS = toy_tokenizer()
IDS = TOKENS.get_vocab()
SETS = {IDS[w]: [IDS[w], *(IDS[s] for s in near if s in IDS)] for w, near in SYNONYMS.items()}


def movable(ids):
    """Positions of words that are one token with synonyms: the next token must not continue them."""
    names = [*TOKENS.convert_ids_to_tokens(ids), ""]
    return [i for i, token in enumerate(ids) if token in SETS and not names[i + 1].startswith("##")]


def logits_of(module, embedded, mask):
    pooled = (torch.tanh(module.hidden(embedded)) * mask).sum(1) / mask.sum(1)
    return module.head(pooled)


def mixed(module, ids, weights):
    rows = []
    for row, of_row in zip(ids.tolist(), weights, strict=True):
        vectors = [module.embed.weight[token] for token in row]
        for place, w in of_row.items():
            vectors[place] = w.softmax(0) @ module.embed.weight[SETS[row[place]]]
        rows.append(torch.stack(vectors))
    return torch.stack(rows)


def entropy(w):
    p = w.softmax(0)
    return -(p * p.log()).sum()


def kl_rows(p, q):
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)


def by_hand(module, data, *, weight, num_steps, step_size, sparsity, accumulate=1, epochs=2):
    """Algorithm 1 with each word's weights apart, Adam written out, SGD outside."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(epochs):
        for index, batch in enumerate(data):
            ids, mask = batch["input_ids"], batch["attention_mask"].unsqueeze(-1).double()
            clean = logits_of(module, module.embed(ids), mask)
            w = [{i: torch.zeros(len(SETS[row[i]])).double() for i in movable(row)} for row in ids.tolist()]
            m, v = (copy.deepcopy(w) for _ in range(2))
            for t in range(1, num_steps + 1):
                leaves = [one.requires_grad_() for of_row in w for one in of_row.values()]
                moved = logits_of(module, mixed(module, ids, w), mask)
                gain = kl_rows(clean.detach(), moved).sum()
                for of_row in w:
                    if of_row:
                        gain = gain - sparsity * torch.stack([entropy(one) for one in of_row.values()]).mean()
                gradients = iter(torch.autograd.grad(gain, leaves)) if leaves else iter(())
                for row, of_row in enumerate(w):
                    for i in of_row:
                        g = next(gradients)
                        m[row][i] = 0.9 * m[row][i] + 0.1 * g
                        v[row][i] = 0.999 * v[row][i] + 0.001 * g**2
                        ascent = (m[row][i] / (1 - 0.9**t)) / ((v[row][i] / (1 - 0.999**t)).sqrt() + 1e-8)
                        of_row[i] = (of_row[i] + step_size * ascent).detach()
            moved = logits_of(module, mixed(module, ids, w), mask)
            loss = nn.functional.cross_entropy(clean, batch["labels"]) + weight * kl_rows(clean, moved).mean()
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


def ascc(**settings):
    return ASCC(**{"synonyms": SYNONYMS, "head": "head", "num_steps": 3, **settings})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("num_steps", "sparsity"), [(1, 0.0), (3, 0.5), (10, 10.0)])
def test_equals_the_update_written_out(accumulate, num_steps, sparsity):
    ours = Reader().double()
    theirs = copy.deepcopy(ours)
    settings = {"weight": 4.0, "num_steps": num_steps, "step_size": 0.7, "sparsity": sparsity}
    fit(ours, [ascc(**settings)], text_loader(), precision="64-true", accumulate_grad_batches=accumulate)
    by_hand(theirs, text_loader(), accumulate=accumulate, **settings)
    assert_same_weights(ours, theirs, rtol=1e-7, atol=1e-9)


def test_zero_weight_is_plain_training():
    plain, defended = Reader(), Reader()
    fit(plain, [], text_loader())
    fit(defended, [ascc(weight=0)], text_loader())
    assert_same_weights(defended, plain, rtol=0, atol=0)
    other = Reader()
    fit(other, [ascc(weight=1)], text_loader())
    assert not torch.allclose(other.head.weight, plain.head.weight, atol=1e-4)


class Embedded(Reader):
    """Remembers the embeddings that each pass saw."""

    def __init__(self):
        super().__init__()
        self.passes = []
        self.hidden.register_forward_pre_hook(lambda _, args: self.passes.append(args[0].detach().clone()))


def test_moves_inside_the_hull_and_nothing_else():
    module = Embedded().double()
    fit(module, [ascc(step_size=2.0, sparsity=0.0)], text_loader(), precision="64-true", max_epochs=1)
    batch = next(iter(text_loader()))
    clean, *inner, last = module.passes[:5]
    table = Embedded().double().embed.weight.detach()
    assert len(inner) == 3
    for row, ids in enumerate(batch["input_ids"].tolist()):
        places = movable(ids)
        for i, token in enumerate(ids):
            if i not in places:
                assert torch.equal(last[row, i], clean[row, i])
                continue
            corners = table[SETS[token]]  # at most 3 of them in 6 dimensions: their weights are unique
            system = torch.cat([corners.T, torch.ones(1, len(corners), dtype=torch.float64)])
            target = torch.cat([last[row, i], torch.ones(1, dtype=torch.float64)])
            weights = torch.linalg.lstsq(system, target[:, None]).solution
            assert torch.allclose(system @ weights, target[:, None], atol=1e-10)
            assert (weights > 0).all()
            assert torch.allclose(inner[0][row, i], corners.mean(0))
    assert (last - clean).norm(dim=-1).max() > 0.5


def test_pieces_of_longer_words_stay():
    module = Embedded()
    fit(module, [ascc()], text_loader(["slowly slower films", "good slows bads"], batch_size=2), max_epochs=1)
    clean, *moved = module.passes
    changed = (moved[-1] != clean).any(-1)
    ids = next(iter(text_loader(["slowly slower films", "good slows bads"], batch_size=2)))["input_ids"]
    assert ids[changed].tolist() == [IDS["good"]]


def test_the_ascent_increases_the_divergence():
    module = Embedded().double()
    fit(
        module,
        [ascc(num_steps=10, sparsity=0.0, step_size=0.3)],
        text_loader(),
        precision="64-true",
        max_epochs=1,
    )
    start = Embedded().double()
    batch = next(iter(text_loader()))
    mask = batch["attention_mask"].unsqueeze(-1).double()
    clean, *moved = [logits_of(start, seen, mask) for seen in module.passes[:12]]
    climbed = [kl_rows(clean, one) for one in moved]
    assert (climbed[-1] >= climbed[0] - 1e-12).all()
    assert climbed[-1].sum() > 1.2 * climbed[0].sum()


def test_texts_without_synonyms_are_plain_training():
    plain, defended = Reader().double(), Reader().double()
    data = text_loader(["the plot", "a plot is was"], batch_size=2)
    fit(plain, [], data, precision="64-true")
    fit(defended, [ascc()], data, precision="64-true")
    assert_same_weights(defended, plain)


def test_at_most_max_synonyms():
    defense = ascc(max_synonyms=1)
    module = Embedded().double()
    fit(module, [defense], text_loader(["good"] * 2, batch_size=2), precision="64-true", max_epochs=1)
    table = Embedded().double().embed.weight
    assert torch.allclose(module.passes[1][0, 1], table[[IDS["good"], IDS["fine"]]].mean(0))


def test_the_ascent_in_float16_takes_the_gradient_of_the_scaled_loss(monkeypatch):
    """No scaler runs on the CPU; a scale that would change Adam's steps stands in for it."""
    gradients, climbed, ends = torch.autograd.grad, [], []
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, w: climbed.append(loss) or gradients(loss, w))
    for scale in (1.0, 2.0**-40):
        monkeypatch.setattr(DefenseChain, "loss_scale", scale)
        ends.append(Reader().double())
        fit(ends[-1], [ascc()], text_loader(), precision="64-true")
    torch.testing.assert_close(climbed[len(climbed) // 2] * 2.0**40, climbed[0])
    assert_same_weights(*ends)


def test_composes_in_both_orders():
    for outer, inner in (
        (VREx(beta=0.0, warmup_beta=0.0), ascc()),
        (ascc(), VREx(beta=0.0, warmup_beta=0.0)),
    ):
        module, alone = Reader().double(), Reader().double()
        fit(module, [outer, inner], text_loader(), precision="64-true")
        fit(alone, [ascc()], text_loader(), precision="64-true")
        assert_same_weights(module, alone, rtol=1e-8, atol=1e-10)  # two equal domains a batch


def test_what_another_defense_adds_to_embeddings_stays():
    module = Embedded().double()
    lb = FreeLB(num_steps=1, init_magnitude=0.5)
    fit(
        module,
        [lb, ascc(num_steps=1, step_size=0.0)],
        text_loader(["good"] * 2, 2),
        precision="64-true",
        max_epochs=1,
    )
    table = Embedded().double().embed.weight
    delta = module.passes[0][0, 1] - table[IDS["good"]]
    assert delta.norm() > 0.01
    assert torch.allclose(module.passes[1][0, 1], table[SETS[IDS["good"]]].mean(0) + delta)
    again = Embedded().double()
    fit(
        again,
        [ascc(num_steps=1, step_size=0.0), lb],
        text_loader(["good"] * 2, 2),
        precision="64-true",
        max_epochs=1,
    )
    assert again.passes[1].shape == (2, 3, 6)


def test_synonyms_of_a_file_and_of_the_shared_neighbours(tmp_path, shared):
    file = tmp_path / "neighbors.json"
    file.write_text(json.dumps(SYNONYMS))
    given, named = Reader(), Reader()
    fit(given, [ascc()], text_loader())
    fit(named, [ascc(synonyms=str(file))], text_loader())
    assert_same_weights(named, given, rtol=0, atol=0)
    counter_fitted = shared / "lexical" / "counterfitted" / "counterfitted_neighbors.json"
    fit(Reader(), [ascc(synonyms=str(counter_fitted))], text_loader())


def test_missing_parts_are_said_at_fit_start(tmp_path):
    with pytest.raises(ConfigError, match="`synonyms` to name a file"):
        fit(Reader(), [ascc(synonyms=str(tmp_path / "none.json"))], text_loader())
    fit(Reader(), [ascc(weight=0, synonyms=str(tmp_path / "none.json"))], text_loader())
    with pytest.raises(ConfigError, match="none of the tokenizer's"):
        fit(Reader(), [ascc(synonyms={"good": ["motion picture"], "qqq": ["fine"]})], text_loader())
    with pytest.raises(ConfigError, match="ASCC works on words"):
        fit(PlainEncoder(), [ascc()])
    with pytest.raises(ConfigError, match="head="):
        fit(Reader(), [ascc(head=None)], text_loader())
    with pytest.raises(ConfigError, match="`embeddings`"):
        fit(Reader(), [ascc(embeddings="embedding")], text_loader())


@pytest.mark.parametrize(
    ("name", "values"),
    [("weight", (-1, float("nan"))), ("num_steps", (0, 1.5)), ("step_size", (-1.0,)), ("sparsity", (-1.0, float("inf"))),
     ("max_synonyms", (0,))],
)  # fmt: skip
def test_bad_settings(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"Expected `{name}`"):
            ASCC(**{name: value})


def test_deterministic_and_global_rng_untouched():
    def run(*defenses):
        module = Reader()
        torch.manual_seed(1)
        fit(module, list(defenses), text_loader())
        return module.head.weight.detach(), torch.rand(1)

    first, second, plain = run(ascc()), run(ascc()), run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], plain[1])


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}])
def test_hugging_face_projects(kind, lora, settings):
    module = HuggingFaceProject(kind, lora)
    synonyms = {"film": ["drama", "story"], "bleak": ["hollow"]}
    before = copy.deepcopy(module.state_dict())
    fit(module, [ASCC(synonyms=synonyms, num_steps=2)], batches(module), max_epochs=1, **settings)
    assert any(
        not torch.equal(before[name], value.to(before[name])) for name, value in module.state_dict().items()
    )


def test_gradient_checkpointing():
    module = HuggingFaceProject()
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fit(module, [ASCC(synonyms={"film": ["drama"]}, num_steps=1)], batches(module), max_epochs=1)
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="not reentrant"):
        fit(module, [ASCC(synonyms={"film": ["drama"]}, num_steps=1)], batches(module), max_epochs=1)
