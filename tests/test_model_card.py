"""The model card says what the recipe, the weights and results.json say, and nothing else.

Its code runs; stock/check.py tests that for a whole model.
"""

import dataclasses
import json
import pathlib
import runpy
import types

import numpy as np
import pytest
import yaml
from PIL import Image
from small import DENSE, SPARSE, params_of

import mod_jax
from configs import quickstart
from mod_jax.config import RecipeConfig, from_dict
from mod_jax.data.samples.tokenizer import scenes_tokenizer
from mod_jax.export.folder import export
from mod_jax.export.model_card import card_of_pretrained, card_of_run
from mod_jax.interop import huggingface
from mod_jax.interop.pretrained import InMemory, Pretrained

SCORES = {
    "by_type": {"count": 0.97, "colour": 0.68},
    "hallucination": 0.049,
    "named": 0.99,
    "existence": {"yes_rate": 0.45, "f1": 0.98},
    "questions": 1280,
    "parameters": {"total": 1_180_000, "activated": 890_000},
}


@pytest.fixture
def recipe(tmp_path):
    """The parts of the quickstart's Recipe that a card reads: configuration, folder, students."""

    def student_after(stage: str):
        config = SPARSE if stage in ("sparse_mimic", "preference") else DENSE
        return types.SimpleNamespace(config=config, params=params_of(config))

    config = from_dict(RecipeConfig, quickstart.get_config().to_dict())
    return types.SimpleNamespace(config=config, workdir=tmp_path, student_after=student_after)


def write_scores(recipe, **accuracies) -> None:
    """Writes results.json with a row for each model and its accuracy."""
    rows = [
        {"model": name, "accuracy": accuracy, **SCORES} for name, accuracy in accuracies.items()
    ]
    (recipe.workdir / "results.json").write_text(json.dumps({"recipe": "quickstart", "rows": rows}))


def front_matter(card: str) -> dict:
    """The YAML at the beginning of a card."""
    begin, text, _ = card.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(text)


def section(card: str, heading: str) -> str:
    """The text below a heading."""
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0].strip()


