"""Optimizers for row-sparse gradients: torch's own, and a step costs only the rows that have a gradient.

Of a layer with ``sparse_grad=True`` only k rows of the weight have a gradient; the others are asleep. What happens to
them is the argument `sparse_rows`:

- ``"exact"``: what the dense optimizer does. With momentum, Adam's moments or weight decay a sleeping row still moves:
  one pass over parameter and state, which reads no gradient for it.
- ``"decay"``: a sleeping row stays where it is. When it wakes, its momentum, or moments, first decay in closed form for
  the steps it slept: each is what the dense optimizer would have, but the weight has not moved in the meantime.
- ``"lazy"``: a sleeping row stays where it is, and so do its moments, as with `torch.optim.SparseAdam`.

SGD without momentum and Adagrad, without weight decay, are exact in all three, and touch only the rows. Weight decay of
sleeping rows: AdamW's is made up for by ``"decay"`` when a row wakes (at the learning rate of that step); else it acts
on a row only while awake.

Dense gradients go to torch's own implementation, `fused` unless told otherwise. In place of a fused step on a weight
with a bfloat16 copy (`meprop.copies`) the same is done here, so that the copy is written in the same pass. State and
state_dict are torch's, but that ``"decay"`` adds to the state `row_step` [O], the step until which each row's state is
up to date (and, for SGD, `step`): `wake` makes all rows so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._guards import TracingContext

from meprop import copies, ops
from meprop.errors import NotSupportedError
from meprop.ops import GradientRows

SparseRows = Literal["exact", "decay", "lazy"]
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class _RowSparse(torch.optim.Optimizer):
    """What meprop's optimizers add to torch's."""

    def __init__(self, *args: Any, sparse_rows: SparseRows, **options: Any) -> None:
        self.sparse_rows = sparse_rows
        super().__init__(*args, **options)
        # GradScaler is to unscale: a fused step would do it itself, but for dense gradients only.
        self._step_supports_amp_scaling = False

    @property
    def sparse_rows(self) -> SparseRows:
        """What becomes of the rows without a gradient. It may be changed between steps; ValueError if it is unknown."""
        return self._sparse_rows

    @sparse_rows.setter
    def sparse_rows(self, mode: SparseRows) -> None:
        if mode not in get_args(SparseRows):
            raise ValueError(f"sparse_rows={mode!r}; it is 'exact', 'decay' or 'lazy'")
        self._sparse_rows: SparseRows = mode

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Called by torch's `step` for each group, to collect its gradients: what is not for torch is done here.

        These are the row-sparse gradients, and dense ones of weights with a copy, which is written along.
        """
        dense: list[Tensor] = []
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is not None and grad.layout == torch.sparse_coo:
                self._row_sparse_step(parameter, grad, group)
                continue
            if grad is not None:
                self._wake(parameter, group)
            if grad is not None and _takes_copy_along(parameter, grad, group):
                self._own_step(parameter, group, torch.arange(len(parameter)), grad.contiguous())
            else:
                dense.append(parameter)
        return super()._init_group({**group, "params": dense}, *args, **kwargs)  # pyright: ignore  (torch's, not in its stubs)

    def _row_sparse_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if TracingContext.try_get() is not None:  # as is_compiling does not say here
            raise NotSupportedError(
                f"{type(self).__name__}.step with row-sparse gradients under torch.compile; call it outside, or use "
                "sparse_grad=False"
            )
        if group["differentiable"] or group.get("capturable") or parameter.is_complex():
            raise NotSupportedError(
                f"{type(self).__name__} with row-sparse gradients is neither differentiable nor capturable, nor for "
                "complex parameters; use sparse_grad=False there"
            )
        indices, values = _indices_and_values(grad)
        row_step = None
        if self.sparse_rows == "decay" and self._ages(group):
            state = self.state[parameter]
            state.setdefault("step", _no_steps(parameter, group))  # which SGD does not count otherwise
            if "row_step" not in state:
                state["row_step"] = torch.full(
                    (len(parameter),), float(state["step"]), dtype=torch.float32, device=parameter.device
                )
            row_step = state["row_step"]
        else:
            self._wake(parameter, group)
        every_row = self.sparse_rows == "exact" and self._moves_asleep(group)
        self._own_step(parameter, group, indices, values, every_row, row_step)

    def _own_step(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        indices: Tensor,
        values: Tensor,
        every_row: bool = False,
        row_step: Tensor | None = None,
    ) -> None:
        self._begin(parameter, group)
        narrow = copies.current(parameter)
        rows = GradientRows(indices, -values if group["maximize"] else values, every_row, row_step, narrow)
        self._update(parameter, rows, self._next_step(parameter), group)
        if narrow is not None:
            copies.rewritten(parameter)

    def _next_step(self, parameter: Tensor) -> float:
        """Counts the step, where steps are counted."""
        step: Tensor | None = self.state.get(parameter, {}).get("step")
        return 1.0 if step is None else float(step.add_(1))

    def wake(self) -> None:
        """Brings the state of all rows up to date: then it is what torch's own optimizer goes on from.

        For ``sparse_rows="decay"``; elsewhere there is nothing to do.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                self._wake(parameter, group)

    def _wake(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state.get(parameter, {})
        if "row_step" not in state:
            return
        with torch.no_grad():
            slept = state["step"].to(parameter.device) - state.pop("row_step")
            self._age(parameter, slept.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1)), group)

    # ---- what differs between the optimizers

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Makes the state that the first step begins with, where there is none yet."""

    def _ages(self, group: dict[str, Any]) -> bool:
        """Whether the dense optimizer changes the state of a row whose gradient is zero, beside that of all rows."""
        raise NotImplementedError

    def _age(self, parameter: Tensor, slept: Tensor, group: dict[str, Any]) -> None:
        """Makes up for the steps that each row slept [O, 1, ...]."""
        raise NotImplementedError

    def _moves_asleep(self, group: dict[str, Any]) -> bool:
        """Whether the dense optimizer moves a row whose gradient is zero."""
        raise NotImplementedError

    def _update(self, parameter: Tensor, rows: GradientRows, step: float, group: dict[str, Any]) -> None:
        raise NotImplementedError

    # ---- what torch does not know of

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and chooses its fused implementation where nothing else is chosen.

        Raises:
            ValueError: The group has a `sparse_rows` of its own, or what torch raises it for.
        """
        if "sparse_rows" in param_group:
            raise ValueError(
                f"sparse_rows={param_group['sparse_rows']!r} in a parameter group; it is that of the whole optimizer: "
                "make one optimizer for each"
            )
        super().add_param_group(param_group)
        self._choose_fused()

    def _choose_fused(self) -> None:
        for group in self.param_groups:
            if _fits_fused(group):
                group["fused"] = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which does not look at shapes, and casts `row_step` to the parameter's dtype.

        Raises:
            ValueError: A state is not of its parameter's shape, or what torch raises it for.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            state = self.state.get(parameter, {})
            if "row_step" in state:
                row_step = state_dict["state"][index]["row_step"]
                state["row_step"] = row_step.to(dtype=torch.float32, device=parameter.device)
            for name, value in state.items():
                expected = parameter.shape[:1] if name == "row_step" else parameter.shape
                if name != "step" and isinstance(value, Tensor) and value.shape != expected:
                    raise ValueError(
                        f"the state {name!r} is {list(value.shape)}, its parameter {list(parameter.shape)}: the "
                        "state_dict is that of another model"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sparse_rows": self.sparse_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose_fused()


def _indices_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a row-sparse gradient, ascending, and their gradients."""
    if grad.sparse_dim() != 1:
        raise NotSupportedError(
            f"a gradient with {grad.sparse_dim()} sparse dimensions; meprop.optim takes those with one, the rows, as "
            "sparse_grad=True and torch.nn.Embedding(sparse=True) make them"
        )
    indices = grad._indices()[0].contiguous()
    if not grad.is_coalesced() and not ops.ascending(indices, len(grad)):  # autograd forgets whether it is coalesced
        grad = grad.coalesce()
        indices = grad._indices()[0]
    return indices, grad._values().contiguous()


