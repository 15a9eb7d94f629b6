"""Every option, dtype, shape and layout: values and gradients no further from the truth than native's."""

import itertools

import pytest
import torch
from support import (
    LOSSES,
    compare,
    differentiate,
    each,
    each_bce_loss,
    each_class_loss,
    each_dtype,
    each_index_loss,
    each_reduction,
    eighths,
    short,
)

CLASSES = {
    1: "nothing to choose: the loss is exactly 0",
    2: "the fewest that make a choice",
    3: "fewer than any vector holds",
    10: "digits: between AVX2's eight floats and AVX-512's sixteen",
    31: "one less than two AVX-512 vectors",
    33: "one more",
    63: "one less than four, the unrolled body's usual step",
    64: "exactly four: no tail",
    65: "a tail of one",
    1000: "ImageNet",
    1025: "one past a power of two",
    2049: "one past the next, with more than one block of a row",
    5000: "a small vocabulary",
}
ROWS = 17  # AVX-512's sixteen lanes and one row over, for kernels that work across rows

SHAPES = {
    "no batch": (5,),
    "batch": (7, 5),
    "sequence": (3, 5, 7),
    "image": (2, 5, 3, 7),
    "image wider than a vector": (2, 5, 3, 37),
    "volume": (2, 3, 2, 3, 5),
    "one by one image": (3, 5, 1, 1),
    "batch of one": (1, 5, 4),
}

IMAGE = (3, 5, 4, 6)  # four different sizes, none a power of two in the class dimension
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "classes outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "spatial dimensions swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "all dimensions reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "classes strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "columns strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "rows strided": lambda x: x.repeat_interleave(3, 0)[::3],
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "expanded over the classes": lambda x: x[:, :1].expand_as(x),
    "expanded over the image": lambda x: x[..., :1, :1].expand_as(x),
    "one element into its storage": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@each_dtype
@pytest.mark.parametrize("classes", CLASSES)
@each_class_loss
def test_number_of_classes(loss, classes, dtype, device):
    compare(loss, *loss.sample(ROWS, classes, dtype=dtype, device=device), reduction="none")


@each_dtype
@each("cross_entropy")
def test_every_ragged_end_of_a_row(loss, dtype, device):
    for classes in range(66, 80):
        input, target = loss.sample(ROWS, classes, dtype=dtype, device=device)
        target[::3] = -100
        compare(loss, input, target, reduction="mean")


@pytest.mark.parametrize("classes", CLASSES)
@each("cross_entropy", "cross_entropy_soft")
def test_number_of_classes_with_every_option_at_once(loss, classes, device):
    options = {"weight": torch.rand(classes, device=device), "label_smoothing": 0.1}
    compare(loss, *loss.sample(ROWS, classes, device=device), **options)


@each_reduction
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each()
def test_shape(loss, shape, reduction, device):
    compare(loss, *loss.sample(*shape, device=device), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each()
def test_layout_of_the_input(loss, layout, dtype, device):
    input, target = loss.sample(*IMAGE, dtype=dtype, device=device)
    compare(loss, layout(input), target, reduction="none")
    compare(loss, layout(input), target)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each()
def test_layout_of_the_target(loss, layout, device):
    input, target = loss.sample(*IMAGE, device=device)
    if loss.target == "index":  # has no class dimension: gets one for the layout, and loses it again
        target = layout(target.unsqueeze(1).expand(IMAGE).contiguous())[:, 0]
    else:
        target = layout(target)
    compare(loss, input, target)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each()
def test_layout_of_the_incoming_gradient(loss, layout, device):
    input, target = loss.sample(*IMAGE, device=device)
    grad_output = layout(eighths(IMAGE, device=device))
    grad_output = grad_output if loss.target == "element" else grad_output[:, 1]
    compare(loss, input, target, grad_output, reduction="none")


def table(**columns):
    """Every combination of the columns' values, as a list of keyword arguments."""
    rows = [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]
    return pytest.mark.parametrize("options", rows, ids=lambda row: " ".join(map(str, row.values())))


def with_weight(options, dtype, device):
    """The options, with True for a weight made into one of five classes."""
    weight = torch.rand(5, dtype=torch.float64).to(device, dtype) if options.get("weight") else None
    return options | {"weight": weight}


PAIRS = list(itertools.permutations([torch.float32, torch.float64, torch.bfloat16], 2))
each_dtype_pair = pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: " ".join(map(short, pair)))
each_shape = pytest.mark.parametrize("shape", [(7, 5), IMAGE], ids=["batch", "image"])
index_options = {"reduction": ["none", "mean", "sum"], "weight": [False, True], "ignore_index": [-100, 2]}


