"""Generative replay: the old model generates images of its tasks, and nothing is stored."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from kdc.continual.mechanisms.base import Items, Mechanism, Run, draw_items
from kdc.continual.tasks import Task
from kdc.data.latents import LatentDataset
from kdc.pipelines import in_pipeline, refuse_infinite_images, silent
from kdc.processes import this_process
from kdc.replay.buffer import ReplayBuffer

FILE = "pool.safetensors"


class Generated(Mechanism):
    """Before each task but the first, a pool of images for captions of the tasks so far.

    `pool` latents are generated in `sampling_steps` at `guidance`, equally many of each task.
    """

    needs_old_model = True

    def __init__(self, run: Run, pool: int = 256, sampling_steps: int = 10, guidance: float = 1.5):
        super().__init__(run)
        self.size, self.sampling_steps, self.guidance = pool, sampling_steps, guidance
        self.pool: ReplayBuffer | None = None

    @staticmethod
    def check(pool: int, sampling_steps: int, guidance: float) -> None:
        for name, value in (("pool", pool), ("sampling_steps", sampling_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def replays(self, t: int) -> bool:
        return t > 0

    def start(self, t: int, old_model: UNet2DConditionModel | None, folder: Path | None) -> None:
        self.pool = None
        if t == 0:
            return
        self.counts.generated_images = self.size
        guided = 1 if self.guidance == 1 else 2
        self.counts.sampler_images = self.size * self.sampling_steps * guided
        if folder and (folder / FILE).is_file():
            self.pool = ReplayBuffer.load(folder / FILE)
        else:
            self.pool = generate_pool(
                in_pipeline(self.run.teacher, old_model),
                self.run.tasks[:t],
                size=self.size,
                sampling_steps=self.sampling_steps,
                guidance=self.guidance,
                seed=self.run.seed_of(t),
            )
            if folder and this_process().is_main_process:
                self.pool.save(folder / FILE)
        self.counts.buffer_bytes = self.pool.sizes()["items"]

    def old_items(self, t: int, count: int) -> Items | None:
        return draw_items(self.pool, count) if self.pool is not None else None

    def task_state(self) -> dict[str, Tensor]:
        return {} if self.pool is None else {"generator": self.pool.generator.get_state()}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        if self.pool is not None:
            self.pool.generator.set_state(state["generator"])

    def save(self, folder: Path) -> None:
        (folder / FILE).unlink(missing_ok=True)  # the pool was for this task alone


@torch.no_grad()
def generate_pool(
    pipeline: StableDiffusionPipeline,
    tasks: Sequence[Task],
    *,
    size: int,
    sampling_steps: int,
    guidance: float,
    seed: int,
    batch_size: int = 32,
) -> ReplayBuffer:
    """`size` latents that the pipeline generates for captions of `tasks`, equally many of each.

    They lie in a `ReplayBuffer` of their own, with deviation 0, and nothing is decoded.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = ReplayBuffer(size, "fifo", "float32", seed=seed)
    unet = pipeline.unet.config
    shape = (unet.in_channels, unet.sample_size, unet.sample_size)
    like = {"device": pipeline.device, "dtype": pipeline.dtype}
    places = itertools.count()  # of the images in the pool
    for number, task in enumerate(tasks):
        data = task.train
        count = size // len(tasks) + (number < size % len(tasks))
        rows = torch.randint(len(data), (count,), generator=generator)
        generated: list[Tensor] = []
        for index in rows.split(batch_size):
            prompt_embeds = data.embeddings[data.caption_index[index]].to(**like)
            noise = torch.randn((len(index), *shape), generator=generator).to(**like)
            seeds = [seed * 100_003 + next(places) for _ in index]
            with silent(pipeline):
                out = pipeline(
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=data.empty.to(**like).expand_as(prompt_embeds),
                    latents=noise,
                    num_inference_steps=sampling_steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(one) for one in seeds],
                    output_type="latent",
                )
            captions = [data.captions[i] for i in data.caption_index[index].tolist()]
            refuse_infinite_images(out.images, captions, "the old model")
            generated.append(out.images.float().cpu())
        if count:
            mean = torch.cat(generated)
            numbers = data.caption_index[rows]
            images = LatentDataset(
                mean, torch.zeros_like(mean), data.embeddings, numbers, data.empty, data.captions
            )
            pool.add(images, task=number)
    return pool
