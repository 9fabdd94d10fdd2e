"""Backbones: a Hugging Face classifier, its adaptation and its quantization, as one setting."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lightning_robust.errors import BackboneError, did_you_mean
from lightning_robust.modules import loading
from lightning_robust.modules.layers import block_linears, head_modules, keep_in_float32, lora_targets
from lightning_robust.modules.quantization import (
    Quantization,
    finish_quantized,
    quantization_config,
    quantized_device,
)

DEMO = "demo"
Adaptation = Literal["full", "head", "lora"]
Dtype = Literal["float32", "bfloat16"]


@dataclass
class Backbone:
    """Which pretrained model to classify with, and what of it is trained.

    Args:
        path: Hub id, local folder (also one that `RobustClassifier.save_pretrained` wrote, PEFT adapters
            included), or ``demo`` for the embedded tiny model.
        adaptation: What trains: everything, the classification head, or LoRA (arXiv 2106.09685) and the head.
            An adapter folder always goes on as LoRA.
        quantization: Weights of the frozen transformer in 8 or 4 bits.
        dtype: Of the weights. Heads and adapters on a frozen transformer are kept in float32.
        lora_rank: Rank of the update.
        lora_alpha: Scale of the update, divided by the rank.
        lora_dropout: Dropout before the adapter.
        lora_targets: Endings of layer names; by default all linear layers of the transformer blocks.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        max_length: Tokens kept of a text; fewer where the model has fewer positions.
        revision: Git revision on the hub.
        trust_remote_code: Run Python code that comes with the model.
        dropout: Sets every dropout of the configuration.
        seed: Of a new head and new adapters; the global random state is neither used nor changed.

    Raises:
        BackboneError: From `load`, if the model cannot be had as asked.
    """

    path: str
    adaptation: Adaptation = "full"
    quantization: Quantization = "none"
    dtype: Dtype = "float32"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    gradient_checkpointing: bool = False
    max_length: int = 128
    revision: str | None = None
    trust_remote_code: bool = False
    dropout: float | None = None
    seed: int = 0

    def load(
        self, num_labels: int = 2, label_names: Sequence[str] | None = None, *, weights: bool = True
    ) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """Return the model, ready to train, and its tokenizer, ready to pad.

        Args:
            num_labels: Number of classes.
            label_names: Their names, for the model's configuration.
            weights: False builds a full model of the same shape without reading its weights, for a checkpoint that
                brings them all; what has frozen parts is always read.

        Raises:
            BackboneError: If the model cannot be had as asked.
        """
        self._check(num_labels, label_names)
        if self._is_adapter:
            model, tokenizer = self._load_adapter(num_labels, label_names)
        else:
            read = weights or self.adaptation != "full"
            model, tokenizer = self._load_base(num_labels, label_names, weights=read)
            if self.adaptation == "head":
                self._freeze_body(model)
            if self.adaptation == "lora":
                model = self._add_lora(model)
        # from_pretrained leaves eval mode, which Lightning would keep.
        return model.train(), tokenizer

    @property
    def _is_adapter(self) -> bool:
        return self.path != DEMO and loading.is_adapter(self.path)

    def _check(self, num_labels: int, label_names: Sequence[str] | None) -> None:
        for field, kind in (("adaptation", Adaptation), ("quantization", Quantization), ("dtype", Dtype)):
            value, options = getattr(self, field), get_args(kind)
            if value not in options:
                raise BackboneError(
                    f"Expected `{field}` to be one of {', '.join(options)}, but got {value!r}."
                    f"{did_you_mean(str(value), options)}"
                )
        if num_labels < 2:
            raise BackboneError(f"Expected `num_labels` to be >= 2, but got {num_labels}.")
        if label_names is not None and len(set(label_names)) != num_labels:
            raise BackboneError(
                f"Expected `label_names` to hold {num_labels} different names (num_labels), but got {list(label_names)}."
            )
        for field, least in (("lora_rank", 1), ("lora_alpha", 1), ("max_length", 1)):
            if getattr(self, field) < least:
                raise BackboneError(f"Expected `{field}` to be >= {least}, but got {getattr(self, field)}.")
        for field in ("dropout", "lora_dropout"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise BackboneError(f"Expected `{field}` to be in [0, 1), but got {value}.")
        if self.path != DEMO:
            loading.check_folder(self.path)
        if self._is_adapter and self.adaptation == "head":
            raise BackboneError(
                f'Expected adaptation="lora" for the adapter folder {self.path}, but got "head": the adapter'
                " would have to be merged first."
            )

    def _load_base(
        self, num_labels: int, label_names: Sequence[str] | None, *, weights: bool = True
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        config, tokenizer = self._config_and_tokenizer(num_labels, label_names)
        self._set_dropout(config)
        quantized = self.quantization != "none" or getattr(config, "quantization_config", None) is not None
        if quantized and self.adaptation == "full" and not self._is_adapter:
            raise BackboneError(
                'Expected `adaptation` to be "lora" or "head" with quantized weights, which cannot be trained, but'
                f' got "full" (quantization: {self.quantization}). Set adaptation: lora, or quantization: none.'
            )
        with loading.reading(self.path), loading.seeded(self.seed):
            model = self._read(config, weights=weights or quantized)
        if quantized:
            finish_quantized(model)
        loading.match_tokenizer(model, tokenizer)
        # The cache of past keys serves generation; classifying would fill it for nothing.
        model.config.use_cache = False
        # PEFT writes this into the adapter folder; relative paths would bind it to the working directory.
        folder = Path(self.path).expanduser()
        model.name_or_path = str(folder.resolve()) if self.path != DEMO and folder.is_dir() else self.path
        if self.gradient_checkpointing:
            _checkpoint_activations(model)
        if self.dtype == "bfloat16" and (self.adaptation != "full" or self._is_adapter):
            for name in head_modules(model):
                keep_in_float32(model.get_submodule(name))
        return model, tokenizer

    def _config_and_tokenizer(
        self, num_labels: int, label_names: Sequence[str] | None
    ) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
        if self.path == DEMO:
            from lightning_robust.data.demo import demo_config, demo_tokenizer

            config = demo_config(num_labels)
            if label_names is not None:
                config.id2label = dict(enumerate(label_names))
                config.label2id = {name: i for i, name in enumerate(label_names)}
            return config, demo_tokenizer()
        config = loading.load_config(self.path, num_labels, label_names, **self._hub)
        return config, loading.load_tokenizer(self.path, **self._hub)

    @property
    def _hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def _torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def _set_dropout(self, config: PretrainedConfig) -> None:
        if self.dropout is None:
            return
        for name, value in config.to_dict().items():
            probability = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if probability and ("dropout" in name or name.endswith("pdrop")):
                setattr(config, name, self.dropout)

    def _read(self, config: PretrainedConfig, *, weights: bool) -> PreTrainedModel:
        trust = {"trust_remote_code": self.trust_remote_code}
        if self.path == DEMO:
            return self._build_demo(config)
        if not weights:
            return AutoModelForSequenceClassification.from_config(config, dtype=self._torch_dtype, **trust)
        loading.check_weights(self.path)
        return self._from_pretrained(self.path, config)

    def _from_pretrained(self, path: str, config: PretrainedConfig) -> PreTrainedModel:
        extra: dict[str, Any] = {}
        if getattr(config, "quantization_config", None) is not None:
            extra = {"device_map": {"": quantized_device()}}
        elif self.quantization != "none":
            extra = self._quantize(config)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            dtype=self._torch_dtype,
            use_safetensors=True,
            output_loading_info=True,
            **self._hub,
            **extra,
        )
        head = tuple(f"{name}." for name in head_modules(model))
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(head))
        if missing:
            warnings.warn(
                f"{path} has no weights for {len(missing)} parameters outside the head (such as {missing[0]}); they"
                " start untrained. Is it a checkpoint of another architecture?",
                stacklevel=2,
            )
        return model

    def _quantize(self, config: PretrainedConfig) -> dict[str, Any]:
        """Read the structure without weights first: the head must be named to stay unquantized."""
        with torch.device("meta"):
            skeleton = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=self.trust_remote_code
            )
        if not block_linears(skeleton):
            raise BackboneError(
                f"Expected linear layers to quantize, but {type(skeleton).__name__} in {self.path} has none outside its"
                " head. Set quantization: none."
            )
        settings = quantization_config(self.quantization, self._torch_dtype, head_modules(skeleton))
        return {"quantization_config": settings, "device_map": {"": quantized_device()}}

    def _build_demo(self, config: PretrainedConfig) -> PreTrainedModel:
        """The transformer is the same for every seed, like a pretrained one; only the head differs."""
        model = AutoModelForSequenceClassification.from_config(config, dtype=self._torch_dtype)
        with loading.seeded(0):
            body = AutoModelForSequenceClassification.from_config(config, dtype=self._torch_dtype)
        for name in head_modules(model):
            body.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
        if self.quantization == "none":
            return body
        with TemporaryDirectory() as folder:
            body.save_pretrained(folder)
            return self._from_pretrained(folder, config)

    def _freeze_body(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        for name in head_modules(model):
            model.get_submodule(name).requires_grad_(True)

    def _add_lora(self, model: PreTrainedModel) -> PeftModel:
        targets = lora_targets(model, self.lora_targets)
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            modules_to_save=head_modules(model),
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
            revision=self.revision,
        )
        with loading.seeded(self.seed):
            return get_peft_model(model, config)

    def _load_adapter(
        self, num_labels: int, label_names: Sequence[str] | None
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        folder = str(Path(self.path).expanduser())
        with loading.reading(self.path):
            config = PeftConfig.from_pretrained(folder)
        if config.task_type not in (None, "SEQ_CLS"):
            raise BackboneError(
                f"Expected an adapter for sequence classification, but {self.path} is for {config.task_type}."
            )
        if not (Path(folder) / "adapter_model.safetensors").is_file():
            raise BackboneError(f"Expected adapter_model.safetensors in {self.path}, but it is not there.")
        base = replace(self, path=config.base_model_name_or_path, revision=config.revision, adaptation="lora")
        try:
            base._check(num_labels, label_names)
            model, tokenizer = base._load_base(num_labels, label_names)
        except BackboneError as error:
            raise BackboneError(
                f"The adapter in {self.path} needs its base model {base.path!r} (base_model_name_or_path in"
                f" {loading.ADAPTER_CONFIG}): {error}"
            ) from error
        if (Path(folder) / "tokenizer_config.json").is_file():
            tokenizer = loading.load_tokenizer(folder)
            loading.match_tokenizer(model, tokenizer)
        with loading.reading(self.path), loading.seeded(self.seed):
            return PeftModel.from_pretrained(model, folder, is_trainable=True), tokenizer


def _checkpoint_activations(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise BackboneError(f"{type(model).__name__} does not support gradient checkpointing; leave it off.")
    # The re-entrant kind loses the gradient of everything before the first trained layer.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