@each_dtype
@each_shape
@table(**index_options, label_smoothing=[0.0, 0.1, 1.0])
def test_cross_entropy_options(options, shape, dtype, device):
    loss = LOSSES["cross_entropy"]
    compare(loss, *loss.sample(*shape, dtype=dtype, device=device), **with_weight(options, dtype, device))


@each_dtype
@each_shape
@table(**index_options)
def test_nll_options(options, shape, dtype, device):
    loss = LOSSES["nll"]
    compare(loss, *loss.sample(*shape, dtype=dtype, device=device), **with_weight(options, dtype, device))


@each_dtype
@each_shape
@table(reduction=["none", "mean", "sum"], weight=[False, True], label_smoothing=[0.0, 0.1, 1.0])
def test_probability_target_options(options, shape, dtype, device):
    loss = LOSSES["cross_entropy_soft"]
    compare(loss, *loss.sample(*shape, dtype=dtype, device=device), **with_weight(options, dtype, device))


@each_shape
@each("cross_entropy", "cross_entropy_soft")
@table(
    reduction=["none", "mean", "sum"],
    weight=[False, True],
    label_smoothing=[0.0, 0.1],
    z_loss=[0.0, 1e-2],
    logit_softcap=[None, 2.0],  # of logits around 1: bends them visibly
    return_lse=[False, True],
)
def test_additions_to_cross_entropy(loss, options, shape, device):
    input, target = loss.sample(*shape, device=device)
    if loss.target == "index":
        options = options | {"ignore_index": 2}
    compare(loss, input, target, **with_weight(options, input.dtype, device))


@each_dtype
@each_shape
@each("cross_entropy", "cross_entropy_soft")
@table(
    reduction=["mean", "none"],
    weight=[False, True],
    logit_scale=[1.0, 0.7],
    logit_softcap=[None, 2.0],
    sample_weight=[False, True],
    denominator=[None, 11],
    return_entropy=[False, True],
)
def test_scale_weights_and_entropy_of_cross_entropy(loss, options, shape, dtype, device):
    if options["reduction"] == "none" and options["denominator"]:
        return  # refused: test_answers.py
    input, target = loss.sample(*shape, dtype=dtype, device=device)
    samples = torch.rand(shape[:1] + shape[2:], dtype=torch.float64).to(device, dtype)
    samples.view(-1)[::4] = 0
    options = options | {"sample_weight": samples if options["sample_weight"] else None, "return_argmax": True}
    if loss.target == "index":
        options = options | {"ignore_index": 2}
    compare(loss, input, target, **with_weight(options, dtype, device))


BROADCASTS = {  # shape of the weight: shape of the input
    "a number": ((), (7, 5)),
    "per class": ((5,), (7, 5)),
    "per row": ((7, 1), (7, 5)),
    "per class, with a batch dimension": ((1, 5), (7, 5)),
    "per element": ((7, 5), (7, 5)),
    "per class of an image": ((5, 1, 1), IMAGE),
    "per pixel": ((4, 6), IMAGE),
    "per image and line": ((3, 1, 4, 1), IMAGE),
}
WEIGHTS = {"bce_with_logits": ["weight", "pos_weight", "weight pos_weight"], "bce": ["weight"]}
each_weighting = pytest.mark.parametrize(
    ("loss", "names"),
    [pytest.param(LOSSES[name], names, id=f"{name} {names}") for name in WEIGHTS for names in WEIGHTS[name]],
)


@each_dtype
@each_reduction
@pytest.mark.parametrize(("weight", "shape"), BROADCASTS.values(), ids=BROADCASTS)
@each_weighting
def test_bce_weights_broadcast(loss, names, weight, shape, reduction, dtype, device):
    weights = {name: torch.rand(weight, dtype=torch.float64).to(device, dtype) for name in names.split()}
    compare(loss, *loss.sample(*shape, dtype=dtype, device=device), reduction=reduction, **weights)


@each_reduction
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("ignore_index", [None, 0, 1])
@each_bce_loss
def test_bce_integer_targets(loss, kind, ignore_index, reduction, device):
    input, target = loss.sample(*IMAGE, device=device)
    options = {} if ignore_index is None else {"ignore_index": ignore_index}
    compare(loss, input, target.round().to(kind), reduction=reduction, **options)


