"""Every family of models, in every layout of files that people have, small and random: how far our numbers are from transformers'.

    python tests/families.py        measures all of it and writes the table of docs/checkpoints.md

The oracle is the model of transformers that the tensors were taken from, fed by its own processor; of what we export, the model and the processor
that stock transformers loads.
Axes: B texts, S positions, V vocabulary, T new tokens.
"""

import contextlib
import copy
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import hf_models
import jax
import numpy as np
import small
import small_tokenizers
import transformers
from layouts import LAYOUTS, Checkpoint
from stock.check import (
    CONVERSATION,
    INPUTS,
    NEW_TOKENS,
    NOTHING,
    Difference,
    Results,
    difference,
    inputs,
    theirs,
    wrong_with,
)
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

import mod_jax
from mod_jax.config import DecoderConfig, ModelConfig, ModelSource, MoEConfig, VisionConfig
from mod_jax.export.folder import Options, export
from mod_jax.inference.chat import MULTIPLE, Chat
from mod_jax.inference.generation import Prompts, generate, logits
from mod_jax.inference.processor import Processor
from mod_jax.interop.loading import open_source
from mod_jax.interop.native import save_native
from mod_jax.interop.pretrained import InMemory, Pretrained, read
from mod_jax.interop.processor import chat_template

SIDE = hf_models.TOWER["image_size"]
SQUARE = {"height": SIDE, "width": SIDE}
SHARD_BYTES = 100_000  # of an export: several files and an index


