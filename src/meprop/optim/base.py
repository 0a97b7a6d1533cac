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

from meprop import ops
from meprop.errors import NotSupportedError
from meprop.ops import GradientRows
from meprop.ops.optimizer import OF_ROWS, PARAMETER, ROW_DECAY, ROW_WEIGHT_DECAY
from meprop.ops.registry import is_plain
from meprop.row_sparse import distinct

SparseRows = Literal["exact", "decay", "lazy"]
"""What happens to the rows of a parameter that have no gradient (`meprop.optim`)."""

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_FUSED_DTYPES = (torch.float32, torch.float64)


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

        If it does that, or if there are `_decays`, ``sparse_rows="exact"`` updates all rows.
        """

    @abstractmethod
    def _decays(self, group: dict[str, Any]) -> dict[str, float]:
        """By what this step of the dense optimizer multiplies the state of a row whose gradient is zero.

        The name of each state has its factor. `PARAMETER` is the name for the weights, which decoupled weight decay
        multiplies. What such a step does not change is left out. ``sparse_rows="decay"`` makes up for these factors,
        and for what `_weight_decays` returns.
        """

    def _weight_decays(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        """What weight decay adds to the state of a row whose gradient is zero, in this step of the dense optimizer.

        The name of each state has a number, which is multiplied with the row's weights, or with their squares if the
        state is one of `_squares`. States are left out to which nothing is added.
        """
        return {}

    _squares: tuple[str, ...] = ()  # the states to which squares of gradients are added

    @abstractmethod
    def _update(self, parameter: Tensor, rows: GradientRows, step: float, group: dict[str, Any]) -> None:
        """Does the dense optimizer's step, in place, for some rows of a parameter.

        Args:
            parameter: The parameter [O, *].
            rows: Which rows are updated, with what gradient, and how far their state decays. `group["maximize"]` is
                already applied to the gradient.
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

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  (overloads)
        """One step of torch's optimizer, in which a row-sparse gradient costs only its rows.

        torch's fused implementation does the steps of dense gradients that it can do, where the user has chosen none.

        Args:
            closure: Computes the gradients again and returns the loss, as for torch's optimizer.

        Returns:
            What the closure returns; None without one.

        Raises:
            NotSupportedError: A sparse gradient is not for this optimizer (see the class).
            IndexError: A sparse gradient has a row that the parameter has not.
        """
        self._groups_made_fused: list[dict[str, Any]] = []
        step: Any = super().step.__func__  # pyright: ignore[reportFunctionMemberAccess]
        if hasattr(step, "hooked"):  # torch has put the running of hooks around it, and around this method as well
            step = step.__wrapped__
        try:
            return step(self, closure)
        finally:
            for group in self._groups_made_fused:
                group["fused"] = None

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Collects the gradients of a group for torch's `step`, which calls this once for each group.

        Row-sparse ones are taken out, and their steps done here. torch asks after this call whether the group is fused.
        """
        left_to_torch: list[Tensor] = []
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout == torch.sparse_coo:
                self._row_sparse_step(parameter, grad, group)
            else:
                self._make_up_for_missed_steps(parameter)
                left_to_torch.append(parameter)
        if _leaves_the_choice(group) and all(self._fits_fused(parameter) for parameter in left_to_torch):
            group["fused"] = True
            self._groups_made_fused.append(group)
        return super()._init_group({**group, "params": left_to_torch}, *args, **kwargs)  # pyright: ignore  (not in torch's stubs)

    def _fits_fused(self, parameter: Tensor) -> bool:
        """Whether torch's fused implementation takes this parameter with its gradient and its state as they are now.

        It is for one dtype, and reads memory in order, whatever the strides say. It takes no negative bit and no zero
        tensor. In torch 2.13 that of SGD leaves most of a half-precision parameter where it is (pytorch issue 191763).
        """
        dtype, grad = parameter.dtype, parameter.grad
        if not parameter.is_cpu or dtype not in _FUSED_DTYPES or grad is None or grad.layout is not torch.strided:
            return False
        tensors = [parameter, grad]
        if state := self.state.get(parameter):
            tensors += [value for name, value in state.items() if name != "step" and value is not None]
        if any(not is_plain(tensor) or tensor.dtype is not dtype for tensor in tensors):
            return False
        if parameter.is_contiguous():
            return all(tensor.is_contiguous() for tensor in tensors)
        form = ops.memory_format(parameter)
        return all(tensor.is_contiguous(memory_format=form) for tensor in tensors)

    def _row_sparse_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self._refuse_unsupported(parameter, group)
        indices, values = _indices_and_values(grad)
        self._init_state(parameter, group)
        if self.sparse_rows == "decay":
            decays = self._miss_step(parameter, indices, group)
        else:
            decays = {}
            self._make_up_for_missed_steps(parameter)
        changes = self._zero_gradient_moves_weights(group) or bool(self._decays(group))
        every_row = self.sparse_rows == "exact" and changes
        rows = GradientRows(indices, -values if group["maximize"] else values, every_row, decays)
        self._update(parameter, rows, self._count_step(parameter), group)
        for decay in decays.values():
            decay.index_fill_(0, indices, 1)

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

    def _count_step(self, parameter: Tensor) -> float:
        """The number of the step that begins, where the state counts steps; else 1."""
        step: Tensor | None = self.state.get(parameter, {}).get("step")
        return 1.0 if step is None else float(step.add_(1))

    # ---- steps that rows have missed

    def wake(self) -> None:
        """Brings the state of all rows up to date, after which it is what torch's own optimizer goes on from.

        With ``sparse_rows="decay"`` the state of a row falls behind while the row has no gradient. Here each row's
        momentum, moments or sums become what the steps that it missed make of them, and AdamW's weight decay of these
        steps is applied to the weights. The states whose names end in `_row_decay` or `_row_weight_decay` are removed.
        In the other modes no row falls behind, and nothing is done.

        Call it before the state_dict goes to torch's optimizer. Training may go on afterwards in any mode.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                self._make_up_for_missed_steps(parameter)

    def _make_up_for_missed_steps(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Brings the state of some rows [k] up to date; None: of all rows."""
        state, at = self.state.get(parameter, {}), slice(None) if rows is None else rows
        for name in sorted(name for name in state if name.endswith(OF_ROWS)):  # a factor comes before what is added
            decays = name.endswith(ROW_DECAY)
            behind = name.removesuffix(ROW_DECAY if decays else ROW_WEIGHT_DECAY)
            with torch.no_grad():
                tensor: Tensor = parameter if behind == PARAMETER else state[behind]
                column = state[name][at].view(-1, *[1] * (parameter.dim() - 1))
                power = 2 if behind in self._squares else 1
                made = tensor[at] * column if decays else tensor[at] + parameter[at] ** power * column
                tensor[at] = made.to(tensor.dtype)
            if rows is None:
                del state[name]

    def _miss_step(self, parameter: Tensor, indices: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Notes for all rows that they miss this step, and brings those that have a gradient up to date.

        Returns:
            By what this step multiplies each row of each state [O]: its own factor times those of missed steps. It is
            empty if the rows `indices` are up to date without that. Only weight decay costs a pass over their state.
        """
        state, factors, added = self.state[parameter], self._decays(group), self._weight_decays(parameter, group)
        noted = [name.removesuffix(ROW_WEIGHT_DECAY) for name in state if name.endswith(ROW_WEIGHT_DECAY)]
        added = dict.fromkeys(noted, 0.0) | added
        if added:
            self._make_up_for_missed_steps(parameter, indices)
        decays = {name: self._of_rows(parameter, name + ROW_DECAY, 1).mul_(factor) for name, factor in factors.items()}
        for name, number in added.items():
            self._of_rows(parameter, name + ROW_WEIGHT_DECAY, 0).mul_(factors.get(name, 1.0)).add_(number)
        if not added:
            return decays
        for name in [name for name in state if name.endswith(OF_ROWS)]:
            state[name].index_fill_(0, indices, float(name.endswith(ROW_DECAY)))
        return {}

    def _of_rows(self, parameter: Tensor, name: str, first: float) -> Tensor:
        """A state of a parameter that has one number for each row [O], in at least single precision."""
        state, dtype = self.state[parameter], torch.promote_types(parameter.dtype, torch.float32)
        if name not in state:
            state[name] = torch.full((len(parameter),), first, dtype=dtype, device=parameter.device)
        state[name] = state[name].to(dtype)
        return state[name]

    # ---- what torch does not know of

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as torch does.

        Raises:
            ValueError: The group has a `sparse_rows` of its own, or what torch raises it for.
        """
        if "sparse_rows" in param_group:
            raise ValueError(
                f"sparse_rows={param_group['sparse_rows']!r} in a parameter group; it is that of the whole optimizer: "
                "make one optimizer for each"
            )
        super().add_param_group(param_group)

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
            for name, value in state.items():
                of_rows = name.endswith(OF_ROWS)
                if of_rows:  # torch has cast it to the parameter's dtype
                    value = state[name] = state_dict["state"][index][name].to(parameter.device, copy=True)
                expected = parameter.shape[:1] if of_rows else parameter.shape
                if name != "step" and isinstance(value, Tensor) and value.shape != expected:
                    raise ValueError(
                        f"the state {name!r} is {list(value.shape)}, its parameter {list(parameter.shape)}: the "
                        "state_dict is that of another model"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sparse_rows": self.sparse_rows}


def no_steps(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A count of steps at zero, on the device on which torch's implementation for the group looks for it."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")


def _indices_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a row-sparse gradient, ascending [k], and their gradients [k, *].

    Raises:
        NotSupportedError: It is sparse in more than its rows.
        IndexError: It has a row that is not there.
    """
    if grad.sparse_dim() != 1:
        raise NotSupportedError(
            f"a gradient with {grad.sparse_dim()} sparse dimensions; meprop.optim takes those with one, the rows, as "
            "sparse_grad=True and torch.nn.Embedding(sparse=True) make them"
        )
    grad = distinct(grad)
    return grad._indices()[0].contiguous(), grad._values().contiguous()


def _leaves_the_choice(group: dict[str, Any]) -> bool:
    """Whether the user has left the choice of torch's implementation to us, and no option needs a certain one."""
    if group.get("fused", False) is not None or group["foreach"] is not None or group["differentiable"]:
        return False
    return not isinstance(group["lr"], Tensor) and TracingContext.try_get() is None
