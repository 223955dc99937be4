"""The tests: pytest, on a machine without a GPU. Triton kernels run in Triton's interpreter.

On a machine with a GPU, TRITON_INTERPRET=0 pytest -k scan runs the kernels themselves.
`pytest -m slow` runs the long tests.
"""
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")   # in models this small, threads wait for each other

import functools
import io
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import sample
import scan_kernel
import train
from data import PathStar
from model_gpt import GPT, GPTConfig
from model_mamba import Mamba, MambaConfig
from scan_kernel import selective_scan

HERE = Path(__file__).parent
STAR = PathStar(2, 5, 50)
SMALL_STAR = PathStar(2, 5, 10)
LINE = "32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12"
TINY = (
    "--n_layer", 1, "--n_embd", 16, "--n_train", 200, "--n_test", 20, "--batch_size", 8,
    "--max_iters", 6, "--eval_interval", 3, "--device", "cpu",
)
WAYS = [(), ("--teacherless",), ("--reverse",), ("--only_first_hop",)]
every_way = pytest.mark.parametrize("way", WAYS, ids=" ".join)
every_model = pytest.mark.parametrize("name", train.DEFAULTS)  # a third one is held to the same
our_models = pytest.mark.parametrize("name", ["gpt", "mamba"])


def rng(seed=0):
    return np.random.default_rng(seed)


def lines_of(star, prefixes, paths):
    """The text form of graphs."""
    return [data.to_text(*graph) for graph in zip(prefixes.tolist(), paths.tolist())]


def as_graph(prefix):
    """A graph whose edges have no order."""
    return frozenset(zip(prefix[0:-3:3], prefix[1:-3:3])), prefix[-3], prefix[-2]


def as_graphs(prefixes):
    return {as_graph(prefix) for prefix in prefixes.tolist()}


def settings(*flags):
    """The settings of a run that is started with these flags."""
    args = train.make_parser().parse_args(list(map(str, flags)))
    train.resolve(args)
    return args


def small(name, star=SMALL_STAR):
    torch.manual_seed(0)
    sizes = {"n_loop": 2, "n_head": 2, "d_state": 4}
    given = [(f"--{size}", sizes[size]) for size in sizes if size in train.DEFAULTS[name]]
    flags = itertools.chain(("--model", name, "--n_layer", 2, "--n_embd", 16), *given)
    return train.build_model(settings(*flags), star)


def tokens(*shape, seed=0):
    return torch.randint(0, 14, shape, generator=torch.Generator().manual_seed(seed))


def call(module, *flags):
    """Runs a script in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
        try:
            data.run_script(module.main)
        except SystemExit as stop:
            if isinstance(stop.code, str):                      # as Python does with a message
                print(stop.code, file=sys.stderr)
                return 1
            return stop.code
        except KeyboardInterrupt:                               # it would end pytest
            raise AssertionError("Ctrl-C shows a traceback") from None
    return 0


def output(capsys, module, *flags):
    """What a script prints that ends well."""
    capsys.readouterr()
    assert call(module, *flags) == 0
    return capsys.readouterr().out


def refusal(capsys, module, *flags, code=2):
    """What a script says that refuses its flags: one line, and nothing on stdout."""
    capsys.readouterr()
    assert call(module, *flags) == code
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert code == 1 or printed.out == ""
    return printed.err


def start(script, *flags, **options):
    """Starts a script in a process, and a process group, of its own."""
    command = [sys.executable, str(HERE / script), *map(str, flags)]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, start_new_session=True, **given)


def wait_for(condition, process):
    for _ in range(60_000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise TimeoutError


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_ckpt(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function: flags -> the folder of a finished tiny run with them. No test changes it."""
    @functools.cache
    def folder(*given):
        out = tmp_path_factory.mktemp("runs") / "run"
        assert call(train, *TINY, *given, "--out_dir", out) == 0
        return out

    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """The folder of a finished tiny run, to be changed."""
    return shutil.copytree(trained(), tmp_path / "copied")


# ---- data.py


def test_the_papers_example_in_tokens():
    edges, path = data.parse_graph(LINE)
    paths = np.array([path])
    prefixes = data.prefix_tokens(STAR, np.array([edges]), paths)
    assert prefixes.tolist() == [[
        32, 3, 50, 16, 12, 50, 3, 19, 50, 32, 34, 50, 34, 6, 50, 6, 16, 50, 19, 47, 50, 47, 28, 52,
        32, 12, 51,
    ]]
    assert path == [32, 34, 6, 16, 12]
    assert (STAR.prefix_len, STAR.dollar, STAR.vocab_size) == (27, 53, 54)
    assert lines_of(STAR, prefixes, paths) == [LINE]
    assert data.to_text(prefixes[0].tolist()) == LINE.split("=")[0] + "="


@pytest.mark.parametrize("sizes", [(2, 5, 50), (1, 2, 2), (5, 3, 11), (3, 2, 200)])
@pytest.mark.parametrize("mark, end", [("", "\n"), ("\ufeff", "\r\n"), ("\ufeff\n", "\n \n\n")])
def test_drawn_graphs_are_path_stars(sizes, mark, end, tmp_path):
    """They are written, and read again by a parser that refuses anything else."""
    star = PathStar(*sizes)
    file = tmp_path / "graphs.txt"
    prefixes, paths = data.draw(star, 300, rng())
    text = mark + "".join(line + end for line in lines_of(star, prefixes, paths))
    file.write_bytes(text.encode())
    edges, read, size = data.read_graphs(file)
    assert (data.prefix_tokens(star, edges, read) == prefixes).all()
    assert (read == paths).all() and size == sizes[:2] and paths.shape == (300, star.path_len)


def assert_uniform(values, kinds):
    """A chi-square test. By chance it fails once in about 10^5 seeds."""
    counts = np.bincount(values, minlength=kinds)
    expected = len(values) / kinds
    assert len(counts) == kinds
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < (kinds - 1) + 4.5 * math.sqrt(2 * (kinds - 1)) + 10


def test_draws_are_uniform():
    star = PathStar(2, 3, 6)
    prefixes, paths = data.draw(star, 60_000, rng(1))
    tails, heads = prefixes[:, 0:-3:3], prefixes[:, 1:-3:3]
    for names in (*paths.T, tails[:, 0], heads[:, 1]):
        assert_uniform(names, 6)
    # Ordered pairs of different names: names are independent.
    a, b = paths[:, 0], paths[:, 2]
    assert_uniform(a * 5 + b - (b > a), 30)
    # The places of the two edges of the goal's arm: the edges are in random order.
    first = np.argmax((tails == paths[:, [0]]) & (heads == paths[:, [1]]), axis=1)
    second = np.argmax((tails == paths[:, [1]]) & (heads == paths[:, [2]]), axis=1)
    assert_uniform(first * 3 + second - (second > first), 12)


@pytest.mark.parametrize("sizes, count", [
    ((2, 2, 4), 24), ((1, 3, 4), 24), ((3, 2, 4), 12), ((2, 3, 5), 120),
])
def test_count_of_graphs(sizes, count):
    """Of all that are ever drawn, no matter in which order their edges are."""
    star = PathStar(*sizes)
    prefixes, _ = data.draw(star, 40 * count, rng())
    assert star.count() == count == len(as_graphs(prefixes))
    keys = data.graph_keys(star, prefixes)
    assert len(set(zip(keys, map(as_graph, prefixes.tolist())))) == len(set(keys)) == count


@pytest.mark.parametrize("sizes, n_test", [((2, 2, 4), 8), ((2, 3, 6), 20)])
def test_training_and_test_set_share_no_graph(sizes, n_test):
    """Together they are all graphs that there are."""
    count = PathStar(*sizes).count()
    star, (train_set, _), (test_set, _) = data.datasets(*sizes, count - n_test, n_test, 0)
    assert len(as_graphs(train_set)) == count - n_test and len(as_graphs(test_set)) == n_test
    assert not as_graphs(train_set) & as_graphs(test_set)
    test_keys = set(data.graph_keys(star, test_set))
    fresh, _ = data.draw_unseen(star, 10_000, rng(), test_keys, distinct=False)
    assert len(fresh) == 10_000 and as_graphs(fresh) == as_graphs(train_set)
    _, (again, _), _ = data.datasets(*sizes, count - n_test, n_test, 0)
    _, (other, _), _ = data.datasets(*sizes, count - n_test, n_test, 1)
    assert (again == train_set).all() and (other != train_set).any()
    for n_train, n_test in ((count - n_test + 1, n_test), (0, count)):
        with pytest.raises(ValueError, match=f"only {count} different graphs"):
            data.datasets(*sizes, n_train, n_test, 0)


def test_printed_graphs_are_not_those_of_a_run_with_the_same_seed(tmp_path, capsys):
    """NumPy draws the same numbers from seed s and [s, 0]. So files need a stream of their own."""
    file = tmp_path / "graphs.txt"
    sizes = ("--num_nodes", 50)
    file.write_text(output(capsys, data, "-n", 300, "--seed", 0, *sizes))
    assert output(capsys, data, "-n", 300, *sizes) == file.read_text()
    assert output(capsys, data, "-n", 300, "--seed", 1, *sizes) != file.read_text()
    _, (printed, _), _ = data.datasets(None, None, 50, None, 1, 0, train_file=file)
    _, (train_set, _), (test_set, _) = data.datasets(2, 5, 50, 300, 300, 0)
    assert len(printed) == 300
    assert not as_graphs(printed) & (as_graphs(train_set) | as_graphs(test_set))


def test_files_and_what_they_determine(tmp_path, capsys):
    train_file, test_file = tmp_path / "train.txt", tmp_path / "test.txt"
    train_lines = lines_of(STAR, *data.draw(STAR, 30, rng(1))) + [LINE]
    test_lines = lines_of(STAR, *data.draw(STAR, 10, rng(2)))
    edges = LINE.split("/")[0].split("|")                       # LINE in another order
    test_lines.append("|".join(edges[::-1]) + "/" + LINE.split("/")[1])
    train_file.write_text("\n".join(train_lines))
    test_file.write_text("\n".join(test_lines))
    star, (prefixes, _), (test_prefixes, _) = data.datasets(
        None, None, None, None, None, 0, train_file, test_file
    )
    assert (star.deg, star.path_len, star.num_nodes) == (2, 5, 50)
    assert (len(prefixes), len(test_prefixes)) == (31, 11)
    assert capsys.readouterr().err == "warning: 1 of the test graphs are training graphs\n"
    star, (prefixes, paths), (test_prefixes, _) = data.datasets(2, 5, 60, 5, 7, 0, train_file)
    assert (star.num_nodes, len(prefixes), len(test_prefixes)) == (60, 5, 7)
    assert lines_of(star, prefixes, paths) == train_lines[:5]
    assert capsys.readouterr().err == ""
    for deg, path_len in ((2, 5), (2, None), (None, 5)):
        _, (prefixes, _), test_set = data.datasets(
            deg, path_len, 50, 20, 3, 0, test_file=test_file
        )
        assert len(prefixes) == 20 and lines_of(star, *test_set) == test_lines[:3]


