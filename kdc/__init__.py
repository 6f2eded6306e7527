"""Slim, distil and replay: KDC-Diff re-created as a small library under a research book."""

from kdc.continual import Task, run_sequence
from kdc.costs import count_costs, measure_latency
from kdc.data import LatentDataset, cache_latents, load_dataset
from kdc.distillation import distill, output_error
from kdc.losses import DistillationLoss, FeatureTaps, LossWeights, tap_names
from kdc.models import generate, load_student, load_teacher, save_student, with_unet
from kdc.replay import ReplayBuffer
from kdc.scores import ScoreMatrix
from kdc.search import Budget, search_plan, sensitivity
from kdc.slimming import PLANS, SlimPlan, copy_map, slim
from kdc.worlds import WORLDS

__all__ = [
    "PLANS",
    "WORLDS",
    "Budget",
    "DistillationLoss",
    "FeatureTaps",
    "LatentDataset",
    "LossWeights",
    "ReplayBuffer",
    "ScoreMatrix",
    "SlimPlan",
    "Task",
    "cache_latents",
    "copy_map",
    "count_costs",
    "distill",
    "generate",
    "load_dataset",
    "load_student",
    "load_teacher",
    "measure_latency",
    "output_error",
    "run_sequence",
    "save_student",
    "search_plan",
    "sensitivity",
    "slim",
    "tap_names",
    "with_unet",
]