@each_dtype
@each_reduction
@pytest.mark.parametrize("marker", [255, -1], ids=["segmentation's 255", "-1"])
@each("bce_with_logits")
def test_bce_ignores_marked_elements(loss, marker, reduction, dtype, device):
    input, target = loss.sample(7, 5, dtype=dtype, device=device)
    target[::2, 1:3] = marker
    weight = torch.full((5,), 3.0, dtype=dtype, device=device)
    _, grad, _ = compare(loss, input, target, reduction=reduction, ignore_index=marker, pos_weight=weight)
    assert grad[::2, 1:3].eq(0).all()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("shape", [(5,), (7, 5), IMAGE], ids=["no batch", "batch", "image"])
@each_index_loss
def test_class_targets_of_every_integer_dtype(loss, shape, kind, device):
    input, target = loss.sample(*shape, device=device)
    compare(loss, input, target.to(kind), ignore_index=2)


@each_dtype_pair
@each_reduction
@each("cross_entropy_soft", "bce_with_logits")
def test_input_and_target_of_different_dtypes(loss, dtypes, reduction, device):
    input, target = loss.sample(7, 5, dtype=dtypes[0], device=device)
    compare(loss, input, target.to(dtypes[1]), reduction=reduction)


@each_dtype_pair
@each_reduction
@each("cross_entropy_soft", "bce_with_logits", "bce")
def test_weight_of_a_different_dtype(loss, dtypes, reduction, device):
    weight = torch.rand(5, dtype=torch.float64).to(device, dtypes[1])
    compare(loss, *loss.sample(7, 5, dtype=dtypes[0], device=device), reduction=reduction, weight=weight)


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int64], ids=short)
@each("cross_entropy_soft", "bce_with_logits", "bce")
def test_weight_of_an_integer_dtype(loss, kind, device):
    compare(loss, *loss.sample(7, 5, device=device), weight=torch.arange(5).to(device, kind))


WIDE, NARROW = torch.float64, [torch.float32, torch.bfloat16, torch.float16]
MIXED = {  # one operand of float64 makes the loss float64, and so exact
    "cross_entropy_soft": ["target", "weight"],
    "bce_with_logits": ["target", "target weight", "target pos_weight", "target weight pos_weight"],
}


@pytest.mark.parametrize("dtype", NARROW, ids=short)
@each_reduction
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(
    ("loss", "wide"),
    [pytest.param(LOSSES[name], wide.split(), id=f"{name} {wide}") for name, rows in MIXED.items() for wide in rows],
)
def test_a_float64_loss_of_narrower_logits_is_exact(loss, wide, autocast, reduction, dtype, device):
    """Computed in float64: the values to float64's last places, the gradients to the last of their own dtypes."""
    input, target = loss.sample(7, 5, dtype=dtype, device=device)
    target = target.to(WIDE) if "target" in wide else target
    names = {"cross_entropy_soft": ["weight"], "bce_with_logits": ["weight", "pos_weight"]}
    names = names["cross_entropy_soft" if loss.target == "soft" else "bce_with_logits"]
    weights = {name: torch.rand(5, dtype=WIDE).to(device, WIDE if name in wide else dtype) for name in names}
    truth = differentiate(
        loss.reference,
        input.double(),
        target.double(),
        reduction=reduction,
        **{k: w.double() for k, w in weights.items()},
    )
    roads = [{"grad_in_forward": False}] if reduction == "none" else [{"grad_in_forward": False}, {}]
    for options in roads:
        leaf = input.detach().requires_grad_()
        leaf_target = target.detach().requires_grad_(options != {})
        with torch.autocast(torch.device(device).type, enabled=autocast):
            value = loss.ours(leaf, leaf_target, reduction=reduction, **weights, **options)
        assert value.dtype == WIDE
        torch.testing.assert_close(value, truth[0], rtol=1e-14, atol=1e-15)
        value.backward(eighths(value.shape, WIDE, device))
        for ours, true in zip((leaf, leaf_target), truth[1:], strict=True):
            if ours.requires_grad:
                eps = torch.finfo(ours.dtype).eps
                torch.testing.assert_close(ours.grad.double(), true, rtol=max(eps, 1e-13), atol=max(eps * 1e-3, 1e-15))


def test_lse_beside_float64_probabilities(device):
    """Its dtype is decided by the logits alone."""
    input, target = LOSSES["cross_entropy_soft"].sample(7, 5, device=device)
    compare(LOSSES["cross_entropy_soft"], input, target.double(), reduction="none", return_lse=True)


