"""Conversations in transformers' form: the order of pictures, and contents for a chat template."""

import base64
import http.server
import threading

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mod_jax.config import ConfigError
from mod_jax.inference.messages import for_template, pictures_shown, short
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


# What is wrong with messages -> (the messages, the message about it).
MALFORMED = {
    "none": ([], r"messages = \[\]: expected at least one message"),
    "no content": (
        [{"role": "user"}],
        r"messages\[0\]: content = None: expected a text, or a list",
    ),
    "no role": ([{"content": "Hi"}], r"""messages\[0\] = .*expected an object with "role" and"""),
    "a number": ([{"role": "user", "content": 3}], r"messages\[0\]: content = 3: expected a text"),
    "no object": (
        [{"role": "user", "content": "a"}, "Hi"],
        r"messages\[1\] = 'Hi': expected an obj",
    ),
    "a part that is a text": (
        [{"role": "user", "content": ["Hi"]}],
        r"content\[0\] = 'Hi': expected",
    ),
    "a part without a type": ([{"role": "user", "content": [{}]}], r"content\[0\] = {}: expected"),
    "a text part without text": (
        [{"role": "user", "content": [IMAGE, {"type": "text"}]}],
        r"content\[1\] = {'type': 'text'}: expected a \"text\"",
    ),
    "an image_url without one": (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        r"content\[0\] = .*: expected a picture as",
    ),
    "no base64": (
        [{"role": "user", "content": [{"type": "image", "base64": "???"}]}],
        "picture = '[?]{3}': expected base64",
    ),
    "a server that is not there": (
        [{"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1:9/a.png"}]}],
        "url = 'http://127.0.0.1:9/a.png': expected a picture",
    ),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_messages_are_refused_in_one_short_line(fault):
    messages, message = MALFORMED[fault]
    with pytest.raises(ConfigError, match=message) as error:
        pictures_shown(messages)
    assert "\n" not in str(error.value)


def test_what_a_user_wrote_is_quoted_briefly():
    messages = [{"role": "user", "content": [{"type": "video", "video": "a" * 10**6}]}]
    with pytest.raises(ConfigError) as error:
        pictures_shown(messages)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "length, quoted", [(78, f"'{'a' * 78}'"), (79, f"'{'a' * 76}..."), (10**6, f"'{'a' * 76}...")]
)
def test_a_quotation_has_80_characters_at_most(length, quoted):
    assert short("a" * length) == quoted and len(quoted) == 80


DATA = base64.b64encode(b"picture").decode()
# A part of a message -> the picture that it carries.
CARRIED = {
    "a path": ({"type": "image", "path": "a.png"}, "a.png"),
    "a picture": ({"type": "image", "image": b"picture"}, b"picture"),
    "a URL that is a path": ({"type": "image", "url": "a b.png"}, "a b.png"),
    "a file": ({"type": "image", "url": "file:///a%20b.png"}, "/a b.png"),
    "data": ({"type": "image", "url": f"data:image/png;base64,{DATA}"}, b"picture"),
    "data as an image": ({"type": "image", "image": f"data:image/png;base64,{DATA}"}, b"picture"),
    "base64": ({"type": "image", "base64": DATA}, b"picture"),
    "OpenAI's": (
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
        b"picture",
    ),
    "OpenAI's, short": ({"type": "image_url", "image_url": "a.png"}, "a.png"),
    "nulls": ({"type": "image", "image": None, "path": None, "url": "a.png"}, "a.png"),
}


@pytest.mark.parametrize("form", CARRIED)
def test_a_part_carries_its_picture_in_any_of_the_forms_of_transformers(form):
    part, picture = CARRIED[form]
    assert pictures_shown([{"role": "user", "content": [part]}]) == [picture]


def test_a_picture_is_read_from_a_server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        part = {"type": "image", "url": f"http://127.0.0.1:{server.server_port}/seen.png"}
        assert pictures_shown([{"role": "user", "content": [part]}]) == [b"/seen.png"]


@pytest.mark.parametrize("jinja", [chat_template("qwen"), LLAVA_HF, CHATML])
def test_an_image_url_is_shown_as_a_picture(jinja):
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, text_part("What?")]
    wanted = shown(jinja, [{"role": "user", "content": [IMAGE, text_part("What?")]}])
    assert shown(jinja, [{"role": "user", "content": parts}]) == wanted


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
