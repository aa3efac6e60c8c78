"""Wrong invocations of the commands and of the public functions: one line that says what is wrong, no traceback.

A row is what a user may type by mistake, and words of the answer.  Commands exit with code 2; functions raise the
exception that their docstring names.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatopt import FlatOpt, LearnedRule, flatness, load_pretrained, push_to_hub
from flatopt.__main__ import main as package
from flatopt.evaluate import demo
from flatopt.evaluate.cli import main as evaluate
from flatopt.metatrain.cli import main as train
from flatopt.rules import L2ODM

pytest.importorskip("sklearn")

MODULES = {
    "broken": "def make(:",
    "failing": "1 / 0",
    "problems": """
number = 1
def make(seed): return seed
def fails(seed): raise RuntimeError("no such data")
def takes_nothing(): return 1
import torch
from torch.nn.functional import cross_entropy
def problem(loss_fn, train=None, test=None):
    data = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))]
    return torch.nn.Linear(3, 2), data if train is None else train, data if test is None else test, loss_fn
def good(seed): return problem(lambda model, batch: cross_entropy(model(batch[0]), batch[1]))
def three(seed): return good(seed)[:3]
def no_model(seed): return "model", *good(seed)[1:]
def no_loss(seed): return problem(3)
def no_batch(seed): return problem(good(seed)[3], train=[])
def no_test(seed): return problem(good(seed)[3], test=[])
def read_once(seed): return problem(good(seed)[3], train=iter(good(seed)[1]))
def vector(seed): return problem(lambda model, batch: model(batch[0]))
def number_for_loss(seed): return problem(lambda model, batch: 3.0)
def number_for_metrics(seed): return problem(lambda model, batch: (model(batch[0]).sum(), 3))
def words_for_metrics(seed): return problem(lambda model, batch: (model(batch[0]).sum(), {"a": "b"}))
def wrong_shape(seed): return problem(lambda model, batch: model(batch[0][:, :2]).sum())
def constant(seed): return problem(lambda model, batch: model(batch[0]).sum().detach())
""",
}

# A line, and words of the answer.  `run` is a whole run, `unfinished` one without a checkpoint, `file` a file, `folder`
# one that holds something else.
TRAIN = [
    ("", "the following arguments are required: COMMAND"),
    ("fly", "invalid choice: 'fly'"),
    ("list seed=1", "unrecognized arguments: seed=1"),
    ("list --fast", "unrecognized arguments: --fast"),
    ("show", "required: RECIPE\n"),
    ("show smok", "unknown recipe 'smok': valid are smoke, flat-v2"),
    ("show smoke speed=1", "unknown key 'speed': valid are recipe, rule"),
    ("show smoke seed", "'seed' is not of the form key=value"),
    ("show smoke seed=", "seed must be an integer"),
    ("show smoke seed=1.5", "seed must be an integer"),
    ("show smoke seed=-1", "seed must be an integer of at least 0"),
    ("show smoke num_updates=0", "num_updates must be an integer of at least 1, not 0"),
    ("show smoke meta_lr=nan", "meta_lr must be a number above 0"),
    ("show smoke meta_lr=-1", "meta_lr must be a number above 0"),
    ("show smoke tensorboard=maybe", "tensorboard must be true or false"),
    ("show smoke rule=nope", "unknown rule 'nope': valid are adam"),
    ("show smoke rule_options.nope=1", "unknown key 'rule_options.nope'"),
    ("show smoke tasks.nope.num_tasks=3", "valid are tasks.tabular.KEY"),
    ("show smoke tasks.tabular.num_tasks=0", "tasks.tabular.num_tasks must be an integer of at least 1"),
    ("show smoke tasks.tabular.min_steps=30 tasks.tabular.max_steps=2", "max_steps must be at least min_steps"),
    ("show smoke estimator=3", "estimator must be an object"),
    ("show smoke estimator.name=guess", "estimator.name must be one of persistent-es"),
    ("show smoke estimator.std=0", "estimator.std must be a number above 0"),
    ("show smoke objective.flatness.name=nope", "unknown name 'nope' of a measure"),
    ("show smoke objective.flatness.options.nope=1", "options need a name of a measure"),
    ("show smoke objective.flatness.name=local-entropy", "use 'perturbation-gap'"),
    ("run smoke", "required: --out"),
    ("run smok --out new", "unknown recipe 'smok'"),
    ("run smoke --out new --fast", "unrecognized arguments: --fast"),
    ("run smoke --out new --device nowhere", "device 'nowhere' cannot be used"),
    ("run smoke --out new --device meta", "device 'meta' cannot be used"),
    ("run smoke --out new rule=adam", "no weights to learn"),
    ("run smoke --out file", "file is not a folder"),
    ("run smoke --out file/below", "file is not a folder"),
    ("run smoke --out file/below --dry-run", "file is not a folder"),
    ("run smoke --out folder", "folder is not empty"),
    ("run smoke --out run", "go on with: flatopt-train resume run"),
    ("run smoke --out run --dry-run", "go on with: flatopt-train resume run"),
    ("resume nowhere", "no whole checkpoint in nowhere/checkpoints"),
    ("resume unfinished", "no whole checkpoint in unfinished/checkpoints"),
    ("resume file", "no whole checkpoint"),
    ("resume run seed=2", "only num_updates, schedule_updates"),
    ("resume run num_updates=x", "num_updates must be an integer"),
    ("resume run --device nowhere", "device 'nowhere' cannot be used"),
    ("plot nowhere", "nothing to draw"),
    ("plot run --to folder", "--to must name a figure"),
    ("plot run --to figure.nope", "Format 'nope' is not supported"),
    ("plot run --to file/figure.png", "file/figure.png"),
    ("export nowhere --to new", "no whole checkpoint"),
    ("export run", "required: --to"),
    ("export run --to folder", "not part of a saved rule: not replacing it"),
    ("export run --to file", "file exists and is not a folder"),
    ("import nowhere --rule l2o-dm --to new", "nowhere: no such file"),
    ("import file --rule l2o-dm --to new", "file: not a pickle of arrays"),
    ("import file --rule nope --to new", "invalid choice: 'nope'"),
    ("push nowhere org/name", "'nowhere' is neither shipped weights"),
    ("push run org/name", "flatopt-train export run --to FOLDER"),
    ("push l2o-dm name", "repo_id must be 'org/name', got 'name'"),
    ("push l2o-dm org/name --pr --tag v1", "tag='v1' cannot be used with it"),
    ("push l2o-dm org/name --pr --revision b", "revision='b' cannot be used with it"),
    ("show smoke =3", "unknown key ''"),
    ("show smoke num_updates=1e3", "num_updates must be an integer of at least 1"),
    ("show smoke num_updates=99999999999", "below 2147483648, not 99999999999"),
    ("show smoke meta_lr=1e400", "meta_lr must be a number above 0, not inf"),
    ("show smoke meta_lr_final_fraction=2", "meta_lr_final_fraction must be a number of at least 0 and at most 1"),
    ("show smoke seed=99999999999999999999", "below 9223372036854775808"),
    ("show smoke seed=true", "seed must be an integer"),
    ('show smoke rule_options=\'{"betas": [0.9, 0.9], "betas": [0.8, 0.9]}\'', "duplicate key 'betas'"),
    (f"show smoke rule_options.betas={'[' * 10_000}", "rule_options.betas: not valid JSON"),
    ("show smoke ema_decay=1.5", "ema_decay must be a number of at least 0 and below 1"),
    ("show smoke max_grad_norm=0", "max_grad_norm must be a number above 0 or none"),
    ("show smoke warmup_updates=-1", "warmup_updates must be an integer of at least 0"),
    ("show smoke schedule_updates=0", "schedule_updates must be an integer of at least 1 or none"),
    ("show smoke checkpoint_every=-1", "checkpoint_every must be an integer of at least 0"),
    ("show smoke checkpoint_every_seconds=-1", "checkpoint_every_seconds must be a number of at least 0"),
    ("show smoke log_every=0", "log_every must be an integer of at least 1"),
    ("show smoke compile=1", "compile must be true or false, not 1"),
    ("show smoke meta_optimizer=sgd", "meta_optimizer must be one of adam, not"),
    ("show smoke tasks=[]", "tasks must name at least one family"),
    ("show smoke tasks=[{}]", "missing key 'tasks[0].name'"),
    ("show smoke tasks=mlp", "tasks must be a list, not 'mlp'"),
    ("show smoke tasks.tabular=3", "unknown key 'tasks.tabular'"),
    ("show smoke tasks.tabular.weight=0", "tasks.tabular.weight must be a number above 0"),
    ("show smoke tasks.tabular.num_train=0", "tasks.tabular.num_train must be an integer of at least 1 or none"),
    ("show smoke tasks.tabular.unknown_horizon_probability=2", "of at least 0 and at most 1"),
    ("show smoke tasks.tabular.random_scaling=20", "of at least 0 and below 20"),
    ("show smoke rule_options.betas=0.9", "rule_options.betas must be a list of 2"),
    ("show smoke estimator.truncation_length=0", "estimator.truncation_length must be an integer of at least 1"),
    ("show smoke estimator.families_per_update=7", "must be at most the number of tasks, not 7"),
    ("show smoke estimator.second_derivatives=true", "persistent-es has no use for second_derivatives"),
    ("show smoke estimator.only=x", "estimator.only must be a list"),
    ("show smoke objective.meta_split=test", "objective.meta_split must be one of meta, train"),
    ("show smoke objective.flatness.fraction=2", "objective.flatness.fraction must be a number above 0 and at most 1"),
    ("show smoke objective.flatness.every=0", "objective.flatness.every must be an integer of at least 1"),
    ("show smoke imitation.probabilities=[2]", "imitation.probabilities[0] must be a number"),
    ("show smoke 'imitation.teachers=[\"sgd\"]'", "imitation.teachers[0] must be one of adam, rmsprop"),
    ("show smoke curriculum.stages=[10,5]", "stages must increase"),
    ("show smoke curriculum.stages=[5,10]", "validate_every must be at least 1 with a curriculum"),
    ("show smoke validation.patience=0", "validation.patience must be an integer of at least 1 or none"),
    ("show l2o-dm tasks.tabular.num_tasks=3", "valid are tasks.mnist-mlp.KEY"),
    ("show smoke smoke", "'smoke' is not of the form key=value"),
    ("run --out new", "required: RECIPE"),
    ("resume run num_updates=1", "num_updates must be at least 2, which are done, not 1"),
    ("resume run =", "unknown key ''"),
    ("plot run --to", "--to: expected one argument"),
    ("plot run --to no/such/folder.png", "No such file or directory: 'no/such/folder.png'"),
    ("export run --to run", "run holds 'checkpoints'"),
    ("export run --to run/checkpoints", "not part of a saved rule: not replacing it"),
    ("speed --rounds 1.5", "invalid int value: '1.5'"),
    ("import run --rule l2o-dm --to new", "run: no such file"),
    ("import file --rule l2o-scale --to new", "invalid choice: 'l2o-scale'"),
    ("push flat-v2", "required: org/name"),
    ("push '' org/name", "'' is neither shipped weights"),
    ("push flat-v2 https://huggingface.co/org/name", "repo_id must be 'org/name'"),
    ("push flat-v2 'org/name '", "repo_id must be 'org/name'"),
    ("push flat-v2 org/name --tag 'a b'", "tag must be the name of a branch, tag or commit, got 'a b'"),
    ("push flat-v2 org/name --revision ''", "revision must be the name"),
    ("--import", "--import: expected one argument"),
    ("--import '' list", "'' is not the name of a module"),
    ("--import ./problems.py list", "'./problems.py' is not the name of a module"),
    ("--import problems.py list", "'problems.py' is not the name of a module"),
    ("--import nowhere list", "--import nowhere: No module named 'nowhere'"),
    ("--import broken list", "SyntaxError in broken.py, line 1"),
    ("--import failing list", "ZeroDivisionError in failing.py, line 1: division by zero"),
]

EVALUATE = [
    ("", "the following arguments are required: command"),
    ("nonsense", "invalid choice: 'nonsense'"),
    ("quality --seeds 0", "must be at least 1, not 0"),
    ("quality --seeds x", "invalid integer value: 'x'"),
    ("quality --jobs -1", "must be at least 1, not -1"),
    ("quality --split train", "invalid choice: 'train'"),
    ("quality --tasks nonsense --out new", "no task has 'nonsense' in its name: there are digits MLP"),
    ("quality --optimizers nonsense --out new", "no optimizer has 'nonsense' in its name"),
    ("quality --fast --out new --pretrained nope", "'nope' is neither shipped weights"),
    ("quality --fast --out new --pretrained run", "flatopt-train export run --to FOLDER"),
    ("quality --fast --out file", "file is not a folder"),
    ("quality --fast --out file/below", "file is not a folder"),
    ("quality --fast --out file --cache folder", "file is not a folder"),
    ("quality --fast --out new --cache file", "file is not a folder"),
    ("flatness --tasks nonsense --out new", "no task has 'nonsense'"),
    ("robustness --fast --out new --pretrained nope", "'nope' is neither shipped weights"),
    ("step-time --fast --out new --pretrained nope", "'nope' is neither shipped weights"),
    ("ablation --fast --out new --sets nope", "nope"),
    ("reproduction --fast --out new --sets nope", "nope"),
    ("reproduction --fast --out new --tasks nope", "no optimizee has 'nope' in its name: there are ReLU MLP"),
    ("compare", "the following arguments are required: make"),
    ("compare problems --out new", "module:function, not 'problems'"),
    ("compare nowhere:make --out new", "No module named 'nowhere'"),
    ("compare broken:make --out new", "SyntaxError in broken.py, line 1"),
    ("compare failing:make --out new", "ZeroDivisionError in failing.py, line 1"),
    ("compare problems:nope --out new", "problems has no function 'nope'"),
    ("compare problems:number --out new", "problems has no function 'number'"),
    ("compare problems:make --out new", "must return (model, train, test, loss_fn), not int"),
    ("compare problems:fails --out new", "RuntimeError in problems.py, line 3: no such data"),
    ("compare problems:takes_nothing --out new", "takes 0 positional arguments but 1 was given"),
    ("quality --tasks", "--tasks: expected at least one argument"),
    ("quality --seeds 1.5", "invalid integer value: '1.5'"),
    ("quality --fast --out new --pretrained file", "'file' is neither shipped weights"),
    ("reproduction --data cifar", "invalid choice: 'cifar'"),
    ("reproduction --split train", "invalid choice: 'train'"),
    ("reproduction --fast --out new --sets run", "flatopt-train export run --to FOLDER"),
    ("step-time --fast --out new --device nowhere", "device 'nowhere' cannot be used"),
    ("step-time --fast --out new --device meta", "device 'meta' cannot be used"),
    ("step-time --models nope", "unrecognized arguments: --models nope"),
    ("compare :make --out new", "module:function, not ':make'"),
    ("compare problems: --out new", "module:function, not 'problems:'"),
    ("compare ./problems.py:make --out new", "'./problems.py' is not the name of a module"),
    ("compare problems:three --out new", "must return (model, train, test, loss_fn), not tuple"),
    ("compare problems:no_model --out new", "(model, train, test, loss_fn), not str, list, list, function"),
    ("compare problems:no_loss --out new", "(model, train, test, loss_fn), not Linear, list, list, int"),
    ("compare problems:no_batch --out new", "the training data hold no batch"),
    ("compare problems:no_test --out new --steps 1", "the test data hold no batch"),
    ("compare problems:read_once --out new --steps 3", "or can be read only once"),
    ("compare problems:vector --out new", "loss_fn must return a 0-D tensor"),
    ("compare problems:number_for_loss --out new", "loss_fn must return a 0-D tensor"),
    ("compare problems:number_for_metrics --out new", "(0-D tensor, dictionary of numbers)"),
    ("compare problems:words_for_metrics --out new", "(0-D tensor, dictionary of numbers)"),
    ("compare problems:wrong_shape --out new", "loss_fn failed: RuntimeError in problems.py, line 21: mat1"),
    ("compare problems:constant --out new", "depends on the parameters of the model"),
    ("compare problems:good --lrs 0 --out new", "--lrs must be above 0, not 0"),
    ("compare problems:good --lrs nan --out new", "--lrs must be above 0, not nan"),
    ("compare problems:good --pretrained nope --out new", "'nope' is neither shipped weights"),
    ("compare problems:make --lrs x --out new", "--lrs must be numbers, not 'x'"),
    ("compare problems:make --steps 0 --out new", "must be at least 1, not 0"),
]

DEMO = [
    ("--seeds 0", "must be at least 1, not 0"),
    ("--steps 0", "must be at least 1, not 0"),
    ("--out file", "file"),
    ("--steps x", "invalid integer value: 'x'"),
    ("--pretrained run", "flatopt-train export run --to FOLDER"),
    ("--pretrained nope", "'nope' is neither shipped weights"),
]

PACKAGE = [
    ("fly", "unknown command 'fly': valid are train, eval, demo"),
    ("train show smok", "unknown recipe 'smok'"),
    ("--nope", "'--nope'"),
    ("''", "unknown command ''"),
]

Main = Callable[[list[str]], Any]
COMMANDS: list[tuple[Main, list[tuple[str, str]]]] = [
    (train, TRAIN),
    (evaluate, EVALUATE),
    (demo.main, DEMO),
    (package, PACKAGE),
]
LINES = [(main, line, words) for main, rows in COMMANDS for line, words in rows]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with what the lines name, and modules of a user."""
    folder = tmp_path_factory.mktemp("room")
    before, path = os.getcwd(), list(sys.path)
    os.chdir(folder)
    assert train(["run", "smoke", "num_updates=2", "--out", "run"]) == 0
    (folder / "unfinished" / "checkpoints").mkdir(parents=True)
    (folder / "folder").mkdir()
    for name in ("file", "folder/something"):
        (folder / name).write_text("something else")
    for name, source in MODULES.items():
        (folder / f"{name}.py").write_text(source.removeprefix("\n"))
    importlib.invalidate_caches()
    yield folder
    os.chdir(before)
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("main", "line", "words"), LINES, ids=lambda value: getattr(value, "__module__", None))
def test_a_wrong_line_gets_one_line_and_code_2(
    main: Main, line: str, words: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in room.rglob("*") if "__pycache__" not in path.parts)
    capsys.readouterr()
    try:
        code = main(shlex.split(line))
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and words in error, error
    if not error.startswith("usage: "):  # argparse says first what may be typed
        assert error.count("\n") == 1
    if main is train:  # and nothing was begun
        assert sorted(path for path in room.rglob("*") if "__pycache__" not in path.parts) == before


