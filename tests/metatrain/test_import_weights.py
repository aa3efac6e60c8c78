"""The files are written here opcode by opcode, as dill writes them, and dill itself is asked where it is installed."""

import collections
import hashlib
import os
import pickle
import struct
import sys
import types

import numpy
import pytest
import torch

from flatopt.metatrain.cli import main
from flatopt.metatrain.import_weights import FORMATS, import_weights, read_arrays
from flatopt.pretrained import load_folder
from flatopt.rules import apply_rule
from flatopt.rules._rule import StepContext

LSTM_NAMES = [("w", "b"), ("w_gates", "b_gates")]


def make_arrays(rule, lstm_names=LSTM_NAMES[0]):
    """Return random arrays in the published form."""
    generator = numpy.random.default_rng(0)
    arrays = {}
    for (module, variable), shape in FORMATS[rule].shapes.items():
        name = lstm_names["wb".index(variable)] if module.startswith("lstm") else variable
        arrays.setdefault(module, {})[name] = generator.normal(size=shape, scale=0.3).astype("<f4")
    return arrays


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value):
    return b"J" + struct.pack("<i", value)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def called(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


class Dill:
    """Writes as dill does; ``package`` is where that version keeps its helpers, ``python2`` how bytes are written."""

    def __init__(self, package="dill._dill", python2=False, order="C"):
        self.package, self.python2, self.order = package, python2, order

    def data(self, value):
        return (b"T" if self.python2 else b"B") + struct.pack("<I", len(value)) + value

    def array(self, value):
        module = called(named(self.package, "_import_module"), text("numpy.core.multiarray"))
        reconstruct = called(named(self.package, "_get_attr"), module, text("_reconstruct"))
        array = called(reconstruct, named("numpy", "ndarray"), b"(" + integer(0) + b"t", self.data(b"b"))
        dtype = called(named("numpy", "dtype"), text(value.dtype.str[1:]), integer(0), integer(1))
        dtype += b"(" + integer(3) + text("<") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
        shape = b"(" + b"".join(map(integer, value.shape)) + b"t"
        fortran = b"\x88" if self.order == "F" else b"\x89"
        return array + b"(" + integer(1) + shape + dtype + fortran + self.data(value.tobytes(self.order)) + b"tb"

    def mapping(self, items):
        kind = called(named(self.package, "_load_type"), text("DictType"))
        return called(named("collections", "defaultdict"), kind) + b"(" + items + b"u"

    def dumps(self, arrays):
        modules = b""
        for module, variables in arrays.items():
            items = b"".join(text(name) + self.array(value) for name, value in variables.items())
            modules += text(module) + b"}(" + items + b"u"
        return b"\x80\x02" + self.mapping(modules) + b"."


WRITERS = {
    "new": Dill(),
    "old": Dill("dill.dill", python2=True),
    "fortran": Dill(order="F"),
}


@pytest.fixture
def fake_dill(monkeypatch):
    """A dill that does what its helpers do, so that pickle can read the files that are written here."""
    module = types.ModuleType("dill._dill")
    module._load_type = {"DictType": dict}.__getitem__
    module._import_module = lambda name: __import__(name, fromlist=["_"])
    module._get_attr = getattr
    monkeypatch.setitem(sys.modules, "dill", types.ModuleType("dill"))
    monkeypatch.setitem(sys.modules, "dill._dill", module)


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["new", "fortran"])
def test_files_made_here_are_pickles_of_arrays(name, fake_dill):
    arrays = make_arrays("l2o-dm")
    loaded = pickle.loads(WRITERS[name].dumps(arrays), encoding="latin1")
    assert type(loaded) is collections.defaultdict
    for module, variables in arrays.items():
        for variable, value in variables.items():
            assert numpy.array_equal(loaded[module][variable], value)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_arrays_are_read_as_written(writer):
    arrays = make_arrays("rnnprop")
    read = read_arrays(writer.dumps(arrays))
    assert read.keys() == {(module, name) for module, variables in arrays.items() for name in variables}
    for (module, name), value in read.items():
        torch.testing.assert_close(value, torch.from_numpy(arrays[module][name]), rtol=0, atol=0)


