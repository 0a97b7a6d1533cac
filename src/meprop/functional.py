"""Functions with an exact forward pass and a sparse backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import copies, ops
from meprop.errors import NotSupportedError
from meprop.rules import Rule
from meprop.selection import Activity, ColumnSelection

Decide = Callable[[Tensor, int, tuple[bool, bool, bool]], bool]
"""From output gradient [N, O], I, and whether input, weight and bias need gradients: is this pass to be sparse?"""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rule,
        sparse_grad: bool,
        decide: Decide | None,
        copy: Tensor | None,
        autocast: bool,
        activity: Activity | None,
    ) -> Tensor:
        """A copy of the weight stands for it in the forward product; in the backward ones as well under autocast."""
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.rule, ctx.sparse_grad, ctx.decide, ctx.activity = rule, sparse_grad, decide, activity
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        output = _product(x, weight, bias, copy, autocast)
        if copy is not None and autocast:
            x, weight = _cast(x, copy.dtype), copy
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.dtype = weight.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        x, weight = ctx.saved_tensors
        grad_output = grad_outputs[0].to(ctx.dtype)
        grad_NO, x_NI = _matrix(grad_output), None if x is None else _matrix(x).to(ctx.dtype)
        needs = ctx.needs_input_grad[:3]
        inputs = x_NI.shape[1] if x_NI is not None else weight.shape[1]
        if ctx.rule.count(grad_NO.shape[1]) < grad_NO.shape[1] and (
            ctx.decide is None or ctx.decide(grad_NO, inputs, needs)
        ):
            gradients = _sparse_backward(grad_NO, weight, x_NI, ctx.rule, needs[2], ctx.sparse_grad, ctx.activity)
        else:
            if ctx.activity is not None:
                ctx.activity.count(_everything(grad_NO))
            gradients = _dense_backward(grad_NO, weight, x_NI, needs[2])
        grad_x, grad_weight, grad_bias = gradients
        if grad_x is not None and grad_output.dim() != 2:
            grad_x = grad_x.view(*grad_output.shape[:-1], inputs)
        gradients = (grad_x, grad_weight, grad_bias)
        if any(dtype is not None and dtype != ctx.dtype for dtype in ctx.dtypes):
            gradients = [
                None if grad is None else grad.to(dtype) for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
            ]
        return *gradients, *[None] * 6


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor | None, autocast: bool) -> Tensor:
    """The forward product, with the copy of the weight if there is one; autocast leaves the output in its dtype."""
    if copy is None:
        return F.linear(x, weight, bias)
    output = F.linear(_cast(x, copy.dtype), copy, None if bias is None else _cast(bias, copy.dtype))
    return output if autocast else output.to(x.dtype)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotSupportedError(
            "create_graph=True: a sparse backward pass has no gradient of its own: what it left out has no graph. "
            "For this pass call meprop.revert(model), or use torch's own function."
        )


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor if tensor.dim() == 2 else tensor[None]


def _sparse_backward(
    grad_NO: Tensor,
    weight: Tensor | None,
    x_NI: Tensor | None,
    rule: Rule,
    needs_bias: bool,
    row_sparse: bool,
    activity: Activity | None,
) -> ops.Gradients:
    topk = rule.as_topk(grad_NO.shape[1]) if activity is None else None
    if topk is not None:
        return ops.topk_linear_backward(grad_NO, *topk, weight, x_NI, needs_bias=needs_bias, row_sparse=row_sparse)
    selection = rule.select(grad_NO)
    if activity is not None:
        activity.count(selection)
    return ops.linear_backward(selection, grad_NO, weight, x_NI, needs_bias=needs_bias, row_sparse=row_sparse)


def _everything(grad_NO: Tensor) -> ColumnSelection:
    outputs = grad_NO.shape[1]
    return ColumnSelection(grad_NO, torch.arange(outputs, dtype=torch.int32, device=grad_NO.device), outputs)


def _dense_backward(grad_NO: Tensor, weight: Tensor | None, x_NI: Tensor | None, needs_bias: bool) -> ops.Gradients:
    return (
        None if weight is None else grad_NO @ weight,
        None if x_NI is None else grad_NO.t() @ x_NI,
        grad_NO.sum(dim=0) if needs_bias else None,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rule: Rule,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x W^T + b, exactly; backwards, only what `rule` keeps of the output gradient g is propagated.

    With S the kept part of g: dx = S W, dW = S^T x (meProp, section 3.1); db is the sum of the whole g. Sums are formed
    in float32 (float64 for float64 tensors), and gradients have the dtype of the tensors. Under autocast, x, weight and
    bias are cast as torch does for its own linear, but of a float32 weight one bfloat16 copy is kept from call to call
    and renewed when the weight has changed (`meprop.copies`); a step of `meprop.optim` on a row-sparse gradient renews
    it by the way.

    Args:
        x: Input [*, I].
        weight: Weight [O, I].
        bias: Bias [O], or None.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        sparse_grad: Make weight.grad a sparse tensor of the kept rows, as `torch.nn.Embedding(sparse=True)` does. For
            rules that keep the same columns for the whole batch (scope "batch").
        compute_dtype: torch.bfloat16: form the forward product, the one that stays dense, in bfloat16, and give the
            output in the dtype of x; the backward pass is in the dtype of the tensors, as there casting gradients
            would cost more than it saves. Float64 stays float64; under autocast this has no say. None: no other dtype.

    Returns:
        Output [*, O], bit for bit `torch.nn.functional.linear`'s of the same dtypes.

    Raises:
        NotSupportedError: In the backward pass, with create_graph=True; under torch.compile, with sparse_grad.
        TypeError: `rule` is not a Rule, or weight is not of a floating dtype.
        ValueError: sparse_grad with a rule whose rows keep entries of their own; another compute_dtype.
    """
    check_rule(rule, sparse_grad, compute_dtype)
    return apply_linear(x, weight, bias, rule, sparse_grad, None, compute_dtype)


