# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distillation, term by term

# %% tags=["parameters"]
budget: str = "quick"  # "quick", "standard" or "full"
teacher: str = "mini"  # "mini", a hub id, or a diffusers folder
dataset: str = "worlds"  # "worlds", "flora", "lepidoptera", or a folder of images
plan: str = "kdc"  # which blocks the student keeps, see kdc.PLANS
steps: int = None  # updates of the loop at the end; None: what the budget says
batch_size: int = None  # images of a batch; None: what the budget says
seeds: list = None  # the first is the loop's; None: what the budget says
output_dir: str = "outputs/02_distillation_terms"  # figures

# %% tags=["hide-input"]
import time
import warnings

import numpy as np
import pandas as pd
import torch

import kdc
from kdc import LossWeights
from kdc.distillation.losses import DistillationLoss, feature_term, soft_term
from kdc.distillation.step import forward_process
from kdc.paths import as_path
from studies import figures
from studies.common import ledger
from studies.common.budgets import settle
from studies.distillation import report

started = time.perf_counter()
table = {
    "quick": {"steps": 12, "batch_size": 16, "seeds": [0], "images": 128},
    "standard": {"steps": 100, "batch_size": 32, "seeds": [0], "images": 1600},
    "full": {"steps": 1000, "batch_size": 32, "seeds": [0], "images": 8000},
}
run = settle(budget, table, steps=steps, batch_size=batch_size, seeds=seeds)
output = as_path(output_dir, "output_dir")
output.mkdir(parents=True, exist_ok=True)
pipeline = kdc.load_teacher(teacher)
size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
data = kdc.cache_latents(
    pipeline, kdc.load_dataset(dataset, "train", size, count=run.images)
)

# %% tags=["hide-input"]
prompts = [
    data.captions[i] for i in np.linspace(0, len(data.captions) - 1, 8, dtype=int)
]
rows = {"teacher": pipeline}
rows["after the cut"] = kdc.with_unet(pipeline, kdc.slim(pipeline.unet, plan))
if teacher == "mini" and plan == "kdc":
    rows["after distillation"] = kdc.load_student("mini", pipeline)
images = {name: kdc.generate(one, prompts, seed=1) for name, one in rows.items()}
figures.image_grid(images, prompts)
figures.show("2.1", save=output / "students.png")

# %% [markdown]
# **The question.** A U-Net that has just been slimmed draws nothing: what is left was never trained to
# work without the rest. KDC-Diff repairs it by *distillation*. The student learns from the data and
# from the teacher, by four terms of one loss. What does each term say to the student, and does the
# authors' code say it?
#
# :::{admonition} Findings
# 1. The **task term** has a floor. Of the shipped student's task error, 94.5 % is noise that the
#    teacher does not predict either (figure 2.2). The **output term** has no floor.
# 2. The **soft term** is, at high temperature, half of the output error without the channels' mean.
#    It cannot see an error that all channels share.
# 3. The **feature term** divides each block's error by the size of the teacher's features, so that all
#    blocks count alike (figure 2.3).
# 4. In the authors' code the output term has **no gradient**, and the soft term is summed over pixels.
#    Its gradient is about 100 times that of the task term here; on Stable Diffusion's larger latents
#    it would be 1,500 times.
# 5. The feature term makes 0.2 % of the first step of gradient descent, and 1.7 % of AdamW's. In the
#    innermost stage it makes two thirds (figure 2.5).
# :::
#
# What each term is *worth*, in images after training, is the question of
# [the next chapter](03_what_terms_are_worth.ipynb).
#
# ## One batch, two predictions
#
# Let $z_0$ be the latent of an image, $c$ its caption and $\epsilon$ normal noise. At timestep $t$ the
# noisy latent is
#
# $$z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \tag{2.1}$$
#
# where $\bar\alpha_t$ falls from 1 to nearly 0 as $t$ rises. Student and teacher read the same $z_t$,
# $t$ and $c$. Write $s$ for the student's prediction of the noise and $u$ for the teacher's. Both have
# $C = 4$ channels on $H \times W$ pixels.

