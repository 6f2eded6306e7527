"""The public names; `__init__.py` reads them from here and imports each when it is asked for."""

from .continual.matrix import (
    ScoreMatrix as ScoreMatrix,
)
from .continual.sequence import (
    run_sequence as run_sequence,
)
from .continual.tasks import (
    Task as Task,
)
from .data.cache import (
    cache_latents as cache_latents,
)
from .data.datasets import (
    load_dataset as load_dataset,
)
from .data.latents import (
    LatentDataset as LatentDataset,
)
from .data.worlds import (
    WORLDS as WORLDS,
)
from .distillation.diagnostics import (
    diagnose as diagnose,
)
from .distillation.distill import (
    distill as distill,
)
from .distillation.features import (
    FeatureHooks as FeatureHooks,
)
from .distillation.features import (
    FeatureTaps as FeatureTaps,
)
from .distillation.features import (
    feature_pairs as feature_pairs,
)
from .distillation.features import (
    tap_names as tap_names,
)
from .distillation.few_steps import (
    distill_few_steps as distill_few_steps,
)
from .distillation.fidelity import (
    drawing_judge as drawing_judge,
)
from .distillation.fidelity import (
    output_error as output_error,
)
from .distillation.finetune import (
    finetune as finetune,
)
from .distillation.losses import (
    DistillationLoss as DistillationLoss,
)
from .distillation.losses import (
    LossWeights as LossWeights,
)
from .evaluation.compare import (
    compare as compare,
)
from .evaluation.compare import (
    retraining as retraining,
)
from .evaluation.evaluate import (
    Scores as Scores,
)
from .evaluation.evaluate import (
    evaluate as evaluate,
)
from .handover.export import (
    export as export,
)
from .handover.onnx import (
    load_onnx as load_onnx,
)
from .pipelines import (
    generate as generate,
)
from .pipelines import (
    in_few_steps as in_few_steps,
)
from .pipelines import (
    load_student as load_student,
)
from .pipelines import (
    load_teacher as load_teacher,
)
from .pipelines import (
    save_student as save_student,
)
from .pipelines import (
    with_unet as with_unet,
)
from .replay.buffer import (
    ReplayBuffer as ReplayBuffer,
)
from .search import (
    search_plan as search_plan,
)
from .search import (
    sensitivity as sensitivity,
)
from .training.settings import (
    TrainSettings as TrainSettings,
)
from .unet.budget import (
    Budget as Budget,
)
from .unet.costs import (
    count_costs as count_costs,
)
from .unet.costs import (
    measure_latency as measure_latency,
)
from .unet.plans import (
    PLANS as PLANS,
)
from .unet.plans import (
    SlimPlan as SlimPlan,
)
from .unet.slimming import (
    copy_map as copy_map,
)
from .unet.slimming import (
    slim as slim,
)
