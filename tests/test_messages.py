"""Conversations in transformers' form: their pictures in order, and contents as a chat template shows them."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mod_jax.config import ConfigError
from mod_jax.inference.messages import for_template, pictures_shown
from mod_jax.interop.processor import chat_template

IMAGE, TEXT = {"type": "image"}, lambda text: {"type": "text", "text": text}
# What the folders of others have: LLaVA-1.5's shows parts only, Qwen2's strings only.
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
)
CHATML = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
CARELESS = CHATML.replace(
    "+ message['content'] +", "~ message['content'] ~"
)  # writes parts as Python does
PARTS = [
    {"role": "user", "content": [IMAGE, TEXT("Which?"), IMAGE]},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And <image>?"},
]


def shown(jinja: str, messages: list[dict]) -> str:
    def render(messages):
        return (
            ImmutableSandboxedEnvironment()
            .from_string(jinja)
            .render(messages=messages, eos_token="</s>", add_generation_prompt=False)
        )

    return render(for_template(messages, render))


def test_pictures_are_those_of_the_parts_and_of_the_list_in_the_order_they_are_shown():
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a"},
                TEXT("<image> is no picture"),
                IMAGE,
                {"type": "image", "path": "c"},
            ],
        },
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "<image> or <image>?"},
    ]
    assert pictures_shown(messages, ["b", "d", "e"]) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    "images, message",
    [
        (["a"], "images = '1 pictures': expected 2"),
        (["a", "b", "c"], "images = '3 pictures': expected 2"),
    ],
)
def test_pictures_that_are_missing_or_too_many_are_refused(images, message):
    with pytest.raises(ConfigError, match=message):
        pictures_shown(
            [{"role": "user", "content": [IMAGE, {"type": "image", "image": "own"}, IMAGE]}], images
        )


def test_a_part_of_another_type_is_refused():
    with pytest.raises(ConfigError, match="'video'.*expected parts of type text or image"):
        pictures_shown([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize(
    "jinja, expected",
    [
        (
            chat_template("brief"),
            "USER: <image>\nWhich?\n<image> ASSISTANT: This.</s>USER: And <image>?",
        ),
        (LLAVA_HF, "USER: <image>\n<image>\nWhich? ASSISTANT: This. USER: <image>\nAnd  ? "),
        (
            CHATML,
            "<|im_start|>user\n<image>\nWhich?\n<image><|im_end|>\n<|im_start|>assistant\nThis.<|im_end|>\n<|im_start|>user\nAnd <image>?<|im_end|>\n",
        ),
    ],
    ids=["ours", "llava-hf", "chatml"],
)
def test_contents_are_brought_to_the_form_that_a_template_shows(jinja, expected):
    assert shown(jinja, PARTS) == expected


def test_a_template_that_writes_parts_as_python_does_is_given_strings():
    assert shown(CARELESS, PARTS) == shown(CHATML, PARTS)


@pytest.mark.parametrize("jinja", [chat_template("qwen"), LLAVA_HF, CHATML])
def test_a_picture_token_in_a_text_part_does_not_become_a_picture(jinja):
    text = shown(jinja, [{"role": "user", "content": [IMAGE, TEXT("What does <image> mean?")]}])
    assert text.count("<image>") == 1 and "What does < image> mean?" in text


def test_a_string_without_pictures_stays_as_it_is():
    assert shown(LLAVA_HF, [{"role": "user", "content": "Hello\n you "}]) == "USER: Hello\n you  "
    assert "Hello\n you " in shown(CHATML, [{"role": "user", "content": "Hello\n you "}])