class Reduced:
    """An array as numpy describes it to pickle: newer versions of dill have a form of their own."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return self.array.__reduce__()


def test_what_dill_itself_writes_is_read():
    dill = pytest.importorskip("dill")
    arrays = make_arrays("l2o-dm")
    tree = collections.defaultdict(dict)
    for module, variables in arrays.items():
        tree[module] = {name: Reduced(value) for name, value in variables.items()}
    for (module, name), value in read_arrays(dill.dumps(tree)).items():
        torch.testing.assert_close(value, torch.from_numpy(arrays[module][name]), rtol=0, atol=0)


def sonnet_lstm(w, b, x, hidden, cell):
    """Sonnet's LSTM: columns input, candidate, forget, output, and one added to the forget gate."""
    i, j, f, o = numpy.split(numpy.concatenate([x, hidden]) @ w + b, 4)
    cell = cell / (1 + numpy.exp(-(f + 1))) + numpy.tanh(j) / (1 + numpy.exp(-i))
    return numpy.tanh(cell) / (1 + numpy.exp(-o)), cell


def reference_steps(rule, arrays, grads):
    """Return the steps that the published program takes for the gradients of one coordinate."""
    arrays = {module: [value.astype(float) for value in variables.values()] for module, variables in arrays.items()}
    states = [[numpy.zeros(20)] * 2 for _ in range(2)]
    m = v = 0.0
    steps = []
    for step, g in enumerate(grads, 1):
        if rule == "l2o-dm":
            x = numpy.array([max(numpy.log(abs(g) + 2.0**-23) / 5, -1), numpy.clip(g * numpy.exp(5), -1, 1)])
        else:
            m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g**2
            scale = 1 / (numpy.sqrt(v / (1 - 0.95**step)) + 1e-8)
            w, b = arrays["input_projection"]
            x = numpy.array([m / (1 - 0.95**step) * scale, g * scale]) @ w + b
            x = numpy.where(x > 0, x, numpy.exp(x) - 1)
        for layer in (0, 1):
            states[layer] = sonnet_lstm(*arrays[f"lstm_{layer + 1}"], x, *states[layer])
            x = states[layer][0]
        w, b = arrays["linear"]
        out = (x @ w + b)[0]
        steps.append(0.01 * (numpy.tanh(out) if rule == "rnnprop" else out))
    return steps