@functools.cache
def tokenizer_of(kind: str):
    """One of `small_tokenizers`, with `<image>` and a token to pad with."""
    tokenizer = copy.deepcopy(getattr(small_tokenizers, kind)())
    tokenizer.add_tokens(
        [AddedToken("<image>", special=True, normalized=False)], special_tokens=True
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rows_for(tokenizer) -> int:
    """Of a vocabulary, as models have it: a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64


IMAGE_PROCESSORS = {
    "pad": lambda: LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": SIDE}, crop_size=SQUARE
    ),
    "crop": lambda: CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "stretch": lambda: SiglipImageProcessorPil(size=SQUARE, resample=3),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A tower and a language model (functions of hf_models), and the processor that such models have."""

    vision: Callable
    text: Callable
    tokenizer: str  # of small_tokenizers
    fit: str  # a key of IMAGE_PROCESSORS
    seed: int = 0

    def text_config(self):
        tokenizer = tokenizer_of(self.tokenizer)
        return self.text(
            vocab_size=rows_for(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def config(self):
        return hf_models.llava(
            self.vision(),
            self.text_config(),
            image_token_index=tokenizer_of(self.tokenizer).convert_tokens_to_ids("<image>"),
        )

    def processor(self, template: str | None = "qwen") -> LlavaProcessor:
        config = self.config()
        return LlavaProcessor(
            image_processor=IMAGE_PROCESSORS[self.fit](),
            tokenizer=tokenizer_of(self.tokenizer),
            patch_size=config.vision_config.patch_size,
            num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=template and chat_template(template),
        )


FAMILIES = {
    "CLIP + Qwen1.5, 2, 2.5": Family(hf_models.clip, hf_models.qwen2, "qwen", "pad"),
    "CLIP + Llama, Vicuna": Family(hf_models.clip, hf_models.llama, "llama", "pad"),
    "CLIP + Mistral": Family(hf_models.clip, hf_models.mistral, "llama", "crop"),
    "CLIP + Qwen3": Family(hf_models.clip, hf_models.qwen3, "qwen", "crop"),
    "CLIP + Qwen2-MoE": Family(hf_models.clip, hf_models.qwen2_moe, "qwen", "pad"),
    "CLIP + Qwen3-MoE": Family(hf_models.clip, hf_models.qwen3_moe, "qwen", "crop"),
    "SigLIP + Qwen1.5, 2, 2.5": Family(hf_models.siglip, hf_models.qwen2, "qwen", "stretch"),
    "SigLIP + Llama, Vicuna": Family(hf_models.siglip, hf_models.llama, "llama", "stretch", seed=1),
}


def ours(chat: Chat, with_pictures: bool = True) -> Results:
    """By a model that we loaded."""
    texts, pictures = inputs(with_pictures)
    prompts = chat.processor.prompts(texts, pictures, MULTIPLE)
    lengths = prompts.segment_ids.sum(1)
    left, endless = (
        chat.logits(texts, pictures),
        dataclasses.replace(chat.config, end_token_id=NOTHING),
    )
    with jax.default_matmul_precision("highest"):  # as `chat.logits`
        right = np.asarray(logits(chat.config, chat.params, right_padded(prompts)))[
            :, : lengths.max()
        ]
        answers = generate(endless, chat.params, prompts, NEW_TOKENS)
    return Results(
        [row[-length:] for row, length in zip(left, lengths)], left, right, np.asarray(answers)
    )


def right_padded(prompts: Prompts) -> Prompts:
    """Left-padded prompts with the padding moved to the other side."""
    places = np.argsort(prompts.segment_ids == 0, axis=1, kind="stable")
    return dataclasses.replace(
        prompts,
        **{
            n: np.take_along_axis(getattr(prompts, n), places, 1)
            for n in ("tokens", "segment_ids", "picture_index")
        },
    )


@functools.cache
def checkpoint_of(name: str) -> Checkpoint:
    """A family's model."""
    family = FAMILIES[name]
    return Checkpoint(
        hf_models.build(family.config(), family.seed),
        family.processor(),
        getattr(small_tokenizers, family.tokenizer)(),
    )


@functools.cache
def wanted_of(name: str) -> Results:
    """What transformers computes with it."""
    return theirs(checkpoint_of(name).model, checkpoint_of(name).processor)


def measure_llava(name: str, layout: str, folder: pathlib.Path) -> Difference:
    """A whole model, in a folder of a layout."""
    LAYOUTS[layout](checkpoint_of(name), folder)
    return difference(ours(mod_jax.load(folder)), wanted_of(name))


def measure_language_model(name: str, folder: pathlib.Path) -> Difference:
    """A family's language model alone, in a student that is made of it and a tower, without pictures."""
    family = FAMILIES[name]
    model, tokenizer = (
        hf_models.build(family.text_config(), family.seed),
        tokenizer_of(family.tokenizer),
    )
    model.save_pretrained(folder / "language_model")
    hf_models.build(family.vision()).save_pretrained(folder / "vision_tower")
    source = ModelSource(
        language_model=str(folder / "language_model"), vision_tower=str(folder / "vision_tower")
    )
    with open_source(source, tokenizer) as pretrained:
        chat = Chat(
            pretrained.config, read(pretrained), Processor(tokenizer, None, pretrained.config)
        )
    return difference(ours(chat, False), theirs(model, family.processor(), False))


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e4,
}
CLIP = small.VISION
SIGLIP = VisionConfig(
    "siglip", 8, 4, 16, 32, 2, 2, "gelu_tanh", 1e-6, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3
)
STUDENTS = {  # of ours, that stock transformers loads: tower, decoder, tokenizer
    "CLIP + sparse Qwen2": (CLIP, {"moe": MoEConfig(), "tie_embeddings": False}, "qwen"),
    "SigLIP + sparse Llama": (
        SIGLIP,
        {"moe": MoEConfig("second_half"), "qkv_bias": False},
        "llama",
    ),
    "CLIP + sparse Qwen3": (CLIP, {"moe": MoEConfig(), "qkv_bias": False, "qk_norm": True}, "qwen"),
    "SigLIP + dense Qwen2": (SIGLIP, {}, "qwen"),
}


def student_of(name: str, folder: pathlib.Path) -> None:
    """Writes an imported folder of ours, of random weights."""
    vision, changes, kind = STUDENTS[name]
    tokenizer = tokenizer_of(kind)
    tokenizer.save_pretrained(folder.with_name(folder.name + ".tokenizer"))
    decoder = DecoderConfig(vocab_size=rows_for(tokenizer), **SIZES | changes)
    config = ModelConfig(
        vision, decoder, tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id
    )
    params = {name: InMemory(array) for name, array in small.params_of(config).items()}
    save_native(
        folder,
        Pretrained(config, params, "random weights", folder.with_name(folder.name + ".tokenizer")),
    )


def write_export(name: str, folder: pathlib.Path) -> None:
    """A student as we export it, in shards, and what we compute with it, as `stock.check` takes them."""
    student_of(name, folder / "ours")
    export(folder / "ours", folder / "model", Options(shard_bytes=SHARD_BYTES))
    chat = mod_jax.load(folder / "ours")
    found, (texts, pictures), vision = ours(chat), inputs(), chat.config.vision
    squares = chat.processor.pixels([picture for shown in pictures for picture in shown])
    np.savez(
        folder / "expected.npz",
        left=found.left,
        right=found.right,
        answers=found.answers,
        pixels=(
            (squares / 255 - np.array(vision.pixel_mean)) / np.array(vision.pixel_std)
        ).transpose(0, 3, 1, 2),
        rendered=chat.processor.render(CONVERSATION),
        said=chat.generate("Describe the picture.", pictures[0]),
        **{f"alone_{number}": logits for number, logits in enumerate(found.alone)},
        **{f"ids_{number}": chat.processor.encode(text)[0] for number, text in enumerate(texts)},
    )


def measure_export(name: str, folder: pathlib.Path) -> Difference:
    """A student of ours, against what transformers makes of its export."""
    write_export(name, folder)
    found, wrong = wrong_with(folder)
    assert not wrong, wrong
    return found


SAVED, *OTHER_LAYOUTS = LAYOUTS
SHOWN_WITH = {  # the family that a layout is shown with
    "original LLaVA, safetensors": "CLIP + Llama, Vicuna",
    "original LLaVA, .bin, without its tower": "CLIP + Llama, Vicuna",
    "LLaVA-MoD authors' dense, .bin": "CLIP + Qwen1.5, 2, 2.5",
}
# (model, folder) -> how it is measured, given an empty folder
CASES: dict[tuple[str, str], Callable[[pathlib.Path], Difference]] = {
    (name, SAVED): functools.partial(measure_llava, name, SAVED) for name in FAMILIES
}
for layout in OTHER_LAYOUTS:
    family = SHOWN_WITH.get(layout, "CLIP + Qwen2-MoE")
    CASES[family, layout] = functools.partial(measure_llava, family, layout)
for name in FAMILIES:
    if name.startswith("CLIP + "):
        CASES[name.removeprefix("CLIP + "), "plain language model"] = functools.partial(
            measure_language_model, name
        )
for name in STUDENTS:
    CASES[name, "exported by `mod_jax.convert export`"] = functools.partial(measure_export, name)


PAGE, MARKS = (
    pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md",
    ("<!-- families -->", "<!-- /families -->"),
)
CAPTION = f"""\
Logits in float32, max |ours - theirs| / max |theirs|, against transformers {transformers.__version__}: the worst of {len(INPUTS)} texts ({", ".join(INPUTS)}),
each alone, and all in batches padded on either side. Then the share of {len(INPUTS)} x {NEW_TOKENS} greedily chosen tokens that are the same.
The models are small and random. The differences are those of rounding; above 2e-6 they come from the last bit of the pixels, in a picture that is
mostly padding. `make families` measures them again.

| model | folder | alone | padded left | padded right | same tokens |
|---|---|---|---|---|---|"""


def rows() -> Iterator[str]:
    """Of the table, as they are measured."""
    for (model, folder), measure in CASES.items():
        with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(None):
            found = measure(pathlib.Path(empty))
        yield f"| {model} | {folder} | {found.alone:.1e} | {found.left:.1e} | {found.right:.1e} | {found.same:.0%} |"


def main() -> None:
    """Measures, prints, and writes the table between the two marks of the page."""
    table = [CAPTION]
    for row in rows():
        print(row, flush=True)
        table.append(row)
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + "\n".join([MARKS[0], *table, MARKS[1]]) + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
