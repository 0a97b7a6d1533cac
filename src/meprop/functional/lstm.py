"""One layer of an LSTM in one direction, with an exact forward pass and a sparse backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meprop import casts, ops
from meprop.energy import Energy
from meprop.errors import NotSupportedError
from meprop.functional.common import as_matrix, cast, check_tensors, is_autocast, no_view
from meprop.ops.registry import is_proxied
from meprop.policy import Policy, needs_gradients, refuse_transforms, refuse_transforms_of_backward
from meprop.profiles import labelled
from meprop.record import Activity
from meprop.rules import Rule, in_blocks
from meprop.selection import Entries, PlainTopK, Selection


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
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of an LSTM in one direction, with an exact forward pass and a sparse backward pass.

    Each gate has a gradient before its activation. At each time step `rule` chooses among the H entries of each gate's
    gradient. With scope "example" it chooses for each sequence. With scope "batch" it chooses for all sequences of the
    time step. With scope "global" it chooses among all sequences of the time step. `meprop.Sampled` draws from the four
    gates together, with one key for the whole pass, and without the exact sum unless that is asked for. With scope
    "global" and `exact_sum=True` a time step of one sequence keeps everything, because the mean over the sequences is
    then all that is missing.

    Let S be the kept parts [n, 4H] of the four gates. Then the earlier output's gradient is S W_hh, dx = S W_ih,
    dW_ih = S^T x and dW_hh = S^T h (meProp, section 3). The choice within each gate is ours, because the paper does not
    mention gates.

    The cells' own gradients are exact. A bias gets the sum of the whole gates' gradients. Arithmetic is float32, or
    float64 for float64 tensors. With k at or above H the gradients are the dense ones up to rounding.

    Args:
        x: Input [T, B, I]. With `batch_sizes` it is the packed rows [N, I] of sequences of different lengths, as in
            `torch.nn.utils.rnn.PackedSequence.data`.
        hx: Initial output and cell state, each [B, H]. None means zeros.
        weight_ih: Weight of the input [4H, I]. Its gates are in torch's order: input, forget, cell, output.
        weight_hh: Weight of the earlier output [4H, H].
        bias_ih: Bias [4H], or None.
        bias_hh: Bias [4H], or None.
        rule: What to keep of each gate, e.g. `meprop.TopK(20)`.
        batch_sizes: The number of rows of each time step [T], int64 on the CPU, not increasing. It is that of a
            `PackedSequence`.
        reverse: Whether the walk goes from the last time step to the first.
        compute_dtype: torch.bfloat16 forms all products with the two weights rounded to bfloat16, in the forward and in
            the backward pass. So the gradients are those of the pass that was computed. Everything else stays in the
            dtype of the tensors, gradients of the weights included. It is for speed, because less memory is read. Under
            autocast it changes nothing. None leaves the weights as they are.

    Returns:
        Output [T, B, H] or [N, H], and the last output and cell state of each sequence, [B, H] each.

    Raises:
        NotSupportedError: The backward pass is called with create_graph=True, several processes choose together by the
            rule, or make_fx traces the call.
        TypeError: `rule` is not a Rule, x, a weight or a bias is not a tensor, `reverse` is not a bool, or the weights
            are not of a floating dtype.
        ValueError: A shape, dtype or device does not fit, `batch_sizes` is not as described above, or `compute_dtype`
            is not torch.bfloat16 or None.
    """
    policy = lstm_policy(Policy(rule, compute_dtype=compute_dtype))
    parameters = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    check_tensors(x=x, **parameters)
    if not isinstance(reverse, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"reverse={reverse!r} is of type {type(reverse).__name__}; it is True or False")
    _check_shapes(x, hx, parameters, batch_sizes)
    return lstm_with_policy(x, hx, (weight_ih, weight_hh, bias_ih, bias_hh), batch_sizes, reverse, policy)


