"""The native entry points on random sizes, strides, threads and indices: an error that is named, or the reference.

`MEPROP_FUZZ_EXAMPLES` is the number of examples of each test. Addresses are those of tensors that are large enough.
"""

import os
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cases import GRADIENTS, LAYOUTS, NATIVE_DTYPES, bits, gradient
from meprop import InBlocks, TopK, ops
from meprop.ops import native
from meprop.selection import ColumnSelection, Entries, PlainTopK, RowSelection, everything
from optimizer_cases import OPS, do_step

pytestmark = pytest.mark.usefixtures("threads")  # restores them
fuzz = settings(
    max_examples=int(os.environ.get("MEPROP_FUZZ_EXAMPLES", "30")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes, widths, teams, numbers = st.integers(0, 12), st.integers(1, 70), st.integers(1, 5), st.integers(-3, 75)
matrices = st.tuples(
    st.sampled_from(sorted(GRADIENTS)), sizes, widths, st.sampled_from(NATIVE_DTYPES), st.sampled_from(sorted(LAYOUTS))
)


def drawn(matrix):
    kind, rows, width, dtype, layout = matrix
    return LAYOUTS[layout](gradient(kind, rows, width, dtype))


def close(found, expected, dtype):
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 40, equal_nan=True)


@fuzz
@given(matrix=matrices, k=numbers, scope=st.sampled_from(["example", "batch"]), team=teams)
def test_topk(level, team, matrix, k, scope):
    torch.set_num_threads(team)
    grad = drawn(matrix)
    operation = ops.topk_rows if scope == "example" else ops.topk_columns
    if not 1 <= k <= grad.shape[1]:
        with pytest.raises(ValueError, match=f"k={k} "):
            operation(grad, k)
        return
    found, expected = operation(grad, k), operation.literally(grad, k)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(bits(found.values), bits(expected.values))


@fuzz
@given(rows=numbers, width=numbers, ld=numbers, k=numbers, team=numbers, codes=st.tuples(*[st.integers(-1, 2)] * 2))
def test_sizes_of_topk_are_checked_before_memory_is_read(level, rows, width, ld, k, team, codes):
    """The memory is as large as any of these sizes needs it to be."""
    grad = torch.randn(76 * 76)
    values, indices = torch.full((76 * 76,), 7.0), torch.full((76 * 76,), 7, dtype=torch.int32)
    valid = rows >= 0 and 1 <= k <= width and ld >= 0 and team >= 1
    valid = valid and codes[0] in (0, 1) and codes[1] in (0, 1)
    arguments = (*codes, grad.data_ptr(), ld, rows, width, k, values.data_ptr(), indices.data_ptr(), team)
    if not valid:
        with pytest.raises(ValueError, match=r"out of range|unknown"):
            native.extension().topk(*arguments)
        assert (values == 7).all()
        return
    native.extension().topk(*arguments)
    assert (indices[rows * k if codes[1] == 0 else k :] == 7).all()


@fuzz
@given(matrix=matrices, inputs=sizes, k=numbers, blocks=st.integers(-1, 4), scope=st.booleans(), team=teams)
def test_linear_backward_that_selects(level, team, matrix, inputs, k, blocks, scope):
    torch.set_num_threads(team)
    grad = drawn(matrix)
    rows, width = grad.shape
    weight, x = (gradient("normal", size, inputs, grad.dtype) for size in (width, rows))
    call = PlainTopK(k, "example" if scope else "batch", blocks), grad, weight, x, True, False
    if blocks < 1 or width % blocks or not 1 <= k <= width // blocks:
        with pytest.raises(ValueError, match="out of range"):
            ops.linear_backward(*call)
        return
    assume(bool((grad.abs() < 1e30).all()))  # so that no sum overflows, whose order would then show
    scale = grad.double().abs().max().clamp(min=1) if grad.numel() else torch.tensor(1.0)
    for found, expected in zip(ops.linear_backward(*call), ops.linear_backward.literally(*call), strict=True):
        close(found.double() / scale, expected.double() / scale, grad.dtype)


@fuzz
@given(data=st.data(), rows=sizes, width=widths, inputs=sizes, by_row=st.booleans(), team=teams)
def test_indices_of_a_selection(level, team, data, rows, width, inputs, by_row):
    torch.set_num_threads(team)
    k = data.draw(st.integers(0, min(6, width)))
    index_rows = rows if by_row else 1
    indices = data.draw(st.lists(st.integers(-1, width), min_size=index_rows * k, max_size=index_rows * k))
    indices = torch.tensor(indices, dtype=torch.int32).view(index_rows, k)
    if data.draw(st.booleans()):
        indices = indices.sort(dim=1).values
    values, weight, x = torch.randn(rows, k), torch.randn(width, inputs), torch.randn(rows, inputs)
    selection = RowSelection(values, indices, width) if by_row else ColumnSelection(values, indices[0], width)
    call = selection, torch.randn(rows, width), weight, x, False, False
    try:
        expected = ops.linear_backward.literally(*call)
    except IndexError:
        expected = None
    if expected is None:
        with pytest.raises(IndexError, match="ascend"):
            ops.linear_backward(*call)
        return
    found = ops.linear_backward(*call)
    close(found[0], expected[0], torch.float32)
    close(found[1], expected[1], torch.float32)


@fuzz
@given(data=st.data(), count=st.integers(0, 6), extra=st.integers(-2, 4), team=teams)
def test_starts_of_a_selection(level, team, data, count, extra):
    torch.set_num_threads(team)
    width = 9
    starts = torch.tensor([0, *data.draw(st.lists(st.integers(-1, count + 1), max_size=5)), count + min(extra, 0)])
    starts = starts.sort().values if data.draw(st.booleans()) else starts
    indices = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count)), dtype=torch.int32)
    selection = RowSelection(torch.randn(count), indices, width, starts=starts)
    rows = selection.rows
    call = selection, torch.randn(rows, width), torch.randn(width, 5), torch.randn(rows, 5), False, False
    results = []
    for run in (ops.linear_backward.literally, ops.linear_backward):
        try:
            results.append(run(*call))
        except IndexError:
            results.append(None)
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None and results[1] is not None:
        close(results[1][0], results[0][0], torch.float32)
        close(results[1][1], results[0][1], torch.float32)


