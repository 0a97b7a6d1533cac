"""Functions with an exact forward pass and a sparse backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from meprop import copies, ops
from meprop.errors import NotSupportedError
from meprop.policy import Activity
from meprop.rules import Rule
from meprop.selection import ColumnSelection, RowSelection

Decide = Callable[[Tensor, int, tuple[bool, bool, bool]], bool]
"""From output gradient [N, O], I, and whether input, weight and bias need gradients: is this pass to be sparse?"""

_Numbers = int | tuple[int, ...]
"""One for all spatial dimensions, or one for each."""


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
    positions: int = 1,
) -> ops.Gradients:
    """Rows come as so many positions of each example."""
    if activity is None or positions == 1:
        choice, hits = rule.as_topk(grad_NO.shape[1]) or rule.select(grad_NO), None
        if activity is not None:
            hits = activity.hits
            activity.examples += len(grad_NO)
    else:
        choice, hits = rule.select(grad_NO), None
        activity.count(choice, positions)
    return ops.linear_backward(choice, grad_NO, weight, x_NI, needs_bias=needs_bias, row_sparse=row_sparse, hits=hits)


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
        NotSupportedError: In the backward pass, with create_graph=True; under torch.compile, or in
            DistributedDataParallel, with sparse_grad; a weight that is a DTensor (tensor parallelism).
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
        _refuse_what_is_compiled(activity, sparse_grad)
        _refuse_distributed(weight, sparse_grad)
    autocast = is_autocast(x)
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


def _refuse_distributed(weight: Tensor, sparse_grad: bool) -> None:
    if torch.compiler.is_compiling():
        return
    if type(weight) not in (Tensor, torch.nn.Parameter) and hasattr(weight, "device_mesh"):
        raise NotSupportedError(
            "the weight is a DTensor, of tensor parallelism, or of fully_shard outside of the module's forward pass; "
            "sparse back-propagation takes whole weights: keep such a layer torch's own"
        )
    if sparse_grad and DistributedDataParallel._get_active_ddp_module() is not None:  # pyright: ignore[reportPrivateUsage]
        raise NotSupportedError(
            "sparse_grad=True in DistributedDataParallel, which takes dense gradients only; use sparse_grad=False with "
            "meprop.distributed.row_sparse_hook, or leave the model unwrapped and call "
            "meprop.distributed.average_gradients after backward()"
        )


def _refuse_what_is_compiled(activity: Activity | None, sparse_grad: bool = False) -> None:
    if not torch.compiler.is_compiling():
        return
    if sparse_grad:
        raise NotSupportedError(
            "sparse_grad=True: torch.compile has no sparse gradients; use sparse_grad=False with it"
        )
    if activity is not None:
        raise NotSupportedError(
            "a layer that a meprop.Simplifier watches counts in its backward pass, which torch.compile cannot trace; "
            "compile without fullgraph=True, or what Simplifier.compact() returns"
        )


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device, of which there are some that it does not know ("meta")."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(tensor: Tensor) -> Tensor:
    """As torch casts the operands of its own linear."""
    return _cast(tensor, torch.get_autocast_dtype(tensor.device.type))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does not cast stays as it is, so that a product with it is refused."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input: a number for each spatial dimension. It pads with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution's output, torch's own."""
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, self._zeros, 1)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> ops.Gradients:
        """Of input, weight and bias, where they are needed: torch's own."""
        bias_sizes = [grad.shape[1]]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, bias_sizes, self.stride, self.padding, self.dilation, False, self._zeros, 1, needs
        )

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether it is a linear map of each position."""
        return is_pointwise(weight.shape[2:], self.stride, self.padding)

    @property
    def _zeros(self) -> tuple[int, ...]:
        return (0,) * len(self.stride)


def is_pointwise(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution is a linear map of each position."""
    return {*kernel, *stride} == {1} and not any(padding)


