"""What meprop's optimizers add to torch's: the step of a row-sparse gradient, native steps, and `in_backward`.

A new optimizer is a class in a file of its own, ``class Name(RowSparseOptimizer, torch.optim.Name)``. It fills in the
abstract methods of `RowSparseOptimizer` and `MissedSteps`. They describe one step of torch's optimizer, in this module
called the dense optimizer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._guards import TracingContext

from meprop import casts, ops
from meprop.errors import NotSupportedError
from meprop.ops import Gradient, GradientProduct, GradientRows
from meprop.ops.gradients import OF_ROWS
from meprop.ops.optimizer import takes_whole
from meprop.ops.registry import is_plain
from meprop.optim import narrow
from meprop.optim.in_backward import InBackward, refuse_scaler
from meprop.optim.missed import MissedSteps
from meprop.row_sparse import distinct

SparseRows = Literal["exact", "decay", "lazy"]
"""What happens to the rows of a parameter that have no gradient (`meprop.optim`)."""

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_OF_ALL = ("sparse_rows", "in_backward", "state_dtype", "copy_dtype")
"""The options that are those of the whole optimizer."""

_FUSED_DTYPES = (torch.float32, torch.float64)


class RowSparseOptimizer(MissedSteps):
    """Takes row-sparse gradients out of torch's `step`, and does their step itself.

    Args:
        args: As of torch's optimizer.
        sparse_rows: "exact", "decay" or "lazy": what happens to the rows without a gradient (`meprop.optim`).
        in_backward: Whether the backward pass updates each large parameter as soon as its gradient is complete
            (`meprop.optim`).
        state_dtype: torch.bfloat16, or None for the dtype of each parameter (`meprop.optim`).
        copy_dtype: torch.bfloat16, or None for no copies of weights (`meprop.optim`).
        options: As of torch's optimizer.

    Raises:
        TypeError: `in_backward` is not a bool, or `state_dtype` or `copy_dtype` is no dtype.
        ValueError: `sparse_rows`, `state_dtype` or `copy_dtype` is unknown, `in_backward` is used with
            differentiable=True, or what torch raises it for.
        NotSupportedError: There is no step with `state_dtype` for an option or a parameter.
    """

    # ---- what an optimizer's file fills in, beside `MissedSteps`; `group` is the parameter's group, with its options

    @abstractmethod
    def _init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Makes the state that the dense optimizer's first step begins with, as far as there is none yet."""

    @abstractmethod
    def _zero_gradient_moves_weights(self, group: dict[str, Any]) -> bool:
        """Whether the dense optimizer moves the weights of a row whose gradient is zero.

        If it does that, or if there are `_decays`, ``sparse_rows="exact"`` updates all rows.
        """

    @abstractmethod
    def _update(self, parameter: Tensor, rows: Gradient, step: float | Tensor, group: dict[str, Any]) -> None:
        """Does the dense optimizer's step, in place, for some rows of a parameter.

        Args:
            parameter: The parameter [O, *].
            rows: Which rows are updated, with what gradient, and how far their state decays. `group["maximize"]` is
                already applied to the gradient. It is a product, or that of all rows, only if `_takes_whole`.
            step: The number of this step, the first being 1. It is always 1 where the state has no `step`, and a tensor
                [] if the group is capturable.
            group: Its group.
        """

    def _takes_whole(self, group: dict[str, Any]) -> bool:
        """Whether native code does the step of dense gradients, so that `_update` takes a gradient of all rows."""
        return False

    # ---- the step

    _updates: InBackward | None = None
    """What does the updates in the backward pass. None if `step` does them."""
    _copy_dtype: torch.dtype | None = None

    def __init__(
        self,
        *args: Any,
        sparse_rows: SparseRows,
        in_backward: bool = False,
        state_dtype: torch.dtype | None = None,
        copy_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.sparse_rows = sparse_rows
        self._state_dtype = narrow.checked("state_dtype", state_dtype)
        self._copy_dtype = narrow.checked("copy_dtype", copy_dtype)
        if not isinstance(in_backward, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"in_backward={in_backward!r} is of type {type(in_backward).__name__}; it is True or False")
        super().__init__(*args, **options)
        if self._state_dtype is not None:
            for state in self.state.values():  # torch has made that of Adagrad
                narrow.narrow(state, self._state_dtype)
        if in_backward:
            self._updates = InBackward(self)

    @property
    def in_backward(self) -> bool:
        """Whether the backward pass updates the parameters."""
        return self._updates is not None

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The dtype of the states. None for that of each parameter."""
        return self._state_dtype

    @property
    def copy_dtype(self) -> torch.dtype | None:
        """The dtype of the copies of large weights. None if there are none."""
        return self._copy_dtype

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
            NotSupportedError: A sparse gradient is not for this optimizer (see the class), a parameter has a second
                gradient with `in_backward`, or there is no step with `state_dtype`.
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
        left_to_us = [group for group in self.param_groups if _leaves_the_choice(group)]
        step: Any = super().step.__func__  # pyright: ignore[reportFunctionMemberAccess]
        if hasattr(step, "hooked"):  # torch has put the running of hooks around it, and around this method as well
            step = step.__wrapped__
        try:
            return step(self, closure)
        finally:
            for group in left_to_us:
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
        self._whole_step(parameter, GradientRows(None, -grad if group["maximize"] else grad, True), group)
        return True

    def _step_of_product(self, parameter: Tensor, product: GradientProduct, group: dict[str, Any]) -> bool:
        """Does the step of a parameter whose gradient is a product that has not been formed, if native code can."""
        if product.indices is None:
            self._make_up_for_missed_steps(parameter)
        if not self._fits_native(parameter, None, group):
            return False
        if product.indices is None:
            self._whole_step(parameter, product, group)
        else:
            self._step_of_rows(parameter, product.indices, product, group)
        return True

    def _whole_step(self, parameter: Tensor, gradient: Gradient, group: dict[str, Any]) -> None:
        self._init_state(parameter, group)
        self._count_and_update(parameter, gradient, group)

    def _count_and_update(self, parameter: Tensor, gradient: Gradient, group: dict[str, Any]) -> None:
        self._update(parameter, gradient, self._count_step(parameter, group), group)
        casts.written(parameter)

    def _copy_of(self, parameter: Tensor) -> Tensor | None:
        """The parameter in `copy_dtype`, to which `_update` writes the same rows. None if it writes no copy."""
        return None if self._copy_dtype is None else casts.kept(parameter, self._copy_dtype)

    def _fits_native(self, parameter: Tensor, grad: Tensor | None, group: dict[str, Any]) -> bool:
        """Whether a dense gradient's step is not torch's, but ours. An implementation that the user chooses does it.

        Without a gradient it is that of a product.
        """
        if self._state_dtype is not None:
            self._prepare_narrow(parameter, group)
            return grad is not None or not group["maximize"]
        if not takes_whole(parameter, grad) or not self._takes_whole(group):
            return False
        if group["maximize"] or not _leaves_the_choice(group):
            return False
        state = self.state.get(parameter, {})
        return takes_whole(parameter, *_tensors(state))

    def _prepare_narrow(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Refuses a step that there is not with states in bfloat16, and narrows states that come from elsewhere."""
        assert self._state_dtype is not None  # the caller asks
        narrow.refuse(type(self).__name__, group, [parameter])
        narrow.narrow(self.state.get(parameter, {}), self._state_dtype)

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
            tensors += _tensors(state)
        if any(not is_plain(tensor) or tensor.dtype is not dtype for tensor in tensors):
            return False
        if parameter.is_contiguous():
            return all(tensor.is_contiguous() for tensor in tensors)
        form = ops.memory_format(parameter)
        return all(tensor.is_contiguous(memory_format=form) for tensor in tensors)

    def _row_sparse_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self._refuse_unsupported(parameter, group)
        if self._state_dtype is not None:
            self._prepare_narrow(parameter, group)
        indices, values = _indices_and_values(grad)
        self._step_of_rows(parameter, indices, GradientRows(indices, -values if group["maximize"] else values), group)

    def _step_of_rows(self, parameter: Tensor, indices: Tensor, gradient: Gradient, group: dict[str, Any]) -> None:
        self._init_state(parameter, group)
        if self.sparse_rows == "decay":
            decays = self._miss_step(parameter, indices, group)
        else:
            decays = {}
            self._make_up_for_missed_steps(parameter)
        changes = self._zero_gradient_moves_weights(group) or bool(self._decays(group))
        every_row = self.sparse_rows == "exact" and changes
        self._count_and_update(parameter, gradient.of_step(every_row, decays), group)
        for decay in decays.values():
            decay.index_fill_(0, indices, 1)

    def _refuse_unsupported(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if TracingContext.try_get() is not None:  # torch.compiler.is_compiling() is False here
            raise NotSupportedError(
                f"{type(self).__name__}.step with row-sparse gradients under torch.compile; call it outside, or use "
                "sparse_grad=False"
            )
        if group.get("capturable") and isinstance(group["lr"], Tensor):
            raise NotSupportedError(
                f"{type(self).__name__} with row-sparse gradients and capturable=True takes the learning rate as a "
                "number, which a graph keeps; capture a graph for each learning rate"
            )
        if group["differentiable"] or parameter.is_complex():
            raise NotSupportedError(
                f"{type(self).__name__} with row-sparse gradients is not differentiable, nor for complex parameters; "
                "use sparse_grad=False there"
            )

    def _count_step(self, parameter: Tensor, group: dict[str, Any]) -> float | Tensor:
        """The number of the step that begins, where the state counts steps; else 1. A captured graph counts itself."""
        step: Tensor | None = self.state.get(parameter, {}).get("step")
        if step is None:
            return 1.0
        return step.add_(1) if group.get("capturable") and step.is_cuda else float(step.add_(1))

    # ---- what torch does not know of

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as torch does.

        Raises:
            ValueError: The group has another `sparse_rows`, `in_backward`, `state_dtype` or `copy_dtype` than the
                optimizer, or what torch raises it for.
            NotSupportedError: There is no step with the optimizer's `state_dtype` for the group. It is not added.
        """
        of_all = {name: getattr(self, name) for name in _OF_ALL}
        for name in of_all.keys() & param_group.keys():
            if param_group[name] != of_all[name]:
                raise ValueError(
                    f"{name}={param_group[name]!r} in a parameter group; it is that of the whole optimizer: make one "
                    "optimizer for each"
                )
        param_group = {name: value for name, value in param_group.items() if name not in of_all}
        super().add_param_group(param_group)
        if self._state_dtype is not None:
            try:
                narrow.refuse(type(self).__name__, self.param_groups[-1], self.param_groups[-1]["params"])
            except NotSupportedError:
                self.param_groups.pop()
                raise
        if self._updates is not None:
            self._updates.attach()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict as torch does, and checks the shapes of the states, which torch does not.

        It may be that of an optimizer with another `state_dtype`. States become of this one's dtype.

        Raises:
            ValueError: A state is not of its parameter's shape, or what torch raises it for.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            state = self.state.get(parameter, {})
            if self._state_dtype is not None:
                narrow.narrow(state, self._state_dtype)
            else:
                state.pop(narrow.ROUNDING, None)
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
        own = {"_sparse_rows": self.sparse_rows, "_state_dtype": self.state_dtype, "_copy_dtype": self.copy_dtype}
        state = {**super().__getstate__(), **own}
        return {**state, "in_backward": True} if self.in_backward else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        in_backward = state.pop("in_backward", self.in_backward)
        super().__setstate__(state)
        if in_backward:  # also after load_state_dict, which replaces the groups
            self._updates = self._updates or InBackward(self)
            self._updates.attach()


def no_steps(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A count of steps at zero, on the device on which torch's implementation for the group looks for it."""
    at_hand = group.get("fused") or group.get("capturable")
    return torch.zeros((), dtype=torch.float32, device=parameter.device if at_hand else "cpu")


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    """The states of a parameter that are tensors, but for its count of steps."""
    return [value for name, value in state.items() if name != "step" and isinstance(value, Tensor)]


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
