"""Where rounding hurts: large logits, half precision, and more terms than the dtype can count."""

import pytest
import torch
from support import asserts, compare, differentiate, each, each_dtype, each_reduction, widen

SCALES = {
    1.0: "ordinary",
    30.0: "fp16's softmax underflows: exp(-30) is below its smallest number",
    100.0: "float32's underflows: exp(-104) is 0",
    1000.0: "one rounded log-sum-exp of 3000 has lost every digit of a small loss",
}
each_scale = pytest.mark.parametrize("scale", SCALES)


@each_scale
@each_dtype
@each_reduction
@each()
def test_large_logits(loss, scale, dtype, reduction, device):
    input, target = loss.sample(33, 100, dtype=dtype, device=device, scale=scale)
    compare(loss, input, target, reduction=reduction)


@each_scale
@each_dtype
@each("cross_entropy", "cross_entropy_soft")
def test_large_logits_with_label_smoothing(loss, scale, dtype, device):
    input, target = loss.sample(33, 100, dtype=dtype, device=device, scale=scale)
    compare(loss, input, target, label_smoothing=0.1)


@each_scale
@pytest.mark.parametrize("options", [{"z_loss": 1e-4}, {"logit_softcap": 30.0}, {"return_lse": True}], ids=str)
@each("cross_entropy", "cross_entropy_soft")
def test_large_logits_with_additions(loss, scale, options, device):
    compare(loss, *loss.sample(33, 100, device=device, scale=scale), **options)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])  # the last leaves float32 four bits behind the point
@each("cross_entropy", "cross_entropy_soft")
def test_an_offset_common_to_all_classes(loss, offset, device):
    input, target = loss.sample(33, 100, device=device)
    compare(loss, input + offset, target, reduction="none")


ROUNDED = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"logit_softcap": 30.0}]
SAMPLES = {"rows": (2048, 100), "columns": (512, 10, 16)}  # many terms, so that luck averages out


@each_scale
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("shape", SAMPLES.values(), ids=SAMPLES)
@each()
def test_the_root_mean_square_error_is_no_larger_than_native_s(loss, shape, dtype, scale, device):
    input, target = loss.sample(*shape, dtype=dtype, device=device, scale=scale)
    # Triton's interpreter rounds products before it adds them, which no GPU does.
    share = 1.10 if device == "cpu" and asserts(device) else 1.05
    for options in VARIANTS if loss.function == "cross_entropy" else [{}]:
        options = {"reduction": "none", **options}
        results = (
            differentiate(loss.reference, widen(input), widen(target), **options),
            differentiate(loss.baseline(options), input, loss.native_target(input, target), **options),
            differentiate(loss.ours, input, target, **options),
        )
        for truth, native, ours in zip(*results, strict=True):
            native_error, our_error = (((y - truth) ** 2).mean().sqrt().item() for y in (native, ours))
            # A few per cent are the sample's; infinite gradients (BCE's to its target) have no error to compare.
            assert not our_error > share * native_error, options