# ---------------------------------------------------------------- entries of the whole gradient


shares, keys = st.sampled_from([0.0, 1e-4, 0.25, 1.0, 8.0, float("inf")]), st.integers(-(2**63), 2**63 - 1)
described = st.builds(
    lambda keep, k, share, exact_sum, key, ceiling: Entries(
        keep, k, share, exact_sum, torch.tensor(key) if keep in ("noise", "drawn") else None, ceiling
    ),
    *(st.sampled_from(sorted(native.KEEP_CODES)), st.integers(-1, 80), shares, st.booleans(), keys),
    st.sampled_from([1.0, 0.3, 0.0]),
)


def literal_entries_backward(entries, grad, weight, x, needs_bias):
    kept = ops.choose_entries.literally(grad, entries)
    if kept.density > entries.ceiling:
        kept = everything(grad)
    return ops.linear_backward.literally(kept, grad, weight, x, needs_bias, False), kept.values.numel()


@fuzz
@given(data=st.data(), matrix=matrices, entries=described, inputs=sizes, team=teams)
def test_entries_chosen_and_multiplied_with(level, team, data, matrix, entries, inputs):
    torch.set_num_threads(team)
    grad = drawn(matrix)
    rows, width = grad.shape
    x, weight = (LAYOUTS[matrix[4]](gradient("normal", size, inputs, grad.dtype)) for size in (rows, width))
    alike = data.draw(st.booleans())
    if alike:  # the input is the gradient itself, and so are the rows of the weight where there are enough
        x, weight = grad, grad[:width] if rows >= width else gradient("normal", width, width, grad.dtype)
    needs = data.draw(st.tuples(*[st.booleans()] * 3))
    call = entries, grad, weight if needs[0] else None, x if needs[1] else None, needs[2]
    if entries.k < 0:
        with pytest.raises(ValueError, match="k=-1"):
            ops.entries_backward(*call)
        return
    found, kept = ops.entries_backward(*call)
    assume(bool((grad.abs() < 1e18).all()))  # so that nothing overflows, even where it is multiplied with itself
    expected, expected_kept = literal_entries_backward(*call)
    assert int(kept) == expected_kept
    scale = grad.double().abs().max().clamp(min=1) if grad.numel() else torch.tensor(1.0)
    scale = scale * scale if alike else scale
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one.double() / scale, other.double() / scale, grad.dtype)


