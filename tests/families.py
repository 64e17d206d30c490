"""How far our numbers are from transformers', for every family of models in every layout of files.

    python tests/families.py        measures all cases and writes the table of docs/checkpoints.md

The models are small and random. The oracle of an import is the transformers model that the tensors
were taken from, fed by its own processor; that of an export is the model and the processor that
stock transformers loads from it.
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
SHARD_BYTES = 100_000  # small enough that an export has several files and an index


@functools.cache
def tokenizer_of(kind: str):
    """The tokenizer `small_tokenizers.<kind>`, with `<image>` and a padding token."""
    tokenizer = copy.deepcopy(getattr(small_tokenizers, kind)())
    tokenizer.add_tokens(
        [AddedToken("<image>", special=True, normalized=False)], special_tokens=True
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rows_for(tokenizer) -> int:
    """Rows of a model's embedding: the size of the vocabulary, rounded up to a multiple of 64."""
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
    """A kind of LLaVA: its tower, its language model, and the processor that such models have.

    Attributes:
      vision: Function of `hf_models` for the tower's configuration.
      text: Function of `hf_models` for the language model's configuration.
      tokenizer: Name of a function of `small_tokenizers`.
      fit: How pictures are made square, a key of IMAGE_PROCESSORS.
      seed: Of the random parameters.
    """

    vision: Callable
    text: Callable
    tokenizer: str
    fit: str
    seed: int = 0

    def text_config(self):
        """The language model's configuration."""
        tokenizer = tokenizer_of(self.tokenizer)
        return self.text(
            vocab_size=rows_for(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def config(self):
        """The whole model's configuration."""
        return hf_models.llava(
            self.vision(),
            self.text_config(),
            image_token_index=tokenizer_of(self.tokenizer).convert_tokens_to_ids("<image>"),
        )

    def processor(self, template: str | None = "qwen") -> LlavaProcessor:
        """The processor, with the chat template of this name or with none."""
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


NO_TOKEN = 2**30  # an id without a row: no answer ends


def ours(chat: Chat, with_pictures: bool = True) -> Results:
    """What a model that we loaded makes of `stock.check.inputs`."""
    texts, pictures = inputs(with_pictures)
    prompts = chat.processor.prompts(texts, pictures, MULTIPLE)
    lengths = prompts.segment_ids.sum(1)
    left = chat.logits(texts, pictures)
    alone = [row[-length:] for row, length in zip(left, lengths)]
    endless = dataclasses.replace(chat.config, end_token_id=NO_TOKEN, other_end_token_ids=())
    with jax.default_matmul_precision("highest"):  # as `chat.logits`
        right = logits(chat.config, chat.params, right_padded(prompts))
        answers = generate(endless, chat.params, prompts, NEW_TOKENS)
    return Results(alone, left, np.asarray(right)[:, : lengths.max()], np.asarray(answers))


def right_padded(prompts: Prompts) -> Prompts:
    """Left-padded prompts with their padding moved to the right."""
    order = np.argsort(prompts.segment_ids == 0, axis=1, kind="stable")
    moved = {
        field: np.take_along_axis(getattr(prompts, field), order, 1)
        for field in ("tokens", "segment_ids", "picture_index")
    }
    return dataclasses.replace(prompts, **moved)


@functools.cache
def checkpoint_of(name: str) -> Checkpoint:
    """The random model of a family, its processor and its tokenizer."""
    family = FAMILIES[name]
    return Checkpoint(
        hf_models.build(family.config(), family.seed),
        family.processor(),
        getattr(small_tokenizers, family.tokenizer)(),
    )


@functools.cache
def wanted_of(name: str) -> Results:
    """What transformers computes with the model of a family."""
    return theirs(checkpoint_of(name).model, checkpoint_of(name).processor)


def measure_llava(name: str, layout: str, folder: pathlib.Path) -> Difference:
    """Compares a whole model that we load from a folder of a layout."""
    LAYOUTS[layout](checkpoint_of(name), folder)
    return difference(ours(mod_jax.load(folder)), wanted_of(name))


def measure_language_model(name: str, folder: pathlib.Path) -> Difference:
    """Compares a plain language model that we load as a part of a student, on texts alone."""
    family = FAMILIES[name]
    model = hf_models.build(family.text_config(), family.seed)
    tokenizer = tokenizer_of(family.tokenizer)
    model.save_pretrained(folder / "language_model")
    hf_models.build(family.vision()).save_pretrained(folder / "vision_tower")
    source = ModelSource(
        language_model=str(folder / "language_model"), vision_tower=str(folder / "vision_tower")
    )
    with open_source(source, tokenizer) as pretrained:
        processor = Processor(tokenizer, None, pretrained.config)
        chat = Chat(pretrained.config, read(pretrained), processor)
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
# Our students that stock transformers loads: name -> (tower, changes of the decoder, tokenizer).
STUDENTS = {
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
    """Writes a native folder of a student with random parameters."""
    vision, changes, kind = STUDENTS[name]
    tokenizer = tokenizer_of(kind)
    tokenizer_folder = folder.with_name(folder.name + ".tokenizer")
    tokenizer.save_pretrained(tokenizer_folder)
    decoder = DecoderConfig(vocab_size=rows_for(tokenizer), **SIZES | changes)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = ModelConfig(vision, decoder, image_token_id, tokenizer.eos_token_id)
    params = {name: InMemory(array) for name, array in small.params_of(config).items()}
    save_native(folder, Pretrained(config, params, "random weights", tokenizer_folder))


def write_export(name: str, folder: pathlib.Path) -> None:
    """Exports a student in shards, beside what we compute with it, for `stock.check`."""
    student_of(name, folder / "ours")
    export(folder / "ours", folder / "model", Options(shard_bytes=SHARD_BYTES))
    chat = mod_jax.load(folder / "ours")
    found = ours(chat)
    texts, pictures = inputs()
    squares = chat.processor.pixels([picture for shown in pictures for picture in shown])
    mean, std = np.array(chat.config.vision.pixel_mean), np.array(chat.config.vision.pixel_std)
    np.savez(
        folder / "expected.npz",
        left=found.left,
        right=found.right,
        answers=found.answers,
        pixels=((squares / 255 - mean) / std).transpose(0, 3, 1, 2),
        rendered=chat.processor.render(CONVERSATION),
        said=chat.generate("Describe the picture.", pictures[0]),
        **{f"alone_{number}": logits for number, logits in enumerate(found.alone)},
        **{f"ids_{number}": chat.processor.encode(text)[0] for number, text in enumerate(texts)},
    )


def measure_export(name: str, folder: pathlib.Path) -> Difference:
    """Compares a student of ours with what transformers loads from its export."""
    write_export(name, folder)
    found, wrong = wrong_with(folder)
    assert not wrong, wrong
    return found


SAVED, *OTHER_LAYOUTS = LAYOUTS
SHOWN_WITH = {  # layout -> the family it is measured with; CLIP + Qwen2-MoE if it is not here
    "original LLaVA, safetensors": "CLIP + Llama, Vicuna",
    "original LLaVA, .bin, without its tower": "CLIP + Llama, Vicuna",
    "LLaVA-MoD authors' dense, .bin": "CLIP + Qwen1.5, 2, 2.5",
}
# (model, folder), as the table names them -> the measurement, which is given an empty folder
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


PAGE = pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md"
MARKS = ("<!-- families -->", "<!-- /families -->")
CAPTION = f"""\
Logits in float32, max |ours - theirs| / max |theirs|, against transformers
{transformers.__version__}: the largest for {len(INPUTS)} texts
({", ".join(INPUTS)}), each alone, and all in batches
padded on either side; then the share of {len(INPUTS)} x {NEW_TOKENS} greedy tokens that agree.
The models are small and random. The differences are those of rounding; above 2e-6 they come from
the last bit of the pixels, in a picture that is mostly padding. `make families` measures again.

| model | folder | alone | padded left | padded right | same tokens |
|---|---|---|---|---|---|"""


def rows() -> Iterator[str]:
    """Rows of the table, one for each case, as they are measured."""
    for (model, folder), measure in CASES.items():
        with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(None):
            found = measure(pathlib.Path(empty))
        differences = " | ".join(f"{d:.1e}" for d in (found.alone, found.left, found.right))
        yield f"| {model} | {folder} | {differences} | {found.same:.0%} |"


def main() -> None:
    """Measures all cases and writes the table between the two marks of the page."""
    table = [CAPTION]
    for row in rows():
        print(row, flush=True)
        table.append(row)
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + "\n".join([MARKS[0], *table, MARKS[1]]) + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
