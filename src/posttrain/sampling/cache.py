"""Keys and values of rows that grow by one token a step. A prompt that several rows continue is kept, and read, once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.models.products import wide

ROOM = 64  # rows of tokens grow in steps of this many


class Store:
    """Keys and values of one layer, in the order in which the products of a few queries read them: along memory.

    keys [rows, K, D, length] and values [rows, K, length, D]; such products take 0.6 of fused attention's time on a CPU. Float32
    there, where attention is float32.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        """Empty, for keys and values as `key` and `value` [K, tokens, D]."""
        dtype = value.dtype if value.device.type != "cpu" else wide(value).dtype
        self.keys = key.new_zeros(0, key.shape[0], key.shape[2], 0, dtype=dtype)
        self.values = value.new_zeros(0, value.shape[0], 0, value.shape[2], dtype=dtype)

    def reserve(self, rows: int, length: int) -> None:
        """Room for so many rows of so many tokens; what is there is kept."""
        keys, values = self.keys, self.values
        had, reach = len(values), values.shape[2]
        if had >= rows and reach >= length:
            return
        rows, length = max(rows, had), max(-(-length // ROOM) * ROOM, reach)
        self.keys = keys.new_zeros(rows, *keys.shape[1:3], length)
        self.values = values.new_zeros(rows, values.shape[1], length, values.shape[3])
        self.keys[:had, ..., :reach] = keys
        self.values[:had, :, :reach] = values

    def fill(self, row: int, key: Tensor, value: Tensor) -> None:
        """The first tokens of a row: key and value [K, tokens, D]."""
        self.keys[row, ..., : key.shape[1]] = key.transpose(1, 2)
        self.values[row, :, : value.shape[1]] = value

    def append(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """One token [A, K, D] to each of the first A rows, at its length."""
        at, rows = lengths[:, None, None, None], len(lengths)
        key, value = key.to(self.keys.dtype)[..., None], value.to(self.values.dtype)[:, :, None]
        self.keys[:rows].scatter_(3, at.expand_as(key), key)
        self.values[:rows].scatter_(2, at.expand_as(value), value)

    def seen(self, rows: int, reach: int) -> tuple[Tensor, Tensor]:
        return self.keys[:rows, ..., :reach], self.values[:rows, :, :reach]

    def move(self, to: Tensor, source: Tensor, reach: int) -> None:
        self.keys[to, ..., :reach] = self.keys[source, ..., :reach]
        self.values[to, :, :reach] = self.values[source, :, :reach]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


class Stems:
    """Which shared prompt (stem) each of A rows continues. lengths [P]: tokens of each stem; of_row: -1 for a row of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_row: list[int] = []
        self.lengths: list[int] = []
        self.arrange()

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def reach(self) -> int:
        return max(self.lengths, default=0)

    def arrange(self) -> None:
        """After a change. members [P, most]: the rows of each stem, its first again where it has fewer; slots [A]: each row's
        place among all members; alone: the rows without a stem; shared [A]: how many of a row's tokens are its stem's."""
        rows: list[list[int]] = [[] for _ in self.lengths]
        for row, stem in enumerate(self.of_row):
            if stem >= 0:
                rows[stem].append(row)
        most = max(map(len, rows), default=0)
        slots = [0] * len(self.of_row)
        for stem, each in enumerate(rows):
            for place, row in enumerate(each):
                slots[row] = stem * most + place
        members = [each + each[:1] * (most - len(each)) for each in rows]
        self.members = torch.tensor(members, dtype=torch.long, device=self.device)
        self.slots = torch.tensor(slots, dtype=torch.long, device=self.device)
        alone = [row for row, stem in enumerate(self.of_row) if stem < 0]
        self.alone = torch.tensor(alone, dtype=torch.long, device=self.device)
        shared = [self.lengths[stem] if stem >= 0 else 0 for stem in self.of_row]
        self.shared = torch.tensor(shared, dtype=torch.long, device=self.device)

    def reorder(self, order: Sequence[int]) -> list[int] | None:
        """Row i is now what row order[i] was. Returns the stems that are still continued, where some are not any more."""
        self.of_row = [self.of_row[row] for row in order]
        living = sorted({stem for stem in self.of_row if stem >= 0})
        changed = len(living) < self.count
        if changed:
            number = {stem: place for place, stem in enumerate(living)}
            self.of_row = [number.get(stem, -1) for stem in self.of_row]
            self.lengths = [self.lengths[stem] for stem in living]
        self.arrange()
        return living if changed else None

    def together(self, of_rows: Tensor) -> Tensor:
        """[A, K, G, X] -> [P, K, most * G, X]: what belongs to one stem, side by side."""
        return of_rows[self.members].transpose(1, 2).flatten(2, 3)

    def apart(self, of_stems: Tensor) -> Tensor:
        """The reverse; 0 for a row without a stem."""
        of_members = of_stems.unflatten(2, (self.members.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return of_members[self.slots].index_fill_(0, self.alone, 0.0)
