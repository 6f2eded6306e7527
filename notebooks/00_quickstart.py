# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: one prompt, two networks
#
# **The question.** A text-to-image model is made of a text encoder, an autoencoder and a U-Net, and
# the U-Net does nearly all the work: it is called once for every denoising step, twice with
# guidance. KDC-Diff ([arXiv 2505.06995](https://arxiv.org/abs/2505.06995)) removes 44 % of its
# parameters and then *distils* the rest: the big network, the **teacher**, shows the small one, the
# **student**, what it would have predicted. Does the student still generate what you ask for, and what
# does it save?
#
# :::{admonition} Findings
# 1. The shipped student has **56 %** of the teacher's parameters and draws what is asked for **as often**:
#    99.0 % of 576 images are right in colour, kind and background, the teacher's 98.8 % (figure 0.1,
#    `results/mini_grades.json`).
# 2. It does so for combinations that **no training image showed**: 99.7 %.
# 3. Slimming takes less time off than parameters (figure 0.2). Most of what makes images fast comes from
#    fewer denoising steps, as [chapter 06](06_evaluation.ipynb) shows.
# :::
#
# Everything here runs on a laptop without a download: the teacher is a *mini* Stable Diffusion
# that comes with the package. It has the block layout of Stable Diffusion v1 at a tenth of its
# width and it knows two worlds, **flowers** and **butterflies**. To use the real one, give its hub
# id as `teacher`; nothing else changes.

# %% tags=["parameters"]
budget: str = "quick"  # "quick", "standard" or "full": images and rounds
teacher: str = "mini"  # "mini", a hub id, or a diffusers folder
plan: str = "kdc"  # the plan of the student, if one has to be made (see below)
steps: int = None  # denoising steps an image; None: what the budget says
seeds: list = None  # seeds of the starting noise; None: what the budget says
output_dir: str = "outputs/00_quickstart"  # where this notebook writes

# %% tags=["hide-input"]
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display

import kdc
from kdc.paths import as_path
from studies import figures
from studies.common import ledger
from studies.common.budgets import settle

started = time.perf_counter()
table = {
    "quick": {"steps": 25, "seeds": [0], "rounds": 3},
    "standard": {"steps": 25, "seeds": [0, 1, 2], "rounds": 10},
    "full": {"steps": 50, "seeds": [0, 1, 2], "rounds": 10},
}
run = settle(budget, table, steps=steps, seeds=seeds)
steps, seeds = run.steps, run.seeds
as_path(output_dir, "output_dir").mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Load the teacher and the student
#
# `kdc.load_teacher` returns an ordinary diffusers `StableDiffusionPipeline`. The student differs
# from it in its U-Net alone; text encoder, autoencoder and scheduler are shared. A distilled
# student is shipped for the mini teacher. For another teacher there is none yet, so the cell
# *slims* that teacher's U-Net without distilling it, and you will see why distilling is needed.

# %%
teacher_pipeline = kdc.load_teacher(teacher)
if teacher == "mini" and plan == "kdc":
    student_pipeline = kdc.load_student("mini", teacher_pipeline)
    student_name = "student (slimmed and distilled)"
else:
    student_pipeline = kdc.with_unet(
        teacher_pipeline, kdc.slim(teacher_pipeline.unet, plan)
    )
    student_name = "student (slimmed, not distilled)"
pipelines = {"teacher": teacher_pipeline, student_name: student_pipeline}

sizes = {n: sum(p.numel() for p in p_.unet.parameters()) for n, p_ in pipelines.items()}
for name, count in sizes.items():
    print(
        f"{name}: {count:,} U-Net parameters,"
        f" {count / sizes['teacher']:.1%} of the teacher's"
    )

# %% [markdown]
# ## Draw
#
# The first prompts show things both networks were trained on. The last two ask for combinations
# that **no training image ever showed**: there was no blue daisy and no orange eyed butterfly.
# What appears there was composed from parts, not remembered.

# %%
prompts = [
    "a purple daisy on a sand background",
    "a red rose on a night background",
    "a yellow tulip on a sky background",
    "a pink spotted butterfly on a sky background",
    "a blue striped butterfly on a sand background",
    "a white bordered butterfly on a meadow background",
    "a blue daisy on a meadow background",
    "an orange eyed butterfly on a night background",
]
generated = {
    f"{name.split(' (')[0]}\nseed {seed}": kdc.generate(
        pipeline, prompts, seed=seed, steps=steps
    )
    for seed in seeds
    for name, pipeline in pipelines.items()
}
grid = figures.image_grid(generated, [p.replace(" background", "") for p in prompts])
figures.show("0.1", save=as_path(output_dir, "output_dir") / "teacher_and_student.png")


# %% [markdown]
# Both rows of a seed start from the same noise, so they may be compared image by image: the
# composition, the place and the turn of the subject are decided in the first steps, and a student
# that has learnt its teacher's predictions follows it there.
#
# ## What it costs
#
# Time is measured as a user feels it: one image, from words to pixels, the same number of denoising
# steps with guidance, after a warm-up, the two pipelines in turn, so that whatever else the machine
# is doing slows both. The median is shown with the range from the fastest to the slowest round.

