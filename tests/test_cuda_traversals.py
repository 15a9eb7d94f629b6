"""Each way of the CUDA kernels through memory: images by line and vector, ignored rows, elements with heads and tails.

Values and gradients are judged as on the CPU. The rows of test_cuda are not repeated here.
"""

import pytest
import torch
from conftest import missing_cuda
from support import compare, each, each_bce_loss, each_class_loss, each_index_loss, short

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing_cuda() is not None, reason=f"{missing_cuda()}")]

DEVICE = "cuda"
each_width = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=short)
each_narrow_width = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)


def one_element_on(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def strided(x):
    """A gap behind each line, so that no two of them lie alike to a vector."""
    return torch.nn.functional.pad(x, (0, 1))[..., :-1]


IMAGES = {
    "lines shorter than a vector": (3, 5, 1, 5),
    "no batch to speak of": (1, 19, 7, 9),
    "divisible by eight": (2, 19, 8, 24),
    "not divisible by eight": (2, 19, 7, 9),
    "large, divisible": (2, 21, 64, 72),
    "large, not divisible": (2, 21, 63, 65),
    "large, divisible by four": (2, 21, 63, 68),
    "two classes": (1, 2, 256, 264),
    "one class": (2, 1, 63, 65),
    "150 classes": (2, 150, 64, 72),
    "classes that shared memory does not keep": (1, 512, 64, 64),
    "1000 classes": (1, 1000, 17, 19),
    "a volume": (2, 19, 5, 6, 8),
}
IMAGE_LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "one element into its storage": one_element_on,
    "gaps behind the lines": strided,
    "gaps behind the images": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
}


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS.values(), ids=IMAGE_LAYOUTS)
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@each_narrow_width
@each_class_loss
def test_images(loss, dtype, shape, layout):
    input, target = loss.sample(*shape, dtype=dtype, device=DEVICE)
    compare(loss, layout(input), target)
    compare(loss, layout(input), target, reduction="none")


@pytest.mark.parametrize("shape", [shape for shape in IMAGES.values() if shape[1] > 1], ids=str)
@each("cross_entropy", "cross_entropy_soft")
def test_images_with_every_option_at_once(loss, shape):
    input, target = loss.sample(*shape, device=DEVICE)
    weight = torch.rand(shape[1]).to(DEVICE)
    options = {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 2.0}
    for layout in (input, IMAGE_LAYOUTS["channels last"](input)):
        compare(loss, layout, target, **options)
        compare(loss, layout, target, **options, return_lse=True)


@pytest.mark.parametrize("classes", [1, 2, 10, 33, 1000, 1025, 4097, 50_257, 128_256])
@each_index_loss
def test_ignored_rows(loss, classes):
    """One in three, and whole blocks of them; the mean's divisor is counted before the gradient is written."""
    for rows in (7, max(33, 2**16 // classes)):
        input, target = loss.sample(rows, classes, device=DEVICE)
        target[::3] = 255 + classes
        target[rows // 2 :] = 255 + classes
        weight = torch.rand(classes).to(DEVICE)
        compare(loss, input, target, ignore_index=255 + classes)
        compare(loss, input, target, ignore_index=255 + classes, weight=weight)


@pytest.mark.parametrize("size", [1, 7, 8, 255, 1023, 1024, 1025, 4099, 100_003, 2**20, 2**20 + 1])
@each_width
@each_bce_loss
def test_elements(loss, dtype, size):
    """Vectors, heads and tails; tensors that lie differently to a vector; targets of another width."""
    input, target = loss.sample(size, dtype=dtype, device=DEVICE)
    weight = torch.rand(size, dtype=torch.float64).to(DEVICE, dtype)
    marked = torch.where(target < 0.3, 255, target.round().int())
    for x, y, options in (
        (input, target, {}),
        (input, target, {"reduction": "none"}),
        (one_element_on(input), target, {}),
        (one_element_on(input), one_element_on(target), {}),
        (input.repeat_interleave(2)[::2], target, {}),
        (input, target, {"weight": weight}),
        (input, target.round().byte(), {}),
        (input, marked, {"ignore_index": 255}),
        (input, marked, {"ignore_index": 255, "weight": weight, "reduction": "sum"}),
    ):
        compare(loss, x, y, **options)
