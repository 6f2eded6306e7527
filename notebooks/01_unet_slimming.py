# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Slimming the U-Net
#
# **The question.** Stable Diffusion's U-Net has 859,520,964 parameters. KDC-Diff keeps 482,346,884
# of them. Which blocks went, where do the weights of the rest come from, and what does the cut
# itself do to the picture, before any training repairs it?
#
# **The claims**, each checked by a cell below.
#
# 1. The published parameter counts follow from diffusers' own configuration: the plans of
#    `kdc.PLANS` reproduce every one of them exactly, on a U-Net that is never given memory.
# 2. Slimming changes nothing but what it removes: a plan that removes nothing gives bit-identical
#    outputs, and every parameter of a student is a copy of one of the teacher's.
# 3. Copied weights are a far better start than random ones: right after the cut the student's
#    output error is lower with copied weights than with random ones, for every plan.
# 4. Parameters, multiply-accumulates and the time of a call do not fall by the same share.

# %% tags=["parameters"]
budget: str = "quick"  # "quick", "standard" or "full": how many pictures and timing rounds
teacher: str = "mini"  # "mini", a hub id, or a diffusers folder
plan: str = "kdc"  # the plan that the figures show, see kdc.PLANS
seeds: list = None  # seeds of noise and of random starts; None: what the budget says
output_dir: str = "outputs/01_unet_slimming"  # where the figures are kept

# %%
import inspect
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from IPython.display import Code, display

import kdc
from kdc import figures, ledger, slimming
from kdc.budgets import settle
from kdc.costs import call_of

started = time.perf_counter()
table = {
    "quick": {"seeds": [0], "count": 16, "rounds": 10},
    "standard": {"seeds": [0, 1, 2], "count": 64, "rounds": 20},
    "full": {"seeds": [0, 1, 2], "count": 64, "rounds": 20},
}
run = settle(budget, table, seeds=seeds)
chosen = slimming.find_plan(plan)
output = Path(output_dir)
output.mkdir(parents=True, exist_ok=True)
pipeline = kdc.load_teacher(teacher)


# %% [markdown]
# ## Anatomy
#
# The U-Net takes a noisy latent $z_t$, the time $t$ and the caption $c$, and predicts the noise. It
# is a stack of *stages*. On the way down each stage works at half the resolution of the one above
# it and hands its results across to the stage opposite; on the way up these *skips* are joined to
# what comes from below. A stage is made of layers, each a residual convolution block followed, in
# the three outer stages, by a transformer that looks at the caption. Stable Diffusion has two
# layers a stage going down, three going up, and a mid-block between.
#
# A convolution from $C_\text{in}$ to $C_\text{out}$ channels with a $k \times k$ kernel has
# $k^2 C_\text{in} C_\text{out}$ weights and does $k^2 C_\text{in} C_\text{out} H W$
# multiplications. Going inwards, $C$ doubles while $H$ and $W$ halve. So the parameters of a layer
# grow fourfold, and its multiplications stay the same: **the weight sits inside, the work is spread
# out**. Keep that in mind for the figure: its bars are parameters.

# %%
def parts_of(unet) -> dict[str, int]:
    """Parameters of every layer, by a short name that teacher and student share."""
    counts = {}
    for name, parameter in unet.named_parameters():
        words = name.split(".")
        if words[0] == "mid_block":
            key = "mid"
        elif words[0] in ("down_blocks", "up_blocks"):
            side = words[0].split("_")[0]
            is_layer = words[2] in ("resnets", "attentions")
            key = f"{side} {words[1]}.{words[3] if is_layer else words[2]}"
        else:
            key = "time, in and out"
        counts[key] = counts.get(key, 0) + parameter.numel()
    return counts


def kept_parts(unet, cut) -> set[str]:
    """The teacher's parts from which at least one tensor of the student is copied."""
    sources = {source for source in kdc.copy_map(unet, cut).values() if source}
    kept = torch.nn.Module()
    kept.named_parameters = lambda: ((n, p) for n, p in unet.named_parameters() if n in sources)
    return set(parts_of(kept))


def anatomy(axis, unet, cut, title):
    """Draw every part as a bar as long as its parameters, removed ones hatched."""
    counts, kept = parts_of(unet), kept_parts(unet, cut)
    shade = {"down": figures.COLOURS[0], "mid": figures.COLOURS[1], "up": figures.COLOURS[2]}
    order = [k for side in ("time", "down", "mid", "up") for k in counts if k.startswith(side)]
    for place, key in enumerate(order):
        colour = shade.get(key.split()[0].split(",")[0], figures.COLOURS[5])
        style = {} if key in kept else {"hatch": "////", "fill": False, "edgecolor": colour}
        axis.barh(place, counts[key] / 1e6, color=colour, **style)
    axis.set_yticks(range(len(order)), order, fontsize=7)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="million parameters")


