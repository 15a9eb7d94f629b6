"""What cross entropy tells beside its loss, in the same read of the logits, and what it weighs and divides by."""

import copy
import math

import numpy as np
import pytest
import torch
from support import DTYPES, LOSSES, differentiate, each, each_dtype, moved, short

import fusedloss
from fusedloss import reference

ANSWERS = {"return_lse": True, "return_entropy": True, "return_argmax": True}
LAYOUTS = ["rows", "columns", "image"]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def laid_out(rows, layout):
    """Rows of logits (N, C) with their neighbours in memory elsewhere, and in an image their positions too."""
    if layout == "columns":
        return rows.t().contiguous().t()
    if layout == "image":
        return rows.t().contiguous()[None]  # (1, C, N)
    return rows


def positions_of(values, layout):
    return values[None] if layout == "image" else values


def entropies_and_gradients(rows):
    """In numpy's widest type: float64 leaves few digits of a small entropy, or of the gradient of even rows."""
    x = rows.double().numpy().astype(np.longdouble)
    gap = x.max(1, keepdims=True) - x
    e = np.exp(-gap)
    mean_gap = (e * gap).sum(1, keepdims=True) / e.sum(1, keepdims=True)
    entropy, gradient = np.log(e.sum(1)) + mean_gap[:, 0], e / e.sum(1, keepdims=True) * (gap - mean_gap)
    return [torch.from_numpy(value.astype(np.float64)) for value in (entropy, gradient)]


def peaked(classes, entropy, dtype):
    """Logits of one row with about this entropy: the first of them stands out from others that differ."""
    others = torch.linspace(0, 1, classes - 1, dtype=torch.float64)
    low, high = 0.0, 60.0
    for _ in range(60):
        peak = (low + high) / 2
        row = torch.cat([torch.tensor([peak], dtype=torch.float64), others])
        low, high = (peak, high) if reference.entropy(row) > entropy else (low, peak)
    return row.roll(classes // 3).to(dtype)


# --- Entropy -----------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("classes", [2, 3, 10, 64, 100, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
def test_an_entropy_has_its_digits_however_peaked_the_row(classes, dtype, layout, device):
    wanted = [share * math.log(classes) for share in (0.5, 0.1, 0.01)] + [1e-3, 1e-4, 1e-5, 1e-6]
    rows = torch.stack([*(peaked(classes, entropy, dtype) for entropy in wanted), torch.zeros(classes, dtype=dtype)])
    target = torch.zeros(len(rows), dtype=torch.int64)
    truth, expected = entropies_and_gradients(rows)
    assert truth[-2] < 2e-6
    # The difference of lse and the mean logit would have no correct digit there.
    differences = rows.logsumexp(1) - (rows.softmax(1) * rows).sum(1)
    assert dtype == torch.float64 or (differences[-2] / truth[-2] - 1).abs() > 0.01
    logits = laid_out(rows, layout).to(device).requires_grad_()
    _, entropy = fusedloss.cross_entropy(logits, positions_of(target, layout).to(device), return_entropy=True)
    assert entropy.dtype == dtype
    eps = torch.finfo(dtype).eps
    # A float64 sum near 1 has nothing wider to be added in.
    atol = (4 + classes / 10) * eps if dtype == torch.float64 else 0
    torch.testing.assert_close(entropy.cpu().double().view(-1), truth, rtol=64 * eps, atol=atol)

    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    gradient = (gradient[0].t() if layout == "image" else gradient).cpu().double()
    allowed = 128 * eps * expected.abs().amax(1, keepdim=True) + 16 * eps * rows.double().softmax(1)
    assert bool(((gradient - expected).abs() <= allowed).all())


@each_dtype
@each_layout
def test_masked_classes_have_no_part_in_an_entropy(dtype, layout, device):
    rows = torch.randn(6, 70, dtype=torch.float64).to(dtype)
    rows[0, 3:] = rows[1, 5:] = rows[2, ::2] = rows[3, :69] = -torch.inf  # the last of them has one class left
    rows[4] = -torch.inf
    logits = laid_out(rows, layout).to(device).requires_grad_()
    target = torch.tensor([-100, 1, 3, 69, -100, 5])
    _, lse, entropy = fusedloss.cross_entropy(
        logits, positions_of(target, layout).to(device), return_lse=True, return_entropy=True
    )
    keep = [0, 1, 2, 3, 5]
    wide = rows.double().requires_grad_()
    truth = reference.entropy(wide)
    entropy, lse = entropy.view(-1), lse.view(-1)
    torch.testing.assert_close(entropy.cpu().double()[keep], truth[keep], rtol=1e-6, atol=1e-7)
    assert entropy[3] == 0
    assert entropy[4].isnan()  # as native's softmax of such a row is
    assert lse[4] == -torch.inf
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    (gradient,) = torch.autograd.grad((entropy * weights.to(entropy))[keep].sum(), logits)
    (expected,) = torch.autograd.grad((truth * weights)[keep].sum(), wide)
    gradient = gradient[0].t() if layout == "image" else gradient
    grain = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.cpu().double()[keep], expected[keep], rtol=4 * grain, atol=max(grain, 1e-7) / 8)


