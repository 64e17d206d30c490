"""Compares what stock transformers (4.57 or 5.x) computes from an exported folder with ours:

    python tests/stock/check.py FOLDER

FOLDER was written by write.py. The differences are printed; the exit code is 1 if one is too large.
This script needs torch, transformers, numpy and Pillow, but nothing of mod_jax.

Axes: B texts, S positions, V vocabulary, T new tokens.
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

NEW_TOKENS = 32
# An end token that no token has the id of, so that nothing ends an answer.
NOTHING = -1
# Of logits in float32: max |ours - theirs| / max |theirs|.
TOLERANCE = 1e-5
# Of normalised pixels: max |ours - theirs|.
PIXEL_TOLERANCE = 1e-6

# Name -> (text, (width, height) of its pictures in px).
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
    """The texts, and the pictures of each.

    Args:
      with_pictures: If not, there are no pictures, and their markers are replaced by a word.
    """
    rng = np.random.default_rng(0)
    texts = [text for text, _ in INPUTS.values()]
    if not with_pictures:
        return [text.replace("<image>", "cat") for text in texts], [[] for _ in texts]
    pictures = []
    for _, sizes in INPUTS.values():
        arrays = [rng.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes]
        pictures.append([Image.fromarray(array) for array in arrays])
    return texts, pictures


@dataclasses.dataclass(frozen=True)
class Results:
    """What a model computes from `inputs`.

    Attributes:
      alone: Logits f32[S,V] of each text.
      left: Logits f32[B,S,V] of all texts as a batch that is padded on the left.
      right: The same, padded on the right.
      answers: Greedy answers i32[B,T], which do not end.
    """

    alone: list[np.ndarray]
    left: np.ndarray
    right: np.ndarray
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences between two results.

    Attributes:
      alone: max |ours - theirs| / max |theirs| of the logits of a text, the largest of all texts.
      left: The same for the batch that is padded on the left.
      right: The same for the batch that is padded on the right.
      same: Share of the answers' tokens that are equal.
    """

    alone: float
    left: float
    right: float
    same: float


def difference(found: Results, wanted: Results) -> Difference:
    """Compares results at the positions of the texts, as the logits of padding are meaningless."""
    lengths = [len(row) for row in wanted.alone]
    vocabulary = wanted.left.shape[-1]
    assert [len(row) for row in found.alone] == lengths
    assert found.left.shape[:2] == wanted.left.shape[:2]

    def largest(ours, theirs) -> float:
        differences = [
            np.abs(a[:, :vocabulary] - b).max() / np.abs(b).max()
            for a, b in zip(ours, theirs, strict=True)
        ]
        return float(max(differences))

    def at_end(rows) -> list[np.ndarray]:
        return [row[-length:] for row, length in zip(rows, lengths, strict=True)]

    def at_start(rows) -> list[np.ndarray]:
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    return Difference(
        alone=largest(found.alone, wanted.alone),
        left=largest(at_end(found.left), at_end(wanted.left)),
        right=largest(at_start(found.right), at_start(wanted.right)),
        same=float((found.answers == wanted.answers).mean()),
    )


def load(folder: pathlib.Path) -> tuple[torch.nn.Module, LlavaProcessor]:
    """Loads a folder, and asserts that its files hold the tensors of the model and no others.

    A shared expert of size 0 has no numbers, so that its tensors are in no file.
    """
    model, loading_info = LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    empty = {name for name, parameter in model.named_parameters() if parameter.numel() == 0}
    assert not set(loading_info["missing_keys"]) - empty, loading_info
    assert not loading_info["unexpected_keys"], loading_info
    assert not loading_info["mismatched_keys"], loading_info
    return model.eval(), AutoProcessor.from_pretrained(folder, **pil())


def pil() -> dict:
    """Options by which this version of transformers loads the image processor for Pillow."""
    major = int(transformers.__version__.partition(".")[0])
    return {"backend": "pil"} if major >= 5 else {"use_fast": False}


