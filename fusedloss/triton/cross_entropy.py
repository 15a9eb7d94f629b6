"""Cross entropy: the kernels, and which of them a pass starts. What they do with a row is rows.py's.

A program takes a tile of positions and classes. Where a tile holds whole rows, forward reads each logit once, and has
it at hand for the gradient. Longer rows are swept tile by tile, with statistics for each lane; their gradient takes a
second sweep, which finds much of the row in the cache. Where there are too few rows to keep a GPU busy, each is cut
into slices with a program for each: statistics are one launch, their merge and finish another, the gradient a third.
"""

from dataclasses import replace

import torch
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.arguments import Pass
from fusedloss.triton.class_loss import (
    count_before,
    entries,
    is_class,
    load_positions,
    mean_divisor,
    positions_of,
    shape_of,
    sizes_of,
    store_entries,
    tile_view,
    vector_of,
    view_of,
)
from fusedloss.triton.geometry import forward_geometry, gradient_geometry, tile_of
from fusedloss.triton.launch import (
    accumulate_type,
    ceil_div,
    hidden,
    hidden_floats,
    kernel,
    multiprocessors,
    next_power_of_2,
    shown,
    start,
    workspace,
)
from fusedloss.triton.portable import divide, number
from fusedloss.triton.reduce import Parts, store_sums, sum_into
from fusedloss.triton.rows import (
    Gradient,
    Gradients,
    GradOutputs,
    Inputs,
    Largest,
    Outputs,
    Saved,
    Shard,
    Slices,
    all_classes_of,
    class_weights,
    masses_of,
    merge_largest,
    no_key,
    options_of,
    options_shown,
    problem_with,
    read,
    row_target,
    rows_of,
    store_gradient,
    store_rows,
    sweep,
    target_logits,
    weighted,
    whole_rows,
)

FEWEST_PROGRAMS = 2  # for each multiprocessor; with fewer, swept rows are sliced


# --- All phases of whole rows ------------------------------------------------------------------------------------


@kernel
def _forward(
    inputs: Inputs, out: Outputs, gradient: Gradient, ignore_index: tl.int64, tile: tl.constexpr, o: tl.constexpr
):
    """Statistics, merge and finish of whole rows; and their gradient, where it is wanted."""
    rows = rows_of(inputs, tl.program_id(0), ignore_index, tile, o)
    target_logit = target_logits(rows, o)
    end = rows.logits.classes + tile.shift
    if tile.sweeps:
        some = tl.max(rows.readable.to(tl.int32), 0)
        statistics, largest = sweep(rows, inputs.weight, 0, end * some, tile, o)
    else:
        whole = read(rows, 0, tile, o)
        statistics, largest = whole_rows(rows, inputs.weight, whole, tile, o)

    row = math.finished(statistics, o)
    problem = problem_with(rows, statistics.mass, o)
    target = row_target(rows, target_logit - row.max, o)
    mass = math.row_mass(problem, target.mass, row.mass, o)
    losses = math.row_loss(problem, row, target, o)
    loss_sum, divisor_sum = store_rows(rows, row, mass, largest, losses, out, o)
    store_sums(out.total, loss_sum, divisor_sum, o.is_mean)

    if o.with_gradient:
        g = number(1.0, tl.float64)
        if o.is_mean:
            if out.total.denominator is not None:
                divisor = tl.load(out.total.denominator)
            elif not o.probabilities:
                divisor = mean_divisor(
                    gradient.counted, inputs.target, inputs.weight, inputs.sample_weight, rows.shape, ignore_index
                )
            elif o.weighted:
                divisor = mean_divisor(gradient.counted, None, None, inputs.sample_weight, rows.shape, ignore_index)
            else:
                divisor = tl.where(rows.shape.classes > 0, rows.shape.positions, 0).to(tl.float64)
            g = 1.0 / divisor
        if gradient.grad_loss is not None:
            g *= tl.load(gradient.grad_loss).to(tl.float64)
        g = weighted(g, rows, o).to(o.acc)
        shared = math.row_gradient(problem, target, mass, math.row_lse(row), g, 0.0, o)
        factor = divide(shared.factor, statistics.sum)
        shared = math.RowGradient(factor, shared.on_target, shared.on_all, shared.on_gap)
        shift = math.finite_shift(row.max)
        view = tile_view(gradient.logits, rows.position, rows.shape, tile)
        # The targets' logits have been read, by whichever thread, before the gradient may take their place.
        tl.debug_barrier()
        if tile.sweeps:
            for first in range(0, end, tile.chunk * tile.lanes):
                store_gradient(rows, inputs.weight, read(rows, first, tile, o), shift, shared, view, tile, o)
        else:
            store_gradient(rows, inputs.weight, whole, shift, shared, view, tile, o)


