"""The reader of configurations: what fits is taken as it is, what does not is named in one short line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatopt._dataclass_json import above, assign, at_least, at_most, below, check, parse_json, read


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    size: Annotated[int, at_least(1)] = 4
    limit: Annotated[float, above(0), at_most(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    kind: Literal["tanh", "relu"] = "tanh"
    level: Literal[1, 2] = 1
    mixed: bool | int | tuple[float, ...] = False
    share: Annotated[float, at_least(0), below(1)] = 0.0
    pair: tuple[int, str] = (1, "x")
    options: dict[str, Any] = field(default_factory=dict)
    first: Part
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if self.first.size == 13:
            raise ValueError("not 13")


FIRST = {"name": "a"}
wholes = st.builds(
    Whole,
    kind=st.sampled_from(["tanh", "relu"]),
    level=st.sampled_from([1, 2]),
    mixed=st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.lists(st.floats(-1, 1), max_size=3).map(tuple),
    share=st.floats(0, 1, exclude_max=True),
    pair=st.tuples(st.integers(0, 9), st.text(max_size=3)),
    options=st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.text(max_size=3), max_size=3),
    first=st.builds(Part, name=st.text(max_size=3), size=st.integers(1, 9)),
    parts=st.lists(
        st.builds(Part, name=st.just("b"), size=st.integers(1, 9), limit=st.none() | st.floats(0.5, 1)), max_size=2
    ).map(tuple),
)


@given(whole=wholes)
def test_what_asdict_writes_is_what_is_read(whole):
    again = read(parse_json(json.dumps(asdict(whole)), "here"), Whole, complete=True)
    assert again == whole
    assert [type(value) for value in vars(again).values()] == [type(value) for value in vars(whole).values()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "missing key 'x.first'"),
        ({"first": {}}, "missing key 'x.first.name'"),
        ({"first": 1}, "x.first must be an object, not 1"),
        ({"first": {"name": "a", "more": 1}}, "unknown key 'x.first.more': valid are x.first.name, x.first.size"),
        ({"first": {"name": "a", "size": 0}}, "x.first.size must be an integer of at least 1, not 0"),
        ({"first": {"name": "a", "size": 13}}, "x: not 13"),
        ({"first": {"name": "a", "limit": 0}}, "x.first.limit must be a number above 0 and at most 1 or none, not 0"),
        ({"first": {"name": "a", "limit": 1.5}}, "x.first.limit must be a number above 0 and at most 1 or none"),
        ({"first": FIRST, "kind": "sigmoid"}, "x.kind must be one of tanh, relu, not 'sigmoid'"),
        ({"first": FIRST, "kind": None}, "x.kind must be one of tanh, relu, not None"),
        ({"first": FIRST, "level": True}, "x.level must be one of 1, 2, not True"),
        ({"first": FIRST, "mixed": 0.5}, "x.mixed must be true or false or an integer or a list, not 0.5"),
        ({"first": FIRST, "mixed": [1, "a"]}, r"x.mixed\[1\] must be a number, not 'a'"),
        ({"first": FIRST, "share": 1}, "x.share must be a number of at least 0 and below 1, not 1"),
        ({"first": FIRST, "share": float("nan")}, "x.share must be a number of at least 0 and below 1, not nan"),
        ({"first": FIRST, "share": 10**400}, "x.share must be a number .*, not 1000"),
        ({"first": FIRST, "pair": [1]}, r"x.pair must be a list of 2, not \[1\]"),
        ({"first": FIRST, "options": []}, r"x.options must be an object, not \[\]"),
        ({"first": FIRST, "parts": [FIRST, {"name": "b", "size": 0}]}, "x.parts.b.size must be an integer"),
        ({"first": FIRST, "parts": [1]}, r"x.parts\[0\] must be an object, not 1"),
        ([], r"x must be an object, not \[\]"),
        ("y" * 10_000, "x must be an object, not 'yyy"),
    ],
)
def test_what_does_not_fit_is_named_in_one_short_line(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(data, Whole, "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_complete_reading_wants_every_field_but_an_option_that_is_off():
    data = asdict(Whole(first=Part(name="a")))
    del data["first"]["limit"]
    assert read(data, Whole, complete=True) == Whole(first=Part(name="a"))
    del data["first"]["size"]
    assert read(data, Whole) == Whole(first=Part(name="a"))
    with pytest.raises(ValueError, match="missing key 'first.size'"):
        read(data, Whole, complete=True)


@pytest.mark.parametrize(
    ("assignment", "path", "expected"),
    [
        ("kind=relu", ("kind",), "relu"),
        ("first.name=none", ("first", "name"), "none"),
        ("first.limit=none", ("first", "limit"), None),
        ("first.limit=.5", ("first", "limit"), 0.5),
        ("mixed=True", ("mixed",), True),
        ("mixed=9223372036854775807", ("mixed",), 2**63 - 1),
        ("share=10000000000000000000", ("share",), 1e19),
        ("mixed=[1, 2]", ("mixed",), [1, 2]),
        ("options.a.b=3", ("options", "a", "b"), 3),
        ("options.word=last", ("options", "word"), "last"),
        ('options={"a": null}', ("options",), {"a": None}),
        ("first.name=a=b", ("first", "name"), "a=b"),
    ],
)
def test_an_assignment_is_parsed_by_the_type_at_its_key(assignment, path, expected):
    data = asdict(Whole(first=Part(name="a")))
    assign(data, Whole, assignment)
    value = data
    for key in path:
        value = value[key]
    assert value == expected and type(value) is type(expected)


def test_an_entry_of_a_list_is_assigned_by_its_name():
    data = asdict(Whole(first=Part(name="a"), parts=(Part(name="b"), Part(name="c"))))
    assign(data, Whole, "parts.c.size=9")
    assert [part.size for part in read(data, Whole).parts] == [4, 9]
    for wrong in ("parts.d.size=1", "parts.c=1"):
        with pytest.raises(ValueError, match="valid are parts.b.KEY, parts.c.KEY"):
            assign(data, Whole, wrong)


def test_fields_made_in_python_are_checked_too():
    with pytest.raises(ValueError, match=r"Whole.share must be a number of at least 0 and below 1, not 1.0"):
        Whole(share=1.0, first=Part(name="a"))


@pytest.mark.parametrize("digits", ["-9223372036854775809", "9223372036854775808", "1" + "0" * 30, "9" * 5000])
def test_an_integer_beyond_64_bits_is_refused(digits):
    with pytest.raises(ValueError, match="here: not valid JSON: number out of range"):
        parse_json(digits, "here")


def test_what_is_nested_without_end_is_one_short_line():
    with pytest.raises(ValueError, match="pair: not valid JSON: maximum recursion depth"):
        assign(asdict(Whole(first=Part(name="a"))), Whole, f"pair={'[' * 100_000}")
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="pair must be a list of 2, not a list nested too deeply"):
        read(value, tuple[int, str], "pair")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "options: not valid JSON: duplicate key 'a'"),
        ("[1, 2", "options: not valid JSON: Expecting"),
        ('{"a": NaN}', "options: not valid JSON: NaN is not JSON"),
    ],
)
def test_an_assignment_is_strict_json_where_it_looks_like_it(text, message):
    with pytest.raises(ValueError, match=message):
        assign(asdict(Whole(first=Part(name="a"))), Whole, f"options={text}")