@pytest.mark.parametrize("line, says", [
    ("32,3|16,12", "not of the form"),
    (LINE.replace(",", ";"), "not of the form"),
    (LINE + ",", "not of the form"),
    (LINE.replace("32,3", "x,3"), "not of the form"),
    (LINE.replace("32", "9" * 5000), "not of the form"),
    (bytes(range(128)).decode(), "not of the form"),
    (LINE.replace("/32,12=32", "/9,12=9"), "no arm of the start 9"),
    (LINE.replace("47,28", "47,16"), "two lead to the same node"),
    (LINE.replace("47,28", "47,32"), "an edge leads to the start"),
    (LINE.replace("47,28", "46,28"), "some edges are on no arm"),
    (LINE.replace("47,28", "19,28"), "some edges are on no arm"),
    ("0,1|0,2|2,3/0,3=0,2,3", "arms differ in length"),
    (LINE.replace("/32,12", "/32,16"), "the goal 16 is not the end of an arm"),
    (LINE.replace("=32,34", "=32,3"), "path 32,3,6,16,12 is not the arm"),
    (LINE.replace("=32,34,6,16,12", "="), "the path is missing"),
    ("0,1|2,3|1,4|0,2/0,4=0,1,4", "a graph with path_len 3, where 5 is expected"),
])
def test_malformed_lines(line, says, tmp_path):
    (tmp_path / "graphs.txt").write_text(f"{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(ValueError, match=f"graphs.txt, line 2: .*{re.escape(says)}"):
        data.read_graphs(tmp_path / "graphs.txt")


@pytest.mark.parametrize("content, sizes, says", [
    ("", (2, 5, 50, None), "is empty"),
    ("\n\n", (2, 5, 50, None), "is empty"),
    (LINE, (2, 5, 50, 2), "has 1 graphs, fewer than the 2"),
    (LINE, (3, 5, 50, None), "line 1: a graph with deg 2, where 3 is expected"),
    (LINE, (3, None, 50, None), "deg 2, where 3 is expected"),
    (LINE, (None, 4, 50, None), "path_len 5, where 4 is expected"),
    (LINE, (2, 5, 30, None), "node 47 is out of range"),
])
def test_files_that_do_not_serve(content, sizes, says, tmp_path):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=says):
        data.datasets(*sizes, n_test=1, seed=0, train_file=tmp_path / "file")


def test_every_epoch_sees_every_graph_once():
    seen = np.concatenate([data.batch_indices(20, 8, 0, step) for step in range(5)]).tolist()
    assert Counter(seen[:20]) == Counter(seen[20:]) == Counter(range(20))
    assert seen[:20] != seen[20:]


@pytest.mark.parametrize("sizes", [(2, 5, 10), (4, 3, 12)])
def test_goals_move_to_other_arms(sizes):
    star = PathStar(*sizes)
    prefixes, paths = data.draw(star, 200, rng())
    moved, new_paths = data.move_goals(prefixes)
    assert (np.delete(moved, -2, axis=1) == np.delete(prefixes, -2, axis=1)).all()
    assert (moved[:, -2] != prefixes[:, -2]).all() and (new_paths[:, 1] != paths[:, 1]).all()
    for line in lines_of(star, moved, new_paths):
        data.parse_graph(line)                                  # refuses a wrong path
    for _ in range(star.deg - 1):
        moved, new_paths = data.move_goals(moved)
    assert (moved == prefixes).all() and (new_paths == paths).all()


def is_path_star(line):
    """Decides in another way what `parse_graph` decides: from each node back to the start."""
    edges, start, goal, path = re.fullmatch("(.*)/(.*),(.*)=(.*)", line.strip()).groups()
    edges = [[int(node) for node in edge.split(",")] for edge in edges.split("|")]
    start, goal, parent = int(start), int(goal), {head: tail for tail, head in edges}
    tails = [tail for tail, _ in edges if tail != start]
    arms = {}
    for node in parent:
        arm = [node]
        while arm[0] in parent and len(arm) <= len(edges):
            arm.insert(0, parent[arm[0]])
        if arm[0] != start:
            return False
        if node not in tails:
            arms[node] = arm
    star = start not in parent and len(parent) == len(edges) and len(set(tails)) == len(tails)
    if not star or len(set(map(len, arms.values()))) != 1 or goal not in arms:
        return False
    return path == "" or [int(node) for node in path.split(",")] == arms[goal]


def mutate(line, random):
    """Replaces, deletes, inserts or repeats a few characters."""
    for _ in range(random.integers(1, 4)):
        k, j = sorted(random.integers(len(line), size=2))
        character = "0123456789,|/= x-"[random.integers(17)]
        line = [
            line[:k] + character + line[k + 1:],
            line[:k] + line[k + 1:],
            line[:k] + character + line[k:],
            line[:k] + line[j:j + 3] + line[k:],
        ][random.integers(4)] or "0"
    return line


@pytest.mark.parametrize("n", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_lines_are_judged_rightly(n):
    random = rng()
    lines = []
    for star in (PathStar(2, 4, 12), PathStar(3, 3, 12)):
        lines += lines_of(star, *data.draw(star, 200, random))
    accepted = 0
    for _ in range(n):
        line = mutate(lines[random.integers(len(lines))], random)
        right = data.LINE.fullmatch(line.strip()) is not None and is_path_star(line)
        try:
            data.parse_graph(line)
            accepted += 1
            assert right, line
        except ValueError:
            assert not right, line
    assert accepted > n / 100


# ---- model_gpt.py, model_mamba.py


@every_model
def test_models_are_causal(name):
    """A token changes the logits at its place and behind it, and none before."""
    model, idx = small(name), tokens(2, 12)
    changed = idx.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 14
    (before, no_loss), (after, _) = model(idx), model(changed)
    assert no_loss is None and before.shape == (2, 12, 14)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=0)
    assert (before[:, 8:] != after[:, 8:]).any(dim=2).all()


@every_model
@torch.no_grad()
def test_generation_equals_the_full_pass(name):
    """Token by token, from a cache or state, the model writes what full passes write."""
    model, idx = small(name).double(), tokens(3, 9)
    full = idx
    for _ in range(6):
        logits, _ = model(full)
        full = torch.cat([full, logits[:, -1:].argmax(dim=2)], dim=1)
    assert torch.equal(model.generate(idx, 6), full)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(idx[:, :0], 1)


@our_models
@torch.no_grad()
def test_a_cache_or_state_equals_the_full_pass(name):
    model, idx = small(name).double(), tokens(3, 20)
    full, _ = model.hidden_states(idx)
    for sizes in ([12] + [1] * 8, [1] * 20, [5, 6, 9]):
        parts, states = [], None
        for part in idx.split(sizes, dim=1):
            x, states = model.hidden_states(part, states)
            parts.append(x)
        torch.testing.assert_close(torch.cat(parts, dim=1), full)


@our_models
@pytest.mark.parametrize("batch, length", [(2, 9), (40, 9), (3, 1), (3, 2), (3, 31)])
def test_gradients_of_single_examples(name, batch, length):
    """torch.func gives them all at once. One by one they are the same."""
    model, idx = small(name), tokens(batch, length)
    weights = dict(model.named_parameters())

    def loss_of(weights, example):
        return functional_call(model, weights, (example[None], example[None]))[1]

    together = vmap(grad(loss_of), in_dims=(None, 0))(weights, idx)
    for i in (0, batch - 1):
        model.zero_grad()
        model(idx[i:i + 1], idx[i:i + 1])[1].backward()
        for key, p in weights.items():
            torch.testing.assert_close(together[key][i], p.grad, rtol=1e-4, atol=1e-5)


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("n_loop", [1, 3])
def test_gpt2s_weights_load_and_do_what_gpt2_does(n_loop):
    """The weights as transformers' GPT2LMHeadModel has them, against GPT-2's equations.

    Its matrices multiply from the right ("Conv1D"). The GELU is the exact one, as in nanoGPT. In a
    loop the two blocks are run in turn.
    """
    block = {
        "ln_1.weight": (16,), "ln_1.bias": (16,), "ln_2.weight": (16,), "ln_2.bias": (16,),
        "attn.c_attn.weight": (16, 48), "attn.c_attn.bias": (48,),
        "attn.c_proj.weight": (16, 16), "attn.c_proj.bias": (16,),
        "mlp.c_fc.weight": (16, 64), "mlp.c_fc.bias": (64,),
        "mlp.c_proj.weight": (64, 16), "mlp.c_proj.bias": (16,),
    }
    shapes = {"transformer.wte.weight": (14, 16), "transformer.wpe.weight": (12, 16)}
    for i in range(2):
        shapes.update({f"transformer.h.{i}.{name}": shape for name, shape in block.items()})
    shapes.update({"transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,)})
    w = random_weights(shapes)
    w["lm_head.weight"] = w["transformer.wte.weight"]

    def norm(x, name):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    idx = tokens(1, 10)[0]
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:10]
    for i in [0, 1] * n_loop:
        pre = f"transformer.h.{i}."
        q, k, v = linear(norm(x, pre + "ln_1"), pre + "attn.c_attn").split(16, dim=1)
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            y = torch.zeros(10, 8, dtype=torch.float64)
            for t in range(10):
                weight = torch.exp(k[:t + 1, head] @ q[t, head] / math.sqrt(8))
                y[t] = weight @ v[:t + 1, head] / weight.sum()
            heads.append(y)
        x = x + linear(torch.cat(heads, dim=1), pre + "attn.c_proj")
        y = linear(norm(x, pre + "ln_2"), pre + "mlp.c_fc")
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + linear(y, pre + "mlp.c_proj")
    expected = norm(x, "transformer.ln_f") @ w["lm_head.weight"].T

    model = GPT(GPTConfig(12, 14, n_layer=2, n_head=2, n_embd=16, n_loop=n_loop)).double()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    model.load_state_dict({
        name: x.T if name.endswith(conv1d) else x for name, x in w.items()
    }, strict=True)
    torch.testing.assert_close(model(idx[None])[0][0], expected)


@pytest.mark.parametrize("n_loop", [1, 3])
def test_mambas_weights_load_and_do_what_the_paper_says(n_loop):
    """The weights as state-spaces/mamba has them, against the paper's equations."""
    mixer = {
        "A_log": (32, 4), "D": (32,), "in_proj.weight": (64, 16), "conv1d.weight": (32, 1, 4),
        "conv1d.bias": (32,), "x_proj.weight": (9, 32), "dt_proj.weight": (32, 1),
        "dt_proj.bias": (32,), "out_proj.weight": (16, 32),
    }
    shapes = {"backbone.embedding.weight": (14, 16)}
    for i in range(2):
        shapes.update({f"backbone.layers.{i}.mixer.{key}": shape for key, shape in mixer.items()})
        shapes[f"backbone.layers.{i}.norm.weight"] = (16,)
    w = random_weights(shapes | {"backbone.norm_f.weight": (16,)})
    w["lm_head.weight"] = w["backbone.embedding.weight"]

    def norm(x, name):
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    idx = tokens(1, 10)[0]
    x = w["backbone.embedding.weight"][idx]
    for i in [0, 1] * n_loop:
        p = {key: w[f"backbone.layers.{i}.mixer.{key}"] for key in mixer}
        u, z = (norm(x, f"backbone.layers.{i}.norm") @ p["in_proj.weight"].T).split(32, dim=1)
        before = torch.cat([torch.zeros(3, 32), u])
        u = sum(before[k:k + 10] * p["conv1d.weight"][:, 0, k] for k in range(4))
        u = silu(u + p["conv1d.bias"])
        dt, B, C = (u @ p["x_proj.weight"].T).split([1, 4, 4], dim=1)
        delta = torch.log(1 + torch.exp(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
        A = -torch.exp(p["A_log"])
        h, y = torch.zeros(32, 4, dtype=torch.float64), []
        for t in range(10):
            h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
            y.append(h @ C[t] + p["D"] * u[t])
        x = x + (torch.stack(y) * silu(z)) @ p["out_proj.weight"].T
    expected = norm(x, "backbone.norm_f") @ w["lm_head.weight"].T

    model = Mamba(MambaConfig(14, n_layer=2, d_model=16, d_state=4, n_loop=n_loop)).double()
    model.load_state_dict(w, strict=True)
    torch.testing.assert_close(model(idx[None])[0][0], expected)


@our_models
def test_two_tensors_do_not_load_into_one(name):
    model = small(name)
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    weights["lm_head.weight"][3, 3] += 1
    with pytest.raises(ValueError, match="lm_head.weight and .* differ"):
        model.load_state_dict(weights)
    del weights["lm_head.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(weights)


def test_gpt_refuses_what_cannot_work():
    model = GPT(GPTConfig(block_size=40, vocab_size=14, n_layer=1, n_head=2, n_embd=16))
    for do in (model, lambda idx: model.generate(idx[:, :40], 2)):
        with pytest.raises(ValueError, match="41 tokens is longer than block_size 40"):
            do(tokens(1, 41))
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig(n_head=5, n_embd=16)


@pytest.mark.parametrize("width", [96, 768])
def test_gpt_starts_as_gpt2_at_its_width(width):
    """Apart from what the docstring says: 1 / i, and positions that are sinusoids."""
    torch.manual_seed(0)
    weights = GPT(GPTConfig(64, 500, n_layer=2, n_head=2, n_embd=width)).state_dict()
    scale = 0.02 * math.sqrt(768 / width)
    for name, divisor in (
        ("wte", 1), ("h.0.attn.c_attn", 1), ("h.1.mlp.c_fc", 1), ("h.0.mlp.c_proj", 1),
        ("h.1.mlp.c_proj", 2), ("h.1.attn.c_proj", 2),
    ):
        std = weights[f"transformer.{name}.weight"].std().item()
        assert std == pytest.approx(scale / divisor, rel=0.05)
    table = weights["transformer.wpe.weight"] / (4 * scale)
    products = (table[:-1] * table[1:]).sum(dim=1)       # one step is the same rotation everywhere
    torch.testing.assert_close(products, products[:1].expand(63))
    shortest = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]])
    torch.testing.assert_close(table[:4, :2], shortest, atol=1e-5, rtol=0)
    turns = math.atan2(*table[63, -2:].tolist()) / (2 * math.pi)
    assert 0.97 < turns / (63 / (4 * 64)) < 1.2          # the longest wave: nearly 4 tables


def test_mamba_starts_as_the_original():
    """Apart from the embedding, which begins larger, and what layer i adds, divided by i."""
    torch.manual_seed(0)
    slow = Mamba(MambaConfig(vocab_size=14, n_layer=1, d_model=16, A_init=0.1))
    A = slow.backbone.layers[0].mixer.A_log.exp()
    torch.testing.assert_close(A, torch.arange(1.0, 17).repeat(32, 1) / 10)
    model = Mamba(MambaConfig(vocab_size=14, n_layer=4, d_model=512))
    mixer = model.backbone.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).repeat(1024, 1))
    assert mixer.dt_proj.weight.abs().max() <= 32 ** -0.5 and mixer.D.eq(1).all()
    places = F.softplus(mixer.dt_proj.bias).log10() / 2 + 1.5   # 0.001 -> 0, 0.1 -> 1
    assert_uniform((places.detach().numpy() * 8).clip(0, 7).astype(int), 8)
    assert -1e-3 < places.min() and places.max() < 1 + 1e-3
    for i, layer in enumerate(model.backbone.layers, start=1):
        bound = 1 / math.sqrt(1024) / i                  # of a linear layer, over i
        assert 0.99 * bound < layer.mixer.out_proj.weight.abs().max() <= bound
    embedding = model.backbone.embedding.weight
    assert embedding.std().item() == pytest.approx(512 ** -0.5, rel=0.05)