with torch.device("meta"):  # shapes without memory
    sd = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
figure, axes = plt.subplots(1, 2, figsize=(10, 6), layout="constrained")
anatomy(axes[0], sd, plan, f"Stable Diffusion v1, what {plan!r} removes (hatched)")
anatomy(axes[1], pipeline.unet, plan, f"the {teacher} teacher, what {plan!r} removes")
figure.savefig(output / "anatomy.png", dpi=150)
plt.show()

# %% [markdown]
# "down 1.0" is the first layer of the second stage on the way down. The shape of both figures is
# the same, and so is the code that cuts them.
#
# ## Plans
#
# A plan says which layers stay. Not every choice can be built: a stage on the way up needs one layer
# more than its partner on the way down, because there is one skip more; and the layers at which the
# number of channels changes, the first and on the way up also the last, cannot be left out. A plan
# that diffusers cannot hold is refused when it is made.

# %%
for one in kdc.PLANS.values():
    print(one)
try:
    kdc.SlimPlan("impossible", ((1,),) * 4, ((0, 2),) * 4, mid=True)
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# ### Claim 1: the published counts
#
# The U-Net of Stable Diffusion is built on PyTorch's *meta* device, where tensors have a shape and
# no memory, and cut there.

# %%
published = {
    "full": 859_520_964,
    "bk-base": 579_384_964,
    "kdc": 482_346_884,
    "kdc-v2": 420_423_044,
    "bk-tiny": 323_384_964,
}
rows = {}
for name, expected in published.items():
    counted = slimming.count_parameters(kdc.slim(sd, name))
    small = slimming.count_parameters(kdc.slim(pipeline.unet, name))
    rows[name] = {
        "published": f"{expected:,}",
        "counted": f"{counted:,}",
        "equal": "yes" if counted == expected else "NO",
        f"{teacher} teacher": f"{small:,}",
        "share kept": f"{counted / published['full']:.1%}",
    }
pd.DataFrame(rows).T

# %% [markdown]
# ## Where the weights come from
#
# The student's first layer of a stage takes the teacher's first. On the way up, where two of three
# layers stay, the student's second layer takes the teacher's **third**: the two have the same
# inputs, the last skip among them, and the teacher's second has not. If an inner stage is dropped,
# the student's stages on the way up are counted from another place, and the copy has to be shifted.
# These few lines hold all of it:

# %%
display(Code(inspect.getsource(slimming._source), language="python"))
sources = kdc.copy_map(pipeline.unet, plan)
layers = {
    ".".join(s.split(".")[:4]): ".".join(t.split(".")[:4])
    for s, t in sources.items()
    if s.startswith(("down_blocks", "mid", "up_blocks"))
}
pd.Series(layers, name="copied from the teacher's").rename_axis("the student's").to_frame()

# %% [markdown]
# ### Claim 2: nothing else has changed

# %%
dataset = kdc.load_dataset("worlds", "test", count=run.count) if teacher == "mini" else None
words = ["a purple daisy on a sand background", "a red rose on a night background"]
generator = torch.Generator().manual_seed(run.seeds[0])
shape = (2, pipeline.unet.config.in_channels, *(pipeline.unet.config.sample_size,) * 2)
noisy = torch.randn(shape, generator=generator).to(pipeline.device)
embedded, _ = pipeline.encode_prompt(words, pipeline.device, 1, False)
with torch.no_grad():
    ours = kdc.slim(pipeline.unet, "full")(noisy, 500, embedded).sample
    theirs = pipeline.unet(noisy, 500, embedded).sample
new = sum(source is None for source in sources.values())
print("the plan that removes nothing gives identical outputs:", torch.equal(ours, theirs))
print(f"{len(sources)} tensors in the {plan!r} student, {new} of them not copied")

# %% [markdown]
# ## What the cut does to the picture
#
# From the same prompts and noise: the teacher, and the students right after the cut. Nothing here
# has been distilled.

# %%
prompts = [
    *words,
    "a yellow tulip on a sky background",
    "a pink spotted butterfly on a sky background",
    "a blue striped butterfly on a sand background",
    "a white bordered butterfly on a meadow background",
]
drawn = {"teacher": kdc.generate(pipeline, prompts, seed=run.seeds[0])}
for name in [n for n in kdc.PLANS if n != "full"]:
    student = kdc.with_unet(pipeline, kdc.slim(pipeline.unet, name))
    drawn[name] = kdc.generate(student, prompts, seed=run.seeds[0])
figures.picture_grid(drawn, prompts).savefig(output / "after_the_cut.png", dpi=150)
plt.show()

