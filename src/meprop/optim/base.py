"""What meprop's optimizers add to torch's: the step of a row-sparse gradient.

A new optimizer is a class in a file of its own, ``class Name(RowSparseOptimizer, torch.optim.Name)``. It fills in the
abstract methods of `RowSparseOptimizer`. They describe one step of torch's optimizer, in this module called the dense
optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._guards import TracingContext

from meprop import copies, ops
from meprop.errors import NotSupportedError
from meprop.ops import GradientRows

SparseRows = Literal["exact", "decay", "lazy"]
"""What happens to the rows of a parameter that have no gradient (`meprop.optim`)."""

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class RowSparseOptimizer(torch.optim.Optimizer, ABC):
    """Takes row-sparse gradients out of torch's `step`, and does their step itself.

    Args:
        args: As of torch's optimizer.
        sparse_rows: "exact", "decay" or "lazy": what happens to the rows without a gradient (`meprop.optim`).
        options: As of torch's optimizer.

    Raises:
        ValueError: `sparse_rows` is unknown, or what torch raises it for.
    """

    # ---- what an optimizer's file fills in; `group` is the parameter's group, with the options of torch's optimizer

    @abstractmethod
    def _init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Makes the state that the dense optimizer's first step begins with, as far as there is none yet."""

    @abstractmethod
    def _zero_gradient_moves_weights(self, group: dict[str, Any]) -> bool:
        """Whether the dense optimizer moves the weights of a row whose gradient is zero.

        If it does that, or changes the state of the row, ``sparse_rows="exact"`` updates all rows.
        """

    @abstractmethod
    def _zero_gradient_changes_state(self, group: dict[str, Any]) -> bool:
        """Whether the dense optimizer changes the state of a row whose gradient is zero.

        If so, ``sparse_rows="decay"`` keeps a `row_step`. A count of steps that all rows share is not meant.
        """

    @abstractmethod
    def _make_up_for(self, missed_steps: Tensor, parameter: Tensor, group: dict[str, Any]) -> None:
        """Changes each row's state, in place, as so many steps of the dense optimizer with a gradient of zero do.

        Weights change by decoupled weight decay alone. It is called only where `_zero_gradient_changes_state`.

        Args:
            missed_steps: How many steps each row has missed [O, 1, ...], in the parameter's dtype.
            parameter: The parameter [O, *].
            group: Its group.
        """

    @abstractmethod
    def _update(self, parameter: Tensor, rows: GradientRows, step: float, group: dict[str, Any]) -> None:
        """Does the dense optimizer's step, in place, for some rows of a parameter.

        Args:
            parameter: The parameter [O, *].
            rows: Which rows are updated, and with what gradient; `group["maximize"]` is already applied to it.
            step: The number of this step, the first being 1. It is always 1 where the state has no `step`.
            group: Its group.
        """

    # ---- the step

    def __init__(self, *args: Any, sparse_rows: SparseRows, **options: Any) -> None:
        self.sparse_rows = sparse_rows
        super().__init__(*args, **options)
        # A fused step could unscale gradients itself, but only dense ones: GradScaler is to do it before.
        self._step_supports_amp_scaling = False

    @property
    def sparse_rows(self) -> SparseRows:
        """What happens to the rows without a gradient. It may be changed between steps; ValueError if it is unknown."""
        return self._sparse_rows

    @sparse_rows.setter
    def sparse_rows(self, mode: SparseRows) -> None:
        if mode not in get_args(SparseRows):
            raise ValueError(f"sparse_rows={mode!r}; it is 'exact', 'decay' or 'lazy'")
        self._sparse_rows: SparseRows = mode

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Collects the gradients of a group for torch's `step`, which calls this once for each group.

        Two kinds of gradients are taken out, and their steps done here: row-sparse ones, and dense ones of a weight
        whose bfloat16 copy is to be written in the same pass.
        """
        left_to_torch: list[Tensor] = []
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout == torch.sparse_coo:
                self._row_sparse_step(parameter, grad, group)
                continue
            self._make_up_for_missed_steps(parameter, group)
            if _updates_copy(parameter, grad, group):
                every_index = torch.arange(len(parameter))
                self._init_state(parameter, group)
                self._update_with_copy(parameter, group, every_index, grad.contiguous())
            else:
                left_to_torch.append(parameter)
        return super()._init_group({**group, "params": left_to_torch}, *args, **kwargs)  # pyright: ignore  (not in torch's stubs)

    def _row_sparse_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self._refuse_unsupported(parameter, group)
        indices, values = _indices_and_values(grad)
        self._init_state(parameter, group)
        row_step = None
        if self.sparse_rows == "decay" and self._zero_gradient_changes_state(group):
            row_step = self._row_step(parameter, group)
        else:
            self._make_up_for_missed_steps(parameter, group)
        changes = self._zero_gradient_moves_weights(group) or self._zero_gradient_changes_state(group)
        every_row = self.sparse_rows == "exact" and changes
        self._update_with_copy(parameter, group, indices, values, every_row, row_step)

    def _refuse_unsupported(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if TracingContext.try_get() is not None:  # torch.compiler.is_compiling() is False here
            raise NotSupportedError(
                f"{type(self).__name__}.step with row-sparse gradients under torch.compile; call it outside, or use "
                "sparse_grad=False"
            )
        if group["differentiable"] or group.get("capturable") or parameter.is_complex():
            raise NotSupportedError(
                f"{type(self).__name__} with row-sparse gradients is neither differentiable nor capturable, nor for "
                "complex parameters; use sparse_grad=False there"
            )

    def _update_with_copy(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        indices: Tensor,
        values: Tensor,
        every_row: bool = False,
        row_step: Tensor | None = None,
    ) -> None:
        """Updates rows of a parameter, and the same rows of its bfloat16 copy if it has one that is up to date."""
        bf16_copy = copies.current(parameter)
        rows = GradientRows(indices, -values if group["maximize"] else values, every_row, row_step, bf16_copy)
        self._update(parameter, rows, self._count_step(parameter), group)
        if bf16_copy is not None:
            copies.mark_as_written(parameter)

    def _count_step(self, parameter: Tensor) -> float:
        """The number of the step that begins, where the state counts steps; else 1."""
        step: Tensor | None = self.state.get(parameter, {}).get("step")
        return 1.0 if step is None else float(step.add_(1))

    # ---- steps that rows have missed

    def wake(self) -> None:
        """Brings the state of all rows up to date, after which it is what torch's own optimizer goes on from.

        With ``sparse_rows="decay"`` the state of a row falls behind while the row has no gradient. Here each row's
        momentum, or moments, decay for the steps that it missed, and AdamW's weight decay of these steps is applied to
        the weights. The state `row_step` is removed. In the other modes no row falls behind, and nothing is done.

        Call it before the state_dict goes to torch's optimizer. Training may go on afterwards in any mode.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                self._make_up_for_missed_steps(parameter, group)

    def _make_up_for_missed_steps(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state.get(parameter, {})
        if "row_step" not in state:
            return
        with torch.no_grad():
            missed_steps = state["step"].to(parameter.device) - state.pop("row_step")
            missed_steps = missed_steps.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1))
            self._make_up_for(missed_steps, parameter, group)

    def _row_step(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The step until which each row's state is up to date [O], float32: at first that of all rows."""
        state = self.state[parameter]
        state.setdefault("step", no_steps(parameter, group))  # which SGD does not count otherwise
        if "row_step" not in state:
            state["row_step"] = torch.full(
                (len(parameter),), float(state["step"]), dtype=torch.float32, device=parameter.device
            )
        return state["row_step"]

    # ---- what torch does not know of

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as torch does. torch's fused implementation serves it, if no other is chosen.

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
        """Loads a state_dict as torch does, and checks the shapes of the states, which torch does not.

        Raises:
            ValueError: A state is not of its parameter's shape, or what torch raises it for.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            state = self.state.get(parameter, {})
            if "row_step" in state:  # torch has cast it to the parameter's dtype
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


def no_steps(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A count of steps at zero, on the device on which torch's implementation for the group looks for it."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")


def _indices_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a row-sparse gradient, ascending [k], and their gradients [k, *]."""
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


def _updates_copy(parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> bool:
    """Whether a dense step is done here instead of by torch's fused implementation, so that the copy is written too."""
    if not group.get("fused") or group.get("capturable") or group.get("amsgrad") or grad.layout != torch.strided:
        return False
    return TracingContext.try_get() is None and parameter.is_cpu and copies.current(parameter) is not None


def _fits_fused(group: dict[str, Any]) -> bool:
    """Whether torch's fused implementation takes this group, and the user has left the choice to us."""
    chosen = group.get("fused", False) is not None or group["foreach"] is not None
    if chosen or group["differentiable"] or isinstance(group["lr"], Tensor):
        return False
    # torch 2.13's fused SGD leaves most of a half-precision parameter where it is (pytorch issue 191763).
    dtypes = (torch.float32, torch.float64)
    plain = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in group["params"])  # and no DTensor
    return plain and all(parameter.is_cpu and parameter.dtype in dtypes for parameter in group["params"])
