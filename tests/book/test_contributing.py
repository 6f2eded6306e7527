"""CONTRIBUTING.md is true: its blocks run, what they add is used, its paths exist."""

import re

import pytest
import torch

import kdc
from kdc.continual.strategies import STRATEGIES
from kdc.data.datasets import DATASETS
from kdc.distillation.losses import TERMS
from kdc.evaluation import metrics
from kdc.pipelines import TEACHERS
from kdc.replay.policies import POLICIES
from kdc.unet.plans import PLANS
from tools import book

TABLES = (TERMS, POLICIES, STRATEGIES, PLANS, metrics.METRICS, DATASETS, TEACHERS)
TEXT = (book.ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def added():
    """The names that the blocks of CONTRIBUTING.md add to each table; gone again afterwards."""
    before = [dict(table) for table in TABLES]
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    yield [[n for n in t if n not in old] for t, old in zip(TABLES, before, strict=True)]
    for table, old in zip(TABLES, before, strict=True):
        table.clear()
        table.update(old)


def test_every_path_that_is_named_exists():
    named = re.findall(r"`((?:kdc|studies|tests|tools)/[^`<\s]*)`", TEXT)
    assert len(named) >= 8
    for path in named:
        assert (book.ROOT / path).exists(), path


def test_what_the_blocks_add_works_without_another_line(added, teacher, tmp_path):
    terms, policies, strategies, plans, scores, kinds, teachers = added
    assert len(terms) == len(policies) == len(plans) == len(scores) == len(kinds) == 1
    assert teachers == ["second"] and len(strategies) == 2
    images = kdc.load_dataset("few", size=64)
    assert len(images) == 3
    data = kdc.cache_latents(teacher, images)
    student = kdc.slim(teacher.unet, plans[0])
    log = kdc.distill(
        student, teacher, data, steps=1, batch_size=2, weights=kdc.LossWeights(absolute=0.5)
    )
    assert terms[0] in log and kdc.load_teacher("second").unet.config == teacher.unet.config
    report = kdc.diagnose(student, teacher, data, kdc.LossWeights(absolute=0.5), batch_size=2)
    assert report.terms.loc[terms[0], "gradient_norm"] > 0

    evidence = metrics.Evidence(torch.full((4, 3, 8, 8), 51, dtype=torch.uint8))
    values, _ = metrics.score(evidence, scores)
    assert values[scores[0]].tolist() == [51.0] * 4

    tasks = [kdc.Task(name, data, [images.caption(0)]) for name in ("one", "two")]
    for strategy in strategies:
        buffer = kdc.ReplayBuffer(2, policies[0]) if "replay" in strategy else None
        result = kdc.run_sequence(
            tasks,
            strategy,
            kdc.slim(teacher.unet, plans[0]),
            teacher,
            evaluate=lambda pipeline, task: {"zero": 0.0},
            higher_is_better={"zero": True},
            buffer=buffer,
            steps=1,
            batch_size=2,
        )
        assert result.matrices["zero"].values.shape == (2, 2)
