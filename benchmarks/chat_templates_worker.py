"""transformers' side of `chat_templates.py`, in a process of its own, as JSON.

    chat_templates_worker.py JOB

JOB is a JSON file with `templates`, Jinja text by name, `conversations`, a list of messages each, and `names`, the
tokens that a template may write. Of each template come its renderings: for each conversation the text without and with
the generation prompt, or null where transformers raises.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Prints transformers' renderings of the job's templates, by name, as JSON."""
    from transformers.utils.chat_template_utils import render_jinja_template

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))

    def render(template: str, messages: list[dict[str, str]], prompt: bool) -> str | None:
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=prompt, **job["names"]
            )
        except Exception:  # of any kind: a template raises what it likes
            return None
        return rendered[0]

    results = {
        name: [[render(template, messages, prompt) for prompt in (False, True)] for messages in job["conversations"]]
        for name, template in job["templates"].items()
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
