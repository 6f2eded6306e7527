"""Every notebook: paired, clean, within its limits, described to papermill, and it runs."""

from __future__ import annotations

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib

import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

import kdc
from studies.common import ledger
from studies.common.claims import check
from studies.distillation import report as distillation
from studies.evaluation import few_steps
from studies.full_scale import report as full_scale
from studies.replay import report
from studies.slimming import report as slimming
from tools import book, equations, front

PATHS = sorted(book.NOTEBOOKS.glob("*.ipynb"))
PARAMETERS = set("budget teacher dataset plan steps batch_size seeds output_dir".split())
MAX_CELLS, MAX_CODE_LINES, MAX_WORDS, MAX_CLASS_LINES = 50, 360, 2800, 15
MACHINE_PATH = re.compile(r"(/home/|/Users/|/root/|/tmp/|site-packages)")

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook) -> list[str]:
    """The code cells as plain Python: magics become calls."""
    plain = TransformerManager().transform_cell
    return [plain(c.source) for c in notebook.cells if c.cell_type == "code"]


def test_there_are_notebooks():
    assert PATHS, "notebooks/ is empty, so the checks below would check nothing"


def test_every_page_is_in_the_table_of_contents():
    toc = yaml.safe_load((book.ROOT / "_toc.yml").read_text())
    listed = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    texts = book.NOTEBOOKS.glob("*.md")
    pages = [*(f"notebooks/{p.stem}" for p in (*PATHS, *texts)), "CONTRIBUTING"]
    assert sorted(listed) == sorted(pages)


def test_every_text_half_has_its_notebook():
    assert sorted(p.stem for p in book.NOTEBOOKS.glob("*.py")) == [p.stem for p in PATHS]


@every_notebook
def test_the_two_halves_hold_the_same_whichever_is_newer(path):
    """JupyterLab compares them where the notebook is newer, as it may be in a fresh clone."""
    settings = tomllib.loads((book.ROOT / "pyproject.toml").read_text())["tool"]["jupytext"]
    metadata = read(path).metadata
    assert metadata["jupytext"] == book.PAIRED
    assert book.PAIRED == {name: settings[name] for name in book.PAIRED}


@every_notebook
def test_name(path):
    assert re.fullmatch(r"(\d\d|[A-Z]\d)_[a-z0-9_]+", path.stem)


@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    """A copy of the notebooks after `jupytext --sync`, which rewrites whatever has drifted."""
    folder = tmp_path_factory.mktemp("sync")
    shutil.copy(book.ROOT / "pyproject.toml", folder)
    shutil.copytree(book.NOTEBOOKS, folder / "notebooks")
    copies = sorted((folder / "notebooks").glob("*.ipynb"))
    subprocess.run([sys.executable, "-m", "jupytext", "--quiet", "--sync", *copies], check=True)
    return folder / "notebooks"


@every_notebook
def test_the_pair_is_in_sync(path, synced):
    for half in (path, path.with_suffix(".py")):
        assert (synced / half.name).read_text() == half.read_text(), (
            f"{half.name} has drifted: run `jupytext --sync notebooks/{half.name}` and commit both"
        )


@every_notebook
def test_the_metadata_has_no_noise(path):
    notebook = read(path)
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "jupytext"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == book.LANGUAGE, "JupyterLab would call it changed"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.source
        assert "injected-parameters" not in cell.metadata.get("tags", [])