# ---------------------------------------------------------------- maps of convolutions


@st.composite
def convolutions(draw):
    """Maps, gradient, input, weight and moves, which fit but for one number in a while."""
    dims, images, inputs, outputs = (draw(st.integers(low, high)) for low, high in ((1, 3), (0, 4), (1, 5), (1, 5)))
    kernel, stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * dims)) for _ in range(3))
    padding = draw(st.tuples(*[st.integers(0, 2)] * dims))
    rest = draw(st.tuples(*[st.integers(0, 6)] * dims))
    size = [max(1, d * (k - 1) + 1 - 2 * p + r) for d, k, p, r in zip(dilation, kernel, padding, rest, strict=True)]
    positions = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    wrong = draw(st.integers(0, 40))  # which of the numbers is one too large
    shapes = [[images, outputs, *positions], [images, inputs, *size], [outputs, inputs, *kernel]]
    for shape in shapes:
        for at in range(len(shape)):
            wrong -= 1
            shape[at] += wrong == 0
    dtype, generator = draw(st.sampled_from(NATIVE_DTYPES)), torch.Generator().manual_seed(draw(st.integers(0, 9)))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[0][torch.rand(shapes[0], generator=generator) < 0.4] = draw(st.sampled_from([0.0, float("nan"), 1e-40]))
    if dims == 2 and draw(st.booleans()):
        tensors = [each.contiguous(memory_format=torch.channels_last) for each in tensors]
    if draw(st.booleans()):
        tensors = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in tensors]
    return draw(kept_maps(images, outputs)), *tensors, (stride, padding, dilation)


@st.composite
def kept_maps(draw, images, outputs):
    if draw(st.booleans()):  # any numbers
        starts = draw(st.lists(st.integers(-1, 12), min_size=images, max_size=images + 2))
        channels = draw(st.lists(st.integers(-1, outputs), max_size=20))
    else:
        of = [sorted(draw(st.sets(st.integers(0, outputs - 1)))) for _ in range(images)]
        starts, channels = [0], [channel for each in of for channel in each]
        for each in of:
            starts.append(starts[-1] + len(each))
    factors = draw(st.lists(st.sampled_from([0.0, 1.0, -0.5, 2.75]), min_size=len(channels), max_size=len(channels)))
    channels = torch.tensor(channels, dtype=torch.int32)
    return ops.Maps(torch.tensor(starts, dtype=torch.int64), channels, torch.tensor(factors), draw(st.booleans()))


@fuzz
@given(convolution=convolutions(), needs=st.tuples(st.booleans(), st.booleans()), team=teams)
def test_maps_of_a_convolution(level, poisoned, team, convolution, needs):
    torch.set_num_threads(team)
    maps, grad, x, weight, moves = convolution
    call = maps, grad, x, weight, moves, needs
    results = []
    for run in (ops.maps_backward.literally, ops.maps_backward):
        try:
            results.append(run(*call))
        except (ValueError, IndexError) as error:
            results.append(type(error))
    expected, found = results
    if isinstance(expected, type):
        assert found is expected
        return
    for one, other, needed in zip(found, expected, needs, strict=True):
        assert (one is not None) == needed
        if needed:
            assert one.stride() == other.stride()
            if grad.isnan().any():  # times the zeros of the padding it may be NaN as well
                assert one[other.isnan()].isnan().all()
                one = one.where(~one.isnan(), other)
            close(one, other, grad.dtype)
    norms = ops.map_norms(grad)
    close(norms, ops.map_norms.literally(grad), torch.float32)


