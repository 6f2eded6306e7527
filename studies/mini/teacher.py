"""The mini teacher: a U-Net of Stable Diffusion v1's layout at a tenth of its width.

Text encoder and U-Net are trained together from nothing on scenes, with the autoencoder frozen and
every training image encoded once.

Left to itself, a small U-Net of this layout passes its inner blocks by: half of what every layer of
the upward path reads comes through a skip connection, so that what the innermost block says is
halved a dozen times before it comes out. So the skips begin quiet (`quieten_skips`). In training
(`Leg`) captions are hidden from all levels but the mid-block, skips are dropped at random, and
errors at noisy levels count more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel

from kdc.data.scenes import TEMPLATES, caption
from kdc.distillation.losses import min_snr_weight
from kdc.io import fingerprint, hash_text
from kdc.processes import own_part, this_process
from kdc.training.efficiency import plain_attention
from kdc.training.loop import train
from kdc.training.settings import TrainSettings
from studies.mini.images import scene_images, to_signed
from studies.mini.text import new_text_encoder, new_tokenizer, scene_captions, tokenize

NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
CAPTION_DROPOUT = 0.1
MIN_SNR = 5.0
STEPS, BATCH_SIZE = 36_000, 32
WORDINGS = len(TEMPLATES[""])  # of every relation as many


@dataclass(frozen=True)
class Layout:
    """The shape of the mini teacher's U-Net, and how it is initialised."""

    # Channels of the four stages, from the outermost.
    widths: tuple[int, ...] = (32, 64, 128, 128)
    # Heads of attention in each. Eight would hold four channels each outside, and take most of the
    # time there.
    heads: tuple[int, ...] = (1, 2, 4, 4)
    # The side of the latents.
    side: int = 16
    # What the initial weights of skip connections are multiplied by, see `quieten_skips`.
    skips: float = 0.25


@dataclass(frozen=True)
class Leg:
    """A part of the training; each starts from the averaged weights of the one before."""

    # Its share of all updates.
    share: float
    # How often the caption of an image is hidden from all levels but the mid-block.
    hiding: float = 0.5
    # How often a skip connection of an image is dropped in the two inner levels of the upward path;
    # half as often in the third, and never in the outermost.
    skip_dropout: float = 0.25
    # The exponent of the signal-to-noise ratio at noisy levels, see `level_weight`.
    power: float = 0.5
    # What the learning rate does after the warm-up.
    schedule: str = "constant_with_warmup"
    # How many batches make one update; the learning rate is higher by the square root of that.
    together: int = 1
    # Updates in which the learning rate rises; None: a tenth of all, at most 200.
    warmup: int | None = None

    def updates(self, batches: int) -> int:
        """Its updates in a training of so many batches."""
        return max(1, round(self.share * batches / self.together))


# What wakes the mid-block was found after the first leg; the second tried it. Larger updates came
# with the third: on two old cores 22 images pass in a second so, instead of 18. Legs are as long as
# the machine was at hand; each starts from the averaged weights of the one before.
LEGS = (
    Leg(3 / 36, hiding=0.25, skip_dropout=0.0, power=1.0),
    Leg(1 / 36),
    Leg(1.8 / 36, together=2, warmup=150),
    Leg(1.02 / 36, together=2, warmup=150),
    *[Leg(3 / 36, together=2)] * 5,
    Leg(14.18 / 36, schedule="cosine", together=2),
)
BY_LEVEL = (1.0, 1.0, 0.5)  # of `skip_dropout`, by upward block from the inside


def new_unet(layout: Layout = Layout(), cross_attention_dim: int = 96) -> UNet2DConditionModel:
    """The mini teacher's U-Net, randomly initialised: 8.69M parameters."""
    unet = UNet2DConditionModel(
        sample_size=layout.side,
        block_out_channels=layout.widths,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=layout.heads,
        norm_num_groups=16,
    )
    quieten_skips(unet, layout.skips)
    return unet


@torch.no_grad()
def quieten_skips(unet: UNet2DConditionModel, scale: float) -> None:
    """Multiply the initial weights of the long skip connections by `scale`, 0 to 1, in place.

    The weights of what comes from inside grow, so that sums of inputs of equal variance keep
    theirs: with `inner` and `skip` channels, by sqrt(1 + skip / inner (1 - scale^2)). Only where
    training starts is changed, not what the network can compute. (Huang et al., arXiv 2310.13545,
    scale the skips themselves, for stability.)
    """
    skips = [unet.config["block_out_channels"][0]]
    for down in unet.down_blocks:
        skips += [resnet.out_channels for resnet in down.resnets]
        skips += [down.resnets[-1].out_channels] if down.downsamplers else []
    for up in unet.up_blocks:
        for resnet in up.resnets:
            skip = skips.pop()
            inner = resnet.in_channels - skip
            grown = (1 + skip / inner * (1 - scale**2)) ** 0.5
            for convolution in (resnet.conv1, resnet.conv_shortcut):
                convolution.weight[:, :inner] *= grown
                convolution.weight[:, inner:] *= scale


