"""Which items a bounded buffer keeps: every policy decides which new rows go into which slots.

A policy is asked for each batch of new items, in their order, and answers with pairs (row of the
batch, slot of the buffer). Slots are filled from 0 upwards and never given up without a successor,
so a buffer of `held` items holds slots 0 to `held` - 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Placement = tuple[Tensor, Tensor]
TOGETHER = 8192  # so many items may have all their products in memory at once: half a gigabyte


def _last_of_each_slot(rows: Tensor, slots: Tensor) -> Placement:
    """Of several rows sent to one slot the last stays, as if they had come one by one."""
    distinct, inverse = slots.unique(return_inverse=True)
    last = torch.full((len(distinct),), -1).scatter_reduce_(
        0, inverse, torch.arange(len(slots)), "amax"
    )
    return rows[last], distinct


class Fifo:
    """The newest items stay: item number n goes to slot n mod capacity."""

    def __init__(self, capacity: int):
        self.capacity, self.seen = capacity, 0

    def place(self, labels: Tensor, held: int, generator: torch.Generator, features) -> Placement:
        """labels (N,) of the new items -> rows (M,) of them and their slots (M,)."""
        rows = torch.arange(len(labels))
        slots = (self.seen + rows) % self.capacity
        self.seen += len(rows)
        return _last_of_each_slot(rows, slots)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor([self.seen])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = int(state["seen"])


class Reservoir(Fifo):
    """Every item ever seen is held with the same probability: algorithm R (Vitter 1985).

    Item number n, counted from 1, replaces slot j, drawn from 0 to n - 1, if there is a slot j.
    """

    def place(self, labels: Tensor, held: int, generator: torch.Generator, features) -> Placement:
        rows = torch.arange(len(labels))
        slots = self.seen + rows
        late = slots >= self.capacity
        # A double has 53 random bits: the bias against a whole number drawn below n is n / 2^53.
        u = torch.rand(int(late.sum()), generator=generator, dtype=torch.float64)
        slots[late] = (u * (slots[late] + 1)).long()
        self.seen += len(rows)
        kept = slots < self.capacity
        return _last_of_each_slot(rows[kept], slots[kept])


class _ByClass:
    """What policies by class remember: the slots of every class, in the order of their worth."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.members: dict[int, list[int]] = {}
        self.seen: dict[int, int] = {}
        self.full: set[int] = set()

    def state_dict(self) -> dict[str, Tensor]:
        known = list(self.members)
        return {
            "classes": torch.tensor(known, dtype=torch.int64),
            "counts": torch.tensor([len(self.members[c]) for c in known], dtype=torch.int64),
            "seen": torch.tensor([self.seen[c] for c in known], dtype=torch.int64),
            "full": torch.tensor([c in self.full for c in known], dtype=torch.bool),
            "members": torch.tensor([s for c in known for s in self.members[c]]).long(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        known = state["classes"].tolist()
        parts = state["members"].split(state["counts"].tolist()) if known else []
        self.members = {c: part.tolist() for c, part in zip(known, parts, strict=True)}
        self.seen = dict(zip(known, state["seen"].tolist(), strict=True))
        self.full = {c for c, full in zip(known, state["full"].tolist(), strict=True) if full}


class ClassBalanced(_ByClass):
    """Classes of equal size, each a uniform sample of its own stream.

    Class-balancing reservoir sampling (Chrysakis & Moens, ICML 2020): in a full buffer an item of
    a class that has never been the largest replaces a random item of the largest class; an item
    of a class that once was replaces a random item of its own class, with probability held / seen.
    """

    def place(self, labels: Tensor, held: int, generator: torch.Generator, features) -> Placement:
        taken: dict[int, int] = {}
        for row, label in enumerate(labels.tolist()):
            slot = self._slot(label, held, generator)
            if slot is not None:
                taken[slot] = row
                held = max(held, slot + 1)
        slots = sorted(taken)
        return torch.tensor([taken[s] for s in slots]).long(), torch.tensor(slots).long()

    def _slot(self, label: int, held: int, generator: torch.Generator) -> int | None:
        own = self.members.setdefault(label, [])
        self.seen[label] = self.seen.get(label, 0) + 1
        if held < self.capacity:
            own.append(held)
            return held
        size = max(map(len, self.members.values()))
        rulers = [c for c, slots in self.members.items() if len(slots) == size]
        self.full.update(rulers)
        if label in self.full:
            place = self._draw(self.seen[label], generator)
            return own[place] if place < len(own) else None
        loser = self.members[rulers[self._draw(len(rulers), generator)]]
        place = self._draw(len(loser), generator)
        loser[place], loser[-1] = loser[-1], loser[place]
        own.append(loser.pop())
        return own[-1]

    @staticmethod
    def _draw(below: int, generator: torch.Generator) -> int:
        return int(torch.randint(below, (1,), generator=generator))


def herding_order(features: Tensor, count: int) -> list[int]:
    """The first `count` rows whose running mean stays nearest to the mean of all (N, d).

    p_k = argmin_x |m - (f(x) + f(p_1) + ... + f(p_(k-1))) / k|, each row once (Rebuffi et al.
    1611.07725, algorithm 4).
    """
    centred = features.double() - features.double().mean(dim=0)
    # With g = f - m and S the sum of the chosen g, the norm is |S + g| / k: compare its square,
    # |g|^2 + 2 g . S up to what all share.
    products = (centred @ centred.T).numpy() if len(centred) <= TOGETHER else None
    cost, order = centred.square().sum(dim=1).numpy(), []
    for _ in range(min(count, len(cost))):
        last = int(cost.argmin())
        order.append(last)
        cost += 2 * (products[last] if products is not None else (centred @ centred[last]).numpy())
        cost[last] = np.inf
    return order


def fair_shares(sizes: list[int], capacity: int) -> list[int]:
    """The largest always loses one until all fit; where they tie, the one that came last."""
    shares = [0] * len(sizes)
    while capacity > 0 and any(s < n for s, n in zip(shares, sizes, strict=True)):
        open_ = [i for i, n in enumerate(sizes) if shares[i] < n]
        level = min(capacity // len(open_), *(sizes[i] - shares[i] for i in open_))
        chosen = open_ if level else open_[:capacity]
        for i in chosen:
            shares[i] += max(level, 1)
        capacity -= len(chosen) * max(level, 1)
    return shares


class Herding(_ByClass):
    """The items that together stand nearest to the mean of their class (iCaRL 1611.07725).

    Features are the latent means as they are. A class should come in one call: what comes later is
    chosen anew among the held and the new, and the mean is then theirs. When there are too many
    items, the largest class gives up the last it chose.
    """

    def place(
        self,
        labels: Tensor,
        held: int,
        generator: torch.Generator,
        features: Callable[[list[int], list[int]], Tensor],
    ) -> Placement:
        """`features(slots, rows)` gives the features (N, d) of held items, then of new ones."""
        new = {c: (labels == c).nonzero().flatten().tolist() for c in labels.unique().tolist()}
        for label, rows in new.items():
            self.members.setdefault(label, [])
            self.seen[label] = self.seen.get(label, 0) + len(rows)
        known = list(self.members)
        sizes = [len(self.members[c]) + len(new.get(c, ())) for c in known]
        shares = dict(zip(known, fair_shares(sizes, self.capacity), strict=True))
        chosen: dict[int, list[tuple[bool, int]]] = {}
        for label, slots in self.members.items():
            candidates = [(False, s) for s in slots] + [(True, r) for r in new.get(label, ())]
            order = list(range(len(slots)))  # a class without news keeps its order
            if label in new:
                order = herding_order(features(slots, new[label]), shares[label])
            chosen[label] = [candidates[i] for i in order][: shares[label]]
        kept = {i for items in chosen.values() for is_new, i in items if not is_new}
        total = sum(len(items) for items in chosen.values())
        vacant = iter([s for s in range(total) if s not in kept])
        rows, slots = [], []
        for label, items in chosen.items():
            self.members[label] = [next(vacant) if is_new else i for is_new, i in items]
            for (is_new, row), slot in zip(items, self.members[label], strict=True):
                if is_new:
                    rows.append(row)
                    slots.append(slot)
        return torch.tensor(rows).long(), torch.tensor(slots).long()


POLICIES: dict[str, type[Fifo] | type[ClassBalanced] | type[Herding]] = {
    "reservoir": Reservoir,
    "class_balanced": ClassBalanced,
    "fifo": Fifo,
    "herding": Herding,
}
