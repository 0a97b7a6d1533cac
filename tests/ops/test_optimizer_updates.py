"""Updates of rows of a parameter: the native ones against the reference, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from meprop import ops, optim
from meprop.ops import GradientProduct, GradientRows, native, reference
from meprop.ops.rounding import key_of
from meprop.selection import Entries, RowSelection, columns_with_entries
from optimizer_cases import OPS, ROWS, WIDTH, do_step, sparse


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("missed_steps", [False, True])
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 16), (33, 100), (300, 257), (3, 0)])
@pytest.mark.parametrize("op", OPS)
def test_native_updates_are_the_references_in_float64(level, op, shape, every_row, missed_steps):
    name, states, _ = OPS[op]
    generator = torch.Generator().manual_seed(0)
    rows = shape[0]
    for count in {0, 1, rows // 3, rows}:
        indices = torch.randperm(rows, generator=generator)[:count].sort().values
        grad = torch.randn((count, shape[1]), generator=generator)
        tensors = [torch.randn(shape, generator=generator).abs() for _ in range(1 + len(states))]
        decaying = [*states, *(["param"] if op == "adamw" else [])] if missed_steps else []
        decays = {each: torch.rand(rows, generator=generator) for each in decaying}
        wide, wide_decays = [tensor.double() for tensor in tensors], {each: decays[each].double() for each in decays}
        updated = GradientRows(indices, grad, every_row, decays)
        do_step(getattr(ops.backend("native"), name), op, tensors, updated)
        oracle = GradientRows(indices, grad.double(), every_row, wide_decays)
        do_step(getattr(reference, name), op, wide, oracle)
        for found, expected in zip(tensors, wide, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


KEY = key_of(7)


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("missed_steps", [False, True])
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 16), (33, 100), (300, 257), (3, 0)])
@pytest.mark.parametrize("op", OPS)
def test_native_updates_of_states_in_bfloat16_are_the_references_bits(level, op, shape, every_row, missed_steps):
    name, states, _ = OPS[op]
    generator = torch.Generator().manual_seed(0)
    rows = shape[0]
    for count in (None, 0, 1, rows // 3, rows):
        indices = None if count is None else torch.randperm(rows, generator=generator)[:count].sort().values
        grad = torch.randn((rows if count is None else count, shape[1]), generator=generator)
        weight = torch.randn(shape, generator=generator)
        of_states = [torch.randn(shape, generator=generator).abs().bfloat16() for _ in states]
        decaying = [*states, *(["param"] if op == "adamw" else [])] if missed_steps and count is not None else []
        decays = {each: torch.rand(rows, generator=generator) for each in decaying}
        updated = GradientRows(indices, grad, every_row or count is None, decays)
        sides = [[each.clone() for each in (weight, *of_states)] for _ in range(2)]
        do_step(getattr(ops.backend("native"), name), op, sides[0], updated, key=KEY)
        do_step(getattr(ops, name).literally, op, sides[1], updated, key=KEY)
        for found, expected in zip(*sides, strict=True):
            assert torch.equal(found, expected)


ODD = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40, -1.7])
"""Weights whose rounding is special: ties, NaN, the largest numbers, denormal ones."""


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("kind", ["whole", "rows", "every row", "product"])
@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("op", OPS)
def test_a_copy_is_the_new_parameter_rounded_to_the_nearest(level, op, key, kind):
    name, states, _ = OPS[op]
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (7, 5), (9, 33), (5, 2 * len(ODD))):
        weight = torch.randn(shape, generator=generator)
        if shape[1] == 2 * len(ODD):
            weight[:] = ODD.repeat(2)
        moving = torch.arange(0, shape[0], 2)
        if kind == "product":
            product = selected(6, shape[0], "k of each row", generator)
            gradient = GradientProduct(product, torch.randn((6, shape[1]), generator=generator))
        elif kind == "whole":
            gradient = GradientRows(None, torch.zeros(shape), True)
        else:
            gradient = GradientRows(moving, torch.zeros((len(moving), shape[1])), kind == "every row")
        of_states = [torch.rand(shape, generator=generator) for _ in states]
        tensors = [weight, *(each if key is None else each.bfloat16() for each in of_states)]
        sides = [[each.clone() for each in tensors] for _ in range(2)]
        copies = [torch.full(shape, 7.0).bfloat16() for _ in sides]
        update = getattr(ops.backend("native"), name)
        do_step(update, op, sides[0], gradient, key=key, copy=copies[0])
        do_step(getattr(ops, name).literally, op, sides[1], gradient, key=key, copy=copies[1])
        for side, copy in zip(sides, copies, strict=True):
            expected = side[0].bfloat16()
            if kind == "rows":
                expected[1::2] = 7.0
            torch.testing.assert_close(copy, expected, rtol=0, atol=0, equal_nan=True)


def selected(rows, width, kind, generator):
    """A selection [rows, width] of each kind of entries by row, and a few of its rows empty."""
    grad = torch.randn((rows, width), generator=generator)
    if kind == "k of each row":
        return ops.topk_rows(grad, max(1, width // 5))
    grad[::3] *= 1e-3
    return ops.choose_entries(grad, Entries("largest", max(1, width // 5), exact_sum=kind == "with an exact sum"))


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("kind", ["k of each row", "of all rows", "with an exact sum"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (40, 33, 65), (64, 20, 257), (300, 50, 100), (9, 130, 1030)])
@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("op", OPS)
def test_a_product_updates_as_the_gradient_that_it_is_bit_for_bit(level, op, sizes, kind, key):
    """Each weight once, wherever panels of the product overlap; and it is the reference's in float64."""
    name, states, _ = OPS[op]
    (rows, outputs, inputs), generator = sizes, torch.Generator().manual_seed(0)
    product = GradientProduct(
        selected(rows, outputs, kind, generator), torch.randn((rows, inputs), generator=generator)
    )
    tensors = [torch.randn((outputs, inputs), generator=generator).abs() for _ in range(1 + len(states))]
    if key is not None:
        tensors[1:] = [each.bfloat16() for each in tensors[1:]]
    formed, wide = [each.clone() for each in tensors], [each.double() for each in tensors]
    version = tensors[0]._version
    update = getattr(ops.backend("native"), name)
    do_step(update, op, tensors, product, key=key)
    do_step(update, op, formed, GradientRows(None, product.formed(), True), key=key)
    do_step(getattr(reference, name), op, wide, GradientRows(None, product.formed().double(), True))
    for found, expected, oracle in zip(tensors, formed, wide, strict=True):
        assert torch.equal(found, expected)
        rtol = 1e-5 if found.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found.double(), oracle, rtol=rtol, atol=1e-6)
    assert tensors[0]._version > version


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("missed_steps", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 70, 3), (40, 330, 65), (64, 200, 257), (9, 1300, 130), (3, 8, 0)])
@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("op", OPS)
def test_a_product_of_rows_updates_these_rows_only(level, op, sizes, key, missed_steps):
    name, states, _ = OPS[op]
    (rows, outputs, inputs), generator = sizes, torch.Generator().manual_seed(0)
    kept = ops.choose_entries(torch.randn((rows, outputs), generator=generator), Entries("largest", 1))
    indices = columns_with_entries(kept)
    decaying = [*states, *(["param"] if op == "adamw" else [])] if missed_steps else []
    decays = {each: torch.rand(outputs, generator=generator) for each in decaying}
    product = GradientProduct(kept, torch.randn((rows, inputs), generator=generator), indices, decays)
    tensors = [torch.randn((outputs, inputs), generator=generator).abs() for _ in range(1 + len(states))]
    if key is not None:
        tensors[1:] = [each.bfloat16() for each in tensors[1:]]
    before, formed, literal = ([each.clone() for each in tensors] for _ in range(3))
    update = getattr(ops.backend("native"), name)
    do_step(update, op, tensors, product, key=key)
    gradient = GradientRows(indices, product.formed()._values(), False, decays)
    do_step(update, op, formed, gradient, key=key)
    do_step(getattr(ops, name).literally, op, literal, product, key=key)
    others = torch.ones(outputs, dtype=torch.bool).index_fill_(0, indices, False)
    for found, expected, oracle, old in zip(tensors, formed, literal, before, strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(found[others], old[others])
        torch.testing.assert_close(found, oracle, rtol=1e-4 if found.dtype == torch.float32 else 2**-7, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_a_product_without_a_row_moves_nothing(level, op):
    name, states, _ = OPS[op]
    nothing = ops.choose_entries(torch.zeros(4, 6), Entries("noise", share=0.5, key=torch.tensor(1)))
    product = GradientProduct(nothing, torch.randn(4, 5), columns_with_entries(nothing))
    assert len(product.indices) == 0
    for run in (getattr(ops, name), getattr(ops, name).literally):
        tensors = [torch.ones(6, 5) for _ in range(1 + len(states))]
        do_step(run, op, tensors, product)
        assert all(each.eq(1).all() for each in tensors)


@pytest.mark.parametrize("rows", [0, 2, 7])
def test_a_product_whose_decays_are_of_other_rows_is_refused(rows):
    kept = ops.choose_entries(torch.randn(4, 6), Entries("largest", 1))
    decays = {"momentum_buffer": torch.ones(rows)}
    product = GradientProduct(kept, torch.randn(4, 5), columns_with_entries(kept), decays)
    _, _, options = OPS["momentum"]
    with pytest.raises(ValueError, match=rf"its state \[\[6, 5\], \[{rows}\]\]"):
        ops.sgd_rows(torch.ones(6, 5), torch.ones(6, 5), product, **options)


def test_a_product_with_rows_that_the_parameter_has_not_is_refused():
    kept = ops.choose_entries(torch.randn(4, 6), Entries("largest", 1))
    for indices in ([5, 6], [1, 0], [-1, 2]):
        weight = torch.ones(6, 5)
        rows = GradientProduct(RowSelection(kept.values, kept.indices % 2, 6, starts=kept.starts), torch.randn(4, 5))
        rows = replace(rows, indices=torch.tensor(indices))
        with pytest.raises(IndexError):
            ops.adagrad_rows(weight, weight.clone(), rows, lr=1.0, eps=1.0, weight_decay=0.0)
        assert weight.eq(1).all()


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("of_product", [True, False])
def test_the_number_of_threads_changes_no_bit_of_a_whole_step(of_product):
    generator = torch.Generator().manual_seed(0)
    product = GradientProduct(selected(64, 300, "of all rows", generator), torch.randn((64, 500), generator=generator))
    gradient = product if of_product else GradientRows(None, product.formed(), True)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        tensors = [torch.ones(300, 500) for _ in range(3)]
        torch.set_num_threads(threads)
        try:
            ops.adam_rows(*tensors, None, gradient, 3.0, **OPS["adam"][2])
        finally:
            torch.set_num_threads(before)
        results.append(torch.stack(tensors))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_product_of_another_shape_is_refused_before_memory_is_touched():
    product = GradientProduct(ops.topk_rows(torch.randn(4, 6), 2), torch.randn(4, 5))
    for shape in ((6, 4), (5, 5)):
        weight = torch.zeros(shape)
        with pytest.raises(ValueError, match="new optimizer"):
            ops.adagrad_rows(weight, weight.clone(), product, lr=1.0, eps=1.0, weight_decay=0.0)
        assert not weight.any()


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
def test_the_number_of_threads_changes_no_bit():
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            generator = torch.Generator().manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(500, 300, generator=generator))]
            optimizer = optim.Adam(params)
            for _ in range(3):
                indices = torch.randperm(500, generator=generator)[:50].sort().values.tolist()
                params[0].grad = sparse(torch.randn(50, 300, generator=generator), indices, 500)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        results.append(params[0].detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("indices", [[-1, 3], [3, ROWS], [4, 4], [5, 2]])
def test_native_code_refuses_rows_that_are_not_there(indices):
    weight = torch.zeros(ROWS, WIDTH)
    rows = GradientRows(torch.tensor(indices), torch.ones(2, WIDTH))
    with pytest.raises(IndexError, match="ascend"):
        ops.backend("native").adagrad_rows(weight, weight.clone(), rows, lr=1.0, eps=1.0, weight_decay=0.0)
    assert not weight.any()


@pytest.mark.parametrize("what", ["gradient", "state", "decay"])
def test_shapes_that_do_not_fit_are_refused_before_memory_is_touched(what):
    weight, buffer, values, decay = torch.ones(4, 6), torch.ones(4, 6), torch.ones(1, 6), torch.zeros(4)
    if what == "gradient":
        values = torch.ones(1, 5)
    if what == "state":
        buffer = torch.ones(3, 6)
    if what == "decay":
        decay = torch.zeros(3)
    options = {"lr": 1.0, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    rows = GradientRows(torch.tensor([1]), values, decays={"momentum_buffer": decay})
    with pytest.raises(ValueError, match=r"do not go with a parameter \[4, 6\]"):
        ops.sgd_rows(weight, buffer, rows, **options)
    assert torch.equal(weight, torch.ones(4, 6))
