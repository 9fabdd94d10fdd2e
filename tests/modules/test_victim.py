from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.data import Text
from lightning_robust.errors import AttackError, ConfigError
from lightning_robust.modules.embeddings import input_embeddings
from lightning_robust.modules.encoding import encode, pack
from lightning_robust.modules.victim import EmbeddingQuery, Victim, find_victim
from tests.attacks.tiny import sentences, tiny_model, tiny_tokenizer

KINDS = ("bert", "llama")


def make(kind: str, **settings: Any) -> Victim:
    return Victim(tiny_model(kind), tiny_tokenizer(kind), **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities(kind: str) -> None:
    victim = make(kind)
    texts = [*sentences(20), "", "😀 فيلم", "x" * 5000]
    answer = victim(texts)
    assert (answer.shape, answer.dtype, answer.device.type) == ((23, 2), torch.float32, "cpu")
    assert torch.allclose(answer.sum(dim=1), torch.ones(23))
    assert victim.predict_proba(texts).equal(answer)
    assert not answer.requires_grad
    assert victim([]).shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_gets_what_it_gets_alone(kind: str) -> None:
    victim = make(kind, max_batch_tokens=60)
    texts = [*sentences(20, shortest=1), ""]
    alone = torch.cat([victim([text]) for text in texts])
    assert torch.allclose(victim(texts), alone, atol=1e-5)
    assert torch.allclose(victim(texts[::-1]).flip(0), alone, atol=1e-5)
    assert (alone.max(dim=0).values - alone.min(dim=0).values).min() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_model_called_by_hand(kind: str) -> None:
    victim = make(kind)
    text = "charming film"
    ids = torch.tensor([victim.tokenizer(text)["input_ids"]])
    logits = victim.model.eval()(input_ids=ids).logits
    assert torch.allclose(victim([text]), logits.detach().softmax(-1), atol=1e-6)


def test_pairs_and_truncation() -> None:
    victim = make("bert", max_length=8)
    pair = ("charming film", "bleak film")
    ids = victim.tokenizer(*pair)
    assert ids["token_type_ids"][-1] == 1
    by_hand = victim.model.eval()(**{k: torch.tensor([v]) for k, v in ids.items()}).logits.softmax(-1)
    assert torch.allclose(victim(["film", pair])[1], by_hand[0].detach(), atol=1e-6)
    encoded = encode(victim.tokenizer, ["film " * 99, ("film " * 99, "plot " * 99)], 8)
    assert [len(e.input_ids) for e in encoded] == [8, 8]
    with pytest.raises(ConfigError, match=r"Expected one text or a pair, but got 3 texts"):
        victim([("a", "b", "c")])


def test_segment_ids_are_dropped_where_the_model_takes_none() -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=200, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=64
    )
    with torch.random.fork_rng():
        model = DistilBertForSequenceClassification(config)
    assert Victim(model, tiny_tokenizer())([("film", "plot"), "film"]).shape == (2, 2)


def test_modes_of_all_submodules_are_restored_also_after_an_error() -> None:
    victim = make("bert")
    modules = list(victim.model.modules())
    for i, module in enumerate(modules):
        module.training = i % 3 == 0
    modes = [m.training for m in modules]
    seen: list[bool] = []
    victim.model.register_forward_pre_hook(lambda *_: seen.extend(m.training for m in modules))
    victim(["film"])
    assert not any(seen)
    assert [m.training for m in modules] == modes
    with pytest.raises(AttackError, match=r"labels from 0 to 1.*got 7"):
        victim.embedding_gradients([EmbeddingQuery("film", 7)])
    assert [m.training for m in modules] == modes


def test_tokenizers_own_settings_are_neither_used_nor_changed() -> None:
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=50, pad_id=0, pad_token="[PAD]")
    backend.enable_truncation(max_length=5)
    before = backend.padding, backend.truncation
    long = "charming film and a plot of a scene"
    answer = Victim(tiny_model(), tokenizer)([long, "film"])
    assert (backend.padding, backend.truncation) == before
    assert torch.allclose(answer, Victim(tiny_model(), tiny_tokenizer())([long, "film"]), atol=1e-6)


def test_real_encoder_with_padding_in_its_file(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "all-MiniLM-L6-v2")
    before = tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation
    short, long = encode(tokenizer, ["a film", "film " * 300], 200)
    assert (len(short.input_ids), len(long.input_ids)) == (4, 200)
    assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == before