def apply_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: Rule,
    sparse_grad: bool,
    decide: Decide | None,
    compute_dtype: torch.dtype | None,
    activity: Activity | None = None,
) -> Tensor:
    """`linear` with checked arguments.

    `decide`, where given, is asked in the backward pass whether to be sparse; `activity`, where given, counts what that
    pass selects, also where it keeps everything.
    """
    if not weight.is_floating_point():
        raise TypeError(
            f"weight is of dtype {weight.dtype}; sparse back-propagation is for floating dtypes, not complex"
        )
    needs_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    is_sparse = needs_gradients and (activity is not None or rule.count(weight.shape[0]) < weight.shape[0])
    if is_sparse:
        _refuse_to_count_compiled(activity)
    if is_sparse and sparse_grad and torch.compiler.is_compiling():
        raise NotSupportedError(
            "sparse_grad=True: torch.compile has no sparse gradients; use sparse_grad=False with it"
        )
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else compute_dtype
    copy = None
    if dtype is not None and not torch.compiler.is_compiling() and copies.serves(weight, dtype):
        copy = copies.of(weight)
    elif dtype is not None and weight.dtype != torch.float64 and (not autocast or (is_sparse and sparse_grad)):
        copy = weight.detach().to(dtype)  # under autocast a cast would not take a sparse gradient back
    if autocast and (copy is None or (needs_gradients and not is_sparse)):
        copy, x, weight, bias = None, _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
    if is_sparse or (needs_gradients and copy is not None):
        return _Linear.apply(x, weight, bias, rule, sparse_grad, decide, copy, autocast, activity)  # pyright: ignore[reportReturnType]  (apply is untyped)
    return _product(x, weight, bias, copy, autocast)


def _refuse_to_count_compiled(activity: Activity | None) -> None:
    if activity is not None and torch.compiler.is_compiling():
        raise NotSupportedError(
            "a layer that a meprop.Simplifier watches counts in its backward pass, which torch.compile cannot trace; "
            "compile without fullgraph=True, or what Simplifier.compact() returns"
        )


