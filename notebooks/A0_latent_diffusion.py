# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Primer: latent diffusion in seven small steps
#
# **The question.** How does a network that was only ever asked *which noise is in this?* come to draw
# what a sentence says?
#
# This page builds the whole method by hand, from the noise to the finished image, with the mini teacher
# that comes with the package. You need to know what a network, a loss and a gradient are, and no more.
# The chapters start where it ends.
#
# ```{admonition} Findings
# - An **autoencoder** makes images small; everything else happens on these *latents*.
# - Training **adds noise** to a latent and asks the **U-Net** to find it. The caption helps, most of all
#   where the noise is strong.
# - **Guidance** calls the network twice and exaggerates what the caption changes.
# - A **sampler** starts from pure noise and takes the found noise out, a little at a time. Ours has
#   a dozen lines, and agrees with that of diffusers to rounding.
# ```

# %% tags=["parameters"]
budget: str = "quick"  # "quick", "standard" or "full": how many images are looked at
teacher: str = "mini"  # "mini", a hub id, or a folder; predicts noise
steps: int = None  # denoising steps; None: what the budget says
output_dir: str = "outputs/A0_latent_diffusion"  # where this notebook writes

# %% tags=["hide-input"]
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import kdc
from kdc.data import worlds
from kdc.evaluation import judges
from kdc.paths import as_path
from studies import figures
from studies.common import ledger
from studies.common.budgets import settle

started = time.perf_counter()
table = {
    "quick": {"steps": 25, "count": 32},
    "standard": {"steps": 25, "count": 256},
    "full": {"steps": 50, "count": 256},
}
run = settle(budget, table, steps=steps)
pipeline = kdc.load_teacher(teacher)
if pipeline.scheduler.config.prediction_type != "epsilon":
    raise ValueError(f"{teacher} does not predict noise, as this page needs it")
vae, unet, scheduler = pipeline.vae, pipeline.unet, pipeline.scheduler
size = unet.config.sample_size * pipeline.vae_scale_factor
torch.set_grad_enabled(False)
as_path(output_dir, "output_dir").mkdir(parents=True, exist_ok=True)


# %% [markdown]
# ## 1. Latents: work where it is cheap
#
# An autoencoder turns an image into a *latent* of four channels and a fraction of its side, and back
# (Rombach et al., [arXiv 2112.10752](https://arxiv.org/abs/2112.10752)). What it loses, no later step
# can bring back. What it saves, every step saves.

# %%
def encode(images):
    """Images (N, 3, H, W) in [-1, 1] to latents (N, 4, h, w) of about unit variance."""
    return vae.encode(images).latent_dist.mean * vae.config.scaling_factor


