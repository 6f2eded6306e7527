"""The replay buffer: a bounded memory of old images, as latents and never as pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdc.checks import MOST_SEEDS, whole_number
from kdc.io import part, read_tensors, write_tensors
from kdc.replay.checks import (
    EMBEDDED,
    STORED,
    check_items,
    check_settings,
    labels_of,
    rows_of,
)
from kdc.replay.policies import POLICIES, ClassBalanced, Fifo, Herding
from kdc.replay.storage import (
    Captions,
    Latents,
    Rows,
    columns_of,
    dequantise,
    item_bytes,
    quantise,
)

__all__ = ["ReplayBuffer", "item_bytes"]

FORMAT, VERSION = "kdc-replay", "1"


class ReplayBuffer:
    """At most `capacity` items, or as many as `capacity_bytes` hold; see `item_bytes`.

    An item is the mean and the deviation of an image's latents (C, h, w), its caption, its task
    and its label (the class, a whole number). Captions and their embeddings are stored once for
    all items that share them. `dtype` is "float32", "float16" or "int8": latents with a step per
    item and channel, true to half a step (`storage.quantise`); embeddings are float32 with the
    first and float16 with the others.

    `policy` says which items stay: "reservoir", "class_balanced", "fifo" or "herding" (see
    `kdc.replay.policies`). With a `folder` the items lie in memory-mapped scratch files below it,
    for more items than memory holds; `save` is what keeps them.

    What is kept and what is sampled follow two generators of the buffer's own, both of `seed`;
    `generator` is the one that samples. Raises `ValueError` for an unknown policy or dtype or a
    capacity below 1, `TypeError` for one that is no whole number.
    """

    def __init__(
        self,
        capacity: int | None = None,
        policy: str = "reservoir",
        dtype: str = "float16",
        *,
        capacity_bytes: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
    ):
        capacity, capacity_bytes = check_settings(policy, dtype, capacity, capacity_bytes)
        self.policy, self.dtype, self.capacity_bytes = policy, dtype, capacity_bytes
        self.capacity, self.folder, self.held = capacity, folder, 0
        seed = whole_number("seed", seed, 0, MOST_SEEDS)
        self.generator = torch.Generator().manual_seed(2 * seed)
        self._keeping = torch.Generator().manual_seed(2 * seed + 1)
        self._rows: Rows | None = None
        self._policy: Fifo | ClassBalanced | Herding | None = None

    def __len__(self) -> int:
        return self.held

    def __repr__(self) -> str:
        return f"ReplayBuffer({self.held} of {self.capacity}, {self.policy}, {self.dtype})"

    @property
    def bytes_per_item(self) -> int:
        """See `item_bytes`. Raises `RuntimeError` before the first item tells the shape."""
        if self._rows is None:
            raise RuntimeError("the shape of an item is known after the first add")
        return self._rows.bytes_per_row

    def sizes(self) -> dict[str, int]:
        """Bytes in use by part: "items", "captions" (UTF-8) and "embeddings" (a cache of them)."""
        if self._rows is None:
            return {"items": 0, "captions": 0, "embeddings": 0}
        return {
            "items": self.held * self.bytes_per_item,
            "captions": sum(len(text.encode()) for text in self._captions.place),
            "embeddings": len(self._captions.place) * self._captions.rows.bytes_per_row,
        }

    def add(
        self,
        data: Latents,
        index: Tensor | Sequence[int] | None = None,
        *,
        task: int = 0,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Offer items of a latent data set, all or the rows `index` (N,), in that order.

        `labels` (N,) are the classes of these rows, unique over all tasks; None takes the task's
        number. The policy decides what stays. Raises, before anything changes, `ValueError` where
        shapes disagree with each other or with what is held, for rows that there are not, and for
        latents, embeddings, labels and tasks that the storage cannot hold, and `TypeError` for
        rows, labels and tasks that are no whole numbers.
        """
        task = whole_number("task", task, STORED.min, STORED.max)
        index = rows_of(len(data.mean), index)
        labels = labels_of(len(index), labels, task)
        check_items(data, index, self._shapes if self._rows is not None else {}, self.dtype)
        if not len(index):
            return
        if self._rows is None:
            self._allocate(data.mean.shape[1:], data.embeddings.shape[1:])

        # Room first: a full disk is noticed here, before anything changes.
        self._rows.reserve(min(self.capacity, self.held + len(index)))
        captions = len(self._captions.texts) + len(data.caption_index[index].unique())
        self._captions.rows.reserve(min(self.capacity, captions))

        def features(slots: list[int], rows: list[int]) -> Tensor:
            old = self._latents(torch.tensor(slots).long(), "mean")
            return torch.cat([old, data.mean[index[rows]].float()]).flatten(1)

        rows, slots = self._policy.place(labels, self.held, self._keeping, features)
        if not len(rows):
            return
        index = index[rows]
        self._captions.release(self._rows.read(slots[slots < self.held], "caption")["caption"])
        values = {
            "caption": self._captions.take(data, data.caption_index[index]),
            "task": torch.full((len(rows),), task),
            "label": labels[rows],
        }
        for name in ("mean", "std"):
            x = getattr(data, name)[index]
            values |= {name: x}
            if self.dtype == "int8":
                values[name], values[f"{name}_step"] = quantise(x)
        self._rows.write(slots, values)
        self.held = max(self.held, int(slots.max()) + 1)

    def sample(self, count: int) -> dict:
        """`count` items, none twice: see `items`.

        Raises `ValueError` for fewer than 1 and more than are held.
        """
        if (count := whole_number("count", count, 1)) > self.held:
            raise ValueError(f"cannot sample {count} items: the buffer holds {self.held}")
        if count**2 > self.held:
            return self.items(torch.randperm(self.held, generator=self.generator)[:count])
        while True:  # few of many: a repetition is rarer than not, and the draw starts again
            slots = torch.randint(self.held, (count,), generator=self.generator)
            if len(slots.unique()) == count:
                return self.items(slots)

    def items(self, slots: Tensor | None = None) -> dict:
        """Items by place (N,), default all that are held.

        Returns mean, std (N, C, h, w) and embedding (N, L, D), all float32, task and label (N,)
        int64, and caption, a list of texts. An empty buffer raises `ValueError`.
        """
        if self._rows is None:
            raise ValueError("the buffer is empty")
        slots = torch.arange(self.held) if slots is None else slots
        row = self._rows.read(slots, "caption", "task", "label")
        captions = row["caption"].long()
        return {
            "mean": self._latents(slots, "mean"),
            "std": self._latents(slots, "std"),
            "embedding": self._captions.rows.read(captions)["embedding"].float(),
            "task": row["task"].long(),
            "label": row["label"].long(),
            "caption": [self._captions.texts[i] for i in captions.tolist()],
        }

    def _latents(self, slots: Tensor, name: str) -> Tensor:
        if self.dtype == "int8":
            return dequantise(*self._rows.read(slots, name, f"{name}_step").values())
        return self._rows.read(slots, name)[name].float()

    def _allocate(self, latent: Sequence[int], embedding: Sequence[int]) -> None:
        self._shapes = {"latent": list(latent), "embedding": list(embedding)}
        if self.capacity_bytes is not None:
            self.capacity = self.capacity_bytes // item_bytes(latent, self.dtype)
            if not self.capacity:
                raise ValueError(
                    f"{self.capacity_bytes} bytes hold no item: one takes "
                    f"{item_bytes(latent, self.dtype)}"
                )
        self._policy = POLICIES[self.policy](self.capacity)
        self._captions = Captions(embedding, EMBEDDED[self.dtype], self.capacity, self.folder)
        self._rows = Rows(columns_of(latent, self.dtype), self.capacity, self.folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, the generators included, as copies: a flat dictionary of tensors.

        A buffer that loads it holds and draws what this one would, bit for bit. Texts and settings
        are UTF-8 JSON in "header". Takes as much memory as the items do, on disk or not.
        """
        header = {"settings": self.settings(), "held": self.held, "shapes": None, "texts": []}
        state = {"generator": self.generator.get_state(), "keeping": self._keeping.get_state()}
        if self._rows is not None:
            header |= {"shapes": self._shapes, "texts": list(self._captions.place)}
            columns = self._rows.read(torch.arange(self.held))
            places = torch.tensor(list(self._captions.place.values()), dtype=torch.int64)
            order = torch.empty(len(self._captions.texts), dtype=torch.int32)
            order[places] = torch.arange(len(places), dtype=torch.int32)
            columns["caption"] = order[columns["caption"].long()]
            state |= {f"items.{name}": value for name, value in columns.items()}
            state |= {f"policy.{name}": v for name, v in self._policy.state_dict().items()}
            state["embeddings"] = self._captions.rows.read(places)["embedding"]
        text = bytearray(json.dumps(header).encode())
        return state | {"header": torch.frombuffer(text, dtype=torch.uint8)}

    def settings(self) -> dict:
        """What a buffer must share with another to load its state."""
        capacity = self.capacity if self.capacity_bytes is None else None
        names = ("policy", "dtype", "capacity_bytes")
        return {"capacity": capacity} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Become the buffer whose `state_dict` that is; what was held is lost.

        Raises `ValueError` where that one had other settings.
        """
        header = _header(state)
        if header["settings"] != self.settings():
            raise ValueError(f"the state is of a buffer with {header['settings']}, not {self}")
        self.generator.set_state(state["generator"])
        self._keeping.set_state(state["keeping"])
        self._rows = None
        self.held = 0
        if header["shapes"] is None:
            return
        self._allocate(header["shapes"]["latent"], header["shapes"]["embedding"])
        self.held = header["held"]
        assert self._rows is not None  # which `_allocate` made
        self._rows.write(torch.arange(self.held), part(state, "items"))
        self._policy.load_state_dict(part(state, "policy"))
        uses = state["items.caption"].bincount(minlength=len(header["texts"]))
        self._captions.fill(header["texts"], state["embeddings"], uses.tolist())

    def save(self, file: str | Path) -> Path:
        """Write `state_dict` as safetensors, beside and then renamed; the folder is made."""
        return write_tensors(file, self.state_dict(), FORMAT, VERSION)

    @classmethod
    def load(cls, file: str | Path, folder: str | Path | None = None) -> ReplayBuffer:
        """The buffer that `save` wrote; `folder` as for a new one.

        Raises `FileNotFoundError`, and `ValueError` for a damaged file, another kind of file or a
        version that this code does not know.
        """
        state = read_tensors(file, FORMAT, VERSION)
        try:
            buffer = cls(**_header(state)["settings"], folder=folder)
            buffer.load_state_dict(state)
        except (KeyError, IndexError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"the replay buffer {file} is damaged: {error}") from error
        return buffer


def _header(state: dict[str, Tensor]) -> dict:
    return json.loads(state["header"].numpy().tobytes())
