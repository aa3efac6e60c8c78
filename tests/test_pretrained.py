"""Learned rules on disk: round trips, refusals, damage, and crashes half-way."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatopt import FlatOpt, _folder, pretrained
from flatopt.pretrained import LearnedRule, list_pretrained, load_folder, shipped_folder, weights_sha256
from flatopt.rules import L2ODM, RULES, Adam, OrthogonalizedMomentum, UpdateRule

settings.register_profile("disk", max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
disk = settings.get_profile("disk")


@dataclass
class Bounds:
    """Hyper-parameters in a dataclass of their own, which has no hash."""

    low: float = 0.0
    steps: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Toy(UpdateRule):
    """Fields of every kind, and weights of unusual shapes."""

    name: ClassVar[str] = "toy"

    width: int = 3
    scale: float = 0.5
    use_bias: bool = True
    kind: Literal["tanh", "relu"] = "tanh"
    decays: tuple[float, ...] = (0.9, 0.99)
    bounds: tuple[int, str] = (1, "x")
    limit: float | None = None
    inner: Bounds = field(default_factory=Bounds)
    optional: Bounds | None = None

    def __post_init__(self):
        if self.scale < 0:
            raise ValueError(f"scale must not be negative, got {self.scale}")

    def init_weights(self, generator=None):
        weights = {
            "matrix": torch.randn(self.width, 2, generator=generator),
            "scalar": torch.randn((), generator=generator),
            "empty": torch.zeros(0, 3),
        }
        return weights | ({"bias": torch.zeros(self.width)} if self.use_bias else {})

    def init_state(self, weights, param, generator=None):
        raise NotImplementedError

    def observe(self, weights, state, grad, param, context):
        raise NotImplementedError

    def propose(self, weights, state, grad, param, control, context):
        raise NotImplementedError

    def step_size(self, weights, control, context):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def toy_rule(monkeypatch):
    monkeypatch.setitem(RULES, "toy", Toy)


def make_learned(rule=None, seed=0, **fields):
    rule = rule or Toy()
    return LearnedRule(rule, rule.init_weights(torch.Generator().manual_seed(seed)), **fields)


def save(folder, learned=None):
    (learned or make_learned()).save_pretrained(folder)
    return Path(folder)


def edit_config(folder, change):
    """Replace ``config.json`` by what ``change`` makes of it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- round trip ----------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
bounds = st.builds(Bounds, low=finite, steps=st.lists(st.integers(-9, 9), max_size=2).map(tuple))
rules = st.one_of(
    st.builds(Adam, lr=finite, betas=st.tuples(finite, finite), eps=finite),
    st.builds(OrthogonalizedMomentum, strip_size=st.integers(0, 5), base_step=st.floats(1e-300, 1e300)),
    st.builds(
        Toy,
        width=st.integers(0, 6),
        scale=st.floats(0, 1e300),
        use_bias=st.booleans(),
        kind=st.sampled_from(["tanh", "relu"]),
        decays=st.lists(finite, max_size=4).map(tuple),
        bounds=st.tuples(st.integers(-(2**53), 2**53), st.text(max_size=5)),
        limit=st.none() | finite,
        inner=bounds,
        optional=st.none() | bounds,
    ),
)
text = st.text(st.characters(codec="utf-8"), max_size=30)
metadata = st.dictionaries(
    text, st.recursive(st.none() | st.booleans() | finite | text, lambda inner: st.lists(inner, max_size=3))
)


@disk
@given(rule=rules, seed=st.integers(0, 2**31), card=text, metadata=metadata, training=metadata)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, rule, seed, card, metadata, training):
    learned = make_learned(rule, seed, card=card, metadata=metadata, training=training)
    folder = save(tmp_path_factory.mktemp("rule") / "saved", learned)
    loaded = load_folder(folder)
    assert loaded.rule == rule
    assert type(loaded.rule) is type(rule)
    assert equal(loaded.weights, learned.weights)
    assert (loaded.card, loaded.metadata, loaded.name, loaded.commit) == (card, metadata, str(folder), None)
    assert loaded.training == training
    assert loaded.sha256 == learned.sha256 == weights_sha256(learned.weights)
    again = save(tmp_path_factory.mktemp("rule") / "again", loaded)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