def noise_scheduler() -> DDPMScheduler:
    """The forward process, Stable Diffusion's: 1,000 steps, scaled-linear betas."""
    return DDPMScheduler(1000, clip_sample=False, **NOISE)


def sampling_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler in the pipeline. Trailing steps start from pure noise, as in training."""
    return DPMSolverMultistepScheduler(1000, timestep_spacing="trailing", steps_offset=1, **NOISE)


class TextToNoise(nn.Module):
    """U-Net and text encoder as one module, so that one loop trains both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.kept: Tensor | None = None
        self.outside: Tensor | None = None

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        ids: Tensor,
        kept: Tensor | None = None,
        hidden: Tensor | None = None,
        empty: Tensor | None = None,
    ) -> Tensor:
        """The predicted noise (B, 4, H, W) for token ids (B, `MAX_TOKENS`).

        kept (B, levels, 3): 1 for a skip connection that is used, 0 for one that is dropped, by
        level of the upward path from the inside; None: all are used. hidden (B,): True where all
        levels but the mid-block read the caption `empty` (1, `MAX_TOKENS`) instead; None: nowhere.
        Both have an effect within `dropping`.
        """
        self.kept = kept
        if hidden is None:
            embeddings = self.text_encoder(ids).last_hidden_state
        else:
            embeddings = self.text_encoder(torch.cat([ids, empty])).last_hidden_state
            embeddings, nothing = embeddings[:-1], embeddings[-1:]
            self.outside = torch.where(hidden[:, None, None], nothing, embeddings)
        try:
            return self.unet(noisy, timesteps, embeddings, return_dict=False)[0]
        finally:
            self.kept = self.outside = None

    @contextlib.contextmanager
    def dropping(self):
        """Within it, `kept` and `hidden` of `forward` have an effect."""

        def drop(level: int, block: nn.Module, args: tuple, inputs: dict):
            if self.kept is None:
                return None
            used = self.kept[:, level, :, None, None, None]
            skips = inputs["res_hidden_states_tuple"]
            name, count = "res_hidden_states_tuple", len(block.resnets)
            # The block takes its skips from the end of what is left of all of them.
            own = tuple(s * used[:, i].to(s) for i, s in enumerate(skips[-count:]))
            return args, inputs | {name: (*skips[:-count], *own)}

        def hide(block: nn.Module, args: tuple, inputs: dict):
            if self.outside is None:
                return None
            return args, inputs | {"encoder_hidden_states": self.outside}

        handles = [
            block.register_forward_pre_hook(partial(drop, level), with_kwargs=True)
            for level, block in zip(range(len(BY_LEVEL)), self.unet.up_blocks, strict=False)
        ]
        handles += [
            block.register_forward_pre_hook(hide, with_kwargs=True)
            for block in (*self.unet.down_blocks, *self.unet.up_blocks)
            if getattr(block, "has_cross_attention", False)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def level_weight(snr: Tensor, power: float) -> Tensor:
    """The weight of the squared error of predicted noise, by the signal-to-noise ratio (B,).

    So that the error of the *image* counts `snr` times, at most `MIN_SNR` times, as in Min-SNR
    (Hang et al. 2303.09556); where noise outweighs the signal, snr ** power times. With a power of
    1 that is Min-SNR. Below 1 the levels at which a scene's layout is decided count more.
    """
    return torch.where(snr < 1, snr ** (power - 1), min_snr_weight(snr, MIN_SNR))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, batch_size: int = 64) -> tuple:
    """Means and deviations (N, 4, 16, 16) of the scaled latents of uint8 images."""
    means, deviations = [], []
    for batch in tqdm(images.split(batch_size), desc="encoding", mininterval=2):
        posterior = vae.encode(to_signed(batch).to(vae.device)).latent_dist
        means.append(posterior.mean.cpu() * vae.config.scaling_factor)
        deviations.append(posterior.std.cpu() * vae.config.scaling_factor)
    return torch.cat(means), torch.cat(deviations)


