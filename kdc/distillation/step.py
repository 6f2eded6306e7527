"""One distillation step: noise on a batch, both networks' predictions, the terms."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from kdc.distillation.features import FeatureHooks, feature_pairs, projections
from kdc.distillation.losses import DistillationLoss, LossWeights, min_snr_weight
from kdc.processes import mean_over_processes, own_part, this_process
from kdc.training.efficiency import send

PROJECTIONS = "feature_projections"  # the student's submodule while it is taught, and _2, _3


def forward_process(pipeline: StableDiffusionPipeline) -> DDPMScheduler:
    """The noising process that the pipeline's U-Net was trained for."""
    return DDPMScheduler.from_config(pipeline.scheduler.config)


def noise_target(process: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor):
    """What a U-Net of that process is trained to predict: the noise, or the velocity."""
    if process.config.prediction_type == "v_prediction":
        return process.get_velocity(latents, noise, timesteps)
    return noise


def like(module: UNet2DConditionModel, tensor: Tensor) -> Tensor:
    """The tensor in the module's precision; whole numbers stay whole."""
    return tensor.to(module.dtype) if tensor.is_floating_point() else tensor


class DistillationStep:
    """The loss terms of a step, as a function of the student, a batch and a generator.

    `teacher` is the U-Net that the terms of `weights` follow, the teacher or an old model. It is
    not trained, and not called where no enabled term needs it. Where student and teacher differ in
    width, the student has projections of its features as a submodule meanwhile, drawn from `seed`
    and trained with it; each step of a student has its own. Call `close` when done: it removes them
    and the hooks.

    Several processes share the images of a step: each gives its own part, and draws noise and
    timesteps for all. With `shared` False the images are this process's alone.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel | None,
        process: DDPMScheduler,
        weights: LossWeights,
        seed: int = 0,
        *,
        shared: bool = True,
    ):
        self.student, self.teacher, self.process, self.weights = student, teacher, process, weights
        self.criterion, self.device = DistillationLoss(weights), this_process().device
        self.processes = this_process().num_processes if shared else 1
        self.snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
        self.hooks: list[FeatureHooks] = []
        self.projections: torch.nn.Module | None = None
        if weights.needs_teacher:
            teacher.eval()
        if weights.needs("features"):
            pairs = zip(*feature_pairs(student, teacher, weights.features_at), strict=True)
            unets = student.to(self.device), teacher
            self.hooks = [
                FeatureHooks(unet, names) for unet, names in zip(unets, pairs, strict=True)
            ]
            widths = [list(unet.config.block_out_channels) for unet in unets]
            if widths[0] != widths[1][: len(widths[0])]:
                self.projections = self._projections(seed)
                self.name = PROJECTIONS
                others, number = dict(student.named_children()), 2
                while self.name in others:  # another step's
                    self.name, number = f"{PROJECTIONS}_{number}", number + 1
                student.add_module(self.name, self.projections)

    def _projections(self, seed: int) -> torch.nn.Module:
        config = self.teacher.config
        latents = torch.zeros(1, config.in_channels, *(config.sample_size,) * 2)
        prompt_embeds = torch.zeros(1, 1, config.cross_attention_dim)
        inputs = latents, torch.tensor([0]), prompt_embeds
        with torch.no_grad():
            for unet in (self.student, self.teacher):
                unet(*(like(unet, x).to(self.device) for x in inputs))
        ours, theirs = (hooks.take() for hooks in self.hooks)
        return projections(ours, theirs, seed=seed).to(self.device)

    def __call__(
        self,
        model: torch.nn.Module,
        latents: Tensor,
        prompt_embeds: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Terms as `DistillationLoss` names them, for latents (B, C, h, w), embeddings (B, L, D).

        `model` is the student, wrapped or not; `generator`, on the CPU, draws noise and timesteps.
        """
        process, weights, device = self.process, self.weights, self.device
        total = len(latents) * self.processes
        part = own_part(total) if self.processes > 1 else slice(None)
        noise = torch.randn((total, *latents.shape[1:]), generator=generator)[part]
        count = process.config.num_train_timesteps
        timesteps = torch.randint(count, (total,), generator=generator)[part]
        noisy = process.add_noise(latents, noise, timesteps)
        target = noise_target(process, latents, noise, timesteps)
        inputs = [send(x, device) for x in (noisy, timesteps, prompt_embeds)]
        taught = None
        if weights.needs_teacher:
            # Before the student, whose activations then are not in memory yet. Not in inference
            # mode, which is no faster here: the loss keeps the teacher's tensors for its gradient.
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                seen = [like(self.teacher, x) for x in inputs]
                taught = self.teacher(*seen, return_dict=False)[0].float()
        predicted = model(*inputs, return_dict=False)[0]
        task_weight = None
        if weights.min_snr:
            prediction = process.config.prediction_type
            task_weight = min_snr_weight(self.snr[timesteps], weights.min_snr, prediction)
            task_weight = task_weight.to(device)
        ours, theirs = (hooks.take() for hooks in self.hooks) if self.hooks else ((), ())
        if self.projections is not None:
            ours = [layer(x) for layer, x in zip(self.projections, ours, strict=True)]
        target = send(target, device)
        shared = {"over_parts": mean_over_processes} if self.processes > 1 else {}
        terms = self.criterion(
            predicted, target, taught, ours, theirs, task_weight=task_weight, **shared
        )
        if self.processes > 1 and weights.leaves_output_out:
            # Processes wait for the gradient of every parameter, of the last layers as well.
            terms["loss"] = terms["loss"] + 0 * predicted.float().sum()
        return terms

    def close(self) -> None:
        """Remove the hooks, and the projections; once more does nothing."""
        for hooks in self.hooks:
            hooks.close()
        if self.projections is not None:
            delattr(self.student, self.name)
            self.projections = None
