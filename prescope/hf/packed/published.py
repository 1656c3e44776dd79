"""How tools write packed matrices into checkpoints: the tensors of one matrix, and how they become one of our formats.

One class for each way of writing. Nothing here knows where in a model a matrix belongs.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format
from .checkpoint import Checkpoint, Entry

#: What scales of plain numbers can be, as safetensors spells it.
FLOATS = ("F32", "BF16", "F16")
#: What tools write of a linear's activations beside its weights, by role: left aside, and part of the matrix, so that
#: nobody takes it for weights.
OF_ACTIVATIONS = {
    "activation": ".activation_scale", "act": ".qscale_act", "input": ".input_scale", "input_zero": ".input_zero_point",
    "input_global": ".input_global_scale", "output": ".output_scale", "output_zero": ".output_zero_point",
}  # fmt: skip
#: Tensors of one matrix, by role.
Tensors = Mapping[str, torch.Tensor]
Entries = Mapping[str, Entry]


class Naming(NamedTuple):
    """What the tensors of one matrix are called.

    Attributes:
        roles: role -> what follows the stem; "weight" is one. The last one is there for packed matrices only.
        optional: roles that may be missing.
        weight: what the plain weight would have behind the stem.
        weight_dtypes: without one of them in the role "weight", tensors of these names are something else; empty: any.
    """

    roles: dict[str, str]
    optional: dict[str, str]
    weight: str
    weight_dtypes: tuple[str, ...] = ()


class Wanted(NamedTuple):
    """What a tensor of a packed matrix can be.

    Attributes:
        dtypes: as safetensors spells them.
        shapes: one of them; None for any.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None


class Published(ABC):
    """A way in which packed matrices are written.

    Attributes:
        label: in words.
        namings: tried one after the other.
        weight_dims: numbers of dimensions that the tensor in the role "weight" can have.
        is_out_in: see there.
    """

    label: str
    namings: tuple[Naming, ...]
    weight_dims: tuple[int, ...] = (2,)
    #: Whether tensors of all experts are (E, out, in) even where the plain ones of the family are (E, in, out).
    is_out_in = False

    @abstractmethod
    def shape(self, entries: Entries) -> tuple[int, ...]:
        """Shape of the plain weight: (N, K), or (E, N, K) of all experts."""

    @abstractmethod
    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        """What the tensors of a matrix can be, by role, where the weights' own have the right dimensions.

        Raises:
            UnsupportedExperts: nothing here holds such a matrix.
        """

    @abstractmethod
    def format(self, entries: Entries) -> Format:
        """What a matrix is brought to, where its tensors are as they are wanted.

        Raises:
            UnsupportedExperts: nothing here holds it exactly.
        """

    @abstractmethod
    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The format's parts of a matrix, by suffix, without loss."""

    def check(self, tensors: Tensors, where: str) -> None:  # noqa: B027 - most say all in their headers
        """Look at what only the values say.

        Raises:
            UnsupportedExperts: they say that it cannot be read.
        """