# --- Phases of sliced rows ---------------------------------------------------------------------------------------


@kernel
def _statistics(inputs: Inputs, slices: Slices, ignore_index: tl.int64, tile: tl.constexpr, o: tl.constexpr):
    """The statistics of a slice of each row."""
    count = shown(slices.count)
    slice = tl.program_id(0) % count
    rows = rows_of(inputs, tl.program_id(0) // count, ignore_index, tile, o)
    length = shown(slices.chunks).to(tl.int32) * (tile.chunk * tile.lanes)
    begin = slice.to(tl.int32) * length
    statistics, largest = sweep(
        rows, inputs.weight, begin, tl.minimum(begin + length, rows.logits.classes + tile.shift), tile, o
    )
    at = slice * rows.shape.positions + rows.position
    step = count * rows.shape.positions
    tl.store(slices.statistics + at, statistics.max, mask=rows.live)
    tl.store(slices.statistics + step + at, statistics.sum, mask=rows.live)
    if o.dense:
        tl.store(slices.statistics + 2 * step + at, statistics.dense_loss, mask=rows.live)
        tl.store(slices.mass + at, statistics.mass, mask=rows.live)
    if o.entropy:
        tl.store(slices.entropy + at, statistics.sum, mask=rows.live)
        tl.store(slices.entropy + step + at, statistics.gap, mask=rows.live)
    if o.argmax:
        tl.store(slices.largest + at, largest.key, mask=rows.live)
        tl.store(slices.largest + step + at, largest.index, mask=rows.live)


@kernel
def _finish(
    inputs: Inputs,
    slices: Slices,
    out: Outputs,
    ignore_index: tl.int64,
    tile: tl.constexpr,
    o: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Merge and finish of rows, from the statistics of their slices."""
    rows = rows_of(inputs, tl.program_id(0), ignore_index, tile, o)
    target_logit = target_logits(rows, o)
    count = shown(slices.count)
    slice = tl.arange(0, SLICES)[None, :]
    exists = rows.live[:, None] & (slice < count)
    at = slice * rows.shape.positions + rows.position[:, None]
    step = count * rows.shape.positions
    max = tl.load(slices.statistics + at, mask=exists, other=-float("inf"))
    sum = tl.load(slices.statistics + step + at, mask=exists, other=0.0)
    gap = sum
    dense_loss = sum
    mass = sum
    if o.entropy:
        sum = tl.load(slices.entropy + at, mask=exists, other=0.0)
        gap = tl.load(slices.entropy + step + at, mask=exists, other=0.0)
    if o.dense:
        dense_loss = tl.load(slices.statistics + 2 * step + at, mask=exists, other=0.0)
        mass = tl.load(slices.mass + at, mask=exists, other=0.0)
    statistics = math.merge(math.RowStatistics(max, sum, gap, dense_loss, mass), o)
    largest = Largest(max, max)
    if o.argmax:
        keys = tl.load(slices.largest + at, mask=exists, other=0)
        index = tl.load(slices.largest + step + at, mask=exists, other=0)
        largest = merge_largest(Largest(tl.where(exists, keys, no_key(o)), index.to(tl.int32)))

    row = math.finished(statistics, o)
    problem = problem_with(rows, statistics.mass, o)
    target = row_target(rows, target_logit - row.max, o)
    mass = math.row_mass(problem, target.mass, row.mass, o)
    losses = math.row_loss(problem, row, target, o)
    loss_sum, divisor_sum = store_rows(rows, row, mass, largest, losses, out, o)
    store_sums(out.total, loss_sum, divisor_sum, o.is_mean)


# --- Gradient ----------------------------------------------------------------------------------------------------


@kernel
def _mass(inputs: Inputs, mass, tile: tl.constexpr, o: tl.constexpr):
    """The mass of each row of probabilities, which the gradient has to know before it writes."""
    shape = sizes_of(inputs.shape)
    position, live = positions_of(tl.program_id(0), shape.positions, tile)
    problem = math.row_problem(options_shown(inputs), all_classes_of(inputs, shape, o), shape.classes, o)
    view = tile_view(inputs.probabilities, position, shape, tile)
    count: tl.constexpr = tile.positions
    lanes: tl.constexpr = tile.lanes
    sums = tl.zeros((count, lanes), tl.float64)
    for first in range(0, view.classes + tile.shift, tile.chunk * tile.lanes):
        at = entries(first, tile)
        exists = is_class(view, at, tile) & live[:, None, None]
        sums += tl.sum(masses_of(view, inputs.weight, problem, at, exists, tile, o).to(tl.float64), 1)
    tl.store(mass + position, tl.sum(sums, 1).to(o.acc), mask=live)


@kernel
def _gradient(
    inputs: Inputs,
    saved: Saved,
    weight_sum,
    grad_outputs: GradOutputs,
    gradients: Gradients,
    chunks: tl.int64,
    ignore_index: tl.int64,
    tile: tl.constexpr,
    o: tl.constexpr,
):
    """One tile of the gradients."""
    chunk = (tl.program_id(0) % chunks).to(tl.int32)
    rows = rows_of(inputs, tl.program_id(0) // chunks, ignore_index, tile, o)
    position = rows.position
    max = tl.load(saved.max + position, mask=rows.readable, other=0.0)
    log_sum = tl.load(saved.log_sum + position, mask=rows.readable, other=0.0)
    g = number(1.0, tl.float64)
    if grad_outputs.divisor is not None:
        g = 1.0 / tl.load(grad_outputs.divisor)
    if grad_outputs.grad_loss is not None:
        g = g * load_positions(grad_outputs.grad_loss, position, rows.live).to(tl.float64)
    g = weighted(g, rows, o)
    grad_lse = tl.zeros(position.shape, o.acc)
    if grad_outputs.grad_lse is not None:
        grad_lse = tl.load(grad_outputs.grad_lse + position, mask=rows.live, other=0.0)
    problem = rows.problem
    if weight_sum is not None:
        problem = problem_with(rows, tl.load(weight_sum), o)
    target = row_target(rows, max, o)
    if saved.mass is not None:
        mass = tl.load(saved.mass + position, mask=rows.live, other=0.0)
    else:
        mass = math.row_mass(problem, target.mass, None, o)
    lse = math.log_sum_exp(max, log_sum)
    shared = math.row_gradient(problem, target, mass, lse, g.to(o.acc), grad_lse, o)
    if o.entropy:
        gap = tl.load(saved.gap + position, mask=rows.live, other=0.0)
        grad_entropy = tl.load(grad_outputs.grad_entropy + position, mask=rows.live, other=0.0)
        shared = math.add_entropy_grad(shared, grad_entropy, gap)

    part = read(rows, chunk * (tile.chunk * tile.lanes), tile, o)
    if gradients.probabilities is not None:
        weights = class_weights(rows.masses, inputs.weight, part.at, part.exists, o.acc)
        shifted = part.x - max[:, None, None]
        on_all = shared.on_all[:, None, None]
        grads = math.probability_grad(shifted, log_sum[:, None, None], on_all, problem.keep, weights)
        view = tile_view(gradients.probabilities, position, rows.shape, tile)
        store_entries(view, part.at, rows.live, grads, tile)
    if gradients.logits is not None:
        view = tile_view(gradients.logits, position, rows.shape, tile)
        on_gap = shared.on_gap
        if o.entropy:
            on_gap = math.over_sum(on_gap, log_sum)
        factor = math.over_sum(shared.factor, log_sum)
        divided = math.RowGradient(factor, shared.on_target, shared.on_all, on_gap)
        store_gradient(rows, inputs.weight, part, max, divided, view, tile, o)


# --- Launches ----------------------------------------------------------------------------------------------------


def launch(args, which):
    """Starts the kernels of a pass."""
    if which is Pass.backward:
        return _start_gradient(args)
    with_gradient = which is Pass.forward_with_gradient and args.grad_logits is not None  # it may be empty
    steady = args.loss is not None  # what is said of one row does not depend on the others
    entropy, argmax = args.entropy is not None, args.argmax is not None
    tile, options = _plan(args, forward_geometry, steady, args.every_row, entropy, argmax, with_gradient)
    slices = _slice_count(args, tile)
    if slices > 1:
        return _start_slices(args, tile, options, slices)
    return _start_forward(args, tile, options)


def _plan(args, geometry, steady, every_row, entropy, argmax, with_gradient):
    """(tile, options)"""
    options = options_of(
        acc=accumulate_type(args.logits.data),
        rough=args.logits.data.dtype.itemsize == 2,
        dense=args.has_probabilities or args.options.label_smoothing != 0,
        probabilities=args.has_probabilities,
        weighted=args.sample_weight is not None,
        sharded=args.all_classes != 0,
        scaled=args.options.logit_scale != 1,
        capped=args.options.logit_softcap != 0,
        has_z=args.options.z_loss != 0,
        every_row=every_row,
        entropy=entropy,
        argmax=argmax,
        is_mean=args.total.is_mean,
        with_gradient=with_gradient,
    )
    # A cap is computed in float64, and so are an entropy's sums. With less than a 16th of the entries, a tile of
    # columns would have fewer positions than 16 bytes have elements.
    wide = [options.acc == tl.float64, options.dense, 2 * options.capped, options.entropy * (1 + options.argmax)]
    share = min(2 ** sum(wide), 16)
    tensors = [args.logits, args.grad_logits, args.probabilities, args.grad_probabilities]
    return tile_of(args.shape, tensors, geometry(share), steady), options


def _inputs(args):
    target = None if args.target is None else vector_of(args.target.index)
    shard = Shard(hidden(args.first_class), hidden(args.all_classes)) if args.all_classes else None
    return Inputs(
        shape_of(args.shape),
        shard,
        view_of(args.logits),
        target,
        view_of(args.probabilities),
        args.weight,
        vector_of(args.sample_weight),
        hidden_floats(args.options),
    )


def _ignore_index(args):
    return 0 if args.target is None else args.target.ignore_index


def _outputs(args, parts):
    loss = None if args.loss is None else args.loss.data
    each = loss, args.lse, args.entropy, args.argmax, args.row_max, args.row_log_sum, args.row_gap, args.row_mass
    return Outputs(*each, parts.totals)


def _start_forward(args, tile, options):
    gradient = None
    if options.with_gradient:
        counts = options.is_mean and args.total.denominator is None
        counts = counts and not (options.probabilities and args.sample_weight is None)
        counted = count_before(args) if counts else None
        grad_loss = args.grad_loss
        gradient = Gradient(view_of(args.grad_logits), None if grad_loss is None else grad_loss.data, counted)
    programs = max(tile.blocks(args.shape), 1)  # the total of nothing has a program too
    parts = Parts(args.total, programs, args.device)
    tensors = _inputs(args), _outputs(args, parts), gradient
    start(_forward, programs, *tensors, _ignore_index(args), tile=tile, o=options, warps=tile.warps)
    parts.add_up()


def _slice_count(args, tile):
    """How many programs share a row. Where its loss is wanted, one: other numbers of rows would cut it elsewhere."""
    blocks = tile.blocks(args.shape)
    fewest = FEWEST_PROGRAMS * multiprocessors(args.device)
    if args.loss is not None or not tile.sweeps or tile.order == "columns" or not 0 < blocks < fewest:
        return 1
    return min(tile.chunks(args.shape), ceil_div(fewest, blocks))


def _start_slices(args, tile, options, count):
    """Forward, and if a gradient is wanted backward, from statistics of its own."""
    with_gradient, options = options.with_gradient, replace(options, with_gradient=False)
    positions, device = args.shape.positions, args.device
    dtype = _statistics_type(options)
    if with_gradient:
        row_max, row_log_sum = workspace(device, (2, positions), dtype)
        row_mass = workspace(device, positions, dtype) if options.probabilities else None
        divisor = workspace(device, 1)
        args = args._replace(
            row_max=row_max,
            row_log_sum=row_log_sum,
            row_mass=row_mass,
            total=args.total._replace(divisor=divisor),
            grad_divisor=divisor if options.is_mean else None,
        )

    chunks = ceil_div(tile.chunks(args.shape), count)
    count = ceil_div(tile.chunks(args.shape), chunks)  # none is empty
    statistics = workspace(device, 3 * count * positions, dtype)
    masses = workspace(device, count * positions) if options.dense else None
    entropies = workspace(device, 2 * count * positions) if options.entropy else None
    # A key has as many bits as the accumulate type; beside it a class has as many.
    keys = torch.int64 if options.acc == tl.float64 else torch.int32
    largest = workspace(device, 2 * count * positions, keys) if options.argmax else None
    given = _inputs(args), Slices(statistics, masses, entropies, largest, hidden(count), hidden(chunks))
    ignore_index, programs = _ignore_index(args), tile.blocks(args.shape) * count
    start(_statistics, programs, *given, ignore_index, tile=tile, o=options, warps=tile.warps)

    padded = next_power_of_2(count)
    rows = replace(tile, positions=max((512 if options.entropy else 2048) // padded, 1))
    parts = Parts(args.total, rows.blocks(args.shape), device)
    start(_finish, parts.programs, *given, _outputs(args, parts), ignore_index, tile=rows, o=options, SLICES=padded)
    parts.add_up()
    if with_gradient:
        _start_gradient(args)


def _statistics_type(options):
    return torch.float64 if options.acc == tl.float64 else torch.float32


def _start_gradient(args):
    shape = args.shape
    if shape.classes == 0:  # there is no gradient
        return
    entropy = args.grad_entropy is not None
    tile, options = _plan(args, gradient_geometry, False, entropy or args.grad_lse is not None, entropy, False, False)
    inputs = _inputs(args)
    mass, weight_sum = args.row_mass, None
    if mass is None and options.probabilities:
        mass = workspace(args.device, shape.positions, _statistics_type(options))
        start(_mass, tile.blocks(shape), inputs, mass, tile=tile, o=options, warps=tile.warps)
    elif mass is None and options.dense and args.weight is not None:
        weight_sum = workspace(args.device, 1)
        sum_into(weight_sum, args.weight, shape.classes, args.device)
    chunks = tile.chunks(shape)
    start(
        _gradient,
        tile.blocks(shape) * chunks,
        inputs,
        Saved(args.row_max, args.row_log_sum, args.row_gap, mass),
        weight_sum,
        GradOutputs(vector_of(args.grad_loss), args.grad_lse, args.grad_entropy, args.grad_divisor),
        Gradients(view_of(args.grad_logits), view_of(args.grad_probabilities)),
        chunks,
        _ignore_index(args),
        tile=tile,
        o=options,
        warps=tile.warps,
    )
