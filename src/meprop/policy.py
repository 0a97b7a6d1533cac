"""What a layer of meprop has that torch's layer has not: a policy.

A `Policy` holds the rule, the options, and the record of what was measured and counted. Every backward pass asks its
`is_sparse`, which answers whether the pass is sparse and measures first where necessary. This module also refuses the
passes that cannot be served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

from meprop import row_sparse, speed
from meprop.energy import Energy
from meprop.errors import NotSupportedError
from meprop.ops.registry import PLAIN, in_graph, is_exporting, is_proxied
from meprop.profiles import labelled
from meprop.record import Activity, Record
from meprop.rules import Rule, in_blocks
from meprop.selection import PlainTopK, Selection, is_everything

__all__ = ["Policy", "When"]


_is_compiling = torch.compiler.is_compiling

When = Literal["auto", "always"]
"""Whether a layer is always sparse ("always"), or only if that is measured to be faster ("auto")."""


@dataclass(frozen=True)
class Policy:
    """What a layer of meprop has that torch's layer has not.

    Attributes:
        rule: What the backward pass keeps.
        sparse_grad: Whether the weight's gradient is a sparse tensor of the kept rows.
        compute_dtype: The dtype of the forward product: torch.bfloat16, or None for the dtype of the tensors.
            For an LSTM it is the dtype of the weights in all products.
        when: "always" for a layer that is always sparse, "auto" for one that is sparse only if it is measured to be
            faster. It is always "always" with `sparse_grad`, because an optimizer relies on row-sparse gradients. It is
            also "always" with a rule by which several processes choose together, because they wait for each other.
        skip_zeros: Whether forward products of linear maps leave out zeros of the input, where that is measured to be
            faster.
        record: What was measured and counted. None for a call without a layer, because nothing is then.
        own_rule: The rule that the layer was converted with, while a `meprop.RuleSchedule` changes `rule`. It is the
            one that is measured. None without a schedule.

    Raises:
        TypeError: `rule` is not a Rule, or `sparse_grad` or `skip_zeros` is not a bool.
        ValueError: `sparse_grad` is used with a rule that chooses for each row or has an exact sum, or `compute_dtype`
            or `when` is unknown.
    """

    rule: Rule
    sparse_grad: bool = False
    compute_dtype: torch.dtype | None = None
    when: When = "always"
    skip_zeros: bool = False
    record: Record | None = field(default=None, compare=False, repr=False)
    own_rule: Rule | None = None

    def __post_init__(self) -> None:
        if self.when not in get_args(When):
            raise ValueError(f"when={self.when!r}; it is 'auto' or 'always'")
        if self.compute_dtype not in (None, torch.bfloat16):
            raise ValueError(f"compute_dtype={self.compute_dtype!r}; it is torch.bfloat16 or None")
        if not isinstance(self.rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers without a type checker)
            kind = type(self.rule).__name__
            raise TypeError(f"rule={self.rule!r} is of type {kind}; it must be a rule such as meprop.TopK(0.05)")
        for name in ("sparse_grad", "skip_zeros"):
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise TypeError(f"{name}={flag!r} is of type {type(flag).__name__}; it must be True or False")
        if self.sparse_grad and not self.rule.row_sparse:
            raise ValueError(
                f"sparse_grad=True with {self.rule}: rows of a weight's gradient are left out only by scope='batch', "
                "or by scope='global' with exact_sum=False"
            )
        if self.sparse_grad and not torch.compiler.is_compiling():
            row_sparse.support()
        if self.sparse_grad or self.rule.communicates:
            object.__setattr__(self, "when", "always")

    def of_layer(self) -> Policy:
        """The same policy for a layer, with a record of its own."""
        return replace(self, record=Record())

    @property
    def activities(self) -> tuple[Activity, ...]:
        """What counts units, one for each set of units of the layer. It is empty without a `meprop.Simplifier`."""
        return () if self.record is None else self.record.activities

    @property
    def activity(self) -> Activity | None:
        """What counts the units of a layer that has one set of them. None without a `meprop.Simplifier`."""
        activities = self.activities
        return activities[0] if activities else None

    @property
    def decision(self) -> speed.Decision | None:
        """What was measured of the layer. None before that."""
        return None if self.record is None else self.record.decision

    @property
    def measured_dense(self) -> bool:
        """Whether the layer is dense because that was measured to be faster. One that is "always" sparse is not."""
        return self.when == "auto" and self.decision is not None and not self.decision.sparse

    def in_blocks(self, blocks: int) -> Policy:
        """The same policy for a product whose output features are several equal blocks. Both share one record."""
        if blocks == 1:
            return self
        own_rule = None if self.own_rule is None else in_blocks(self.own_rule, blocks)
        return replace(self, rule=in_blocks(self.rule, blocks), own_rule=own_rule)

    # ---- the gate

    def may_be_sparse(self, features: int) -> bool:
        """Whether a backward pass of `features` output features has something to select or to count."""
        return len(self.activities) > 0 or not self.rule.keeps_all(features)

    def can_be_torchs(self) -> bool:
        """Whether a call whose backward pass is dense can be torch's own. It cannot with a `compute_dtype`.

        The answer is False while saved tensors go through hooks, as with torch.utils.checkpoint, which runs a forward
        pass twice. Both runs must save the same tensors, even if the layer decides between them.
        """
        return self.compute_dtype is None and (torch.compiler.is_compiling() or not _saved_tensors_are_hooked())

    def is_settled_dense(self) -> bool:
        """Whether a call is torch's own, because the layer was measured to be dense."""
        return self.measured_dense and self.can_be_torchs()

    def rests(self, features: int) -> bool:
        """Whether this forward pass is to have a dense backward pass, without asking the rule.

        With ``when="auto"`` it is, if the rule has kept so much for long that dense is faster. The rule is asked now
        and then. It is asked always if it fixes a density, as it may after a change of the rule, and in a transform of
        torch.func, which is then refused in every pass.

        Args:
            features: O, the number of output features among which the rule chooses.
        """
        if self.when == "always" or self.record is None or torch.compiler.is_compiling():
            return False
        if not self.record.keeps_too_much or self.rule.density(features) is not None or _is_transformed():
            return False
        return self.record.rests()

    def note_rest(self) -> None:
        """Notes a pass that `rests`."""
        if self._notes:
            assert self.record is not None
            self.record.note_rest()

    def is_sparse(self, features: int, rows: int, shape: Callable[[], speed.Shape[Rule]]) -> bool:
        """Whether this backward pass is sparse. Every backward pass asks this, unless the layer `rests`.

        Args:
            features: O, the number of output features among which the rule chooses.
            rows: N, the number of rows of the output gradient.
            shape: Gives what is to be timed. It is called only if a measurement decides.
        """
        if self.rule.keeps_all(features):
            return False
        if self.when == "always" or self.record is None or rows == 0:  # an empty batch tells nothing about later ones
            return True
        if self.record.decision is None:  # else an earlier product of this layer has decided
            if not speed.can_measure() or (timed := shape()).device == "meta":
                return True
            self.record.decision = speed.decide(self.own_rule or self.rule, timed)
        return self.record.decision.sparse

    def leave_to_torch(self, **tensors: Tensor | None) -> bool:
        """Leaves a forward pass to torch if it must be torch's own, and notes why.

        It must be if a tensor is not strided, or gets a gradient for each example (an ExpandedWeight).

        Args:
            tensors: The tensors of the pass by name: "input", "weight" and so on.

        Returns:
            Whether the pass is left to torch.
        """
        for name, tensor in tensors.items():
            # Only an input must be there. What is none is torch's own to refuse.
            if (tensor is not None or name == "input") and (kind := _odd_kind(tensor)) is not None:
                if self.record is not None and torch.is_grad_enabled():
                    self.record.left_to_torch = f"its {name} is {kind}"
                return True
        return False

    def note_sparse_pass(self) -> None:
        """Notes that a backward pass is sparse.

        A pass that torch.compile traces with its forward pass is known from there. Compiled autograd traces it alone.
        """
        if self.record is None:
            return
        if not torch.compiler.is_compiling():
            self.record.sparse_passes += 1
        elif _is_compiled_autograd():
            self.record.compiled = True

    @labelled("meprop.select")
    def select(self, rule: Rule, grad_NO: Tensor) -> Selection:
        """What a rule of this policy keeps of an output gradient [N, O]. It is noted."""
        selection = rule.select(grad_NO)
        self.note(selection)
        return selection

    def note(self, selection: Selection) -> None:
        """Notes the density of a backward pass, unless it becomes a graph."""
        if self._notes:
            entries = selection.rows * selection.width
            self._note(round(selection.density * entries), entries, is_everything(selection))

    def note_kept(self, kept: int, grad_NO: Tensor) -> None:
        """Notes how many entries of an output gradient [N, O] a backward pass kept."""
        if self._notes:
            self._note(kept, grad_NO.numel(), kept == grad_NO.numel())

    def note_topk(self, choice: PlainTopK, grad_NO: Tensor) -> None:
        """Notes a top-k of one of two products. That of both is known before, and is not noted."""
        self.note_kept(len(grad_NO) * choice.k * choice.blocks, grad_NO)

    def energy_of(self, grad: Tensor) -> Energy | None:
        """What counts the energy of this output gradient. None unless a `meprop.Meter` asks for it in this pass.

        It counts no graph, and no tensor without contents.
        """
        if self.record is None or _is_compiling() or self.record.energy is None:
            return None
        return None if is_proxied() or grad.is_meta or type(grad) not in PLAIN else self.record.energy

    @property
    def _notes(self) -> bool:
        return self.record is not None and not in_graph()

    def _note(self, kept: int, seen: int, dense: bool) -> None:
        assert self.record is not None
        self.record.note(kept, seen, 1, int(dense))

    def note_steps(self, kept: Tensor, seen: Tensor) -> None:
        """Notes how many entries each time step of a backward pass kept [T], and how many it had [T].

        Each time step counts as a pass.
        """
        if self.record is not None:
            self.record.note(int(kept.sum()), int(seen.sum()), len(kept), int((kept == seen).sum()))

    # ---- refusals

    def refuse(self, weight: Tensor) -> None:
        """Refuses a forward pass whose backward pass would go wrong.

        Raises:
            NotSupportedError: Under torch.compile, row-sparse gradients or a Simplifier's counts; a weight that is a
                DTensor; row-sparse gradients in DistributedDataParallel, or of a weight that is computed.
        """
        if not torch.compiler.is_compiling():
            if self.sparse_grad:
                row_sparse.support()  # a layer that was unpickled has made no policy
            return self._refuse_weight(weight)
        if self.record is not None:
            self.record.compiled = True
        if self.sparse_grad:
            raise NotSupportedError(
                "sparse_grad=True: torch.compile has no sparse gradients; use sparse_grad=False with it"
            )
        if self.activities:
            raise NotSupportedError(
                "a layer that a meprop.Simplifier watches counts in its backward pass, which torch.compile cannot "
                "trace. Compile without fullgraph=True, or compile what Simplifier.compact() returns."
            )
        return None

    def _refuse_weight(self, weight: Tensor) -> None:
        if type(weight) not in (Tensor, torch.nn.Parameter) and hasattr(weight, "device_mesh"):
            raise NotSupportedError(
                "the weight is a DTensor. It comes from tensor parallelism, or from fully_shard outside of the "
                "module's forward pass. Sparse back-propagation takes whole weights. Keep such a layer torch's own."
            )
        if not self.sparse_grad:
            return
        if not _is_parameter(weight):
            raise NotSupportedError(
                "sparse_grad=True with a weight that is computed from other parameters, as by weight_norm. Torch "
                "passes no row-sparse gradient on to them. Use sparse_grad=False."
            )
        if DistributedDataParallel._get_active_ddp_module() is not None:  # pyright: ignore[reportPrivateUsage]
            raise NotSupportedError(
                "sparse_grad=True in DistributedDataParallel, which takes dense gradients only. Use sparse_grad=False "
                "with meprop.distributed.row_sparse_hook, or leave the model unwrapped and call "
                "meprop.distributed.average_gradients after backward()."
            )