class Matrix(NamedTuple):
    """One packed matrix of a checkpoint, or one of all experts.

    Attributes:
        stem: what its tensors' names begin with.
        weight: name that the plain weight would have.
        names: of its tensors, by role.
    """

    published: Published
    stem: str
    weight: str
    names: dict[str, str]

    def shape(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.published.shape(self._entries(checkpoint))[-2:]
        return rows, columns

    def num_experts(self, checkpoint: Checkpoint) -> int | None:
        """Of a matrix of all experts; None of a single one."""
        shape = self.published.shape(self._entries(checkpoint))
        return shape[0] if len(shape) == 3 else None

    def format(self, checkpoint: Checkpoint) -> Format:
        """What it is brought to.

        Raises:
            UnsupportedExperts: nothing here holds it exactly, or its tensors do not belong together.
        """
        entries = self._entries(checkpoint)
        try:
            _require_wanted(self.published, entries)
            return self.published.format(entries)
        except UnsupportedExperts as error:
            raise UnsupportedExperts(f"{self.stem} is packed ({self.published.label}): {error}") from error

    def check(self, checkpoint: Checkpoint) -> None:
        """Look at what only its values say; raises UnsupportedExperts."""
        self.published.check(_Read(checkpoint, self.names), self.stem)

    def read(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The format's parts, by suffix; raises as `check`."""
        self.check(checkpoint)
        return self.published.convert(_Read(checkpoint, self.names))

    def _entries(self, checkpoint: Checkpoint) -> dict[str, Entry]:
        return {role: checkpoint.entries[name] for role, name in self.names.items()}


def _require_wanted(published: Published, entries: Entries) -> None:
    """Hold the headers of a matrix's tensors against what they can be: scales of other rows would be taken for its own.

    Raises:
        UnsupportedExperts: one is of another dtype or shape.
    """
    if len(entries["weight"].shape) not in published.weight_dims:
        raise UnsupportedExperts(f"its weight is of shape {entries['weight'].shape}")
    for role, (dtypes, shapes) in published.wanted(entries).items():
        found = entries.get(role)
        if found is not None and (
            found.dtype not in dtypes or (shapes is not None and found.shape not in shapes)
        ):
            raise UnsupportedExperts(
                f"its {role} is {found.dtype} of shape {found.shape} and not {' or '.join(dtypes)}"
                + ("" if shapes is None else f" of shape {' or '.join(map(str, shapes))}")
            )


class _Read(Mapping[str, torch.Tensor]):
    """A matrix's tensors by role, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    def __getitem__(self, role: str) -> torch.Tensor:
        return self._checkpoint.read(self._names[role])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Group(NamedTuple):
    """Matrices that are written in one way, where a checkpoint has several.

    Attributes:
        targets: module names, patterns of them ("re:...") or classes ("Linear"), as compressed-tensors takes them.
    """

    published: Published
    targets: tuple[str, ...] = ()

    def distance(self, module: str) -> int:
        """How directly the targets name a module: 0 by its name, 1 by a pattern, 2 perhaps by its class, 3 not."""
        if module in self.targets:
            return 0
        patterns = [target.removeprefix("re:") for target in self.targets if target.startswith("re:")]
        if any(re.match(pattern, module) for pattern in patterns):
            return 1
        return 2 if any(target.isidentifier() for target in self.targets) else 3


def matrices_in(groups: Sequence[Group], entries: Mapping[str, Entry]) -> list[Matrix]:
    """All packed matrices among a checkpoint's tensors, each by the group that names it most directly.

    Of those that have its tensors: names of modules may have changed since the configuration was written.
    """
    found: dict[str, tuple[int, Matrix]] = {}
    for group in groups:
        for matrix in _written_as(group.published, entries):
            distance = group.distance(matrix.stem)
            if matrix.stem not in found or distance < found[matrix.stem][0]:
                found[matrix.stem] = distance, matrix
    return [matrix for _, matrix in found.values()]


def _written_as(published: Published, entries: Mapping[str, Entry]) -> list[Matrix]:
    """All matrices that have the tensors of one way of writing, each by the first naming that finds its weight."""
    found: dict[str, Matrix] = {}
    for naming in published.namings:
        marker = list(naming.roles.values())[-1]
        for name in entries:
            stem = name.removesuffix(marker)
            if stem == name or stem + naming.weight in found:
                continue
            names = {role: stem + suffix for role, suffix in naming.roles.items()}
            if all(other in entries for other in names.values()):
                if naming.weight_dtypes and entries[names["weight"]].dtype not in naming.weight_dtypes:
                    continue
                more = {role: stem + suffix for role, suffix in naming.optional.items()}
                names |= {role: other for role, other in more.items() if other in entries}
                weight = stem + naming.weight
                found[weight] = Matrix(published, stem, weight, names)
    return list(found.values())
