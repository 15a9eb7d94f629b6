"""DistributedDataParallel and FSDP2 on two processes: a model whose head is in its loss, and one of transformers."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import fusedloss
from examples.integrations.compare import Comparison, compare, missing

RANKS, VOCABULARY, WIDTH = 2, 256, 32
WRAPPERS: dict[str, Callable] = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}


class LanguageModel(nn.Module):
    """The loss is within the module, where FSDP has gathered the head's weight."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden, target = self.body(input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if self.fused:
            return {"loss": fusedloss.linear_cross_entropy(hidden, self.head.weight, target)}
        return {"loss": functional.cross_entropy(self.head(hidden), target)}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def applied():
    from fusedloss.integrations.transformers import apply

    return apply(linear=True)


def train(make: Callable[[], nn.Module], wrapper: str, context: Callable = contextlib.nullcontext) -> list[float]:
    torch.manual_seed(0)
    model = WRAPPERS[wrapper](make())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(5):
        ids = (torch.randint(VOCABULARY, (4, 1), generator=generator) + torch.arange(12)) % VOCABULARY
        with context():
            loss = model(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / RANKS
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def compare_on_rank(wrapper: str) -> list[Comparison]:
    found = [
        compare(
            f"{wrapper}, linear_cross_entropy",
            lambda: train(lambda: LanguageModel(False), wrapper),
            lambda: train(lambda: LanguageModel(True), wrapper),
        )
    ]
    if not missing(("transformers",)):
        name = f"{wrapper}, apply(linear=True)"
        found += [compare(name, lambda: train(llama, wrapper), lambda: train(llama, wrapper, applied))]
    return found


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    found = [asdict(each) for wrapper in WRAPPERS for each in compare_on_rank(wrapper)]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def comparisons() -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (folder,), nprocs=RANKS)
        return [Comparison(**each) for each in json.loads(Path(folder, "0.json").read_text())]
