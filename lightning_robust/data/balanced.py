"""Training batches in which all domains are equally frequent."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_robust.errors import ConfigError


class DomainBalancedSampler(DistributedSampler[int]):
    """Orders examples so that every batch holds (nearly) as many of each domain.

    Give it to a DataLoader with the same ``batch_size``, as ``sampler=``. An epoch has as many examples as the
    data set, so those of small domains come several times, and of large ones a different part comes in each
    epoch. The order depends on ``seed`` and the epoch only. Where a batch cannot be divided evenly, the domains
    take turns in having one example more.

    Args:
        domains: The domain of each example.
        batch_size: Examples in a batch of one process.
        num_replicas: Number of processes; each gets balanced batches of its own.
        rank: Of this process.
        seed: Of the order.

    Raises:
        ConfigError: If there are no examples, or fewer places in a batch than domains.
    """

    def __init__(
        self,
        domains: Sequence[Hashable] | Tensor,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(range(len(domains)), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        members: dict[Hashable, list[int]] = {}
        # The elements of a tensor are all different keys.
        for index, domain in enumerate(domains.tolist() if isinstance(domains, Tensor) else domains):
            members.setdefault(domain, []).append(index)
        self.members = list(members.values())
        self.batch_size = batch_size
        if not 1 <= len(self.members) <= batch_size:
            raise ConfigError(
                f"Expected a batch size of at least the number of domains, {len(self.members)}, so that each is in every "
                f"batch, but got {batch_size}."
                if self.members
                else "Expected examples to balance, but got none."
            )
        self.num_batches = -(-len(domains) // (batch_size * num_replicas))

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        streams = [self._stream(indices, generator) for indices in self.members]
        for batch in range(self.num_batches):
            # All processes draw from the same streams, and each keeps its own part.
            for replica in range(self.num_replicas):
                drawn = [
                    index
                    for share, stream in zip(self._shares(batch), streams, strict=True)
                    for index in _take(stream, share)
                ]
                if replica == self.rank:
                    yield from drawn

    def _shares(self, batch: int) -> list[int]:
        """How many examples of each domain are in a batch."""
        each, more = divmod(self.batch_size, len(self.members))
        return [
            each + ((position - batch * more) % len(self.members) < more)
            for position in range(len(self.members))
        ]

    def _stream(self, indices: list[int], generator: torch.Generator) -> Iterator[int]:
        # Its own generator, so that how far one domain is read does not change another's order.
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        while True:
            for position in torch.randperm(len(indices), generator=own).tolist():
                yield indices[position]


def _take(stream: Iterator[int], number: int) -> list[int]:
    return [next(stream) for _ in range(number)]
