"""The LSTM with a sparse backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import PackedSequence

from meprop import speed
from meprop.errors import NotSupportedError
from meprop.functional.common import product_dtype
from meprop.functional.lstm import lstm_policy, lstm_with_policy
from meprop.nn.base import Descriptor, Layout, SparseLayer, leaf, refuse_script, register, sparse_repr
from meprop.policy import Policy, needs_gradients
from meprop.rules import Rule


@dataclass(frozen=True)
class LstmShape:
    """What the speed of an LSTM depends on, beside the machine.

    Attributes:
        steps: T, the number of time steps.
        batch: B, the number of sequences. If their lengths differ, it is the mean over the time steps.
        inputs: I, the number of input features.
        units: H, the number of hidden units.
        layers: The number of layers.
        directions: The number of directions, 1 or 2.
        dtype: The dtype of the pass.
        device: The type of the device, "cpu" or "cuda".
        needs_input: Whether the input's gradient is wanted.
        compute_dtype: The dtype to which the sparse pass rounds the weights. None if it does not.
    """

    steps: int
    batch: int
    inputs: int
    units: int
    layers: int
    directions: int
    dtype: torch.dtype
    device: str
    needs_input: bool
    compute_dtype: torch.dtype | None = None

    @property
    def rows(self) -> int:
        """N, the number of rows of all time steps."""
        return self.steps * self.batch

    def __str__(self) -> str:
        stack = f"{self.layers}x{self.directions}" + (" x" if self.needs_input else "")
        rounded = "" if self.compute_dtype is None else f" {self.compute_dtype}"
        return f"lstm {self.steps}x{self.batch}x{self.inputs}x{self.units} {stack}{rounded}"

    def passes(self, rule: Rule) -> speed.Passes:
        """The passes of such an LSTM."""
        bidirectional = self.directions == 2
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "bidirectional": bidirectional}
        dense = torch.nn.LSTM(self.inputs, self.units, self.layers, **options)
        sparse = LSTM(self.inputs, self.units, self.layers, rule=rule, compute_dtype=self.compute_dtype, **options)
        sizes = ((self.steps, self.batch, self.inputs), (self.steps, self.batch, self.directions * self.units))
        x, grad_output = speed.random_tensors(self, *sizes)
        wanted = [x.requires_grad_()] if self.needs_input else []
        return (
            lambda: torch.autograd.grad(dense(x)[0], [*wanted, *dense.parameters()], grad_output),
            lambda: torch.autograd.grad(sparse(x)[0], [*wanted, *sparse.parameters()], grad_output),
        )


class LSTM(SparseLayer, torch.nn.LSTM):
    """`torch.nn.LSTM` that back-propagates only what `rule` keeps of each gate's gradient at each time step.

    Parameters, state_dict, initialisation, and the forms of input and output are torch's own. Sequences may be padded,
    packed or unbatched. `batch_first`, `num_layers`, `bidirectional` and `dropout` are supported. The output equals
    torch's up to rounding. Without gradients, or with k >= hidden_size, the layer is torch's own LSTM bit for bit.
    `meprop.functional.lstm` describes the backward pass.

    With `compute_dtype` and under autocast a sparse layer computes the same without gradients as with them. So its
    passes without gradients are not torch's. A layer that keeps everything, and one that was measured to be dense, is
    torch's own in any case, as is each one in a graph of torch.jit.trace or torch.export. There `compute_dtype` rounds
    nothing.

    A layer that is made by hand is always sparse. A layer that `meprop.convert` has made measures at its first forward
    pass with gradients whether sparse is faster on this machine, and keeps that decision. `torch.func` transforms are
    not supported.

    Args:
        *args: The arguments of `torch.nn.LSTM`: input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional.
        rule: What to keep of the H entries of each gate, e.g. `meprop.TopK(20)`.
        compute_dtype: torch.bfloat16 rounds the weights for all products. See `meprop.functional.lstm`.
        **kwargs: The keyword arguments of `torch.nn.LSTM`, except proj_size.

    Attributes:
        when: "always" for a layer that is always sparse, "auto" for one that is sparse only if that is measured to be
            faster.
        decision: With "auto", what was decided. None before the first forward pass.
        activity: What a `meprop.Simplifier` counts, for each layer and direction. None without a Simplifier.

    Raises:
        TypeError: `rule` is not a Rule.
        ValueError: `compute_dtype` is not torch.bfloat16 or None.
        NotSupportedError: `proj_size` is given, or several processes choose together by the rule.
    """

    def __init__(self, *args: Any, rule: Rule, compute_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        policy = lstm_policy(Policy(rule, compute_dtype=compute_dtype))
        super().__init__(*args, **kwargs)
        if self.proj_size > 0:
            raise NotSupportedError(f"proj_size={self.proj_size}: meprop.nn.LSTM has no projections; use torch.nn.LSTM")
        self.policy = policy.of_layer()

    __prepare_scriptable__ = refuse_script

    @leaf
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's are overloads)
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """The output [T, B, D * H] and the states [layers * D, B, H], each, for an input [T, B, I].

        D is the number of directions. The forms of input are those of `torch.nn.LSTM`.
        """
        if not self._is_sparse(input, hx):
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            rows, batch_sizes, order, restore = input
            hx = None if hx is None else self.permute_hidden(hx, order)
            self._check(rows, hx, batch_sizes)
            output, states = self._layers(rows, hx, batch_sizes)
            return PackedSequence(output, batch_sizes, order, restore), self.permute_hidden(states, restore)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        unbatched = input.dim() == 2
        if hx is not None and {state.dim() for state in hx} != {input.dim()}:
            raise RuntimeError(f"for {input.dim()}-D input, hx must be two {input.dim()}-D tensors")
        if unbatched:
            input, hx = input[:, None], None if hx is None else (hx[0][:, None], hx[1][:, None])
        elif self.batch_first:
            input = input.transpose(0, 1)
        self._check(input, hx, None)
        output, (h, c) = self._layers(input, hx, None)
        if unbatched:
            return output[:, 0], (h[:, 0], c[:, 0])
        return output.transpose(0, 1) if self.batch_first else output, (h, c)

    def _check(self, time_major: Tensor, hx: tuple[Tensor, Tensor] | None, batch_sizes: Tensor | None) -> None:
        """Raises the errors of torch's LSTM."""
        self.check_input(time_major, batch_sizes)
        if hx is not None:
            batch = time_major.shape[1] if batch_sizes is None else int(batch_sizes[0])
            expected = (self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size)
            self.check_hidden_size(hx[0], expected, "Expected hidden[0] size {}, got {}")
            self.check_hidden_size(hx[1], expected, "Expected hidden[1] size {}, got {}")

    def _layers(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        last: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs: list[Tensor] = []
            for reverse in (False, True) if self.bidirectional else (False,):
                initial = None if hx is None else (hx[0][len(last)], hx[1][len(last)])
                weights = self._weights(f"l{layer}{'_reverse' if reverse else ''}")
                activities = self.policy.activities
                activity = activities[len(last)] if activities else None
                output, states = lstm_with_policy(x, initial, weights, batch_sizes, reverse, self.policy, activity)
                outputs.append(output)
                last.append(states)
            x = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
        h, c = (torch.stack(states) for states in zip(*last, strict=True))
        return x, (h, c)

    def _weights(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        weight_ih, weight_hh = getattr(self, f"weight_ih_{suffix}"), getattr(self, f"weight_hh_{suffix}")
        if not self.bias:
            return weight_ih, weight_hh, None, None
        return weight_ih, weight_hh, getattr(self, f"bias_ih_{suffix}"), getattr(self, f"bias_hh_{suffix}")

    def _is_sparse(self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None) -> bool:
        rows, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
        states = dict(zip(("hx[0]", "hx[1]"), () if hx is None else hx, strict=False))
        if not self.policy.may_be_sparse(self.hidden_size):
            return False
        if rows.is_meta or isinstance(rows, FakeTensor):  # they have shapes only, and torch's are the same
            return False
        if torch.jit.is_tracing():  # a graph of ours would be for so many time steps alone
            return False
        tensors = {"input": rows, **states, **dict(self.named_parameters())}
        if self.policy.leave_to_torch(**tensors) or rows.numel() == 0:
            return False
        rounds = product_dtype(rows, self.policy)[1] is not None
        if not needs_gradients(*tensors.values()):  # it decides nothing
            return rounds and not self.policy.measured_dense
        if self.activity is not None:  # only our backward pass counts, also if everything is kept
            return True
        if not rounds and self.policy.can_be_torchs() and self.policy.rests(self.hidden_size):
            self.policy.note_rest()
            return False
        return self.policy.is_sparse(self.hidden_size, rows.shape[:-1].numel(), lambda: self._shape(rows, batch_sizes))

    def _shape(self, rows: Tensor, batch_sizes: Tensor | None) -> LstmShape:
        steps = len(batch_sizes) if batch_sizes is not None else rows.shape[self.batch_first and rows.dim() == 3]
        autocast, dtype = product_dtype(rows, self.policy)
        return LstmShape(
            steps,
            round(rows.shape[:-1].numel() / steps),
            self.input_size,
            self.hidden_size,
            self.num_layers,
            2 if self.bidirectional else 1,
            (dtype if autocast else None) or rows.dtype,
            rows.device.type,
            rows.requires_grad,
            None if autocast else dtype,
        )

    def extra_repr(self) -> str:
        """The text of torch's layer, and the rule."""
        return super().extra_repr() + sparse_repr(self)


class LstmDescriptor(Descriptor[torch.nn.LSTM]):
    """The descriptor of LSTMs. Their units are the hidden units of each layer and direction."""

    plain, sparse = torch.nn.LSTM, LSTM
    feature_name = "hidden units"
    decides_in = "forward"

    def features(self, layer: torch.nn.LSTM) -> tuple[int, int]:
        """The numbers of input features and of hidden units, I and H. The rule chooses among the H of each gate."""
        return layer.input_size, layer.hidden_size

    def why_dense(self, layer: torch.nn.LSTM, policy: Policy) -> str | None:
        """A reason if the LSTM has projections, or if the policy needs one choice for all time steps."""
        if layer.proj_size > 0:
            return f"it has projections (proj_size={layer.proj_size})"
        if policy.sparse_grad:
            return "sparse_grad: an LSTM chooses anew at each time step"
        if policy.rule.differs:
            return "its gates serve several products, for which the rule differs"
        if policy.rule.scope == "rows":
            return "its time steps would each draw other sequences (scope 'rows')"
        if policy.rule.communicates:
            return "the rule would have to wait for other processes at each time step"
        return None

    def depth(self, layer: torch.nn.LSTM) -> int:
        """The number of layers. Time steps are not counted."""
        return layer.num_layers

    def unit_sets(self, layer: torch.nn.LSTM) -> tuple[str, ...]:
        """One set for each layer and direction, named by the suffix of its weights, in the order of the states."""
        return tuple(f"l{number}{suffix}" for number in range(layer.num_layers) for suffix in _directions(layer))

    def layouts(self, layer: torch.nn.LSTM, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """The layouts of the weights [4H, I] and [4H, H] and of the biases [4H]. All have four gates of H units."""
        directions = len(_directions(layer))
        tensors: dict[str, dict[int, Layout]] = {}
        for number, (place, group) in enumerate(zip(self.unit_sets(layer), outputs, strict=True)):
            gates, first = (group,) * 4, number // directions * directions  # the first set of this layer
            tensors[f"weight_ih_{place}"] = {0: gates, 1: outputs[first - directions : first] if first else inputs}
            tensors[f"weight_hh_{place}"] = {0: gates, 1: (group,)}
            if layer.bias:
                tensors |= {f"bias_{part}_{place}": {0: gates} for part in ("ih", "hh")}
        return tensors

    def resize(self, layer: torch.nn.LSTM) -> None:
        """Takes I and H from the weights of the first layer."""
        layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
        layer.hidden_size = layer.get_parameter("weight_hh_l0").shape[1]
        layer.flatten_parameters()


def _directions(layer: torch.nn.LSTM) -> tuple[str, ...]:
    return ("", "_reverse") if layer.bidirectional else ("",)


register(LstmDescriptor())