# ---------------------------------------------------------------- LSTMs


@st.composite
def sequences(draw):
    """The numbers of rows of the time steps, the number of all rows, the inputs and the units."""
    batch_sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6).map(lambda each: sorted(each, reverse=True)))
    rows = sum(batch_sizes)
    if draw(st.integers(0, 9)) == 0:
        batch_sizes = [max(1, batch_sizes[0]), *draw(st.lists(st.integers(-1, 7), max_size=5))]
    rows += draw(st.sampled_from([0] * 9 + [1]))
    return torch.tensor(batch_sizes), rows, draw(st.integers(0, 20)), draw(st.integers(1, 40))


def are_sequences(batch_sizes, rows):
    return int(batch_sizes.sum()) == rows and int(batch_sizes.min()) >= 1 and bool((batch_sizes.diff() <= 0).all())


def filled(kind, *shape):
    return gradient(kind, shape[0], shape[1], torch.float32)


FINITE = ["normal", "ties", "zeros", "mostly zero", "rows of all scales", "denormal"]
CONTENTS = ["some nan", "some inf", *FINITE]


@st.composite
def lstm_inputs(draw, kinds):
    """The arguments of the forward pass. The weights share memory where they can."""
    batch_sizes, rows, inputs, units = draw(sequences())
    layout, kind = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))], draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    weight_ih, weight_hh = (layout(filled("normal", 4 * units, width).to(dtype)) / 4 for width in (inputs, units))
    if draw(st.booleans()):
        weight_hh = weight_ih if inputs == units else weight_hh[:, :1].expand(4 * units, units)
    bias = filled("normal", 1, 4 * units)[0] if draw(st.booleans()) else None
    of_state = "normal" if kind == "some inf" else kind  # what is left of an infinite state is up to rounding
    initial = tuple(filled(of_state, int(batch_sizes[0]), units) if draw(st.booleans()) else None for _ in range(2))
    return layout(filled(kind, rows, inputs)), weight_ih, weight_hh, bias, initial, batch_sizes, draw(st.booleans())


@fuzz
@given(call=lstm_inputs(CONTENTS), team=teams)
def test_lstm_forward(level, poisoned, team, call):
    torch.set_num_threads(team)
    if not are_sequences(call[5], len(call[0])):
        with pytest.raises(ValueError, match="out of range"):
            ops.lstm_forward(*call)
        return
    for one, other in zip(ops.lstm_forward(*call), ops.lstm_forward.literally(*call), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


top_ks = st.builds(PlainTopK, st.integers(-1, 45), st.sampled_from(["example", "batch"]), st.integers(1, 2))


def is_in_range(choice, units):
    if isinstance(choice, Entries):
        return choice.k >= 0
    return choice.k >= 1 and (choice.k <= units if choice.blocks == 1 else units % choice.blocks == 0)


def nearly(tensor):
    """A tensor that is off by about 10^-6 of each number. None of None."""
    return None if tensor is None else tensor * (1 + 1e-6 * torch.randn_like(tensor))


def has_denormals(tensor):
    return tensor is not None and bool(((tensor != 0) & (tensor.abs() < 1e-30)).any())


@fuzz
@given(data=st.data(), call=lstm_inputs(FINITE), choice=st.one_of(top_ks, described), team=teams)
def test_lstm_backward(level, poisoned, team, data, call, choice):
    """What is kept is compared if it stays the same where the arguments are off by little.

    Of denormal numbers it is up to rounding which of the gates' gradients are zero. What is not kept is multiplied by
    nothing, or by zeros. So only gradients are not finite.
    """
    torch.set_num_threads(team)
    torch.manual_seed(0)  # of what is off
    x, *weights, _, _, batch_sizes, reverse = call
    rows, batch, units = len(x), int(batch_sizes[0]), weights[1].shape[1]
    valid = are_sequences(batch_sizes, rows)
    if isinstance(choice, PlainTopK) and not valid:
        choice = choice._replace(blocks=1)  # or it is the reference's, which takes sequences as they are
    trace = ops.lstm_forward(*call)[:3] if valid else [filled("normal", n, units) for n in [batch + rows] * 2]
    trace = trace if valid else (*trace, filled("normal", rows, 4 * units))
    kind, needs = data.draw(st.sampled_from([*FINITE, "some nan"])), data.draw(st.tuples(*[st.booleans()] * 6))
    gradients = [filled(kind, size, units) if data.draw(st.booleans()) else None for size in (rows, batch, batch)]

    def select(gates):
        assert isinstance(choice, PlainTopK)
        return InBlocks(TopK(choice.k, scope=choice.scope), 4 * choice.blocks).select(gates)

    def run(operation, change=lambda each: each):
        hits, kept = torch.zeros(units, dtype=torch.int64), torch.zeros(len(batch_sizes), dtype=torch.int64)
        tensors = [change(each) for each in (*trace, x, *weights, *gradients)]
        arguments = tuple(tensors[:3]), *tensors[3:6], batch_sizes, reverse, tuple(tensors[6:])
        return operation(*arguments, choice, select, needs, hits, kept), (hits.tolist(), kept.tolist())

    if not valid or not is_in_range(choice, units):
        with pytest.raises((ValueError, RuntimeError)):
            run(ops.lstm_backward)
        return
    found, counts = run(ops.lstm_backward)
    expected, expected_counts = run(ops.lstm_backward.literally)
    assert [one is not None for one in found] == list(needs)
    assume(all(run(ops.lstm_backward.literally, nearly)[1] == expected_counts for _ in range(4)))
    assert counts == expected_counts or any(map(has_denormals, (*trace, *gradients)))
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            largest = float(other.abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1e-30, largest), equal_nan=True)


