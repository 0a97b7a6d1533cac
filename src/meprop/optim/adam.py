"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meprop import ops
from meprop.ops import Gradient
from meprop.ops.gradients import PARAMETER
from meprop.optim.base import Parameters, RowSparseOptimizer, SparseRows, no_steps


class Adam(RowSparseOptimizer, torch.optim.Adam):
    """`torch.optim.Adam`, in which a row-sparse gradient costs only its rows.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay factors of the first and the second moment.
        eps: Is added to the root of the second moment.
        weight_decay: Factor of the L2 penalty; with `decoupled_weight_decay` that of AdamW's weight decay.
        amsgrad: Whether the largest second moment so far is used (AMSGrad).
        foreach: Whether torch's for-each implementation takes dense gradients; None: it is left open.
        maximize: Whether the step goes up the gradient instead of down.
        capturable: Whether the step may be captured in a CUDA graph. The graph keeps the learning rate of its capture.
        differentiable: Whether autograd may go through the step. It is for dense gradients only.
        fused: Whether torch's fused implementation takes dense gradients; None: where it takes them, if they are not
            large (`meprop.optim`).
        decoupled_weight_decay: Whether weights decay as in AdamW.
        sparse_rows: "exact", "decay" or "lazy": what happens to the rows without a gradient (`meprop.optim`).
        in_backward: Whether the backward pass updates each large parameter as soon as its gradient is complete
            (`meprop.optim`).
        state_dtype: torch.bfloat16 keeps the moments of float32 parameters in bfloat16 (`meprop.optim`); None: in the
            dtype of each parameter.
        copy_dtype: torch.bfloat16 also writes large weights in bfloat16, for layers whose forward product is in it
            (`meprop.optim`); None: nothing is written beside a weight.

    Raises:
        TypeError: `in_backward` is not a bool, or `state_dtype` or `copy_dtype` is no dtype.
        ValueError: `sparse_rows`, `state_dtype` or `copy_dtype` is unknown, `in_backward` is used with
            differentiable=True, or what torch raises it for.
        NotSupportedError: `step` meets a sparse gradient, and differentiable is True, the parameter is
            complex, the gradient is sparse in more than its rows, or torch.compile compiles the step. Or
            `state_dtype` is torch.bfloat16, and a parameter is not a plain one of float32, torch.compile compiles the
            step, or foreach, fused, capturable, amsgrad or differentiable is True.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        sparse_rows: SparseRows = "exact",
        in_backward: bool = False,
        state_dtype: torch.dtype | None = None,
        copy_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            sparse_rows=sparse_rows,
            in_backward=in_backward,
            state_dtype=state_dtype,
            copy_dtype=copy_dtype,
        )

    def _init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = no_steps(parameter, group)
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)

    def _zero_gradient_moves_weights(self, group: dict[str, Any]) -> bool:
        return True

    def _decays(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        decays = {"exp_avg": float(beta1), "exp_avg_sq": float(beta2)}
        if group["decoupled_weight_decay"]:
            decays[PARAMETER] = 1 - float(group["lr"]) * group["weight_decay"]
        return decays

    def _takes_whole(self, group: dict[str, Any]) -> bool:
        return not group["amsgrad"]

    _squares = ("exp_avg_sq",)

    def _weight_decays(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        weight_decay = float(group["weight_decay"])
        if group["decoupled_weight_decay"] or weight_decay == 0:
            return {}
        beta1, beta2 = map(float, group["betas"])
        return {"exp_avg": (1 - beta1) * weight_decay, "exp_avg_sq": (1 - beta2) * weight_decay**2}

    def _update(self, parameter: Tensor, rows: Gradient, step: float | Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        ops.adam_rows(
            parameter,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["max_exp_avg_sq"] if group["amsgrad"] else None,
            rows,
            step,
            lr=float(group["lr"]),
            betas=(float(beta1), float(beta2)),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            key=self._next_key(parameter),
            copy=self._copy_of(parameter),
        )


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`, in which a row-sparse gradient costs only its rows.

    Arguments and errors are those of `Adam`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        sparse_rows: SparseRows = "exact",
        in_backward: bool = False,
        state_dtype: torch.dtype | None = None,
        copy_dtype: torch.dtype | None = None,
    ) -> None:
        # Not that of Adam: after RowSparseOptimizer comes torch's AdamW, which sets decoupled_weight_decay.
        RowSparseOptimizer.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            sparse_rows=sparse_rows,
            in_backward=in_backward,
            state_dtype=state_dtype,
            copy_dtype=copy_dtype,
        )