def lstm_with_policy(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    batch_sizes: Tensor | None,
    reverse: bool,
    policy: Policy,
    activity: Activity | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`lstm` with checked arguments. `activity`, if it is given, counts what the backward pass selects."""
    refuse_transforms(x, *(() if hx is None else hx), *weights)
    if is_proxied():
        raise NotSupportedError(
            "make_fx of an LSTM, which looks at the lengths of its sequences and at what it keeps in each step; trace "
            "a plain copy of the model, made by copy.deepcopy and meprop.revert"
        )
    policy.refuse(weights[0])
    if not weights[0].is_floating_point():
        raise TypeError(f"the weights are of dtype {weights[0].dtype}; an LSTM's are of a floating dtype")
    tensors = (x, *((None, None) if hx is None else hx), *weights)
    autocast = is_autocast(x)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = tuple(None if tensor is None else cast(tensor, dtype) for tensor in tensors)
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"x, states, weights and biases must be of one dtype and on one device; they are {found}")
    rows, *others = tensors
    assert rows is not None
    sizes = torch.full((x.shape[0],), x.shape[1], device="cpu") if batch_sizes is None else batch_sizes.contiguous()
    trains = needs_gradients(*weights[:2])
    call = _Call(reverse, policy, activity, None if autocast else policy.compute_dtype, trains)
    output, h_n, c_n = _Lstm.apply(as_matrix(rows), *others, sizes, call)  # pyright: ignore[reportGeneralTypeIssues]
    return output if batch_sizes is not None else no_view(output.view(*x.shape[:2], -1)), (h_n, c_n)


@dataclass(frozen=True)
class _Call:
    """The arguments of a call that are not tensors.

    They are the direction, the policy, what counts its selections, the dtype to which the weights are rounded, and
    whether a weight gets a gradient.
    """

    reverse: bool
    policy: Policy
    activity: Activity | None
    compute_dtype: torch.dtype | None
    trains: bool

    @property
    def rule(self) -> Rule:
        """The rule for the gates of a time step [n, 4H]."""
        return in_blocks(self.policy.rule.in_steps(), 4)

    def select(self, energy: Energy | None, gates_NO: Tensor) -> Selection:
        """What is kept of the gates of a time step [n, 4H]. It is noted, and counted in the energy if there is one."""
        selection = self.policy.select(self.rule, gates_NO)
        if energy is not None:
            energy.add(gates_NO, selection)
        return selection


class _Lstm(torch.autograd.Function):
    """One layer in one direction. States and gates are float32 even if the tensors are of a narrower dtype."""

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
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.call, ctx.dtype = call, x.dtype
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Half as many bytes are read of weights of bfloat16, which therefore stay what they are.
        of_weights = x.dtype if x.dtype == torch.bfloat16 else call.compute_dtype or dtype
        cast_weight = casts.cast if call.trains else Tensor.to
        x, weight_ih, weight_hh = x.to(dtype), cast_weight(weight_ih, of_weights), cast_weight(weight_hh, of_weights)
        h0, c0 = None if h0 is None else h0.to(dtype), None if c0 is None else c0.to(dtype)
        biases = [bias.to(dtype) for bias in (bias_ih, bias_hh) if bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        trace = ops.lstm_forward(x, weight_ih, weight_hh, bias, (h0, c0), batch_sizes, call.reverse)
        h, c, gates, h_n, c_n = trace
        ctx.save_for_backward(x, weight_ih, weight_hh, batch_sizes, h, c, gates)
        # Copies, so that operations in place may follow: the backward pass reads h.
        output, h_n, c_n = (each.to(ctx.dtype, copy=True) for each in (h[int(batch_sizes[0]) :], h_n, c_n))
        return output, h_n, c_n

    @staticmethod
    @labelled("meprop.lstm.backward")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_transforms_of_backward(*grads)
        x, weight_ih, weight_hh, batch_sizes, *trace = ctx.saved_tensors
        grad_output, grad_h, grad_c = (None if grad is None else grad.to(x.dtype) for grad in grads)
        needs_x, needs_h0, needs_c0, needs_ih, needs_hh, *needs_biases = ctx.needs_input_grad[:7]
        needs = (needs_x, needs_ih, needs_hh, any(needs_biases), needs_h0, needs_c0)
        call: _Call = ctx.call
        call.policy.note_sparse_pass()
        choice = chosen_of_gates(call.policy.rule.in_steps(), weight_hh.shape[1], weight_hh.device)
        kept, energy = torch.zeros_like(batch_sizes), call.policy.energy_of(x)
        walk = (tuple(trace), x, weight_ih, weight_hh, batch_sizes, call.reverse, (grad_output, grad_h, grad_c), choice)
        if energy is not None and choice is not None:  # native code shows nobody what it chooses
            ops.lstm_backward(*walk, call.rule.select, (False,) * 6, None, None, energy.add)
            energy = None
        hits = None if call.activity is None else call.activity.hits
        results = ops.lstm_backward(*walk, partial(call.select, energy), needs, hits, kept)
        if isinstance(choice, Entries):
            call.policy.note_steps(kept, batch_sizes * len(weight_hh))
        if call.activity is not None:
            call.activity.examples += len(x)
        grad_x, grad_ih, grad_hh, grad_bias, grad_h0, grad_c0 = (
            None if result is None else result.to(ctx.dtype) for result in results
        )
        # The two biases have equal gradients, but may not share the memory.
        grad_biases = [grad_bias if needed else None for needed in needs_biases]
        if all(needs_biases) and grad_bias is not None:
            grad_biases[1] = grad_bias.clone()
        return grad_x, grad_h0, grad_c0, grad_ih, grad_hh, *grad_biases, None, None


def chosen_of_gates(rule: Rule, units: int, device: torch.device) -> PlainTopK | Entries | None:
    """What the rule keeps of the gates of a time step: a top-k of each gate, or entries of all rows.

    None if it has to be asked. Entries are drawn from all gates together. Draws have no bias, so that no gate gets less
    than its due. The largest entries are chosen in each gate. Those of all gates together would be of one gate.
    """
    topk = rule.as_topk(units)
    if topk is not None:
        return topk
    entries = rule.as_entries(units, device)
    return entries if entries is None or entries.key is None else entries._replace(k=4 * entries.k)


def lstm_policy(policy: Policy) -> Policy:
    """The policy itself, after a check that an LSTM can have it.

    Raises:
        NotSupportedError: Several processes choose together by the rule, it has a rule for each product, or it draws
            whole rows.
    """
    if policy.rule.differs:
        raise NotSupportedError(f"{policy.rule} of an LSTM, whose gates serve several products; use one rule for all")
    if policy.rule.scope == "rows":
        raise NotSupportedError(
            f"{policy.rule} of an LSTM, whose time steps would each draw other sequences; use scope 'global' for it"
        )
    if policy.rule.communicates:
        raise NotSupportedError(
            f"{policy.rule} of an LSTM would have to wait for other processes at each time step; use meprop.TopK for it"
        )
    return policy


def _check_shapes(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, parameters: dict[str, Tensor | None], batch_sizes: Tensor | None
) -> None:
    """Raises the errors of `lstm` that concern shapes."""
    weight_hh = parameters["weight_hh"]
    assert weight_hh is not None
    if hx is not None and not (isinstance(hx, tuple) and len(hx) == 2 and all(isinstance(h, Tensor) for h in hx)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("hx is a tuple of two tensors [B, H], the initial output and cell state, or None")
    if x.dim() != (3 if batch_sizes is None else 2):
        raise ValueError(f"x is {list(x.shape)}; it is [T, B, I] without batch_sizes, and [N, I] with them")
    if batch_sizes is not None:
        _check_batch_sizes(batch_sizes, len(x))
    elif x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x is {list(x.shape)} [T, B, I]; an LSTM needs at least one time step and one sequence")
    if weight_hh.dim() != 2 or weight_hh.shape[1] == 0:
        raise ValueError(f"weight_hh is {list(weight_hh.shape)}; it is [4H, H] with H >= 1")
    units, inputs, batch = weight_hh.shape[-1], x.shape[-1], x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    shapes = {"weight_ih": (4 * units, inputs), "weight_hh": (4 * units, units)}
    expected = [(name, tensor, shapes.get(name, (4 * units,))) for name, tensor in parameters.items()]
    expected += [("hx", state, (batch, units)) for state in (() if hx is None else hx)]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; for H = {units}, I = {inputs}, B = {batch} it is {list(shape)}"
            )


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    valid = (
        isinstance(batch_sizes, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
        and batch_sizes.dim() == 1
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