# ---- scan_kernel.py

OPTIONAL = ["D", "z", "delta_bias", "initial_state"]
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
needs_triton = pytest.mark.skipif(scan_kernel.triton is None, reason="needs triton")


def by(path):
    """`selective_scan` with the recurrence by scan_ref, scan_cpu or scan_triton."""
    def scan(**inputs):
        with mock.patch.object(scan_kernel, "scan", getattr(scan_kernel, path)):
            return selective_scan(**inputs)
    return scan


LOOP = by("scan_ref")
FAST = [
    pytest.param(by("scan_cpu"), id="cpu"),
    pytest.param(by("scan_triton"), id="triton", marks=needs_triton),
]
fast_scans = pytest.mark.parametrize("scan", FAST)
every_scan = pytest.mark.parametrize("scan", [pytest.param(LOOP, id="loop"), *FAST])


def scan_inputs(batch, seqlen, dim, dstate, dtype=torch.float32, without=()):
    """Random arguments {name: value}. The per-token ones have the dtype, the others float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "u": (batch, dim, seqlen), "delta": (batch, dim, seqlen), "A": (dim, dstate),
        "B": (batch, dstate, seqlen), "C": (batch, dstate, seqlen), "D": (dim,),
        "z": (batch, dim, seqlen), "delta_bias": (dim,), "initial_state": (batch, dim, dstate),
    }
    inputs = {"delta_softplus": True, "return_last_state": True}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name == "A":
            x = -2 * x.abs()
        if name in ("u", "delta", "B", "C", "z") or dtype == torch.float64:
            x = x.to(dtype)
        if name not in without:
            inputs[name] = x.to(DEVICE).requires_grad_()
    return inputs


def tensors_of(inputs):
    return {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}


def weighted_sum(outputs):
    total = 0
    for x in outputs:
        weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=x.device)
        total = total + (x.double() * weight.reshape(x.shape)).sum()
    return total


def passes(scan, inputs):
    """-> {name: tensor}: out, the last state, and the gradients of a weighted sum of both"""
    out, last = scan(**inputs)
    given = tensors_of(inputs)
    gradients = torch.autograd.grad(weighted_sum((out, last)), list(given.values()))
    return {"out": out, "last": last} | dict(zip(given, gradients))


def assert_same(results, expected, **tolerance):
    assert results.keys() == expected.keys()
    for name, x in results.items():
        torch.testing.assert_close(
            x, expected[name], **tolerance, msg=lambda text: f"{name}: {text}"
        )


def assert_same_bits(results, expected):
    assert_same(results, expected, rtol=0, atol=0)


def assert_matches(scan, inputs, tolerance=2e-5):
    """All that `passes` returns is that of the plain loop in float64. NaN is where it has NaN."""
    exact = dict(inputs)
    for name, x in tensors_of(inputs).items():
        exact[name] = x.detach().double().requires_grad_()
    results = passes(scan, inputs)
    for name, x in passes(LOOP, exact).items():
        scale = x.nan_to_num().abs().max().clamp(min=1e-3).item()
        assert_same(
            {name: results[name].double()}, {name: x}, rtol=0, atol=tolerance * scale,
            equal_nan=True
        )


def record(monkeypatch, direction, what):
    """-> a list that grows by what(inputs, result) with each pass of that direction"""
    seen = []
    for name in (f"cpu_{direction}", f"triton_{direction}"):
        def recorded(*inputs, function=getattr(scan_kernel, name)):
            result = function(*inputs)
            seen.append(what(inputs, result))
            return result
        monkeypatch.setattr(scan_kernel, name, recorded)
    return seen


@pytest.mark.parametrize("without", [(), OPTIONAL])
def test_the_plain_loop_is_the_recurrence(without):
    """Number by number, without PyTorch."""
    inputs = scan_inputs(2, 7, 3, 4, torch.float64, without) | {"delta_softplus": not without}
    arrays = {name: x.detach().cpu().numpy() for name, x in tensors_of(inputs).items()}
    u, delta, A, B, C = [arrays[name] for name in ("u", "delta", "A", "B", "C")]
    D, z, bias, h = [arrays.get(name) for name in OPTIONAL]
    h = np.zeros((2, 3, 4)) if without else h.copy()
    expected = np.zeros(u.shape)
    for b, d, t in np.ndindex(*u.shape):
        dt = delta[b, d, t] if without else math.log1p(math.exp(delta[b, d, t] + bias[d]))
        for n in range(4):
            h[b, d, n] = math.exp(dt * A[d, n]) * h[b, d, n] + dt * B[b, n, t] * u[b, d, t]
            expected[b, d, t] += C[b, n, t] * h[b, d, n]
        if not without:
            expected[b, d, t] += D[d] * u[b, d, t]
            expected[b, d, t] *= z[b, d, t] / (1 + math.exp(-z[b, d, t]))
    out, last = LOOP(**inputs)
    np.testing.assert_allclose(out.detach().cpu(), expected, rtol=1e-10)
    np.testing.assert_allclose(last.detach().cpu(), h, rtol=1e-10)


@fast_scans
@pytest.mark.parametrize("without", [(), OPTIONAL])
@pytest.mark.parametrize("size", [(2, 1, 3, 1), (1, 2, 70, 5), (2, 31, 66, 16), (3, 65, 5, 3)])
@pytest.mark.parametrize("piece_size", [scan_kernel.PIECE_SIZE, 300])
def test_scan_is_the_plain_loop(scan, size, without, piece_size, monkeypatch):
    """Values and all gradients. The small pieces cut the batch, too."""
    monkeypatch.setattr(scan_kernel, "PIECE_SIZE", piece_size)
    assert_matches(scan, scan_inputs(*size, without=without))


@every_scan
def test_a_scan_in_pieces_is_the_whole(scan):
    """Each piece starts from the last state of the one before. Values and all gradients."""
    def in_pieces(initial_state, **inputs):
        outs = []
        state = initial_state
        for start, end in ((0, 1), (1, 12), (12, 19), (19, 40)):
            piece = dict(inputs)
            for name in ("u", "delta", "B", "C", "z"):
                piece[name] = inputs[name][:, :, start:end]
            out, state = scan(**piece, initial_state=state)
            outs.append(out)
        return torch.cat(outs, dim=2), state

    inputs = scan_inputs(2, 40, 5, 3, torch.float64)
    assert_same(passes(in_pieces, inputs), passes(scan, inputs))


@every_scan
def test_scan_gradients_by_finite_differences(scan):
    inputs = scan_inputs(2, 9, 3, 2, torch.float64)
    tensors = tensors_of(inputs)

    def outputs(*values):
        return scan(**inputs | dict(zip(tensors, values)))

    torch.autograd.gradcheck(outputs, list(tensors.values()), fast_mode=True)


@fast_scans
def test_scan_outputs_that_are_not_used(scan, monkeypatch):
    """A last state that is not used is no tensor of zeros in the backward pass. Alone it works."""
    dlast_states = record(monkeypatch, "backward", lambda inputs, result: inputs[-1])
    inputs = scan_inputs(2, 9, 6, 3, without=("D", "z"))
    scan(**inputs)[0].sum().backward()
    assert dlast_states == [None]

    def last_alone(scan):
        return lambda **inputs: [scan(**inputs)[1]] * 2

    inputs.pop("C").requires_grad_(False)
    C = torch.ones_like(inputs["B"])
    results = passes(lambda **inputs: last_alone(scan)(C=C, **inputs), inputs)
    assert_same(results, passes(lambda **inputs: last_alone(LOOP)(C=C, **inputs), inputs))


@fast_scans
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float16, 1e-3), (torch.bfloat16, 8e-3),
])
def test_scan_dtypes(scan, dtype, tolerance):
    """Beside float64 on the same rounded inputs: only results are rounded. out has u's dtype.

    The interpreter truncates to bfloat16 where the chip rounds: by one unit in the last place.
    """
    inputs = scan_inputs(2, 9, 6, 5, dtype)
    out, last = scan(**inputs)
    assert out.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(scan, inputs, tolerance)
    mixed = scan_inputs(2, 9, 6, 5)
    for name in ("delta", "B", "D", "initial_state"):
        mixed[name] = mixed[name].detach().to(dtype).requires_grad_()
    assert scan(**mixed)[0].dtype == torch.float32
    assert_matches(scan, mixed, max(tolerance, 2e-5))


def test_softplus_is_exact_in_float64():
    u, B = torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    out = selective_scan(u, 25 * u, -u[0], B, B, delta_softplus=True)
    assert out.item() == pytest.approx(25 + math.log1p(math.exp(-25)), rel=1e-15)


@every_scan
def test_scan_under_autocast_and_checkpoint(scan):
    """The same bits: products of states stay float32."""
    def checkpointed(**inputs):
        return torch.utils.checkpoint.checkpoint(scan, use_reentrant=False, **inputs)

    inputs = scan_inputs(3, 33, 5, 4)
    plain = passes(scan, inputs)
    assert_same_bits(passes(checkpointed, inputs), plain)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same_bits(passes(scan, inputs), plain)


@every_scan
def test_scan_strides(scan):
    """Views give the same bits: other orders in memory, every second channel, expanded."""
    inputs = scan_inputs(2, 6, 5, 3)
    inputs["delta"] = inputs["delta"].detach()[:1].repeat(2, 1, 1)
    views = dict(inputs)
    for name in ("B", "C", "z", "A", "initial_state"):
        views[name] = inputs[name].detach().mT.contiguous().mT
    for name, dim in (("u", 1), ("D", 0)):
        doubled = inputs[name].detach().repeat_interleave(2, dim)
        views[name] = doubled[:, ::2] if dim == 1 else doubled[::2]
    views["delta"] = inputs["delta"][:1].expand(2, -1, -1)
    for x in (inputs["delta"], *tensors_of(views).values()):
        x.requires_grad_()
    assert_same_bits(passes(scan, views), passes(scan, inputs))


@fast_scans
@pytest.mark.parametrize("seqlen", [*range(2, 18), 33])
def test_scan_extremes(scan, seqlen):
    """Finite where the plain loop is. Behind the end of a chunk nothing is read or comes back."""
    large_and_small, no_memory, growing = [scan_inputs(1, seqlen, 4, 3) for _ in range(3)]
    with torch.no_grad():
        large_and_small["delta"][:, :, seqlen // 3] = -200.0
        large_and_small["delta"][:, :, seqlen // 2] = 300.0
        large_and_small["A"] *= 50
        no_memory["A"][1, 2] = -math.inf  # the plain loop has NaN in ddelta then
        growing["A"].abs_().add_(1)
        growing["delta"].sub_(101)
        growing["delta_bias"].fill_(100)  # a step is large where delta is not read
    for inputs in (large_and_small, no_memory, growing):
        assert_matches(scan, inputs)


@every_scan
def test_scan_of_no_sequences(scan):
    results = passes(scan, scan_inputs(0, 12, 4, 3))
    assert results["out"].shape == (0, 4, 12) and results["last"].shape == (0, 4, 3)
    assert results["A"].shape == (4, 3) and results["A"].abs().max() == 0


@fast_scans
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap of grad", "grad of vmap"])
def test_scan_under_torch_func(scan, transform):
    """As the plain loop, which is mere PyTorch. All but A are mapped, over dimension 1."""
    inputs = scan_inputs(1, 9, 2, 3, torch.float64)
    names = list(tensors_of(inputs))
    tensors = [inputs[name].detach() for name in names]
    mapped = [torch.stack([x, x / 2], dim=1) for x in tensors]
    mapped[names.index("A")] = inputs["A"].detach()
    dims = tuple(None if name == "A" else 1 for name in names)
    every = tuple(range(len(names)))

    def transformed(scan):
        def outputs(*tensors):
            return scan(**inputs | dict(zip(names, tensors)))

        def loss(*tensors):
            return weighted_sum(outputs(*tensors))

        def sum_of_losses(*mapped):
            return torch.func.vmap(loss, dims)(*mapped).sum()

        if transform == "grad":
            return torch.func.grad(loss, every)(*tensors)
        if transform == "jacrev":
            return torch.func.jacrev(outputs, every)(*tensors)
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(loss, every), dims)(*mapped)
        return torch.func.grad(sum_of_losses)(*mapped)  # of u: vmap hides that it needs one

    torch.testing.assert_close(transformed(scan), transformed(LOOP))


@every_scan
@pytest.mark.parametrize("without", [("initial_state",), OPTIONAL])
def test_results_of_a_scan_may_be_changed_in_place(scan, without):
    """Nothing that the backward pass needs changes with them."""
    def changed(out, last):
        out += 1
        out[:, :, 2] = 0.5
        F.relu_(out)
        last *= 2
        return out, last

    inputs = scan_inputs(2, 9, 6, 3, without=without)
    results = passes(lambda **inputs: changed(*scan(**inputs)), inputs)
    copies = passes(lambda **inputs: changed(*[x.clone() for x in scan(**inputs)]), inputs)
    assert_same_bits(results, copies)


@every_scan
@pytest.mark.parametrize("kind", ["torch.func", "dual numbers"])
def test_forward_mode_is_right_or_refused(scan, kind):
    inputs = scan_inputs(2, 9, 3, 2, torch.float64)
    u, du = inputs["u"].detach(), torch.ones_like(inputs["u"])

    def tangents():
        if kind == "torch.func":
            return torch.func.jvp(lambda u: scan(**inputs | {"u": u}), (u,), (du,))[1]
        with forward_ad.dual_level():
            outputs = scan(**inputs | {"u": forward_ad.make_dual(u, du)})
            return [forward_ad.unpack_dual(x).tangent for x in outputs]

    if scan is not LOOP:
        with pytest.raises(NotImplementedError, match="forward mode"):
            tangents()
        return
    step = 1e-6 * du
    plus, minus = LOOP(**inputs | {"u": u + step}), LOOP(**inputs | {"u": u - step})
    for tangent, above, below in zip(tangents(), plus, minus):
        torch.testing.assert_close(tangent, (above - below) / 2e-6)


@pytest.mark.parametrize("path", ["scan", pytest.param("scan_triton", marks=needs_triton)])
@pytest.mark.parametrize("batch", [1, 3])
def test_scan_under_compile(path, batch, monkeypatch):
    """Batch 1 is small enough for the plain loop."""
    monkeypatch.setattr(scan_kernel, "scan", getattr(scan_kernel, path))
    torch.compiler.reset()
    inputs = scan_inputs(batch, 12, 16, 4)
    compiled = torch.compile(selective_scan, backend="aot_eager")
    assert_same(passes(compiled, inputs), passes(selective_scan, inputs))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("scan, chunk", [
    pytest.param(*FAST[0].values, scan_kernel.CPU_CHUNK, id="cpu"),
    pytest.param(*FAST[1].values, scan_kernel.TRITON_CHUNK, id="triton", marks=needs_triton),
])
def test_scan_memory(scan, chunk, monkeypatch):
    """A state for each chunk is saved if a gradient is needed. Nothing has one for each step."""
    monkeypatch.setattr(scan_kernel, "PIECE_SIZE", 1 << 14)
    monkeypatch.setattr(scan_kernel, "launch", lambda *args: None)  # the interpreter allocates too
    states = record(monkeypatch, "forward", lambda inputs, result: result[2].shape[1])
    inputs = scan_inputs(8, 130, 32, 32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with Largest() as largest:
            scan(**inputs)[0].sum().backward()
    chunks = math.ceil(130 / chunk)
    assert [x.shape for x in saved if x.dim() == 4] == [(8, chunks, 32, 32)]
    assert largest.size < 8 * 130 * 32 * 32 / 4
    with torch.no_grad():
        scan(**inputs)
    for x in tensors_of(inputs).values():
        x.requires_grad_(False)
    scan(**inputs)
    assert states == [chunks, 0, 0]


OFFSETS = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import scan_kernel
for kernel in (scan_kernel.forward_kernel, scan_kernel.backward_kernel):
    signature, constants = {}, {}
    sizes = {"CHUNK": 2, "BLOCK_N": 16, "BLOCK_D": 32}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "*fp32"
        if name in sizes:
            signature[name], constants[(i,)] = "constexpr", sizes[name]
        elif name in ("dim", "seqlen", "dstate"):
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    for line in text.splitlines():
        if "tt.addptr" in line:
            print(kernel.__name__, "i64" if line.split(" : ")[1].count("i64") else line)
"""