def why_not_sparse(rule: Rule, pointwise: bool, groups: int) -> str | None:
    """Why a convolution cannot back-propagate what this rule keeps; None if it can."""
    if groups != 1:
        return (
            f"groups={groups}: a group's inputs get their gradient from its own outputs alone, so that groups without "
            "a kept channel would pass nothing back"
        )
    if rule.scope not in (None, "batch") and not pointwise:
        return (
            f"{rule} keeps entries of their own at each position, for which the input's windows would have to be laid "
            "out one by one; use scope='batch'"
        )
    return None


DecideConvolution = Callable[[Tensor, torch.Size, Geometry, tuple[bool, bool, bool]], bool]
"""As `Decide`, from output gradient [N, O, *S], the input's shape, and how the convolution moves."""


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        rule: Rule,
        sparse_grad: bool,
        decide: DecideConvolution | None,
        dtype: torch.dtype | None,
        autocast: bool,
        activity: Activity | None,
    ) -> Tensor:
        """The forward product is formed in `dtype`, if there is one; under autocast the backward ones as well."""
        ctx.geometry, ctx.rule, ctx.sparse_grad = geometry, rule, sparse_grad
        ctx.decide, ctx.activity = decide, activity
        ctx.shape, ctx.memory_format = x.shape, ops.memory_format(x)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        operands = (x, weight, bias)
        if dtype is not None:
            operands = (_cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype))
        output = geometry.output(*operands)
        if autocast:
            x, weight, _ = operands
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return output if autocast else output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        x, weight = ctx.saved_tensors
        grad, geometry, needs = grad_outputs[0].to(weight.dtype), ctx.geometry, ctx.needs_input_grad[:3]
        if x is None:  # only its sizes and its memory format are asked for
            x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        x = x.to(grad.dtype)
        outputs = grad.shape[1]
        if ctx.rule.count(outputs) < outputs and (ctx.decide is None or ctx.decide(grad, ctx.shape, geometry, needs)):
            backward = _pointwise_backward if geometry.is_pointwise(weight) else _channels_backward
            gradients = backward(geometry, grad, x, weight, needs, ctx.rule, ctx.sparse_grad, ctx.activity)
        else:
            if ctx.activity is not None:
                ctx.activity.count(_everything(_positions(grad)), grad.shape[2:].numel())
            gradients = geometry.gradients(grad, x, weight, needs)
        return *(
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ), *[None] * 7


def _positions(tensor: Tensor) -> Tensor:
    """[N, C, *S] as a matrix with a row for each position of each example."""
    return tensor.movedim(1, -1).flatten(0, -2)


def _channels(selection: ColumnSelection, grad: Tensor) -> Tensor:
    """Kept columns of the positions of grad [N, O, *S] as channels [N, k, *S]."""
    return selection.values.reshape(len(grad), *grad.shape[2:], len(selection.indices)).movedim(-1, 1)