# ---------------------------------------------------------------- rows of an optimizer's step


def written_by(op, run, shape, layout, kind, indices, every_row, decaying, shares, key=None, copying=False):
    """What a step writes: the parameter, its state and its copy. `shares` says what has the parameter's memory."""
    name, states, _ = OPS[op]
    at = torch.tensor(indices, dtype=torch.int64)
    tensors = [LAYOUTS[layout](filled(kind, *shape).abs()) for _ in range(1 + len(states))]
    if key is not None:
        tensors[1:] = [LAYOUTS[layout](each.bfloat16()) for each in tensors[1:]]
    values = LAYOUTS[layout](filled(kind, len(at), shape[1]))
    if shares == "gradient" and len(at) <= shape[0]:
        values = tensors[0][: len(at)]
    if shares == "state" and key is None:
        tensors[1:] = tensors[:1] * len(states)
    decays = {each: torch.linspace(0, 1, shape[0]) for each in states if decaying}
    rows = ops.GradientRows(at, values, every_row, decays)
    copy = LAYOUTS[layout](filled(kind, *shape).bfloat16()) if copying else None
    do_step(run(getattr(ops, name)), op, tensors, rows, key=key, copy=copy)
    return tensors if copy is None else [*tensors, copy]


@fuzz
@given(
    data=st.data(),
    op=st.sampled_from(sorted(OPS)),
    layout=st.sampled_from(sorted(set(LAYOUTS) - {"rows on top of one another"})),
    kind=st.sampled_from(CONTENTS),
    shares=st.sampled_from(["nothing", "nothing", "gradient", "state"]),
    key=st.none() | st.integers(0, 2**63 - 1),
    team=teams,
)
def test_rows_of_an_optimizers_step(level, team, data, op, layout, kind, shares, key):
    torch.set_num_threads(team)
    shape = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 40))
    indices = data.draw(st.lists(st.integers(-2, shape[0]), max_size=8))
    if data.draw(st.booleans()):
        indices = sorted({each for each in indices if 0 <= each < shape[0]})
    case = (
        shape,
        layout,
        kind,
        indices,
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        shares,
        key,
        data.draw(st.booleans()),
    )
    if not ops.ascending.literally(torch.tensor(indices, dtype=torch.int64), shape[0]):
        unchanged = []

        def refused(operation):
            def call(weight, *rest, **options):
                unchanged.extend([weight, weight.clone()])
                with pytest.raises((IndexError, RuntimeError)):
                    operation(weight, *rest, **options)

            return call

        written_by(op, refused, *case)
        assert torch.equal(bits(unchanged[0]), bits(unchanged[1]))
        return
    found = written_by(op, lambda operation: operation, *case)
    expected = written_by(op, lambda operation: operation.literally, *case)
    for one, other in zip(found, expected, strict=True):
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if key is None else {"rtol": 0, "atol": 0}
        if key is None and one.dtype == torch.bfloat16:  # of weights that differ by as much
            tolerance["rtol"] = 2**-7
        torch.testing.assert_close(one, other, **tolerance, equal_nan=True)