def test_special_values_keep_their_bits(tmp_path):
    learned = make_learned()
    values = torch.tensor([-0.0, 1e-45, 3.4028235e38, -1.1754944e-38, 1 / 3, 1e-10])
    learned.weights["matrix"].copy_(values.view(3, 2))
    loaded = load_folder(save(tmp_path / "rule", learned))
    assert loaded.weights["matrix"].view(torch.int32).tolist() == values.view(3, 2).view(torch.int32).tolist()


@disk
@given(seed=st.integers(0, 2**31), data=st.data())
def test_hash_sees_every_bit_name_and_shape(seed, data):
    weights = make_learned(seed=seed).weights
    before = weights_sha256(weights)
    assert weights_sha256(dict(reversed(weights.items()))) == before, "order does not matter"
    key = data.draw(st.sampled_from(["matrix", "scalar", "bias"]))
    flat = weights[key].view(-1).view(torch.int32)
    index = data.draw(st.integers(0, flat.numel() - 1))
    flat[index] ^= 1 << data.draw(st.integers(0, 30))
    assert weights_sha256(weights) != before


def test_hash_tells_apart_names_shapes_and_dtypes():
    value = torch.zeros(2, 3)
    variants = [
        {"a": value},
        {"b": value},
        {"a": value.view(3, 2)},
        {"a": value.double()},
        {"a": value.view(torch.int32)},
        {"a": value[:1], "b": value[1:]},
        {"a": value[1:], "b": value[:0]},
        {},
    ]
    assert len({weights_sha256(variant) for variant in variants}) == len(variants)


def test_weights_are_owned(tmp_path):
    weights = Toy().init_weights(torch.Generator())
    learned = LearnedRule(Toy(), weights)
    before = weights_sha256(learned.weights)
    for value in weights.values():
        value.fill_(9.0)
    assert weights_sha256(learned.weights) == before
    strided = dict(learned.weights, matrix=torch.ones(2, 3).t().requires_grad_())
    kept = LearnedRule(Toy(), strided).weights["matrix"]
    assert kept.is_contiguous()
    assert not kept.requires_grad


def test_what_a_learned_rule_is_stands_in_two_lines():
    named = make_learned(name="org/name", commit="c" * 40)
    rule, origin = repr(named).splitlines()
    assert rule == f"LearnedRule({Toy()},"
    assert origin == f"            10 weights, SHA-256 {named.sha256[:12]}, 'org/name' at commit {'c' * 40})"
    assert repr(make_learned()).endswith("made in memory)")


def test_a_run_in_place_of_a_learned_rule_says_how_to_export_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=f"flatopt-train export {tmp_path} --to FOLDER"):
        pretrained.load_pretrained(tmp_path)


def test_an_optimizer_takes_a_rule_with_untrained_weights():
    rule = OrthogonalizedMomentum()
    learned = LearnedRule(rule, rule.init_weights(torch.Generator().manual_seed(0)))
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FlatOpt([param], pretrained=learned)
    param.grad = torch.ones(3)
    optimizer.step()
    assert (param < 1).all()