@each("cross_entropy", "cross_entropy_soft")
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7, "logit_softcap": 2.0, "label_smoothing": 0.1}], ids=str)
def test_derivatives_of_what_is_returned(loss, options, device):
    input, target = loss.sample(4, 5, dtype=torch.float64, device=device)
    samples = torch.tensor([1.0, 0.0, 2.0, 0.5], device=device)
    count = torch.tensor(3, device=device)
    target = target.detach().requires_grad_(target.is_floating_point())

    def function(input, target):
        loss_, lse, entropy = loss.ours(
            input,
            target,
            sample_weight=samples,
            denominator=count,
            return_lse=True,
            return_entropy=True,
            z_loss=0.1,
            **options,
        )
        return loss_.square() + (lse * entropy.exp()).sum()

    arguments = (input.requires_grad_(), target)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_an_entropy_alone_gives_a_gradient(device):
    input = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.full((5,), -100, device=device)
    loss, entropy = fusedloss.cross_entropy(input, target, reduction="sum", return_entropy=True)
    assert loss == 0
    (gradient,) = torch.autograd.grad(entropy.sum(), input)
    (expected,) = torch.autograd.grad(reference.entropy(input).sum(), input)
    torch.testing.assert_close(gradient, expected)


def test_nothing_has_no_entropy(device):
    none = torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    _, lse, entropy, argmax = fusedloss.cross_entropy(*none, reduction="sum", **ANSWERS)
    assert lse.shape == entropy.shape == argmax.shape == (0,)
    target = torch.full((3,), -100, device=device)
    _, entropy = fusedloss.cross_entropy(torch.zeros(3, 0, device=device), target, reduction="sum", return_entropy=True)
    assert torch.equal(entropy.cpu(), torch.zeros(3))
    with pytest.raises(IndexError, match=r"return_argmax needs classes, got input of shape \[3, 0\]"):
        fusedloss.cross_entropy(torch.zeros(3, 0, device=device), target, return_argmax=True)


# --- Predictions -------------------------------------------------------------------------------------------------


def with_ties(classes):
    """Rows of small integers: of each number there are several."""
    rows = torch.randint(-3, 4, (12, classes)).double()
    rows[1, classes // 2] = rows[2, -1] = torch.nan
    rows[3, [0, -1]] = rows[4, 1::2] = torch.inf
    rows[5] = -torch.inf
    rows[6, 1:] = -torch.inf
    rows[7, 0], rows[7, classes // 3] = torch.inf, torch.nan
    rows[8, classes // 2 :] = torch.nan
    rows[9] = 0.0
    rows[9, ::2] = -0.0
    return rows


@each_dtype
@each_layout
@pytest.mark.parametrize("classes", [5, 100, 1500, 5000])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 1e-3, "logit_softcap": 0.5}], ids=str)
def test_argmax_is_that_of_torch(options, classes, layout, dtype, device):
    rows = with_ties(classes).to(dtype)
    target = torch.tensor([-100, 1] * 6)
    logits, places = laid_out(rows, layout).to(device), positions_of(target, layout).to(device)
    expected = positions_of(rows.argmax(1), layout)
    for reduction in ("mean", "none"):
        _, argmax = fusedloss.cross_entropy(logits, places, reduction=reduction, return_argmax=True, **options)
        assert argmax.dtype == torch.int64
        assert torch.equal(argmax.cpu(), expected)
        assert not argmax.requires_grad