def read(
    processor: LlavaProcessor,
    texts: list[str],
    pictures: list[list[Image.Image]],
    side: str = "left",
) -> dict:
    """Makes a batch of texts that is padded on one side."""
    processor.tokenizer.padding_side = side
    images = [picture for shown in pictures for picture in shown]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def theirs(
    model: torch.nn.Module, processor: LlavaProcessor, with_pictures: bool = True
) -> Results:
    """Computes the results with transformers.

    Asserts that the two largest logits differ enough at each step of the answers, so that rounding
    changes no token.
    """
    texts, pictures = inputs(with_pictures)

    def logits(texts, pictures, side="left") -> np.ndarray:
        return model(**read(processor, texts, pictures, side)).logits.numpy()

    with torch.no_grad():
        generated = model.generate(
            **read(processor, texts, pictures),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=NOTHING,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        best = torch.stack(generated.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > 2 * TOLERANCE * best.abs().max(), (
            "the two largest logits are within rounding: choose another seed"
        )
        return Results(
            alone=[logits([text], [shown])[0] for text, shown in zip(texts, pictures)],
            left=logits(texts, pictures),
            right=logits(texts, pictures, "right"),
            answers=generated.sequences[:, -NEW_TOKENS:].numpy(),
        )


def answer_of_card(folder: pathlib.Path) -> str:
    """Runs the code in the model's card, and returns what it prints.

    It asks about picture.png, which is the first picture of `inputs`.
    """
    _, pictures = inputs()
    pictures[0][0].save(folder / "picture.png")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder / "use.py").write_text(code)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        runpy.run_path("use.py")
    return printed.getvalue().strip()


def wrong_with(folder: pathlib.Path) -> tuple[Difference, list[str]]:
    """Returns how far transformers is from what we computed, and the names of what is wrong."""
    model, processor = load(folder / "model")
    texts, pictures = inputs()
    ours = dict(np.load(folder / "expected.npz"))
    computed = Results(
        alone=[ours[f"alone_{number}"] for number in range(len(texts))],
        left=ours["left"],
        right=ours["right"],
        answers=ours["answers"],
    )
    found = difference(computed, theirs(model, processor))
    ids = [
        processor(text=[text], images=shown or None).input_ids[0]
        for text, shown in zip(texts, pictures)
    ]
    same_ids = all(row == ours[f"ids_{number}"].tolist() for number, row in enumerate(ids))
    pixels = read(processor, texts, pictures)["pixel_values"].numpy()
    pixel_difference = np.abs(pixels - ours["pixels"]).max()
    rendered = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    answer = answer_of_card(folder / "model")
    wrong = {
        f"logits (more than {TOLERANCE:g})": max(found.alone, found.left, found.right) > TOLERANCE,
        "greedy tokens": found.same < 1,
        f"pixels (by {pixel_difference:.1e})": pixel_difference > PIXEL_TOLERANCE,
        "ids": not same_ids,
        f"chat template ({rendered!r})": rendered != ours["rendered"].item(),
        f"answer of the card's code ({answer!r})": answer != ours["said"].item(),
    }
    return found, [name for name, is_wrong in wrong.items() if is_wrong]


def main() -> None:
    """Checks every model; exits with code 1 if anything is wrong."""
    # transformers would warn about the shared experts, which have no numbers.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| model | alone | padded left | padded right | same tokens | wrong |")
    print("|---|---|---|---|---|---|")
    has_faults = False
    for expected in sorted(pathlib.Path(sys.argv[1]).glob("*/expected.npz")):
        folder = expected.parent
        found, wrong = wrong_with(folder)
        has_faults |= bool(wrong)
        cells = [
            folder.name,
            f"{found.alone:.1e}",
            f"{found.left:.1e}",
            f"{found.right:.1e}",
            f"{found.same:.0%}",
            "; ".join(wrong) or "nothing",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(int(has_faults))


if __name__ == "__main__":
    main()