@needs_triton
def test_offsets_have_64_bits():
    """In the compiled kernels, each offset from a pointer to a tensor is a 64-bit number."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", OFFSETS]
    result = subprocess.run(command, cwd=HERE, text=True, capture_output=True, env=env)
    assert result.returncode == 0, result.stderr
    kinds = Counter(result.stdout.splitlines())
    assert set(kinds) == {"forward_kernel i64", "backward_kernel i64"}, kinds
    assert min(kinds.values()) > 8


@pytest.mark.parametrize("batch", [0, 1, 8])
def test_scan_refuses_arguments_of_another_form(batch):
    """With no work, below the limit of the plain loop, and above it."""
    inputs = scan_inputs(batch, 12, 6, 5)
    u, A, B, D = [inputs[name].detach() for name in ("u", "A", "B", "D")]
    wrong = [
        ("A", A.cfloat(), "A must .*complex64"), ("B", B[:, None], "B must .* in groups"),
        ("C", B[..., 0], "C must"), ("delta", u[:, :, 1:], "delta must"), ("D", D[1:], "D must"),
        ("initial_state", inputs["initial_state"].mT, "initial_state must"),
        ("A", A[0], "and A"), ("u", u[:, :, 0], "u must"), ("u", u[:, :, :0], "u must"),
        ("A", A[:, :0], "and A"), ("D", 1.0, "D must .* got float"),
        ("z", u.tolist(), "z must .* got list"), ("u", u.to_sparse(), "u must .*sparse"),
        ("u", u.to(torch.float8_e5m2), "u must .*float8"), ("z", u.int(), "z must .*int32"),
        ("delta_bias", D.to("meta"), "delta_bias must .* meta"),
        ("u", None, "u must .* NoneType"), ("delta", None, "delta must .* NoneType"),
        ("A", None, "A .* NoneType"), ("B", None, "B must"), ("C", None, "C must"),
    ]
    for name, x, says in wrong:
        with pytest.raises(ValueError, match=says):
            selective_scan(**inputs | {name: x})


def test_the_choice_of_the_scan(monkeypatch):
    """The plain loop for one step or little work, else the path for the device."""
    picked = []
    for name in ("scan_ref", "scan_cpu", "scan_triton"):
        monkeypatch.setattr(scan_kernel, name, lambda *inputs, name=name: picked.append(name))
    for batch, seqlen in ((64, 1), (1, 12), (64, 3)):
        x = torch.ones(batch, seqlen, 20)
        scan_kernel.scan(x, x, torch.ones(4, 20), x, x, x)
    monkeypatch.setattr(scan_kernel, "triton", mock.Mock())
    x = mock.Mock(is_cuda=True)
    scan_kernel.scan(x, x, x, x, x, x)
    assert picked == ["scan_ref", "scan_ref", "scan_cpu", "scan_triton"]


def test_scan_without_triton():
    """As on macOS and Windows."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from scan_kernel import selective_scan
u, A, B = torch.ones(64, 20, 3), -torch.ones(20, 4), torch.ones(64, 4, 3)
print(tuple(selective_scan(u, u, A, B, B).shape))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    assert result.stdout == "(64, 20, 3)\n"


# ---- train.py: four ways to train


@our_models
def test_sizes_reach_the_model(name):
    sizes = {"n_layer": 3, "n_loop": 5, "n_embd": 24, "n_head": 2, "d_state": 7, "A_init": 0.5}
    sizes = {size: value for size, value in sizes.items() if size in train.DEFAULTS[name]}
    flags = itertools.chain(*[(f"--{size}", value) for size, value in sizes.items()])
    config = vars(train.build_model(settings("--model", name, *flags), SMALL_STAR).config)
    config["n_embd"] = config.get("d_model", config.get("n_embd"))
    assert config | sizes == config
    assert config["vocab_size"] == SMALL_STAR.vocab_size


@pytest.mark.parametrize("way, reads, predicts", [
    ((), [7, 3], [7, 3, 9]),
    (("--teacherless",), [13, 13], [7, 3, 9]),
    (("--reverse",), [9, 3], [9, 3, 7]),
    (("--teacherless", "--reverse"), [13, 13], [9, 3, 7]),
    (("--only_first_hop",), [7], [7, 3]),
])
def test_what_the_model_reads_and_what_it_is_to_predict(way, reads, predicts):
    star, args = PathStar(1, 3, 10), settings(*way)
    paths = np.array([[7, 3, 9]])
    prefixes = data.prefix_tokens(star, np.array([[[3, 9], [7, 3]]]), paths)
    given = train.prefixes_and_solutions(args, prefixes, paths)
    inputs, targets = train.inputs_and_targets(args, star, *given)
    assert inputs.tolist() == [[3, 9, 10, 7, 3, 12, 7, 9, 11, *reads]]
    assert targets.tolist() == [[-1] * 8 + predicts]


