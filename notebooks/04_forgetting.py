# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Forgetting

# %% tags=["parameters"]
budget: str = "quick"  # "quick", "standard" or "full"
teacher: str = "mini"  # "mini", a hub id, or a diffusers folder
dataset: str = "worlds"  # "worlds", "A then B" (worlds or folders), a folder (halves)
plan: str = "kdc"  # which blocks the student keeps, see kdc.PLANS
steps: int = None  # steps on each task; None: what the budget says
batch_size: int = None  # new images a step; None: what the budget says
seeds: list = None  # one run of each strategy a seed; None: what the budget says
output_dir: str = "outputs/04_forgetting"  # rows, students and figures

# %% tags=["hide-input"]
import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import display

import kdc
from kdc import LossWeights
from kdc.continual.matrix import ScoreMatrix
from kdc.continual.strategies import STRATEGIES
from kdc.distillation.step import DistillationStep, forward_process
from kdc.paths import as_path
from studies import figures
from studies.common import ledger
from studies.common.budgets import settle
from studies.common.claims import one_family, survivors
from studies.common.protocol import higher_is_better
from studies.replay import buffers, report, stages, study, variants
from studies.replay.tasks import check_dataset, tasks_of

started = time.perf_counter()
few = ["finetune", "replay"]
whole = list(variants.DOMAINS)
small = {"images": 160, "test_images": 16, "generated": 8, "rate": 5e-4}
usual = {"images": 800, "test_images": 64, "generated": 72, "rate": 5e-4}
large = usual | {"images": 8000, "rate": 5e-5}
table = {
    "quick": {"steps": 20, "batch_size": 8, "seeds": [0], "trials": few} | small,
    "standard": {"steps": 80, "batch_size": 8, "seeds": [0, 1, 2], "trials": whole}
    | usual,
    "full": {"steps": 5000, "batch_size": 32, "seeds": [0, 1, 2], "trials": whole}
    | large,
}
run = settle(budget, table, steps=steps, batch_size=batch_size, seeds=seeds)
if plan not in kdc.PLANS:
    raise ValueError(f"unknown plan {plan!r}; the plans are {', '.join(kdc.PLANS)}")
output = as_path(output_dir, "output_dir")
output.mkdir(parents=True, exist_ok=True)
kept_in = output / f"rows-{budget}-{run.steps}-steps-of-{run.batch_size}"

# %% tags=["hide-input"]
own = budget == "full" or teacher != "mini" or dataset != "worlds"
if not own:
    strips, asked = report.shown()
    figures.image_grid(
        {name: strips[name] for name in report.OPENING}, asked, scale=0.8
    )
    figures.show("4.1")

# %% [markdown]
# **The question.** A student that learns butterflies after flowers gets worse at flowers: nothing in the
# new images asks it to remember. What is forgotten? And what do the known remedies save, at what cost?
#
# :::{admonition} Findings
# 1. Plain fine-tuning **forgets**. After the second world, 2 % of the images that a student is asked for of
#    the first are right (figure 4.1). It has kept the words for colours and backgrounds.
# 2. **Replay** of stored images keeps 82 %, as much as joint training, and costs the new task nothing
#    that the study could see (figure 4.6).
# 3. The authors' replay of **the last sample** keeps 2 %, as fine-tuning does.
# 4. On the old images it matters **which terms** the student follows. Features keep 56 points more than
#    the output alone. Whether they are the teacher's or the old student's matters less (figure 4.8).
# 5. Two halves of similar **photographs**: nothing is forgotten in 80 updates (figure 4.9).
# :::
#
# Which images a buffer should hold, and how many, is the subject of [the next chapter](05_buffers.ipynb).
#
# ## Two tasks
#
# A *task* is what is learnt in one go: training images, prompts to generate from afterwards, and
# held-out test images. `dataset` may be both worlds, two folders, or one folder, whose classes are cut
# in half. On folders the mini teacher is first fine-tuned on all of them, as in
# [the chapter before](03_what_terms_are_worth.ipynb).