# %%
draw = torch.Generator().manual_seed(run.seeds[0])
student = kdc.slim(pipeline.unet, plan)

z0, caption = data.draw(run.batch_size, draw, dropout=0.0)
noise = torch.randn(z0.shape, generator=draw)
t = torch.randint(1000, (run.batch_size,), generator=draw)

alpha_bar = forward_process(pipeline).alphas_cumprod[t].reshape(-1, 1, 1, 1)
zt = alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * noise

inputs = [x.to(pipeline.device) for x in (zt, t, caption)]
noise = noise.to(pipeline.device)


# %% [markdown]
# The feature term needs the outputs of blocks inside both networks. PyTorch hands them out through
# *forward hooks*: functions that are called with whatever a module returns.

# %%
def call(unet, blocks, inputs):
    """The prediction, and the outputs of the named blocks, in their order."""
    seen = {}

    def keep(name):
        def hook(module, arguments, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [unet.get_submodule(b).register_forward_hook(keep(b)) for b in blocks]
    prediction = unet(*inputs).sample
    for handle in handles:
        handle.remove()
    return prediction, [seen[b] for b in blocks]


pairs = kdc.feature_pairs(student, pipeline.unet)
our_blocks, their_blocks = zip(*pairs, strict=True)
with torch.no_grad():
    u, fu = call(pipeline.unet, their_blocks, inputs)
s, fs = call(student, our_blocks, inputs)
pd.DataFrame(
    {
        "the student's block": our_blocks,
        "the teacher's": their_blocks,
        "channels, height, width": [" x ".join(map(str, f.shape[1:])) for f in fs],
    }
)

# %% [markdown]
# ## The task term: what the data says
#
# $$L_\text{task} = \operatorname{mean}\,(s - \epsilon)^2. \tag{2.2}$$
#
# The teacher itself was trained by this term. The mean runs over images, channels and pixels.

# %%
task = (s - noise).square().mean()
print(f"{task.item():.4f}")

# %% [markdown]
# ## The output term: what the teacher says
#
# $$L_\text{output} = \operatorname{mean}\,(s - u)^2. \tag{2.3}$$

# %%
output_error = (s - u).square().mean()
print(f"{output_error.item():.4f}")

# %% [markdown]
# Why two squares? Many noises lead to the same $z_t$, and no network can tell which one it was. The
# best prediction is their mean. If the teacher predicts that mean, then $u - \epsilon$ is uncorrelated
# with everything that can be computed from $z_t$, and so with $s - u$:
#
# $$\operatorname{mean}\,(s - \epsilon)^2 \approx
#   \underbrace{\operatorname{mean}\,(s - u)^2}_{\text{what can be learnt}} +
#   \underbrace{\operatorname{mean}\,(u - \epsilon)^2}_{\text{the floor}}. \tag{2.4}$$
#
# The task term tells the student the same as the output term, *plus noise* of the floor's size. The
# figure shows both sides, by timestep.

# %% tags=["hide-input"]
held_back = kdc.cache_latents(
    pipeline, kdc.load_dataset(dataset, "test", size, count=64)
)
shipped = rows.get("after distillation", rows["after the cut"]).unet
process, again = forward_process(pipeline), torch.Generator().manual_seed(run.seeds[0])
levels, errors = (
    range(50, 1000, 135),
    {"task error": [], "output error": [], "floor": []},
)
with torch.no_grad():
    for level in levels:
        clean, words = held_back.draw(64, again, 0.0)
        drawn, when = (
            torch.randn(clean.shape, generator=again),
            torch.full((64,), level),
        )
        noisy = process.add_noise(clean, drawn, when)
        seen = [x.to(pipeline.device) for x in (noisy, when, words)]
        ours, theirs = shipped(*seen).sample, pipeline.unet(*seen).sample
        drawn = drawn.to(ours.device)
        for name, difference in zip(
            errors, (ours - drawn, ours - theirs, theirs - drawn), strict=True
        ):
            errors[name].append(difference.square().mean().item())
errors = {name: np.array(values) for name, values in errors.items()}
both_sides = errors["output error"] + errors["floor"]
panel = {name: (levels, values) for name, values in errors.items()}
panel["output error + floor"] = (levels, both_sides)
figures.lines(
    {"mean squared error of the finished student": panel}, ["timestep"], ["semilogy"]
)
figures.show("2.2")
print(f"floor / task error: {errors['floor'].sum() / errors['task error'].sum():.1%}")
print(
    f"right side of (2.4) / left side: {(both_sides / errors['task error']).round(3)}"
)

# %% [markdown]
# ## The soft term: channels as if they were classes
#
# Hinton et al. (1503.02531) distil a classifier by comparing *softened* probabilities, at a temperature
# $T$. The authors do the same with the four latent channels of each pixel:
#
# $$L_\text{soft} = T^2 \operatorname*{mean}_\text{pixels}\;
#   \sum_{c=1}^{C} p_c\, \log \frac{p_c}{q_c}, \qquad
#   p = \operatorname{softmax}(u / T),\; q = \operatorname{softmax}(s / T). \tag{2.5}$$

# %%
T = 2.0
log_q = torch.log_softmax(s / T, dim=1)
log_p = torch.log_softmax(u / T, dim=1)
soft_pixels = T**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1)  # one number a pixel
soft = soft_pixels.mean()
print(f"{soft.item():.5f}")

