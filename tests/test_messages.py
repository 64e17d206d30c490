"""Conversations in transformers' form: the order of pictures, and contents for a chat template."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mod_jax.config import ConfigError
from mod_jax.inference.messages import for_template, pictures_shown
from mod_jax.interop.processor import chat_template

IMAGE = {"type": "image"}


def text_part(text: str) -> dict:
    """A part of a message's content."""
    return {"type": "text", "text": text}


# Templates of other projects. LLaVA-1.5's can only show parts, Qwen2's only strings.
LLAVA_HF = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}"
    "{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}"
    "{% endfor %}"
    "{% endfor %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
# Writes the Python representation of parts.
CARELESS = CHATML.replace("+ message['content'] +", "~ message['content'] ~")
PARTS = [
    {"role": "user", "content": [IMAGE, text_part("Which?"), IMAGE]},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And <image>?"},
]


def shown(jinja: str, messages: list[dict]) -> str:
    """The text of messages whose contents are brought to the form that the template shows."""
    template = ImmutableSandboxedEnvironment().from_string(jinja)

    def render(messages: list[dict]) -> str:
        return template.render(messages=messages, eos_token="</s>", add_generation_prompt=False)

    return render(for_template(messages, render))


def test_pictures_are_those_of_the_parts_and_of_the_list_in_the_order_they_are_shown():
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a"},
                text_part("<image> is no picture"),
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
    content = [IMAGE, {"type": "image", "image": "own"}, IMAGE]
    with pytest.raises(ConfigError, match=message):
        pictures_shown([{"role": "user", "content": content}], images)


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
            (
                "<|im_start|>user\n<image>\nWhich?\n<image><|im_end|>\n"
                "<|im_start|>assistant\nThis.<|im_end|>\n"
                "<|im_start|>user\nAnd <image>?<|im_end|>\n"
            ),
        ),
    ],
    ids=["ours", "llava-hf", "chatml"],
)
def test_contents_are_brought_to_the_form_that_a_template_shows(jinja, expected):
    assert shown(jinja, PARTS) == expected


def test_a_template_that_writes_parts_as_python_does_gets_strings():
    assert shown(CARELESS, PARTS) == shown(CHATML, PARTS)


@pytest.mark.parametrize("jinja", [chat_template("qwen"), LLAVA_HF, CHATML])
def test_a_picture_token_in_a_text_part_does_not_become_a_picture(jinja):
    content = [IMAGE, text_part("What does <image> mean?")]
    text = shown(jinja, [{"role": "user", "content": content}])
    assert text.count("<image>") == 1
    assert "What does < image> mean?" in text


def test_a_string_without_pictures_stays_as_it_is():
    messages = [{"role": "user", "content": "Hello\n you "}]
    assert shown(LLAVA_HF, messages) == "USER: Hello\n you  "
    assert "Hello\n you " in shown(CHATML, messages)