# %%
pipeline = kdc.load_teacher(teacher)
# What is wrong with a folder is said here, before any training.
folders = [name for name in check_dataset(dataset) if name not in kdc.WORLDS]
start = None  # a student freshly cut
if budget == "quick" and teacher == "mini" and plan == "kdc" and not folders:
    start, run.rate = kdc.load_student("mini", pipeline).unet, 3e-3
settings = study.Settings(
    plan=plan,
    images=run.images,
    test_images=run.test_images,
    generated=run.generated,
    steps=run.steps,
    batch_size=run.batch_size,
    learning_rate=run.rate,
    seeds=tuple(run.seeds),
    tuning=10 * run.steps,
)
sizes = {k: getattr(settings, k) for k in ("images", "test_images", "generated")}
if folders and teacher == "mini":
    stages.fine_tune(pipeline, folders, settings, output / "teacher")
tasks = tasks_of(pipeline, dataset, **sizes)
for task in tasks:
    print(f"{task.name}: {len(task.train)} images, {len(task.prompts)} prompts to draw")

# %%
picks = [
    task.prompts[i]
    for task in tasks
    for i in np.linspace(0, len(task.prompts) - 1, 4, dtype=int)
]
figures.image_grid({"teacher": kdc.generate(pipeline, picks, seed=1)}, picks)
figures.show("4.2")


# %% [markdown]
# ## Replay, in plain code
#
# Fine-tuning is distillation on the new task alone. Replay adds old images to every batch: with $B$ new
# images and $B$ from the buffer $\mathcal{M}$, the loss of a step is
#
# $$L = \tfrac{1}{2B} \Bigl(\, \sum_{x \in \text{new}} L(x) + \sum_{x \in \mathcal{M}} L(x) \Bigr), \tag{4.1}$$
#
# with $L(x)$ the loss of an image, equation (2.8). That is all. The buffer here is 64 images of the old
# task, drawn at random.

# %%
def learn(student, new, old=None):
    """Distil on a task; `old` is what joins every batch."""
    loss_of = DistillationStep(
        student, pipeline.unet, forward_process(pipeline), LossWeights()
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=run.rate)
    draw = torch.Generator().manual_seed(run.seeds[0])
    for _ in range(run.steps):
        latents, words = new.draw(run.batch_size, draw, dropout=0.1)
        if old is not None:
            old_latents, old_words = old.draw(run.batch_size, draw, dropout=0.1)
            latents = torch.cat([latents, old_latents])
            words = torch.cat([words, old_words])
        loss = loss_of(student, latents, words, draw)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loss_of.close()
    return student.eval()


first, second = tasks[0], tasks[-1]
draw = torch.Generator().manual_seed(run.seeds[0])
chosen = torch.randperm(len(first.train), generator=draw)[:64]
kept = dataclasses.replace(
    first.train,
    mean=first.train.mean[chosen],
    std=first.train.std[chosen],
    caption_index=first.train.caption_index[chosen],
)
learnt = copy.deepcopy(start) or learn(kdc.slim(pipeline.unet, plan), first.train)
students = {
    "before the new task": learnt,
    "fine-tuned": learn(copy.deepcopy(learnt), second.train),
    "with replay": learn(copy.deepcopy(learnt), second.train, kept),
}

# %% tags=["hide-input"]
drawn = {
    name: kdc.generate(kdc.with_unet(pipeline, one), picks, seed=1)
    for name, one in students.items()
}
figures.image_grid(drawn, picks)
figures.show("4.3", save=output / "plain.png")

# %% [markdown]
# ## How forgetting is measured
#
# After each task the student is scored on *every* task. The scores make a matrix $R_{t,k}$: task $k$
# after learning task $t$. With $T$ tasks and a score where higher is better,
#
# $$
# \text{forgetting} = \frac{1}{T-1} \sum_{k<T} \bigl(R_{k,k} - R_{T,k}\bigr), \qquad
# \text{plasticity} = \frac{1}{T} \sum_k R_{k,k}. \tag{4.2}
# $$

# %%
# Fine-tuning in the study below: after the first world (row), on both worlds (columns).
R = report.mean_matrices(report.stored("domains"), "accuracy")["finetune"].to_numpy()
T = len(R)
forgetting = np.mean([R[k, k] - R[T - 1, k] for k in range(T - 1)])
plasticity = np.mean([R[k, k] for k in range(T)])

