"""What meprop's optimizers add to torch's: the step of a row-sparse gradient, native steps, and `in_backward`.

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
from meprop.ops import Gradient, GradientProduct, GradientRows
from meprop.ops.optimizer import OF_ROWS, PARAMETER, ROW_DECAY, ROW_WEIGHT_DECAY, takes_whole
from meprop.ops.registry import is_plain
from meprop.optim.in_backward import InBackward, refuse_scaler
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
        in_backward: Whether the backward pass updates each large parameter as soon as its gradient is complete
            (`meprop.optim`).
        options: As of torch's optimizer.

    Raises:
        TypeError: `in_backward` is not a bool.
        ValueError: `sparse_rows` is unknown, `in_backward` is used with differentiable=True, or what torch raises it
            for.
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
    def _update(self, parameter: Tensor, rows: Gradient, step: float, group: dict[str, Any]) -> None:
        """Does the dense optimizer's step, in place, for some rows of a parameter.

        Args:
            parameter: The parameter [O, *].
            rows: Which rows are updated, with what gradient, and how far their state decays. `group["maximize"]` is
                already applied to the gradient. It is a product, or that of all rows, only if `_takes_whole`.
            step: The number of this step, the first being 1. It is always 1 where the state has no `step`.
            group: Its group.
        """

    def _takes_whole(self, group: dict[str, Any]) -> bool:
        """Whether native code does the step of dense gradients, so that `_update` takes a gradient of all rows."""
        return False

    # ---- the step

    _updates: InBackward | None = None
    """What does the updates in the backward pass. None if `step` does them."""

    def __init__(self, *args: Any, sparse_rows: SparseRows, in_backward: bool = False, **options: Any) -> None:
        self.sparse_rows = sparse_rows
        if not isinstance(in_backward, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"in_backward={in_backward!r} is of type {type(in_backward).__name__}; it is True or False")
        super().__init__(*args, **options)
        if in_backward:
            self._updates = InBackward(self)

    @property
    def in_backward(self) -> bool:
        """Whether the backward pass updates the parameters."""
        return self._updates is not None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A fused step could unscale gradients itself, but only dense ones: GradScaler is to do it before."""
        if self._updates is not None:
            refuse_scaler()
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, _: bool) -> None:
        """Torch sets it for a fused implementation."""

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

        Where the user has chosen no implementation, native code does the steps of large parameters with dense gradients
        that it can do. Torch's fused implementation does those of the rest that it can do.

        With `in_backward` the backward pass has done the steps of large parameters. All that have a gradient left have
        their steps here. After that the next backward pass may update again.

        Args:
            closure: Computes the gradients again and returns the loss, as for torch's optimizer.

        Returns:
            What the closure returns; None without one.

        Raises:
            NotSupportedError: A sparse gradient is not for this optimizer (see the class), or a parameter has a
                second gradient with `in_backward`.
            IndexError: A sparse gradient has a row that the parameter has not.
        """
        if self._updates is None:
            return self._step(closure)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        with torch.no_grad():
            self._updates.end_step()
        return result

    def _step(self, closure: Any = None) -> Any:
        self._groups_made_fused: list[dict[str, Any]] = []
        step: Any = super().step.__func__  # pyright: ignore[reportFunctionMemberAccess]
        if hasattr(step, "hooked"):  # torch has put the running of hooks around it, and around this method as well
            step = step.__wrapped__
        try:
            return step(self, closure)
        finally:
            for group in self._groups_made_fused:
                group["fused"] = None

    def _step_alone(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Does the step of one parameter that has a gradient: the same as `step` does for it.

        Args:
            parameter: The parameter.
            group: Its group.
        """
        if self._step_here(parameter, group):
            return
        alone = object.__new__(type(self))
        vars(alone).update(vars(self), param_groups=[{**group, "params": [parameter]}])
        alone._step()

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Collects the gradients of a group for torch's `step`, which calls this once for each group.

        Those whose steps are done here are taken out. torch asks after this call whether the group is fused.
        """
        with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
        left_to_torch = [parameter for parameter in with_gradient if not self._step_here(parameter, group)]
        if _leaves_the_choice(group) and all(self._fits_fused(parameter) for parameter in left_to_torch):
            group["fused"] = True
            self._groups_made_fused.append(group)
        return super()._init_group({**group, "params": left_to_torch}, *args, **kwargs)  # pyright: ignore  (not in torch's stubs)

    def _step_here(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Does the step of a parameter that has a gradient, if it is a row-sparse one, or one for native code."""
        grad = parameter.grad
        assert grad is not None  # it was looked for before
        if grad.layout == torch.sparse_coo:
            self._row_sparse_step(parameter, grad, group)
            return True
        self._make_up_for_missed_steps(parameter)
        if not self._fits_native(parameter, grad, group):
            return False
        self._whole_step(parameter, GradientRows(None, grad, True), group)
        return True

    def _step_of_product(self, parameter: Tensor, product: GradientProduct, group: dict[str, Any]) -> bool:
        """Does the step of a parameter whose gradient is a product that has not been formed, if native code can."""
        self._make_up_for_missed_steps(parameter)
        if not self._fits_native(parameter, None, group):
            return False
        self._whole_step(parameter, product, group)
        return True

    def _whole_step(self, parameter: Tensor, gradient: Gradient, group: dict[str, Any]) -> None:
        self._init_state(parameter, group)
        self._update(parameter, gradient, self._count_step(parameter), group)

    def _fits_native(self, parameter: Tensor, grad: Tensor | None, group: dict[str, Any]) -> bool:
        """Whether native code does the step of a dense gradient. An implementation that the user chooses does it."""
        if not takes_whole(parameter, grad) or not self._takes_whole(group):
            return False
        if group["maximize"] or not _leaves_the_choice(group):
            return False
        state = self.state.get(parameter, {})
        return takes_whole(parameter, *(value for name, value in state.items() if name != "step"))

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
        if "in_backward" in param_group:
            raise ValueError(
                f"in_backward={param_group['in_backward']!r} in a parameter group; it is that of the whole optimizer: "
                "make one optimizer for each"
            )
        super().add_param_group(param_group)
        if self._updates is not None:
            self._updates.attach()

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
        state = {**super().__getstate__(), "_sparse_rows": self.sparse_rows}
        return {**state, "in_backward": True} if self.in_backward else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        in_backward = state.pop("in_backward", self.in_backward)
        super().__setstate__(state)
        if in_backward:  # also after load_state_dict, which replaces the groups
            self._updates = self._updates or InBackward(self)
            self._updates.attach()


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