def strides(tensor):
    """Of the dimensions where they mean something."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def as_meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [IMAGE, (1, 5, 4, 6), (3, 1, 4, 6), (3, 5, 1, 1), (3, 5, 0, 6)], ids=str)
@each()
def test_unreduced_loss_has_the_strides_of_natives(loss, shape, layout, device):
    """On meta tensors too: compiled programs rely on them."""
    input, target = loss.sample(*shape, device=device)
    input = layout(input)
    for target_layout in LAYOUTS.values():
        laid = target if loss.target == "index" else target_layout(target)
        expected = strides(loss.native(input, laid, reduction="none"))
        assert strides(loss.ours(input, laid, reduction="none")) == expected
        if input.numel() > 0:  # where there are no elements, native's strides differ on meta tensors, too
            assert strides(loss.ours(as_meta(input), as_meta(laid), reduction="none")) == expected


def test_loss_of_many_dimensions_has_the_strides_of_natives(device):
    input, target = LOSSES["bce_with_logits"].sample(2, 3, 1, 2, 3, 2, 2, 3, 2, 2, device=device)
    reverse = tuple(range(input.dim()))[::-1]
    target = target.permute(reverse).contiguous().permute(reverse)
    ours, native = (
        f(input, target, reduction="none") for f in (LOSSES["bce_with_logits"].ours, LOSSES["bce_with_logits"].native)
    )
    torch.testing.assert_close(ours, native, check_stride=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_a_number_on_the_cpu_weighs_tensors_elsewhere(name, reduction, device):
    """As natively, for the loss of logits. Meta tensors are elsewhere on every machine."""
    loss = LOSSES["bce_with_logits"]
    for number in (torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64), torch.tensor(3)):
        compare(loss, *loss.sample(7, 5, device=device), reduction=reduction, **{name: number})
        input, target = (tensor.to("meta").requires_grad_() for tensor in loss.sample(7, 5))
        value = loss.ours(input, target, reduction=reduction, **{name: number})
        value.backward(torch.ones_like(value))
        assert (value.device.type, input.grad.shape, target.grad.shape) == ("meta", (7, 5), (7, 5))


@each()
def test_a_number_on_the_cpu_is_no_weight_elsewhere(loss):
    """Native's loss of probabilities refuses it, and class weights have a dimension."""
    input, target = (tensor.to("meta") for tensor in loss.sample(7, 1))
    if loss.function != "binary_cross_entropy_with_logits":
        for call in (loss.native, loss.ours):
            with pytest.raises((RuntimeError, AssertionError)):
                call(input, target, weight=torch.tensor(3.0))


@each()
def test_sum_passes_an_expanded_gradient(loss, device):
    input, target = loss.sample(7, 5, device=device)
    expanded = torch.ones((), device=device).expand(loss.native(input, target, reduction="none").shape)
    compare(loss, input, target, expanded, reduction="none")


@each_index_loss
def test_class_weight_may_have_two_dimensions_for_an_image(loss, device):
    compare(loss, *loss.sample(*IMAGE, device=device), weight=torch.rand(1, 5, device=device))


@each_index_loss
def test_target_of_one_element_without_a_batch(loss, device):
    input, target = loss.sample(5, device=device)
    # Native has a value for this target, on the CPU, but fails in backward: there, it gets the scalar.
    expected = loss.native(input.cpu(), target.cpu().view(1))
    torch.testing.assert_close(loss.ours(input, target.view(1)), expected.to(device))
    torch.testing.assert_close(
        differentiate(loss.ours, input, target.view(1)), differentiate(loss.native, input, target)
    )


@each_bce_loss
def test_zero_dimensions(loss, device):
    compare(loss, *loss.sample(device=device))


@each_index_loss
def test_strided_class_weight(loss, device):
    weight = torch.rand(10, device=device)[::2]
    compare(loss, *loss.sample(7, 5, device=device), weight=weight)


@each_reduction
@each()
def test_more_dimensions_than_a_kernel_walks(loss, reduction, device):
    """Ten, reversed, so that none of them merge with those of a contiguous target."""
    input, target = loss.sample(2, 3, 1, 2, 3, 2, 2, 3, 2, 2, device=device)
    reverse = tuple(range(input.dim()))[::-1]
    input = input.permute(reverse).contiguous().permute(reverse)
    options = {"weight": torch.rand(3, 1, 2, device=device)} if loss.target == "element" else {}
    ours = compare(loss, input, target, reduction=reduction, **options)
    assert ours[1].shape == input.shape