def decode(latents):
    """Latents back to images (N, 3, H, W) in [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


test = kdc.load_dataset("worlds", "test", size=size, count=2 * run.count)
chosen = [test[i] for i in np.linspace(0, len(test) - 1, run.count).astype(int)]
images = torch.stack([each["image"] for each in chosen])
captions = [each["caption"] for each in chosen]
clean = encode(images)
print(f"{tuple(images.shape[1:])} numbers become {tuple(clean.shape[1:])}:"
      f" {images[0].numel() / clean[0].numel():.0f} times fewer")  # fmt: skip

# %%
shown = [0, run.count // 3, run.count - 1]
channels = clean[shown] / clean[shown].abs().max()
channels = channels.unsqueeze(2).expand(-1, -1, 3, -1, -1)
rows = {
    captions[i].replace(" on a ", "\non a "): [images[i], *each, decode(clean[[i]])[0]]
    for i, each in zip(shown, channels, strict=True)
}
figures.image_grid(rows, ["image", *[f"channel {c}" for c in range(4)], "decoded"])
figures.show("A0.1")

# %% [markdown]
# ## 2. Noise: a road from any image to nothing
#
# The latent $x_0$ at *timestep* $t$ is mixed with noise $\varepsilon$ from a normal distribution
# (Ho et al., [arXiv 2006.11239](https://arxiv.org/abs/2006.11239)):
#
# $$ x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \varepsilon. \tag{A0.1} $$
#
# $\bar\alpha_t$ falls from nearly 1 at $t = 0$ to nearly 0 at $t = 999$: from an image to nothing but
# noise, with the variance always about 1.

# %%
kept = scheduler.alphas_cumprod  # how much of the variance is left, by timestep


def add_noise(latents, noise, timestep):
    return kept[timestep].sqrt() * latents + (1 - kept[timestep]).sqrt() * noise


generator = torch.Generator().manual_seed(0)
noise = torch.randn(clean.shape, generator=generator)
levels = [0, 50, 100, 200, 400, 600, 800, 999]
rows = {
    captions[i].replace(" on a ", "\non a "): [
        decode(add_noise(clean[[i]], noise[[i]], t))[0] for t in levels
    ]
    for i in shown[:2]
}
figures.image_grid(rows, [f"t = {t}" for t in levels])
figures.show("A0.2")

# %%
forward = DDPMScheduler.from_config(scheduler.config)
theirs = forward.add_noise(clean, noise, torch.full((len(clean),), 400))
difference = (theirs - add_noise(clean, noise, 400)).abs().max()
print(f"largest difference to diffusers: {difference:.1e}")


# %% [markdown]
# ## 3. Words: a caption becomes a list of vectors
#
# A text encoder turns a caption into one vector for each of its pieces. In every layer of *cross-attention*
# each place of the latent asks these vectors what they have to say to it. The empty caption is one
# more caption: a tenth of the training images had it.

# %%
def embed(texts):
    """Captions to prompt embeddings (N, tokens, width)."""
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = pipeline.tokenizer(texts, **how)
    return pipeline.text_encoder(tokens.input_ids)[0]


print(f"{captions[0]!r}: {pipeline.tokenizer.tokenize(captions[0])}")
print(f"embeddings: {tuple(embed(captions[:1]).shape)}")


# %% [markdown]
# ## 4. Training: find the noise
#
# The U-Net gets the noisy latent, the timestep and the embeddings, and predicts the noise. The loss is the
# mean squared error:
#
# $$ L = \mathbb{E}_{x_0, c, t, \varepsilon}\, \lVert \varepsilon - \varepsilon_\theta(x_t, t, c) \rVert^2. \tag{A0.2} $$
#
# That is the whole of training. One update, in full:
#
# ```python
# timestep = torch.randint(1000, (len(latents),))
# noise = torch.randn_like(latents)
# noisy = forward.add_noise(latents, noise, timestep)
# loss = (unet(noisy, timestep, embeddings).sample - noise).square().mean()
# loss.backward()
# optimizer.step()
# ```
#
# What has the network learnt from the words? The error with the right caption, with the caption of
# another image, and with the empty one, by timestep:

# %%
def error(timestep, texts):
    noisy = add_noise(clean, noise, timestep)
    predicted = unet(noisy, timestep, embed(texts)).sample
    return (predicted - noise).square().mean().item()


others = captions[run.count // 2 :] + captions[: run.count // 2]
asked = {"right": captions, "of another image": others, "empty": [""] * len(captions)}
levels = [20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 980]
curves = {}
for name, texts in asked.items():
    curves[name] = (levels, [error(t, texts) for t in levels])
figures.lines({"error of the predicted noise, by caption": curves}, ["timestep"])
plt.yscale("log")
plt.ylabel("mean squared error")
figures.show("A0.3")


# %% [markdown]
# At small timesteps the image is still there to be seen, and the right caption adds little to what the empty
# one gives. At large ones there is little else to go by, and it adds more. A wrong caption misleads at
# every timestep: the network trusts what it is told.
#
# ## 5. Guidance: exaggerate the caption
#
# A network that is asked with and without the caption shows what the caption changes. *Classifier-free
# guidance* (Ho and Salimans, [arXiv 2207.12598](https://arxiv.org/abs/2207.12598)) goes $g$ times as far:
#
# $$ \tilde\varepsilon = \varepsilon_\theta(x_t, t, \varnothing)
#    + g\, \bigl(\varepsilon_\theta(x_t, t, c) - \varepsilon_\theta(x_t, t, \varnothing)\bigr). \tag{A0.3} $$
#
# At $g = 1$ that is the plain prediction. At the usual 7.5 images fit their captions better, become alike,
# and cost two calls of the network a step.

# %%
def guided(noisy, timestep, texts, guidance):
    without, with_caption = unet(
        torch.cat([noisy, noisy]), timestep, embed([""] * len(texts) + texts)
    ).sample.chunk(2)
    return without + guidance * (with_caption - without)


# %% [markdown]
# ## 6. Sampling: take the noise out, a little at a time
#
# From a prediction of the noise follows one of the clean latent:
#
# $$ \hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\,\tilde\varepsilon}{\sqrt{\bar\alpha_t}}. \tag{A0.4} $$
#
# At $t = 999$ it is a blur, the mean of everything the caption could mean. So a *sampler* does not jump there: it goes to
# a slightly smaller timestep, with the noise that it has found, and asks again. This one is DDIM (Song et
# al., [arXiv 2010.02502](https://arxiv.org/abs/2010.02502)):

# %%
def sample(start, texts, steps, guidance=7.5):
    """DDIM from pure noise: the last latents, and the predicted clean ones."""
    latents, way = start, []
    times = np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1
    for now, after in zip(times, [*times[1:], None], strict=True):
        found = guided(latents, now, texts, guidance)
        predicted = (latents - (1 - kept[now]).sqrt() * found) / kept[now].sqrt()
        way.append(predicted)
        left = kept[after] if after is not None else torch.tensor(1.0)
        latents = left.sqrt() * predicted + (1 - left).sqrt() * found
    return latents, way


prompts = [
    "a purple daisy on a sand background",
    "a red striped butterfly on a night background",
]
generator = torch.Generator().manual_seed(1)
start = torch.randn((2, *clean.shape[1:]), generator=generator)
drawn, way = sample(start, prompts, run.steps)
picks = np.linspace(0, run.steps - 1, 8).astype(int)
rows = {
    prompt.replace(" on a ", "\non a "): [decode(way[i][[row]])[0] for i in picks]
    for row, prompt in enumerate(prompts)
}
grid = figures.image_grid(rows, [f"step {i + 1}" for i in picks])
figures.show("A0.4", save=as_path(output_dir, "output_dir") / "from_noise.png")

# %% [markdown]
# What the network believes the finished image to be, step by step. Background and composition
# are settled first, then the shape, then the edges.
#
# **The same by diffusers.** Its DDIM takes the same noise to the same latents:

# %%
changes = {"timestep_spacing": "trailing", "clip_sample": False}
theirs = DDIMScheduler.from_config(scheduler.config, **changes)
theirs.set_timesteps(run.steps)
latents = start
for timestep in theirs.timesteps:
    found = guided(latents, timestep, prompts, 7.5)
    latents = theirs.step(found, timestep, latents).prev_sample
print(f"largest difference to diffusers: {(latents - drawn).abs().max():.1e}")

# %% [markdown]
# ## 7. The library, and two knobs
#
# `kdc.generate` is that loop with a better sampler (DPM-Solver++, Lu et al.,
# [arXiv 2211.01095](https://arxiv.org/abs/2211.01095)), which needs fewer steps. The two numbers that
# a user turns are the guidance and the steps:

# %%
flowers = worlds.world("flora").combinations()
many = [worlds.caption(a) for a in flowers[::23]][:6]
rows = {}
for g in (1.0, 2.0, 7.5):
    drawn = kdc.generate(pipeline, many, seed=3, steps=run.steps, guidance=g)
    rows[f"guidance {g:g}"] = drawn
for n in (2, 4, 8):
    rows[f"{n} steps"] = kdc.generate(pipeline, many, seed=3, steps=n)
figures.image_grid(rows, [text.replace(" background", "") for text in many])
figures.show("A0.5")

# %% [markdown]
# Each step costs two calls of the U-Net, which does nearly all of the work. So there are two ways to
# make images cheaper: fewer steps, and a cheaper U-Net. The second is what this book is about.
#
# **What this page does not show:** how the mini teacher was trained ([A1](A1_mini_models.ipynb)), and how good
# its images are ([06](06_evaluation.ipynb)).
#
# ## Exercises
#
# 1. Replace the sampler by a single jump: decode `way[0]`. What do you see, and why?

# %% tags=["hide-cell"]
# Solution to exercise 1: the mean of all images that fit the caption, where the squared
# error is least: what the network must answer from noise alone.
jump = decode(way[0])
finished = decode(way[-1])
print(
    f"spread of the jump {jump.std():.2f}, of the finished image {finished.std():.2f}"
)


# %% [markdown]
# 2. What does a negative guidance draw?

# %% tags=["hide-cell"]
# Solution to exercise 2: what the caption does not say; a classifier reads the images
def read(latents):
    shown = ((decode(latents) + 1) * 127.5).round().to(torch.uint8)
    found = judges.predicted_attributes(shown).items()
    values = [[judges.LABELS[name][i] for i in classes] for name, classes in found]
    return [" ".join(one) for one in zip(*values, strict=True)]


print("guidance 7.5:", read(sample(start, prompts, 8)[0]))
print("guidance -2: ", read(sample(start, prompts, 8, guidance=-2.0)[0]))


# %% [markdown]
# 3. Swap the captions of the two prompts during sampling. Until when does the image follow the new caption?

# %% tags=["hide-cell"]
# Solution to exercise 3: until late; the kind is settled before the colour
def sample_swapped(start, steps, swap):
    """`sample`, with the two captions exchanged from step `swap` on."""
    latents = start
    times = np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1
    for number, (now, after) in enumerate(zip(times, [*times[1:], None], strict=True)):
        texts = prompts if number < swap else prompts[::-1]
        found = guided(latents, now, texts, 7.5)
        predicted = (latents - (1 - kept[now]).sqrt() * found) / kept[now].sqrt()
        left = kept[after] if after is not None else torch.tensor(1.0)
        latents = left.sqrt() * predicted + (1 - left).sqrt() * found
    return latents


for share in (0.25, 0.5, 0.75):
    print(f"after {share:.0%}:", read(sample_swapped(start, 12, round(12 * share))))

# %% [markdown]
#
# **Summary.** A latent diffusion model is an autoencoder, a text encoder and a network that finds noise. The
# caption enters by cross-attention and counts most where noise is strong. Sampling asks that network a
# few dozen times, twice each time, and so the network's cost is the cost of an image.
#
# ## Provenance

# %% tags=["hide-input"]
ledger.this_run(started, budget=budget, teacher=teacher, steps=run.steps)