# %% [markdown]
# The networks are broken: each layer was trained to receive what the removed ones produced. That is
# what [distillation](02_distillation_layers) has to mend. How broken, and does it matter that the
# weights were copied? The measure is the mean squared difference between the predictions of student
# $s$ and teacher $u$, over test pictures and timesteps,
#
# $$ E = \mathbb{E}_{z_t, t, c}\; \lVert s(z_t, t, c) - u(z_t, t, c) \rVert^2 . $$
#
# The noise has variance 1, so a student that predicts nothing at all would have an error near 1.
#
# ### Claim 3: copied or random

# %%
if dataset is not None:
    data = kdc.cache_latents(pipeline, dataset)
    errors = {}
    for name in [n for n in kdc.PLANS if n != "full"]:
        errors[name] = {
            init: np.mean(
                [
                    kdc.output_error(
                        kdc.slim(pipeline.unet, name, init, seed=seed),
                        pipeline,
                        data,
                        count=run.count,
                        seed=seed,
                    ).mean()
                    for seed in run.seeds
                ]
            )
            for init in ("copy", "random")
        }
    figures.bars(errors, "output error")
    plt.show()
    worse = [name for name, e in errors.items() if e["copy"] >= e["random"]]
    verdict = "holds for every plan" if not worse else f"FAILS for {', '.join(worse)}"
    print(
        f"Claim 3, copied weights start nearer to the teacher: {verdict} ({len(run.seeds)} seed(s))"
    )

# %% [markdown]
# ### At which noise level does it hurt?

# %%
if dataset is not None:
    figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
    for name, colour in zip(errors, figures.COLOURS, strict=False):
        student = kdc.slim(pipeline.unet, name)
        by_time = kdc.output_error(student, pipeline, data, count=run.count)
        axis.plot(by_time, marker="o", color=colour, label=name)
    axis.set(xlabel="timestep (0: nearly clean, 999: pure noise)", ylabel="output error")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    plt.show()

# %% [markdown]
# Where the curves of several plans lie on one another, what distinguishes the plans does not matter
# to this teacher's predictions. The plans differ in the mid-block and in the innermost stage, and
# on latents of 16 x 16 those two work on 2 x 2 pixels: they hold a good part of the parameters and
# nearly nothing of what the picture needs. What every plan removes alike, the
# second layers, is what hurts. Do not carry that over to Stable Diffusion, whose innermost stage
# sees 8 x 8.
#
# ## Claim 4: three costs
#
# Multiply-accumulates are counted from shapes, on the meta device. For the time, all candidates are
# called in turn, round after round, so that a busy machine slows all of them alike. Shown are
# medians of the ratio to the teacher within a round, with the quartiles in the table.

# %%
candidates = {name: kdc.slim(pipeline.unet, name) for name in kdc.PLANS}
totals = pd.DataFrame(
    {n: kdc.count_costs(u, words=embedded.shape[1]).loc["total"] for n, u in candidates.items()}
).T
calls = {n: call_of(u, words=embedded.shape[1], batch_size=2) for n, u in candidates.items()}
times = kdc.measure_latency(calls, rounds=run.rounds, device=pipeline.device)
shares = totals[["parameters", "macs"]] / totals.loc["full", ["parameters", "macs"]]
shares["time"] = times["ratio"]
figures.bars(shares.T.to_dict(), "share of the teacher's")
plt.show()
shares = shares.join(times[["ratio_low", "ratio_high"]])
shares.map(lambda share: f"{share:.2f}")

# %% [markdown]
# Compare `bk-base` with `kdc`. Taking out the mid-block removes a good part of the parameters and
# hardly any time, since it works at the smallest resolution; the outer layers, which hold few
# parameters, are where time goes. A plan made for speed would cut elsewhere than one made for size.
# Calls of the mini teacher are so short that the overhead of each operation counts as well, so mind
# the range, and do not take these ratios for those of Stable Diffusion.
#
# ## What would have shown the claims false
#
# One "NO" in the table of counts (1). A `False`, or a tensor that is not copied (2). A plan whose
# red bar is not above its blue one in the figure of claim 3. Equal shares of all
# three costs for every plan (4).
#
# ## Exercises
#
# 1. Make a plan that keeps both layers of the outermost stage and one of all others. How many
#    parameters does it have on Stable Diffusion's shape? Why is it dear in time?
# 2. Shift the copy on the way up by one layer: take the teacher's `.1` for the student's `.1`. What
#    does `copy_map` then say about its shapes, and for which stages?
# 3. Which plan has the largest error at the noisiest timestep, and which at the cleanest? What do
#    inner and outer stages do, then?
#
# ## Provenance

# %%
ledger.this_run(started, budget=budget, teacher=teacher, plan=plan, seeds=str(run.seeds))
