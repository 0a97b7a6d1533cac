"""Stochastic gradient descent, with and without momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meprop import ops
from meprop.ops import Gradient
from meprop.optim.base import Parameters, RowSparseOptimizer, SparseRows


class SGD(RowSparseOptimizer, torch.optim.SGD):
    """`torch.optim.SGD`, in which a row-sparse gradient costs only its rows.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        momentum: Momentum factor.
        dampening: Share of each gradient that the momentum leaves out.
        weight_decay: Factor of the L2 penalty.
        nesterov: Whether the momentum is Nesterov's.
        maximize: Whether the step goes up the gradient instead of down.
        foreach: Whether torch's for-each implementation takes dense gradients; None: it is left open.
        differentiable: Whether autograd may go through the step. It is for dense gradients only.
        fused: Whether torch's fused implementation takes dense gradients; None: where it takes them, if they are not
            large (`meprop.optim`).
        sparse_rows: "exact", "decay" or "lazy": what happens to the rows without a gradient (`meprop.optim`).
        in_backward: Whether the backward pass updates each large parameter as soon as its gradient is complete
            (`meprop.optim`).
        state_dtype: torch.bfloat16 keeps the momentum of float32 parameters in bfloat16 (`meprop.optim`); None: in the
            dtype of each parameter.
        copy_dtype: torch.bfloat16 also writes large weights in bfloat16, for layers whose forward product is in it
            (`meprop.optim`); None: nothing is written beside a weight.

    Raises:
        TypeError: `in_backward` is not a bool, or `state_dtype` or `copy_dtype` is no dtype.
        ValueError: `sparse_rows`, `state_dtype` or `copy_dtype` is unknown, `in_backward` is used with
            differentiable=True, or what torch raises it for.
        NotSupportedError: `step` meets a sparse gradient, and differentiable is True, the parameter is complex, the
            gradient is sparse in more than its rows, or torch.compile compiles the step. Or
            `state_dtype` is torch.bfloat16, and a parameter is not a plain one of float32, torch.compile compiles the
            step, or foreach, fused, or differentiable is True.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        sparse_rows: SparseRows = "exact",
        in_backward: bool = False,
        state_dtype: torch.dtype | None = None,
        copy_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            sparse_rows=sparse_rows,
            in_backward=in_backward,
            state_dtype=state_dtype,
            copy_dtype=copy_dtype,
        )

    def _init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Makes nothing: `_update` makes the momentum buffer, as the first gradient is treated differently."""

    def _zero_gradient_moves_weights(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0 or group["weight_decay"] != 0

    def _decays(self, group: dict[str, Any]) -> dict[str, float]:
        momentum = float(group["momentum"])
        return {"momentum_buffer": momentum} if momentum != 0 else {}  # torch leaves it as it is without momentum

    def _takes_whole(self, group: dict[str, Any]) -> bool:
        return True

    def _weight_decays(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        if group["momentum"] == 0 or group["weight_decay"] == 0:
            return {}
        is_first = self.state[parameter].get("momentum_buffer") is None  # torch does not dampen the first gradient
        dampening = 0.0 if is_first else float(group["dampening"])
        return {"momentum_buffer": (1 - dampening) * float(group["weight_decay"])}

    def _update(self, parameter: Tensor, rows: Gradient, step: float | Tensor, group: dict[str, Any]) -> None:
        buffer, dampening = None, float(group["dampening"])
        if group["momentum"] != 0:
            state = self.state[parameter]
            buffer = state.get("momentum_buffer")
            if buffer is None:  # torch does not dampen the first gradient either
                buffer = state["momentum_buffer"] = torch.zeros_like(parameter, dtype=self.state_dtype)
                dampening = 0.0
        ops.sgd_rows(
            parameter,
            buffer,
            rows,
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=dampening,
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            key=None if buffer is None else self._next_key(parameter),
            copy=self._copy_of(parameter),
        )
