"""The plug-in protocol: what a scientific domain tells the core about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from shared.metrics import Estimate
from shared.process import State

Item = TypeVar("Item")


@dataclass(frozen=True)
class Invalid:
    """A record that could not be read, or a sample that could not be decoded, and why."""

    record: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Dense padded arrays. ``state``: field -> [batch, ...]; ``mask`` [batch, nodes] boolean or
    None; ``cond``: name -> [batch, ...]; ``noise``: the standard normals that sampling starts
    from, field -> [batch, ...], where a domain has better ones than independent draws."""

    state: State
    mask: Tensor | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    noise: State | None = None

    def __len__(self) -> int:
        return len(next(iter(self.state.values())))

    def to(self, device: Any) -> Batch:
        return Batch(
            {k: v.to(device) for k, v in self.state.items()},
            None if self.mask is None else self.mask.to(device),
            {k: v.to(device) for k, v in self.cond.items()},
            None if self.noise is None else {k: v.to(device) for k, v in self.noise.items()},
        )


class Domain(ABC, Generic[Item]):
    """One kind of thing to generate (images, 3D molecules, graphs, point clouds).

    An instance knows its data and the constants of its representation. The constants travel with
    the weights (``statistics``), so a trained model samples without the data.
    """

    name: ClassVar[str]
    solver: ClassVar[str] = "dpmpp_2m"
    grid: ClassVar[str] = "log_snr"
    """The options of the configuration groups ``solver`` and ``grid`` that suit its models."""
    grids: ClassVar[Mapping[str, str]] = {}
    """Other grids for solvers, by their class, that ``grid`` does not suit."""

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """The constants that travel with the weights, JSON-able: feature scales, element list,
        histogram of sizes, means of properties with their units."""

    def keepsakes(self) -> dict[str, bytes]:
        """File name -> content of what should stand beside shared weights, from the data where
        they are at hand."""
        return {}

    @abstractmethod
    def restore(self, statistics: Mapping[str, Any]) -> None:
        """Take the constants of a checkpoint in place of those of the data.

        Raises:
            ValueError: constants of another domain or layout.
        """

    @abstractmethod
    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """The training and the validation set. One with an attribute ``lengths`` (the size of
        every record) is trained on in batches of equal size."""

    @abstractmethod
    def collate(self, records: Sequence[Any]) -> Batch:
        """Records of a data set -> a batch in model units."""

    @abstractmethod
    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """What samples ``indices`` of ``seed`` look like before generation: zero states of the
        right shapes, mask and condition. Random choices (sizes, conditions) come from
        ``shared.randomness.stream(seed, index, "template", k)``, so sample ``index`` is the same
        in every batch. ``request`` holds the domain's own keys (number of atoms, class, ...).

        Raises:
            ValueError: an unknown or impossible request.
        """

    def null_condition(self) -> dict[str, Tensor]:
        """Condition name -> the value [1, ...] that stands for "no condition"; empty for a domain
        that was not trained with one (then no classifier-free guidance)."""
        return {}

    def finish(self, state: State, batch: Batch) -> State:
        """What becomes of finished samples, given the template ``batch`` that they were made for,
        before they are decoded: a domain whose samples depend on a condition may bring them back
        into its coordinates here. All tensors are on the CPU."""
        return state

    def variance_head(self) -> nn.Module:
        """An untrained network of a variance head (:class:`shared.variance.VarianceHead`).

        Raises:
            ValueError: the domain has none.
        """
        raise ValueError(
            f"domain {self.name} has no variance head; use the variance on average (kind=gamma)."
        )

    @abstractmethod
    def decode(self, state: State, mask: Tensor | None) -> list[Item | Invalid]:
        """Model units -> items, one per row, in order."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[Item | Invalid]:
        """Stream the items of a file or folder.

        Raises:
            FileNotFoundError, ValueError: nothing there, or no format of this domain.
        """

    @abstractmethod
    def write(self, path: Path, items: Iterable[Item]) -> None:
        """Append items to a file; the suffix says the format."""

    @property
    @abstractmethod
    def suffix(self) -> str:
        """Suffix of the sample files of this domain, such as '.sdf'."""

    @abstractmethod
    def metrics(
        self, items: Sequence[Item | Invalid], reference: Sequence[Item] | None = None
    ) -> dict[str, Estimate]:
        """Metric name -> estimate; ``reference`` where a metric compares with data."""

    @abstractmethod
    def view(self, items: Sequence[Item]) -> str:
        """An HTML fragment that shows the items; must work offline."""

    def compare(
        self, items: Sequence[Item | Invalid], reference: Sequence[Item] | None = None
    ) -> str:
        """As :meth:`view`, of judged items beside what they are compared with, where a domain
        has something to show there."""
        return self.view([item for item in items if not isinstance(item, Invalid)])
