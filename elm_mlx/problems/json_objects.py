"""The task to write a JSON object that fits a JSON Schema."""

from __future__ import annotations

import json
import random
from typing import Any

from elm_mlx import reading
from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.final_line import last_block

Schema = dict[str, Any]

_KEYS = (
    "name age city color count price size weight title year rank score level team animal fruit owner state code unit "
    "width height depth speed"
)
_WORDS = (
    "red blue green black white north south east west apple pear plum fig bread milk salt iron gold wood glass river "
    "lake hill road wolf bear fox hare ant bee owl crow"
)


def _number(draw: random.Random) -> Schema:
    lowest = draw.randrange(100)
    return {"type": "integer", "minimum": lowest, "maximum": lowest + draw.randint(1, 9)}


def _choice(draw: random.Random) -> Schema:
    return {"enum": draw.sample(_WORDS.split(), draw.randint(2, 4))}


def _boolean(draw: random.Random) -> Schema:
    return {"type": "boolean"}


def _list(draw: random.Random) -> Schema:
    fewest = draw.randint(1, 3)
    items = draw.choice([_number, _choice])(draw)
    return {"type": "array", "items": items, "minItems": fewest, "maxItems": fewest + draw.randint(0, 2)}


def _object(draw: random.Random, count: int, deepest: int) -> Schema:
    """Returns the schema of an object with `count` values, one of which is an object if `deepest` is 2 or more."""
    keys = draw.sample(_KEYS.split(), count)
    kinds = [_number, _choice] if count == 2 else [_number, _choice, _list, _boolean]
    properties = {key: draw.choice(kinds)(draw) for key in keys}
    if deepest > 1:
        properties[keys[-1]] = _object(draw, 2, deepest - 1)
    return {"type": "object", "properties": properties, "required": keys, "additionalProperties": False}


def _example(draw: random.Random, schema: Schema) -> Any:
    """Returns a value that fits."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if schema["type"] == "integer":
        return draw.randint(schema["minimum"], schema["maximum"])
    if schema["type"] == "boolean":
        return draw.random() < 0.5
    if schema["type"] == "array":
        return [_example(draw, schema["items"]) for _ in range(draw.randint(schema["minItems"], schema["maxItems"]))]
    return {key: _example(draw, each) for key, each in schema["properties"].items()}


def _fits(schema: Schema, value: Any) -> bool:
    """Tells whether a value fits, by the keywords that this task's schemas have."""
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "integer":  # 3.0 is one, by JSON Schema
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        return whole and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "boolean":
        return isinstance(value, bool)
    if schema["type"] == "array":
        within = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return within and all(_fits(schema["items"], each) for each in value)
    properties = schema["properties"]
    return (
        isinstance(value, dict)
        and value.keys() == properties.keys()
        and all(_fits(each, value[key]) for key, each in properties.items())
    )


def _problem(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"json/{difficulty}/{seed}")
    count, deepest = {1: (2, 1), 2: (4, 1), 3: (4, 2), 4: (6, 3)}[difficulty]
    schema = _object(draw, count, deepest)
    prompt = f"Write JSON that fits this schema: {json.dumps(schema)}\n"
    return Problem(prompt, json.dumps(_example(draw, schema)), {"schema": schema})


def _judge(problem: Problem, answer: str) -> Verdict:
    try:
        value = reading.load_json(last_block(answer) or "", reading.JSON_RECORDS)
    except ValueError:
        return Verdict.UNREADABLE
    return Verdict.RIGHT if _fits(problem.facts["schema"], value) else Verdict.WRONG


# The answer is JSON and nothing else, or has it in its last block between lines of ```; a key may not stand twice in an
# object. All keys are required, none may be added. Difficulties: 1, two values, each a number from a range or a word
# of some; 2, four, with lists, true and false; 3, with an object in it; 4, six values, and objects in objects. There
# are millions of problems of each.
JSON_OBJECTS = CheckedTask("json", 4, _problem, _judge)