def _autocast(tensor: Tensor) -> Tensor:
    """As torch casts the operands of its own linear."""
    return _cast(tensor, torch.get_autocast_dtype(tensor.device.type))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does not cast stays as it is, so that a product with it is refused."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


class _Lstm(torch.autograd.Function):
    """One layer in one direction. Half precision is widened: states and gates are float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        batch_sizes: Tensor,
        reverse: bool,
        rule: Rule,
        activity: Activity | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.rule, ctx.reverse, ctx.activity, ctx.dtype = rule, reverse, activity, x.dtype
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight_ih, weight_hh = x.to(dtype), weight_ih.to(dtype), weight_hh.to(dtype)
        h0, c0 = None if h0 is None else h0.to(dtype), None if c0 is None else c0.to(dtype)
        biases = [bias.to(dtype) for bias in (bias_ih, bias_hh) if bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        trace = ops.lstm_forward(x, weight_ih, weight_hh, bias, (h0, c0), batch_sizes, reverse)
        h, c, gates, h_n, c_n = trace
        ctx.save_for_backward(x, weight_ih, weight_hh, batch_sizes, h, c, gates)
        output = h[int(batch_sizes[0]) :]
        return output.to(ctx.dtype), h_n.to(ctx.dtype), c_n.to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        x, weight_ih, weight_hh, batch_sizes, *trace = ctx.saved_tensors
        grad_output, grad_h, grad_c = (None if grad is None else grad.to(x.dtype) for grad in grads)
        needs_x, needs_h0, needs_c0, needs_ih, needs_hh, *needs_biases = ctx.needs_input_grad[:7]
        needs = (needs_x, needs_ih, needs_hh, any(needs_biases), needs_h0, needs_c0)
        results = ops.lstm_backward(
            tuple(trace),
            x,
            weight_ih,
            weight_hh,
            batch_sizes,
            ctx.reverse,
            (grad_output, grad_h, grad_c),
            ctx.rule.as_topk(weight_hh.shape[1]),
            ctx.rule.select,
            needs,
            None if ctx.activity is None else ctx.activity.hits,
        )
        if ctx.activity is not None:
            ctx.activity.examples += len(x)
        grad_x, grad_ih, grad_hh, grad_bias, grad_h0, grad_c0 = (
            None if result is None else result.to(ctx.dtype) for result in results
        )
        # The two biases have the same gradient, but may not share its memory.
        grad_biases = [grad_bias if needed else None for needed in needs_biases]
        if all(needs_biases) and grad_bias is not None:
            grad_biases[1] = grad_bias.clone()
        return grad_x, grad_h0, grad_c0, grad_ih, grad_hh, *grad_biases, None, None, None, None


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    rule: Rule,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of an LSTM in one direction, exactly; backwards, only what `rule` keeps of each gate is propagated.

    At each time step `rule` chooses among the H entries of each of the four gates' gradients (before the activation):
    of each sequence, or, with scope "batch", for all sequences of the time step. With S the kept parts [n, 4H], the
    earlier output's gradient is S W_hh, dx = S W_ih, dW_ih = S^T x and dW_hh = S^T h (meProp, section 3; the choice per
    gate is ours, as the paper does not name the gates). The cells' own gradients are exact, a bias gets the sum of the
    whole gates' gradients. Arithmetic is float32 (float64 for float64 tensors). With k at or above H the gradients are
    the dense ones up to rounding. The output may not be changed in place, as the backward pass reads it.

    Args:
        x: Input [T, B, I], or, with `batch_sizes`, the packed rows [N, I] of sequences of different lengths, as in
            `torch.nn.utils.rnn.PackedSequence.data`.
        hx: Initial output and cell state, each [B, H]; None for zeros.
        weight_ih: Weight of the input [4H, I]; gates in torch's order: input, forget, cell, output.
        weight_hh: Weight of the earlier output [4H, H].
        bias_ih: Bias [4H], or None.
        bias_hh: Bias [4H], or None.
        rule: What to keep of each gate, e.g. `meprop.TopK(20)`.
        batch_sizes: Rows of each time step [T], int64 on the CPU, not increasing: `PackedSequence.batch_sizes`.
        reverse: Walk from the last time step to the first.

    Returns:
        Output [T, B, H] or [N, H], and the last output and cell state of each sequence, [B, H] each.

    Raises:
        NotSupportedError: In the backward pass, with create_graph=True.
        TypeError: `rule` is not a Rule, or the weights are not of a floating dtype.
        ValueError: A shape, dtype or device does not fit, or `batch_sizes` is not as said above.
    """
    check_rule(rule)
    if hx is not None and (not isinstance(hx, tuple) or len(hx) != 2):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("hx is a tuple of two tensors [B, H], the initial output and cell state, or None")
    if x.dim() != (3 if batch_sizes is None else 2):
        raise ValueError(f"x is {list(x.shape)}; it is [T, B, I] without batch_sizes, and [N, I] with them")
    if batch_sizes is not None:
        _check_batch_sizes(batch_sizes, len(x))
    elif x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x is {list(x.shape)} [T, B, I]; an LSTM needs at least one time step and one sequence")
    units, inputs, batch = weight_hh.shape[-1], x.shape[-1], x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    expected = [("weight_ih", weight_ih, (4 * units, inputs)), ("weight_hh", weight_hh, (4 * units, units))]
    expected += [
        (name, bias, (4 * units,)) for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)) if bias is not None
    ]
    expected += [("hx", state, (batch, units)) for state in (() if hx is None else hx)]
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; for H = {units}, I = {inputs}, B = {batch} it is {list(shape)}"
            )
    return apply_lstm(x, hx, (weight_ih, weight_hh, bias_ih, bias_hh), batch_sizes, reverse, rule)


