"""Lightning: the criterion is an attribute of the module; Lightning calls backward, and scales."""

import copy

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

import fusedloss
from examples.integrations.compare import Comparison, batches, compare


class Classifier(lightning.LightningModule):
    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))
        self.criterion = criterion  # nn.CrossEntropyLoss(), or fusedloss.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch, batch_index):
        x, y = batch
        loss = self.criterion(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(criterion: nn.Module, replace: bool = False, **options) -> list[float]:
    torch.manual_seed(0)
    module = Classifier(criterion)
    if replace:
        fusedloss.replace_losses(module)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(batches(8, (32, 16), 10, (32,)), batch_size=None))
    return module.losses


def comparisons() -> list[Comparison]:
    native, fused = nn.CrossEntropyLoss(label_smoothing=0.1), fusedloss.CrossEntropyLoss(label_smoothing=0.1)
    return [
        compare("Lightning, a criterion", lambda: train(native), lambda: train(fused)),
        compare("Lightning, replace_losses()", lambda: train(native), lambda: train(copy.copy(native), replace=True)),
        compare(
            "Lightning, bfloat16",
            lambda: train(native, precision="bf16-mixed"),
            lambda: train(fused, precision="bf16-mixed"),
            tolerance=1e-3,
        ),
    ]
