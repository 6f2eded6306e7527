"""A CLIP tokenizer and text models of mini size, trained on the worlds' captions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kdc.data import scenes, worlds

MAX_TOKENS = 24
OTHER_WORDS = ("photo", "photograph", "picture", "of", "the", "flower", "butterfly", "moth")


def all_captions() -> list[str]:
    """Every caption of both worlds, held-out combinations included, in every template."""
    return [
        worlds.caption(attributes, template)
        for world in worlds.WORLDS.values()
        for attributes in world.combinations() + world.combinations(held_out=True)
        for template in range(len(worlds.TEMPLATES))
    ]


def scene_captions() -> list[str]:
    """Captions of scenes, all groups and templates among them."""
    backgrounds = itertools.cycle(worlds.BACKGROUNDS)
    groups = [
        scenes.Group(world.name, colour, kind, size, count)
        for world in scenes.DOMAINS.values()
        for colour in worlds.COLOURS
        for kind in world.kinds
        for size in scenes.SIZES
        for count in range(1, scenes.MOST + 1)
    ]
    alone = [scenes.Scene((group,), next(backgrounds)) for group in groups]
    both = [
        scenes.Scene(pair, next(backgrounds), relation)
        for pair in zip(groups, groups[1:] + groups[:1], strict=True)
        for relation in scenes.RELATIONS
    ]
    return [
        scenes.caption(scene, template)
        for scene in alone + both
        for template in range(len(scenes.TEMPLATES[scene.relation]))
    ]


def new_tokenizer(captions: Iterable[str] = ()) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format: one token for each word of the captions.

    They are those of the worlds, and `captions`.

    Every byte is in the vocabulary, so that any text can be written, if in more pieces.
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, end_of_word_suffix="</w>", initial_alphabet=bytes_, show_progress=False
    )
    bpe.train_from_iterator(itertools.chain(all_captions(), OTHER_WORDS, captions), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = bytes_ + [b + "</w>" for b in bytes_] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int = 2) -> CLIPTextConfig:
    """A CLIP text configuration of that width for that tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=width,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = 96) -> CLIPTextModel:
    """The randomly initialised text encoder of the mini teacher."""
    return CLIPTextModel(text_config(tokenizer, width))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]):
    """(B, MAX_TOKENS) token ids, padded and truncated as the pipeline does it."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