def _odd_kind(tensor: Tensor | None) -> str | None:
    """What a tensor is that only torch's own functions take. None for others."""
    if type(tensor).__name__ == "ExpandedWeight":  # it has no layout; importing its class takes long
        return "an ExpandedWeight"
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  (torch says what it takes)
        return f"of type {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout is torch.strided else str(tensor.layout)


def _is_compiled_autograd() -> bool:
    """Whether a backward pass that is traced is one of compiled autograd."""
    from torch._dynamo import compiled_autograd  # it is there whenever something is traced

    return compiled_autograd.in_compiled_autograd_region


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass of ours may follow. In a graph of torch.jit.trace or torch.export it is torch's own."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled() and not torch.jit.is_tracing() and not is_exporting()
    return False


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raises a NotSupportedError in a forward pass that is transformed, if a node of ours is to be in its graph."""
    if torch.compiler.is_compiling():
        return
    if is_transformed(*tensors):
        raise NotSupportedError(
            "a transform of torch.func (grad, vmap, jvp and so on), or forward-mode differentiation, which a sparse "
            "backward pass has no rules for; transform a plain copy of the model, made by copy.deepcopy and "
            "meprop.revert"
        )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether these tensors go through a transform of torch.func, or forward-mode differentiation."""
    return _is_transformed() or (_in_forward_mode() and any(map(is_dual, tensors)))