def _takes_copy_along(parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> bool:
    """Whether a dense step is done here, in place of a fused one: with a copy of the weight to be written along."""
    if not group["fused"] or group.get("capturable") or group.get("amsgrad") or grad.layout != torch.strided:
        return False
    return TracingContext.try_get() is None and parameter.is_cpu and copies.current(parameter) is not None


def _fits_fused(group: dict[str, Any]) -> bool:
    """Whether torch's fused implementation takes this group, which leaves the choice to us."""
    chosen = group["fused"] is not None or group["foreach"] is not None
    if chosen or group["differentiable"] or isinstance(group["lr"], Tensor):
        return False
    # torch 2.13's fused SGD leaves most of a half-precision parameter where it is (pytorch issue 191763).
    dtypes = (torch.float32, torch.float64)
    plain = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in group["params"])  # and no DTensor
    return plain and all(parameter.is_cpu and parameter.dtype in dtypes for parameter in group["params"])


def _no_steps(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A count of steps, where torch's implementation for the group looks for it."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")


class SGD(_RowSparse, torch.optim.SGD):
    """`torch.optim.SGD`; of row-sparse gradients only the rows cost.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        momentum: Momentum factor.
        dampening: Share of each gradient that the momentum leaves out.
        weight_decay: L2 penalty.
        nesterov: Nesterov's momentum.
        maximize: Ascend instead of descend.
        foreach: torch's for-each implementation, for dense gradients.
        differentiable: Whether autograd may go through the step; for dense gradients.
        fused: torch's fused implementation, for dense gradients; None: where it takes the parameters.
        sparse_rows: "exact", "decay" or "lazy": what becomes of the rows without a gradient (`meprop.optim`).

    Raises:
        ValueError: `sparse_rows` is unknown, or what torch raises it for.
        NotSupportedError: In `step`, a sparse gradient with differentiable=True, of a complex parameter, or sparse in
            more than its rows.
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
        )

    def _ages(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0

    def _moves_asleep(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0 or group["weight_decay"] != 0

    def _update(self, parameter: Tensor, rows: GradientRows, step: float, group: dict[str, Any]) -> None:
        buffer, dampening = None, float(group["dampening"])
        if group["momentum"] != 0:
            state = self.state[parameter]
            buffer = state.get("momentum_buffer")
            if buffer is None:  # as torch: the first gradient is not dampened
                buffer = state["momentum_buffer"] = torch.zeros_like(parameter)
                dampening = 0.0
        ops.sgd_rows(
            parameter,
            buffer,
            rows,
            step,
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=dampening,
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
        )

    def _age(self, parameter: Tensor, slept: Tensor, group: dict[str, Any]) -> None:
        self.state[parameter]["momentum_buffer"] *= group["momentum"] ** slept


class Adam(_RowSparse, torch.optim.Adam):
    """`torch.optim.Adam`; of row-sparse gradients only the rows cost.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the second moment's root.
        weight_decay: L2 penalty, or, with `decoupled_weight_decay`, AdamW's.
        amsgrad: AMSGrad.
        foreach: torch's for-each implementation, for dense gradients.
        maximize: Ascend instead of descend.
        capturable: Whether the step may be captured in a CUDA graph; for dense gradients.
        differentiable: Whether autograd may go through the step; for dense gradients.
        fused: torch's fused implementation, for dense gradients; None: where it takes the parameters.
        decoupled_weight_decay: AdamW.
        sparse_rows: "exact", "decay" or "lazy": what becomes of the rows without a gradient (`meprop.optim`).

    Raises:
        ValueError: `sparse_rows` is unknown, or what torch raises it for.
        NotSupportedError: In `step`, a sparse gradient with capturable=True or differentiable=True, of a complex
            parameter, or sparse in more than its rows.
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
        )

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = _no_steps(parameter, group)
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            if name not in state:
                state[name] = torch.zeros_like(parameter)

    def _ages(self, group: dict[str, Any]) -> bool:
        return True

    def _moves_asleep(self, group: dict[str, Any]) -> bool:
        return True

    def _update(self, parameter: Tensor, rows: GradientRows, step: float, group: dict[str, Any]) -> None:
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
        )

    def _age(self, parameter: Tensor, slept: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["exp_avg"] *= beta1**slept
        state["exp_avg_sq"] *= beta2**slept
        if group["decoupled_weight_decay"]:
            parameter *= (1 - group["lr"] * group["weight_decay"]) ** slept


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`; of row-sparse gradients only the rows cost. Arguments and errors as `Adam`'s."""

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
    ) -> None:
        _RowSparse.__init__(  # torch's AdamW is next in line, which sets decoupled_weight_decay
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
        )


class Adagrad(_RowSparse, torch.optim.Adagrad):
    """`torch.optim.Adagrad`; of row-sparse gradients only the rows cost.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        lr_decay: Decay of the learning rate.
        weight_decay: L2 penalty.
        initial_accumulator_value: What the sums of squares begin with.
        eps: Added to their root.
        foreach: torch's for-each implementation, for dense gradients.
        maximize: Ascend instead of descend.
        differentiable: Whether autograd may go through the step; for dense gradients.
        fused: torch's fused implementation, for dense gradients; None: where it takes the parameters.
        sparse_rows: "exact", "decay" or "lazy": they differ by the weight decay of rows without a gradient
            (`meprop.optim`).

    Raises:
        ValueError: `sparse_rows` is unknown, or what torch raises it for.
        NotSupportedError: In `step`, a sparse gradient with differentiable=True, of a complex parameter, or sparse in
            more than its rows.
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
        )

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:  # of a group that was added later
            state["step"] = _no_steps(parameter, group)
            state["sum"] = torch.full_like(parameter, self.defaults["initial_accumulator_value"])

    def _ages(self, group: dict[str, Any]) -> bool:
        return False

    def _moves_asleep(self, group: dict[str, Any]) -> bool:
        return group["weight_decay"] != 0

    def _update(self, parameter: Tensor, rows: GradientRows, step: float, group: dict[str, Any]) -> None:
        lr = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        weight_decay, eps = group["weight_decay"], group["eps"]
        ops.adagrad_rows(parameter, self.state[parameter]["sum"], rows, step, lr=lr, weight_decay=weight_decay, eps=eps)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, which takes sparse gradients as well: they are coalesced, and clipped in place.

    Args:
        parameters: Whose gradients are clipped together.
        max_norm: Of all gradients as one vector.
        norm_type: p of the norm; inf for the largest magnitude.
        error_if_nonfinite: Raise an error if the norm is NaN or infinite.
        foreach: torch's for-each implementation.

    Returns:
        The norm before clipping.

    Raises:
        RuntimeError: `error_if_nonfinite`, and the norm is not finite.
    """
    clipped: list[Tensor] = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is None or parameter.grad.layout != torch.sparse_coo:
            clipped.append(parameter)
            continue
        parameter.grad = parameter.grad.coalesce()
        values = parameter.grad._values()
        if values.numel() > 0:
            clipped.append(torch.empty_like(values).requires_grad_())  # a stand-in, whose gradient they are
            clipped[-1].grad = values
    return torch.nn.utils.clip_grad_norm_(clipped, max_norm, norm_type, error_if_nonfinite, foreach)
