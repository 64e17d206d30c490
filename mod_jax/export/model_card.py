"""The model card (README.md) of an exported folder.

It says what the model is, where it came from, how it was trained, how it scores, and how to use it.
Everything is read from the model, the recipe and results.json; what they lack (a licence, a score)
is not stated.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import jax

import mod_jax
from mod_jax.config import (
    DecoderConfig,
    ModelConfig,
    ModelSource,
    ObjectiveConfig,
    RecipeConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)
from mod_jax.interop.pretrained import PARTS, Config, Pretrained, decoder_of
from mod_jax.models import llava
from mod_jax.recipe import Recipe
from mod_jax.report.scores import scores

TASKS: dict[type[Config], str] = {
    ModelConfig: "image-text-to-text",
    DecoderConfig: "text-generation",
    VisionConfig: "image-feature-extraction",
}
KINDS: dict[type[Config], str] = {
    ModelConfig: "A multimodal model (vision tower, adaptor, language model)",
    DecoderConfig: "A language model",
    VisionConfig: "A vision tower",
}
LICENCE = (
    "The licence of the weights follows from those of the models and data they came from; none is "
    "claimed here."
)
NOT_EVALUATED = "Not evaluated."
OBJECTIVES = {
    "next_token": "next token",
    "mimic": "KL(teacher, student) over {positions}",
    "preference": "{preference} pairs (beta {beta:g}), the teacher as the reference",
}

# Example code, which runs in the exported folder.
USE: dict[type[Config], str] = {
    ModelConfig: """\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(".")
model = LlavaForConditionalGeneration.from_pretrained(".", dtype="auto")
content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
messages = [{"role": "user", "content": content}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open("picture.png"), text=text, return_tensors="pt").to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
""",
    DecoderConfig: """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
""",
    VisionConfig: """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModel.from_pretrained(".", dtype="auto")
