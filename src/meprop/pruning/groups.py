"""Units of a model that are removed together, and the entries of its tensors that belong to them.

A unit is an output feature of a linear layer, an output channel of a convolution, or a hidden unit of an LSTM. It
consists of the rows that compute it, of each number that another module holds for it (as batch normalisation does), and
of the columns of all layers that read it. Units that are added or multiplied entry by entry form one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from meprop.errors import NotSupportedError
from meprop.nn.base import Layout, SparseLayer, descriptor_of
from meprop.rules import Rule


@dataclass(frozen=True)
class Producer:
    """A set of units, where it is made.

    Attributes:
        layer: The name of the layer that makes it.
        label: The name of the set. It is the layer's name where the layer makes one set, and otherwise the layer's name
            and the set's: "lstm.l1_reverse".
        width: How many units it has.
    """

    layer: str
    label: str
    width: int


def producers(name: str, layer: torch.nn.Module) -> list[Producer]:
    """The sets of units that a layer of this name makes. The list is empty if they are not known."""
    descriptor = descriptor_of(layer)
    if descriptor is None:
        return []
    sets, (_, width) = descriptor.unit_sets(layer), descriptor.features(layer)
    return [Producer(name, f"{name}.{each}" if len(sets) > 1 else name, width) for each in sets]


@dataclass(frozen=True)
class Group:
    """Units that are removed together: the first units of all its producers, the second units, and so on.

    Attributes:
        producers: The sets that it consists of. There are several where their outputs are added.
        reason: Why no unit can be removed. It is None if units can be removed.
    """

    producers: tuple[Producer, ...]
    reason: str | None

    @property
    def width(self) -> int:
        """How many units each of its producers has."""
        return self.producers[0].width


@dataclass(frozen=True)
class Units:
    """The groups of a model.

    Attributes:
        groups: All groups.
        layouts: What tensors consist of: by the names of module and tensor, then by the dimension. A layout names
            groups by their place in `groups`.
        unreached: Why nothing is known of the layers that are in no group.
    """

    groups: tuple[Group, ...]
    layouts: dict[tuple[str, str], dict[int, Layout]]
    unreached: str


def entries(
    layouts: dict[int, Layout], widths: Sequence[int], kept: dict[int, torch.Tensor], shape: Sequence[int], name: str
) -> dict[int, torch.Tensor]:
    """The entries of a tensor that stay, int64, by dimension, when some groups keep only some of their units.

    Args:
        layouts: The groups of each dimension.
        widths: The number of units of each group.
        kept: By group, the units [n] that it keeps, int64, ascending. A group that is not in it keeps all its units.
        shape: The shape of the tensor.
        name: Its name.

    Raises:
        NotSupportedError: The size of a dimension is not a multiple of the sum of the widths of its groups.
    """
    found: dict[int, torch.Tensor] = {}
    for dim, layout in layouts.items():
        parts: list[torch.Tensor] = []
        start = 0
        for group in layout:
            parts.append(start + kept.get(group, torch.arange(widths[group])))
            start += widths[group]
        if dim >= len(shape) or shape[dim] % start:
            raise NotSupportedError(
                f"{name!r} is of shape {list(shape)}; its dimension {dim} should consist of {start} units. The model "
                "has been changed since the Simplifier was made, or a handler lays out what is not there. Nothing has "
                "been changed; make a new Simplifier"
            )
        positions = shape[dim] // start
        found[dim] = (torch.cat(parts)[:, None] * positions + torch.arange(positions)).flatten()
    return found


class Finder:
    """Collects what handlers say about the units of one model.

    Each set of units begins as a group with a number of its own. `join` merges groups, which keep their numbers until
    `result` numbers them anew.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._producers: list[Producer] = []  # by number
        self._joined: list[int] = []  # by number: another group that it is merged with, or itself
        self._reasons: dict[int, str] = {}
        self._apart: dict[int, str] = {}
        self._layouts: dict[tuple[str, str], dict[int, Layout]] = {}
        self._read_directly: set[str] = set()

    def made_by(self, name: str, layer: torch.nn.Module) -> Layout:
        """The groups of the units that a layer makes."""
        made = producers(name, layer)
        if made[0] not in self._producers:
            self._joined += range(len(self._joined), len(self._joined) + len(made))
            self._producers += made
        return tuple(self._producers.index(producer) for producer in made)

    def block(self, groups: Iterable[int], reason: str) -> None:
        """Says why these groups cannot lose a unit. The first reason of a group is kept."""
        for group in groups:
            self._reasons.setdefault(group, reason)

    def block_all(self, reason: str) -> None:
        """Says why no group that is known by now can lose a unit."""
        self.block(range(len(self._producers)), reason)

    def keep_apart(self, groups: Iterable[int], what: str) -> None:
        """Says that these groups cannot lose units once they are joined with others, and what the reason calls them."""
        self._apart |= dict.fromkeys(groups, what)

    def join(self, one: Layout, other: Layout, what: str) -> None:
        """Says that the operation `what` combines units entry by entry."""
        if [self._producers[a].width for a in one] != [self._producers[b].width for b in other]:
            return self.block([*one, *other], f"{what} combines it with a tensor that has other units")
        for a, b in zip(one, other, strict=True):
            if self._find(a) != self._find(b):
                for apart in {a, b} & self._apart.keys():
                    self.block([a, b], f"{what} combines {self._apart[apart]} with others")
                self._joined[self._find(b)] = self._find(a)
        return None

    def lay_out(self, module: str, tensor: str, dims: dict[int, Layout]) -> None:
        """Says what the dimensions of a module's tensor consist of."""
        known = self._layouts.setdefault((module, tensor), dims)
        for dim, layout in known.items():
            if [*map(self._find, layout)] != [*map(self._find, dims[dim])]:
                self.block([*layout, *dims[dim]], f"{module!r} is called several times, with different units")

    def read_directly(self, tensor: str) -> None:
        """Says that the graph reads a tensor, by its full name, outside of its module."""
        self._read_directly.add(tensor)

    def result(self, seen: set[str]) -> Units:
        """The groups.

        Args:
            seen: The names of the modules that the traced graphs call.
        """
        self._block_shared_tensors()
        self._block_for_unseen(seen)
        for number, producer in enumerate(self._producers):
            layer = self.model.get_submodule(producer.layer)
            if not isinstance(layer, SparseLayer):
                self.block([number], "it is not converted, so that nothing is counted")
            elif (reason := _why_of_this_width(layer.rule, producer.width)) is not None:
                self.block([number], reason)
        for number, producer in enumerate(self._producers):  # the sets of one layer have one width
            if number in self._reasons:
                same = [other for other, its in enumerate(self._producers) if its.layer == producer.layer]
                self.block(same, self._reasons[number])
        members: dict[int, list[int]] = {}
        for number in range(len(self._producers)):
            members.setdefault(self._find(number), []).append(number)
        roots = sorted(members)
        groups: list[Group] = []
        for root in roots:
            reason = next((self._reasons[number] for number in members[root] if number in self._reasons), None)
            groups.append(Group(tuple(self._producers[number] for number in members[root]), reason))
        layouts = {
            tensor: {dim: tuple(roots.index(self._find(number)) for number in layout) for dim, layout in dims.items()}
            for tensor, dims in self._layouts.items()
        }
        return Units(tuple(groups), layouts, "it is not seen in the traced graph")

    def _find(self, number: int) -> int:
        """The group that stands for all that are merged with this one."""
        while self._joined[number] != number:
            number = self._joined[number]
        return number

    def _block_shared_tensors(self) -> None:
        """Blocks what is cut only in part: tensors that share memory, or that a layer has beside torch's."""
        owners: dict[object, list[str]] = {}
        for name, module in self.model.named_modules():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for tensor_name, tensor in own:
                owners.setdefault(_memory(tensor), []).append(full_name(name, tensor_name))
                if isinstance(module, SparseLayer) and tensor.numel() > 1:
                    self._block_unknown(name, tensor_name)
        names = {name: shared for shared in owners.values() for name in shared}
        for (module, tensor), dims in self._layouts.items():
            name = full_name(module, tensor)
            groups = [group for layout in dims.values() for group in layout]
            others = [other for other in names.get(name, []) if other != name]
            if others:
                self.block(groups, f"{name!r} is tied to {', '.join(map(repr, others))}")
            if {name, *others} & self._read_directly:
                self.block(groups, f"{name!r} is also read outside of its layer")

    def _block_unknown(self, module: str, tensor: str) -> None:
        laid_out = {own: dims for (name, own), dims in self._layouts.items() if name == module}
        if laid_out and tensor not in laid_out:
            groups = [group for dims in laid_out.values() for layout in dims.values() for group in layout]
            self.block(groups, f"{full_name(module, tensor)!r} is none of the tensors of such a layer in torch")

    def _block_for_unseen(self, seen: set[str]) -> None:
        """A layer outside of the graph may read any units, for instance in another method of the model."""
        for name, module in self.model.named_modules():
            own = {full_name(name, parameter) for parameter, _ in module.named_parameters(recurse=False)}
            if own - self._read_directly and not is_part(name, seen):
                self.block_all(f"{name!r} is not seen in the traced graph, and may read it")


def _why_of_this_width(rule: Rule, width: int) -> str | None:
    """Why a rule does not go with fewer units; None if it does."""
    try:
        rule.count(max(1, width - 1))
    except ValueError as error:
        return f"its rule does not go with fewer: {error}"
    return None


def is_part(name: str, of: set[str]) -> bool:
    """Whether a module is one of these modules, or inside of one."""
    return any(name == each or name.startswith(f"{each}.") for each in of)


def full_name(module: str, tensor: str) -> str:
    """The name in the model of a module's tensor."""
    return f"{module}.{tensor}" if module else tensor


def _memory(tensor: torch.Tensor) -> object:
    """What two tensors have in common that begin at the same place of the same memory, as one does with itself."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    address = tensor.data_ptr() if plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor) else 0  # pyright: ignore
    return (tensor.device, address) if address else id(tensor)