def is_dual(tensor: Tensor | None) -> bool:
    """Whether the tensor has a tangent of forward-mode differentiation."""
    return tensor is not None and _in_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def refuse_dtype(weight: Tensor) -> None:
    """Raises a TypeError for a weight that is not of a floating dtype."""
    if not weight.is_floating_point():
        raise TypeError(
            f"weight is of dtype {weight.dtype}; sparse back-propagation is for floating dtypes, not complex"
        )


def refuse_transforms_of_backward(*grad_outputs: Tensor | None) -> None:
    """Raises a NotSupportedError in a backward pass that is itself to be differentiated, or is vectorised."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise NotSupportedError(
            "create_graph=True: a sparse backward pass has no gradient of its own. What it left out has no graph. "
            "For this pass call meprop.revert(model), or use torch's own function."
        )
    for grad in grad_outputs:
        if grad is not None and (_is_batched(grad) or _is_wrapped(grad)):
            raise NotSupportedError(
                "several output gradients at once (is_grads_batched=True, jacobian with vectorize=True, vmap), which a "
                "sparse backward pass has no rules for. Pass them one by one, or call meprop.revert(model) before."
            )


_is_transformed = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore


def _is_parameter(weight: Tensor) -> bool:
    """Whether the weight is a leaf of the graph, or a part of one."""
    base = weight._base
    return weight.is_leaf or (base is not None and base.is_leaf)


def _saved_tensors_are_hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore
