"""The Hub client is exercised for real against a loopback server, in processes whose environment points to it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import torch

from flatopt import pretrained
from flatopt._cards import address, model_card, write_card
from flatopt.pretrained import LearnedRule, list_pretrained, load_pretrained, shipped_folder
from flatopt.rules import OrthogonalizedMomentum

TESTS = Path(__file__).parent

PREAMBLE = """
import contextlib, io, json, sys, tempfile, time
from flatopt.pretrained import LearnedRule, list_pretrained, load_folder, load_pretrained, push_to_hub, weights_sha256
from flatopt.rules import Adam
with tempfile.TemporaryDirectory() as folder:
    LearnedRule(Adam(), {}).save_pretrained(folder)
    for source in [folder, *list_pretrained()]:
        load_pretrained(source)
hub_is_loaded_by_local_weights = "huggingface_hub" in sys.modules
time.sleep = lambda seconds: None  # the client waits between its attempts to connect
def load(*args, **kwargs):
    learned = load_pretrained(*args, **kwargs)
    return [weights_sha256(learned.weights), learned.commit, learned.name, learned.card]
for line in sys.stdin:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            reply = {"value": eval(json.loads(line))}
    except Exception as error:
        reply = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    print(json.dumps({**reply, "printed": printed.getvalue()}), flush=True)
"""


class Client:
    """A Python process with flatopt that evaluates expressions."""

    def __init__(self, home, **environment):
        self.log = open(home / f"stderr-{len(list(home.iterdir()))}.txt", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
                "HF_HOME": str(home / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
                **environment,
            },
        )

    def ask(self, expression):
        self.process.stdin.write(json.dumps(expression) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def value(self, expression):
        reply = self.ask(expression)
        assert "value" in reply, reply
        assert reply["printed"] == ""
        return reply["value"]

    def refusal(self, expression, kind, *words):
        """Assert that the expression raises ``kind`` with all ``words`` in its message."""
        reply = self.ask(expression)
        assert kind.__name__ in reply.get("error", []), reply
        for word in words:
            assert word in reply["message"], reply
        assert "\n" not in reply["message"]

    def close(self):
        self.process.stdin.close()
        self.process.kill()  # it has nothing to finish, and leaving torch takes seconds
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def running_server():
    server = hub_server.HubServer()
    yield server
    server.close()


@pytest.fixture
def server(running_server):
    running_server.repos.clear()
    running_server.log.clear()
    running_server.before = lambda method, path: None
    return running_server


@pytest.fixture(scope="module")
def clients(home, running_server):
    clients = [
        Client(home, HF_ENDPOINT=running_server.url, HF_TOKEN=hub_server.TOKEN),
        Client(home, HF_ENDPOINT=running_server.url, HF_HUB_OFFLINE="1"),
        Client(home, HF_ENDPOINT="http://127.0.0.1:9"),  # the discard port: nothing listens
    ]
    yield clients
    for client in clients:
        client.close()


@pytest.fixture
def client(clients):
    return clients[0]


@pytest.fixture
def offline_client(clients):
    return clients[1]


@pytest.fixture
def stranded_client(clients):
    return clients[2]


def make_learned(seed=0, card=""):
    rule = OrthogonalizedMomentum()
    return LearnedRule(rule, rule.init_weights(torch.Generator().manual_seed(seed)), card)


def files_of(learned, folder):
    learned.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def sha_of(learned):
    return pretrained.weights_sha256(learned.weights)


@pytest.fixture
def published(server, tmp_path):
    """A repository with one commit."""
    repo = server.repos["org/flat"] = hub_server.Repo()
    learned = make_learned(1, "# Card")
    return repo, learned, repo.commit(files_of(learned, tmp_path / "published"))


def test_pushed_rule_comes_back_whole_from_one_commit(server, client, tmp_path):
    learned = make_learned(3)
    learned.save_pretrained(tmp_path / "rule")
    url, commit, _ = client.value(
        f"list(load_folder({str(tmp_path / 'rule')!r}).push_to_hub('org/new', private=True, commit_message='First'))"
    )
    repo = server.repos["org/new"]
    assert repo.private
    assert repo.messages == ["", "First"], "creation, then one single commit"
    assert url.endswith(f"/org/new/commit/{commit}")
    assert set(repo.commits[commit]) == {"model.safetensors", "config.json", "README.md"}
    sha, loaded_commit, name, card = client.value(f"load('org/new', cache_dir={str(tmp_path / 'cache')!r})")
    assert (sha, loaded_commit, name) == (sha_of(learned), commit, "org/new")
    assert card.startswith("---\nlibrary_name: flatopt\n")
    assert 'pretrained="org/new"' in card


def test_push_to_branch_and_pull_request_leave_main_alone(server, client, tmp_path):
    make_learned(1).save_pretrained(tmp_path / "rule")
    push = f"list(load_folder({str(tmp_path / 'rule')!r}).push_to_hub('org/new', %s))"
    _, commit, _ = client.value(push % "revision='trial'")
    repo = server.repos["org/new"]
    assert repo.branches["trial"] == commit
    assert repo.commits[repo.branches["main"]] == {}
    url, commit, _ = client.value(push % "create_pr=True")
    assert url.endswith("/discussions/1")
    assert repo.branches["refs/pr/1"] == commit
    assert repo.commits[repo.branches["main"]] == {}


def test_the_command_line_pushes_a_folder_and_says_how_to_load_it(server, client, tmp_path):
    make_learned(2).save_pretrained(tmp_path / "rule")
    command = ["push", str(tmp_path / "rule"), "org/new", "--revision", "trial", "--tag", "v1.0", "--private"]
    reply = client.ask(f"__import__('flatopt.metatrain.cli').metatrain.cli.main({command!r})")
    repo = server.repos["org/new"]
    commit = repo.tags["v1.0"]
    assert reply["value"] == 0 and repo.private and repo.branches["trial"] == commit
    url, usage = reply["printed"].splitlines()
    assert url.endswith(f"/org/new/commit/{commit}")
    assert usage == f'use it with: flatopt.FlatOpt(model.parameters(), pretrained="org/new", revision="{commit}")'
    reply = client.ask(f"__import__('flatopt.metatrain.cli').metatrain.cli.main({[*command[:3], '--pr']!r})")
    assert reply["value"] == 0 and repo.branches["refs/pr/1"] in reply["printed"]


def test_a_push_without_a_recipe_deletes_the_one_of_earlier_weights_and_nothing_else(server, client, tmp_path):
    for name, training in (("old", {"seed": 1}), ("new", {})):
        dataclasses.replace(make_learned(), training=training).save_pretrained(tmp_path / name)
    push = "push_to_hub({!r}, 'org/new', revision={!r}).commit"
    for branch in ("main", "trial"):
        first = client.value(push.format(str(tmp_path / "old"), branch))
        repo = server.repos["org/new"]
        assert "training.json" in repo.commits[first]
        repo.commit({**repo.commits[first], "curve.png": b"mine"}, branch)
        pushed = repo.commits[client.value(push.format(str(tmp_path / "new"), branch))]
        assert set(pushed) == {"model.safetensors", "config.json", "README.md", "curve.png"}
    loaded = f"load_pretrained('org/new', cache_dir={str(tmp_path / 'cache')!r}).training"
    assert client.value(loaded) == {}


def test_push_refusals_name_the_repository(server, client, stranded_client, tmp_path):
    make_learned().save_pretrained(tmp_path / "rule")
    push = f"load_folder({str(tmp_path / 'rule')!r}).push_to_hub(%s)"
    client.refusal(push % "'org/new', token='hf_wrong'", PermissionError, "'org/new'")
    client.refusal(push % "'bare-name'", ValueError, "'bare-name'")
    client.refusal(push % "'org/new', revision='x', create_pr=True", ValueError, "pull request")
    stranded_client.refusal(push % "'org/new', token='hf_test'", ConnectionError, "'org/new'")


def test_cached_commit_needs_no_request(server, client, published, tmp_path):
    _, learned, commit = published
    pinned = f"load('org/flat', revision={commit!r}, cache_dir={str(tmp_path / 'cache')!r})"
    first = client.value(pinned)
    assert first == [sha_of(learned), commit, "org/flat", "# Card"]
    server.log.clear()
    assert client.value(pinned) == first
    # Older clients keep no listing of the repository beside the files.
    shutil.copytree(tmp_path / "cache", tmp_path / "older", symlinks=True, ignore=shutil.ignore_patterns("trees"))
    assert client.value(pinned.replace("/cache'", "/older'")) == first
    assert server.log == []


def test_what_a_download_that_broke_off_left_out_is_fetched_later(
    server, client, offline_client, stranded_client, published, tmp_path
):
    _, learned, commit = published
    cache = tmp_path / "cache"
    pinned = f"load('org/flat', revision={commit!r}, cache_dir={str(cache)!r}%s)"
    whole = client.value(pinned % "")
    (card,) = cache.rglob("README.md")
    card.unlink()
    for listing in cache.rglob("trees"):  # which older clients do not keep
        shutil.rmtree(listing)
    for process, argument, _ in without_network(client, offline_client, stranded_client):
        assert process.value(pinned % argument) == [*whole[:3], ""]
    assert client.value(pinned % "") == whole
    server.log.clear()
    assert client.value(pinned % "") == whole
    assert server.log == []


def test_files_come_from_one_commit_while_the_branch_moves(server, client, published, tmp_path):
    repo, learned, commit = published
    newer = files_of(make_learned(2), tmp_path / "newer")
    moves = []

    def move_after_config(method, path):
        if method == "GET" and path.endswith("/config.json") and not moves:
            moves.append(repo.commit(newer))

    server.before = move_after_config
    load = f"load('org/flat', cache_dir={str(tmp_path / 'cache')!r})"
    assert client.value(load)[:2] == [sha_of(learned), commit]
    assert moves, "the branch moved between the two files"
    assert client.value(load)[:2] == [sha_of(make_learned(2)), moves[0]]


def test_branches_and_tags_are_resolved(server, client, published, tmp_path):
    repo, learned, commit = published
    repo.branches["v1.0"] = commit
    repo.commit(files_of(make_learned(2), tmp_path / "newer"))
    cache = str(tmp_path / "cache")
    assert client.value(f"load('org/flat', revision='v1.0', cache_dir={cache!r})")[1] == commit
    assert client.value(f"load('org/flat', cache_dir={cache!r})")[1] != commit


def without_network(client, offline_client, stranded_client):
    """The three ways to be without network, each with the error of an incomplete cache."""
    return [
        (client, ", local_files_only=True", FileNotFoundError),
        (offline_client, "", FileNotFoundError),
        (stranded_client, "", ConnectionError),
    ]


def test_complete_cache_serves_without_network(client, offline_client, stranded_client, published, server, tmp_path):
    _, learned, commit = published
    cache = str(tmp_path / "cache")
    expected = client.value(f"load('org/flat', cache_dir={cache!r})")
    server.log.clear()
    for process, argument, _ in without_network(client, offline_client, stranded_client):
        assert process.value(f"load('org/flat', cache_dir={cache!r}{argument})") == expected
        pinned = f"load('org/flat', revision={commit!r}, cache_dir={cache!r}{argument})"
        assert process.value(pinned) == expected
    assert server.log == []


def test_empty_cache_without_network_is_a_clear_error(client, offline_client, stranded_client, tmp_path):
    for process, argument, kind in without_network(client, offline_client, stranded_client):
        for revision in ("main", "0" * 40):
            load = f"load('org/flat', revision={revision!r}, cache_dir={str(tmp_path / 'none')!r}{argument})"
            process.refusal(load, kind, "'org/flat'", repr(revision), "cache")


@pytest.mark.parametrize("fetched", ["config.json", "model.safetensors"])
def test_half_cached_commit_is_never_mixed_with_another(
    fetched, client, offline_client, stranded_client, published, tmp_path
):
    # Fetching one file of a newer commit moves refs/main, although only the older commit is complete.
    repo, learned, commit = published
    cache = str(tmp_path / "cache")
    client.value(f"load('org/flat', cache_dir={cache!r})")
    newer = repo.commit(files_of(make_learned(2), tmp_path / "newer"))
    client.ask(f"__import__('huggingface_hub').hf_hub_download('org/flat', {fetched!r}, cache_dir={cache!r})")
    for process, argument, _ in without_network(client, offline_client, stranded_client):
        process.refusal(f"load('org/flat', cache_dir={cache!r}{argument})", FileNotFoundError, "'org/flat'", newer)
        old = client.value(f"load('org/flat', revision={commit!r}, cache_dir={cache!r}{argument})")
        assert old[:2] == [sha_of(learned), commit]
    assert client.value(f"load('org/flat', cache_dir={cache!r})")[:2] == [sha_of(make_learned(2)), newer]


def test_what_does_not_exist_is_named(client, published, tmp_path):
    repo, learned, _ = published
    cache = f"cache_dir={str(tmp_path / 'cache')!r}"
    client.refusal(f"load('org/none', {cache})", FileNotFoundError, "'org/none'", "'main'")
    client.refusal(f"load('org/flat', revision='v9', {cache})", FileNotFoundError, "'org/flat'", "'v9'")
    client.refusal(f"load('org/flat', revision={'f' * 40!r}, {cache})", FileNotFoundError, "'org/flat'", "f" * 40)
    for missing in ("config.json", "model.safetensors"):
        files = files_of(learned, tmp_path / missing)
        del files[missing]
        commit = repo.commit(files)
        client.refusal(f"load('org/flat', {cache})", FileNotFoundError, "'org/flat'", missing, commit)


def test_access_rights_are_explained(client, published, tmp_path):
    repo, _, _ = published
    cache = f"cache_dir={str(tmp_path / 'cache')!r}"
    repo.private = True
    client.refusal(f"load('org/flat', token='hf_wrong', {cache})", FileNotFoundError, "'org/flat'", "private", "token")
    repo.private, repo.gated = False, True
    client.refusal(f"load('org/flat', {cache})", PermissionError, "'org/flat'", "token")
    repo.gated, repo.private = False, True
    assert client.value(f"load('org/flat', {cache})")[2] == "org/flat"


@pytest.mark.parametrize(("status", "kind"), [(401, OSError), (403, PermissionError), (503, ConnectionError)])
def test_refusing_server_is_explained(status, kind, client, server, tmp_path):
    server.before = lambda method, path: status
    client.refusal(f"load('org/flat', cache_dir={str(tmp_path / 'cache')!r})", kind, "'org/flat'", "'main'")


def test_repository_of_something_else_is_refused_before_its_weights_come(client, server, tmp_path):
    repo = server.repos["org/bert"] = hub_server.Repo()
    repo.commit({"config.json": b'{"architectures": ["Bert"]}', "model.safetensors": b"x" * 1000})
    client.refusal(
        f"load('org/bert', cache_dir={str(tmp_path / 'cache')!r})", ValueError, "'org/bert'", "format_version"
    )
    assert not any("model.safetensors" in request for request in server.log)


def test_corrupt_weights_on_the_hub_are_refused(client, published, tmp_path):
    repo, learned, _ = published
    files = files_of(learned, tmp_path / "corrupt")
    content = bytearray(files["model.safetensors"])
    content[-2] ^= 1
    commit = repo.commit({**files, "model.safetensors": bytes(content)})
    client.refusal(
        f"load('org/flat', cache_dir={str(tmp_path / 'cache')!r})",
        ValueError,
        "'org/flat'",
        commit,
        "model.safetensors",
        "weights_sha256",
    )


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped weights that holds one set."""
    make_learned(5).save_pretrained(tmp_path / "shipped" / "flat-v0")
    monkeypatch.setattr(pretrained, "_shipped_root", lambda: tmp_path / "shipped")
    return tmp_path / "shipped" / "flat-v0"


def test_shipped_weights_cannot_be_corrupted_by_callers(shipped):
    first = load_pretrained("flat-v0")
    for value in first.weights.values():
        value.fill_(7.0)
    first.metadata["seed"] = 1
    second = load_pretrained("flat-v0")
    assert sha_of(second) == sha_of(make_learned(5))
    assert second.metadata == {}
    assert (second.name, second.commit) == ("flat-v0", None)


def test_shipped_weights_load_in_milliseconds(shipped):
    def seconds():
        start = time.perf_counter()
        load_pretrained("flat-v0")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 0.02


def test_shipped_name_wins_over_a_folder(shipped, tmp_path, monkeypatch):
    make_learned(6).save_pretrained(tmp_path / "here" / "flat-v0")
    monkeypatch.chdir(tmp_path / "here")
    assert sha_of(load_pretrained("flat-v0")) == sha_of(make_learned(5))
    assert sha_of(load_pretrained("./flat-v0")) == sha_of(make_learned(6))


def test_folder_wins_over_a_repository(tmp_path, monkeypatch):
    make_learned(6).save_pretrained(tmp_path / "org" / "flat")
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("org/flat").commit is None
    assert load_pretrained(tmp_path / "org" / "flat").name == str(tmp_path / "org" / "flat")


def test_unknown_names_list_what_is_shipped(shipped, tmp_path):
    with pytest.raises(ValueError, match=r"'flat-v9'.*\(flat-v0\).*did you mean 'flat-v0'\?"):
        load_pretrained("flat-v9")
    for source in ("", "a/b/c", "../flat-v0", "/no/such", "org/..", tmp_path / "none", Path("org/flat")):
        with pytest.raises(ValueError, match="neither shipped weights"):
            load_pretrained(source)


def test_revision_without_repository_is_refused(shipped):
    for source in ("flat-v0", str(shipped), shipped):
        with pytest.raises(ValueError, match="revision='main' needs a Hub repository"):
            load_pretrained(source, revision="main")


def test_local_weights_never_load_the_hub_client(client):
    assert client.value("hub_is_loaded_by_local_weights") is False


def test_a_card_of_ones_own_is_kept_and_gets_front_matter():
    written = "---\ntags: [x]\n---\n# Mine"
    assert address(written, "org/name") == written
    assert address(written.replace("\n", "\r\n"), "org/name") == written  # as some editors save it
    card = address("# Mine", "org/name")
    assert card.startswith("---\nlibrary_name: flatopt\ntags:\n- flatopt\n")
    assert card.endswith("\n# Mine")


def test_a_card_has_the_licence_that_somebody_chose_and_no_other():
    learned = make_learned()
    written = write_card("mine", purpose="Small networks.", facts={})
    for card in ("# Mine", written, model_card(learned.rule, learned.weights)):
        assert "license" not in address(card, "org/name")
    chosen = written.replace("tags:", "license: mit\ntags:")
    assert "\nlicense: mit\n" in address(chosen, "org/name")
    for name in list_pretrained():
        assert "\nlicense: apache-2.0\n" in address(load_pretrained(name).card, "org/name")


def test_a_push_names_the_files_of_the_folder_that_it_leaves_out(server, client, tmp_path):
    make_learned().save_pretrained(tmp_path / "rule")
    for name in ("curve.png", ".gitattributes", "notes.txt"):
        (tmp_path / "rule" / name).write_text("mine")
    reply = client.ask(f"push_to_hub({str(tmp_path / 'rule')!r}, 'org/new').commit")
    assert {"curve.png", "notes.txt"}.isdisjoint(server.repos["org/new"].commits[reply["value"]])
    assert "UserWarning: " in reply["printed"] and "are: curve.png, notes.txt\n" in reply["printed"]


def test_generated_model_card_begins_with_its_use_and_describes_the_rule():
    learned = make_learned()
    card = address(model_card(learned.rule, learned.weights), "org/name")
    for item in dataclasses.fields(learned.rule):
        assert f"| `{item.name}` | `{getattr(learned.rule, item.name)}` |" in card
    assert sha_of(learned) in card
    usage = card.index('flatopt.FlatOpt(model.parameters(), pretrained="org/name")')
    assert usage < card.index("## What it is good for") < card.index("## Where it comes from")


def test_a_shipped_set_is_pushed_by_name_with_a_card_that_loads_it_from_there(server, client):
    name = list_pretrained()[0]
    url, commit, repo_id = client.value(f"list(push_to_hub({name!r}, 'org/mine'))")
    files = server.repos["org/mine"].commits[commit]
    assert files["model.safetensors"] == (shipped_folder(name) / "model.safetensors").read_bytes()
    assert 'pretrained="org/mine"' in files["README.md"].decode()
    assert f'pretrained="{name}"' not in files["README.md"].decode()


def test_the_line_after_a_push_loads_what_was_pushed_although_the_branch_moves(server, client, tmp_path):
    learned = make_learned(4)
    learned.save_pretrained(tmp_path / "rule")
    usage = client.value(f"push_to_hub({str(tmp_path / 'rule')!r}, 'org/new').usage")
    client.value(f"list(push_to_hub({list_pretrained()[0]!r}, 'org/new'))")
    arguments = usage.removeprefix("flatopt.FlatOpt(model.parameters(), pretrained=")
    assert client.value(f"load({arguments}")[0] == sha_of(learned)


@pytest.mark.parametrize(
    "options", ["tag=''", "tag='a b'", "revision=''", "revision='a..~b'", "revision=1", "tag='v\\n'"]
)
def test_what_cannot_be_a_name_is_refused_before_anything_is_published(options, server, client):
    argument = options.partition("=")[0]
    client.refusal(f"push_to_hub('l2o-dm', 'org/new', {options})", ValueError, f"{argument} must be the name")
    assert server.log == []


def test_private_is_never_published_in_public(server, client, tmp_path):
    make_learned(1).save_pretrained(tmp_path / "rule")
    push = f"push_to_hub({str(tmp_path / 'rule')!r}, 'org/new', private=%s).commit"
    first = client.value(push % "None")
    client.refusal("push_to_hub('l2o-dm', 'org/new', private=True)", ValueError, "'org/new'", "public")
    assert server.repos["org/new"].branches["main"] == first
    server.repos["org/new"].private = True
    assert client.value("push_to_hub('l2o-dm', 'org/new', private=True).commit") != first


def test_a_refused_tag_is_explained_by_the_server_in_one_line(server, client, tmp_path):
    make_learned(1).save_pretrained(tmp_path / "rule")
    server.before = lambda method, path: 400 if "/tag/" in path else None
    client.refusal(
        f"push_to_hub({str(tmp_path / 'rule')!r}, 'org/new', tag='a-b')", ValueError, "'org/new'", "Bad request"
    )


def test_a_tag_names_the_commit_once(server, client, tmp_path):
    make_learned(1).save_pretrained(tmp_path / "rule")
    push = f"list(push_to_hub({str(tmp_path / 'rule')!r}, 'org/new', %s))"
    _, commit, _ = client.value(push % "tag='v1.0'")
    cache = str(tmp_path / "cache")
    assert client.value(f"load('org/new', revision='v1.0', cache_dir={cache!r})")[1] == commit
    client.refusal(push % "tag='v1.0'", FileExistsError, "'org/new'", "'v1.0'")
    assert len(server.repos["org/new"].messages) == 2, "creation and the first push"
    client.refusal(push % "tag='v2.0', create_pr=True", ValueError, "pull request", "'v2.0'")


CARDS = {
    "generated": lambda: model_card(make_learned().rule, make_learned().weights),
    **{name: (shipped_folder(name) / "README.md").read_text for name in list_pretrained()},
}


needs_validation = pytest.mark.skipif(
    "constants.ENDPOINT" not in inspect.getsource(huggingface_hub.ModelCard.validate),
    reason="this client validates cards at huggingface.co, whatever the endpoint",
)


@needs_validation
@pytest.mark.parametrize("name", CARDS)
def test_cards_are_valid_for_the_hub(name, server, client):
    card = address(CARDS[name](), "org/name")
    client.value(f"__import__('huggingface_hub').ModelCard({card!r}).validate()")
    assert "POST /api/validate-yaml" in server.log


@needs_validation
def test_a_card_that_is_not_valid_is_refused_by_the_server_of_these_tests(server, client):
    card = "---\nlicense: none-of-them\nlibrary_name: 3\n---\n# Card"
    validate = f"__import__('huggingface_hub').ModelCard({card!r}).validate()"
    client.refusal(validate, ValueError, "license", "library_name")