@each_dtype
@each("cross_entropy", "cross_entropy_soft")
@pytest.mark.parametrize("shape", [(9, 5), (3, 1500), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_predictions_come_with_a_gradient_in_forward(loss, shape, inplace, dtype, device):
    input, target = loss.sample(*shape, dtype=dtype, device=device)
    options = {"grad_in_forward": True, "grad_scale": 1.0, "inplace": inplace}
    given = (input * 1).requires_grad_()
    value, argmax = loss.ours(given * 1, target, return_argmax=True, **options)
    assert torch.equal(argmax, input.argmax(1))
    assert not argmax.requires_grad
    (gradient,) = torch.autograd.grad(value, given)
    alone = (input * 1).requires_grad_()
    (expected,) = torch.autograd.grad(loss.ours(alone * 1, target, **options), alone)
    torch.testing.assert_close(gradient, expected)


@each_layout
@pytest.mark.parametrize("classes", [64, 2064])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"logit_softcap": 1.0}], ids=str)
def test_argmax_is_of_the_logits_whose_place_the_gradient_takes(options, classes, layout, device):
    rows = torch.zeros(3, classes)
    rows[:, 3], rows[:, 40] = torch.tensor(1.75).nextafter(torch.tensor(0.0)), 1.75  # the same once scaled
    rows[1] *= 100  # or capped
    leaf = laid_out(rows, layout).to(device).requires_grad_()
    target = positions_of(torch.tensor([0, 1, 2]), layout).to(device)
    _, argmax = fusedloss.cross_entropy(
        leaf * 1, target, inplace=True, return_argmax=True, grad_in_forward=True, **options
    )
    assert (argmax == 40).all()


def test_a_prediction_brings_nothing_of_an_ignored_row_into_the_gradient(device):
    input = torch.randn(4, 6, device=device)
    input[1] = torch.nan
    target = torch.tensor([0, -100, 2, 3], device=device)
    for in_forward in (True, False):
        leaf = input.clone().requires_grad_()
        loss, argmax = fusedloss.cross_entropy(leaf, target, return_argmax=True, grad_in_forward=in_forward)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(argmax, input.argmax(1))
        assert torch.equal(gradient[1], torch.zeros(6, device=device))
        assert gradient.isfinite().all()


# --- Log-probabilities -------------------------------------------------------------------------------------------


@each_dtype
@each_layout
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}, {"logit_scale": 2.0, "logit_softcap": 3.0}], ids=str)
def test_log_probabilities_of_targets(options, layout, dtype, device):
    rows, target = torch.randn(9, 300, dtype=torch.float64).mul(3).to(dtype), torch.randint(300, (9,))
    target[::4] = -100
    logits, places = laid_out(rows, layout).to(device), positions_of(target, layout).to(device)
    ours = differentiate(fusedloss.token_log_probs, logits, places, return_entropy=True, **options)
    wide = laid_out(rows, layout).double(), positions_of(target, layout)
    truth = differentiate(reference.token_log_probs, *wide, return_entropy=True, **options)
    native = differentiate(reference.token_log_probs, wide[0].to(dtype), wide[1], return_entropy=True, **options)
    for our, theirs, true in zip(ours, native, truth, strict=True):
        assert (our.dtype, our.shape) == (theirs.dtype, theirs.shape)
        unit = 8 * torch.finfo(our.dtype).eps * true.abs().max()
        assert float((our.cpu() - true).abs().max()) <= float(max((theirs - true).abs().max(), unit))
    log_probs = fusedloss.token_log_probs(logits, places, **options)
    torch.testing.assert_close(log_probs, ours[0])
    ignored = log_probs.view(-1)[::4]
    assert ignored.eq(0).all()
    assert not ignored.signbit().any()


