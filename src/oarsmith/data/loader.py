"""Batches of an epoch in an order that (seed, epoch) alone decide, and a place in it that is two numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from oarsmith.data.batch import Batch, make_batch
from oarsmith.data.order import permutation
from oarsmith.data.packs import best_fit_packs
from oarsmith.data.place import PlacedBatches
from oarsmith.data.rows import Row, fingerprint_of
from oarsmith.errors import ConfigError, DataError, TrainingError


class Loader(PlacedBatches):
    """Micro-batches of samples, or of prompts with answers.

    A row is one sample, or with packing a pack of samples of at most `capacity` tokens; a batch is `rows_per_batch`
    rows end to end. The last batch of an epoch may have fewer rows (`drop_last` leaves it out).

    Args:
        samples: what to train on.
        make: puts samples end to end, such as `make_answer_batch` for prompts with answers.
        lengths: tokens that each sample takes in a row, where that is not its `len`.
        capacity: tokens of a packed row; needed with packing, unused without.
        fingerprint: of the samples (`SampleSet.fingerprint`); a saved state is refused over other data. Computed
            where not given.
    """

    def __init__(
        self,
        samples: Sequence[Row],
        *,
        rows_per_batch: int,
        make: Callable[[Sequence[Any]], Batch] = make_batch,
        lengths: Sequence[int] | None = None,
        capacity: int | None = None,
        packing: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        if rows_per_batch < 1:
            raise ConfigError(
                f"rows per batch is {rows_per_batch}, at least 1 is needed", where="per_device_train_batch_size"
            )
        self._samples = samples
        self._make = make
        self._lengths = [len(sample) for sample in samples] if lengths is None else list(lengths)
        assert len(self._lengths) == len(samples), f"{len(self._lengths)} lengths of {len(samples)} samples"
        if packing:
            self._check_capacity(capacity)
        super().__init__(fingerprint or fingerprint_of(samples))
        self._capacity = capacity if packing else None
        self._rows_per_batch = rows_per_batch
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._plan: tuple[int, list[list[int]]] | None = None
        if self.batches_per_epoch(0) == 0:
            what = f"{len(samples)} samples give no batch of {rows_per_batch} rows"
            raise TrainingError(what, fix="give more data" + (", or set drop_last to false" if drop_last else ""))

    def _check_capacity(self, capacity: int | None) -> None:
        if capacity is None:
            raise ConfigError("packing needs the length of a row", where="max_length", fix="set max_length")
        too_long = next((at for at, length in enumerate(self._lengths) if length > capacity), None)
        if too_long is not None:
            what = f"the sample has {self._lengths[too_long]} tokens, a packed row {capacity}"
            fix = "encode with the same max_length as the rows have"
            raise DataError(what, where=self._samples[too_long].where, fix=fix)

    def with_samples(self, samples: Sequence[Row]) -> Loader:
        """The same plan and place over the same samples that now carry more (`with_references`)."""
        assert [sample.where for sample in samples] == [sample.where for sample in self._samples], "other samples"
        other = copy.copy(self)
        other._samples = samples
        return other

    def batches_per_epoch(self, epoch: int) -> int:
        """Number of batches of an epoch; with packing it can differ a little between epochs."""
        num_rows = len(self._rows(epoch))
        return num_rows // self._rows_per_batch if self._drop_last else -(-num_rows // self._rows_per_batch)

    def batch_at(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch; a pure function of the arguments."""
        if not 0 <= index < self.batches_per_epoch(epoch):
            raise IndexError(f"batch {index} of {self.batches_per_epoch(epoch)}")
        rows = self._rows(epoch)[index * self._rows_per_batch : (index + 1) * self._rows_per_batch]
        return self._make([self._samples[sample] for row in rows for sample in row])

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "rows_per_batch": self._rows_per_batch,
            "capacity": self._capacity,
            "drop_last": self._drop_last,
        }

    def _rows(self, epoch: int) -> list[list[int]]:
        """The plan of an epoch: rows of sample indices, in order. One epoch's is kept."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._make_rows(epoch))
        return self._plan[1]

    def _make_rows(self, epoch: int) -> list[list[int]]:
        order = list(range(len(self._samples)))
        if self._shuffle:
            order = permutation(len(order), self._seed, "shuffle", epoch).tolist()
        if self._capacity is None:
            return [[index] for index in order]
        # Best fit takes equal lengths in the given order, so the shuffle also changes who shares a row.
        packs = best_fit_packs([self._lengths[index] for index in order], self._capacity)
        if self._shuffle:
            packs = [packs[n] for n in permutation(len(packs), self._seed, "packs", epoch)]
        else:
            packs.sort(key=min)
        return [[order[n] for n in (pack if self._shuffle else sorted(pack))] for pack in packs]
