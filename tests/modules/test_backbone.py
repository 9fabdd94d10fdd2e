from __future__ import annotations

import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lightning_robust.errors import BackboneError
from lightning_robust.modules.backbone import Backbone
from lightning_robust.modules.layers import block_linears, head_modules
from tests.modules.models import CONFIGS, DECODERS, TEXTS, save_model, tokenizer


def logits(model, tok, texts):
    with torch.no_grad():
        return model(**tok(texts, padding=True, return_tensors="pt")).logits.float()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_batch_logits_equal_single_logits(kind, quantization, tmp_path):
    path = save_model(tmp_path, kind)
    adaptation = "full" if quantization == "none" else "lora"
    model, tok = Backbone(path, adaptation, quantization).load()
    model.eval()
    single = torch.cat([logits(model, tok, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, tok, TEXTS), single, atol=2e-5, rtol=0)
    assert single.std(dim=0).max() > 1e-4  # not one constant


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_head_and_targets_are_found(kind, tmp_path):
    model = AutoModelForSequenceClassification.from_config(CONFIGS[kind]())
    heads = {
        "bert": ["bert.pooler", "classifier"],
        "roberta": ["classifier"],
        "distilbert": ["pre_classifier", "classifier"],
        "llama": ["score"],
        "gpt2": ["score"],
    }
    per_layer = {"bert": 6, "roberta": 6, "distilbert": 6, "llama": 7, "gpt2": 4}
    assert head_modules(model) == heads[kind]
    assert len(block_linears(model)) == 2 * per_layer[kind]

    path = save_model(tmp_path, kind)
    adapted, _ = Backbone(path, "lora").load()
    names = trainable(adapted)
    assert {n for n in names if "lora_" not in n} == {n for n in names if "modules_to_save" in n}
    assert sum("lora_A" in n for n in names) == 2 * per_layer[kind]
    assert {h for h in heads[kind] if any(f"{h}.modules_to_save" in n for n in names)} == set(heads[kind])

    only_head, _ = Backbone(path, "head").load()
    assert {n for n in trainable(only_head) if not n.startswith(tuple(heads[kind]))} == set()
    assert trainable(only_head)


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_without_pad_token_gets_one(kind, tmp_path):
    model, tok = Backbone(save_model(tmp_path, kind)).load()
    assert tok.pad_token == "[SEP]"
    assert model.config.pad_token_id == 3
    assert tok.padding_side == "right"


def test_decoder_keeps_its_pad_token(tmp_path):
    model, tok = Backbone(save_model(tmp_path, "llama", pad=True)).load()
    assert (tok.pad_token, model.config.pad_token_id) == ("[PAD]", 0)


def test_decoder_takes_the_pad_token_of_its_configuration(tmp_path):
    model, tok = Backbone(save_model(tmp_path, "llama", pad_token_id=1)).load()
    assert (tok.pad_token, model.config.pad_token_id) == ("[UNK]", 1)


def test_left_padding_is_turned_right(tmp_path):
    path = save_model(tmp_path, "gpt2")
    tok = tokenizer(decoder=True, pad=False)
    tok.padding_side = "left"
    tok.save_pretrained(path)
    assert Backbone(path).load()[1].padding_side == "right"


def test_no_pad_and_no_end_token_is_an_error(tmp_path):
    path = save_model(tmp_path, "llama")
    tok = tokenizer(decoder=True, pad=False)
    tok.eos_token = None
    tok.save_pretrained(path)
    with pytest.raises(BackboneError, match="pad or end-of-sequence token"):
        Backbone(path).load()


@pytest.mark.parametrize("path", ["demo", "saved"])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_new_weights_follow_the_seed_alone(path, adaptation, tmp_path):
    if path == "saved":
        path = save_model(tmp_path, "bert")
        for file in tmp_path.glob("*.safetensors"):  # without a head, so that it is new
            _drop_head(file)
    torch.manual_seed(1)
    first = trained(Backbone(path, adaptation, seed=3))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = trained(Backbone(path, adaptation, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    other = trained(Backbone(path, adaptation, seed=4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    changed = {k for k in first if not torch.equal(first[k], other[k])}
    assert any("classifier" in k for k in changed)
    assert all("classifier" in k or "pooler" in k or "lora_A" in k for k in changed)


def trained(backbone):
    return {n: p.detach().clone() for n, p in backbone.load()[0].named_parameters() if p.requires_grad}


def _drop_head(file):
    from safetensors.torch import load_file, save_file

    save_file(
        {k: v for k, v in load_file(file).items() if "classifier" not in k}, file, metadata={"format": "pt"}
    )


def test_missing_body_weights_are_told(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_model(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(file).items() if "layer.1." not in k}, file, metadata={"format": "pt"}
    )
    with pytest.warns(
        UserWarning, match=r"no weights for 16 parameters outside the head \(such as bert.encoder"
    ):
        Backbone(path).load()


@pytest.mark.parametrize("adaptation", ["lora", "head"])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_body_plain_trainable_head(adaptation, quantization, dtype, tmp_path):
    path = save_model(tmp_path, "bert")
    model, tok = Backbone(path, adaptation, quantization, dtype).load()
    layer = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantization]
    kinds = [name for name, m in model.named_modules() if any(c.__name__ == layer for c in type(m).__mro__)]
    assert len([n for n in kinds if "base_layer" in n or adaptation == "head"]) == 12
    assert not any("pooler" in name or "classifier" in name for name in kinds)
    out = model(**tok(TEXTS, padding=True, return_tensors="pt")).logits
    torch.nn.functional.cross_entropy(out.float(), torch.tensor([0, 1, 0, 1])).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None, name


def test_quantized_logits_stay_near_the_plain_ones(tmp_path):
    path = save_model(tmp_path, "bert")
    model, tok = Backbone(path, "head").load()
    plain = logits(model.eval(), tok, TEXTS)
    for quantization, tolerance in (("8bit", 0.02), ("4bit", 0.2)):
        model, tok = Backbone(path, "head", quantization).load()
        difference = (logits(model.eval(), tok, TEXTS) - plain).abs().max()
        assert 0 < difference < tolerance


def test_training_mode_dropout_and_cache(tmp_path):
    model, _ = Backbone(save_model(tmp_path, "distilbert"), dropout=0.37).load()
    assert model.training
    config = model.config
    assert {config.dropout, config.attention_dropout, config.seq_classif_dropout} == {0.37}
    bert, _ = Backbone("demo", dropout=0.0).load()
    assert all(m.p == 0 for m in bert.modules() if isinstance(m, torch.nn.Dropout))
    llama, _ = Backbone(save_model(tmp_path / "llama", "llama")).load()
    assert llama.config.use_cache is False


@pytest.mark.parametrize("adaptation", ["full", "lora", "head"])
def test_gradient_checkpointing_gives_the_same_gradients(adaptation, tmp_path):
    path = save_model(tmp_path, "llama")
    gradients = []
    for checkpointing in (False, True):
        model, tok = Backbone(path, adaptation, gradient_checkpointing=checkpointing).load()
        model(**tok(TEXTS, padding=True, return_tensors="pt")).logits.pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_label_names_reach_the_configuration(tmp_path):
    path = save_model(tmp_path, "bert", num_labels=2)
    model, _ = Backbone(path).load(2, ["negative", "positive"])
    assert model.config.id2label == {0: "negative", 1: "positive"}
    model.save_pretrained(path)
    assert Backbone(path).load(2)[0].config.label2id == {"negative": 0, "positive": 1}


def test_full_model_can_be_built_without_its_weights(tmp_path):
    path = save_model(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"no \*.safetensors"):
        Backbone(path).load()
    assert Backbone(path).load(weights=False)[0].training


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "llama-mini-wiki"])
@pytest.mark.parametrize(("adaptation", "quantization"), [("lora", "4bit"), ("head", "8bit")])
def test_real_models_quantized(name, adaptation, quantization, shared):
    model, tok = Backbone(str(shared / "models" / name), adaptation, quantization).load(3)
    model.eval()
    texts = [" ".join([first, *["very"] * n, "good film"]) for first in ("a", "the", "not") for n in range(5)]
    single = torch.cat([logits(model, tok, [text]) for text in texts])
    different = (logits(model, tok, texts) - single).abs().amax(1) > 2e-5
    # Rounding to 8 bits can turn noise of 1e-7 into a step of 1/127; it must stay the exception.
    assert different.sum() <= (0 if quantization == "4bit" else 3)


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptation": "lroa"}, "one of full, head, lora, but got 'lroa'. Did you mean «lora»?"),
        ({"quantization": "4-bit"}, "one of none, 8bit, 4bit, but got '4-bit'. Did you mean «4bit»?"),
        ({"dtype": "float16"}, "one of float32, bfloat16"),
        ({"dropout": 1.0}, "`dropout` to be in [0, 1)"),
        ({"lora_rank": 0}, "`lora_rank` to be >= 1"),
        ({"max_length": 0}, "`max_length` to be >= 1"),
        ({"quantization": "4bit"}, 'Expected `adaptation` to be "lora" or "head" with quantized weights'),
        ({"quantization": "8bit"}, "Set adaptation: lora"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BackboneError, match=re.escape(message)):
        Backbone("demo", **settings).load()


def test_bad_labels():
    with pytest.raises(BackboneError, match="`num_labels` to be >= 2, but got 1"):
        Backbone("demo").load(1)
    with pytest.raises(BackboneError, match="2 different names"):
        Backbone("demo").load(2, ["same", "same"])


def test_unknown_lora_target_lists_the_layers(tmp_path):
    path = save_model(tmp_path, "llama")
    with pytest.raises(
        BackboneError, match=r"'q_porj' matches none. Did you mean «q_proj»\? There are: down_proj,"
    ):
        Backbone(path, "lora", lora_targets=["v_proj", "q_porj"]).load()
    with pytest.raises(BackboneError, match="'score' matches none"):
        Backbone(path, "lora", lora_targets=["score"]).load()
    with pytest.raises(BackboneError, match="but got \\[\\]"):
        Backbone(path, "lora", lora_targets=[]).load()


def test_chosen_lora_targets(tmp_path):
    model, _ = Backbone(
        save_model(tmp_path, "llama"), "lora", lora_targets=["q_proj", "layers.1.mlp.up_proj"]
    ).load()
    adapted = {name for name, m in model.named_modules() if hasattr(m, "lora_A")}
    prefix = "base_model.model.model.layers"
    assert adapted == {
        f"{prefix}.{end}" for end in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj")
    }


@pytest.mark.parametrize(("adaptation", "quantization"), [("lora", "none"), ("head", "4bit")])
def test_model_without_linear_layers(adaptation, quantization, tmp_path):
    path = save_model(tmp_path, "bert", num_hidden_layers=0)
    with pytest.raises(BackboneError, match="Expected linear layers to"):
        Backbone(path, adaptation, quantization).load()


def test_missing_folder_suggests_its_siblings(tmp_path):
    save_model(tmp_path / "tiny-bert", "bert")
    with pytest.raises(BackboneError, match=r"does not exist. Did you mean «tiny-bert»\? Model folders in"):
        Backbone(str(tmp_path / "tiny-brt")).load()


def test_folder_without_a_model(tmp_path):
    save_model(tmp_path / "inner", "bert")
    with pytest.raises(BackboneError, match=r"config.json, but .* has none. Model folders inside it: inner"):
        Backbone(str(tmp_path)).load()


def test_hub_id_while_offline_names_the_local_way():
    with pytest.raises(
        BackboneError, match=r"HF_HUB_OFFLINE is set.*hf download no-one/nothing --local-dir.*path: demo"
    ):
        Backbone("no-one/nothing").load()


def test_pickled_weights_are_refused(tmp_path):
    path = save_model(tmp_path, "bert")
    model = AutoModelForSequenceClassification.from_pretrained(path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="convert it once") as caught:
        Backbone(path).load()
    command = str(caught.value).split('python -c "')[1].split('"')[0]
    exec(command)  # the advice works
    assert Backbone(path).load()


def test_head_for_other_labels(tmp_path):
    path = save_model(tmp_path, "bert", num_labels=3)
    with pytest.raises(BackboneError, match="weights are for another number of labels"):
        Backbone(path).load(2)


def test_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="Cannot read the model in"):
        Backbone(str(tmp_path)).load()


def test_model_without_a_classifier(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="AutoModelForSequenceClassification supports"):
        Backbone(str(tmp_path)).load()


def test_remote_code_is_off(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}, "architectures": ["Mine"]}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BackboneError, match="set trust_remote_code=true"):
        Backbone(str(tmp_path)).load()


def test_adapter_without_its_base(tmp_path):
    path = save_model(tmp_path / "base", "bert")
    model, tok = Backbone(path, "lora").load()
    model.save_pretrained(tmp_path / "adapter")
    tok.save_pretrained(tmp_path / "adapter")
    loaded, _ = Backbone(str(tmp_path / "adapter")).load()
    assert isinstance(loaded, PeftModel)
    with pytest.raises(BackboneError, match="merged first"):
        Backbone(str(tmp_path / "adapter"), "head").load()
    with pytest.raises(BackboneError, match="another number of labels"):
        Backbone(str(tmp_path / "adapter")).load(3)
    shutil.move(path, tmp_path / "moved")
    with pytest.raises(BackboneError, match=r"needs its base model .*base.* does not exist"):
        Backbone(str(tmp_path / "adapter")).load()