def test_what_token_log_probs_refuses(device):
    logits, target = torch.randn(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    with pytest.raises(RuntimeError, match=r"token_log_probs: target must hold class indices, got torch.float32 of"):
        fusedloss.token_log_probs(logits, logits.softmax(1))
    for name in ("logit_scale", "logit_softcap"):
        for value in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"token_log_probs: {name} must be positive, got {value}"):
                fusedloss.token_log_probs(logits, target, **{name: value})
    with pytest.raises(TypeError, match="token_log_probs: return_entropy must be a bool, got int: 1"):
        fusedloss.token_log_probs(logits, target, return_entropy=1)


@pytest.mark.parametrize("classes", [2, 7, 63, 64, 65, 130, 1000, 1025, 3001, 9000])
@each_dtype
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}, {"logit_softcap": 5.0}], ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_a_row_does_not_depend_on_its_batch(columns, options, classes, dtype, device):
    """To the last bit: whoever samples with one batch and trains with another compares log-probabilities."""
    batch = torch.randn(300 if classes < 1000 else 19, classes, dtype=torch.float64).mul(4).to(dtype)
    target = torch.randint(classes, (len(batch),))
    target[3] = -100

    def results(rows, target):
        rows = rows.t().contiguous().t() if columns else rows.contiguous()
        arguments = moved((rows, target), device)
        return torch.stack(fusedloss.token_log_probs(*arguments, return_entropy=True, **options)).cpu()

    whole = results(batch, target)
    alone = [slice(0, 1), slice(1, 2), slice(18, 19)]  # whose neighbours in memory are always their classes
    for some in (*([] if columns else alone), slice(2, 5), slice(3, 19), slice(0, 2), slice(7, 17, 3)):
        assert torch.equal(results(batch[some], target[some]), whole[:, some]), some
    order = torch.randperm(len(batch))
    assert torch.equal(results(batch[order], target[order]), whole[:, order])
    within = moved((batch[1:18], target[1:18]), device)  # where rows begin elsewhere in memory
    if not columns:
        views = torch.stack(fusedloss.token_log_probs(*within, return_entropy=True, **options)).cpu()
        assert torch.equal(views, whole[:, 1:18])


@pytest.mark.parametrize("classes", [3, 50, 100, 700])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=short)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 0.1}, {"sample_weight": True}], ids=str)
def test_an_unreduced_loss_does_not_depend_on_its_batch(options, classes, dtype, device):
    batch = torch.randn(61, classes, dtype=torch.float64).mul(4).to(dtype)
    target, samples = torch.randint(classes, (61,)), torch.rand(61)

    def losses(some):
        given = options | {"sample_weight": samples[some]} if "sample_weight" in options else options
        arguments, given = moved(((batch[some].clone(), target[some]), given), device)
        return fusedloss.cross_entropy(*arguments, reduction="none", **given).cpu()

    whole = losses(slice(None))
    for some in (slice(0, 1), slice(1, 2), slice(2, 9), slice(3, 21), slice(60, 61)):
        assert torch.equal(losses(some), whole[some]), some


# --- Denominator -------------------------------------------------------------------------------------------------


