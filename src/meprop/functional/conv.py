"""Convolutions with an exact forward pass and a sparse backward pass.

A rule keeps channels, maps of an example and a channel, or entries of each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meprop import ops, speed
from meprop.errors import NotSupportedError
from meprop.functional.common import (
    cast_operands,
    check_tensors,
    dtypes_of,
    in_dtypes,
    no_view,
    product_dtype,
    sparse_backward,
)
from meprop.functional.geometry import Geometry, Numbers, padded
from meprop.functional.maps import gradients_of_maps
from meprop.policy import Policy, needs_gradients, refuse_dtype, refuse_transforms, refuse_transforms_of_backward
from meprop.profiles import labelled
from meprop.rules import Rule
from meprop.selection import ColumnSelection, WholeRows, everything


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    rule: Rule,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.conv1d` with the backward pass of `conv2d` in one spatial dimension."""
    moves = (stride, padding, dilation)
    return _convolution(1, input, weight, bias, moves, groups, Policy(rule, sparse_grad, compute_dtype))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    rule: Rule,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d` with an exact forward pass and a sparse backward pass.

    Only what `rule` keeps of the output gradient g is propagated. A rule selects from a matrix. Each row of the matrix
    is one position of one example, and each column is an output channel.

    With scope "batch" the k channels with the largest sums of |g| over batch and positions are kept. The gradients of
    input and weight are those of the smaller convolution that has only these channels. This is meProp's simple unified
    top-k (section 3.4), where a feature is a channel.

    With scope "global" maps are kept. A map is what one example and one output channel have of g. The rule sees the
    norms of the maps [N, O] as if they were entries. A map that it keeps as it is stays as it is. A map whose norm it
    changes is scaled to that norm. So `Sampled` draws maps without bias, under its budget of noise. With `exact_sum`
    all examples get in addition the batch's mean of what is left out.

    With scope "rows" whole examples are drawn, and the gradients are those of the same convolution of these. Within a
    `PerProduct` positions are drawn.

    With scope "example" k entries are kept at each position. This is for pointwise convolutions, which have kernel 1,
    stride 1 and no padding. Scope "global" keeps entries of all positions in these.

    The bias gets the sum of the whole g. A pass whose tensors are in `channels_last` stays in `channels_last`.

    Args:
        input: Input [N, I, H, W] or [I, H, W].
        weight: Weight [O, I, KH, KW].
        bias: Bias [O], or None.
        stride: The same as torch's.
        padding: The same as torch's: numbers, "same" or "valid".
        dilation: The same as torch's.
        groups: It has to be 1.
        rule: What to keep, e.g. `meprop.TopK(0.1, scope="batch")`.
        sparse_grad: Make weight.grad a sparse tensor of the kept channels' rows. See `linear`. With
            maps it stays dense.
        compute_dtype: torch.bfloat16 forms the forward product in bfloat16. See `linear`.

    Returns:
        Output [N, O, *, *] or [O, *, *], which equals torch's of the same dtypes bit for bit.

    Raises:
        NotSupportedError: `groups` is above 1, or scope "example" or a `PerProduct` is used with a convolution that is
            not pointwise (docs/convolution.md says why). Or the backward pass is called with create_graph=True, or
            `sparse_grad` or maps of another rule than `TopK` and `Sampled` are used under torch.compile.
        TypeError: `rule` is not a Rule, input, weight or bias is not a tensor, or weight is not of a floating dtype.
        ValueError: `sparse_grad` is used with scope "example" or an exact sum, `compute_dtype` is not torch.bfloat16 or
            None, the weight has another number of dimensions, or torch does not know the padding.
    """
    moves = (stride, padding, dilation)
    return _convolution(2, input, weight, bias, moves, groups, Policy(rule, sparse_grad, compute_dtype))


def _convolution(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moves: tuple[Numbers, Numbers | str, Numbers],
    groups: int,
    policy: Policy,
) -> Tensor:
    check_tensors(input=x, weight=weight, bias=bias)
    if weight.dim() != dims + 2:
        raise ValueError(f"weight is {list(weight.shape)}; that of a conv{dims}d has {dims + 2} dimensions")
    x, geometry = padded(x, weight.shape[2:], *moves)
    reason = why_not_sparse(policy.rule, geometry.is_pointwise(weight), groups)
    if reason is not None:
        raise NotSupportedError(reason)
    return convolution_with_policy(x, weight, bias, geometry, policy)


def convolution_with_policy(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, policy: Policy
) -> Tensor:
    """`conv2d` in any number of dimensions with the policy of a layer, which may measure first or be dense.

    Args:
        x: Input [N, I, *S] or [I, *S].
        weight: Weight [O, I, *K].
        bias: Bias [O], or None.
        geometry: How the convolution moves.
        policy: The policy of the layer.

    Returns:
        Output [N, O, *T] or [O, *T].
    """
    refuse_dtype(weight)
    needs = needs_gradients(x, weight)
    is_sparse = needs and policy.may_be_sparse(len(weight))
    rests = is_sparse and policy.rests(len(weight))
    if rests and policy.can_be_torchs():
        policy.note_rest()
        is_sparse = False
    autocast, dtype = product_dtype(x, policy)
    unbatched = x.dim() == weight.dim() - 1
    batch = x[None] if unbatched else x
    if is_sparse or (needs and dtype is not None and not autocast):
        refuse_transforms(x, weight, bias)
        if is_sparse:
            policy.refuse(weight)
        output: Tensor = _Convolution.apply(batch, weight, bias, geometry, policy, rests, dtype, autocast)  # pyright: ignore[reportAssignmentType]  (apply is untyped)
    elif dtype is not None:
        output = geometry.output(*cast_operands(dtype, batch, weight, bias))
        output = output if autocast else output.to(x.dtype)
    else:
        output = geometry.output(batch, weight, bias)
    return output[0] if unbatched else output


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        policy: Policy,
        rests: bool,
        dtype: torch.dtype | None,
        autocast: bool,
    ) -> Tensor:
        """The forward product is formed in `dtype`, if it is given. Under autocast all products are."""
        ctx.geometry, ctx.policy, ctx.rests = geometry, policy, rests
        ctx.shape, ctx.memory_format = x.shape, ops.memory_format(x)
        ctx.dtypes = dtypes_of(x, weight, bias)
        operands = (x, weight, bias) if dtype is None else cast_operands(dtype, x, weight, bias, trains=True)
        output = geometry.output(*operands)
        if autocast:
            x, weight, _ = operands
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return no_view(output if autocast else output.to(x.dtype))

    @staticmethod
    @labelled("meprop.convolution.backward")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms_of_backward(*grad_outputs)
        x, weight = ctx.saved_tensors
        grad, geometry, policy = grad_outputs[0].to(weight.dtype), ctx.geometry, ctx.policy
        if x is None:  # torch asks only for its sizes and its memory format
            x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        call = _Backward(geometry, grad, x.to(grad.dtype), weight, ctx.needs_input_grad[:3], policy, ctx.rests)
        return *in_dtypes(call.gradients(), ctx.dtypes), None, None, None, None, None


@dataclass(frozen=True)
class _Backward:
    """One backward pass of a convolution.

    Attributes:
        geometry: How the convolution moves.
        grad: Output gradient [N, O, *T].
        x: Input [N, I, *S].
        weight: Weight [O, I, *K].
        needs: Whether gradients of input, weight and bias are wanted.
        policy: The policy of the layer.
        rests: Whether the pass is dense without a question.
    """

    geometry: Geometry
    grad: Tensor
    x: Tensor
    weight: Tensor
    needs: tuple[bool, bool, bool]
    policy: Policy
    rests: bool

    def gradients(self) -> ops.Gradients:
        """The gradients, sparse or dense as the policy decides."""
        rows = len(self.grad) * self._positions
        if self.rests:
            self.policy.note_rest()
        elif self.policy.is_sparse(self.grad.shape[1], rows, self._shape):
            self.policy.note_sparse_pass()
            if self.policy.rule.scope == "rows" and not self.policy.rule.differs:
                return self._of_examples()
            if self.geometry.is_pointwise(self.weight):
                return self._of_entries()
            if self.policy.rule.scope == "global":
                return gradients_of_maps(self.grad, self.x, self.weight, self.geometry, self.needs, self.policy)
            return self._of_channels()
        if self.policy.activity is not None:
            self.policy.activity.count(everything(_rows(self.grad)), self._positions)
        return self.geometry.gradients(self.grad, self.x, self.weight, self.needs)

    @property
    def _positions(self) -> int:
        return self.grad.shape[2:].numel()

    def _shape(self) -> ConvShape:
        return ConvShape(
            self.x.shape,
            len(self.weight),
            tuple(self.weight.shape[2:]),
            self.geometry,
            self._positions,
            ops.memory_format(self.grad) == torch.channels_last,
            self.grad.dtype,
            self.grad.device.type,
            self.needs,
        )

    def _of_entries(self) -> ops.Gradients:
        """The sparse gradients of a convolution that is a linear map of each position."""
        needs_x, needs_weight, needs_bias = self.needs
        weight, x, policy = self.weight, self.x, self.policy
        weight_OI, x_NI = weight.flatten(1) if needs_x else None, _rows(x) if needs_weight else None
        grad_x, grad_weight, grad_bias = sparse_backward(
            _rows(self.grad), weight_OI, x_NI, needs_bias, policy, self._positions
        )
        if grad_x is not None:
            grad_x = grad_x.reshape(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
        if grad_weight is not None and grad_weight.is_sparse:  # it has no view, and is dense where everything is kept
            indices, rows = grad_weight.indices()[0], grad_weight.values()
            grad_weight = ops.row_sparse_tensor(indices, rows.reshape(-1, *weight.shape[1:]), len(weight))
        elif grad_weight is not None and weight.is_contiguous():  # this includes a kernel of 1 in channels_last
            grad_weight = grad_weight.as_strided(weight.shape, weight.stride())
        elif grad_weight is not None:
            grad_weight = grad_weight.reshape(weight.shape)
        return grad_x, grad_weight, grad_bias

    def _of_examples(self) -> ops.Gradients:
        """The sparse gradients, computed by the same convolution of the kept examples."""
        grad, x, policy = self.grad, self.x, self.policy
        in_memory = grad.movedim(1, -1) if ops.memory_format(grad) == torch.channels_last else grad
        selection = policy.select(policy.rule, in_memory.flatten(1))
        if not isinstance(selection, WholeRows):  # a batch without examples
            return self.geometry.gradients(grad, x, self.weight, self.needs)
        numbers = selection.numbers
        kept = selection.values.reshape(-1, *in_memory.shape[1:])
        kept = kept if in_memory is grad else kept.movedim(-1, 1)
        energy = policy.energy_of(grad)
        if policy.activity is not None or energy is not None:
            places = numbers[:, None] * self._positions + torch.arange(self._positions, device=numbers.device)
            of_positions = WholeRows(_rows(kept), places.flatten().int(), len(grad) * self._positions)
            if policy.activity is not None:
                policy.activity.count(of_positions, self._positions)
            if energy is not None:
                energy.add(_rows(grad), of_positions)
        needs_x, needs_weight, needs_bias = self.needs
        needs = (needs_x, needs_weight, False)
        grad_x, grad_weight, _ = self.geometry.gradients(kept, x.index_select(0, numbers), self.weight, needs)
        if grad_x is not None:
            grad_x = torch.zeros_like(x).index_copy_(0, numbers.long(), grad_x)
        return grad_x, grad_weight, grad.sum(dim=[0, *range(2, grad.dim())]) if needs_bias else None

    def _of_channels(self) -> ops.Gradients:
        """The sparse gradients, computed by the smaller convolution that has only the kept channels."""
        grad, weight, outputs = self.grad, self.weight, len(self.weight)
        kept, indices = self._select_channels()
        if self.policy.activity is not None:
            self.policy.activity.count(ColumnSelection(_rows(kept), indices, outputs), self._positions)
        if (energy := self.policy.energy_of(grad)) is not None:
            energy.add(_rows(grad), ColumnSelection(_rows(kept), indices, outputs))
        needs_x, needs_weight, needs_bias = self.needs
        if len(indices) > 0:
            needs = (needs_x, needs_weight, False)
            grad_x, grad_rows, _ = self.geometry.gradients(kept, self.x, weight.index_select(0, indices), needs)
        else:  # torch has no convolution without channels
            grad_x = torch.zeros_like(self.x) if needs_x else None
            grad_rows = weight.new_empty(0, *weight.shape[1:]) if needs_weight else None
        grad_weight = grad_rows
        if grad_rows is not None and self.policy.sparse_grad:
            grad_weight = ops.row_sparse_tensor(indices, grad_rows, outputs)
        elif grad_rows is not None:
            grad_weight = torch.zeros_like(weight).index_copy_(0, indices.long(), grad_rows)
        return grad_x, grad_weight, grad.sum(dim=[0, *range(2, grad.dim())]) if needs_bias else None

    def _select_channels(self) -> tuple[Tensor, Tensor]:
        """The kept channels of the output gradient [N, k, *T], and their indices [k]."""
        grad, rule = self.grad, self.policy.rule
        topk = rule.as_topk(grad.shape[1])
        if topk is not None and topk.scope == "batch" and topk.blocks == 1:
            return ops.topk_channels(grad, topk.k)
        selection = self.policy.select(rule, _rows(grad))
        if not isinstance(selection, ColumnSelection):
            raise NotSupportedError(
                f"{rule} chooses anew at each position, which goes for pointwise convolutions only; select columns"
            )
        if selection.shared is not None:
            raise NotSupportedError(
                f"{rule} gives all rows something in addition (shared), which goes for pointwise convolutions only; "
                "share nothing"
            )
        kept = selection.values.reshape(len(grad), *grad.shape[2:], len(selection.indices)).movedim(-1, 1)
        return kept, selection.indices


def _rows(tensor: Tensor) -> Tensor:
    """The tensor [N, C, *S] as a matrix with a row for each position of each example."""
    return tensor.movedim(1, -1).flatten(0, -2)


def why_not_sparse(rule: Rule, pointwise: bool, groups: int) -> str | None:
    """Why a convolution cannot back-propagate what the rule keeps. None if it can."""
    if groups != 1:
        return (
            f"groups={groups!r}: a group's inputs get their gradient from its own outputs alone, so that groups "
            "without a kept channel would pass nothing back"
        )
    if rule.differs and not pointwise:
        return f"{rule} differs for the two products, which goes for pointwise convolutions only"
    if rule.scope == "example" and not pointwise:
        return (
            f"{rule} keeps entries of their own at each position, for which the input's windows would have to be laid "
            "out one by one; use scope='batch' or 'global'"
        )
    return None


@dataclass(frozen=True)
class ConvShape:
    """What the speed of a convolution's backward pass depends on, beside the machine.

    Attributes:
        input: The shape of the input [N, I, *S].
        outputs: O, the number of output channels.
        kernel: The sizes of the kernel.
        geometry: Stride, padding and dilation.
        positions: The number of positions of the output, the product of its spatial sizes.
        channels_last: Whether the output gradient is in the memory format channels_last.
        dtype: The dtype of the output gradient.
        device: The type of the device, "cpu" or "cuda".
        needs: Whether gradients of input, weight and bias are wanted.
    """

    input: torch.Size
    outputs: int
    kernel: tuple[int, ...]
    geometry: Geometry
    positions: int
    channels_last: bool
    dtype: torch.dtype
    device: str
    needs: tuple[bool, bool, bool]

    @property
    def rows(self) -> int:
        """N, the number of positions of all examples."""
        return self.input[0] * self.positions

    def __str__(self) -> str:
        moves = (self.kernel, self.geometry.stride, self.geometry.padding, self.geometry.dilation)
        sizes = " ".join("x".join(map(str, each)) for each in (self.input, *moves))
        needs = "".join(name for name, needed in zip("xwb", self.needs, strict=True) if needed)
        return f"conv {sizes} to {self.outputs} {needs}" + (" channels_last" if self.channels_last else "")

    def passes(self, rule: Rule) -> speed.Passes:
        """The passes of such a convolution."""
        geometry, weight_shape = self.geometry, (self.outputs, self.input[1], *self.kernel)
        x, weight, bias = speed.random_tensors(self, self.input, weight_shape, (self.outputs,))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        wanted = [tensor.requires_grad_() for tensor, needs in zip((x, weight, bias), self.needs, strict=True) if needs]
        grad_output = torch.randn_like(geometry.output(x, weight, bias))

        def dense() -> object:
            return torch.autograd.grad(geometry.output(x, weight, bias), wanted, grad_output)

        def sparse() -> object:
            output = convolution_with_policy(x, weight, bias, geometry, Policy(rule))
            return torch.autograd.grad(output, wanted, grad_output)

        return dense, sparse
