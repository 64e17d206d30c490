"""What stock transformers, 4.57 or 5.x, makes of a folder that we exported. Needs torch, transformers, numpy and Pillow, and nothing of ours.

    python tests/stock/check.py FOLDER      FOLDER: what write.py left; prints the differences, and fails if one is too large

Axes: B texts, S positions, V vocabulary, T new tokens, N pictures, C H W their channels, height and width.
"""

import contextlib
import dataclasses
import io
import pathlib
import runpy
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

NEW_TOKENS, NOTHING = 32, -1  # no token has the id -1, so nothing ends an answer
TOLERANCE = 1e-5  # max |ours - theirs| / max |theirs| of logits in float32
PIXEL_TOLERANCE = 1e-6

# Texts, and the (width, height) of their pictures in px.
INPUTS = {
    "a picture first": ("<image>\nWhat is it?", [(20, 30)]),
    "in the middle": ("USER: Is it <image> a cat? ASSISTANT:", [(31, 9)]),
    "last": ("Look at the cat: <image>", [(12, 12)]),
    "two adjacent": ("<image><image>\nHow many cats are there?", [(12, 40), (50, 50)]),
    "text only": ("USER: What is it? ASSISTANT: It's", []),
}
CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? 猫?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It's a cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "Is <image> a picture?"}]},
]


def inputs(with_pictures: bool = True) -> tuple[list[str], list[list[Image.Image]]]:
    """The texts, and the pictures of each."""
    rng = np.random.default_rng(0)
    drawn = [
        [
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            for width, height in sizes
        ]
        for _, sizes in INPUTS.values()
    ]
    texts = [text for text, _ in INPUTS.values()]
    return (
        (texts, drawn)
        if with_pictures
        else ([text.replace("<image>", "cat") for text in texts], [[] for _ in texts])
    )


@dataclasses.dataclass(frozen=True)
class Results:
    """What a model makes of `inputs`.

    Attributes:
      alone: f32[S,V] of each text.
      left, right: f32[B,S,V] of all as a batch, padded on that side.
      answers: i32[B,T], greedy, with nothing to end them.
    """

    alone: list[np.ndarray]
    left: np.ndarray
    right: np.ndarray
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """max |ours - theirs| / max |theirs| of the logits of each text, the largest of all texts; and the share of the answers' tokens that are the same."""

    alone: float
    left: float
    right: float
    same: float


def difference(found: Results, wanted: Results) -> Difference:
    """At the positions of the texts; what is padding means nothing."""
    lengths, vocabulary = [len(row) for row in wanted.alone], wanted.left.shape[-1]
    assert [len(row) for row in found.alone] == lengths and found.left.shape[
        :2
    ] == wanted.left.shape[:2]

    def largest(ours, theirs, first=lambda row, length: row):
        pairs = [
            (first(a, n)[:, :vocabulary], first(b, n))
            for a, b, n in zip(ours, theirs, lengths, strict=True)
        ]
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)

    return Difference(
        alone=largest(found.alone, wanted.alone),
        left=largest(found.left, wanted.left, lambda row, length: row[-length:]),
        right=largest(found.right, wanted.right, lambda row, length: row[:length]),
        same=float((found.answers == wanted.answers).mean()),
    )


def load(folder: pathlib.Path) -> tuple[torch.nn.Module, LlavaProcessor]:
    """What transformers loads; it finds every tensor in the files, and no other. (A shared expert of size 0 has no numbers, and is in no file.)"""
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model, said = LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, **options
    )
    empty = {name for name, parameter in model.named_parameters() if parameter.numel() == 0}
    assert (
        not set(said["missing_keys"]) - empty
        and not said["unexpected_keys"]
        and not said["mismatched_keys"]
    ), said
    return model.eval(), AutoProcessor.from_pretrained(folder, **pil())


def pil() -> dict:
    """How this version is asked for the image processor that works with Pillow."""
    return (
        {"backend": "pil"}
        if int(transformers.__version__.partition(".")[0]) >= 5
        else {"use_fast": False}
    )