def test_global_random_state_is_left_alone(tmp_path):
    folder = save(tmp_path / "rule")
    before = torch.get_rng_state()
    load_folder(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_takes_milliseconds(tmp_path):
    folder = save(tmp_path / "rule", make_learned(OrthogonalizedMomentum()))

    def seconds():
        start = time.perf_counter()
        load_folder(folder)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 0.03


# --- refusals ------------------------------------------------------------------------------------------------------


def put(*path, value):
    """Return a change of a configuration."""

    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def drop(*path):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("format_version"), "'format_version'"),
        (put("format_version", value=2), "format_version is 2, this flatopt reads up to 1"),
        (put("format_version", value="1"), "format_version must be an integer of at least 1"),
        (put("format_version", value=True), "format_version must be an integer of at least 1"),
        (put("format_version", value=0), "format_version must be an integer of at least 1"),
        (drop("rule"), "missing key 'rule'"),
        (put("rule", value="no-such-rule"), "rule 'no-such-rule' is unknown.*adam"),
        (put("rule", value=["adam"]), "rule must be text"),
        (put("rule", value="adam"), "unknown key 'hyperparameters.width': valid are hyperparameters.lr"),
        (drop("hyperparameters"), "missing key 'hyperparameters'"),
        (drop("hyperparameters", "width"), "missing key 'hyperparameters.width'"),
        (put("hyperparameters", "momentum", value=1), "unknown key 'hyperparameters.momentum'"),
        (put("hyperparameters", "width", value=3.0), "hyperparameters.width must be an integer, not 3.0"),
        (put("hyperparameters", "width", value=True), "hyperparameters.width must be an integer, not True"),
        (put("hyperparameters", "width", value=-1), "no weights have the 'hyperparameters'"),
        (put("hyperparameters", "width", value=2**40), r"must have shape \[1099511627776"),
        (put("hyperparameters", "width", value=2**63), "number out of range"),
        (put("hyperparameters", "scale", value="0.5"), "hyperparameters.scale must be a number"),
        (put("hyperparameters", "scale", value=False), "hyperparameters.scale must be a number"),
        (put("hyperparameters", "scale", value=-1.0), "hyperparameters: scale must not be negative"),
        (put("hyperparameters", "use_bias", value=1), "hyperparameters.use_bias must be true or false"),
        (
            put("hyperparameters", "kind", value="sigmoid"),
            "hyperparameters.kind must be one of tanh, relu, not",
        ),
        (put("hyperparameters", "decays", value=[0.9, "x"]), r"hyperparameters.decays\[1\] must be a number"),
        (put("hyperparameters", "decays", value=0.9), "hyperparameters.decays must be a list"),
        (put("hyperparameters", "bounds", value=[1]), "hyperparameters.bounds must be a list of 2"),
        (put("hyperparameters", "inner", "low", value="x"), "hyperparameters.inner.low must be a number"),
        (drop("hyperparameters", "inner", "low"), "missing key 'hyperparameters.inner.low'"),
        (put("hyperparameters", "limit", value="none"), "hyperparameters.limit must be a number or none"),
        (put("hyperparameters", value=[]), r"hyperparameters must be an object, not \[\]"),
        (put("weights_sha256", value="0" * 64), "'weights_sha256'"),
        (put("weights_sha256", value=None), "weights_sha256 must be text"),
        (put("metadata", value=[]), "metadata must be an object"),
        (drop("metadata"), "missing key 'metadata'"),
        (put("card_sha256", value=1), "card_sha256 must be text or none"),
        (put("extra", value=1), "unknown key 'extra'"),
    ],
)
def test_wrong_configuration_is_refused_naming_file_and_field(tmp_path, change, words):
    folder = save(tmp_path / "rule")
    edit_config(folder, change)
    with pytest.raises(ValueError, match=words) as caught:
        load_folder(folder)
    assert str(folder) in str(caught.value)
    assert "config.json" in str(caught.value) or "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), OverflowError("too large"), ValueError("no width"), IndexError("none")]
)
def test_hyperparameters_that_no_weights_can_have_are_refused(tmp_path, monkeypatch, error):
    def refuse(rule, generator=None):
        raise error

    folder = save(tmp_path / "rule")
    monkeypatch.setattr(Toy, "init_weights", refuse)
    edit_config(folder, put("hyperparameters", "width", value=len(str(error))))  # not in the cache of shapes
    with pytest.raises(ValueError, match=rf"no weights have the 'hyperparameters' of Toy.*: {error}$"):
        load_folder(folder)


def test_a_published_rule_without_hidden_units_is_refused(tmp_path):
    folder = save(tmp_path / "rule", make_learned(L2ODM()))
    edit_config(folder, put("hyperparameters", "hidden", value=0))
    with pytest.raises(
        ValueError, match=r"model.safetensors: no weights have the 'hyperparameters' of L2ODM\(.*hidden=0"
    ):
        load_folder(folder)


