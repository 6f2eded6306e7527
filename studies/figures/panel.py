"""A panel for JupyterLab: leave out parts of a U-Net and see at once what is left of its costs.

It needs ipywidgets, which comes with the extra "book".
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import pandas as pd

from kdc.unet.blocks import INNERMOST, PARTS, plan_without, subset_of
from kdc.unet.plans import PLANS, STAGES

COSTS = {"parameters": "parameters", "macs": "multiply-accumulates", "latency": "predicted time"}
BAR = (
    '<div style="display:flex;align-items:center;margin:2px 0">'
    '<span style="width:12em">{label}</span>'
    '<span style="width:16em;background:#e6e6e6"><span style="display:block;height:1em;'
    'width:{share:.1%};background:#33658a"></span></span>'
    '<span style="margin-left:1em">{share:.1%}{amount}</span></div>'
)


def removal_panel(costs: pd.DataFrame, order: Sequence[str]) -> ipywidgets.VBox:
    """A slider, a checkbox for every part, and what the plan without the ticked ones costs.

    `costs` is `cost_every_subset` with `latency`, so an answer is a look-up. The slider ticks the
    first so many parts of `order`; the checkboxes can then be changed one by one.
    """
    slider = ipywidgets.IntSlider(0, 0, len(order), description="left out")
    boxes = {part: ipywidgets.Checkbox(False, description=part, indent=False) for part in PARTS}
    shown = ipywidgets.HTML()

    def show(_=None) -> None:
        removed = [part for part, box in boxes.items() if box.value]
        boxes[f"layer {STAGES - 1}"].disabled = INNERMOST in removed
        shown.value = describe(removed, costs)

    def slide(change) -> None:
        for part, box in boxes.items():
            box.value = part in order[: change["new"]]

    for box in boxes.values():
        box.observe(show, "value")
    slider.observe(slide, "value")
    show()
    ticks = ipywidgets.GridBox(
        list(boxes.values()), layout={"grid_template_columns": "repeat(4, 11em)"}
    )
    return ipywidgets.VBox([slider, ticks, shown])


def describe(removed: Sequence[str], costs: pd.DataFrame) -> str:
    """The plan without those parts and its costs as shares of the whole U-Net's, in HTML."""
    row, whole = costs.loc[[subset_of(removed)]].iloc[0], costs.loc[[()]].iloc[0]
    plan = plan_without(removed)
    known = [name for name, other in PLANS.items() if other == plan]
    amounts = {
        "parameters": f": {int(row['parameters']):,}",
        "macs": f": {row['macs'] / 1e9:.1f} G",
        "latency": "",
    }
    lines = [
        BAR.format(label=label, share=row[cost] / whole[cost], amount=amounts[cost])
        for cost, label in COSTS.items()
    ]
    title = str(plan).partition(": ")[2] + (f" (the plan {known[0]!r})" if known else "")
    return f"<code>{title}</code>" + "".join(lines)