def train_teacher(
    vae: AutoencoderKL,
    output_dir: Path,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    pool: int = 40_000,
    learning_rate: float = 1e-3,
    seed: int = 0,
    legs: tuple[Leg, ...] = LEGS,
    layout: Layout = Layout(),
    precision: str = "auto",
) -> tuple[TextToNoise, object, pd.DataFrame]:
    """Train U-Net and text encoder on scenes; returns them, the tokenizer and the log of all legs.

    All legs together take `steps` batches of `batch_size` images, some several in one update.
    A finished leg leaves `leg-<number>.safetensors` in `output_dir`. It is not trained again, nor
    are those before it, whose files may be gone.
    Several processes share each batch; two of one thread each are faster than one of two.
    """
    process = this_process()
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(scene_captions())
    model = TextToNoise(new_unet(layout), new_text_encoder(tokenizer))
    loss, rows, done = None, [], 0
    files = [output_dir / f"leg-{number}.safetensors" for number in range(1, len(legs) + 1)]
    last = max((number for number, file in enumerate(files, start=1) if file.is_file()), default=0)
    for number, (leg, weights) in enumerate(zip(legs, files, strict=True), start=1):
        place = weights.with_suffix("")
        if number > last:
            if loss is None:
                file = output_dir / "pool.safetensors"
                with process.main_process_first():
                    images = encoded_pool(vae, tokenizer, file, pool, seed)
                loss = _teacher_loss(images, tokenizer)
            updates, images_each = leg.updates(steps), batch_size * leg.together
            part = own_part(images_each)
            settings = TrainSettings(
                updates,
                batch_size=part.stop - part.start,
                learning_rate=learning_rate * leg.together**0.5,
                warmup=min(200, updates // 10) if leg.warmup is None else leg.warmup,
                schedule=leg.schedule,
                ema_decay=0.9995**leg.together,
                seed=seed + number,
                precision=precision,
            )
            with model.dropping(), plain_attention(model.unet):
                train(
                    model,
                    partial(loss, leg=leg, batch_size=images_each),
                    settings,
                    place,
                    resume=True,
                    label=f"teacher, leg {number} of {len(legs)}",
                )
            if process.is_main_process:
                state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
                save_file(state, place.with_suffix(".new"))
                place.with_suffix(".new").rename(weights)
            process.wait_for_everyone()
        if number >= last:
            # Read back in half precision, so that every leg starts as from a file that was kept.
            model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        if (place / "log.csv").is_file():
            rows.append(pd.read_csv(place / "log.csv").assign(leg=number))
            rows[-1]["step"] += done
            done = rows[-1]["step"].iloc[-1]
    log = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
    log.to_csv(output_dir / "log.csv", index=False)
    return model, tokenizer, log


def encoded_pool(vae: AutoencoderKL, tokenizer, file: Path, pool: int, seed: int) -> dict:
    """Training scenes: "mean" and "deviation" (N, 4, H, W) of their latents, and "ids".

    "ids" (wordings, N, `MAX_TOKENS`): the tokens of every wording of their captions. They are
    encoded once and kept in `file`, half in size, from which a run that goes on reads them.
    """
    names = tokenizer.get_vocab()
    words = hash_text(*sorted(names, key=names.get))
    made_with = {
        "pool": f"{pool} of seed {seed + 1}",
        "vae": fingerprint(*vae.state_dict().values()),
        "words": words,
    }
    if file.is_file():
        with safe_open(file, "pt") as stored:
            if stored.metadata() == made_with:
                return {name: stored.get_tensor(name) for name in stored.keys()}
    images, shown = scene_images(pool, "train", seed=seed + 1)
    mean, deviation = encode_images(vae.eval(), images)
    ids = [tokenize(tokenizer, [caption(a, t) for a in shown]) for t in range(WORDINGS)]
    tensors = {
        "mean": mean.half(),
        "deviation": deviation.half(),
        "ids": torch.stack(ids).to(torch.int32),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file.with_suffix(".new"), made_with)
    file.with_suffix(".new").rename(file)
    return tensors


def _teacher_loss(images: Mapping[str, Tensor], tokenizer):
    """The loss of a batch that it draws from an encoded pool."""
    means, deviations, ids = images["mean"], images["deviation"], images["ids"]
    empty = tokenize(tokenizer, [""])
    forward_process = noise_scheduler()
    snr = forward_process.alphas_cumprod / (1 - forward_process.alphas_cumprod)
    levels = torch.tensor(BY_LEVEL)[None, :, None]

    def loss(model, generator, leg: Leg, batch_size: int):
        draw = lambda high: torch.randint(high, (batch_size,), generator=generator)  # noqa: E731
        index, wording, timesteps = draw(len(means)), draw(WORDINGS), draw(1000)
        noise, spread = torch.randn((2, batch_size, *means.shape[1:]), generator=generator)
        latents = means[index].float() + deviations[index].float() * spread
        token_ids = ids[wording, index].long()
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        token_ids = torch.where(dropped[:, None], empty, token_ids)
        chance = torch.rand((batch_size, len(BY_LEVEL), 3), generator=generator)
        kept, hidden = chance >= leg.skip_dropout * levels, None
        if leg.hiding:
            hidden = torch.rand(batch_size, generator=generator) < leg.hiding
        noisy = forward_process.add_noise(latents, noise, timesteps)
        device, own = next(model.parameters()).device, own_part(batch_size)
        noisy, timesteps, token_ids, noise = (
            each[own].to(device) for each in (noisy, timesteps, token_ids, noise)
        )
        predicted = model(
            noisy,
            timesteps,
            token_ids,
            kept[own].to(device) if leg.skip_dropout else None,
            hidden[own].to(device) if leg.hiding else None,
            empty.to(device),
        )
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        weighted = error * level_weight(snr[timesteps.cpu()], leg.power).to(device)
        return {"loss": weighted.mean(), "task": error.mean().detach()}

    return loss


def as_pipeline(vae: AutoencoderKL, model: TextToNoise, tokenizer) -> StableDiffusionPipeline:
    """The trained parts as a diffusers pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=sampling_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