# %% [markdown]
# Channels are no classes, so what does this measure? A softmax does not change when one number is added
# to all channels. So the term compares the *centred* differences. With $d = s - u$ and $\bar d$ its
# mean over the channels, a Taylor expansion in $1 / T$ gives
#
# $$L_\text{soft} \;\xrightarrow{T \to \infty}\;
#   \tfrac12 \operatorname{mean}\,(d - \bar d)^2. \tag{2.6}$$
#
# It is half of the output error, but for what all channels share: to that it is blind.

# %%
d = s - u
centred = (d - d.mean(dim=1, keepdim=True)).square().mean() / 2
values = {f"soft, T = {t:g}": soft_term(s, u, t, "mean").item() for t in (2, 8, 32)}
values["half the centred error"] = centred.item()

shift = torch.randn(len(s), 1, *s.shape[-2:], generator=draw).to(
    s.device
)  # one for all channels
values["soft of an error that channels share"] = soft_term(
    u + shift, u, T, "mean"
).item()
values["output term of it"] = shift.square().mean().item()
pd.Series(values).map("{:.6f}".format).to_frame("value")

# %% [markdown]
# ## The feature term: inner blocks
#
# Let $f^s_k$ and $f^u_k$ be the outputs of the $k$-th pair of blocks, $k = 1 \dots K$:
#
# $$L_\text{feature} = \frac1K \sum_{k=1}^{K}
#   \frac{\operatorname{mean}\,(f^s_k - f^u_k)^2}{\operatorname{mean}\,(f^u_k)^2}. \tag{2.7}$$
#
# The output term sees a block only through all that follows. This one tells each block what it should
# give. The division makes every block count alike: 0 is perfect, and 1 as bad as giving 0.

# %%
raw = torch.stack(
    [(ours - theirs).square().mean() for ours, theirs in zip(fs, fu, strict=True)]
)
sizes = torch.stack([theirs.square().mean() for theirs in fu])
feature = (raw / sizes).mean()
print(f"{feature.item():.4f}")

# %% tags=["hide-input"]
short = [name.replace("_blocks", "").replace("_block", "") for name in their_blocks]
columns = {
    "raw error": raw.tolist(),
    "divided by the teacher's": (raw / sizes).tolist(),
}
by_block = pd.DataFrame(columns, index=short).T.to_dict()
figures.bars(by_block, "squared error of the features")
figures.show("2.3")
for name, errors in (("raw", raw), ("divided", raw / sizes)):
    print(f"{name}: largest over smallest {(errors.max() / errors.min()).item():.1f}")

# %% [markdown]
# ## The loss, by hand and by the library
#
# $$L = \lambda_\text{task} L_\text{task} + \lambda_\text{output} L_\text{output}
#   + \lambda_\text{soft} L_\text{soft} + \lambda_\text{feature} L_\text{feature}. \tag{2.8}$$
#
# `kdc.LossWeights` holds the weights, `kdc.distillation.losses.TERMS` the four functions. Both columns
# agree.