def test_integer_is_accepted_for_a_float_and_becomes_one(tmp_path):
    folder = save(tmp_path / "rule")
    edit_config(folder, put("hyperparameters", "scale", value=2))
    scale = load_folder(folder).rule.scale
    assert (scale, type(scale)) == (2.0, float)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"format_version": 1, "format_version": 1}',
        b'{"format_version": NaN}',
        b'{"format_version": -Infinity}',
        b'{"format_version": 1e999}',
        b'{"format_version": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b" " * (2**20 + 1),
    ],
    ids=range(13),
)
def test_bad_json_is_refused_naming_the_file(tmp_path, content):
    folder = save(tmp_path / "rule")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json") as caught:
        load_folder(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("matrix"), "missing 'matrix'"),
        (lambda weights: weights.update(more=torch.zeros(1)), "unexpected 'more'"),
        (lambda weights: weights.update(matrix=torch.zeros(2, 3)), r"'matrix' must have shape \[3, 2\], got \[2, 3\]"),
        (lambda weights: weights.update(scalar=torch.zeros(1)), r"'scalar' must have shape \[\], got \[1\]"),
        (lambda weights: weights.update(matrix=torch.zeros(3, 2).half()), "'matrix' must be float32, got '?F16"),
        (lambda weights: weights.update(matrix=torch.zeros(3, 2).double()), "'matrix' must be float32, got '?F64"),
        (lambda weights: weights["matrix"].fill_(torch.nan), "'matrix' holds values that are not finite"),
        (lambda weights: weights["bias"].fill_(-torch.inf), "'bias' holds values that are not finite"),
    ],
)
def test_wrong_tensors_are_refused_naming_file_and_tensor(tmp_path, change, words):
    folder = save(tmp_path / "rule")
    weights = make_learned().weights
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    edit_config(folder, put("weights_sha256", value=weights_sha256(weights)))
    with pytest.raises(ValueError, match=words) as caught:
        load_folder(folder)
    assert "model.safetensors" in str(caught.value)
    with pytest.raises(ValueError, match=words.split(",")[0]):
        LearnedRule(Toy(), weights)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", None])
def test_missing_file_or_folder_is_named(tmp_path, missing):
    folder = save(tmp_path / "rule")
    if missing is None:
        folder = tmp_path / "none"
    else:
        (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing or "none"):
        load_folder(folder)


def test_readme_is_optional_and_other_files_are_ignored(tmp_path):
    folder = save(tmp_path / "rule")
    assert not (folder / "README.md").exists()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert load_folder(folder).card == ""
    (folder / "README.md").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="README.md"):
        load_folder(folder)


@pytest.mark.parametrize("name", _folder.FILES)
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, name):
    folder = save(tmp_path / "rule", make_learned(card="# Card", training={"seed": 1}))
    (folder / name).rename(tmp_path / "private")
    for target in (tmp_path / "private", "../private"):
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"{name}: a link to a file outside of its folder"):
            load_folder(folder)
        (folder / name).unlink()
    (tmp_path / "private").rename(folder / "kept")
    (folder / name).symlink_to("kept")
    (tmp_path / "link").symlink_to(folder)
    assert load_folder(tmp_path / "link").training == {"seed": 1}


def test_only_a_snapshot_of_the_hub_has_its_files_among_the_blobs_beside_it(tmp_path):
    folder = save(tmp_path / "snapshots" / "commit", make_learned(training={"seed": 1}))
    (tmp_path / "blobs").mkdir()
    (folder / "training.json").rename(tmp_path / "blobs" / "digest")
    (folder / "training.json").symlink_to("../../blobs/digest")
    assert load_folder(folder).training == {"seed": 1}
    (tmp_path / "blobs").rename(tmp_path / "private")
    (tmp_path / "blobs").symlink_to("private")
    with pytest.raises(ValueError, match="training.json: a link to a file outside of its folder"):
        load_folder(folder)


# --- damage --------------------------------------------------------------------------------------------------------


