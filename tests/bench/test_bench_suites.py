"""What is measured when little is asked, and when more is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elm_mlx.bench import suites
from elm_mlx.bench.suites import SUITES, Case, change, check, prompt_ids
from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS


def test_every_suite_can_be_run() -> None:
    for suite in SUITES.values():
        assert check(suite) is suite and len(set(suite.cases)) == len(suite.cases)


def test_the_papers_setting() -> None:
    suite = SUITES["m2max"]
    assert [case.model for case in suite.cases] == [*PRESETS]
    assert {case.precision for case in suite.cases} == {"bfloat16"} and suite.compute_dtype == "bfloat16"
    assert {(case.new, case.batch) for case in suite.cases} == {(1024, 1)}
    assert {*suite.against} == {"naive", "mlx-lm", "pytorch"} and suite.repeats == 5


def test_every_combination_is_a_case_and_a_directory_is_measured_as_it_is() -> None:
    made = suites.cases(["OpenELM-270M", "some/dir"], ["bfloat16", "4bit"], [(8, 2), (16, 4)], [1, 2])
    assert len(made) == 8 + 4 and len(set(made)) == 12
    assert {case.precision for case in made if case.model == "some/dir"} == {"stored"}


def test_what_is_not_said_stays() -> None:
    quick = SUITES["quick"]
    assert change(quick) == quick
    one = change(quick, models=["a"], batches=[3])
    assert one.cases == (Case("a", "stored", 128, 32, 3),)
    assert {(c.prompt, c.new) for c in change(quick, prompts=[5, 6]).cases} == {(5, 32), (6, 32)}
    assert {(c.prompt, c.new) for c in change(quick, new=[7]).cases} == {(128, 7)}
    assert {(c.prompt, c.new) for c in change(quick, prompts=[5, 6], new=[1, 2]).cases} == {(5, 1), (6, 2)}
    with pytest.raises(InputError, match="as many as there are prompts"):
        change(quick, prompts=[5, 6, 7], new=[1, 2])
    with pytest.raises(InputError, match="--precision is for presets"):
        change(quick, models=["a"], precisions=["4bit"])
    assert len(change(quick, models=["a", "OpenELM-270M"], precisions=["4bit"]).cases) == 4


@pytest.mark.parametrize(
    ("change", "error"),
    [({"against": ("ours",)}, "--against ours: is not one of naive, "), ({"against": ("gpt",)}, "--against gpt"),
     ({"against": ("naive", "naive")}, "named twice"), ({"repeats": 0}, "--repeats 0"),
     ({"cases": (Case("m", "stored", 0, 1),)}, "--prompt-tokens 0"),
     ({"cases": (Case("m", "stored", 1, 0),)}, "--new-tokens 0"),
     ({"cases": (Case("m", "stored", 1, 1, 0),)}, "--batch-size 0"),
     ({"cases": (Case("m", "5bit", 1, 1),)}, "--precision 5bit")],
)  # fmt: skip
def test_what_there_is_none_of_is_refused(change: dict[str, object], error: str) -> None:
    with pytest.raises(InputError, match=error):
        check(replace(SUITES["quick"], **change))  # type: ignore[arg-type]


def test_prompts_begin_with_bos_stay_in_the_vocabulary_and_differ() -> None:
    first, second = prompt_ids(200, 96), prompt_ids(200, 96, row=1)
    assert first[0] == second[0] == 1 and first != second and len(first) == 200
    assert all(3 <= token < 96 for token in first[1:] + second[1:]) and prompt_ids(1, 96) == [1]


def test_bits_of_keys_are_cases_of_their_own() -> None:
    made = change(SUITES["quick"], models=["a"], batches=[1, 2], kv_bits=[None, 8, 4]).cases
    assert [(case.batch, case.kv_bits) for case in made] == [(1, None), (1, 8), (1, 4), (2, None), (2, 8), (2, 4)]
    assert str(made[4]) == "a, stored, 128 + 32 tokens, 2 at once, keys in 8 bits"
    with pytest.raises(InputError, match="--kv-bits 3: 8 or 4 are possible, and none"):
        check(change(SUITES["quick"], kv_bits=[3]))
