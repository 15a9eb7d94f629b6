"""Random programs around the losses give what native gives; and the fuzzer finds faults that are planted."""

import ast

import programs
import pytest
import torch
from programs import LOSSES, Native, generate, judge

from fusedloss import reference

PROGRAMS, PARTS = 300, 6  # tools/fuzz_programs.py runs any number


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, PARTS))])
def test_programs(part):
    findings = []
    for seed in range(part, PROGRAMS, PARTS):
        program = generate(seed)
        _, finding = judge(program)
        if finding:
            small = programs.minimise(program, programs.same_finding(finding), most=100)
            findings.append(f"program {seed} {finding.text}\n{programs.as_text(small)}")
    assert not findings, "\n\n".join(findings)


def test_programs_are_judged_and_exercise_everything():
    judged, exercised = 0, set()
    for seed in range(PROGRAMS):
        program = generate(seed)
        judged += not isinstance(programs.execute(program, Native()), Exception)
        exercised |= programs.ingredients(program)
    assert judged > 0.7 * PROGRAMS
    operations = {part for name in exercised for part in name.split(": ")}
    known = {*LOSSES, *programs.PLAIN, *programs.STEPS, *programs.BLOCKS} - {"compile", "compiled_autograd"}
    assert known <= operations
    assert {f"derivatives of order {n}" for n in (1, 2, 3)} <= exercised
    assert {f"option: {name}" for name in (*programs.HINTS, *programs.OPTIONS)} <= exercised


# --- faults: what a loss would do that has one -----------------------------------------------------------------------


def gradient_of_loss(name, options, logits, target, flow):
    """The gradient as a function of the logits and of what flows back, differentiable."""
    with torch.enable_grad():
        loss = getattr(reference, name)(logits, target, **options)
        return torch.autograd.grad(loss, logits, flow, create_graph=True)[0]


class CountsPathsTwice(torch.autograd.Function):
    """A gradient whose own gradient takes paths from the logits to the grad_output for paths of its own."""

    @staticmethod
    def forward(ctx, logits, flow, target, name, options):
        ctx.save_for_backward(logits, flow)
        ctx.rest = target, name, options
        return gradient_of_loss(name, options, logits.detach().requires_grad_(), target, flow).detach()

    @staticmethod
    def backward(ctx, cotangent):
        logits, flow = ctx.saved_tensors
        target, name, options = ctx.rest
        first = gradient_of_loss(name, options, logits, target, flow)
        found = torch.autograd.grad(first, [logits, flow], cotangent, create_graph=True, allow_unused=True)
        return (*found, None, None, None)


class Fused(torch.autograd.Function):
    """A loss with a backward of its own."""

    @staticmethod
    def forward(ctx, logits, target, name, options, backward):
        ctx.save_for_backward(logits)
        ctx.rest, ctx.call = (target, name, options), backward
        ctx.autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        return getattr(reference, name)(logits, target, **options)

    @staticmethod
    def backward(ctx, flow):
        with torch.autocast("cpu", *ctx.autocast):
            return (ctx.call(ctx, flow, ctx.saved_tensors[0], *ctx.rest), None, None, None, None)


def right(ctx, flow, logits, target, name, options):
    alias = logits.view_as(logits) if torch.is_grad_enabled() else logits.detach().requires_grad_()
    found = gradient_of_loss(name, options, alias, target, flow)
    return found if torch.is_grad_enabled() else found.detach()


def off_by_a_thousandth(ctx, flow, *rest):
    return right(ctx, flow, *rest) * 1.001


def counting_twice(ctx, flow, logits, target, name, options):
    return CountsPathsTwice.apply(logits, flow, target, name, options)


def written_in_place(ctx, flow, *rest):
    """The gradient that is kept from the first backward is multiplied by what flows back, again and again."""
    with torch.no_grad():
        if not hasattr(ctx, "kept"):
            ctx.kept = right(ctx, torch.ones_like(flow), *rest).detach()
        return ctx.kept.mul_(flow) if flow.dim() == 0 else right(ctx, flow, *rest)


def asking_who_watches(ctx, flow, *rest):
    watched = torch._C._len_torch_dispatch_stack() > 0
    return right(ctx, flow, *rest) * (2 if watched else 1)


def rounding_the_factor(ctx, flow, logits, *rest):
    """The factor is rounded to half before it multiplies, and all of the gradient is too large or too small."""
    return right(ctx, torch.ones_like(flow), logits, *rest) * flow.to(logits.dtype)


def letting_ignored_through(ctx, flow, *rest):
    """A flow of inf or NaN times the gradient, which is 0 for what is ignored."""
    return right(ctx, torch.ones_like(flow), *rest) * flow if flow.dim() == 0 else right(ctx, flow, *rest)


FAULTS = [
    off_by_a_thousandth,
    counting_twice,
    written_in_place,
    asking_who_watches,
    rounding_the_factor,
    letting_ignored_through,
]


class Planted(Native):
    """Native's losses with another backward, where it can have one."""

    def __init__(self, backward):
        self.backward = backward

    def call(self, step, input, target, options):
        options = {name: value for name, value in options.items() if name not in programs.HINTS}
        others = [target, *(value for value in options.values() if isinstance(value, torch.Tensor))]
        wanted = any(tensor.requires_grad for tensor in others)
        fused = input.requires_grad and not wanted and torch.is_grad_enabled()
        answers = options.get("return_lse") or options.get("return_entropy")
        if not fused or answers or torch._C._are_functorch_transforms_active():
            return super().call(step, input, target, options)
        return Fused.apply(input, target, step["op"], options, self.backward)


def test_another_right_loss_is_not_accused():
    assert [finding.text for _, finding in findings_of(Planted(right), 200)] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_and_minimised(fault):
    faulty = Planted(fault)
    program, finding = next(findings_of(faulty))
    small = programs.minimise(program, programs.same_finding(finding, faulty))
    assert len(list(programs.walk(small))) <= 10
    again = ast.literal_eval(programs.as_text(small))
    assert again == small
    assert judge(again, faulty)[1].kind == finding.kind
    assert judge(again, Planted(right))[1] is None


def findings_of(ours, most=1500):
    for seed in range(most):
        program = generate(seed)
        # What torch.autograd.grad inside a backward cannot do is no fault of the losses here.
        finding = None if programs.has(program, batched=True) else judge(program, ours)[1]
        if finding:
            yield program, finding