inputs = processor(images=Image.open("picture.png"), return_tensors="pt").to(model.dtype)
print(model(**inputs).last_hidden_state.shape)
""",
}


def card_of_run(recipe: Recipe, stage: str, dtype: str) -> str:
    """Writes the card of the student that a stage of a run trained.

    Args:
      recipe: Recipe of the run, whose folder may have a results.json.
      stage: Name of a finished stage.
      dtype: Dtype of the exported tensors.

    Returns:
      Markdown, after the YAML that Hugging Face reads.
    """
    config = recipe.config
    student = recipe.student_after(stage)
    stages = _stages_up_to(config, stage)
    origin = [{"": "student", "from": _source(config.student)}]
    if config.teacher and any(s.objective.needs_teacher for s in stages.values()):
        origin.append({"": "teacher", "from": _source(config.teacher)})
    sections = {
        "Where it came from": f"{_table(origin)}\n\n{LICENCE}",
        "How it was trained": (
            f"By the stages of the recipe `{config.name}` that lead to this one, in order:\n\n"
            f"{_table(_stage_rows(stages, student.config))}"
        ),
        "Scores": _scores(recipe, stage),
    }
    return _card(f"{config.name}, {stage}", student.config, student.params, dtype, sections)


def card_of_pretrained(pretrained: Pretrained[Config], dtype: str) -> str:
    """Writes the card of a model, or of a part of one, that was converted without training.

    Args:
      pretrained: The model.
      dtype: Dtype of the exported tensors.

    Returns:
      As `card_of_run`.
    """
    origin = f"{_code(pretrained.origin)} ({pretrained.dtype})"
    sections = {
        "Where it came from": (
            f"Converted from {origin}; nothing was trained on the way.\n\n{LICENCE}"
        ),
        "Scores": NOT_EVALUATED,
    }
    kind = PARTS[type(pretrained.config)].replace("_", " ")
    return _card(f"Converted {kind}", pretrained.config, pretrained.params, dtype, sections)


def _card(
    title: str, config: Config, params: Mapping, dtype: str, sections: Mapping[str, str]
) -> str:
    kind = type(config)
    decoder = decoder_of(config)
    tags = []
    if isinstance(config, ModelConfig):
        tags.append("llava")
    if decoder and decoder.moe:
        tags.append("mixture-of-experts")
    lines = ["---", "library_name: transformers", f"pipeline_tag: {TASKS[kind]}"]
    if tags:
        lines += ["tags:", *(f"- {tag}" for tag in tags)]
    lines += ["---", "", f"# {title}", ""]
    facts = [
        {"": name, "what it is": value} for name, value in _facts(config, params, dtype).items()
    ]
    all_sections = {
        "What it is": (
            f"{KINDS[kind]}. Stock transformers load it, without remote code.\n\n{_table(facts)}"
        ),
        **sections,
        "Use": f"In this folder, with transformers 4.57 or 5.x:\n\n```python\n{USE[kind]}```",
        "Made with": f"mod_jax {mod_jax.__version__}, jax {jax.__version__}.",
    }
    lines += [f"## {heading}\n\n{text}\n" for heading, text in all_sections.items()]
    return "\n".join(lines)


def _facts(config: Config, params: Mapping, dtype: str) -> dict[str, str]:
    """Rows of the table "What it is": name -> value."""
    facts: dict[str, str] = {}
    decoder = decoder_of(config)
    moe = decoder.moe if decoder else None
    if decoder:
        kind = "sparse" if moe else "dense"
        facts["language model"] = (
            f"{decoder.num_layers} layers of width {decoder.hidden_size}, {kind}"
        )
        if moe:
            layers = ", ".join(map(str, decoder.sparse_layers))
            facts["experts"] = (
                f"{moe.num_experts} per sparse layer, {moe.experts_per_token} of them used per "
                f"token; the sparse layers are {layers}"
            )
            if not moe.dropless:
                facts["capacity"] = (
                    f"trained with a factor of {moe.capacity_factor:g}, exported without one: "
                    "outputs differ where tokens were dropped"
                )
        facts["vocabulary"] = f"{decoder.vocab_size:,} rows"
    if not isinstance(config, DecoderConfig):
        vision = config if isinstance(config, VisionConfig) else config.vision
        facts["vision tower"] = (
            f"{vision.family}, {vision.num_layers} layers of width {vision.hidden_size}"
        )
        facts["pictures"] = (
            f"{vision.image_size} px in patches of {vision.patch_size} px: {vision.num_features} "
            "features each"
        )
    count = llava.count(moe, params)
    total = _number(count["total"])
    activated = _number(count["activated"])
    facts["parameters"] = f"{total}, of which {activated} are used per token"
    facts["dtype"] = dtype
    return facts


def _number(count: int) -> str:
    """A count in millions or billions with three digits or more: 1.18 M, 7.62 B."""
    size, letter = (1e9, "B") if count >= 1e9 else (1e6, "M")
    return f"{count / size:.2f} {letter}"


def _stages_up_to(config: RecipeConfig, name: str) -> dict[str, StageConfig]:
    """The stages that lead to stage `name`, and that stage, in order."""
    stage = config.stages[name]
    earlier = _stages_up_to(config, stage.starts_from) if stage.starts_from else {}
    return earlier | {name: stage}


def _source(source: ModelSource) -> str:
    if source.random:
        return f"random weights, seed {source.seed}"
    keys = ("folder", "vision_tower", "language_model", "adaptor")
    parts = [f"{key} {_code(getattr(source, key))}" for key in keys if getattr(source, key)]
    if source.language_model and not source.adaptor:
        parts.append(f"a new adaptor, seed {source.seed}")
    return "; ".join(parts)


def _stage_rows(stages: Mapping[str, StageConfig], student: ModelConfig) -> list[dict[str, str]]:
    """Rows of the table of stages.

    Args:
      stages: The stages, in order.
      student: Configuration of the student after the last one.
    """
    rows = []
    is_sparse = student.decoder.moe is not None and not any(s.upcycle for s in stages.values())
    for name, stage in stages.items():
        is_sparse = is_sparse or stage.upcycle is not None
        rows.append(
            {
                "stage": f"{name} (upcycled before)" if stage.upcycle else name,
                "trains": ", ".join(map(_code, stage.trains)),
                "objective": _objective(stage.objective, is_sparse),
                "steps": f"{stage.steps}",
                "rows": f"{stage.rows}",
                "learning rate": f"{stage.optimizer.lr:g}",
                "template": stage.data.template,
                "data": "; ".join(map(_data, stage.data.sources)),
            }
        )
    return rows


def _data(source: SourceConfig) -> str:
    split = f" ({source.split})" if source.split else ""
    text_only = ", text only" if source.text_only else ""
    return f"{source.kind} {_code(source.path)}{split}{text_only}, weight {source.weight:g}"


def _objective(objective: ObjectiveConfig, is_sparse: bool) -> str:
    positions = "all positions" if objective.all_tokens else "answers"
    values = dataclasses.asdict(objective) | {"positions": positions}
    weights: dict[str, float] = {}
    if objective.kind == "mimic":
        weights["next token"] = objective.next_token_weight
    if is_sparse:
        weights["balance"] = objective.balance_weight
        weights["z"] = objective.z_weight
    terms = [OBJECTIVES[objective.kind].format(**values)]
    terms += [f"{weight:g} {name}" for name, weight in weights.items() if weight]
    text = " + ".join(terms)
    return f"{text}, as the reference code computes it" if objective.compat else text


def _scores(recipe: Recipe, stage: str) -> str:
    path = recipe.workdir / "results.json"
    evaluation = recipe.config.evaluation
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if stage not in [row["model"] for row in rows]:
        return NOT_EVALUATED
    shown = [row for row in rows if row["model"] in ("teacher", stage)]
    return (
        f"Greedy answers to {shown[-1]['questions']:,} held-out questions "
        f"({_code(evaluation.path)}, {evaluation.split}; template {evaluation.template}):"
        f"\n\n{_table(scores(shown))}"
    )


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table; a row is heading -> cell."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([cell.replace("|", "\\|") for cell in row.values()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: str) -> str:
    return f"`{text}`"
