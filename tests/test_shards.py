"""Classes shared between ranks, on every backend and in one process: each rank takes its turn, and what the ranks
exchange is handed over. What only several processes show is in test_vocab_parallel.py.
"""

import pytest
import torch
from support import eighths, moved, outputs_of, short

import fusedloss
from fusedloss import vocab_parallel


class Exchange(Exception):
    """Of a rank that has sent its part, and would wait for the others."""


class Ranks:
    """Stands for a process group."""

    group_name = "turns"

    def __init__(self, count):
        self.count, self.rank = count, 0

    def chunks(self, tensor, dim):
        """One for each rank, where torch.chunk leaves out those that are empty."""
        chunks = list(tensor.chunk(self.count, dim))
        return chunks + [tensor.narrow(dim, 0, 0)] * (self.count - len(chunks))

    def run(self, call):
        """call(rank) of every rank."""
        sent = []
        for rank in range(self.count):
            self.rank, self.exchange = rank, sent.append
            with pytest.raises(Exchange):
                call(rank)
        results = []
        for rank in range(self.count):
            self.rank, self.exchange = rank, lambda part: torch.stack(sent)
            results.append(call(rank))
        return results


@pytest.fixture(params=[2, 3])
def ranks(request, monkeypatch):
    ranks = Ranks(request.param)

    def exchanged(loss, classes, kind, target, statistics):
        packed, made = statistics()
        every = ranks.exchange(packed)
        if every is None:
            raise Exchange
        return every, made

    monkeypatch.setattr(vocab_parallel, "_rank_in", lambda loss, group: (ranks.rank, ranks.count))
    monkeypatch.setattr(vocab_parallel, "_exchanged", exchanged)
    return ranks


def gradients(outputs, leaves):
    outputs = [output for output in outputs if output.is_floating_point()]
    return torch.autograd.grad(outputs, leaves, [eighths(y.shape, y.dtype, y.device) for y in outputs])


ANSWERS = {"return_lse": True, "return_entropy": True, "return_argmax": True}
OPTIONS = {
    "plain": {},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.1},
    "sum, z loss, cap, scale": {"reduction": "sum", "z_loss": 0.1, "logit_softcap": 3.0, "logit_scale": 0.7},
    "unreduced, answers": {"reduction": "none", "weight": True, **ANSWERS},
    "answers, smoothing": {"label_smoothing": 0.2, **ANSWERS},
    "weights of samples": {"sample_weight": True, "denominator": 3},
    "a class that is ignored": {"ignore_index": 2},
}
SHAPES = {"rows": (7, 37), "empty shards": (3, 1), "images": (2, 5, 3), "one position": (6,), "no rows": (0, 5)}


def given(options, classes, positions, dtype):
    """The options with tensors in the place of True."""
    sizes = {"weight": (classes,), "sample_weight": positions}
    return {
        name: torch.rand(sizes[name], dtype=torch.float64).to(dtype) + 0.5 if name in sizes else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cross_entropy(shape, options, dtype, soft, ranks, device):
    dim = min(1, len(shape) - 1)
    classes, positions = shape[dim], shape[:dim] + shape[dim + 1 :]
    if soft and "ignore_index" in options:
        pytest.skip("probabilities have no index")
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, positions)
    if positions != () and positions[0] > 2:
        target[1] = options.get("ignore_index", -100)
    if soft:
        target = torch.rand(shape, dtype=torch.float64).to(dtype)
    options = moved(given(options, classes, positions, dtype), device)
    logits, target = logits.to(device), target.to(device)

    whole = logits.detach().requires_grad_()
    expected = outputs_of(fusedloss.cross_entropy(whole, target, **options))
    (whole_grad,) = gradients(expected, [whole])

    def call(rank):
        shard = ranks.chunks(logits, dim)[rank].detach().requires_grad_()
        of_shard = ranks.chunks(target, dim)[rank] if soft else target
        outputs = fusedloss.cross_entropy(shard, of_shard, process_group=ranks, num_classes=classes, **options)
        return outputs_of(outputs), gradients(outputs_of(outputs), [shard])[0]

    results = ranks.run(call)
    for outputs, _ in results:
        torch.testing.assert_close(outputs, expected, equal_nan=True)
        torch.testing.assert_close(outputs, results[0][0], equal_nan=True, rtol=0, atol=0)
    grad = torch.cat([grad for _, grad in results], dim)
    torch.testing.assert_close(grad, whole_grad, equal_nan=True)