@pytest.mark.parametrize("rule", FORMATS)
@pytest.mark.parametrize("names", LSTM_NAMES)
def test_imported_rule_steps_as_the_published_one(rule, names, tmp_path):
    arrays = make_arrays(rule, names)
    file, folder = tmp_path / "cw.l2l-0", tmp_path / "export"
    file.write_bytes(WRITERS["old"].dumps(arrays))
    assert main(["import", str(file), "--rule", rule, "--to", str(folder)]) == 0
    learned = load_folder(folder)
    assert learned.rule == FORMATS[rule].rule
    assert learned.metadata == {"imported_from": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert file.name in learned.card

    weights = {key: value.double() for key, value in learned.weights.items()}
    param = torch.zeros(1, dtype=torch.float64)
    state = learned.rule.init_state(weights, param)
    grads = [0.3, -1e-4, 2.0, 0.0, -1e-9, 0.5, 0.5]
    for step, (g, expected) in enumerate(zip(grads, reference_steps(rule, arrays, grads), strict=True), 1):
        context = StepContext(torch.tensor(float(step)), torch.tensor(torch.inf))
        delta, (state,), _ = apply_rule(learned.rule, weights, [param], [param + g], [state], {}, context)
        assert float(delta[0]) == pytest.approx(expected, rel=1e-6)  # 1 is added to biases in float32


class Bomb:
    """Leaves a mark when it is unpickled for real."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def dill_call(name, *arguments):
    return b"\x80\x02" + called(named("dill._dill", name), *arguments) + b"."


MODULE = called(named("dill._dill", "_import_module"), text("numpy.core.multiarray"))
HOSTILE = {
    "a global": (b"\x80\x02" + called(named("os", "system"), text("true")) + b".", r"names os\.system"),
    "a global of protocol 4": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", r"names posix\.system"),
    "an old instance": (b"(X\x04\x00\x00\x00trueios\nsystem\n.", r"names os\.system"),
    "a builtin": (b"\x80\x02" + called(named("__builtin__", "eval"), text("1")) + b".", r"names __builtin__\.eval"),
    "a part of numpy": (b"\x80\x02" + named("numpy", "load") + b".", r"names numpy\.load"),
    "a neighbour": (b"\x80\x02" + named("numpy.core.multiarray", "fromfile") + b".", "fromfile"),
    "another helper of dill": (b"\x80\x02" + named("dill._dill", "_create_function") + b".", "_create_function"),
    "another type": (dill_call("_load_type", text("CodeType")), "the type CodeType"),
    "another module": (dill_call("_import_module", text("os")), "imports os"),
    "another attribute": (dill_call("_get_attr", MODULE, text("__builtins__")), "names __builtins__ of numpy"),
    "an attribute of another": (dill_call("_get_attr", text("os"), text("_reconstruct")), "names _reconstruct of os"),
    "a changed function": (b"\x80\x02" + named("numpy", "dtype") + b"}b.", "changes"),
    "a persistent object": (b"Pid\n.", "persistent"),
    "a number that memory has no room for": (b"\x80\x02}r\xff\xff\xff\xff.", "numbers an object 4294967295"),
    "the same as text": (b"}p4294967295\n.", "numbers an object 4294967295"),
    "a changed array": (
        b"\x80\x02" + called(named("numpy", "dtype"), text("f4")) + b"(" + integer(3) + b"t" + b"b}b.",
        "changes numpy.dtype",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_anything_else_is_refused_by_name(content, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"refused, nothing was executed.*{message}"):
        import_weights(file, "l2o-dm")
    assert main(["import", str(file), "--rule", "l2o-dm", "--to", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"flatopt-train: {file}: refused")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(protocol, tmp_path):
    mark = tmp_path / "mark"
    content = pickle.dumps({"lstm_1": {"w": Bomb(mark)}}, protocol)
    with pytest.raises(ValueError, match=r"names .*mkdir"):
        read_arrays(content)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # it would have gone off


WHOLE = Dill().dumps(make_arrays("l2o-dm"))
BROKEN = {
    "empty": b"",
    "text": b"not a pickle",
    "truncated": WHOLE[:-2000],
    "a number": pickle.dumps(3),
    "numbers": pickle.dumps({"lstm_1": {"w": 3.0}}),
    "a long tuple": pickle.dumps({("a", "b"): {"w": 3.0}}),
    "doubles": Dill().dumps({"lstm_1": {"w": numpy.zeros((22, 80))}}),
    "objects": WHOLE.replace(text("f4"), text("O8")),
    "big endian": WHOLE.replace(text("<"), text(">")),
    "a shape too large": WHOLE.replace(integer(22), integer(2**20)),
    "a negative shape": WHOLE.replace(integer(22), integer(-22)),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_errors_of_one_line(content, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(content)
    assert main(["import", str(file), "--rule", "l2o-dm", "--to", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_only_the_weights_of_that_rule_are_taken(tmp_path):
    def refuse(arrays, rule, message):
        file = tmp_path / "file"
        file.write_bytes(Dill().dumps(arrays))
        with pytest.raises(ValueError, match=message):
            import_weights(file, rule)

    refuse(make_arrays("l2o-dm"), "rnnprop", "instead of input_projection/b")
    refuse(make_arrays("rnnprop"), "l2o-dm", "holds input_projection/b")
    arrays = make_arrays("l2o-dm")
    arrays["lstm_2"]["w"] = arrays["lstm_2"]["w"].T
    refuse(arrays, "l2o-dm", r"lstm_2/w has shape \(80, 40\) instead of \(40, 80\)")
    arrays = make_arrays("l2o-dm")
    arrays["linear"]["b"][0] = numpy.nan
    refuse(arrays, "l2o-dm", "finite")
    arrays = make_arrays("l2o-dm")
    arrays["lstm_1"]["w_gates"] = arrays["lstm_1"]["w"]
    refuse(arrays, "l2o-dm", "lstm_1/w_gates")


def test_unknown_rule_and_missing_or_huge_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="only of: l2o-dm, rnnprop"):
        import_weights(tmp_path / "file", "l2o-scale")
    with pytest.raises(FileNotFoundError, match="no such file"):
        import_weights(tmp_path / "file", "l2o-dm")
    (tmp_path / "file").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match="larger than"):
        import_weights(tmp_path / "file", "l2o-dm")