def test_decoder_without_pad_token_is_asked_one_by_one() -> None:
    victim, padless = make("llama"), make("llama")
    padless.model.config.pad_token_id = None
    texts = sentences(5)
    assert torch.allclose(padless(texts), victim(texts), atol=1e-6)


def test_batches_hold_the_token_limit() -> None:
    lengths = [3, 50, 9, 9, 1, 20]
    batches = list(pack(lengths, 20))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)
    assert [len(b) for b in pack(lengths, 1000, max_rows=4)] == [4, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_equal_finite_differences(
    kind: str, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    victim = make(kind)
    victim.model.double()
    texts = ["charming film", "bleak", "a tedious plot with music"]
    with context():
        first = victim.embedding_gradients([EmbeddingQuery(text, 1) for text in texts])
    for text, answer in zip(texts, first, strict=True):
        direction = torch.randn(answer.gradient.shape, generator=torch.Generator().manual_seed(0))
        direction = direction * answer.mask.unsqueeze(-1)
        up, down = victim.embedding_gradients(
            [EmbeddingQuery(text, 1, s * 1e-3 * direction) for s in (1, -1)]
        )
        slope = (up.loss - down.loss) / 2e-3
        assert slope == pytest.approx(float((answer.gradient * direction).sum()), rel=1e-2, abs=1e-4)
        assert answer.loss == pytest.approx(-float(answer.probabilities[1].log()), abs=1e-4)
        assert torch.allclose(answer.probabilities, victim([text])[0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_the_batch_and_spare_special_tokens(kind: str) -> None:
    victim = make(kind)
    texts: list[Text] = ["charming film", "a tedious plot with music", ("film", "plot"), ""]
    zero = victim.embedding_gradients([EmbeddingQuery(text, 0) for text in texts])
    deltas = [torch.arange(16.0).expand_as(answer.gradient) for answer in zero]
    asked = [EmbeddingQuery(text, 0, delta) for text, delta in zip(texts, deltas, strict=True)]
    together = victim.embedding_gradients(asked)
    for query, answer in zip(asked, together, strict=True):
        (alone,) = victim.embedding_gradients([query])
        assert torch.allclose(alone.gradient, answer.gradient, atol=1e-5)
        assert torch.allclose(alone.probabilities, answer.probabilities, atol=1e-5)
        assert not answer.gradient[~answer.mask].any()
        assert answer.norms.shape == answer.mask.shape == answer.gradient.shape[:1]
        assert (answer.norms > 0).all()
        ids = encode(victim.tokenizer, [query.text], 64)[0].input_ids
        special = {0, 2, 3}
        assert answer.mask.tolist() == [token not in special for token in ids]
    assert torch.allclose(together[3].probabilities, zero[3].probabilities)
    assert not torch.allclose(together[0].probabilities, zero[0].probabilities)
    with pytest.raises(AttackError, match=r"Expected `delta` of shape"):
        victim.embedding_gradients([EmbeddingQuery("film", 0, torch.zeros(2, 5))])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_leave_no_trace(kind: str) -> None:
    victim = make(kind)
    model = victim.model
    input_embeddings(model).weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    generator = torch.get_rng_state()
    victim.embedding_gradients([EmbeddingQuery("charming film", 0)])
    victim(["charming film"])
    assert {name: p.requires_grad for name, p in parameters.items()} == flags
    assert all(p.grad is not None and p.grad.eq(1).all() for p in parameters.values())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not input_embeddings(model)._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_calls_under_inference_mode(kind: str) -> None:
    victim = make(kind)
    cached: list[Tensor] = []
    input_embeddings(victim.model).register_forward_hook(lambda _m, _a, output: cached.append(output))
    with torch.inference_mode():
        victim(sentences(3))
        assert cached
        assert not any(tensor.is_inference() for tensor in cached)
        victim.embedding_gradients([EmbeddingQuery("charming film", 0)])
    ids = torch.tensor([[2, 5, 6]])
    F.cross_entropy(victim.model(input_ids=ids).logits, torch.tensor([1])).backward()
    assert input_embeddings(victim.model).weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_lora_and_gradient_checkpointing(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    plain = make(kind)
    base = tiny_model(kind)
    base.gradient_checkpointing_enable()
    targets = ["q_proj"] if kind == "llama" else ["query"]
    with torch.random.fork_rng():
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets))
    model.enable_input_require_grads()
    victim = Victim(model, tiny_tokenizer(kind))
    query = EmbeddingQuery("charming film", 0)
    with torch.inference_mode():
        (answer,) = victim.embedding_gradients([query])
        assert torch.allclose(victim([query.text]), plain([query.text]), atol=1e-6)
    (expected,) = plain.embedding_gradients([query])
    assert torch.allclose(answer.gradient, expected.gradient, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_four_bit_weights_are_left_as_they_are() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    victim = make("llama")
    block = victim.model.model.layers[0].mlp
    with torch.random.fork_rng():
        layer = bnb.nn.Linear4bit(16, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    block.up_proj = layer.to("cpu")
    repacks = layer.support_avx512bf16_for_cpu
    layer.support_avx512bf16_for_cpu = True
    packed = layer.weight.data.clone()
    with torch.inference_mode():
        probabilities = victim(["charming film"])
        (answer,) = victim.embedding_gradients([EmbeddingQuery("charming film", 0)])
    assert layer.weight.data.equal(packed)
    assert layer.support_avx512bf16_for_cpu
    layer.support_avx512bf16_for_cpu = repacks
    assert torch.allclose(answer.probabilities, probabilities[0], atol=1e-5)
    assert answer.gradient.any()


class Foreign(nn.Module):
    """Stands for a LightningModule of another project."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_finds_model_and_tokenizer_in_a_foreign_module() -> None:
    from types import SimpleNamespace

    model, tokenizer = tiny_model(), tiny_tokenizer()
    expected = Victim(model, tokenizer)(["charming film"])
    inner = Foreign(encoder=model, head=nn.Linear(2, 2))
    for module in (Foreign(net=model, tok=tokenizer), model):
        assert torch.equal(Victim.from_module(module, tokenizer)(["charming film"]), expected)
    assert Victim.from_module(Foreign(net=model, tok=tokenizer)).tokenizer is tokenizer
    attached = Foreign(net=inner)
    attached._trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=tokenizer))
    assert Victim.from_module(attached).model is model
    with pytest.raises(ConfigError, match=r"Expected a tokenizer on Foreign.*Pass it: tokenizer="):
        Victim.from_module(Foreign(net=model))


def test_several_models_have_to_be_named() -> None:
    from transformers import BertModel

    tokenizer = tiny_tokenizer()
    one, two = tiny_model(), tiny_model(seed=1)
    module = Foreign(student=one, teacher=two)
    with pytest.raises(ConfigError, match=r"found 2: student \(Bert.*teacher.*model=\"path.to.model\""):
        Victim.from_module(module, tokenizer)
    assert Victim.from_module(module, tokenizer, model="teacher").model is two
    with pytest.raises(ConfigError, match=r"got 'teachr'. Did you mean «teacher»"):
        Victim.from_module(module, tokenizer, model="teachr")
    encoder = BertModel(one.config)
    assert Victim.from_module(Foreign(encoder=encoder, net=one), tokenizer).model is one
    with pytest.raises(ConfigError, match=r"from BertModel, but got no `logits`"):
        Victim.from_module(Foreign(encoder=encoder), tokenizer)(["film"])
    with pytest.raises(ConfigError, match=r"found 0: none.*predict_proba"):
        Victim.from_module(Foreign(net=nn.Linear(2, 2)), tokenizer)


def test_peft_model_is_the_outermost() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    assert Victim.from_module(Foreign(net=model), tiny_tokenizer()).model is model


def test_own_predict_proba_is_used() -> None:
    class Own(Foreign):
        def predict_proba(self, texts: list[Text]) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.tensor([[0.25, 0.75]] * len(texts))

    module = Own(net=tiny_model(), tok=tiny_tokenizer())
    victim = find_victim(module)
    assert victim(["film", "plot"]).tolist() == [[0.25, 0.75]] * 2
    assert module.training
    (answer,) = victim.embedding_gradients([EmbeddingQuery("film", 0)])
    assert answer.gradient.shape == (3, 16)
    assert isinstance(find_victim(Foreign(net=tiny_model(), tok=tiny_tokenizer())), Victim)


def test_one_class_and_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"logits of shape \(1, 1\)"):
        Victim(tiny_model(num_labels=1), tiny_tokenizer())(["film"])
    for setting in ("max_length", "max_batch_tokens"):
        with pytest.raises(ConfigError, match=f"Expected `{setting}` to be >= 1, but got 0"):
            make("bert", **{setting: 0})


def test_autocast() -> None:
    texts = sentences(4)
    full, half = make("bert")(texts), make("bert", autocast_dtype=torch.bfloat16)(texts)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, atol=0.1)