library = ScoreMatrix(R, higher_is_better=True)
assert np.isclose(library.forgetting, forgetting)
assert np.isclose(library.plasticity, plasticity)
print(f"forgetting {forgetting:.2f}, plasticity {plasticity:.2f}")

# %% [markdown]
# A model may also lose what it knew *beyond* the tasks. **Retention** is the change of such a score from
# before the first task to after the last. Here it is the accuracy on combinations that no training image
# shows.
#
# ## Nine ways to learn the second task
#
# Every strategy is a row of a table that names a mechanism and its settings. All of them run in *one*
# loop, on the same new images with the same noise in the same order.

# %%
rows = {
    name: {
        "mechanism": strategy.mechanism.__name__,
        "old images for a new one": strategy.ratio,
        "they follow": strategy.old_target,
        "by the terms": ", ".join(strategy.old_weights.enabled)
        if strategy.old_weights
        else "as on new images",
    }
    for name, strategy in STRATEGIES.items()
}
pd.DataFrame(rows).T

# %% [markdown]
# - `finetune` adds nothing.
# - `last_sample` replays one image of the last step beside the next batch, as the authors' code does
#   ([appendix A3](A3_authors_code.ipynb)).
# - `replay` adds one image from the buffer to every new image, equation (4.1). The terms on old images
#   follow the teacher.
# - In `replay+distil` they follow the old model, a frozen copy of the student from before the task, by
#   task and output alone.
# - `generative_replay` stores no images: the old model generates them, and the student takes them for
#   real. In `generative_distillation` it follows the old model's prediction on them.
# - `ewc` penalises moving the weights that the old task depends on (Kirkpatrick et al., 1612.00796).
# - `agem` takes from each gradient the part that would raise the loss on stored images (Chaudhry et al.,
#   1812.00420). It joined after the study was measured.
# - `joint` spreads the same steps over all tasks. Replay adds old images to every step, so it can score
#   higher than joint.
#
# ## The experiment, small
#
# The library's `run_sequence` does the same as the loop above, for every strategy, and keeps what it has
# learnt, so that a stopped run resumes. This small run starts from the shipped student and uses a high
# learning rate, so that forgetting is visible after twenty steps.

# %%
trials = {name: variants.DOMAINS[name] for name in run.trials}
rows = study.study(
    "here", {"as given": tasks}, trials, pipeline, settings, kept_in, steps=run.steps,
    shown=picks, start=start,
)  # fmt: skip
lines = report.table(rows)
measures = [m for m in report.MEASURES if m in lines and "leak" not in m]
means = (
    lines.groupby("candidate", sort=False)[measures].mean().dropna(axis=1, how="all")
)
means.rename(columns=report.NAMES).T.round(3)

# %% tags=["hide-input"]
figures.heat_map(
    report.mean_matrices(rows, "output_error"), "output error", log_scale=False
)
figures.show("4.4")

# %% [markdown]
# Each map is one matrix: a row after every task, a column for every task. Forgetting is a first
# column that gets brighter downwards. The *output error* is the mean squared difference between
# student and teacher on images held back. Below, the same prompts and noise after each task.

# %%
generated = {"teacher": kdc.generate(pipeline, picks, seed=0)}
names = [task.name for task in tasks]
generated |= buffers.generated_after(
    kept_in, "here", "as given", run.seeds[0], names, trials, len(picks)
)
figures.image_grid(generated, picks)
figures.show("4.5", save=output / "forgetting.png")

# %% [markdown]
# ## The study
#
# Both worlds in both orders, three seeds, all strategies but `agem`, 80 steps of 8 images for each task,
# with the loss of the best recipe of the chapter before. Each student is asked for 72 images of each
# world, and for combinations that no training image shows. `python -m studies replay` measures it
# again, which takes hours on two cores. With a teacher or images of your own, what follows is of the run
# above.
#
# **Claimed beforehand.** Replay keeps the old task and joint training keeps no more; last-sample replay
# and a penalty on the weights keep nothing. Following the old model adds to replay. Generated images
# keep less than stored ones, unless the student follows the old model on them. A significant difference
# on the other side refutes a claim.

