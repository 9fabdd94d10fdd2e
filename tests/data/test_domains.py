"""Balanced batches, and domains that are found."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_robust import Backbone, RobustClassifier
from lightning_robust.data import DomainBalancedSampler, cluster_domains
from lightning_robust.data.datamodule import TextDataModule
from lightning_robust.data.sources import TextSource
from lightning_robust.defenses import VREx
from lightning_robust.errors import ConfigError, DataError
from tests.data.test_datamodule import Recorder, trainer

DOMAINS = ["big"] * 50 + ["small"] * 7 + ["one"]


def batches(sampler, size):
    indices = list(sampler)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


@pytest.mark.parametrize("size", [3, 4, 8, 11])
def test_every_batch_holds_as_many_of_each_domain(size):
    sampler = DomainBalancedSampler(DOMAINS, size)
    found = batches(sampler, size)
    assert len(sampler) == len(list(sampler)) >= len(DOMAINS)
    for batch in found:
        counts = Counter(DOMAINS[i] for i in batch)
        assert set(counts) == set(DOMAINS)
        assert max(counts.values()) - min(counts.values()) <= 1
    total = Counter(DOMAINS[i] for batch in found for i in batch)
    assert max(total.values()) - min(total.values()) <= 2


def test_domains_are_gone_through_before_an_example_comes_again():
    sampler = DomainBalancedSampler(DOMAINS, 6)
    small = [i for i in sampler if DOMAINS[i] == "small"]
    assert sorted(small[:7]) == sorted(set(small))
    big = [i for i in sampler if DOMAINS[i] == "big"]
    assert len(set(big)) == len(big)


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = DomainBalancedSampler(DOMAINS, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    with isolate_rng():
        before = torch.get_rng_state()
        assert order(0, 1) == order(0, 1)
        assert torch.equal(before, torch.get_rng_state())
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_domains_may_be_a_tensor():
    numbers = [0, 1, 2, 1] * 4
    expected = list(DomainBalancedSampler(numbers, 6))
    assert list(DomainBalancedSampler(torch.tensor(numbers), 6)) == expected


def test_processes_share_an_epoch():
    parts = [DomainBalancedSampler(DOMAINS, 4, num_replicas=2, rank=rank) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    for pair in zip(*(batches(part, 4) for part in parts), strict=True):
        big = [i for batch in pair for i in batch if DOMAINS[i] == "big"]
        assert len(set(big)) == len(big)
        assert all({DOMAINS[i] for i in batch} == set(DOMAINS) for batch in pair)


def test_works_in_any_data_loader():
    loader = DataLoader(DOMAINS, batch_size=6, sampler=DomainBalancedSampler(DOMAINS, 6))
    assert all(Counter(batch) == {"big": 2, "small": 2, "one": 2} for batch in loader)


@pytest.mark.parametrize(
    ("domains", "size", "message"),
    [(DOMAINS, 2, "at least the number of domains, 3"), ([], 2, "examples to balance, but got none")],
)
def test_what_cannot_be_balanced(domains, size, message):
    with pytest.raises(ConfigError, match=message):
        DomainBalancedSampler(domains, size)


def source(name: str, number: int) -> TextSource:
    return TextSource("demo", split="train", num_examples=number, name=name, domain=name, seed=len(name))


def test_data_module_balances(tmp_path: Path):
    data = TextDataModule([source("a", 40), source("bb", 8)], batch_size=4, balance_domains=True)
    module = Recorder()
    trainer(tmp_path, max_epochs=1).fit(module, data)
    domain = {item.id: item.domain for item in data.train_items}
    seen = [domain[key] for key in module.seen[0]]
    assert all(Counter(seen[i : i + 4]) == {"a": 2, "bb": 2} for i in range(0, len(seen), 4))


def test_clusters_are_those_that_there_are():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8)
    truth = np.repeat([0, 1, 2], [30, 20, 10])
    features = centres[truth] * rng.uniform(1, 9, (60, 1)) + rng.normal(0, 0.05, (60, 8))
    assert cluster_domains(features, 3) == truth.tolist()
    order = rng.permutation(60)
    assert cluster_domains(features[order], 3, seed=5) == truth[order].tolist()


def test_too_few_texts_to_cluster():
    with pytest.raises(DataError, match="at least 3 different training texts"):
        cluster_domains(np.ones((5, 4)), 3)


def classifier() -> RobustClassifier:
    return RobustClassifier(Backbone("demo"), learning_rate=1e-3)


def clustered() -> TextDataModule:
    return TextDataModule(
        TextSource("demo", split="train", num_examples=48), batch_size=8, num_clusters=3, balance_domains=True
    )


def test_found_domains_train_a_domain_defense_and_survive_a_resume(tmp_path: Path):
    data = clustered()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, max_epochs=1, callbacks=[VREx(), keep], enable_checkpointing=True).fit(
        classifier(), data
    )
    assert data.domains == ["cluster_0", "cluster_1", "cluster_2"]
    found = data._clusters
    assert found is not None
    sizes = Counter(found)
    assert sizes[0] >= sizes[1] >= sizes[2] > 0
    again = clustered()
    trainer(tmp_path, max_epochs=2, callbacks=[VREx()]).fit(
        classifier(), again, ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert again._clusters == found
    batch = next(iter(islice(again.train_dataloader(), 1)))
    assert set(batch["domain"].tolist()) == {0, 1, 2}


def test_a_foreign_module_is_told_how_to_find_domains(tmp_path: Path):
    with pytest.raises(ConfigError, match="cluster_domains"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), clustered())


def test_num_clusters_is_checked():
    for wrong in (1, 2.5, "3"):
        with pytest.raises(ConfigError, match="`num_clusters` to be a whole number >= 2, but got"):
            TextDataModule(num_clusters=wrong)


def test_mean_hidden_states_are_those_of_the_model():
    module = classifier().eval()
    texts = ["a fine film", "the plot was very long and the music awful", "fine"]
    found = module.victim().mean_hidden_states(texts)
    for text, mean in zip(texts, found, strict=True):
        inputs = module.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = module.model(**inputs, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(mean, hidden[0].mean(0), rtol=1e-4, atol=1e-5)