# %%
weights = LossWeights()  # task 1, output 1, soft 0.1, feature 0.1
terms = {"task": task, "output": output_error, "soft": soft, "feature": feature}
loss = sum(weights.terms[name] * value for name, value in terms.items())

library = DistillationLoss(weights)(s, noise, u, fs, fu)
both = pd.DataFrame(
    {
        "weight": weights.terms | {"loss": np.nan},
        "by hand": {
            name: value.item() for name, value in (terms | {"loss": loss}).items()
        },
        "kdc": {name: value.item() for name, value in library.items()},
    }
)
assert np.allclose(both["by hand"], both["kdc"], rtol=1e-4)
both.round(5).astype(object).fillna("")

# %% [markdown]
# The same cell would hold for any batch. Four things can be computed exactly, on random numbers: the
# limit (2.6), the blindness, that (2.7) does not depend on the unit of the features, and that the
# gradients are right. A central difference of step $h$ errs by the order of $h^2$ until rounding
# takes over.

# %% tags=["hide-input"]
panels, limit = report.closed_forms()
labels = [
    "temperature",
    "error that all channels share",
    "unit of the features",
    "step $h$",
]
figures.lines(
    panels, labels, ["semilogx", *["log"] * 3], {"limit": ("closed form", limit)}
)
figures.show("2.4")

# %% [markdown]
# ## What each term does to the weights
#
# A term teaches through its gradient $g_i = \nabla_\theta\, \lambda_i L_i$. Let $g = \sum_i g_i$. A small
# step $-\eta\, p$ of the weights lowers the loss by $\eta\, g \cdot p$, and the term $i$ makes
# $\eta\, g_i \cdot p$ of that. So its share is
#
# $$\text{share}_i = \frac{g_i \cdot p}{g \cdot p}, \qquad
#   p_\text{descent} = g, \quad p_\text{AdamW} = \operatorname{sign}(g). \tag{2.9}$$
#
# (The latter is AdamW's first step.) Gradient descent moves most where gradients are largest. AdamW divides every weight's gradient by its
# typical size, and moves all weights alike.

# %%
parameters = list(student.parameters())
gradients = {}
for name, value in terms.items():
    parts = torch.autograd.grad(
        weights.terms[name] * value,
        parameters,
        retain_graph=True,
        materialize_grads=True,
    )
    gradients[name] = torch.cat([part.flatten() for part in parts]).double()

g = sum(gradients.values())
shares = pd.DataFrame(
    {
        "gradient descent": {
            n: (gi @ g / (g @ g)).item() for n, gi in gradients.items()
        },
        "AdamW": {
            n: (gi @ g.sign() / g.abs().sum()).item() for n, gi in gradients.items()
        },
    }
)
same_batch = {
    "batch_size": run.batch_size,
    "caption_dropout": 0.0,
    "seed": run.seeds[0],
}
with warnings.catch_warnings(
    action="ignore"
):  # faults are the subject of the next section
    found = kdc.diagnose(student, pipeline, data, weights, **same_batch)
assert np.allclose(shares, found.terms[["share", "adam_share"]], atol=1e-3)
shares.map("{:.1%}".format)

# %% [markdown]
# `kdc.diagnose` computes the same from the same batch, and the cosines between the gradients. Why do
# the two columns differ so? The figure has the shares for each stage of the student.

# %% tags=["hide-input"]
by_stage, mean_square = {}, {}
parts = [name.split(".") for name, _ in student.named_parameters()]
stages = [
    f"{n[0].split('_')[0]}.{n[1]}" if "blocks" in n[0] else "the rest" for n in parts
]
of_weight = np.repeat(stages, [p.numel() for p in parameters])
for stage in dict.fromkeys(stages):
    mine = torch.from_numpy(of_weight == stage)
    step = g[mine].sign()
    by_stage[stage] = {
        n: (gi[mine] @ step / (g[mine] @ step)).item() for n, gi in gradients.items()
    }
    mean_square[stage] = g[mine].square().mean().sqrt().item()