def load_damaged(folder, path, content, reference):
    """Load with one file replaced: either ValueError, or exactly the rule and weights of before."""
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        loaded = load_folder(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return False
    finally:
        path.write_bytes(original)
    assert equal(loaded.weights, reference.weights)
    return True


def test_truncated_files_are_refused(tmp_path):
    reference = make_learned()
    folder = save(tmp_path / "rule", reference)
    for name in ("model.safetensors", "config.json"):
        content = (folder / name).read_bytes()
        for length in range(0, len(content) - 1, 3):  # without its last byte, a newline, config.json is still whole
            assert not load_damaged(folder, folder / name, content[:length], reference), (name, length)


def test_lengthened_weights_are_refused(tmp_path):
    reference = make_learned()
    path = save(tmp_path / "rule", reference) / "model.safetensors"
    for extra in (b"\0", b"\0" * 8, path.read_bytes()):
        assert not load_damaged(path.parent, path, path.read_bytes() + extra, reference)


def test_flipped_bits_never_change_the_weights(tmp_path):
    reference = make_learned(OrthogonalizedMomentum())
    folder = save(tmp_path / "rule", reference)
    chosen = random.Random(0)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    data_start = 8 + struct.unpack("<Q", content[:8])[0]
    header_bits = chosen.sample(range(8 * data_start), 200)
    data_bits = chosen.sample(range(8 * data_start, 8 * len(content)), 100)
    for bit in [*range(64), *header_bits, *data_bits]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        accepted = load_damaged(folder, path, bytes(damaged), reference)
        assert not (accepted and bit >= 8 * data_start), "a flipped bit of a weight went unnoticed"
    path = folder / "config.json"
    content = path.read_bytes()
    for bit in chosen.sample(range(8 * len(content)), 200):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        load_damaged(folder, path, bytes(damaged), reference)


@pytest.mark.parametrize("length", [0, 1, 2**20 + 1, 2**31, 2**62, 2**64 - 1])
def test_false_header_length_is_refused(tmp_path, length):
    reference = make_learned()
    path = save(tmp_path / "rule", reference) / "model.safetensors"
    content = struct.pack("<Q", length) + path.read_bytes()[8:]
    assert not load_damaged(path.parent, path, content, reference)
    assert not load_damaged(path.parent, path, content + b" " * (2**20 + 100), reference)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"matrix": 1}',
        b'{"matrix": {"dtype": "F32", "shape": 3, "data_offsets": [0, 24]}}',
        b'{"matrix": {"dtype": {}, "shape": [[]], "data_offsets": null}}',
        b'{"matrix": {}, "matrix": {}}',
        b'{"__metadata__": {"a": 1}}',
    ],
    ids=range(9),
)
def test_false_header_is_refused(tmp_path, header):
    reference = make_learned()
    path = save(tmp_path / "rule", reference) / "model.safetensors"
    assert not load_damaged(path.parent, path, struct.pack("<Q", len(header)) + header, reference)


@pytest.mark.parametrize("offsets", [[0, 23], [0, 28], [-24, 0], [4, 28], [2**40, 2**40 + 24], [24, 0], None, "x"])
def test_false_data_offsets_are_refused(tmp_path, offsets):
    reference = make_learned()
    path = save(tmp_path / "rule", reference) / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert header["matrix"]["data_offsets"] != offsets
    header["matrix"]["data_offsets"] = offsets
    changed = json.dumps(header).encode()
    content = struct.pack("<Q", len(changed)) + changed + content[8 + length :]
    assert not load_damaged(path.parent, path, content, reference)


def test_oversized_file_is_refused_without_reading_it(tmp_path):
    folder = save(tmp_path / "rule")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # sparse: takes no room
    with pytest.raises(ValueError, match="model.safetensors: larger than"):
        load_folder(folder)


def test_swapped_files_are_refused(tmp_path):
    folder, other = save(tmp_path / "one"), save(tmp_path / "two", make_learned(seed=1))
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="weights_sha256"):
        load_folder(folder)
    config = (other / "config.json").read_bytes()
    (other / "config.json").write_bytes((other / "model.safetensors").read_bytes())
    (other / "model.safetensors").write_bytes(config)
    with pytest.raises(ValueError, match="config.json"):
        load_folder(other)


def test_pickle_is_never_executed(tmp_path):
    folder = save(tmp_path / "rule")
    torch.save(make_learned().weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_folder(folder)


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors", [{}, {"é": torch.zeros(()), "none": torch.ones(0, 3), 'a"\n': torch.arange(5.0)}, make_learned().weights]
)
def test_weights_are_written_as_safetensors_writes_them(tensors):
    assert _folder._to_safetensors(tensors) == safetensors.torch.save(tensors)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_saving_replaces_the_earlier_rule_and_leaves_nothing_else(tmp_path):
    save(tmp_path / "rule", make_learned(card="# Old"))
    save(tmp_path / "rule", make_learned(Adam()))
    assert load_folder(tmp_path / "rule").rule == Adam()
    assert listing(tmp_path) == ["rule", "rule/config.json", "rule/model.safetensors"]