@each("cross_entropy", "cross_entropy_soft")
@each_dtype
@pytest.mark.parametrize("in_forward", [True, False])
def test_accumulated_gradients_are_those_of_the_whole_batch(loss, in_forward, dtype, device):
    input, target = loss.sample(12, 9, dtype=dtype, device=device)
    if loss.target == "index":
        target[[1, 2, 3, 8]] = -100
    count = int((target != -100).sum()) if loss.target == "index" else 12
    options = {"grad_in_forward": in_forward, "grad_scale": 1.0}
    whole = input.clone().requires_grad_()
    expected = loss.ours(whole, target, **options)
    expected.backward()
    for denominator in (count, float(count), torch.tensor(count), torch.tensor([count], dtype=torch.float32)):
        parts, total = input.clone().requires_grad_(), 0
        for rows in (slice(0, 4), slice(4, 7), slice(7, 12)):
            value = loss.ours(parts[rows], target[rows], denominator=moved(denominator, device), **options)
            value.backward()
            total += value.detach().double()
        grain = torch.finfo(dtype).eps
        torch.testing.assert_close(total, expected.detach().double(), rtol=4 * grain, atol=4 * grain)
        torch.testing.assert_close(parts.grad, whole.grad)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}, {"z_loss": 0.1, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("denominator", [8, torch.tensor(8), torch.tensor(0)], ids=str)
def test_all_ignored_is_a_zero_in_the_graph(denominator, options, dtype, device):
    input = torch.randn(4, 6, device=device).to(dtype)
    input[2] = torch.nan
    leaf = input.requires_grad_()
    target = torch.full((4,), -100, device=device)
    loss = fusedloss.cross_entropy(leaf, target, denominator=moved(denominator, device), **options)
    assert loss.requires_grad
    assert loss == 0
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_denominator_is_in_the_gradient_that_forward_writes(device):
    input, target = LOSSES["cross_entropy"].sample(8, 9, device=device)
    leaf = input.requires_grad_()
    over = leaf * 1  # forward overwrites it with the gradient, which backward for a grad_output of 1 leaves as it is
    loss = fusedloss.cross_entropy(over, target, denominator=torch.tensor(3.0, device=device), inplace=True)
    assert "WithGrad" in loss.grad_fn.name()
    written = over.detach().clone()
    loss.backward()
    assert torch.equal(leaf.grad, written)
    wide = input.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(wide, target, reduction="sum") / 3).backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("denominator", "error", "message"),
    [
        (0, ValueError, "denominator must be positive, got 0"),
        (-2.0, ValueError, "denominator must be positive, got -2.0"),
        (math.inf, ValueError, "denominator must be finite, got float: inf"),
        (math.nan, ValueError, "denominator must be finite, got float: nan"),
        (True, TypeError, "denominator must be a number or a tensor of one element, got True"),
        ("8", TypeError, "denominator must be a float, got str: '8'"),
        (torch.ones(2), RuntimeError, r"denominator must be one real number, got torch.float32 of shape \[2\]"),
        (torch.tensor(1j), RuntimeError, "denominator must be one real number, got torch.complex64"),
        (torch.ones((), requires_grad=True), RuntimeError, "denominator is not differentiable, but requires grad"),
        (torch.ones((), device="meta"), RuntimeError, "denominator is on meta, but input is on"),
    ],
    ids=str,
)
def test_what_is_no_denominator(denominator, error, message, device):
    input, target = LOSSES["cross_entropy"].sample(3, 5, device=device)
    with pytest.raises(error, match=f"cross_entropy: {message}"):
        fusedloss.cross_entropy(input.requires_grad_(), target, denominator=moved(denominator, device))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_a_mean_has_a_denominator(reduction, device):
    input, target = LOSSES["cross_entropy"].sample(3, 5, device=device)
    message = f"cross_entropy: denominator needs reduction='mean', got reduction='{reduction}'"
    for denominator in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match=message):
            fusedloss.cross_entropy(input, target, reduction=reduction, denominator=moved(denominator, device))


# --- Weights of samples ------------------------------------------------------------------------------------------


@each("cross_entropy", "cross_entropy_soft")
@pytest.mark.parametrize("kind", DTYPES, ids=short)
def test_the_mean_is_over_the_weights_that_count(loss, kind, device):
    input, target = loss.sample(6, 5, device=device)
    samples = torch.tensor([1.0, 0.5, 0.0, 2.0, torch.nan, 4.0], device=device, dtype=kind)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], device=device)
    if loss.target == "index":
        target = torch.tensor([0, 1, 2, 3, -100, 4], device=device)  # what weighs an ignored position is not looked at
    else:
        samples[4] = 3.0
    each_loss = loss.native(input, target, weight, reduction="none", label_smoothing=0.1)
    counts = samples.isfinite() & (target != -100 if loss.target == "index" else True)
    counting = torch.where(counts, samples.float(), 0.0)
    weights = weight[target.clamp(min=0)] * counting if loss.target == "index" else counting
    options = {"sample_weight": samples, "label_smoothing": 0.1}
    unreduced = loss.ours(input, target, weight, reduction="none", **options)
    torch.testing.assert_close(unreduced, each_loss * counting)
    torch.testing.assert_close(loss.ours(input, target, weight, reduction="sum", **options), unreduced.sum())
    torch.testing.assert_close(loss.ours(input, target, weight, **options), unreduced.sum() / weights.sum())


