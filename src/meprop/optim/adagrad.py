"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meprop import ops
from meprop.ops import Gradient
from meprop.optim.base import Parameters, RowSparseOptimizer, SparseRows, no_steps


class Adagrad(RowSparseOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, in which a row-sparse gradient costs only its rows.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        lr_decay: How fast the learning rate decays.
        weight_decay: Factor of the L2 penalty.
        initial_accumulator_value: The value that the sums of squares begin with.
        eps: Is added to the root of the sums.
        foreach: Whether torch's for-each implementation takes dense gradients; None: it is left open.
        maximize: Whether the step goes up the gradient instead of down.
        differentiable: Whether autograd may go through the step. It is for dense gradients only.
        fused: Whether torch's fused implementation takes dense gradients; None: where it takes them, if they are not
            large (`meprop.optim`).
        sparse_rows: "exact", "decay" or "lazy": what happens to the rows without a gradient (`meprop.optim`). The modes
            differ only where there is weight decay.
        in_backward: Whether the backward pass updates each large parameter as soon as its gradient is complete
            (`meprop.optim`).
        state_dtype: torch.bfloat16 keeps the sums of float32 parameters in bfloat16 (`meprop.optim`); None: in the
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
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
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
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            sparse_rows=sparse_rows,
            in_backward=in_backward,
            state_dtype=state_dtype,
            copy_dtype=copy_dtype,
        )

    def _init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:  # the group was added later: torch makes the state of the others
            state["step"] = no_steps(parameter, group)
            state["sum"] = torch.full_like(
                parameter, self.defaults["initial_accumulator_value"], dtype=self.state_dtype
            )

    def _zero_gradient_moves_weights(self, group: dict[str, Any]) -> bool:
        return group["weight_decay"] != 0

    def _decays(self, group: dict[str, Any]) -> dict[str, float]:
        """None: a sum only grows."""
        return {}

    def _takes_whole(self, group: dict[str, Any]) -> bool:
        return True

    _squares = ("sum",)

    def _weight_decays(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        weight_decay = float(group["weight_decay"])
        return {"sum": weight_decay**2} if weight_decay != 0 else {}

    def _update(self, parameter: Tensor, rows: Gradient, step: float | Tensor, group: dict[str, Any]) -> None:
        lr = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        weight_decay, eps = group["weight_decay"], group["eps"]
        key = self._next_key(parameter)
        sum_, copy = self.state[parameter]["sum"], self._copy_of(parameter)
        ops.adagrad_rows(parameter, sum_, rows, lr=lr, weight_decay=weight_decay, eps=eps, key=key, copy=copy)