# ---------------------------------------------------------------- numbers that do not go together


class Wrong:
    """The extension, which is first called with one number after the other that is far too large or negative.

    All that is 4 or more, and below 1000, is such a number: the cases have no smaller sizes, and addresses are larger.
    """

    def __init__(self, extension):
        self.extension, self.refused = extension, 0

    def __getattr__(self, name):
        call = getattr(self.extension, name)

        def first_wrong(*arguments):
            for at, number in enumerate(arguments):
                if name in ("write_entries", "ascending") or not isinstance(number, int) or not 4 <= number < 1000:
                    continue
                for wrong in (-(2**63), -1, 2**62, 2**63 - 1):
                    with pytest.raises((ValueError, IndexError, MemoryError)):
                        call(*arguments[:at], wrong, *arguments[at + 1 :])
                    self.refused += 1
            return call(*arguments)

        return first_wrong


def calls_of_everything():
    """Calls of all entry points with sizes of 4 or more, and with k of 4 or more where not everything is in range."""
    grad, weight, x = torch.randn(9, 40), torch.randn(40, 7), torch.randn(9, 7)
    for scope in ("example", "batch"):
        ops.linear_backward(PlainTopK(4, scope, 5), grad, weight, x, True, False)
        selection = (ops.topk_rows if scope == "example" else ops.topk_columns)(grad, 4)
        ops.linear_backward(selection, grad, weight, x, True, False, torch.zeros(40, dtype=torch.int64))
    ops.column_scores(grad)
    for entries in (Entries("drawn", 2, key=torch.tensor(3)), Entries("largest", 2, exact_sum=True)):
        ops.linear_backward(ops.choose_entries(grad, entries), grad, weight, x, True, False)
        ops.entries_backward(entries, grad, weight, x, True)
    grad, weight, x = torch.randn(5, 6, 9, 11), torch.randn(6, 7, 4, 5), torch.randn(5, 7, 40, 50)
    kept = ops.topk_rows(ops.map_norms(grad), 4)
    moves = ((4, 4), (4, 5), (4, 4))  # 12 of 36 are left in the first dimension, 20 of 44 in the second
    ops.maps_backward(ops.kept_maps(kept, ops.map_norms(grad)), grad, x, weight, moves, (True, True))
    sizes, units, inputs = torch.tensor([6, 5, 4, 4]), 8, 7
    rest = torch.randn(19, inputs), torch.randn(4 * units, inputs), torch.randn(4 * units, units)
    *trace, h, c = ops.lstm_forward(*rest, torch.randn(4 * units), (torch.randn(6, units), None), sizes, False)
    for choice in (PlainTopK(4, "example"), PlainTopK(4, "batch"), Entries("drawn", 2, key=torch.tensor(3))):
        gradients = torch.randn(19, units), h, c
        ops.lstm_backward(tuple(trace), *rest, sizes, False, gradients, choice, everything, (True,) * 6)
    for op, every_row, key in product(OPS, (False, True), (None, 2**60)):
        case = (30, 20), "contiguous", "normal", [1, 5, 6, 9, 29], every_row, True, "nothing", key
        written_by(op, lambda operation: operation, *case)


def test_sizes_that_are_far_too_large_are_refused_before_memory_is_read(level, threads, monkeypatch):
    torch.set_num_threads(4)
    wrong = Wrong(native.extension())
    monkeypatch.setattr(native, "_extension", wrong)
    calls_of_everything()
    assert wrong.refused > 500