@every_model
@pytest.mark.parametrize("way, dtype", [((), "float32"), (("--teacherless",), "bfloat16")])
def test_a_run_is_this_loop(name, way, dtype, tmp_path):
    """The same weights, optimizer and losses. Weight decay spares vectors and Mamba's A."""
    given = ("--lr", 0.01, "--warmup_iters", 2, "--decay_frac", 0.5, "--weight_decay", 0.3)
    given = (*TINY, "--model", name, *way, "--dtype", dtype, "--seed", 3, *given)
    assert call(train, *given, "--out_dir", tmp_path) == 0

    star, (prefixes, paths), _ = data.datasets(2, 5, 10, 200, 20, 3)
    fed = torch.from_numpy(np.full_like(paths, star.dollar) if way else paths)
    inputs = torch.cat([torch.from_numpy(prefixes), fed[:, :-1]], dim=1)
    torch.manual_seed(3)
    model = train.build_model(settings(*given), star)
    decayed, others = [], []
    for key, p in model.named_parameters():
        (others if p.dim() == 1 or key.endswith("A_log") else decayed).append(p)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3)
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (step + 1) / 3, (6 - step) / 3)
        batch = data.batch_indices(200, 8, 3, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits, _ = model(inputs[batch])
            logits = logits[:, -5:].float().flatten(0, 1)
            loss = F.cross_entropy(logits, torch.from_numpy(paths[batch]).flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    weights = read_ckpt(tmp_path)["model"]
    for key, x in model.state_dict().items():
        torch.testing.assert_close(weights[key], x, rtol=1e-4, atol=1e-6)
    for line, first in zip(read_log(tmp_path)[2:], (0, 3)):
        assert line["train_loss"] == pytest.approx(sum(losses[first:first + 3]) / 3, rel=1e-5)


@every_model
def test_a_run_stops_when_the_task_is_solved(name, tmp_path, capsys):
    """With one arm of one edge there is nothing to plan, but something to learn."""
    printed = output(
        capsys, train, "--model", name, "--deg", 1, "--path_len", 2, "--num_nodes", 12,
        "--n_train", 0, "--n_test", 10, "--n_layer", 1, "--n_embd", 32, "--batch_size", 64,
        "--lr", 0.01, "--max_iters", 3000, "--eval_interval", 25, "--out_dir", tmp_path
    )
    last = read_log(tmp_path)[-1]
    assert last["accuracy"] == 1 and 0 < last["iter"] < 3000 and last["goal_moved"] is None
    assert "too few graphs (10)" in printed


# ---- train.py: two phases of evaluation, the moved goal, the verdict


@every_model
@pytest.mark.parametrize("way", [*WAYS, ("--teacherless", "--reverse")], ids=" ".join)
def test_predictions_are_those_of_plain_passes(name, way):
    """Also where the graphs fill more than one batch. They are in the order of the path."""
    args, model = settings(*way), small(name).double()
    graphs = data.draw(SMALL_STAR, train.EVAL_BATCH + 30, rng())
    prefixes, solutions = train.prefixes_and_solutions(args, *graphs)
    answers, forced, loss = train.predict(args, SMALL_STAR, model, prefixes, solutions)
    turned = (lambda x: x.flip(1)) if "--reverse" in way else (lambda x: x)
    n, dollars = solutions.size(1), torch.full_like(solutions, SMALL_STAR.dollar)

    def logits_after(tokens):
        fed = dollars if "--teacherless" in way else tokens
        return model(torch.cat([prefixes, fed[:, :-1]], dim=1))[0][:, -n:]

    logits = logits_after(solutions)
    assert loss == pytest.approx(F.cross_entropy(logits.mT, solutions).item())
    written = model.generate(prefixes, n)[:, -n:]
    if "--teacherless" in way:
        written = logits.argmax(dim=2)
        assert forced is None
    else:
        assert torch.equal(forced, turned(logits.argmax(dim=2)))
        assert not torch.equal(answers, forced)
    assert torch.equal(answers, turned(written))
    p = train.probabilities(args, SMALL_STAR, model, prefixes, answers).double()
    torch.testing.assert_close(p, turned(logits_after(written).softmax(2)), rtol=1e-4, atol=1e-6)


class HandMade(nn.Module):
    """Takes the edge that leaves the last token.

    At the start it takes the one towards the goal, if it `plans`. Else it takes the first in the
    list, which leads to a random arm: the Clever Hans cheat.
    """

    def __init__(self, star, plans):
        super().__init__()
        self.star, self.plans = star, plans
        self.matrix, self.vector = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))

    def forward(self, idx, targets=None):
        n, predicted = self.star.prefix_len, torch.zeros_like(idx)
        for row, out in zip(idx.tolist(), predicted):
            edges, start, node = data.edges_of(row[:n]), row[n - 3], row[n - 2]
            after = {self.star.equals: start} | dict(reversed(edges))
            if self.plans:
                before = {head: tail for tail, head in edges}
                while before[node] != start:
                    node = before[node]
                after[start] = node
            for t in range(n - 1, len(row)):
                out[t] = after.get(row[t], 0)
        logits = 9.0 * F.one_hot(predicted, self.star.vocab_size) + self.matrix + self.vector
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.mT, targets, ignore_index=-1)

    def generate(self, idx, n):
        for _ in range(n):
            idx = torch.cat([idx, self(idx)[0][:, -1:].argmax(dim=2)], dim=1)
        return idx


def test_the_two_phases_are_kept_apart():
    """Forced, the cheat has all nodes but the first hop right. By itself it walks an arm."""
    args, graphs = settings("--max_iters", 6), data.draw(SMALL_STAR, 400, rng())
    result = train.evaluate(args, SMALL_STAR, HandMade(SMALL_STAR, plans=False), graphs, 0)
    tails, heads = graphs[0][:, 0:-3:3], graphs[0][:, 1:-3:3]
    first = np.argmax(tails == graphs[1][:, [0]], axis=1)
    hop = (np.take_along_axis(heads, first[:, None], 1)[:, 0] == graphs[1][:, 1]).mean()
    assert 0.4 < hop < 0.6
    assert result["forced_node_accuracy"] == [1, hop, 1, 1, 1]
    assert result["node_accuracy"] == [1, hop, hop, hop, hop]
    assert result["accuracy"] == result["forced_accuracy"] == hop
    assert result["cheat_accuracy"] == 1


def test_the_cheat_accuracy_counts_all_nodes_after_the_first_hop():
    _, paths = data.draw(SMALL_STAR, 400, rng())
    right = torch.from_numpy(paths)
    forced = right.clone()
    forced[:, :2] = -1                                          # these do not count
    forced[:100, 2] = -1
    forced[50:150, 4] = -1                                      # 150 have a wrong later node
    assert train.summary(settings(), right, forced, paths)["cheat_accuracy"] == 250 / 400
    result = train.summary(settings("--reverse"), right, forced, paths)
    assert result["cheat_accuracy"] is None and result["accuracy"] == 1


@pytest.mark.parametrize("flags, n, hop, cheat, says", [
    ((), 1000, 0.5, 1, "the Clever Hans cheat"),
    ((), 1000, 0.44, 0.98, "the Clever Hans cheat"),
    ((), 100, 0.58, 1, "the Clever Hans cheat"),
    ((), 1000, 0.58, 1, "neither solved nor the cheat"),        # too often right for a guess
    ((), 1000, 0.42, 1, "neither solved nor the cheat"),
    ((), 1000, 0.5, 0.97, "neither solved nor the cheat"),
    ((), 1000, 0.98, 1, "neither solved nor the cheat"),
    ((), 1000, 0.99, 1, "solved, the model finds the path"),
    ((), 99, 0.99, 1, "too few graphs (99)"),
    (("--deg", 1), 1000, 0.99, 1, "with one arm there is nothing to choose"),
    (("--deg", 5), 1000, 0.2, 1, "the Clever Hans cheat"),
    (("--deg", 5), 1000, 0.5, 1, "neither solved nor the cheat"),
    (("--teacherless",), 1000, 0.5, None, "neither solved nor the cheat"),
    (("--teacherless",), 1000, 1, None, "solved, the model finds the path"),
    (("--reverse",), 1000, 0.5, None, "neither solved nor the cheat"),
    (("--only_first_hop",), 1000, 0.5, None, "indecipherable token"),
    (("--only_first_hop",), 1000, 0.58, None, "neither solved nor the cheat"),
    (("--only_first_hop", "--deg", 20), 1000, 0, None, "neither solved nor the cheat"),
    (("--only_first_hop",), 1000, 1, None, "solved, the model finds the first hop"),
])
def test_verdicts(flags, n, hop, cheat, says):
    """All nodes are right as often as the first hop."""
    args = settings("--num_nodes", 100, "--path_len", 5, *flags)
    result = {"accuracy": hop, "node_accuracy": [1, hop], "cheat_accuracy": cheat}
    result["forced_node_accuracy"] = None if args.teacherless else [1, hop]
    text = train.verdict(result, args, n)
    assert says in text and f"accuracy {hop:.1%}, where guessing an arm gives" in text


@pytest.mark.parametrize("plans", [True, False])
def test_the_first_hop_follows_the_goal_or_not(plans, monkeypatch, tmp_path, capsys):
    """In the last line of a log, and in what sample.py prints."""
    monkeypatch.setattr(train, "build_model", lambda args, star: HandMade(star, plans))
    out, given = tmp_path / "run", (*TINY, "--n_test", 200, "--out_dir", tmp_path / "run")
    printed = output(capsys, train, *given)
    lines = read_log(out)[1:]
    if plans:
        assert [line["iter"] for line in lines] == [0] and "solved" in printed
        assert lines[0]["goal_moved"] == {"turns": 1, "stays": 0}
    else:
        assert [line["iter"] for line in lines] == [0, 3, 6] and "Clever Hans" in printed
        assert [line["goal_moved"] for line in lines[:2]] == [None, None]
        assert lines[-1]["goal_moved"] == {"turns": 0, "stays": 1}
    file = tmp_path / "graphs.txt"                              # the first arm is the right one
    file.write_text("0,1|0,2|1,3|2,4|3,5|4,6|5,7|6,8/0,7=0,1,3,5,7\n" * 2)
    printed = output(capsys, sample, "--out_dir", out, "--file", file)
    shares = ("100.0%", "0.0%") if plans else ("0.0%", "100.0%")
    says = "goal moved to another arm: the first hop turns there in {}, stays as it was in {}\n"
    assert says.format(*shares) in printed


def record_training(monkeypatch):
    """-> a set that will hold the graphs of all training steps."""
    build_model, seen = train.build_model, set()

    def see(model, inputs):
        if torch.is_grad_enabled():
            seen.update(as_graphs(inputs[0][:, :model.prefix_len]))

    def recorded(args, star):
        model = build_model(args, star)
        model.prefix_len = star.prefix_len
        model.register_forward_pre_hook(see)
        return model

    monkeypatch.setattr(train, "build_model", recorded)
    return seen


@pytest.mark.parametrize("n_train", [30, 0])
def test_graphs_to_train_to_test_and_to_judge_on_differ(n_train, monkeypatch, tmp_path, capsys):
    """Of 60 graphs, sample.py takes just those that the run has not seen."""
    seen = record_training(monkeypatch)
    sizes = ("--path_len", 2, "--num_nodes", 5, "--n_train", n_train, "--n_test", 10)
    assert call(train, *TINY, *sizes, "--max_iters", 4, "--out_dir", tmp_path) == 0
    _, (train_set, _), (test_set, _) = data.datasets(2, 2, 5, n_train, 10, 0)
    if n_train == 0:
        assert 10 < len(seen) <= 32
    else:
        assert seen <= as_graphs(train_set)
        seen = as_graphs(train_set)
    assert not seen & as_graphs(test_set)
    n = 60 - 10 - len(seen)
    given = ("--out_dir", tmp_path, "--json", "--show", 60, "--num_graphs")
    judged = set()
    for graph in json.loads(output(capsys, sample, *given, n))["graphs"]:
        edges = {edge for arm in graph["arms"] for edge in zip(arm, arm[1:])}
        judged.add((frozenset(edges), graph["path"][0], graph["path"][-1]))
    assert len(judged) == n and not judged & (seen | as_graphs(test_set))
    says = "there are only 60 different graphs G(2,2) with 5 names, not 61"
    assert says in refusal(capsys, sample, *given, n + 1)


# ---- train.py: runs

KEYS = [
    "iter", "examples", "elapsed_s", "train_loss", "lr", "test_loss", "accuracy", "node_accuracy",
    "forced_accuracy", "forced_node_accuracy", "cheat_accuracy", "samples", "goal_moved",
]


@every_way
@every_model
def test_tiny_runs(name, way, trained, capsys):
    """What a run leaves behind, and what sample.py shows of it."""
    out = trained("--model", name, *way)
    header, *lines = read_log(out)
    assert list(header) == ["command", "commit", "config", "data", "graphs", "versions", "machine"]
    assert header["command"].startswith("python train.py --n_layer 1 --n_embd 16")
    assert [line["iter"] for line in lines] == [0, 3, 6]
    assert [line["examples"] for line in lines] == [0, 24, 48]
    for line in lines:
        assert list(line) == KEYS and math.isfinite(line["test_loss"])
        assert len(line["node_accuracy"]) == (2 if "--only_first_hop" in way else 5)
        assert (line["forced_accuracy"] is None) == ("--teacherless" in way)
        assert (line["cheat_accuracy"] is not None) == (way == ())
        assert (line["goal_moved"] is not None) == (line["iter"] == 6)
        assert len(line["samples"]) == len(header["graphs"]) == 8
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "log.jsonl"]
    ckpt = read_ckpt(out)
    assert ckpt["header"] == header and ckpt["lines"] == lines

    # The figures that sample.py prints are those of its JSON, which are those of the log.
    file, shared = out.parent / "test.txt", set(KEYS[6:]) - {"samples"}
    _, _, test_set = data.datasets(2, 5, 10, 200, 20, 0)
    file.write_text("\n".join(lines_of(SMALL_STAR, *test_set)))
    given = ("--out_dir", out, "--file", file, "--show", 8)
    result = json.loads(output(capsys, sample, *given, "--json"))
    assert {key: result[key] for key in shared} == {key: lines[-1][key] for key in shared}
    for graph, logged, text in zip(result["graphs"], lines[-1]["samples"], header["graphs"]):
        assert graph["answer"] == logged["answer"]
        assert text.endswith("=" + ",".join(map(str, graph["path"])))
        p = {arm[1]: share for arm, share in zip(graph["arms"], graph["p_first_hop"])}
        assert logged["p_first_hop"] == pytest.approx(p[graph["path"][1]], abs=1e-4)
        hop = graph["answer"][1]
        assert graph["sure"][1] == pytest.approx(p.get(hop, graph["sure"][1]), abs=1e-6)
    printed = output(capsys, sample, *given)
    assert printed.count("\n      answer") == 8 and "on 20 graphs G(2,5)" in printed
    names = ["start", "first hop", "hop 2", "hop 3", "goal"][:len(result["node_accuracy"])]
    assert " " * 22 + "".join(f"{name:>10}" for name in [*names, "all"]) + "\n" in printed
    own = "from $ alone" if "--teacherless" in way else "from its own tokens"
    for label, prefix in ((own, ""), ("from the true tokens", "forced_")):
        [row] = [line[22:] for line in printed.splitlines() if line.startswith(label)] or [None]
        shares = [*(result[prefix + "node_accuracy"] or ()), result[prefix + "accuracy"]]
        assert row == (None if None in shares else "".join(f"{x:10.1%}" for x in shares))
    assert ("have all nodes after the first hop right" in printed) == (way == ())


def assert_same_run(one, two):
    """The same weights, optimizer and log to the bit, but for the time that it took."""
    a, b = read_ckpt(one), read_ckpt(two)
    for part in ("model", "optimizer"):
        for x, y in zip(tree_leaves(a[part]), tree_leaves(b[part]), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    logs = []
    for folder in (one, two):
        _, *lines = read_log(folder)
        logs.append([line | {"elapsed_s": 0} for line in lines])
    steps = [line["iter"] for line in logs[0]]
    assert logs[0] == logs[1] and steps == sorted(set(steps))


def raiser(error):
    def function(*args, **kwargs):
        raise error

    return function


class Killed(BaseException):
    """Stands for kill -9: no code handles it."""


def call_and_kill(function, count, *flags):
    """Runs train.py until it calls torch.optim's step or os.replace for the count-th time."""
    calls = []

    def killer(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        owner = os if function == "replace" else torch.optim.AdamW
        original = getattr(owner, function)
        patch.setattr(owner, function, killer)
        with pytest.raises(Killed):
            call(train, *flags)


@pytest.mark.parametrize("given", [
    ("--model", "gpt"),
    ("--model", "mamba", "--teacherless"),
    ("--model", "gpt", "--reverse", "--n_train", 0),
    ("--model", "mamba", "--only_first_hop", "--dtype", "bfloat16"),
], ids=lambda given: " ".join(map(str, given)))
def test_a_killed_run_resumes_to_the_bit(given, tmp_path, capsys):
    """One run, killed before it replaces each of its files, and in a step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(train, *TINY, *given, "--out_dir", whole) == 0
    new, resume = (*TINY, *given, "--out_dir", parts), ("--resume", parts)
    for function, count, flags, in_ckpt, in_log in (
        ("replace", 1, new, None, None),        # the first checkpoint is not in its place
        ("replace", 2, new, 0, None),
        ("step", 2, resume, 0, 0),              # resuming wrote the log
        ("replace", 1, resume, 0, 0),
        ("replace", 3, resume, 0, 0),
        ("replace", 4, resume, 3, 0),
        ("step", 2, resume, 3, 3),
        ("replace", 3, resume, 3, 3),
        ("replace", 4, resume, 6, 3),
    ):
        call_and_kill(function, count, *flags)
        assert (parts / "ckpt.pt").exists() == (in_ckpt is not None)
        assert in_ckpt is None or read_ckpt(parts)["lines"][-1]["iter"] == in_ckpt
        assert (parts / "log.jsonl").exists() == (in_log is not None)
        assert in_log is None or read_log(parts)[-1]["iter"] == in_log
    assert call(train, "--resume", parts) == 0
    assert_same_run(whole, parts)
    before = files_of(parts)
    assert "where guessing an arm gives" in output(capsys, train, "--resume", parts)
    assert files_of(parts) == before                            # it is finished: nothing changes


def test_a_finished_run_can_go_further(copied, capsys):
    """Also if it is killed before its next evaluation. It may get another device."""
    assert call(train, "--resume", copied, "--max_iters", 7) == 0
    call_and_kill("step", 2, "--resume", copied, "--max_iters", 12)
    assert output(capsys, train, "--resume", copied, "--device", "cpu").count("\niter") == 2
    header, *lines = read_log(copied)
    assert [line["iter"] for line in lines] == [0, 3, 6, 7, 9, 12]
    assert header["config"]["max_iters"] == 12
    assert re.search(r" && python train.py --resume \S+ --max_iters 12$", header["command"])
    assert [line["iter"] for line in lines if line["goal_moved"]] == [6, 7, 12]


@pytest.mark.parametrize("given, says", [
    (("--lr", 0.5), "omit --lr"),
    (("--out_dir=x", "--reverse"), "omit --out_dir --reverse"),
    (("--seed", 0), "omit --seed"),
    (("--max_iters", 3), "too few: 6 steps are done"),
])
def test_resume_refuses_other_flags(given, says, trained, capsys):
    before = files_of(trained())
    assert says in refusal(capsys, train, "--resume", trained(), *given)
    assert files_of(trained()) == before


def test_a_solved_run_is_not_extended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "STOP_AT", 0.0)
    assert call(train, *TINY, "--out_dir", tmp_path) == 0
    assert "solved at step 0" in refusal(capsys, train, "--resume", tmp_path, "--max_iters", 9)


def test_nothing_is_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    given = (*TINY, "--max_iters", 1)
    assert call(train, *given) == 0
    [out] = (tmp_path / "out").iterdir()
    assert out.name == "gpt-teacher_forced-deg2-len5-seed0"
    before = files_of(tmp_path)
    assert f"--resume out/{out.name} goes on" in refusal(capsys, train, *TINY)
    (out / "ckpt.pt").rename(tmp_path / "kept")                 # a log alone is a record, too
    refusal(capsys, train, *given)
    (tmp_path / "kept").rename(out / "ckpt.pt")
    assert files_of(tmp_path) == before
    assert call(train, *TINY, "--overwrite") == 0
    assert [line["iter"] for line in read_log(out)[1:]] == [0, 3, 6]
    others = [("--reverse",), ("--model", "mamba"), ("--seed", 1), ("--teacherless",)]
    for other in others:
        assert call(train, *given, *other) == 0
    assert len(list((tmp_path / "out").iterdir())) == 5


@pytest.mark.parametrize("deg, path_len, num_nodes", [(5, 3, 11), (3, 4, 10), (3, 3, 9)])
@pytest.mark.parametrize("model", ["mamba", "gpt"])
def test_init_from_starts_with_the_weights_of_another_run(
    model, deg, path_len, num_nodes, trained, tmp_path, capsys
):
    """Names, the four other tokens, and positions counted from the prefix's end keep theirs."""
    given = ("--model", model, "--teacherless")
    weights = read_ckpt(trained(*given))["model"]
    size = ("--deg", deg, "--path_len", path_len, "--num_nodes", num_nodes, "--n_loop", 2)
    flags = (*TINY, *given, *size)
    new = (*flags, "--init_from", trained(*given), "--out_dir")
    call_and_kill("step", 1, *new, tmp_path / "new")            # before it has changed them
    started = read_ckpt(tmp_path / "new")["model"]
    n_names = min(10, num_nodes)
    for name in weights:
        old, own = weights[name], started[name]
        if "embedding" in name or "wte" in name or "lm_head" in name:
            assert torch.equal(own[:n_names], old[:n_names])
            assert torch.equal(own[-4:], old[-4:])
            assert len(own) == num_nodes + 4 and own.std() > 0.1
        elif "wpe" in name:
            before_answer = PathStar(deg, path_len, num_nodes).prefix_len
            for i in range(len(own)):
                place = i - before_answer + PathStar(2, 5, 10).prefix_len
                assert torch.equal(own[i], old[place]) == (0 <= place < len(old))
            assert own.std() > 0.1
        else:
            assert torch.equal(own, old)
    assert call(train, "--resume", tmp_path / "new") == 0       # from its own weights now
    assert call(train, *new, tmp_path / "whole") == 0
    assert_same_run(tmp_path / "new", tmp_path / "whole")
    other = trained("--model", "gpt" if model == "mamba" else "mamba")
    same = trained(*given)
    no_fit = "does not fit the model"
    for folder, more, says in (
        (other, (), no_fit), (same, ("--n_embd", 32), no_fit), (tmp_path, (), "No such file")
    ):
        bad = (*flags, *more, "--init_from", folder, "--out_dir", tmp_path / "bad")
        assert says in refusal(capsys, train, *bad)
    assert not (tmp_path / "bad").exists()


@pytest.mark.skipif(train.fcntl is None, reason="no locks on Windows")
def test_one_folder_has_one_run_at_a_time(tmp_path, capsys):
    """A process that is killed lets go of it."""
    out = tmp_path / "my run"
    given = (*TINY, "--max_iters", 10 ** 8, "--eval_interval", 5, "--out_dir", out)
    process = start("train.py", *given, stdout=subprocess.DEVNULL)
    wait_for((out / "log.jsonl").exists, process)
    says = f"another process trains in {out}\n"
    assert refusal(capsys, train, "--resume", out).endswith(says)
    assert refusal(capsys, train, *TINY, "--overwrite", "--out_dir", out).endswith(says)
    assert refusal(capsys, train, *TINY, "--out_dir", out).endswith(says)
    assert "on 5 graphs" in output(capsys, sample, "--out_dir", out, "--num_graphs", 5)
    process.kill()
    assert process.communicate()[1] == ""
    done = read_ckpt(out)["lines"][-1]["iter"]
    assert call(train, "--resume", out, "--max_iters", done + 1) == 0
    config = read_log(out)[0]["config"]
    assert (config["eval_interval"], config["max_iters"]) == (5, done + 1)

    with train.locked(tmp_path / "new"):                        # before its first checkpoint
        says = f"another process trains in {tmp_path / 'new'}\n"
        assert refusal(capsys, train, *TINY, "--out_dir", tmp_path / "new").endswith(says)
    assert call(train, *TINY, "--out_dir", tmp_path / "new") == 0


def test_a_checkpoint_is_read_behind_the_lock(copied, monkeypatch, capsys):
    """Else the process that has the lock could write another one meanwhile."""
    load_checkpoint = train.load_checkpoint

    def load(out_dir):
        with pytest.raises(ValueError, match="another process trains"), train.locked(out_dir):
            pass
        return load_checkpoint(out_dir)

    monkeypatch.setattr(train, "load_checkpoint", load)
    assert call(train, "--resume", copied) == 0


def test_dropout_is_for_training_alone(copied, monkeypatch, tmp_path, capsys):
    """A model of one's own may have it: evaluations and sample.py switch it off."""
    build_model, modes = train.build_model, set()

    def recorded(args, star):
        model = build_model(args, star)
        model.register_forward_hook(lambda *_: modes.add((model.training, torch.is_grad_enabled())))
        return model

    monkeypatch.setattr(train, "build_model", recorded)
    assert call(train, *TINY, "--out_dir", tmp_path / "run") == 0
    assert modes == {(True, True), (False, False)}
    modes.clear()
    assert call(sample, "--out_dir", copied, "--num_graphs", 5) == 0
    assert modes == {(False, False)}


def test_a_run_that_ended_meanwhile_is_not_overwritten(monkeypatch, tmp_path, capsys):
    """It ran while this one drew its graphs and made its model."""
    build_model, given = train.build_model, (*TINY, "--out_dir", tmp_path)

    def slow(*args):
        monkeypatch.setattr(train, "build_model", build_model)
        assert call(train, *given, "--seed", 1) == 0
        capsys.readouterr()
        return build_model(*args)

    monkeypatch.setattr(train, "build_model", slow)
    assert "there is a run in" in refusal(capsys, train, *given)
    assert read_log(tmp_path)[0]["config"]["seed"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@every_model
def test_compiled_run_equals_eager(name, trained, monkeypatch, tmp_path):
    eager, torch_compile, compiled = trained("--model", name), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(1) or torch_compile(model))
    assert call(train, *TINY, "--model", name, "--compile", "--out_dir", tmp_path) == 0
    assert compiled == [1]
    for a, b in zip(read_log(eager)[2:], read_log(tmp_path)[2:], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["training", "test", "weights"])
def test_a_loss_that_is_not_finite_stops_the_run(where, value, monkeypatch, tmp_path, capsys):
    """The last good checkpoint stays, also where the weights or the training loss are finite."""
    cross_entropy, clip, steps = F.cross_entropy, nn.utils.clip_grad_norm_, []

    def loss_explodes(*args, **kwargs):
        loss = cross_entropy(*args, **kwargs)
        steps.append(torch.is_grad_enabled())
        if where == "training":
            return loss + (value if sum(steps) == 5 and steps[-1] else 0)
        return loss + (value if sum(steps) == 6 and not steps[-1] else 0)

    def weights_explode(parameters, max_norm):
        parameters = list(parameters)
        clip(parameters, max_norm)
        steps.append(1)
        if len(steps) == 6:
            parameters[0].grad.fill_(value)

    if where == "weights":
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", weights_explode)
    else:
        monkeypatch.setattr(F, "cross_entropy", loss_explodes)
    says = refusal(capsys, train, *TINY, "--out_dir", tmp_path, code=1)
    assert "the loss is infinite or NaN at step 6" in says and str(tmp_path) in says
    assert read_ckpt(tmp_path)["lines"] == read_log(tmp_path)[1:]
    assert read_log(tmp_path)[-1]["iter"] == 3
    assert all(x.isfinite().all() for x in read_ckpt(tmp_path)["model"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
def test_a_full_disk_keeps_the_last_checkpoint(copied):
    """A file may grow to 20 KB only: the log fits, a checkpoint does not."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = read_ckpt(copied)["lines"]
    process = start("train.py", "--resume", copied, "--max_iters", 9, preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1 and err.count("\n") == 1, err
    assert f"cannot write to {copied}, is the disk full?" in err
    assert read_ckpt(copied)["lines"] == before
    assert call(train, "--resume", copied, "--max_iters", 9) == 0
    assert [line["iter"] for line in read_log(copied)[1:]] == [0, 3, 6, 9]


def test_graphs_that_have_changed_are_not_trained_on(tmp_path, capsys):
    file, out = tmp_path / "graphs.txt", tmp_path / "run"
    lines = lines_of(SMALL_STAR, *data.draw(SMALL_STAR, 21, rng()))
    file.write_text("\n".join(lines[:20]))
    given = ("--train_file", file, "--num_nodes", 10, "--n_train", 20)
    assert call(train, *TINY, *given, "--out_dir", out) == 0
    file.write_text("\ufeff" + "\n\n".join(lines[:20]))         # the same graphs
    assert call(train, "--resume", out) == 0
    before = files_of(out)
    file.write_text("\n".join(lines[1:]))
    for module, flag in ((train, "--resume"), (sample, "--out_dir")):
        assert "a file has changed" in refusal(capsys, module, flag, out)
    file.unlink()
    assert "No such file" in refusal(capsys, train, "--resume", out)
    assert files_of(out) == before


# ---- Mistakes of a user: one line. Mistakes in the code: a traceback


@pytest.mark.parametrize("given, says", [
    (("--model", "rnn"), "invalid choice"),
    (("--n_embed", 3), "unrecognized arguments"),
    (("--lr", "x"), "argument --lr: invalid float value: 'x'"),
    (("--d_state", 4), "--d_state is not a setting of --model gpt"),
    (("--model", "mamba", "--n_head", 2), "--n_head is not"),
    (("--n_embd", 30, "--n_head", 4), "multiple of n_head"),
    (("--num_nodes", 8), "num_nodes must be at least 9"),
    (("--path_len", 1), "path_len 2, got 2 and 1"),
    (("--deg", 0), "argument --deg: must be from 1 up"),
    (("--seed", -1), "argument --seed: must be from 0 up"),
    (("--weight_decay", -1), "argument --weight_decay: must be from 0 up"),
    (("--lr", 0), "argument --lr: must be from"),
    (("--batch_size", 300, "--n_train", 200), "--batch_size 300 is more than 200 graphs"),
    (("--train_file", ""), "No such file"),
    (("--train_file", "missing"), "No such file"),
    (("--train_file", "."), "Is a directory"),
    (("--train_file", "missing", "--n_train", 0), "omit --train_file"),
    (("--device", "tpu"), "invalid choice"),
    (("--dtype", "float16"), "invalid choice"),
    (("--n_test", 10 ** 8), "there are only 3628800 different graphs G(2,5) with 10 names"),
    (("--only_first_hop", "--teacherless"), "--only_first_hop"),
    (("--only_first_hop", "--reverse"), "--only_first_hop"),
    (("--out_dir", "/dev/null/run"), "Not a directory"),
])
def test_bad_flags_are_refused_before_anything_is_written(
    given, says, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, train, "--n_train", 200, "--n_layer", 1, *given)
    assert said.startswith("train.py: error: ") and says in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, says", [
    (("--file", "x", "--graph", LINE), "not allowed with"),
    (("--file", "50.txt"), "node 47 is out of range"),
    (("--file", "missing"), "No such file"),
    (("--graph", "hello"), "'hello' is not of the form"),
    (("--graph", LINE), "out of range"),
    (("--graph", "0,1|0,2/0,1="), "--graph is not one of G(2,5) with 10 names"),
    (("--num_graphs", 0), "--num_graphs"),
    (("--num_graphs", 3_628_800), "there are only 3628800 different graphs"),
    (("--show", -1), "--show"),
])
def test_sample_refuses(given, says, trained, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "50.txt").write_text(LINE)
    assert says in refusal(capsys, sample, "--out_dir", trained(), *given)


HUGE = [10 ** 30, 2 ** 63, "9" * 5000, "1e308", "1e999", "nan", "inf", "-inf", -10 ** 30, "", "½"]


@pytest.mark.parametrize("module", [data, train, sample])
def test_extremes_of_numbers(module, trained, capsys):
    if module is data:
        flags, given = ["--deg", "--path_len", "--num_nodes", "-n", "--seed"], ()
    else:
        given = () if module is train else ("--out_dir", trained())
        actions = module.make_parser()._actions
        flags = [action.option_strings[-1] for action in actions if action.type is not None]
        assert len(flags) >= 4
    for flag, value in itertools.product(flags, HUGE):
        joined = f"--{flag[2:]}={value}" if flag != "-n" else f"-n{value}"
        assert f"argument {flag}: " in refusal(capsys, module, *given, joined), (flag, value)


@pytest.mark.parametrize("module, name, error", [
    (data, "draw", MemoryError("cannot allocate 8 TiB")),
    (data, "draw", MemoryError()),
    (train, "load_graphs", MemoryError()),
    (train, "build_model", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
])
def test_too_little_memory_is_said_in_one_line(
    module, name, error, monkeypatch, tmp_path, capsys
):
    """The last is what PyTorch says, as for --n_embd 999999996."""
    monkeypatch.setattr(module, name, raiser(error))
    monkeypatch.chdir(tmp_path)
    assert re.search("allocate|memory", refusal(capsys, module))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(trained, tmp_path, capsys):
    for given in (("--out_dir", tmp_path / "run"), ("--resume", trained())):
        said = refusal(capsys, train, *given, "--device", "cuda")
        assert said == "train.py: error: --device cuda: PyTorch finds no GPU\n"
    assert not list(tmp_path.iterdir())


def change(ckpt, keys, *value):
    """Sets ckpt[key][key]... to the value, or takes it away if there is none."""
    for key in keys[:-1]:
        ckpt = ckpt[key]
    if value:
        ckpt[keys[-1]] = value[0]
    else:
        del ckpt[keys[-1]]


OF_THE_CONFIG = [
    ("n_layer", "x"), ("n_layer", 0), ("n_layer", 1.5), ("n_layer", None), ("n_layer", True),
    ("n_layer", 2), ("n_embd", 18), ("n_head", 10 ** 30), ("lr", "fast"), ("lr", -1.0),
    ("lr", math.nan), ("lr", math.inf), ("batch_size", 10 ** 30), ("batch_size", 300),
    ("deg", [2]), ("deg", 3), ("path_len", 1), ("num_nodes", 3), ("num_nodes", 11),
    ("model", "rnn"), ("model", None), ("model", "mamba"), ("dtype", "int8"), ("dtype", 16),
    ("teacherless", "yes"), ("teacherless", 1), ("teacherless", None), ("seed", "0"),
    ("seed", 1), ("n_train", -5), ("n_train", 201), ("eval_interval", 0), ("max_iters", {}),
    ("d_state", 4), ("frobnicate", 1), ("out_dir", "elsewhere"), ("test_file", 5),
    ("train_file", "missing"),
    ("train_file", ["x"]),
    ("help", True),
]
KEYS_OF_CONFIG = set(vars(settings())) - {"out_dir", "overwrite", "resume", "device"}
DAMAGES = [(("header", "config", key), value) for key, value in OF_THE_CONFIG]
DAMAGES += [(("header", "config", key),) for key in sorted(KEYS_OF_CONFIG)]
DAMAGES += [
    (("model",),), (("optimizer",),), (("header",),), (("lines",),), (("header", "data"),),
    (("model", "lm_head.weight"),), (("lines",), []), (("model",), {}),
    (("header",), {"config": []}), (("header", "config"), []),
    (("model",), 5),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damaged_checkpoints_are_refused(damage, copied, capsys):
    """By hand or by an older version. Nothing is written."""
    ckpt = read_ckpt(copied)
    change(ckpt, *damage)
    torch.save(ckpt, copied / "ckpt.pt")
    before = files_of(copied)
    for module, flag in ((train, "--resume"), (sample, "--out_dir")):
        said = refusal(capsys, module, flag, copied)
        assert re.search("ckpt.pt|graph|No such file|batch_size|n_head", said), said
    assert files_of(copied) == before


@pytest.mark.parametrize("content", [b"", b"hello", "half", {"weights": [1]}, [1, 2], None])
def test_other_files_are_no_checkpoints(content, copied, capsys):
    if content == "half":
        content = (copied / "ckpt.pt").read_bytes()[:9000]
    if isinstance(content, bytes):
        (copied / "ckpt.pt").write_bytes(content)
    else:
        torch.save(content, copied / "ckpt.pt")
    for module, flag in ((train, "--resume"), (sample, "--out_dir")):
        assert "ckpt.pt is not a checkpoint of train.py" in refusal(capsys, module, flag, copied)
        assert "No such file" in refusal(capsys, module, flag, copied / "none")


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["PATHSTAR_EVIL"],)


def test_a_checkpoint_runs_no_code(copied, monkeypatch, capsys):
    evil = copied / "evil"
    monkeypatch.setenv("PATHSTAR_EVIL", str(evil))
    torch.save(read_ckpt(copied) | {"more": Malicious()}, copied / "ckpt.pt")
    for module, flag in ((train, "--resume"), (sample, "--out_dir")):
        assert "is not a checkpoint of train.py" in refusal(capsys, module, flag, copied)
    assert not evil.exists()
    torch.load(copied / "ckpt.pt", weights_only=False)          # it would have
    assert evil.exists()


@pytest.mark.parametrize("owner, name, error", [
    (GPT, "forward", KeyError("gru")),
    (GPT, "forward", ValueError("a mistake")),
    (GPT, "forward", RuntimeError("shapes cannot be multiplied")),
    (GPT, "generate", OSError("a mistake")),
    (GPT, "__init__", RuntimeError("a mistake")),
    (GPT, "__init__", KeyError("gru")),
    (GPT, "load_state_dict", KeyError("gru")),
    (train, "summary", ValueError("a mistake")),
])
def test_mistakes_in_the_code_show_their_traceback(
    owner, name, error, copied, monkeypatch, tmp_path
):
    monkeypatch.setattr(owner, name, raiser(error))
    with pytest.raises(type(error)):
        call(train, *TINY, "--out_dir", tmp_path / "run")
        call(train, "--resume", copied)
    with pytest.raises(type(error)):
        monkeypatch.setattr(sample, "summary", train.summary)
        call(sample, "--out_dir", copied)


@pytest.mark.parametrize("name", ["max_iters_teacherless", "n_head", "n_layer", "lr", "n_train"])
def test_a_setting_that_a_model_lacks_shows_its_traceback(name, monkeypatch, tmp_path):
    monkeypatch.delitem(train.DEFAULTS["gpt"], name)
    with pytest.raises((KeyError, TypeError, AttributeError)):
        call(train, "--max_iters", 1, "--n_test", 20, "--out_dir", tmp_path / "run")


# ---- Terminals, pipes and full disks


def interruptible():
    """Ctrl-C reaches a process of the tests, too, that was started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    out = tmp_path / "my run"
    given = (*TINY, "--max_iters", 10 ** 8, "--eval_interval", 5, "--out_dir", out)
    process = start("train.py", *given, stdout=subprocess.DEVNULL, preexec_fn=interruptible)
    wait_for((out / "log.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGINT)                       # as a terminal does
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert err == f"interrupted. To go on: python train.py --resume '{out}'\n"
    done = read_ckpt(out)["lines"][-1]["iter"]
    assert call(train, "--resume", out, "--max_iters", done + 3) == 0
    assert read_log(out)[-1]["iter"] == done + 3


@pytest.mark.parametrize("name, says", [
    ("load_graphs", "interrupted\n"),
    ("build_model", "interrupted\n"),
    ("predict", "interrupted before the first checkpoint\n"),
])
def test_ctrl_c_before_there_is_a_checkpoint(name, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, name, raiser(KeyboardInterrupt()))
    assert refusal(capsys, train, *TINY, "--out_dir", tmp_path / "run", code=1) == says


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
def test_ctrl_c_while_sample_waits(trained):
    given = ("--out_dir", trained(), "--num_graphs", 5, "--pause", 10 ** 6)
    process = start("sample.py", *given, preexec_fn=interruptible)
    printed = ""
    while "answer" not in printed:
        printed += process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (1, "interrupted\n")


SCRIPTS = {
    "data.py": ("-n", 100_000),
    "train.py": (*TINY, "--max_iters", 10 ** 8, "--eval_interval", 1, "--out_dir", "{}/new"),
    "sample.py": ("--out_dir", "{}/copied", "--show", 1000),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_nobody_reads_on(script, copied, tmp_path):
    """| head -1"""
    process = start(script, *(str(flag).format(tmp_path) for flag in SCRIPTS[script]))
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=600) == 1
    assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("script", SCRIPTS)
def test_output_that_cannot_be_written(script, copied, tmp_path):
    with open("/dev/full", "w") as full:
        flags = (str(flag).format(tmp_path) for flag in SCRIPTS[script])
        process = start(script, *flags, stdout=full)
        _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (1, "cannot write: No space left on device\n")


def test_names_that_stdout_cannot_write(tmp_path):
    out = tmp_path / "größe-\udcff 図"
    process = start(
        "train.py", *TINY, "--out_dir", out, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    printed, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert r"gr\xf6\xdfe-\udcff \u56f3" in printed
    assert [line["iter"] for line in read_log(out)[1:]] == [0, 3, 6]


def test_scripts_run_in_a_notebook(monkeypatch):
    """Its stdout has no encoding to set."""
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    data.run_script(lambda: print("graphs"))
    assert notebook.getvalue() == "graphs\n"


def test_stdout_may_be_closed():
    command = f"exec '{sys.executable}' '{HERE / 'data.py'}' >&-"
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in process.stderr


# ---- sample.py


def test_sample_on_files_and_single_graphs(trained, tmp_path, capsys):
    lines = lines_of(SMALL_STAR, *data.draw(SMALL_STAR, 4, rng()))
    file = tmp_path / "graphs.txt"
    file.write_text("\n".join(lines))
    given = ("--out_dir", trained(), "--json", "--show", 9)
    whole = json.loads(output(capsys, sample, *given, "--file", file))
    assert whole["num_graphs"] == 4 and "too few graphs (4)" in whole["verdict"]
    first = json.loads(output(capsys, sample, *given, "--file", file, "--num_graphs", 3))
    assert len(first["graphs"]) == 3
    for line, graph in zip(lines, whole["graphs"], strict=True):
        assert graph["path"] == [int(node) for node in line.split("=")[1].split(",")]
        for text in (line, line.split("=")[0] + "="):
            [alone] = json.loads(output(capsys, sample, *given, "--graph", text))["graphs"]
            assert alone["answer"] == graph["answer"]
            assert alone["p_first_hop"] == pytest.approx(graph["p_first_hop"], abs=1e-5)
    assert "  answer" not in output(capsys, sample, "--out_dir", trained(), "--show", 0)


def test_one_arm_leaves_nothing_to_move(trained, capsys):
    out = trained("--deg", 1, "--path_len", 3)
    printed = output(capsys, sample, "--out_dir", out, "--num_graphs", 100)
    assert "goal moved" not in printed and "nothing to choose" in printed
    assert read_log(out)[-1]["goal_moved"] is None


ARMS = [[1, 2, 3], [1, 4, 5]]       # the second is right


@pytest.mark.parametrize("way, answer, forced, text", [
    ((), [1, 2, 3], [1, 2, 5], [
        "      answer    1 ->  [2] ->  [3]",
        "        sure  99%     50%    100%",
        "              first wrong: first hop; walks another arm",
        "      forced    1 ->  [2] ->    5",
    ]),
    (("--teacherless",), [1, 4, 5], None, [
        "      answer    1 ->    4 ->    5",
        "        sure  99%     50%    100%",
        "              right",
    ]),
    (("--reverse",), [0, 2, 5], [1, 4, 5], [                    # written from 5 to 0
        "      answer  [0] ->  [2] ->    5",
        "        sure  99%     50%    100%",
        "              first wrong: first hop",
        "      forced    1 ->    4 ->    5",
    ]),
    (("--only_first_hop",), [1, 2], [1, 4], [
        "      answer    1 ->  [2]",
        "        sure  99%     50%",
        "              first wrong: first hop; walks another arm",
        "      forced    1 ->    4",
    ]),
])
def test_sample_shows_where_the_answer_leaves_the_path(way, answer, forced, text, capsys):
    graph = {"path": ARMS[1], "arms": ARMS, "p_first_hop": [0.5, 0.25], "answer": answer}
    graph.update(sure=[0.99, 0.5, 1.0][:len(answer)], forced=forced)
    sample.show(graph, ["start", "first hop", "goal"], settings(*way), pause=0)
    assert capsys.readouterr().out.splitlines() == [
        "P(first hop)",
        "       50.0%    1 ->    2 ->    3",
        "       25.0%    1 ->    4 ->    5   to the goal",
        *text, "",
    ]
    assert sample.is_arm(answer, ARMS) == (answer in (ARMS[0], ARMS[1], [1, 2]))


# ---- Files that are copied out

SCAN = """
import torch, scan_kernel
x = torch.ones(1, 2, 3)
print(scan_kernel.selective_scan(x, x, -torch.ones(2, 2), x, x).shape)
"""
LEARN = """
import torch
model = {}
idx = torch.randint(9, (2, 8))
model(idx, idx)[1].backward()
print(model.generate(idx[:, :3], 2).shape)
"""
LEARN_GPT = "from model_gpt import *" + LEARN.format("GPT(GPTConfig(8, 9, 1, 2, 4))")
LEARN_MAMBA = "from model_mamba import *" + LEARN.format("Mamba(MambaConfig(9, 1, 4))")
TRAIN_MAMBA = ("train.py", *TINY, "--model", "mamba")


@pytest.mark.parametrize("files, command, says", [
    ("data.py", ("data.py",), "="),
    ("scan_kernel.py", ("-c", SCAN), "[1, 2, 3]"),
    ("model_gpt.py", ("-c", LEARN_GPT), "[2, 5]"),
    ("model_mamba.py scan_kernel.py", ("-c", LEARN_MAMBA), "[2, 5]"),
    ("train.py data.py model_gpt.py", ("train.py", *TINY), "accuracy"),
    ("train.py data.py model_mamba.py scan_kernel.py", TRAIN_MAMBA, "accuracy"),
    ("sample.py train.py data.py model_gpt.py", ("sample.py", "--out_dir", "run"), "a real arm"),
])
def test_files_work_where_they_are_copied_to(files, command, says, trained, tmp_path):
    """Each file with those that it imports, and nothing else."""
    for name in files.split():
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(trained(), tmp_path / "run")
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and says in result.stdout, result.stderr


def test_a_model_that_was_not_copied_is_missed_in_one_line(trained, tmp_path):
    for name in ("train.py", "data.py", "sample.py", "model_gpt.py"):
        shutil.copy(HERE / name, tmp_path)
    run = trained("--model", "mamba")
    for command in (TRAIN_MAMBA, ("train.py", "--resume", run), ("sample.py", "--out_dir", run)):
        command = [sys.executable, *map(str, command)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr == f"{command[1]}: error: model_mamba.py is missing\n"


# ---- A long test: pytest -m slow

# A program that trains, and prints the pages in memory at each evaluation.
PAGES = """
import train

def progress(line, args):
    return "pages " + open("/proc/self/statm").read().split()[1]

train.progress = progress
train.STOP_AT = 2
train.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n_train", [200, 0])
def test_memory_stays_flat(n_train, tmp_path):
    """The resident memory of a tiny run of 20,000 steps does not grow in its second half.

    In the first half it goes up and down by 4 %, while the allocator settles.
    """
    given = (*TINY, "--max_iters", 20_000, "--eval_interval", 2000, "--n_train", n_train)
    command = [sys.executable, "-c", PAGES, *map(str, given), "--out_dir", tmp_path / "run"]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    pages = [int(number) for number in re.findall(r"pages (\d+)", result.stdout)]
    assert len(pages) == 11, result.stderr
    assert max(pages[6:]) < 1.02 * max(pages[1:6]), pages