def table(text: str) -> list[dict[str, str]]:
    """The rows of the Markdown table in a text, heading -> cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    headings, rule, *rows = cells
    assert set(rule) == {"---"}
    assert {len(row) for row in rows} == {len(headings)}
    return [dict(zip(headings, row)) for row in rows]


def facts(card: str) -> dict[str, str]:
    """The table "What it is"."""
    return {row[""]: row["what it is"] for row in table(section(card, "What it is"))}


def pretrained(config=SPARSE, prefix: str = "") -> Pretrained:
    """A model, or the part of one whose parameters begin with `prefix`."""
    params = {name: InMemory(x) for name, x in params_of(SPARSE).items() if name.startswith(prefix)}
    return Pretrained(config, params, "models/one", pathlib.Path("models/one"))


@pytest.mark.parametrize(
    "config, prefix, task, tags",
    [
        (SPARSE, "", "image-text-to-text", ["llava", "mixture-of-experts"]),
        (SPARSE.decoder, "language_model.", "text-generation", ["mixture-of-experts"]),
        (SPARSE.vision, "vision_tower.", "image-feature-extraction", None),
    ],
)
def test_hugging_face_reads_library_task_and_tags_but_no_licence(config, prefix, task, tags):
    wanted = {"library_name": "transformers", "pipeline_tag": task}
    if tags:
        wanted["tags"] = tags
    assert front_matter(card_of_pretrained(pretrained(config, prefix), "float32")) == wanted


def test_a_sparse_student_is_described(recipe):
    """The sizes are those of tests/small.py.

    One layer has 4 experts of 3 x 32 x 64 numbers, 2 of which are idle for a token.
    """
    found = facts(card_of_run(recipe, "preference", "bfloat16"))
    total = sum(x.size for x in params_of(SPARSE).values())
    activated = total - 2 * 3 * 32 * 64
    assert found == {
        "language model": "2 layers of width 32, sparse",
        "experts": "4 per sparse layer, 2 of them used per token; the sparse layers are 0",
        "vocabulary": "80 rows",
        "vision tower": "clip, 2 layers of width 16",
        "pictures": "8 px in patches of 4 px: 4 features each",
        "parameters": (f"{total / 1e6:.2f} M, of which {activated / 1e6:.2f} M are used per token"),
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    "factor, wanted",
    [
        (
            1.5,
            (
                "trained with a factor of 1.5, exported without one: "
                "outputs differ where tokens were dropped"
            ),
        ),
        (2.0, None),
        (None, None),
    ],
)
def test_a_capacity_that_drops_tokens_is_named(factor, wanted):
    """With 2 of 4 experts per token, a factor of 2.0 drops no token."""
    moe = dataclasses.replace(SPARSE.decoder.moe, capacity_factor=factor)
    decoder = dataclasses.replace(SPARSE.decoder, moe=moe)
    config = dataclasses.replace(SPARSE, decoder=decoder)
    card = card_of_pretrained(pretrained(config), "float32")
    assert facts(card).get("capacity") == wanted


def test_the_stages_are_those_that_lead_to_the_exported_one_in_order(recipe):
    """fine_tuned is not one of them, as no stage starts from it."""
    found = table(section(card_of_run(recipe, "preference", "float32"), "How it was trained"))
    assert [row["stage"] for row in found] == [
        "adaptor",
        "dense_mimic",
        "sparse_mimic (upcycled before)",
        "preference",
    ]
    assert [row["objective"] for row in found] == [
        "next token",
        "KL(teacher, student) over answers",
        "KL(teacher, student) over answers + 1 next token + 0.01 balance",
        "kto_pair pairs (beta 0.1), the teacher as the reference + 0.01 balance",
    ]
    keys = ("steps", "rows", "learning rate", "template")
    assert [tuple(row[key] for key in keys) for row in found] == [
        ("60", "16", "0.005", "brief"),
        ("500", "16", "0.003", "brief"),
        ("400", "16", "0.002", "brief"),
        ("60", "16", "3e-05", "brief"),
    ]
    assert found[0]["trains"] == "`adaptor.*`"
    assert found[1]["trains"] == "`language_model.*`, `adaptor.*`"
    assert found[3]["data"] == "scenes `data/scenes` (preference), weight 1"


def test_the_student_and_the_teacher_are_named_if_the_teacher_taught(recipe):

    def origins(stage: str) -> dict[str, str]:
        card = card_of_run(recipe, stage, "float32")
        return {row[""]: row["from"] for row in table(section(card, "Where it came from"))}

    parts = (
        "vision_tower `assets/scenes/vision_tower`; "
        "language_model `assets/scenes/language_model`; a new adaptor, seed 0"
    )
    teacher = "folder `assets/scenes/teacher`"
    assert origins("fine_tuned") == {"student": parts}
    assert origins("dense_mimic") == {"student": parts, "teacher": teacher}


def test_scores_are_those_of_the_stage_and_the_teacher(recipe):
    write_scores(recipe, teacher=0.884, dense_mimic=0.813, preference=0.838)
    text = section(card_of_run(recipe, "preference", "float32"), "Scores")
    keys = ("model", "accuracy", "count", "hallucination")
    assert [tuple(row[key] for key in keys) for row in table(text)] == [
        ("teacher", "88.4 %", "97.0 %", "4.9 %"),
        ("preference", "83.8 %", "97.0 %", "4.9 %"),
    ]
    assert "1,280 held-out questions" in text
    assert "`data/scenes`, test" in text


def test_without_scores_the_card_says_so(recipe):
    assert section(card_of_run(recipe, "preference", "float32"), "Scores") == "Not evaluated."
    write_scores(recipe, teacher=0.884, preference=0.838)
    assert section(card_of_run(recipe, "adaptor", "float32"), "Scores") == "Not evaluated."
    assert section(card_of_pretrained(pretrained(), "float32"), "Scores") == "Not evaluated."


def test_versions_and_origin_are_named(recipe):
    assert mod_jax.__version__ in section(card_of_run(recipe, "adaptor", "float32"), "Made with")
    assert "`models/one` (float32)" in section(
        card_of_pretrained(pretrained(), "bfloat16"), "Where it came from"
    )


def run_code(folder: pathlib.Path, monkeypatch, capsys) -> str:
    """Runs the code of a folder's card in that folder, and returns what it prints.

    It reads a picture.png.
    """
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "picture.png")
    text = section((folder / "README.md").read_text(), "Use")
    code = text.split("```python\n")[1].split("```")[0]
    (folder / "use.py").write_text(code)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    runpy.run_path("use.py")
    return capsys.readouterr().out


def exported(folder: pathlib.Path, config) -> pathlib.Path:
    """Exports a model with random weights and the tokenizer of the scenes; returns the folder."""
    save_tokenizer = scenes_tokenizer().save_pretrained
    huggingface.save(folder / "source", config, params_of(DENSE), others=save_tokenizer)
    export(folder / "source", folder / "target")
    return folder / "target"


def test_the_code_of_a_language_model_runs(tmp_path, monkeypatch, capsys):
    printed = run_code(exported(tmp_path, DENSE.decoder), monkeypatch, capsys)
    assert len(printed) > 64  # there are 64 tokens of at least one letter


def test_the_code_of_a_tower_runs(tmp_path, monkeypatch, capsys):
    printed = run_code(exported(tmp_path, DENSE.vision), monkeypatch, capsys)
    assert printed == "torch.Size([1, 5, 16])\n"