figures.bars(by_stage, "share of AdamW's first step")
figures.show("2.5")
rms = pd.Series(mean_square, name="root mean square of the gradient of a weight")
rms.map("{:.1e}".format).to_frame()

# %% [markdown]
# The outer layers have the largest gradients, and there the task and output terms rule. The innermost
# stage has gradients thousands of times smaller, so gradient descent would hardly move it. AdamW moves
# every weight alike, and inside, the feature term makes most of the step. So its small share of the
# whole gradient says little about what it teaches.
#
# ## Beside the authors' code
#
# The authors' script computes the same four terms (commit 6901ef2), with three differences. The output
# term is computed where gradients are switched off. The soft term is summed over pixels and divided by
# the batch alone. The feature term sums raw errors. [Appendix A3](A3_authors_code.ipynb) reads it line
# by line.

# %%
authors_output = output_error.detach()  # inside torch.no_grad() there
authors_soft = soft_pixels.sum() / len(soft_pixels)
authors_feature = raw.sum()
theirs = {
    "task": task,
    "output": authors_output,
    "soft": authors_soft,
    "feature": authors_feature,
}

as_published = LossWeights.as_published()
library = DistillationLoss(as_published)(s, noise, u, fs, fu)
assert all(np.allclose(theirs[n].item(), library[n].item(), rtol=1e-4) for n in theirs)

with warnings.catch_warnings(action="ignore"):  # the faults are printed instead
    found_theirs = kdc.diagnose(student, pipeline, data, as_published, **same_batch)
print(*found_theirs.faults, sep="\n")
found_both = {"corrected": found.terms, "authors'": found_theirs.terms}
pd.concat(found_both).map(lambda value: "none" if pd.isna(value) else f"{value:.3f}")

# %%
pixels = s.shape[-2] * s.shape[-1]
norms = found_theirs.terms["gradient_norm"]
times = norms["soft"] / norms["task"]
print(f"the output term has no gradient: {not authors_output.requires_grad}")
print(f"soft / task, by gradient: {times:,.0f} with {pixels} pixels,", end=" ")
print(f"{times * 4096 / pixels:,.0f} with the 4,096 of Stable Diffusion")


# %% [markdown]
# A sum over pixels grows with the image, so the *size of the image* decides how much the soft term
# weighs. Here it has nearly the whole update, and what it cannot see, an error that all channels share,
# is left to the task term.
#
# ## The whole method in one loop
#
# Distillation is these terms, a batch at a time. Nothing is hidden in these lines.

# %%
def distillation_loss(student, draw):
    """The loss (2.8) of one new batch."""
    z0, caption = data.draw(
        run.batch_size, draw, dropout=0.1
    )  # a tenth without caption
    noise = torch.randn(z0.shape, generator=draw)
    t = torch.randint(1000, (run.batch_size,), generator=draw)
    zt = forward_process(pipeline).add_noise(z0, noise, t)  # (2.1)
    noise, *inputs = (x.to(pipeline.device) for x in (noise, zt, t, caption))
    with torch.no_grad():
        u, fu = call(pipeline.unet, their_blocks, inputs)
    s, fs = call(student, our_blocks, inputs)

    task = (s - noise).square().mean()  # (2.2)
    output_error = (s - u).square().mean()  # (2.3)
    log_q = torch.log_softmax(s / T, dim=1)
    log_p = torch.log_softmax(u / T, dim=1)
    soft = T**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()  # (2.5)
    errors = [
        (ours - theirs).square().mean() / theirs.square().mean()
        for ours, theirs in zip(fs, fu, strict=True)
    ]
    feature = sum(errors) / len(errors)  # (2.7)
    return task + output_error + 0.1 * soft + 0.1 * feature  # (2.8)


