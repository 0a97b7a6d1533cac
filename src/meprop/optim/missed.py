"""Steps that rows of a parameter have missed, under ``sparse_rows="decay"``: noted, and made up for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from meprop.ops.gradients import OF_ROWS, PARAMETER, ROW_DECAY, ROW_WEIGHT_DECAY
from meprop.ops.rounding import stochastic
from meprop.optim import narrow


class MissedSteps(torch.optim.Optimizer, ABC):
    """What the state of a row becomes in the steps that it misses."""

    # ---- what an optimizer's file fills in; `group` is the parameter's group, with the options of torch's optimizer

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

    # ---- the states

    _state_dtype: torch.dtype | None = None

    def _next_key(self, parameter: Tensor) -> int | None:
        """The key with which the parameter's states are rounded next. None if they are not."""
        if self._state_dtype is None:
            return None
        return narrow.next_key(self.state[parameter], parameter, self.param_groups)

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
        state, at = self.state.get(parameter, {}), ... if rows is None else rows
        for name in sorted(name for name in state if name.endswith(OF_ROWS)):  # a factor comes before what is added
            decays = name.endswith(ROW_DECAY)
            behind = name.removesuffix(ROW_DECAY if decays else ROW_WEIGHT_DECAY)
            with torch.no_grad():
                tensor: Tensor = parameter if behind == PARAMETER else state[behind]
                column = state[name][at].view(-1, *[1] * (parameter.dim() - 1))
                power = 2 if behind in self._squares else 1
                made = tensor[at] * column if decays else tensor[at] + parameter[at] ** power * column
                key = None if tensor is parameter else self._next_key(parameter)
                tensor[at] = made.to(tensor.dtype) if key is None else stochastic(made, tensor.shape, at, key)
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