def apply_lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    batch_sizes: Tensor | None,
    reverse: bool,
    rule: Rule,
    activity: Activity | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`lstm` with checked arguments; `activity`, where given, counts what the backward pass selects."""
    _refuse_to_count_compiled(activity)
    if not weights[0].is_floating_point():
        raise TypeError(f"the weights are of dtype {weights[0].dtype}; an LSTM's are of a floating dtype")
    tensors = (x, *((None, None) if hx is None else hx), *weights)
    if torch.is_autocast_enabled(x.device.type):
        tensors = tuple(None if tensor is None else _autocast(tensor) for tensor in tensors)
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"x, states, weights and biases must be of one dtype and on one device; they are {found}")
    rows, *others = tensors
    assert rows is not None
    sizes = torch.full((x.shape[0],), x.shape[1], device="cpu") if batch_sizes is None else batch_sizes.contiguous()
    output, h_n, c_n = _Lstm.apply(_matrix(rows), *others, sizes, reverse, rule, activity)  # pyright: ignore[reportGeneralTypeIssues]
    return output if batch_sizes is not None else output.view(*x.shape[:2], -1), (h_n, c_n)


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    valid = (
        batch_sizes.dim() == 1
        and batch_sizes.dtype == torch.int64
        and batch_sizes.is_cpu
        and len(batch_sizes) > 0
        and bool((batch_sizes > 0).all())
        and bool((batch_sizes.diff() <= 0).all())
        and int(batch_sizes.sum()) == rows
    )
    if not valid:
        raise ValueError(
            f"batch_sizes is {batch_sizes!r}; it is [T], int64, on the CPU, positive, not increasing, with the sum "
            f"{rows}, the rows of x"
        )


def check_rule(rule: Rule, sparse_grad: bool = False, compute_dtype: torch.dtype | None = None) -> None:
    """Raises the errors of `linear` that concern the rule and what goes with it."""
    if compute_dtype not in (None, torch.bfloat16):
        raise ValueError(f"compute_dtype={compute_dtype!r}; it is torch.bfloat16 or None")
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers without a type checker)
        raise TypeError(f"rule={rule!r} is of type {type(rule).__name__}; it must be a rule such as meprop.TopK(0.05)")
    if sparse_grad and getattr(rule, "scope", "batch") != "batch":
        raise ValueError(f"sparse_grad=True with {rule}: rows are kept or left as a whole only by scope='batch'")
