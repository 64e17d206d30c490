"""The README.md of an exported folder: what the model is, where it came from, how it was trained, how good it is, how to use it.

Everything in it is read from the model, the recipe and results.json; what they do not say (a licence, a score) it does not say.
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
    StageConfig,
    VisionConfig,
)
from mod_jax.interop.pretrained import PARTS, Config, Pretrained
from mod_jax.models import llava
from mod_jax.recipe import Recipe
from mod_jax.report.scores import scores

TASKS = {
    ModelConfig: "image-text-to-text",
    DecoderConfig: "text-generation",
    VisionConfig: "image-feature-extraction",
}
KINDS = {
    ModelConfig: "A multimodal model (vision tower, adaptor, language model)",
    DecoderConfig: "A language model",
    VisionConfig: "A vision tower",
}
LICENCE = "The licence of the weights follows from those of the models and data they came from; none is claimed here."
NOT_EVALUATED = "Not evaluated."
OBJECTIVES = {
    "next_token": "next token",
    "mimic": "KL(teacher, student) over {positions}",
    "preference": "{preference} pairs (beta {beta:g}), the teacher as the reference",
}

# Runs in the exported folder.
USE = {
    ModelConfig: """\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(".")
model = LlavaForConditionalGeneration.from_pretrained(".", dtype="auto")
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
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
    """The card of the student that a stage left behind.

    Args:
      recipe: of the run; its folder may have a results.json.
      stage: a finished one.
      dtype: of the exported tensors.
    Returns:
      Markdown, after the YAML that Hugging Face reads.
    """
    student, config = recipe.student_after(stage), recipe.config
    way = _way_to(config, stage)
    origin = [{"": "student", "from": _source(config.student)}]
    origin += (
        [{"": "teacher", "from": _source(config.teacher)}]
        if config.teacher and any(s.objective.needs_teacher for s in way.values())
        else []
    )
    sections = {
        "Where it came from": f"{_table(origin)}\n\n{LICENCE}",
        "How it was trained": f"The recipe `{config.name}`; its stages on the way to this one, in order:\n\n{_table(_stages(way, student.config))}",
        "Scores": _scores(recipe, stage),
    }
    return _card(f"{config.name}, {stage}", student.config, student.params, dtype, sections)


def card_of_pretrained(pretrained: Pretrained, dtype: str) -> str:
    """The card of a model, or of a part, that was converted as it is; as `card_of_run`."""
    sections = {
        "Where it came from": f"Converted from {_code(pretrained.origin)} ({pretrained.dtype}); nothing was trained on the way.\n\n{LICENCE}",
        "Scores": NOT_EVALUATED,
    }
    return _card(
        f"Converted {PARTS[type(pretrained.config)].replace('_', ' ')}",
        pretrained.config,
        pretrained.params,
        dtype,
        sections,
    )


def _card(title: str, config: Config, params: Mapping, dtype: str, sections: dict[str, str]) -> str:
    kind = type(config)
    tags = ["llava"] * (kind is ModelConfig) + ["mixture-of-experts"] * bool(
        _decoder(config) and _decoder(config).moe
    )
    front = [
        "library_name: transformers",
        f"pipeline_tag: {TASKS[kind]}",
        *(["tags:", *(f"- {tag}" for tag in tags)] if tags else []),
    ]
    facts = [
        {"": name, "what it is": value} for name, value in _facts(config, params, dtype).items()
    ]
    sections = {
        "What it is": f"{KINDS[kind]}. Stock transformers load it, without remote code.\n\n{_table(facts)}",
        **sections,
        "Use": f"In this folder, with transformers 4.57 or 5.x:\n\n```python\n{USE[kind]}```",
        "Made with": f"mod_jax {mod_jax.__version__}, jax {jax.__version__}.",
    }
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {title}",
            "",
            *(f"## {heading}\n\n{text}\n" for heading, text in sections.items()),
        ]
    )