def _pointwise_backward(
    _geometry: Geometry,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
    rule: Rule,
    row_sparse: bool,
    activity: Activity | None,
) -> ops.Gradients:
    """Of a convolution that is a linear map of each position."""
    weight_OI, x_NI = weight.flatten(1) if needs[0] else None, _positions(x) if needs[1] else None
    positions = grad.shape[2:].numel()
    grad_x, grad_weight, grad_bias = _sparse_backward(
        _positions(grad), weight_OI, x_NI, rule, needs[2], row_sparse, activity, positions
    )
    if grad_x is not None:
        grad_x = grad_x.reshape(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
    if grad_weight is not None and row_sparse:  # a sparse tensor has no view
        indices, rows = grad_weight.indices()[0], grad_weight.values()
        grad_weight = ops.row_sparse_tensor(indices, rows.reshape(-1, *weight.shape[1:]), len(weight))
    elif grad_weight is not None and weight.is_contiguous():  # also of a kernel of 1 in channels_last
        grad_weight = grad_weight.as_strided(weight.shape, weight.stride())
    elif grad_weight is not None:
        grad_weight = grad_weight.reshape(weight.shape)
    return grad_x, grad_weight, grad_bias


def _channels_backward(
    geometry: Geometry,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
    rule: Rule,
    row_sparse: bool,
    activity: Activity | None,
) -> ops.Gradients:
    """By the smaller convolution that has the kept channels only."""
    outputs = grad.shape[1]
    topk = rule.as_topk(outputs)
    if topk is not None and topk[1:] == ("batch", 1):
        kept, indices = ops.topk_channels(grad, topk[0])
    else:
        selection = rule.select(_positions(grad))
        if isinstance(selection, RowSelection):
            raise NotSupportedError(f"{rule} chooses anew at each position, which goes for pointwise convolutions only")
        kept, indices = _channels(selection, grad), selection.indices
    if activity is not None:
        activity.count(ColumnSelection(_positions(kept), indices, outputs), grad.shape[2:].numel())
    weight_rows = weight.index_select(0, indices)
    grad_x, grad_rows, _ = geometry.gradients(kept, x, weight_rows, (needs[0], needs[1], False))
    grad_weight = grad_rows
    if grad_rows is not None and row_sparse:
        grad_weight = ops.row_sparse_tensor(indices, grad_rows, outputs)
    elif grad_rows is not None:
        grad_weight = torch.zeros_like(weight).index_copy_(0, indices.long(), grad_rows)
    return grad_x, grad_weight, grad.sum(dim=[0, *range(2, grad.dim())]) if needs[2] else None


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    rule: Rule,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.conv1d`, exactly; backwards as `conv2d`, with one spatial dimension."""
    moves = (stride, padding, dilation)
    return _convolution(1, input, weight, bias, moves, groups, rule, sparse_grad, compute_dtype)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    rule: Rule,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d`, exactly; backwards, only what `rule` keeps of the output gradient g is propagated.

    A row of the matrix from which a rule selects is one position of one example, a column an output channel. With
    scope "batch" the k channels with the largest sums of |g| over batch and positions are kept: the gradients of input
    and weight are those of the smaller convolution that has these channels only (meProp's simple unified top-k, section
    3.4, where a feature is a channel). With scope "example" k entries are kept at each position, for pointwise
    convolutions: kernel 1, stride 1, no padding. The bias gets the sum of the whole g. In `channels_last` the pass
    stays in `channels_last`.

    Args:
        input: Input [N, I, H, W] or [I, H, W].
        weight: Weight [O, I, KH, KW].
        bias: Bias [O], or None.
        stride: As torch's.
        padding: As torch's: numbers, "same" or "valid".
        dilation: As torch's.
        groups: 1.
        rule: What to keep, e.g. `meprop.TopK(0.1, scope="batch")`.
        sparse_grad: Make weight.grad a sparse tensor of the kept channels' rows; see `linear`.
        compute_dtype: torch.bfloat16: form the forward product in bfloat16; see `linear`. No copy of the weight is
            kept: casting it is little beside the product.

    Returns:
        Output [N, O, *, *] or [O, *, *], bit for bit torch's of the same dtypes.

    Raises:
        NotSupportedError: groups above 1, or scope "example" for a convolution that is not pointwise
            (docs/convolution.md says why); in the backward pass, with create_graph=True; under torch.compile, with
            sparse_grad.
        TypeError: `rule` is not a Rule, or weight is not of a floating dtype.
        ValueError: sparse_grad with a rule whose rows keep entries of their own; another compute_dtype; another
            number of dimensions; a padding that torch does not know.
    """
    moves = (stride, padding, dilation)
    return _convolution(2, input, weight, bias, moves, groups, rule, sparse_grad, compute_dtype)


def _convolution(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moves: tuple[_Numbers, _Numbers | str, _Numbers],
    groups: int,
    rule: Rule,
    sparse_grad: bool,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    check_rule(rule, sparse_grad, compute_dtype)
    if weight.dim() != dims + 2:
        raise ValueError(f"weight is {list(weight.shape)}; that of a conv{dims}d has {dims + 2} dimensions")
    x, geometry = padded(x, weight.shape[2:], *moves)
    reason = why_not_sparse(rule, geometry.is_pointwise(weight), groups)
    if reason is not None:
        raise NotSupportedError(reason)
    return apply_convolution(x, weight, bias, geometry, rule, sparse_grad, None, compute_dtype)


def apply_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    rule: Rule,
    sparse_grad: bool,
    decide: DecideConvolution | None,
    compute_dtype: torch.dtype | None,
    activity: Activity | None = None,
) -> Tensor:
    """`conv2d` with checked arguments, of any number of dimensions; `decide` and `activity` as of `apply_linear`."""
    if not weight.is_floating_point():
        raise TypeError(
            f"weight is of dtype {weight.dtype}; sparse back-propagation is for floating dtypes, not complex"
        )
    needs_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    is_sparse = needs_gradients and (activity is not None or rule.count(len(weight)) < len(weight))
    if is_sparse:
        _refuse_what_is_compiled(activity, sparse_grad)
        _refuse_distributed(weight, sparse_grad)
    autocast = is_autocast(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else compute_dtype
    unbatched = x.dim() == weight.dim() - 1
    batch = x[None] if unbatched else x
    if not is_sparse and (autocast or dtype is None):
        if autocast:
            batch, weight, bias = _autocast(batch), _autocast(weight), None if bias is None else _autocast(bias)
        output = geometry.output(batch, weight, bias)
    else:
        output: Tensor = _Convolution.apply(  # pyright: ignore[reportAssignmentType]  (apply is untyped)
            batch, weight, bias, geometry, rule, sparse_grad, decide, dtype, autocast, activity
        )
    return output[0] if unbatched else output


def padded(
    x: Tensor, kernel: torch.Size, stride: _Numbers, padding: _Numbers | str, dilation: _Numbers
) -> tuple[Tensor, Geometry]:
    """What a convolution moves over, and how; padded already where one side gets more than the other."""
    stride, dilation = _each(stride, kernel), _each(dilation, kernel)
    if padding == "same":
        if {*stride} != {1}:
            raise ValueError(f"padding='same' with stride={stride}; it is for a stride of 1")
        both = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in both):
            x = F.pad(x, [side for total in reversed(both) for side in (0, total % 2)])
        padding = tuple(total // 2 for total in both)
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f"padding={padding!r}; it is 'same', 'valid', or numbers")
    return x, Geometry(stride, _each(padding, kernel), dilation)


def _each(value: _Numbers, kernel: torch.Size) -> tuple[int, ...]:
    """A number for each spatial dimension."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


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
        NotSupportedError: In the backward pass, with create_graph=True; a rule by which several processes choose
            together.
        TypeError: `rule` is not a Rule, or the weights are not of a floating dtype.
        ValueError: A shape, dtype or device does not fit, or `batch_sizes` is not as said above.
    """
    check_lstm_rule(rule)
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
    _refuse_what_is_compiled(activity)
    if not weights[0].is_floating_point():
        raise TypeError(f"the weights are of dtype {weights[0].dtype}; an LSTM's are of a floating dtype")
    tensors = (x, *((None, None) if hx is None else hx), *weights)
    if is_autocast(x):
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


def check_lstm_rule(rule: Rule) -> None:
    """Raises the errors of `lstm` that concern the rule."""
    check_rule(rule)
    if rule.communicates:
        raise NotSupportedError(
            f"{rule} of an LSTM would have to wait for other processes at each time step; use meprop.TopK for it"
        )


def check_rule(rule: Rule, sparse_grad: bool = False, compute_dtype: torch.dtype | None = None) -> None:
    """Raises the errors of `linear` that concern the rule and what goes with it."""
    if compute_dtype not in (None, torch.bfloat16):
        raise ValueError(f"compute_dtype={compute_dtype!r}; it is torch.bfloat16 or None")
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers without a type checker)
        raise TypeError(f"rule={rule!r} is of type {type(rule).__name__}; it must be a rule such as meprop.TopK(0.05)")
    if sparse_grad and rule.scope not in (None, "batch"):
        raise ValueError(f"sparse_grad=True with {rule}: rows are kept or left as a whole only by scope='batch'")
