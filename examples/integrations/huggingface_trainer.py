"""Hugging Face's Trainer: four ways to have it train with fusedloss."""

import tempfile

import torch
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fusedloss
from examples.integrations.compare import Comparison, compare
from fusedloss.integrations.transformers import apply

VOCABULARY = 256
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "max_steps": 6,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def sentences(count: int = 48, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Numbers that count up, of different lengths: what is behind their end is no target."""
    starts, lengths = torch.randint(VOCABULARY, (count, 1)), torch.randint(4, length, (count, 1))
    position = torch.arange(length)
    ids = (starts + position) % VOCABULARY
    labels = torch.where(position < lengths, ids, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


class Recorder(TrainerCallback):
    def __init__(self):
        self.losses: list[float] = []

    def on_log(self, arguments, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def train(arguments: dict | None = None, **options) -> list[float]:
    model = tiny_llama()
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            **SETTINGS,
            **(arguments or {}),
        )
        Trainer(model, settings, train_dataset=sentences(), callbacks=[recorder], **options).train()
    return recorder.losses


def causal_lm_loss(outputs, labels, num_items_in_batch=None):
    """A compute_loss_func: reads the logits in the type that the model returns, and divides once."""
    labels = pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    return fusedloss.cross_entropy(outputs.logits.flatten(0, 1), labels, denominator=num_items_in_batch)


def patched() -> list[float]:
    with fusedloss.patch():
        return train()


def applied(arguments: dict | None = None, **options) -> list[float]:
    with apply(**options):
        return train(arguments)


def comparisons() -> list[Comparison]:
    half = {"bf16": True}
    return [
        compare("Trainer, compute_loss_func", train, lambda: train(compute_loss_func=causal_lm_loss)),
        compare("Trainer, patch()", train, patched),
        compare("Trainer, apply()", train, applied),
        compare("Trainer, apply(linear=True)", train, lambda: applied(linear=True)),
        compare(
            "Trainer, bfloat16, apply(linear=True)",
            lambda: train(half),
            lambda: applied(half, linear=True),
            tolerance=1e-3,
        ),
    ]