def model() -> nn.Linear:
    return nn.Linear(3, 2)


def optimizer(params: Any = None, **options: Any) -> FlatOpt:
    return FlatOpt(model().parameters() if params is None else params, **options)


def state_of_adam() -> dict[str, Any]:
    module = model()
    adam = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    adam.step()
    return adam.state_dict()


X, Y = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
ONES = {"x": torch.ones(2)}


def square(params: dict[str, torch.Tensor]) -> torch.Tensor:
    return params["x"].square().sum()


INVALID: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no parameters", lambda: optimizer([]), ValueError, "empty parameter list"),
    ("a module for parameters", lambda: optimizer(model()), TypeError, "not iterable"),
    ("a tensor for parameters", lambda: optimizer(X), TypeError, "iterable of Tensors"),
    ("names for parameters", lambda: optimizer(model().state_dict()), TypeError, "is str"),
    ("a product", lambda: optimizer([nn.Parameter(X) * 2]), ValueError, "non-leaf"),
    ("lr of the wrong sign", lambda: optimizer(lr=-1), ValueError, "Invalid learning rate: -1"),
    ("lr not a number", lambda: optimizer(lr=float("nan")), ValueError, "Invalid learning rate: nan"),
    ("lr as text", lambda: optimizer(lr="1"), ValueError, "Invalid learning rate: '1'"),
    ("lr of two", lambda: optimizer(lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
    ("weight decay below 0", lambda: optimizer(weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    ("no steps", lambda: optimizer(num_steps=0), ValueError, "num_steps value: 0, must be an integer >= 1"),
    ("half a step", lambda: optimizer(num_steps=1.5), ValueError, "num_steps value: 1.5, must be an integer"),
    ("steps as text", lambda: optimizer(num_steps="10"), ValueError, "num_steps value: '10', must be an integer"),
    ("half a step later", lambda: optimizer().set_num_steps(1.5), ValueError, "must be an integer"),
    ("seed below 0", lambda: optimizer(seed=-1), ValueError, "Invalid seed value: -1"),
    ("an option of Adam", lambda: optimizer(betas=(0.9, 0.99)), TypeError, "'betas'"),
    (
        "int8 state",
        lambda: optimizer(pretrained="l2o-dm", state_dtype=torch.int8),
        ValueError,
        "must be torch.bfloat16",
    ),
    ("state not to shorten", lambda: optimizer(state_dtype=torch.bfloat16), ValueError, "needs full precision"),
    ("lr of a group", lambda: optimizer([{"params": [nn.Parameter(X)], "lr": -1}]), ValueError, "in parameter group 0"),
    (
        "weights by number",
        lambda: optimizer(pretrained=3),
        TypeError,
        "must be a name, a folder or 'org/name', not int",
    ),
    ("a rule alone", lambda: optimizer(pretrained=L2ODM()), TypeError, "LearnedRule(L2ODM(), L2ODM().init_weights())"),
    ("a misspelled name", lambda: optimizer(pretrained="l2o-dn"), ValueError, "did you mean 'l2o-dm'"),
    ("a file of weights", lambda: optimizer(pretrained="weights.pt"), ValueError, "neither shipped weights"),
    ("an address", lambda: load_pretrained("https://hub/org/name"), ValueError, "nor a Hub repository 'org/name'"),
    ("a revision of shipped weights", lambda: optimizer(revision="v1"), ValueError, "needs a Hub repository"),
    ("a folder of something else", lambda: load_pretrained("folder"), FileNotFoundError, "config.json: no such file"),
    ("a run", lambda: load_pretrained("run"), FileNotFoundError, "flatopt-train export run"),
    (
        "a revision of weights in memory",
        lambda: optimizer(pretrained=load_pretrained("l2o-dm"), revision="v1"),
        ValueError,
        "pretrained is a LearnedRule",
    ),
    (
        "what is not in the cache",
        lambda: load_pretrained("org/name", local_files_only=True, cache_dir="nowhere"),
        FileNotFoundError,
        "not complete in the cache",
    ),
    ("state of Adam", lambda: optimizer().load_state_dict(state_of_adam()), ValueError, "saved by another optimizer"),
    ("state of a model", lambda: optimizer().load_state_dict(model().state_dict()), ValueError, "not the state of an"),
    ("no state", lambda: optimizer().load_state_dict({}), ValueError, "'state' and 'param_groups'"),
    ("no parameters at all", lambda: FlatOpt(None), TypeError, "not iterable"),
    ("a group without parameters", lambda: FlatOpt([{"lr": 1.0}]), KeyError, "params"),
    ("a list for a group", lambda: optimizer().add_param_group([nn.Parameter(X)]), TypeError, "must be a dict"),
    ("no rate", lambda: optimizer(lr=None), ValueError, "Invalid learning rate: None"),
    ("a list of rates", lambda: optimizer(lr=[1]), ValueError, "Invalid learning rate: [1]"),
    ("no weight decay", lambda: optimizer(weight_decay=None), ValueError, "Invalid weight_decay value: None"),
    ("weight decay as text", lambda: optimizer(weight_decay="x"), ValueError, "Invalid weight_decay value: 'x'"),
    ("steps nobody can count", lambda: optimizer(num_steps=float("nan")), ValueError, "num_steps value: nan"),
    ("steps below 0", lambda: optimizer(num_steps=-1), ValueError, "num_steps value: -1"),
    ("half a seed", lambda: optimizer(seed=1.5), ValueError, "Invalid seed value: 1.5"),
    ("a dtype as text", lambda: optimizer(pretrained="l2o-dm", state_dtype="bf16"), ValueError, "state_dtype value"),
    ("no weights to load", lambda: optimizer(pretrained=None), TypeError, "not NoneType"),
    ("the class of a rule", lambda: optimizer(pretrained=L2ODM), TypeError, "LearnedRule(L2ODM(), L2ODM().init"),
    ("a revision by number", lambda: load_pretrained("org/name", revision=3), ValueError, "revision must be"),
    ("an empty revision", lambda: load_pretrained("org/name", revision=""), ValueError, "revision must be"),
    ("a repository by number", lambda: push_to_hub("l2o-dm", 3), ValueError, "repo_id must be"),  # type: ignore[arg-type]
    ("nothing to push", lambda: push_to_hub(None, "org/name"), TypeError, "not NoneType"),  # type: ignore[arg-type]
    (
        "weights as text",
        lambda: LearnedRule(L2ODM(), dict.fromkeys(L2ODM().init_weights(), "x")),  # type: ignore[arg-type]
        TypeError,
        "must be a tensor, not str",
    ),
    ("a folder below a file", lambda: load_pretrained("l2o-dm").save_pretrained("file/x"), FileExistsError, "file"),
    ("a file for a folder", lambda: load_pretrained("l2o-dm").save_pretrained("file"), FileExistsError, "not a folder"),
    ("no model", lambda: flatness.flatness_of(None, cross_entropy, (X, Y)), TypeError, "in this order"),  # type: ignore[arg-type]
    ("no data", lambda: flatness.flatness_of(model(), cross_entropy, None), TypeError, "in this order"),  # type: ignore[arg-type]
    ("no batch", lambda: flatness.flatness_of(model(), cross_entropy, []), ValueError, "at least one batch"),
    (
        "a batch of three",
        lambda: flatness.flatness_of(model(), cross_entropy, (X, Y, Y)),
        ValueError,
        "(inputs, targets)",
    ),  # type: ignore[arg-type]
    ("no parameters to bend", lambda: flatness.top_eigenvalue(square, {}), ValueError, "at least one scalar"),
    ("a rho of 0", lambda: flatness.sam_gap(square, ONES, rho=0), ValueError, "rho must be > 0, got 0"),
    ("no Lanczos steps", lambda: flatness.spectral_density(square, ONES, num_lanczos=0), ValueError, "num_lanczos"),
    (
        "state of fewer parameters",
        lambda: optimizer().load_state_dict(optimizer([nn.Parameter(X)]).state_dict()),
        ValueError,
        "doesn't match the size",
    ),
    ("a repository without owner", lambda: push_to_hub("l2o-dm", "name"), ValueError, "repo_id must be 'org/name'"),
    (
        "a tag of a pull request",
        lambda: push_to_hub("l2o-dm", "org/name", tag="v1", create_pr=True),
        ValueError,
        "cannot be used with it",
    ),
    ("a rule to push", lambda: push_to_hub(L2ODM(), "org/name"), TypeError, "must be a name, a folder"),  # type: ignore[arg-type]
    ("no weights", lambda: LearnedRule(L2ODM(), {}), ValueError, "missing 'lstm_0.bias'"),
    ("no rule", lambda: LearnedRule(None, {}), TypeError, "takes an UpdateRule"),  # type: ignore[arg-type]
    ("another's folder", lambda: load_pretrained("l2o-dm").save_pretrained("folder"), FileExistsError, "not replacing"),
    ("a list of tensors", lambda: flatness.top_eigenvalue(square, [X]), TypeError, "dict of tensors by name, not list"),
    ("a module", lambda: flatness.sam_gap(square, model()), TypeError, "flatness_of(module, criterion, data)"),
    ("no tensor", lambda: flatness.hutchinson_trace(square, {}), ValueError, "at least one scalar"),
    (
        "a loss for each",
        lambda: flatness.gradient_norm(lambda p: p["x"], ONES),
        ValueError,
        "0-D tensor, got shape (2,)",
    ),
    ("a loss as float", lambda: flatness.gradient_norm(lambda p: 1.0, ONES), ValueError, "0-D tensor, got float"),
    ("no probe", lambda: flatness.hutchinson_trace(square, ONES, num_matvecs=0), ValueError, "num_matvecs must be > 0"),
    ("no such order", lambda: flatness.top_eigenvalue(square, ONES, which="max"), ValueError, "which must be"),
    ("a radius below 0", lambda: flatness.sam_gap(square, ONES, rho=-1), ValueError, "rho must be > 0"),
    ("no data", lambda: flatness.flatness_of(model(), cross_entropy, []), ValueError, "at least one batch"),
    ("inputs alone", lambda: flatness.flatness_of(model(), cross_entropy, X), ValueError, "(inputs, targets)"),
    ("changed places", lambda: flatness.flatness_of(cross_entropy, model(), (X, Y)), TypeError, "in this order"),
    (
        "nothing to train",
        lambda: flatness.flatness_of(nn.ReLU(), cross_entropy, (X, Y)),
        ValueError,
        "at least one par",
    ),
]


@pytest.mark.parametrize(("call", "kind", "words"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID])
def test_a_wrong_call_raises_what_is_documented(
    call: Callable[[], Any], kind: type[Exception], words: str, room: Path
) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind and words in message and "\n" not in message


def test_there_are_enough_wrong_lines_and_each_stands_once() -> None:
    assert len(LINES) >= 60 and len(INVALID) >= 40
    assert len({(main, line) for main, line, _ in LINES}) == len(LINES)
