"""Projects that know nothing of lightning-robust: modules and data as users write them."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

VOCABULARY = 23


class PlainEncoder(LightningModule):
    """Mean-pooled embeddings, no Hugging Face anywhere; batches are dicts."""

    def __init__(self, dropout: float = 0.0, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(5)
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.hidden = nn.Linear(6, 5)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(5, 2)
        self.train_accuracy = MulticlassAccuracy(num_classes=2, average="micro")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask.unsqueeze(-1).to(self.embed.weight.dtype)
        pooled = (torch.tanh(self.hidden(self.embed(input_ids))) * weights).sum(1) / weights.sum(1)
        return self.head(self.dropout(pooled))

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        self.train_accuracy(logits, batch["labels"])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


class DictLoss(PlainEncoder):
    """Returns a dict, as many projects do."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "batch_idx": batch_idx}


def rows(number: int = 16, length: int = 7, domains: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    data = []
    for i in range(number):
        used = int(torch.randint(3, length + 1, (1,), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        ids[used:] = 0
        data.append(
            {
                "input_ids": ids,
                "attention_mask": (ids != 0).long(),
                "labels": (ids[0] % 2).long(),
                "domain": torch.tensor(i % domains),
            }
        )
    return data


def loader(number: int = 16, batch_size: int = 4, **kwargs) -> DataLoader:
    return DataLoader(rows(number, **kwargs), batch_size=batch_size)