@every_notebook
def test_links_work_in_jupyterlab_and_on_code_hosts(path):
    """They name files that are there, with their suffix."""
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(<?([^)\s>#]+)", cell.source):
                if not link.startswith(("http", "mailto")):
                    assert (path.parent / link).is_file(), f"{path.name} links to {link}"


@every_notebook
def test_the_committed_outputs_are_whole(path):
    for cell in read(path).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output.get("evalue")
            assert book.WIDGET not in output.get("data", {}), "use `tools/book.py keep`"
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            assert not MACHINE_PATH.search(text), text


@every_notebook
def test_the_parameters_are_typed_and_explained(path):
    tagged = [c for c in read(path).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged `parameters`"
    found = papermill.inspect_notebook(str(path))
    assigned = [n for n in ast.parse(tagged[0].source).body if isinstance(n, ast.Assign)]
    assert not assigned, "each parameter has a type: `steps: int = None  # why`"
    annotated = [n for n in ast.parse(tagged[0].source).body if isinstance(n, ast.AnnAssign)]
    # papermill reads parameters with a pattern that `int | None` and broken lines do not match.
    assert [n.target.id for n in annotated] == list(found), "papermill cannot read them all"
    for name, parameter in found.items():
        assert parameter["inferred_type_name"] != "None", f"{name} has no type"
        assert parameter["help"], f"{name} has no comment"
    assert set(found) <= PARAMETERS, "the names are the same in every notebook"
    assert {"budget", "output_dir"} <= set(found)
    assert found["budget"]["default"] == '"quick"'
    assert "dataset" in found or "batch_size" not in found, "a notebook that trains says on what"


@every_notebook
def test_the_notebook_keeps_to_its_limits(path):
    notebook = read(path)
    code = code_of(notebook)
    lines = [x for cell in code for x in cell.splitlines() if x.strip() and x.strip()[0] != "#"]
    prose = " ".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert len(notebook.cells) <= MAX_CELLS
    assert len(lines) <= MAX_CODE_LINES
    assert len(prose.split()) <= MAX_WORDS
    for node in ast.walk(ast.parse("\n".join(code))):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < MAX_CLASS_LINES, f"{node.name}: to the library"


@every_notebook
@pytest.mark.book
def test_the_notebook_runs_at_the_quick_budget_and_draws(path, executed):
    outputs = [o for c in read(executed(path)).cells for o in c.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml", "image/gif", "image/jpeg"}


@pytest.mark.parametrize(
    ("chapter", "stored", "words"),
    [
        ("03_what_terms_are_worth", "distillation", "same {steps} steps of {batch_size} images"),
        ("04_forgetting", "forgetting_domains", "{steps} steps of {batch_size} images for each"),
        ("04_forgetting", "forgetting_domains", "asked for {generated} images"),
        ("05_buffers", "forgetting_buffers", "One order of the worlds, three seeds, replay alone"),
        ("06_evaluation", "evaluation_table", "three trainings of each recipe, {training_steps}"),
        ("06_evaluation", "evaluation_table", "all at {table_steps} sampling steps"),
        ("A2_metrics_on_trial", "metrics_trial", "All faults, {count} images, three seeds"),
    ],
)
def test_what_the_text_says_of_a_study_is_what_was_stored(chapter, stored, words):
    made_with = json.loads((ledger.RESULTS / f"{stored}.json").read_text())["provenance"]
    cells = [c.source for c in read(book.NOTEBOOKS / f"{chapter}.ipynb").cells]
    text = " ".join(" ".join(cells).split())
    assert words.format(**made_with) in text and len(made_with["seeds"]) == 3


def text_of(name: str) -> str:
    """The prose of a notebook, of a page of text, or of the README, in one line."""
    if name == "README":
        text = (book.ROOT / "README.md").read_text()
    elif (page := book.NOTEBOOKS / f"{name}.md").is_file():
        text = page.read_text()
    else:
        notebook = read(book.NOTEBOOKS / f"{name}.ipynb")
        text = " ".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    return " ".join(text.split())


def test_the_numbers_that_chapters_04_and_05_state_are_those_stored():
    def means(stage, column="old_accuracy"):
        table = report.table(report.stored(stage))
        return table.groupby("candidate")[column].mean()

    def two(value):
        return f"{value:.2f}".lstrip("0")

    text = text_of("04_forgetting") + text_of("05_buffers")
    old, leak, dose = means("teachers"), means("buffers", "leakage"), means("ratios")
    plain, six = means("plain"), means("classes")
    task, output = old["replay, task only"], old["replay, task and output"]
    copied = old["replay, old model, all terms"] - old["replay+distil"]
    for words in (
        f"ends at {two(task)} of accuracy where fine-tuning ends at {two(old['finetune'])}",
        f"The output term adds {two(output - task)}",
        f"they add {two(old['replay'] - output)} by the teacher's, and {two(copied)} by those",
        f"too they keep {two(old['generated, all terms'])} of accuracy",
        f"the output alone keeps {two(old['generative_distillation'])}",
        f"is {two(leak['replay 4'])} against {two(leak['replay'])}, where strangers",
        f"keeps {two(dose['replay ratio 0.25'])} where one for each keeps {two(dose['replay'])}",
        f"as that of all terms, keeps {two(old['replay, task times 4'])}",
        f"replay keeps {two(plain['replay'])} where fine-tuning ends at {two(plain['finetune'])}",
        f"replay keeps {two(six['replay'])} of the first five, fine-tuning {two(six['finetune'])}",
        f"only the previous class, and keeps {two(six['replay fifo'])}",
    ):
        assert words in text, words
    both = {name: f"{value:.0%}".replace("%", " %") for name, value in means("domains").items()}
    for words in (
        f"{both['finetune']} of the images that a student is asked for of the first are right",
        f"keeps {both['replay']}, as much as joint",
        f"of **the last sample** keeps {both['last_sample']}",
        f"Features keep {100 * (old['replay'] - output):.0f} points more than the output alone",
    ):
        assert words in text, words
    few = means("buffers")
    assert few["replay 4"] / few["replay"] == pytest.approx(0.75, abs=0.03)  # three quarters


def test_the_numbers_that_chapter_06_and_the_readme_state_are_those_stored():
    steps = ledger.read("evaluation_steps")
    chosen = {(s["pipeline"], rule): s for s in steps["chosen"] for rule in s["rules"]}
    best, fastest = (chosen["shipped student", rule] for rule in ("best", "fastest"))
    alone = chosen["teacher", "fastest"]
    label = f"shipped student, {fastest['scheduler']}, {fastest['steps']} steps"
    kept = (steps["tables"][x]["accuracy"]["value"] for x in (label, "teacher"))
    text = text_of("06_evaluation")
    for words in (
        f"With {best['steps']} steps of DPM-Solver++",
        f"keep {next(kept) / next(kept):.0%} of the accuracy".replace("%", " %"),
        f"is {1 / alone['ratio']:.1f} times as fast",
    ):
        assert words in text, words
    seconds = {
        (row["pipeline"], row["steps"]): row["median"]
        for row in ledger.read("evaluation_timing")["images"]
        if row["batch_size"] == 1
    }
    fewer = seconds["teacher", 50] / seconds["teacher", best["steps"]]
    slimmed = seconds["teacher", best["steps"]] / seconds["shipped student", best["steps"]]
    for words in (
        f"At {best['steps']} steps it is {1 / best['ratio']:.1f} times as fast as the teacher",
        f"{fewer:.1f} times by fewer steps, {slimmed:.1f} times by slimming.",
    ):
        assert words in text_of("README"), words


def test_the_findings_of_chapters_00_01_and_03_are_those_stored():
    grades, text = ledger.read("mini_grades"), text_of("00_quickstart")
    teacher, student = grades["teacher"], grades["student"]
    for value in (student["all"], teacher["all"], student["held_out_all"]):
        assert f"{100 * value:.1f} %" in text
    study, text = slimming.stored(), text_of("01_unet_slimming")
    accuracy = study.rows.groupby("candidate")["accuracy"].mean()
    found = f"an accuracy of {accuracy['found: macs']:.2f} instead of {accuracy['kdc']:.2f}"
    assert found.replace("0.", ".") in text
    assert f"{study.timed.loc['found: time', 'ratio']:.2f} of the teacher's instead of" in text
    better = check(study.rows, slimming.claims([])).query("baseline == 'bk-tiny'")
    assert set(better["outcome"]) == {"refuted"} and "`bk-tiny` is better than `kdc`" in text
    rows, text = distillation.stored()[0], text_of("03_what_terms_are_worth")
    reached = rows.groupby("candidate")["accuracy"].mean().map("{:.2f}".format)
    reached = {name: value.lstrip("0") for name, value in reached.items()}
    for words in (
        f"task term alone has an accuracy of {reached['task']}. With the features it is"
        f" {reached['task, feature']}, with all four terms {reached['corrected']}",
        f"over the task alone: {reached[distillation.AVERAGED]} against {reached['task']}",
        f"Correcting it alone brings {reached[distillation.SOFT]}",
        f"its gradient as well brings {reached[distillation.BOTH]}",
    ):
        assert words in text, words
    claims = [claim for part in distillation.CLAIMS.values() for claim in part]
    checked = check(rows, claims)
    alone, among = ((checked[name] < 0.05).sum() for name in ("p", "adjusted"))
    said = (
        f"Of {len(checked)} differences claimed beforehand, {alone} are significant by themselves"
    )
    assert f"{said}, and {among} after correction" in text


def test_the_findings_of_chapter_02_are_those_of_its_own_run():
    """It computes them on its first batch; the committed outputs are of that run."""
    cells = read(book.NOTEBOOKS / "02_distillation_terms.ipynb").cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = " ".join(o.get("text", "") or o["data"].get("text/plain", "") for o in outputs)
    text, printed = text_of("02_distillation_terms"), " ".join(printed.split())
    (floor,) = re.findall(r"floor / task error: ([\d.]+)%", printed)
    assert f"Of the shipped student's task error, {floor} % is noise" in text
    ((descent, adam),) = re.findall(r"feature ([\d.]+)% ([\d.]+)%", printed)
    assert f"makes {descent} % of the first step of gradient descent, and {adam} %" in text
    ((here, there),) = re.findall(r"by gradient: (\d+) with 256 pixels, ([\d,]+) with", printed)
    assert "about 100 times that" in text and 90 <= int(here) <= 110
    assert "would be 1,500 times" in text and 1450 <= int(there.replace(",", "")) <= 1600


def test_the_numbers_that_chapter_08_states_are_those_stored():
    text, stored = text_of("08_few_steps"), ledger.read("evaluation_few_steps")
    rows = pd.DataFrame(stored["rows"]).groupby(["pipeline", "steps"])[["accuracy", "clip"]].mean()
    two, four = (few_steps.factors(stored["times"], steps) for steps in (2, 4))
    best, after = rows.loc[(few_steps.FEW, 2)], rows.loc[(few_steps.FEW, 4)]
    goal, hurried = rows.loc[("teacher", 50)], rows.loc[("teacher", 2)]
    images = ledger.provenance_of("evaluation_few_steps")["generated"]
    for words in (
        f"is **{two['together']:.0f} times as fast** as the teacher at 50 steps, and right in"
        f" {100 * best['accuracy']:.0f} % of {images}",
        f"At four steps it is {four['together']:.0f} times as fast",
        f"Slimming gives {two['slimming']:.1f} times of that, fewer steps {two['fewer steps']:.0f}",
        f"second call {two['no second call']:.1f} times",
        f"from {goal['clip']:.1f} to {best['clip']:.1f} at two steps",
        f"and to {after['clip']:.1f} at four",
        f"two steps of the teacher are right in {100 * hurried['accuracy']:.0f} %",
    ):
        assert words in text, words
    assert best["accuracy"] == pytest.approx(goal["accuracy"], abs=0.005)  # "as the teacher is"


@every_notebook
def test_a_chapter_opens_with_a_question_and_findings_and_says_what_it_does_not_show(path):
    text = text_of(path.stem)
    assert "**The question.**" in text and "{admonition} Findings" in text
    findings = text[text.index("{admonition} Findings") :].split(":::")[0].split("```")[0]
    assert 3 <= len(re.findall(r"(?:^| )(?:\d\.|-) ", findings)) <= 7
    assert "does not show" in text and "**Summary.**" in text


def test_the_index_of_equations_is_that_of_the_chapters():
    assert equations.PAGE.read_text() == equations.page(), "run `python tools/book.py tidy`"
    assert len(equations.numbered()) >= 20


@every_notebook
def test_displayed_equations_are_numbered_by_chapter(path):
    shown = re.findall(r"\$\$(.+?)\$\$", text_of(path.stem))
    chapter = path.stem.partition("_")[0].lstrip("0")
    for equation in shown:
        number = equations.NUMBER.findall(equation)
        assert len(number) == 1 and number[0].startswith(f"{chapter}."), equation


def test_the_findings_on_the_first_page_are_those_stored():
    readme = text_of("README")
    rows = ledger.read("authors_ratio")["rows"]
    times = statistics.mean(row["soft"] / row["task"] for row in rows)
    assert f"the soft term is {times:.0f} times as large as the task term" in readme
    kept = report.table(report.stored("domains")).groupby("candidate")["old_accuracy"].mean()
    percent = {name: f"{value:.0%}".replace("%", " %") for name, value in kept.items()}
    lost, saved = percent["finetune"], percent["replay"]
    learnt = pd.DataFrame(ledger.read("distillation")["rows"]).groupby("candidate")["accuracy"]
    both, authors = (
        f"{learnt.mean()[name]:.0%}".replace("%", " %")
        for name in (distillation.BOTH, distillation.AVERAGED)
    )
    assert f"a student is right in {both} of its images instead of {authors}" in readme
    assert (
        f"{lost} of its flowers are right; with a replay buffer of 64 images {saved} are" in readme
    )
    assert f"replay of the last sample {percent['last_sample']} are" in readme
    teacher, student = (kdc.count_costs(one.unet) for one in front.models().values())
    assert (
        f"{student['parameters'].sum() / teacher['parameters'].sum():.0%}".replace("%", " %")
        in readme
    )


def test_the_picture_on_the_first_page_is_by_the_shipped_models():
    comment = Image.open(front.FILE).info["comment"].decode()
    assert comment == front.made_with(front.models()), "run python tools/front.py"


def test_the_numbers_that_chapter_07_states_are_those_stored():
    text = text_of("07_full_scale")
    rows = ledger.read("throughput_cuda")["rows"]
    fastest = max(rows, key=lambda row: max(row["images_per_second"]))
    assert f"{max(fastest['images_per_second'])} images a second go" in text
    assert f"student at batch {fastest['batch_size']} " in text
    hours = full_scale.hours().loc["distil, as this chapter does", "H200"]
    assert f"about {hours:.1f} hours there" in text
    reached = full_scale.rate() / ledger.read("throughput_cuda")["large_bf16_product_tflops"] / 1e12
    assert "a third of the rate of a large bf16 product" in text and 0.30 < reached < 0.36
    onnx = ledger.read("onnx_latency")
    medians = [onnx["rows"][f"student, {name}"]["median"] for name in ("ONNX Runtime", "PyTorch")]
    words = f"{onnx['steps']} steps takes {medians[0] / medians[1]:.2f} of the time"
    assert words in text
    lines = report.table(report.stored("species"))
    left = lines.groupby("candidate")["old_species"].mean()
    words = (
        "on six more leaves {finetune:.0%} of the first six, replay of 64 items {replay:.0%}, joint"
    )
    assert words.format(**left).replace("%", " %") in text
    assert f"saves: {left['finetune']:.0%} and {left['replay']:.0%}".replace("%", " %") in text
    first, second = report.check_stage("species", lines).to_dict("records")[:2]
    assert first["outcome"] == "holds" and second["outcome"] == "refuted"
    gain = "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**first)
    loss = [f"{-second[name]:.2f}".lstrip("0") for name in ("mean", "high", "low")]
    assert gain in text and "costs {} [{}, {}]".format(*loss) in text
    held_out = ledger.read("forgetting_species")["judge"]["held_out"]
    assert f"right on {held_out:.0%}".replace("%", " %") in text
    smoke = ledger.read("full_smoke")
    assert f"took {smoke['minutes']:.1f} minutes and {smoke['peak_gib']:.1f} GiB" in text
    assert smoke["met"]


def test_the_numbers_of_appendix_a3_and_of_kills_are_those_stored():
    values = ledger.read("authors_ratio")
    ratio = [row["ratio"] for row in values["rows"]]
    first = values["theirs"]["update 1"]
    said = (book.NOTEBOOKS / "A3_authors_code.py").read_text().replace("\n# ", " ").split()
    said = " ".join(said)
    assert f"features are {first['feature'] / first['soft']:.2f} of the KL" in said
    assert f"gives {statistics.mean(ratio):.2f} ± {statistics.stdev(ratio):.2f}." in said
    rows = ledger.read("robustness_kills")["rows"]
    assert all(row["deaths"] for row in rows) and all(row["equal"] for row in rows)
    readme = text_of("library")
    deaths = sum(row["deaths"] for row in rows)
    assert f"Of {len(rows)} runs killed {deaths} times at random moments, all {len(rows)}" in readme


def test_the_speed_of_a_step_that_is_stated_is_the_one_stored():
    def reached(size, name):
        row = ledger.read(f"distill_step_{size}")["contenders"][name]
        return row["images_over_reference"], row["peak_over_reference"]

    (ours, _), (compiled, memory) = reached("mini", "ours"), reached("mini", "compiled")
    full = reached("full", "ours")[0]
    chapter, readme = text_of("03_what_terms_are_worth"), text_of("studies")
    compact = f"{memory:.2f}".lstrip("0")
    assert f"gives {compiled:.2f} times the images in {compact} of the memory" in chapter
    assert f"{ours:.1f} times its images a second on the mini teacher, {full:.1f} times" in readme
    assert f"a compiled step too: {compiled:.1f} times on the mini teacher" in readme
    assert memory == pytest.approx(2 / 3, abs=0.03)  # two thirds
    assert reached("mini", "channels last")[0] - ours == pytest.approx(0.1, abs=0.05)  # a tenth