# %% tags=["hide-input"]
rows = rows if own else report.stored("domains")
lines = report.table(rows)
stage = "domains" if "old_accuracy" in lines else "photos"
metric = "accuracy" if stage == "domains" else "output_error"
stored = {
    name: report.table(report.stored(name)) for name in ("teachers", "plain", "photos")
}
checked = {stage: report.check_stage(stage, lines)} if own else {}
if not own:
    measured = {"domains": lines} | stored
    family = one_family(
        [report.check_stage(n, one).assign(stage=n) for n, one in measured.items()]
    )
    checked = {name: family[family["stage"] == name] for name in measured}
    print(survivors(family))
if len(checked[stage]):
    figures.forest(checked[stage], higher_is_better, report.NAMES)
    figures.show("4.6", save=output / "strategies.png")
shown = ["old_accuracy", "new_accuracy", "forgetting_accuracy", "retention_accuracy"]
shown += ["old_output_error", "new_output_error"]
means = lines.groupby("candidate", sort=False)[[m for m in shown if m in lines]].mean()
means.rename(columns=report.NAMES).round(3)

# %% [markdown]
# *Old* is what was learnt first, *new* what was learnt last, both scored at the end. Means over two
# orders and three seeds.
#
# **What came out.** Look at figure 4.1 first. The student that was merely fine-tuned answers a request
# for a daisy with a butterfly, in the right colour on the right background. The new task uses those
# words too. Its output error on old images hardly rises meanwhile, which is why the study counts
# images.
#
# Last-sample replay changes nothing in accuracy. EWC, at an untuned weight, changes nothing in accuracy
# either and makes the output error worse on both tasks. A buffer of 64 latents keeps as much as joint
# training reaches. `replay+distil` replays the same old images, and loses nearly half of the old
# accuracy: it follows a copy of the student, by the output alone. Both generative strategies lie between
# fine-tuning and `replay+distil`.
#
# ### What it costs
#
# Beyond the new images, a strategy pays for old images, forward passes of an old model, images to
# generate, or stored weights. An *image* below is one pass of one image through a network, forward, or
# forward and backward. Seconds are those of the second task (`python -m benchmarks.strategies`).

# %% tags=["hide-input"]
costs = lines.assign(kilobytes=lines["bytes"] / 1e3, thousands=lines["images"] / 1e3)
lost = f"forgetting_{metric}"
figures.trade_offs(
    costs,
    {"thousands": "thousand images through networks", "kilobytes": "kilobytes kept"},
    {lost: f"forgetting, {metric}", f"new_{metric}": f"new task, {metric}"},
    wide=["kilobytes"],
)
figures.show("4.7", save=output / "frontier.png")
timed = pd.DataFrame(ledger.read("strategy_seconds")).T["ratio"]
shown = costs.groupby("candidate", sort=False)[["thousands", "kilobytes", lost]].mean()
shown = shown.rename(columns=report.NAMES | {"thousands": "thousand images"})
shown.assign(**{"seconds over finetune's": timed}).round(2)

# %% [markdown]
# The cheapest remedy is also the best: `replay` stores half a megabyte, half of it embeddings, and
# takes half as many passes again as fine-tuning. A copy of the student costs its weights, 20 MB. EWC
# stores a mean gradient and the old weights, 58 MB. All of these save less than replay.
#
# ## Which targets, by which terms?
#
# The same old images from the same buffer, one for each new one, in the same order. Only the loss on
# them differs: whose targets the student follows, and by which terms. These claims were asked after
# the strategies were measured, and written before their own rows.

# %% tags=["hide-input"]
if not own:
    figures.forest(checked["teachers"], higher_is_better, report.NAMES)
    figures.show("4.8", save=output / "targets.png")
    names = ["old_accuracy", "new_accuracy", "forgetting_accuracy", "old_output_error"]
    means = stored["teachers"].groupby("candidate", sort=False)[names].mean()
    display(means.rename(columns=report.NAMES).round(3))

