"""Chat templates rendered by us and by transformers: every character must be the same.

    python benchmarks/chat_templates.py PYTHON [FOLDER…] [--write FILE]

PYTHON is one that has `transformers` and `trl`, in an environment of its own. Compared are the templates that trl comes
with (Qwen, Llama 3, Phi-3, Gemma, DeepSeek, GLM, gpt-oss, Command-R, Nemotron, LFM …, most with a second form for
training), all `*.jinja` in the FOLDERs, and a few written here for what those may leave out.

    --write FILE    keep transformers' renderings, and the templates that may be copied, as data for our tests
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from elm_mlx.errors import ElmError
from elm_mlx.text import jinja

# Models' own, of licences that permit copies, and trl's second forms of them (Apache-2.0).
COPIED = {
    "trl/glm4moe": "MIT, Zhipu AI",
    "trl/idefics3": "Apache-2.0, Hugging Face",
    "trl/phi3_5": "MIT, Microsoft",
    "trl/qwen2_5": "Apache-2.0, Alibaba Cloud",
    "trl/qwen2_5_training": "Apache-2.0, Alibaba Cloud and Hugging Face",
    "trl/qwen3": "Apache-2.0, Alibaba Cloud",
    "trl/qwen3_training": "Apache-2.0, Alibaba Cloud and Hugging Face",
}

OWN = {
    "blocks": """\
    {% for m in messages %}
        {% if m.role == 'system' %}
            {% continue %}
        {% elif loop.index > 3 %}
            {% break %}
        {% endif %}
{{ m.role }}: {{ m.content | trim }}
    {% endfor %}
 {%- if add_generation_prompt %}
assistant:
{% endif %}
""",
    "tojson": "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}\n"
    "{{ {'b': 1.5, 'a': none} | tojson(sort_keys=true) }}"
    "{{ messages | tojson(ensure_ascii=true, separators=(',', ':')) }}{{ '<&>' | tojson }}",
    "generation": "{% for m in messages %}{% set x = 1 %}"
    "{% generation %}{% set x = 2 %}{{ m.content }}\n{% endgeneration %}{{ x }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}"
    "{{ ns.n }}{{ bos_token ~ eos_token }}{{ messages[-1]['content'].split('</think>')[-1].lstrip('\\n') }}",
    "alternation": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}",
    "absent": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ nothing is defined }}{{ nothing }}"
    "{{ messages[0].name is defined }}{{ messages[9] is defined }}{{ pad_token is defined }}"
    "{{ messages[0].tool_calls }}",
    "undefined": "{{ nothing.at.all }}",
    "python": "{{ messages }}{{ messages[0].items() | list }}{{ messages[0].content.replace('i', 'o', 1).title() }}"
    "{{ '%s %05.2f' % ('x', 2.5) }}{{ '{:>5}|{!r}'.format('é', 'é') }}"
    "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ 'a' < 'b' }}",
    "white space": "  {#- a comment -#}  \n  {% set x %}\n a {{- ' b ' -}} c \n{% endset %}\n|{{ x }}|\n\n",
    "sandbox": "{{ messages.append(1) }}",
}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = [
    [said("user", "Hi there")],
    [
        said("system", " Be brief. "),
        said("user", 'Hé <b> & "it\'s"\n\t😀 </s>'),
        said("assistant", "<think>\nhm\n</think>\n\n Yes. "),
        said("user", "And {{ 'this' }}?\n"),
    ],
    [said("user", "a"), said("assistant", "b")],
    [said("system", "s"), said("user", ""), said("assistant", ""), said("user", "c"), said("assistant", "d\n")],
    [said("assistant", "x"), said("user", "y")],
    [said("user", "x"), said("user", "y")],
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def ours(template: str) -> list[list[str | None]]:
    """Returns what our renderer makes of each conversation, None for a refusal."""

    def render(messages: list[dict[str, str]]) -> list[str | None]:
        try:
            texts = jinja.render(template, "", [(messages, False), (messages, True)], NAMES)
        except ElmError:
            return [None, None]
        return [text if isinstance(text, str) else None for text in texts]

    return [render(messages) for messages in CONVERSATIONS]


def theirs(python: str, templates: dict[str, str]) -> dict[str, list[list[str | None]]]:
    """Returns the same by transformers, for each template by name."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as job:
        json.dump({"templates": templates, "conversations": CONVERSATIONS, "names": NAMES}, job)
        job.flush()
        worker = Path(__file__).with_name("chat_templates_worker.py")
        answer = subprocess.run([python, str(worker), job.name], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(answer.stderr)
    results: dict[str, list[list[str | None]]] = json.loads(answer.stdout)
    return results


def templates_of(folder: Path, label: str) -> dict[str, str]:
    """Returns the templates of a folder by LABEL/NAME."""
    paths = sorted(folder.glob("*.jinja"))
    return {f"{label}/{path.stem}": path.read_text(encoding="utf-8") for path in paths}


def trl_folder(python: str) -> Path:
    """Returns the folder of the templates that trl, as that Python has it, comes with."""
    find = "from importlib.util import find_spec; print(find_spec('trl').submodule_search_locations[0])"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()) / "chat_templates"


def main() -> None:
    """Prints each template that is not rendered alike; exit code 1 where there is one."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("python")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    templates = {f"own/{name}": source for name, source in OWN.items()}
    for label, folder in (("trl", trl_folder(options.python)), *((folder.name, folder) for folder in options.folders)):
        templates |= templates_of(folder, label)
    expected = theirs(options.python, templates)
    differing = [name for name, template in templates.items() if ours(template) != expected[name]]
    count = len(templates) * len(CONVERSATIONS) * 2
    refused = sum(text is None for texts in expected.values() for pair in texts for text in pair)
    print(f"{len(templates)} templates, {count} renderings, of which both sides refuse {refused}")
    print(f"{len(differing)} differ: {', '.join(differing)}" if differing else "every one is the same")
    if options.write:
        kept: dict[str, Any] = {
            name: {"licence": COPIED.get(name, "ours"), "template": templates[name], "rendered": expected[name]}
            for name in templates
            if name in COPIED or name.startswith("own/")
        }
        data = {"names": NAMES, "conversations": CONVERSATIONS, "templates": kept}
        options.write.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
