"""Slim, distil and replay: KDC-Diff re-created as a small library under a research book."""

from kdc.agreement import drawing_judge, output_error
from kdc.comparison import compare, retraining
from kdc.continual import Task, run_sequence
from kdc.costs import count_costs, measure_latency
from kdc.data import LatentDataset, cache_latents, load_dataset
from kdc.diagnostics import diagnose
from kdc.distillation import distill
from kdc.evaluation import Scores, evaluate
from kdc.knapsack import Budget
from kdc.losses import DistillationLoss, LossWeights
from kdc.models import generate, load_student, load_teacher, save_student, with_unet
from kdc.replay import ReplayBuffer
from kdc.scores import ScoreMatrix
from kdc.search import search_plan, sensitivity
from kdc.slimming import PLANS, SlimPlan, copy_map, slim
from kdc.taps import FeatureTaps, tap_names
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
    "Scores",
    "SlimPlan",
    "Task",
    "cache_latents",
    "compare",
    "copy_map",
    "count_costs",
    "diagnose",
    "distill",
    "drawing_judge",
    "evaluate",
    "generate",
    "load_dataset",
    "load_student",
    "load_teacher",
    "measure_latency",
    "output_error",
    "retraining",
    "run_sequence",
    "save_student",
    "search_plan",
    "sensitivity",
    "slim",
    "tap_names",
    "with_unet",
]