@pytest.mark.parametrize("added", [{"grad_in_forward": True}, {"grad_scale": 0.5}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_a_gradient_in_forward(dtype, added, ranks, device):
    if dtype == torch.float16:
        added = {"grad_scale": 4.0, **added}
    logits, target = (3 * torch.randn(7, 37)).to(device, dtype), torch.randint(37, (7,), device=device)
    whole = logits.detach().requires_grad_()
    expected = fusedloss.cross_entropy(whole, target)
    expected.backward()

    def call(rank):
        shard = ranks.chunks(logits, 1)[rank].detach().requires_grad_()
        loss = fusedloss.cross_entropy(shard * 1, target, process_group=ranks, num_classes=37, **added)
        return loss.detach(), torch.autograd.grad(loss, shard)[0]

    results = ranks.run(call)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in results], 1), whole.grad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "weight": True},
        {"memory": 1, "label_smoothing": 0.1, "weight": True, "linear_bias": True},
        {"reduction": "none", "memory": 1, **ANSWERS},
        {"linear_bias": True, "sample_weight": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_linear_cross_entropy(dtype, options, ranks, device):
    """The gradient of the input is each rank's part of the sum."""
    input, weight = torch.randn(9, 5).to(device, dtype), torch.randn(150, 5).to(device, dtype)
    bias = torch.randn(150).to(device, dtype)
    target = torch.randint(150, (9,), device=device)
    target[2] = -100
    options = moved(given(options, 150, (9,), dtype), device)
    has_bias = options.pop("linear_bias", False)

    def leaves(*tensors):
        return [tensor.detach().requires_grad_() for tensor in tensors][: 2 + has_bias]

    def loss_of(input, weight, bias=None, **of_group):
        return outputs_of(
            fusedloss.linear_cross_entropy(input, weight, target, linear_bias=bias, **options, **of_group)
        )

    whole = leaves(input, weight, bias)
    expected = loss_of(*whole)
    whole_grads = gradients(expected, whole)

    def call(rank):
        shard = leaves(input, ranks.chunks(weight, 0)[rank], ranks.chunks(bias, 0)[rank])
        outputs = loss_of(*shard, process_group=ranks, num_classes=150, reduce_input_grad=False)
        return outputs, gradients(outputs, shard)

    results = ranks.run(call)
    for outputs, _ in results:
        torch.testing.assert_close(outputs, expected)
    grads = list(zip(*(grads for _, grads in results), strict=True))
    torch.testing.assert_close(sum(grads[0]), whole_grads[0])
    torch.testing.assert_close([torch.cat(of_shards) for of_shards in grads[1:]], list(whole_grads[1:]))


def test_small_probabilities_keep_their_digits(ranks, device):
    """The entries beside an unlikely target, in its own shard, are the differences of nothing."""
    logits = torch.tensor([[-30.0, -31.0, -29.0, 2.0, 3.0, 1.0]])
    target = torch.tensor([0], device=device)
    exact = logits.double().softmax(1)

    def call(rank):
        shard = ranks.chunks(logits.to(device), 1)[rank].detach().requires_grad_()
        loss = fusedloss.cross_entropy(shard, target, process_group=ranks, num_classes=6)
        return torch.autograd.grad(loss, shard)[0]

    grad = torch.cat(ranks.run(call), 1).double().cpu()
    torch.testing.assert_close(grad[:, 1:], exact[:, 1:], rtol=1e-5, atol=0)


def test_a_loss_of_nearly_nothing_keeps_its_digits(ranks, device):
    logits = torch.full((1, ranks.count), -20.0)
    logits[0, 1] = 3.0
    target = torch.tensor([1], device=device)
    exact = torch.nn.functional.cross_entropy(logits.double(), target.cpu())

    def call(rank):
        shard = ranks.chunks(logits.to(device), 1)[rank]
        return fusedloss.cross_entropy(shard, target, process_group=ranks, num_classes=ranks.count)

    for loss in ranks.run(call):
        torch.testing.assert_close(loss.double().cpu(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [0, 4])
def test_a_shard_of_infinities(target, smoothing, ranks, device):
    """All of its classes are impossible: a target there has an infinite loss, others have a finite one."""
    logits = torch.randn(1, 6)
    logits[:, : -(-6 // ranks.count)] = -torch.inf
    target = torch.tensor([target], device=device)
    options = {"label_smoothing": smoothing, "return_lse": True, "return_entropy": True}
    expected = fusedloss.cross_entropy(logits.to(device), target, **options)

    def call(rank):
        shard = ranks.chunks(logits.to(device), 1)[rank]
        return fusedloss.cross_entropy(shard, target, process_group=ranks, num_classes=6, **options)

    for outputs in ranks.run(call):
        torch.testing.assert_close(outputs, expected)


def test_the_largest_logit_of_all(ranks, device):
    """Of several the first, and NaN before all others."""
    logits = torch.zeros(4, 6)
    logits[1, 2] = logits[1, 5] = 1
    logits[2, 4] = torch.nan
    logits[3] = -torch.inf
    logits = logits.to(device)
    target = torch.zeros(4, dtype=torch.int64, device=device)

    def call(rank):
        shard = ranks.chunks(logits, 1)[rank]
        options = {"reduction": "none", "return_argmax": True}
        return fusedloss.cross_entropy(shard, target, process_group=ranks, num_classes=6, **options)[1]

    for argmax in ranks.run(call):
        assert torch.equal(argmax, logits.argmax(1))