def _facts(config: Config, params: Mapping, dtype: str) -> dict[str, str]:
    decoder, facts = _decoder(config), {}
    if decoder:
        facts["language model"] = (
            f"{decoder.num_layers} layers of width {decoder.hidden_size}, {'sparse' if decoder.moe else 'dense'}"
        )
    if decoder and decoder.moe:
        moe = decoder.moe
        facts["experts"] = (
            f"{moe.num_experts}, {moe.experts_per_token} of them a token, in the layers {', '.join(map(str, decoder.sparse_layers))}"
        )
        if not moe.dropless:
            facts["capacity"] = (
                f"trained with a factor of {moe.capacity_factor:g}, here without one: it differs where tokens were dropped"
            )
    if decoder:
        facts["vocabulary"] = f"{decoder.vocab_size:,} rows"
    if not isinstance(config, DecoderConfig):
        vision = config if isinstance(config, VisionConfig) else config.vision
        facts["vision tower"] = (
            f"{vision.family}, {vision.num_layers} layers of width {vision.hidden_size}"
        )
        facts["pictures"] = (
            f"{vision.image_size} px in patches of {vision.patch_size} px: {vision.num_features} features each"
        )
    count = llava.count(decoder.moe if decoder else None, params)
    return facts | {
        "parameters": f"{_number(count['total'])}, of which {_number(count['activated'])} take part in a token",
        "dtype": dtype,
    }


def _decoder(config: Config) -> DecoderConfig | None:
    if isinstance(config, ModelConfig):
        return config.decoder
    return config if isinstance(config, DecoderConfig) else None


def _number(count: int) -> str:
    """With three digits or more: 1.18 M, 7.62 B."""
    size, letter = (1e9, "B") if count >= 1e9 else (1e6, "M")
    return f"{count / size:.2f} {letter}"


def _way_to(config: RecipeConfig, name: str) -> dict[str, StageConfig]:
    """The stages that lead to a stage, and that one, in order."""
    stage = config.stages[name]
    return (_way_to(config, stage.starts_from) if stage.starts_from else {}) | {name: stage}


def _source(source: ModelSource) -> str:
    if source.random:
        return f"random weights, seed {source.seed}"
    parts = {
        name: getattr(source, name)
        for name in ("folder", "vision_tower", "language_model", "adaptor")
    }
    named = "; ".join(f"{name} {_code(path)}" for name, path in parts.items() if path)
    return named + (
        f"; a new adaptor, seed {source.seed}"
        if source.language_model and not source.adaptor
        else ""
    )


def _stages(way: dict[str, StageConfig], student: ModelConfig) -> list[dict[str, str]]:
    dense = next(
        (number for number, stage in enumerate(way.values()) if stage.upcycle),
        0 if student.decoder.moe else len(way),
    )
    return [
        {
            "stage": name + (" (upcycled before)" if stage.upcycle else ""),
            "trains": ", ".join(map(_code, stage.trains)),
            "objective": _objective(stage.objective, number >= dense),
            "steps": f"{stage.steps}",
            "rows": f"{stage.rows}",
            "learning rate": f"{stage.optimizer.lr:g}",
            "template": stage.data.template,
            "data": "; ".join(
                f"{source.kind} {_code(source.path)}{f' ({source.split})' if source.split else ''}{', texts alone' if source.text_only else ''}, weight {source.weight:g}"
                for source in stage.data.sources
            ),
        }
        for number, (name, stage) in enumerate(way.items())
    ]


def _objective(objective: ObjectiveConfig, sparse: bool) -> str:
    values = dataclasses.asdict(objective) | {
        "positions": "all positions" if objective.all_tokens else "answers"
    }
    weights = {"next token": objective.next_token_weight * (objective.kind == "mimic")}
    weights |= {"balance": objective.balance_weight, "z": objective.z_weight} if sparse else {}
    added = [f" + {weight:g} {name}" for name, weight in weights.items() if weight]
    return (
        OBJECTIVES[objective.kind].format(**values)
        + "".join(added)
        + (", as the reference code computes it" if objective.compat else "")
    )


def _scores(recipe: Recipe, stage: str) -> str:
    path, evaluation = recipe.workdir / "results.json", recipe.config.evaluation
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if stage not in [row["model"] for row in rows]:
        return NOT_EVALUATED
    shown = [row for row in rows if row["model"] in ("teacher", stage)]
    asked = f"Greedy answers to {shown[-1]['questions']:,} held-out questions ({_code(evaluation.path)}, {evaluation.split}; template {evaluation.template}):"
    return f"{asked}\n\n{_table(scores(shown))}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown; a row is heading -> cell."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([cell.replace("|", "\\|") for cell in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: str) -> str:
    return f"`{text}`"
