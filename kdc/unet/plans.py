"""Plans: which layers of a U-Net a student keeps.

A U-Net of Stable Diffusion 1.x or 2.x has four stages of two layers on the way down, a mid-block,
and four stages of three layers on the way up. A plan names the layers that are kept; the published
ones are those of BK-SDM (Kim et al., arXiv 2305.15798), two of which KDC-Diff uses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

STAGES, LAYERS = 4, 2  # of the teacher, on the way down; one layer more on the way up
DOWN_TYPES = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_TYPES = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
MID_TYPE = "UNetMidBlock2DCrossAttn"


@dataclass(frozen=True)
class SlimPlan:
    """The teacher's layers that a student keeps.

    `down` lists for every stage, outermost first, the kept layers (of 0, 1); `up` for every stage,
    innermost first as in diffusers, those of 0, 1, 2. An empty tuple drops the stage, which only
    inner stages may be. `mid` keeps the mid-block. `down_attention` and `up_attention` say, in the
    same orders, which stages keep their transformer blocks; the innermost has none to keep, and no
    dropped stage has. Two plans that keep the same are equal, whatever their names.

    Raises `ValueError` for what diffusers cannot hold: an up stage has one layer more than its down
    stage, and the layers at which channels change (the first, and on the way up the last) must
    stay; a stage keeps its transformer blocks in all of its layers or in none.
    """

    name: str = dataclasses.field(compare=False)
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    mid: bool
    down_attention: tuple[bool, ...] | None = None
    up_attention: tuple[bool, ...] | None = None

    def __post_init__(self):
        for name in ("down", "up"):
            layers = tuple(tuple(stage) for stage in getattr(self, name))
            object.__setattr__(self, name, layers)
        if len(self.down) != STAGES or len(self.up) != STAGES:
            raise ValueError(f"plan {self.name!r}: {STAGES} stages each way are needed")
        self._settle_attention("down_attention", self.down, DOWN_TYPES)
        self._settle_attention("up_attention", self.up, UP_TYPES)
        for stage, (down, up) in enumerate(zip(self.down, reversed(self.up), strict=True)):
            self._check_stage(stage, tuple(down), tuple(up))
        kept = [bool(layers) for layers in self.down]
        if not kept[0] or kept != sorted(kept, reverse=True):
            raise ValueError(f"plan {self.name!r}: only the innermost stages can be dropped")

    def _settle_attention(self, name: str, layers: tuple, types: tuple[str, ...]) -> None:
        possible = tuple(
            bool(kept) and kind.startswith("CrossAttn")
            for kept, kind in zip(layers, types, strict=True)
        )
        wanted = getattr(self, name)
        settled = possible if wanted is None else tuple(bool(keep) for keep in wanted)
        if len(settled) != STAGES or any(
            keep and not can for keep, can in zip(settled, possible, strict=True)
        ):
            raise ValueError(
                f"plan {self.name!r}: {name} must be {STAGES} truth values, true only where there"
                f" are transformer blocks to keep ({possible}), not {wanted}"
            )
        object.__setattr__(self, name, settled)

    def _check_stage(self, stage: int, down: tuple[int, ...], up: tuple[int, ...]) -> None:
        where = f"plan {self.name!r}, stage {stage}"
        if not down and not up:
            return
        if len(up) != len(down) + 1:
            raise ValueError(f"{where}: {len(down)} layers down need {len(down) + 1} up, not {up}")
        for layers, last in ((down, LAYERS - 1), (up, LAYERS)):
            if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(last + 1)):
                raise ValueError(f"{where}: {layers} must be increasing layers of 0 to {last}")
        if down[0] != 0 or up[0] != 0 or up[-1] != LAYERS:
            raise ValueError(
                f"{where}: the channels change at layer 0 and, on the way up, at layer {LAYERS}: "
                f"both must stay, not {down} and {up}"
            )

    @property
    def dropped(self) -> int:
        """How many inner stages are dropped."""
        return sum(not layers for layers in self.down)

    def __str__(self) -> str:
        """Kept layers by stage; `~` marks a stage whose transformer blocks are dropped."""

        def line(stages, attention, types):
            words = []
            for layers, keep, kind in zip(stages, attention, types, strict=True):
                lost = layers and not keep and kind.startswith("CrossAttn")
                words.append(("".join(map(str, layers)) or "-") + ("~" if lost else ""))
            return " ".join(words)

        mid = "mid-block" if self.mid else "no mid-block"
        down = line(self.down, self.down_attention, DOWN_TYPES)
        up = line(self.up, self.up_attention, UP_TYPES)
        return f"{self.name}: down {down} | {mid} | up {up}"

    def to_dict(self) -> dict:
        """The plan as JSON holds it; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> SlimPlan:
        """The plan that `to_dict` wrote. Raises `ValueError` for one that cannot be built."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) - known or "name" not in values:
            raise ValueError(f"not a slimming plan: {values!r}")
        return cls(**values)


def _one_layer(name: str, stages: int, mid: bool) -> SlimPlan:
    empty = ((),) * (STAGES - stages)
    return SlimPlan(name, ((0,),) * stages + empty, empty + ((0, 2),) * stages, mid)


PLANS = {
    plan.name: plan
    for plan in (
        SlimPlan("full", ((0, 1),) * STAGES, ((0, 1, 2),) * STAGES, True),
        _one_layer("bk-base", 4, True),
        _one_layer("kdc", 4, False),
        _one_layer("kdc-v2", 3, True),
        _one_layer("bk-tiny", 3, False),
    )
}


def find_plan(plan: str | SlimPlan) -> SlimPlan:
    """The plan of that name.

    Raises `ValueError` naming the known plans, and `TypeError` for what is neither name nor plan.
    """
    if isinstance(plan, SlimPlan):
        return plan
    if not isinstance(plan, str):
        raise TypeError(
            f"a plan is a name or a SlimPlan, not {plan!r}; SlimPlan.from_dict makes one of values"
        )
    if plan not in PLANS:
        raise ValueError(f"unknown plan {plan!r}; the plans are {', '.join(PLANS)}")
    return PLANS[plan]