# %%
def time_one(pipeline) -> float:
    start = time.perf_counter()
    kdc.generate(pipeline, prompts[0], steps=steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


times = {name: [] for name in pipelines}
for index in range(run.rounds + 1):
    for name, pipeline in pipelines.items():
        elapsed = time_one(pipeline)
        if index:  # the first round warms up
            times[name].append(elapsed)

rows = []
for name in pipelines:
    median = np.median(times[name])
    rows.append(
        {
            "network": name,
            "U-Net parameters": f"{sizes[name]:,}",
            "seconds an image": f"{median:.2f}",
            "range": f"{min(times[name]):.2f} to {max(times[name]):.2f}",
            "time / teacher": f"{median / np.median(times['teacher']):.2f}",
        }
    )
pd.DataFrame(rows).set_index("network")

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 1.9), layout="constrained")
labels = ["teacher", "student"]
axes[0].barh(labels, [s / 1e6 for s in sizes.values()], color=figures.COLOURS[:2])
axes[0].set_xlabel("U-Net parameters (millions)")
medians = [np.median(t) for t in times.values()]
spread = [[m - min(t) for m, t in zip(medians, times.values(), strict=True)]]
spread += [[max(t) - m for m, t in zip(medians, times.values(), strict=True)]]
axes[1].barh(labels, medians, xerr=spread, color=figures.COLOURS[:2])
axes[1].set_xlabel("seconds an image")
for axis in axes:
    axis.invert_yaxis()
figures.show("0.2")

# %% [markdown]
# Parameters fall further than time does. [The chapter on slimming](01_unet_slimming.ipynb) shows why:
# the blocks that hold the parameters are not the blocks that take the time.
#
# ## How good are they, really?
#
# A handful of images proves little. The table shows stored grades, from `results/`, measured on
# hundreds of images by an independent classifier that reads colour, kind and background off a
# image. *Never trained* means combinations of colour and kind that no training image showed.

# %%
if teacher == "mini":
    grades = ledger.read("mini_grades")
    wanted = {
        "colour": "colour",
        "kind": "species or pattern",
        "background": "background",
        "held_out_colour": "colour, never trained",
        "held_out_kind": "species or pattern, never trained",
        "held_out_background": "background, never trained",
    }
    table = {
        name: {label: f"{grades[name][key]:.1%}" for key, label in wanted.items()}
        for name in ("teacher", "student")
    }
    display(pd.DataFrame(table))

# %% [markdown]
# ## What this does not show
#
# The mini world is easy: after its full training the student is as good as the teacher. On Stable Diffusion
# a slimmed student stays behind. And this page times one image on one machine.
#
# ## Exercises
#
# 1. Replace a prompt. What happens with a word that the worlds do not know, such as "a green daisy"?

# %% tags=["hide-cell"]
# Solution to exercise 1: an unknown word is spelt in smaller tokens
tokens = teacher_pipeline.tokenizer.tokenize("a green daisy")
prompt = "a green daisy on a sand background"
unknown = kdc.generate(teacher_pipeline, [prompt], seed=1, steps=8)
print(tokens, "some daisy, in a colour of the model's own choice", len(unknown))

# %% [markdown]
# 2. Halve `steps`, then halve again. Which of the two networks suffers first?

# %% tags=["hide-cell"]
# Solution to exercise 2: how far images move from the network's own at all steps
moved = {}
for name, pipeline in pipelines.items():
    drawn = {
        n: kdc.generate(pipeline, prompts[:3], seed=1, steps=n).float() / 255
        for n in (steps, max(1, steps // 2), max(1, steps // 4))
    }
    moved[name] = {
        n: (d - drawn[steps]).square().mean().item() for n, d in drawn.items()
    }
pd.DataFrame(moved).rename_axis("steps").round(4)

# %% [markdown]
# 3. Call `kdc.generate(..., guidance=1.0)`. What does it do to the time?

# %% tags=["hide-cell"]
# Solution to exercise 3: without guidance a step is one call instead of two
for guidance in (7.5, 1.0):
    start = time.perf_counter()
    kdc.generate(teacher_pipeline, prompts[0], steps=8, guidance=guidance)
    print(f"guidance {guidance:g}: {time.perf_counter() - start:.2f} s")

# %% [markdown]
# 4. Run this notebook from a terminal with another seed:
#    `papermill notebooks/00_quickstart.ipynb out.ipynb -y 'seeds: [7]'`.
#
# **Summary.** A network with half of the parameters draws the same images, after distillation. It saves more
# parameters than time.
#
# **Further reading.** Rombach et al., *Latent diffusion*, arXiv 2112.10752; Kim et al., *BK-SDM*, arXiv
# 2305.15798; the [primer](A0_latent_diffusion.ipynb) of this book.
#
# ## Provenance

# %% tags=["hide-input"]
ledger.this_run(started, budget=budget, teacher=teacher, steps=steps, seeds=str(seeds))