@pytest.mark.parametrize("card", ["", "# Written"])
def test_saving_never_replaces_a_card_that_was_edited(tmp_path, card):
    folder = save(tmp_path / "rule", make_learned(card=card))
    (folder / "README.md").write_text("# Measured")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for new in (make_learned(card="# New"), load_folder(folder), make_learned()):
        if new.card == "# Measured":
            save(folder, new)
        else:
            with pytest.raises(FileExistsError, match=r"README.md was edited, .* move it elsewhere"):
                save(folder, new)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "README.md").rename(tmp_path / "README.md")
    assert load_folder(save(folder, make_learned(card="# New"))).card == "# New"


def test_saving_makes_parents_and_accepts_an_empty_folder(tmp_path, monkeypatch):
    save(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    save(".")
    assert load_folder(tmp_path / "empty").rule == load_folder(tmp_path / "a" / "b").rule


@pytest.mark.parametrize("step", ["write_durably", "read_folder", "sync_folder", "first rename", "second rename"])
def test_failure_half_way_keeps_the_earlier_folder_and_leaves_nothing_behind(tmp_path, monkeypatch, step):
    old = make_learned(seed=1, card="# Old")
    folder = save(tmp_path / "rule", old)

    def fail_at(function, number):
        calls = []

        def failing(*args):
            calls.append(args)
            if len(calls) == number:
                raise OSError("disk full")
            return function(*args)

        return failing

    if step.endswith("rename"):
        monkeypatch.setattr(os, "rename", fail_at(os.rename, 1 if step.startswith("first") else 2))
    else:
        number = 2 if step == "write_durably" else 1
        home = pretrained if step == "read_folder" else _folder
        monkeypatch.setattr(home, step, fail_at(getattr(home, step), number))
    with pytest.raises(OSError, match="disk full"):
        save(folder, make_learned(seed=2))
    monkeypatch.undo()
    monkeypatch.setitem(RULES, "toy", Toy)
    assert equal(load_folder(folder).weights, old.weights)
    assert listing(tmp_path) == ["rule", "rule/README.md", "rule/config.json", "rule/model.safetensors"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    foreign = {
        "notes": {"notes.txt": "mine"},
        "other": {"config.json": "{}", "model.safetensors": ""},
        "partly": {"model.safetensors": ""},
        "git": {"config.json": "{}", ".git": ""},
    }
    for name, files in foreign.items():
        (tmp_path / name).mkdir()
        for file_name, content in files.items():
            (tmp_path / name / file_name).write_text(content)
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    for name in [*foreign, "file"]:
        with pytest.raises(FileExistsError, match=name):
            save(tmp_path / name)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "learned",
    [
        lambda: make_learned(Toy(scale=float("inf"))),
        lambda: make_learned(metadata={"loss": float("nan")}),
        lambda: make_learned(metadata={"path": Path("x")}),
        lambda: make_learned(metadata={"seed": 2**70}),
        lambda: make_learned(metadata={1: "a", "1": "b"}),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, learned):
    with pytest.raises(ValueError):
        save(tmp_path / "rule", learned())
    assert listing(tmp_path) == []


def test_rule_that_is_not_registered_is_not_written(tmp_path, monkeypatch):
    monkeypatch.delitem(RULES, "toy")
    with pytest.raises(ValueError, match="'toy' is unknown"):
        save(tmp_path / "rule")
    assert listing(tmp_path) == []


# --- shipped weights -----------------------------------------------------------------------------------------------


def test_shipped_weights_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    package = tmp_path / "flatopt"
    package.mkdir()
    monkeypatch.setattr(pretrained, "__file__", str(package / "pretrained.py"))
    assert list_pretrained() == []
    save(tmp_path / "pretrained" / "checkout-v1")
    (tmp_path / "pretrained" / "not-weights").mkdir()
    assert list_pretrained() == ["checkout-v1"]
    assert shipped_folder("checkout-v1") == tmp_path / "pretrained" / "checkout-v1"
    save(package / "_pretrained" / "wheel-v1")
    assert list_pretrained() == ["wheel-v1"]
    for name in ("none", "..", "../flatopt", ""):
        with pytest.raises(ValueError, match="wheel-v1"):
            shipped_folder(name)


@pytest.mark.parametrize("name", list_pretrained())
def test_shipped_weights_load(name):
    assert load_folder(shipped_folder(name)).card
