"""Medians, ratios and bounds against counts by hand; and the JSON that all of it is kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from measured import SPEEDS, row, whole

from elm_mlx.bench import results, suites, tables
from elm_mlx.bench.conditions import Conditions
from elm_mlx.bench.results import Bound, NormTimes, Results, Row, Speeds, Spread, bounds
from elm_mlx.bench.suites import About, Case, Figures, Suite
from elm_mlx.errors import InputError

SCHEMA = Path(results.__file__).with_name("results.schema.json")
DEFINED = {"case": Case, "about": About, "figures": Figures, "conditions": Conditions, "bound": Bound, "row": Row}


def test_a_ratio_is_the_median_of_pairs_and_not_of_medians() -> None:
    assert row().spread("ours", "prompt") == Spread(667.0, 500.0, 1000.0)
    assert row().ratio("mlx-lm", "prompt") == Spread(2.0, 1.0, 667 / 250)
    assert row().ratio("mlx-lm", "decode") == Spread(2.0, 1.5, 9.5)
    assert row().ratio("pytorch", "decode") is None and row().spread("mlx-lm", "memory") is None


def test_what_bounds_a_prompt_and_a_step_by_hand() -> None:
    found = bounds(row(), SPEEDS)
    # Ten tokens' weights, 1 + … + 10 positions seen, one head: 2,280 FLOP take 2.28 ms, and 4,080 bytes 2.04.
    prompt = found["prompt"]
    assert prompt is not None and (prompt.flops, prompt.bytes, prompt.by) == (2000 + 55 * 4 + 60, 4000 + 80, "matmul")
    assert prompt.share == pytest.approx(2280 / 1e6 / 0.015)
    # A step after 12 tokens: 308 FLOP take 0.3 ms, 4,096 bytes 2.0.
    step = found["decode"]
    assert step is not None and (step.flops, step.bytes, step.by) == (200 + 48 + 60, 4000 + 96, "bandwidth")
    assert step.share == pytest.approx(4096 / 2e6 * 95)
    unread = row()
    unread.about["ours"] = replace(unread.about["ours"], flops_unread=20)
    shorter = bounds(unread, SPEEDS)
    assert shorter["prompt"] is not None and shorter["prompt"].flops == 2280 - 9 * 20 and shorter["decode"] == step
    rounding = row()
    rounding.about["ours"] = replace(rounding.about["ours"], rounds=True)
    assert bounds(rounding, SPEEDS) == {"prompt": None, "decode": step}
    assert tables.brief(rounding, SPEEDS)[1][0][1] == "667"


def test_several_texts_share_the_weights() -> None:
    step = bounds(row(batch=4), SPEEDS)["decode"]
    assert step is not None and (step.flops, step.bytes) == (4 * 308, 4000 + 4 * 96)
    assert step.share == pytest.approx((4000 + 4 * 96) / 2e6 * 95 / 4)


def test_no_bound_is_made_up() -> None:
    nothing = {"prompt": None, "decode": None}
    assert bounds(row(), Speeds()) == nothing and bounds(Row(row().case), SPEEDS) == nothing
    other = row()
    other.about["ours"] = About("elm-mlx", "bfloat16", flops=5)
    assert bounds(other, SPEEDS) == nothing


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole().save(path)
    assert results.load(path) == whole()
    kept = json.loads(path.read_text())
    assert kept["rows"][0]["roofline"]["prompt"]["by"] == "matmul" and kept["version"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 2}', '{"version": 3, "rows": [1]}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json: "):
        results.load(tmp_path / "a.json")
    with pytest.raises(InputError, match="No such file"):
        results.load(tmp_path / "b.json")


def test_what_is_saved_fits_the_schema(tmp_path: Path) -> None:
    made = whole()
    made.machine |= dict.fromkeys(("computes on", "system", "python", "elm-mlx", "mlx", "mlx-lm"), "1")
    made.machine["computes on"], made.commit, made.note = "GPU", "0123456789" * 4 + "-dirty-01234567", "on a desk"
    made.rows[0].conditions = [Conditions("2026-01-02T03:04:05+00:00", "mains", False, "nominal", None, 1e12, 4e11)]
    path = tmp_path / "a.json"
    made.save(path)
    assert results.schema_faults(path) == []
    kept = json.loads(path.read_text())
    for damage, place in (
        ({"commit": "main"}, "$.commit"), ({"version": 2}, "$.version"), ({"when": "yesterday"}, "$.when"),
        ({"rows": []}, "$.rows"), ({"hostname": "mine"}, "$"), ({"machine": {"cores": "2"}}, "$.machine"),
        ({"speeds": {"matmul": {"float32": -1.0}, "bandwidth": 1.0}}, "$.speeds.matmul.float32"),
    ):  # fmt: skip
        path.write_text(json.dumps(kept | damage))
        faults = results.schema_faults(path)
        assert faults and all(fault.startswith(f"{place}: ") for fault in faults)


def test_the_schema_knows_every_field() -> None:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    for definition, made in (
        (schema, Results), *((schema["$defs"][name], made) for name, made in DEFINED.items()),
        (schema["properties"]["suite"], Suite), (schema["properties"]["speeds"], Speeds),
        (schema["properties"]["norms"]["items"], NormTimes),
    ):  # fmt: skip
        extra = {Results: {"version"}, Row: {"roofline"}}.get(made, set())
        assert {*definition["properties"]} == {each.name for each in fields(made)} | extra
        assert {*definition["required"]} == {*definition["properties"]} and definition["additionalProperties"] is False


def test_the_schema_knows_every_side() -> None:
    assert json.loads(SCHEMA.read_text("utf-8"))["$defs"]["side"]["enum"] == [*suites.SIDES]


def test_without_jsonschema_nothing_is_checked(tmp_path: Path, without: Callable[[str], None]) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert results.schema_faults(tmp_path / "a.json")
    without("jsonschema")
    assert results.schema_faults(tmp_path / "a.json") == []


def test_the_table_says_it_all() -> None:
    header, lines = tables.speed(whole())
    ours, theirs = (
        dict(zip(header[:3] + header[5:6] + header[8:], line[:3] + line[5:6] + line[8:], strict=True)) for line in lines
    )
    assert ours == {"model": "OpenELM-270M, bfloat16 in float32", "tokens": "10 + 5", "side": "elm-mlx",
                    "first token, s": "0.015 (0.01 to 0.02)", "memory": "0.01 GB", "same tokens": ""}  # fmt: skip
    assert theirs["side"] == "mlx-lm, same BLAS and type" and theirs["memory"] == ""
    assert theirs["same tokens"] == "first 3"
    assert lines[0][4] == "15% of matmul" and lines[0][7] == "19% of bandwidth"
    assert lines[1][4] == "× 2 (1 to 2.67)" and lines[1][7] == "× 2 (1.5 to 9.5)"
    assert tables.norms(whole())[1] == [["1×2×3", "float32", "15 (10 to 20)", "25 (20 to 30)", "2 (1 to 3)"]]
    brief = tables.brief(row(), SPEEDS)[1]
    assert brief[0][1] == "667 15%" and brief[1][1] == "500 ×2.00" and brief[1][3] == "50 ×2.00"


def test_markdown_has_a_cell_for_each_column() -> None:
    text = tables.markdown(whole())
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("| ")]
        assert len({line.count(" | ") for line in rows}) <= 1
    assert "pytorch" not in text and "PyTorch left out: not here | there" in text
    assert "Measured on 2026-01-02: <b>; 2 cores" in text


def test_texts_are_compared_from_the_beginning() -> None:
    made = row(batch=2)  # of five steps
    made.alike.clear()
    assert tables.likeness(made) == ""
    ours = [1, 11, 2, 12, 3, 13, 4, 14, 5, 15]
    made.compare("naive", ours, ours)
    made.compare("mlx-lm", ours, ours)
    made.compare("mlx-lm", [1, 11, 2, 99, 3, 13, 4, 14, 5, 15], ours)
    made.compare("mlx-lm", ours, ours)  # the least of several turns counts
    made.compare("llama.cpp", [], ours)  # it doesn't say
    assert made.alike == {"naive": 5, "mlx-lm": 1}
    assert tables.likeness(made) == "the same tokens as elm-mlx: naive (all), mlx-lm (first 1)"


def test_tokens_of_a_pass_stand_behind_the_ratio_of_decoding() -> None:
    made = whole()
    (only,) = made.rows
    only.figures["prompt-lookup"] = [replace(each, per_pass=2.5) for each in only.figures["ours"]]
    line = tables.speed(made)[1][-1]
    assert line[4] == "× 1" and line[7] == "× 1, 2.50 a pass"
    assert tables.brief(only, SPEEDS)[1][-1][1::2] == ["667 ×1.00", "95 ×1.00, 2.50 a pass"]


def test_other_programs_versions_are_told() -> None:
    made = whole()
    made.rows[0].about["llama.cpp"] = About("llama.cpp abc1234 (llama-cpp-python 9.8)", "Q4_1")
    made.rows.append(made.rows[0])
    assert tables.machine(made)[1][-1] == ["llama.cpp", "abc1234 (llama-cpp-python 9.8)"]
    assert tables.machine(made)[1][-2][0].startswith("memory")
    assert "; llama.cpp abc1234 (llama-cpp-python 9.8)." in tables.markdown(made)


def test_an_unfinished_benchmark_says_so() -> None:
    made = whole()
    made.complete = False
    assert tables.left_out(made)[-1].startswith("Interrupted")


def test_numbers_are_short() -> None:
    assert [tables.number(value) for value in (2.5e9, 1234.5, 100.4, 99.44, 0.012345)] == [
        "2.5G",
        "1,234",
        "100",
        "99.4",
        "0.0123",
    ]
    assert tables.spread(Spread(2.0, 2.0, 2.0)) == "2" and tables.spread(None) == ""