seed, rate = run.seeds[0], 5e-4
student = kdc.slim(pipeline.unet, plan).train()
optimizer = torch.optim.AdamW(
    student.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0
)
draw = torch.Generator().manual_seed(1009 * seed)  # as the library seeds its loop
losses = []
for _ in range(run.steps):
    loss = distillation_loss(student, draw)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("loss:", " ".join(f"{loss:.3f}" for loss in losses[:: max(1, run.steps // 8)]))

# %% [markdown]
# `kdc.distill` runs the same loop. It adds what a long run needs: a rising and falling learning rate,
# averaged weights, checkpoints, several processes, bfloat16. With these switched off, both give the
# same student.

# %%
plain = {
    "schedule": "constant",
    "warmup": 0,
    "ema_decay": 0.0,
    "precision": "no",
    "log_every": 1,
}
twin = kdc.slim(pipeline.unet, plan)
log = kdc.distill(
    twin, pipeline, data, steps=run.steps, batch_size=run.batch_size,
    learning_rate=rate, seed=seed, label="by the library", **plain,
)  # fmt: skip
assert np.allclose(log["loss"], losses, rtol=1e-3)


def largest_difference(one, other):
    """The largest difference between weights of two networks of one layout."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


apart = largest_difference(student, twin)
start = kdc.slim(pipeline.unet, plan)
moved = largest_difference(start, twin)
print(f"after {run.steps} updates a weight has moved by up to {moved:.1e};", end=" ")
print(f"by hand and by the library they differ by at most {apart:.1e}")
before = kdc.output_error(start, pipeline, held_back, count=32).mean()
after = kdc.output_error(twin, pipeline, held_back, count=32).mean()
print(f"output error on held-back images: {before:.4f} after the cut, {after:.4f} now")
result = {"plan": plan, "seed": seed, "after the cut": before, "distilled": after}
pd.Series(result).to_json(output / "result.json")

# %% [markdown]
# ## What this does not show
#
# All numbers above are of one batch and of a student that was just cut. Shares and cosines change while
# it learns. They say what a term *does*, and not what it is *worth*: that needs students trained with
# and without it, over seeds, and is the subject of [the next chapter](03_what_terms_are_worth.ipynb).
# How large the gradients are depends on the networks, too: Stable Diffusion's features differ in scale
# more than these.
#
# ## Exercises
#
# 1. Give the authors' output term its gradient. How much of AdamW's first step does it have then?

# %% tags=["hide-cell"]
# Solution to exercise 1
with warnings.catch_warnings(action="ignore"):
    live = as_published.replace(output_gradient=True)
    live = kdc.diagnose(start, pipeline, data, live, **same_batch)
live.terms[["share", "adam_share"]].round(3)

# %% [markdown]
# 2. Divide the features by nothing, and sum them over blocks (`feature_normalised=False`,
#    `feature_reduction="sum"`). Which block has most of the term?

# %% tags=["hide-cell"]
# Solution to exercise 2: one block at a time
alone = [
    feature_term([x], [y], normalised=False).item() for x, y in zip(fs, fu, strict=True)
]
(pd.Series(alone, short, name="share of the term") / sum(alone)).round(3).to_frame()

# %% [markdown]
# 3. Equation (2.6) is a limit. At which temperature does the soft term come within 1 % of it?

# %% tags=["hide-cell"]
# Solution to exercise 3
with torch.no_grad():
    off = {
        T: abs(soft_term(s, u, T, "mean") / centred - 1).item()
        for T in (1, 2, 4, 8, 16)
    }
min(T for T, error in off.items() if error < 0.01)

# %% [markdown]
# **Summary.** Four terms say four things: what the data is, what the teacher predicts, how its channels
# compare, and what its blocks give. In the authors' code one of them is dead, one is blind and rules
# the update, and one is a sum of raw errors. Thirty plain lines make the corrected loss and give the
# same student as the library.
#
# **Further reading.** Hinton et al., *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531;
# Romero et al., *FitNets*, arXiv 1412.6550; Kim et al., *BK-SDM*, arXiv 2305.15798; Lee et al.,
# *KOALA*, arXiv 2312.04005; Hang et al., *Min-SNR weighting*, arXiv 2303.09556.
#
# ## Provenance

# %% tags=["hide-input"]
ledger.this_run(
    started,
    budget=budget,
    teacher=teacher,
    plan=plan,
    steps=run.steps,
    batch_size=run.batch_size,
    seeds=str(run.seeds),
)