# %% [markdown]
# Beside all terms on the new images, replay with the task term alone ends at .12 of accuracy where
# fine-tuning ends at .01. Part of that is the length of the gradient: four times the task term, whose
# gradient is about as long as that of all terms, keeps .40. The output term adds .12; the rows cannot
# tell the teacher's from the old student's. The rest comes from the features (and the soft term at a
# tenth): they add .56 by the teacher's, and .50 by those of a copy of the student, frozen before the
# task. So `replay+distil` loses because it leaves out the features, not because it follows the old
# student.
#
# The same holds for images that the old student generates. With features too they keep .68 of accuracy,
# where following the output alone keeps .16, and no old image has to be stored. The claim that they
# keep as much as stored ones is refuted nonetheless, at more than twice the passes.
#
# *In plain training*, with the task term alone on **all** images and from a student that knows both
# worlds, replay keeps .90 where fine-tuning ends at .12 (`forgetting_plain.json`). So the task term on
# old images is enough if the loss on new images is no larger.
#
# ## Photographs
#
# Twelve species of real photographs, six and then the other six. The mini teacher is first fine-tuned
# on all of them. The embedded classifier knows no photographs, so the scores are output error and the
# Fréchet distance of 128 generated images to the photographs of their half.

# %% tags=["hide-input"]
if not own:
    strips, asked = report.shown("photos")
    figures.image_grid(strips, asked, scale=0.8)
    figures.show("4.9", save=output / "photos.png")
    names = [
        f"{w}_{m}" for m in ("fd", "output_error") for w in ("old", "new", "forgetting")
    ]
    means = stored["photos"].groupby("candidate", sort=False)[names].mean()
    display(means.rename(columns=report.NAMES).round(3))


# %% [markdown]
# Nothing is forgotten here. Learning six more flowers makes the student *better* at the first six, even
# where it is merely fine-tuned: forgetting is negative for all five strategies. The halves are alike,
# and 80 steps after slimming any image helps. With longer tasks and a judge of species they do forget:
# [chapter 07](07_full_scale.ipynb).
#
# ## What this does not show
#
# The students of this study had not converged on the first task when the second came, and the learning
# rate was many times the usual one. Replay had half as many passes again as fine-tuning. Controls with
# equal passes, and forgetting as a curve over learning rates, are under way.
#
# ## Exercises
#
# 1. In the plain loop, let one old image join every *eight* new ones. What is left of the flowers?

# %% tags=["hide-cell"]
# Solution to exercise 1: a buffer that gives an eighth of the batch
class Fewer:
    def draw(self, count, generator, dropout):
        return kept.draw(max(1, count // 8), generator, dropout)


students["an eighth of replay"] = learn(copy.deepcopy(learnt), second.train, Fewer())
amount = {"count": 16, "levels": 4}
left = {
    name: kdc.output_error(one, pipeline, first.test.latents, **amount).mean()
    for name, one in students.items()
}
pd.Series(left, name="output error on the old task").round(3).to_frame()

# %% [markdown]
# 2. Stop this notebook in the middle of a sequence and run it again. Which rows are read back? *Those of the
#    sequences that were finished.* Now give `kdc.run_sequence` an `output_dir` and `resume=True`, and kill
#    it inside a task: *it goes on from its last checkpoint, bit for bit* (`make kills` tries that).
# 3. Run this chapter on two folders of your own:
#    `papermill notebooks/04_forgetting.ipynb out.ipynb -p dataset "FLOWERS then BUTTERFLIES"`.
#
# **Summary.** A student forgets what its new images do not ask for. One stored image beside every new
# one prevents it, for half a megabyte. What the student follows on the old images matters more than
# whose they are.
#
# **Further reading.** McCloskey and Cohen, *Catastrophic interference*, 1989; Chaudhry et al., *On tiny
# episodic memories*, arXiv 1902.10486; Lopez-Paz and Ranzato, *GEM*, arXiv 1706.08840; Shin et al.,
# *Deep generative replay*, arXiv 1705.08690.
#
# ## Provenance

# %% tags=["hide-input"]
ledger.this_run(
    started,
    budget=budget,
    teacher=teacher,
    dataset=" then ".join(Path(name).name for name in dataset.split(" then ")),
    plan=plan,
    steps=run.steps,
    batch_size=run.batch_size,
    seeds=str(run.seeds),
)