def test_a_weight_multiplies_the_z_loss_too(device):
    input, target = LOSSES["cross_entropy"].sample(6, 5, device=device)
    samples = torch.rand(6, device=device)
    weighted = fusedloss.cross_entropy(input, target, reduction="none", z_loss=0.5, sample_weight=samples)
    plain = fusedloss.cross_entropy(input, target, reduction="none", z_loss=0.5)
    torch.testing.assert_close(weighted, plain * samples)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (torch.ones(4), ValueError, r"sample_weight must have the shape \[3\].*, got \[4\]"),
        (torch.ones(3, 1), ValueError, r"sample_weight must have the shape \[3\].*, got \[3, 1\]"),
        (torch.ones(()), ValueError, r"sample_weight must have the shape \[3\].*, got \[\]"),
        (torch.ones(3, dtype=torch.int64), NotImplementedError, "sample_weight must be float32, .* got Long of shape"),
        (torch.ones(3, requires_grad=True), RuntimeError, "sample_weight is not differentiable, but requires grad"),
        (torch.ones(3, device="meta"), RuntimeError, "sample_weight is on meta, but input is on"),
        ([1.0, 1.0, 1.0], TypeError, "sample_weight must be a Tensor, got list"),
    ],
    ids=str,
)
def test_what_is_no_weight_of_samples(samples, error, message, device):
    input, target = LOSSES["cross_entropy"].sample(3, 5, device=device)
    with pytest.raises(error, match=f"cross_entropy: {message}"):
        fusedloss.cross_entropy(input.requires_grad_(), target, sample_weight=moved(samples, device))


# --- As options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["return_lse", "return_entropy", "return_argmax"])
def test_answers_come_in_order(name, device):
    input, target = LOSSES["cross_entropy"].sample(3, 5, device=device)
    every = dict(zip(("loss", *ANSWERS), fusedloss.cross_entropy(input, target, **ANSWERS), strict=True))
    _, answer = fusedloss.cross_entropy(input, target, **{name: True})
    torch.testing.assert_close(answer, every[name])
    others = {other: True for other in ANSWERS if other != name}
    for actual, other in zip(fusedloss.cross_entropy(input, target, **others), ("loss", *others), strict=True):
        torch.testing.assert_close(actual, every[other])
    with pytest.raises(TypeError, match=f"cross_entropy: {name} must be a bool, got int: 1"):
        fusedloss.cross_entropy(input, target, **{name: 1})


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_positive(value, device):
    input, target = LOSSES["cross_entropy"].sample(3, 5, device=device)
    with pytest.raises(ValueError, match=r"cross_entropy: logit_scale must be (positive|finite), got"):
        fusedloss.cross_entropy(input, target, logit_scale=value)


def test_a_module_takes_what_changes_with_each_call(device):
    input, target = LOSSES["cross_entropy"].sample(4, 5, device=device)
    samples = torch.rand(4, device=device)
    criterion = fusedloss.CrossEntropyLoss(logit_scale=0.5, return_entropy=True, return_argmax=True)
    for copied in (criterion, copy.deepcopy(criterion)):
        actual = copied(input, target, denominator=3, sample_weight=samples)
        options = {"logit_scale": 0.5, "return_entropy": True, "return_argmax": True}
        expected = fusedloss.cross_entropy(input, target, denominator=3, sample_weight=samples, **options)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    for name in ("denominator", "sample_weight"):
        with pytest.raises(TypeError, match=name):
            fusedloss.CrossEntropyLoss(**{name: samples})
