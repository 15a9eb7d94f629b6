"""TRL's SFTTrainer, whose own loss goes past the model's: it takes hidden states and the head's weight to its kernels.

Its ``loss_type`` is "nll" or "dft", both made of these log-probabilities. Trainer's ``compute_loss``, which it has
replaced, asks the model for the loss; with that one back, ``apply(linear=True)`` has the loss as in any Trainer.
"""

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from examples.integrations.compare import Comparison, compare
from examples.integrations.huggingface_trainer import SETTINGS, VOCABULARY, Recorder, sentences, tiny_llama
from fusedloss.integrations.transformers import apply


class FusedSFTTrainer(SFTTrainer):
    compute_loss = Trainer.compute_loss


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"<{number}>": number for number in range(VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<0>", eos_token="<1>", unk_token="<0>")


def train(trainer=SFTTrainer, **options) -> list[float]:
    model = tiny_llama()
    data = Dataset.from_list([{name: ids.tolist() for name, ids in each.items()} for each in sentences()])
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            **SETTINGS,
            bf16=False,
            gradient_checkpointing=False,
            **options,
        )
        trainer(model, settings, train_dataset=data, processing_class=tokenizer(), callbacks=[recorder]).train()
    return recorder.losses


def applied() -> list[float]:
    with apply(linear=True):
        return train(FusedSFTTrainer)


def comparisons() -> list[Comparison]:
    return [compare("SFTTrainer, apply(linear=True)", train, applied)]
