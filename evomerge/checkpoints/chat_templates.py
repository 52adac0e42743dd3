"""Chat templates: read, check and write them; the built-in ones follow each family's own format."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from evomerge.checkpoints.index import read_json
from evomerge.checkpoints.sidecars import write_json
from evomerge.errors import MergeError
from evomerge.registry import did_you_mean

_CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{%- set state = namespace(system='', turn='user') -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if loop.first and message['role'] == 'system' -%}
        {%- set state.system = message['content'] + '\\n\\n' -%}
    {%- elif message['role'] != state.turn -%}
        {{- raise_exception('user and assistant must take turns, and user must begin') -}}
    {%- elif state.turn == 'user' -%}
        {{- ' [INST] ' + state.system + message['content'] + ' [/INST]' -}}
        {%- set state.system = '' -%}
        {%- set state.turn = 'assistant' -%}
    {%- else -%}
        {{- ' ' + message['content'] + eos_token -}}
        {%- set state.turn = 'user' -%}
    {%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- set titles = {'user': '### Instruction:\\n', 'assistant': '### Response:\\n'} -%}
{%- for message in messages -%}
    {{- titles.get(message['role'], '') + message['content'] | trim -}}
    {%- if message['role'] == 'assistant' -%}
        {{- eos_token -}}
    {%- endif -%}
    {%- if not loop.last or add_generation_prompt -%}
        {{- '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- titles['assistant'] -}}
{%- endif -%}
"""

_EXAONE = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '[|' + message['role'] + '|]' + message['content'] -}}
    {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
"""

CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""The built-in templates by name.

`chatml` and `mistral` print what mergekit's print. `llama3`, `exaone` and `alpaca` print the format
that the models were trained on, where mergekit 0.1.5 has a line break after every <|eot_id|>, the
template's own indentation, and no line break before the last ### Response.
"""


def chat_template_of(text: str) -> str:
    """Return the template that a `chat_template` setting means: a built-in's name, or Jinja.

    Raises:
        MergeError: It is neither, or Jinja as transformers compiles it refuses it.
    """
    if text in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[text]
    if "{" not in text:
        raise MergeError(
            f"chat_template: came {text!r}, allowed are auto, {', '.join(CHAT_TEMPLATES)}, or a "
            f"Jinja template.{did_you_mean(text, ['auto', *CHAT_TEMPLATES])}"
        )
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=text)  # compiles, and renders no conversation
    except TemplateSyntaxError as error:
        raise MergeError(
            f"chat_template: line {error.lineno} is not valid Jinja ({error.message}). Mend it, or "
            f"name one of auto, {', '.join(CHAT_TEMPLATES)}."
        ) from None
    return text


def read_chat_template(folder: Path) -> str | None:
    """Return the template that transformers would use for a model's folder; None where it has none.

    Raises:
        CheckpointError: A file that may hold one cannot be read.
    """
    own = folder / "chat_template.jinja"
    if own.exists():
        return own.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        found = read_json(path, str(folder)).get("chat_template") if path.exists() else None
        if isinstance(found, list):  # several by name, as transformers 4 wrote them
            found = next((t["template"] for t in found if t.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def write_chat_template(folder: Path, template: str) -> None:
    """Make a template the only one of a folder with tokenizer files.

    Raises:
        CheckpointError: tokenizer_config.json cannot be read.
    """
    (folder / "chat_template.json").unlink(missing_ok=True)
    for path in folder.glob("additional_chat_templates/*.jinja"):
        path.unlink()
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        config = read_json(settings, str(folder))
        config.pop("chat_template", None)
        write_json(settings, config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def most_common_template(folders: Iterable[Path]) -> str | None:
    """Return the template that most models have, the first of them where that is undecided.

    Outer white space does not count, and is cut off. None where no model has a template.
    """
    found = [template.strip() for folder in folders if (template := read_chat_template(folder))]
    return Counter(found).most_common(1)[0][0] if found else None
