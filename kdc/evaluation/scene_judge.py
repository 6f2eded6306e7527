"""The judge of scenes: what each object of an image is, how many there are, and where they stand.

It looks at each place where an object was asked for, and at the whole image. Trained on renderings
alone, as the other embedded judges; it always answers, so an empty place gets labels all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kdc.data.scenes import DOMAINS, Group, Place, Scene, places
from kdc.data.worlds import BACKGROUNDS, COLOURS
from kdc.evaluation.images import to_signed
from kdc.evaluation.judges import AttributeClassifier
from kdc.pipelines import ASSETS

SIDE, BATCH = 32, 128
REACH = 1.2  # half the side of what is looked at, over that of an object of no named size
# Objects in each row, from above; 0 is no row.
LAYOUTS = ((1, 0), (2, 0), (3, 0), (1, 1), (1, 2), (2, 1))
OF_OBJECTS: dict[str, tuple] = {
    "colour": tuple(COLOURS),
    "kind": tuple(kind for world in DOMAINS.values() for kind in world.kinds),
    "size": ("small", "large"),
}
OF_SCENES: dict[str, tuple] = {"background": BACKGROUNDS, "layout": LAYOUTS}


class SceneJudge(nn.Module):
    """Two classifiers: of objects, cut out at 32 x 32, and of whole images at 64 x 64."""

    def __init__(self):
        super().__init__()
        self.objects = AttributeClassifier(OF_OBJECTS, (32, 64, 128), SIDE)
        self.whole = AttributeClassifier(OF_SCENES)

    def forward(
        self, images: Tensor, boxes: Tensor, owners: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits of objects (M, classes) and of images (N, classes).

        images (N, 3, 64, 64) in [-1, 1]; boxes (M, 3): centre and half side of each object, in
        coordinates from -1 to 1; owners (M,): the image that each is in.
        """
        return self.objects(cut_out(images, boxes, owners)), self.whole(images)


def cut_out(images: Tensor, boxes: Tensor, owners: Tensor) -> Tensor:
    """The boxes (M, 3) of the images (N, 3, H, W) that own them: (M, 3, `SIDE`, `SIDE`)."""
    line = (torch.arange(SIDE, device=images.device) + 0.5) / SIDE * 2 - 1
    down, right = torch.meshgrid(line, line, indexing="ij")
    x, y, half = (boxes[:, i, None, None] for i in range(3))
    grid = torch.stack([x + half * right, -y + half * down], dim=-1)
    return F.grid_sample(images[owners], grid, padding_mode="border", align_corners=False)


def box_of(place: Place) -> tuple[float, float, float]:
    """Centre and half side of what the judge looks at; no named size changes it."""
    return place.x, place.y, REACH * place.usual


def boxes_of(asked: Sequence[Scene]) -> tuple[Tensor, Tensor, list[Group]]:
    """Boxes (M, 3), owners (M,) and groups of all objects that some scenes ask for."""
    found = [(number, p) for number, scene in enumerate(asked) for p in places(scene)]
    boxes = torch.tensor([box_of(place) for _, place in found])
    return boxes, torch.tensor([number for number, _ in found]), [p.group for _, p in found]


def object_labels(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Classes (M,) of objects in the order of `OF_OBJECTS`; -100 for a size that is not named."""
    return {
        name: torch.tensor(
            [values.index(v) if (v := getattr(g, name)) in values else -100 for g in groups]
        )
        for name, values in OF_OBJECTS.items()
    }


def layout_of(scene: Scene) -> tuple[int, int]:
    """How many objects stand in each row, from above."""
    counts = [group.count for group in scene.groups]
    return (counts[0], counts[1]) if scene.relation == "above" else (sum(counts), 0)


def scene_labels(asked: Sequence[Scene]) -> dict[str, Tensor]:
    """Classes (N,) of whole scenes in the order of `OF_SCENES`."""
    return {
        "background": torch.tensor([BACKGROUNDS.index(s.background) for s in asked]),
        "layout": torch.tensor([LAYOUTS.index(layout_of(s)) for s in asked]),
    }


def judge_loss(
    logits: tuple[dict[str, Tensor], dict[str, Tensor]],
    labels: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> Tensor:
    """Sum of all cross-entropies; sizes that are not named do not count."""
    pairs = [(said[name], right[name]) for said, right in zip(logits, labels, strict=True)
             for name in right]  # fmt: skip
    # `nan_to_num`: a batch in which no size is named has no mean.
    return torch.stack([F.cross_entropy(s, r).nan_to_num() for s, r in pairs]).sum()


@functools.cache
def scene_judge() -> SceneJudge:
    """The embedded judge, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        model = SceneJudge()
    model.load_state_dict(load_file(ASSETS / "mini-scene-judge" / "model.safetensors"))
    return model.float().eval()


@torch.inference_mode()
def shown_scenes(
    images: Tensor, asked: Sequence[Scene], judge: SceneJudge | None = None
) -> dict[str, Tensor]:
    """What of the asked-for scenes the images (N, 3, H, W) uint8 show, (N,) bool each.

    "colour", "kind" and "size": of all objects, each at its place; "background"; "count": as many
    objects; "place": in the asked-for rows; "binding": all of these at once. Raises `ValueError`
    where not every image has a scene.
    """
    if len(images) != len(asked):
        raise ValueError(f"{len(images)} images for {len(asked)} scenes")
    judge = judge or scene_judge()
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        for name, right in _shown(judge, to_signed(images[start : start + BATCH]), part).items():
            found.setdefault(name, []).append(right)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _shown(judge: SceneJudge, images: Tensor, asked: Sequence[Scene]) -> dict[str, Tensor]:
    boxes, owners, groups = boxes_of(asked)
    of_objects, of_scenes = judge(images, boxes, owners)
    right = {}
    for name, target in object_labels(groups).items():
        wrong = (of_objects[name].argmax(dim=1) != target) & (target >= 0)
        right[name] = torch.zeros(len(asked)).index_add(0, owners, wrong.float()) == 0
    labels = scene_labels(asked)
    right["background"] = of_scenes["background"].argmax(dim=1) == labels["background"]
    layouts = of_scenes["layout"].argmax(dim=1)
    right["place"] = layouts == labels["layout"]
    counts = torch.tensor([sum(layout) for layout in LAYOUTS])
    right["count"] = counts[layouts] == counts[labels["layout"]]
    return right | {"binding": torch.stack(list(right.values())).all(dim=0)}
