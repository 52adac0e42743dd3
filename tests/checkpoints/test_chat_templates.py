"""Chat templates: what the built-in ones print, which settings are taken, where they are stored."""

import json

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from evomerge.checkpoints.chat_templates import (
    CHAT_TEMPLATES,
    chat_template_of,
    most_common_template,
    read_chat_template,
    write_chat_template,
)
from evomerge.errors import MergeError
from tests.tiny import make_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "More"},
]
# as the makers of each family document it
EXPECTED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind.\n\nHi [/INST] Yes.</s> [INST] More [/INST]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYes.</s>\n\n"
    "### Instruction:\nMore\n\n### Response:\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes.[|endofturn|]\n"
    "[|user|]More\n[|assistant|]",
}


def render(template, talk, prompt=True):
    rendered, _ = render_jinja_template(
        [talk],
        chat_template=template,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    return rendered[0]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_built_in_templates(name):
    template = chat_template_of(name)
    assert render(template, TALK) == EXPECTED[name]
    # a prompt continues the talk before it, so its tokens can be scored
    answered = render(template, [*TALK, {"role": "assistant", "content": "Ok."}], prompt=False)
    assert answered.startswith(EXPECTED[name])


def test_turns_are_checked_where_the_format_has_only_turns():
    with pytest.raises(Exception, match="user must begin"):
        render(CHAT_TEMPLATES["mistral"], TALK[2:])


def test_exaone_begins_with_an_empty_system_turn():
    begin = "[|system|][|endofturn|]\n[|user|]Hi\n"
    assert render(CHAT_TEMPLATES["exaone"], TALK[1:2], prompt=False) == begin


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lama3", r"came 'lama3', allowed are auto, .* Did you mean llama3\?"),
        ("", r"came '', allowed are auto"),
        ("{% for m in messages %}{{ m }}", r"line 1 is not valid Jinja \(Unexpected end"),
        ("{{ messages | no_such_filter }}", r"not valid Jinja \(No filter named 'no_such_filter'"),
        ("{% if x %}\n{% endfor %}", r"line 2 is not valid Jinja"),
    ],
)
def test_what_is_no_template(text, sentence):
    with pytest.raises(MergeError, match=sentence):
        chat_template_of(text)


def test_what_transformers_takes_is_taken():
    for text in (
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for m in messages %}{% break %}{% endfor %}",
        "{{ raise_exception('no') }}",
    ):
        assert chat_template_of(text) == text


def test_a_template_is_read_where_transformers_reads_it(tmp_path):
    assert read_chat_template(tmp_path) is None
    named = [{"name": "tool", "template": "tools"}, {"name": "default", "template": "one"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "one"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "two"}')
    assert read_chat_template(tmp_path) == "two"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "three"}')
    assert read_chat_template(tmp_path) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert read_chat_template(tmp_path) == "four"


def test_a_written_template_is_the_only_one(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    stale = {**json.loads(settings.read_text()), "chat_template": "old"}
    settings.write_text(json.dumps(stale))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("old")
    write_chat_template(tmp_path, CHAT_TEMPLATES["chatml"])
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == CHAT_TEMPLATES["chatml"]
    assert (
        loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
        == (EXPECTED["chatml"])
    )


def test_the_most_common_template(tmp_path):
    texts = {"a": "one\n", "b": "two", "c": " two", "d": None, "e": "one"}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "chat_template.jinja").write_text(text)
    folders = [tmp_path / name for name in texts]
    assert most_common_template(folders) == "one"
    assert most_common_template(folders[:4]) == "two"
    assert most_common_template(folders[3:4]) is None
