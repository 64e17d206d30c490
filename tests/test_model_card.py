"""The card of an exported folder says what the recipe, the weights and results.json say, and nothing else; its code runs (a whole model's: stock/check.py)."""

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
}
SCORES |= {"parameters": {"total": 1_180_000, "activated": 890_000}}


@pytest.fixture
def recipe(tmp_path):
    """What a card reads of the quickstart's run: its configuration, folder and students."""
    config = from_dict(RecipeConfig, quickstart.get_config().to_dict())
    student = lambda model: types.SimpleNamespace(config=model, params=params_of(model))
    return types.SimpleNamespace(
        config=config,
        workdir=tmp_path,
        student_after=lambda stage: student(
            SPARSE if stage in ("sparse_mimic", "preference") else DENSE
        ),
    )


def write_scores(recipe, **accuracies) -> None:
    rows = [
        {"model": name, "accuracy": accuracy, **SCORES} for name, accuracy in accuracies.items()
    ]
    (recipe.workdir / "results.json").write_text(json.dumps({"recipe": "quickstart", "rows": rows}))


def front_matter(card: str) -> dict:
    begin, text, _ = card.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(text)


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0].strip()


def table(text: str) -> list[dict[str, str]]:
    headings, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert set(rule) == {"---"} and {len(row) for row in rows} == {len(headings)}
    return [dict(zip(headings, row)) for row in rows]


def facts(card: str) -> dict[str, str]:
    return {row[""]: row["what it is"] for row in table(section(card, "What it is"))}


def pretrained(config=SPARSE, prefix: str = "") -> Pretrained:
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
    found = front_matter(card_of_pretrained(pretrained(config, prefix), "float32"))
    assert found == {"library_name": "transformers", "pipeline_tag": task} | (
        {"tags": tags} if tags else {}
    )


def test_a_sparse_student_is_described(recipe):
    """Sizes of tests/small.py; 4 experts of 3 x 32 x 64 numbers in one layer, two of which rest."""
    found = facts(card_of_run(recipe, "preference", "bfloat16"))
    total = sum(x.size for x in params_of(SPARSE).values())
    assert found == {
        "language model": "2 layers of width 32, sparse",
        "experts": "4, 2 of them a token, in the layers 0",
        "vocabulary": "80 rows",
        "vision tower": "clip, 2 layers of width 16",
        "pictures": "8 px in patches of 4 px: 4 features each",
        "parameters": f"{total / 1e6:.2f} M, of which {(total - 2 * 3 * 32 * 64) / 1e6:.2f} M take part in a token",
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    "factor, said",
    [
        (
            1.5,
            "trained with a factor of 1.5, here without one: it differs where tokens were dropped",
        ),
        (2.0, None),
        (None, None),
    ],
)
def test_a_capacity_that_drops_tokens_is_named(factor, said):
    """2 x 2.0 places of 4 experts are enough for every token."""
    decoder = dataclasses.replace(
        SPARSE.decoder, moe=dataclasses.replace(SPARSE.decoder.moe, capacity_factor=factor)
    )
    assert (
        facts(
            card_of_pretrained(pretrained(dataclasses.replace(SPARSE, decoder=decoder)), "float32")
        ).get("capacity")
        == said
    )


def test_the_stages_are_those_on_the_way_in_order(recipe):
    """Not fine_tuned, from which nothing starts."""
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
    assert [(row["steps"], row["rows"], row["learning rate"], row["template"]) for row in found] == [
        ("60", "16", "0.005", "brief"), ("500", "16", "0.003", "brief"), ("400", "16", "0.002", "brief"), ("60", "16", "3e-05", "brief"),
    ]  # fmt: skip
    assert (
        found[0]["trains"] == "`adaptor.*`"
        and found[1]["trains"] == "`language_model.*`, `adaptor.*`"
    )
    assert found[3]["data"] == "scenes `data/scenes` (preference), weight 1"


def test_the_student_and_the_teacher_are_named_if_the_teacher_taught(recipe):
    named = lambda stage: {
        row[""]: row["from"]
        for row in table(section(card_of_run(recipe, stage, "float32"), "Where it came from"))
    }
    parts = "vision_tower `assets/scenes/vision_tower`; language_model `assets/scenes/language_model`; a new adaptor, seed 0"
    assert named("fine_tuned") == {"student": parts}
    assert named("dense_mimic") == {"student": parts, "teacher": "folder `assets/scenes/teacher`"}


def test_scores_are_those_of_the_stage_and_the_teacher(recipe):
    write_scores(recipe, teacher=0.884, dense_mimic=0.813, preference=0.838)
    text = section(card_of_run(recipe, "preference", "float32"), "Scores")
    assert [(row["model"], row["accuracy"], row["count"], row["hallucination"]) for row in table(text)] == [
        ("teacher", "88.4 %", "97.0 %", "4.9 %"), ("preference", "83.8 %", "97.0 %", "4.9 %"),
    ]  # fmt: skip
    assert "1,280 held-out questions" in text and "`data/scenes`, test" in text


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
    """What the card's code prints, run in its folder beside a picture.png."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "picture.png")
    code = (
        section((folder / "README.md").read_text(), "Use").split("```python\n")[1].split("```")[0]
    )
    (folder / "use.py").write_text(code)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    runpy.run_path("use.py")
    return capsys.readouterr().out


def exported(folder: pathlib.Path, config) -> pathlib.Path:
    """A folder that `export` writes, of random weights and the tokenizer of the scenes."""
    huggingface.save(
        folder / "source", config, params_of(DENSE), others=scenes_tokenizer().save_pretrained
    )
    export(folder / "source", folder / "target")
    return folder / "target"


def test_the_code_of_a_language_model_runs(tmp_path, monkeypatch, capsys):
    assert (
        len(run_code(exported(tmp_path, DENSE.decoder), monkeypatch, capsys)) > 64
    )  # tokens, each of a letter or more


def test_the_code_of_a_tower_runs(tmp_path, monkeypatch, capsys):
    assert (
        run_code(exported(tmp_path, DENSE.vision), monkeypatch, capsys)
        == "torch.Size([1, 5, 16])\n"
    )