def read(
    processor: LlavaProcessor,
    texts: list[str],
    pictures: list[list[Image.Image]],
    side: str = "left",
) -> dict:
    """A padded batch."""
    processor.tokenizer.padding_side = side
    return processor(
        text=texts,
        images=[picture for shown in pictures for picture in shown] or None,
        padding=True,
        return_tensors="pt",
    )


def theirs(
    model: torch.nn.Module, processor: LlavaProcessor, with_pictures: bool = True
) -> Results:
    """By transformers. Rounding decides nothing: the best two logits of each step of the answers are not that near."""
    texts, pictures = inputs(with_pictures)

    def logits(texts, pictures, side="left"):
        return model(**read(processor, texts, pictures, side)).logits.numpy()

    with torch.no_grad():
        options = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "eos_token_id": NOTHING,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        said = model.generate(
            **read(processor, texts, pictures),
            **options,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        best = torch.stack(said.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > 2 * TOLERANCE * best.abs().max(), (
            "the best two logits are within rounding: choose another seed"
        )
        alone = [logits([text], [shown])[0] for text, shown in zip(texts, pictures)]
        return Results(
            alone,
            logits(texts, pictures),
            logits(texts, pictures, "right"),
            said.sequences[:, -NEW_TOKENS:].numpy(),
        )


def said_by_card(folder: pathlib.Path) -> str:
    """What the code in the model's card prints, about a picture.png of the first of `inputs`."""
    inputs()[1][0][0].save(folder / "picture.png")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder / "use.py").write_text(code)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        runpy.run_path("use.py")
    return printed.getvalue().strip()


def wrong_with(folder: pathlib.Path) -> tuple[Difference, list[str]]:
    """How far a model of `folder` is from what we computed, and what is not as it should be."""
    model, processor = load(folder / "model")
    (texts, pictures), ours = inputs(), dict(np.load(folder / "expected.npz"))
    computed = Results(
        [ours[f"alone_{number}"] for number in range(len(texts))],
        ours["left"],
        ours["right"],
        ours["answers"],
    )
    found = difference(computed, theirs(model, processor))
    ids = [
        processor(text=[text], images=shown or None).input_ids[0]
        for text, shown in zip(texts, pictures)
    ]
    pixels = np.abs(read(processor, texts, pictures)["pixel_values"].numpy() - ours["pixels"]).max()
    rendered, said = (
        processor.apply_chat_template(CONVERSATION, add_generation_prompt=True),
        said_by_card(folder / "model"),
    )
    wrong = {
        f"logits (more than {TOLERANCE:g})": max(found.alone, found.left, found.right) > TOLERANCE,
        "greedy tokens": found.same < 1,
        f"pixels (by {pixels:.1e})": pixels > PIXEL_TOLERANCE,
        "ids": any(row != ours[f"ids_{number}"].tolist() for number, row in enumerate(ids)),
        f"chat template ({rendered!r})": rendered != ours["rendered"].item(),
        f"answer of the card's code ({said!r})": said != ours["said"].item(),
    }
    return found, [what for what, is_wrong in wrong.items() if is_wrong]


def main() -> None:
    """Checks every model; exit code 1 if something is wrong."""
    transformers.logging.set_verbosity_error()  # it warns of shared experts, which have no numbers
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print(
        "| model | alone | padded left | padded right | same tokens | wrong |\n|---|---|---|---|---|---|"
    )
    bad = False
    for folder in sorted(path.parent for path in pathlib.Path(sys.argv[1]).glob("*/expected.npz")):
        found, wrong = wrong_with(folder)
        bad |= bool(wrong)
        print(
            f"| {folder.name} | {found.alone:.1e} | {found.left:.1e} | {found.right:.1e} | {found.same:.0%} | {'; '.join(wrong) or 'nothing'} |",
            flush=True,
        )
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
