"""The tests: pytest, on a machine without a GPU. Triton kernels run in Triton's interpreter.

On a machine with a GPU, TRITON_INTERPRET=0 pytest -k scan runs the kernels themselves.
"""
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import argparse
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import sample
import scan_kernel
import train
from data import PathStar
from model_gpt import GPT, GPTConfig, attention, fused_attention
from model_mamba import Mamba, MambaConfig
from scan_kernel import (
    selective_scan, selective_scan_cpu, selective_scan_ref, selective_scan_triton
)

HERE = Path(__file__).parent
STAR = PathStar(2, 5, 50)
LINE = "32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def rng(seed=0):
    return np.random.default_rng(seed)


def run(script, *flags, cwd=HERE):
    """Runs a script in a process of its own."""
    command = [sys.executable, str(HERE / script), *map(str, flags)]
    return subprocess.run(
        command, cwd=cwd, text=True, capture_output=True, stdin=subprocess.DEVNULL, env=ONE_THREAD
    )


def call(monkeypatch, module, *flags):
    """Runs a script in this process -> its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
    try:
        module.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # as Python does with a message
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code
    return 0


def is_one_line(printed, says):
    """A refusal: nothing on stdout, one line on stderr that says why."""
    return printed.out == "" and printed.err.count("\n") == 1 and says in printed.err


def lines_of(star, prefixes, paths):
    """The text form of graphs."""
    return [data.to_text(*graph) for graph in zip(prefixes.tolist(), paths.tolist())]


# ---- data.py


def test_the_papers_example_in_tokens():
    """Node k is k, | is N, = is N + 1, / is N + 2; commas are not tokens."""
    edges, path = data.parse_line(LINE)
    paths = np.array([path])
    prefixes = data.prefix_tokens(STAR, np.array([edges]), paths)
    assert prefixes[0].tolist() == [
        32, 3, 50, 16, 12, 50, 3, 19, 50, 32, 34, 50, 34, 6, 50, 6, 16, 50, 19, 47, 50, 47, 28, 52,
        32, 12, 51,
    ]
    assert paths[0].tolist() == [32, 34, 6, 16, 12]
    assert STAR.prefix_len == 27 and STAR.dollar == 53 and STAR.vocab_size == 54
    assert lines_of(STAR, prefixes, paths) == [LINE]
    assert data.to_text(prefixes[0].tolist()) == LINE.split("=")[0] + "="


@pytest.mark.parametrize("sizes", [(2, 5, 50), (1, 2, 2), (5, 3, 11), (3, 2, 200)])
def test_drawn_graphs_are_path_stars(sizes, tmp_path):
    """They are written, and read again by a parser that refuses anything else."""
    star = PathStar(*sizes)
    file = tmp_path / "graphs.txt"
    prefixes, paths = data.draw(star, 500, rng())
    file.write_text("\n".join(lines_of(star, prefixes, paths)))
    edges, read = data.read_graphs(file, num_nodes=star.num_nodes)
    assert (data.prefix_tokens(star, edges, read) == prefixes).all()
    assert (read == paths).all()
    assert edges.shape == (500, star.n_edges, 2) and paths.shape == (500, star.path_len)


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


def test_same_seed_same_graphs():
    first = run("data.py", "-n", 3, "--seed", 0).stdout
    assert len(first.splitlines()) == 3
    assert run("data.py", "-n", 3, "--seed", 0).stdout == first
    assert run("data.py", "-n", 3, "--seed", 1).stdout != first


def test_printed_graphs_are_not_those_of_a_run_with_the_same_seed(tmp_path):
    """NumPy draws the same numbers from seed s and [s, 0]. So files need a stream of their own."""
    file = tmp_path / "graphs.txt"
    file.write_text(run("data.py", "-n", 300, "--seed", 0).stdout)
    _, (printed, _), _ = data.datasets(None, None, 50, None, 1, 0, train_file=file)
    _, (train_prefixes, _), (test_prefixes, _) = data.datasets(2, 5, 50, 300, 300, 0)
    assert not set(data.keys(train_prefixes)) & set(data.keys(printed))
    assert not set(data.keys(test_prefixes)) & set(data.keys(printed))


def test_training_and_test_set_share_no_graph():
    """In a space of 48 graphs: each is used once."""
    star, (train_prefixes, _), (test_prefixes, _) = data.datasets(2, 2, 4, 40, 8, 0)
    assert star.count() == 48
    test_keys = set(data.keys(test_prefixes))
    assert len(set(data.keys(train_prefixes)) | test_keys) == 48
    fresh, _ = data.draw_unseen(star, 1000, rng(), test_keys, distinct=False)
    assert not set(data.keys(fresh)) & test_keys
    assert len(set(data.keys(fresh))) == 40
    _, (again, _), _ = data.datasets(2, 2, 4, 40, 8, 0)
    _, (other, _), _ = data.datasets(2, 2, 4, 40, 8, 1)
    assert (again == train_prefixes).all() and (other != train_prefixes).any()
    for n_train, n_test in ((41, 8), (0, 48)):
        with pytest.raises(ValueError, match="only 48 different graphs"):
            data.datasets(2, 2, 4, n_train, n_test, 0)


@pytest.mark.parametrize("sizes", [(2, 2, 4), (1, 3, 4), (3, 2, 4), (2, 3, 5)])
def test_count_of_graphs(sizes):
    star = PathStar(*sizes)
    prefixes, _ = data.draw(star, 40 * star.count(), rng())
    assert len(set(data.keys(prefixes))) == star.count()


def test_files_and_what_they_determine(tmp_path, capsys):
    train_file, test_file = tmp_path / "train.txt", tmp_path / "test.txt"
    train_lines = lines_of(STAR, *data.draw(STAR, 30, rng(1))) + [LINE]
    test_lines = lines_of(STAR, *data.draw(STAR, 10, rng(2))) + [LINE]
    train_file.write_text("\r\n".join(train_lines) + "\r\n")
    test_file.write_text("\n".join(test_lines))
    star, (prefixes, _), (test_prefixes, _) = data.datasets(
        None, None, None, None, None, 0, train_file, test_file
    )
    assert (star.deg, star.path_len, star.num_nodes) == (2, 5, 50)
    assert (len(prefixes), len(test_prefixes)) == (31, 11)
    assert capsys.readouterr().err == "warning: 1 of the test graphs are training graphs\n"
    star, (prefixes, paths), (test_prefixes, _) = data.datasets(
        None, None, 60, 5, 7, 0, train_file
    )
    assert (star.num_nodes, len(prefixes), len(test_prefixes)) == (60, 5, 7)
    assert lines_of(star, prefixes, paths) == train_lines[:5]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line, says", [
    ("32,3|16,12", "not of the form"),
    ("", "not of the form"),
    (LINE.replace(",", ";"), "not of the form"),
    (LINE + ",", "not of the form"),
    (LINE.replace("32,3", "x,3"), "not of the form"),
    (LINE.replace("32", "9" * 5000), "not of the form"),
    (LINE.replace("/32,12=32", "/9,12=9"), "no edge leaves the start 9"),
    (LINE.replace("47,28", "47,16"), "node 16 is repeated"),
    (LINE.replace("47,28", "47,32"), "node 32 is repeated"),
    (LINE.replace("47,28", "46,28"), "some edges are on no arm"),
    (LINE.replace("47,28", "19,28"), "some edges are on no arm"),
    ("0,1|0,2|2,3/0,3=0,2,3", "arms differ in length"),
    (LINE.replace("/32,12", "/32,16"), "the goal 16 is not the end of an arm"),
    (LINE.replace("=32,34", "=32,3"), "path 32,3,6,16,12 is not the arm"),
    (LINE.replace("=32,34,6,16,12", "="), "the path is missing"),
    ("0,1|2,3|1,4|0,2/0,4=0,1,4", "path_len 3, where deg 2 and path_len 5 are expected"),
    (LINE.replace("28", "60"), "node 60 is out of range"),
])
def test_malformed_lines(line, says, tmp_path):
    file = tmp_path / "graphs.txt"
    file.write_text(f"{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(ValueError) as error:
        data.read_graphs(file, num_nodes=60)
    assert says in str(error.value) and f"{file}, line 2: " in str(error.value)


def test_files_that_hold_no_graphs(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "one").write_text(LINE)
    with pytest.raises(ValueError, match="is empty"):
        data.read_graphs(tmp_path / "empty")
    with pytest.raises(ValueError, match="line 1"):
        data.read_graphs(tmp_path / "binary")
    with pytest.raises(ValueError, match="has 1 graphs, fewer than the 2"):
        data.read_graphs(tmp_path / "one", 2)
    with pytest.raises(ValueError, match="one, line 1: .* where deg 3"):
        data.datasets(3, None, None, None, 1, 0, train_file=tmp_path / "one")


def test_every_epoch_sees_every_graph_once():
    seen = np.concatenate([data.batch_indices(20, 8, 0, step) for step in range(5)]).tolist()
    assert Counter(seen[:20]) == Counter(seen[20:]) == Counter(range(20))
    assert seen[:20] != seen[20:]


def is_path_star(line):
    """Decides in another way what `parse_line` decides: from the ends of the arms backwards."""
    body, path = line.split("=")
    edges, question = body.split("/")
    edges = [tuple(map(int, edge.split(","))) for edge in edges.split("|")]
    start, goal = map(int, question.split(","))
    parent = {b: a for a, b in edges}
    children = Counter(a for a, _ in edges)
    if len(parent) < len(edges) or start in parent:
        return False
    if any(count > 1 for node, count in children.items() if node != start):
        return False
    arms = []
    for end in parent:
        if end not in children:
            arm = [end]
            while arm[-1] in parent and len(arm) <= len(edges):
                arm.append(parent[arm[-1]])
            arms.append(arm[::-1])
    if {arm[0] for arm in arms} != {start} or len({len(arm) for arm in arms}) != 1:
        return False
    if sum(len(arm) - 1 for arm in arms) < len(edges):
        return False
    right = [arm for arm in arms if arm[-1] == goal]
    return bool(right) and (path == "" or [int(node) for node in path.split(",")] == right[0])


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


def fuzz(n):
    """Holds `parse_line` to `is_path_star` on n mutated lines -> how many it took"""
    random = rng()
    lines = []
    for star in (PathStar(2, 4, 12), PathStar(3, 3, 12)):
        lines += lines_of(star, *data.draw(star, 200, random))
    accepted = 0
    for _ in range(n):
        line = mutate(lines[random.integers(len(lines))], random)
        right = data.LINE.fullmatch(line) is not None and is_path_star(line)
        try:
            data.parse_line(line)
            accepted += 1
            assert right, line
        except ValueError:
            assert not right, line
    return accepted


def test_mutated_lines_are_judged_rightly():
    assert 50 < fuzz(5000) < 2500


# ---- scan_kernel.py

NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]
OPTIONAL = ["D", "z", "delta_bias", "initial_state"]
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
needs_triton = pytest.mark.skipif(scan_kernel.triton is None, reason="needs triton")
every_scan = pytest.mark.parametrize(
    "scan", [selective_scan_cpu, pytest.param(selective_scan_triton, marks=needs_triton)]
)


def scan_inputs(batch, seqlen, dim, dstate, dtype=torch.float32, without=()):
    """Random arguments {name: tensor}. The per-token ones have the dtype, the others float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "u": (batch, dim, seqlen), "delta": (batch, dim, seqlen), "A": (dim, dstate),
        "B": (batch, dstate, seqlen), "C": (batch, dstate, seqlen), "D": (dim,),
        "z": (batch, dim, seqlen), "delta_bias": (dim,), "initial_state": (batch, dim, dstate),
    }
    inputs = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name == "A":
            x = -2 * x.abs()
        if name not in ("u", "delta", "B", "C", "z") and dtype != torch.float64:
            x = x.to(DEVICE)
        else:
            x = x.to(DEVICE, dtype)
        inputs[name] = None if name in without else x.requires_grad_()
    return inputs


def passes(scan, inputs, softplus=True):
    """-> {name: tensor}: out, the last state, and the gradients of a weighted sum of both"""
    out, last = scan(**inputs, delta_softplus=softplus, return_last_state=True)
    loss = 0
    for x in (out, last):
        weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=x.device)
        loss = loss + (x.double() * weight.reshape(x.shape)).sum()
    given = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(given.values()))
    return {"out": out, "last": last} | dict(zip(given, gradients))


def assert_matches(scan, inputs, softplus=True, tolerance=2e-5):
    """All that `passes` returns is that of the plain loop in float64."""
    exact_inputs = {}
    for name, x in inputs.items():
        exact_inputs[name] = x if x is None else x.detach().double().requires_grad_()
    exact = passes(selective_scan_ref, exact_inputs, softplus)
    for name, x in passes(scan, inputs, softplus).items():
        scale = exact[name].abs().max().clamp(min=1e-3)
        assert x.shape == exact[name].shape
        assert (x.double() - exact[name]).abs().max() <= tolerance * scale, name


def scan_in_numpy(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """The recurrence, number by number -> out, last state"""
    u, delta, A, B, C, D, z, delta_bias, h = [
        x.detach().double().cpu().numpy()
        for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    ]
    h = h.copy()
    out = np.zeros(u.shape)
    for b, d, t in np.ndindex(*u.shape):
        dt = math.log1p(math.exp(delta[b, d, t] + delta_bias[d]))
        y = D[d] * u[b, d, t]
        for n in range(A.shape[1]):
            h[b, d, n] = math.exp(dt * A[d, n]) * h[b, d, n] + dt * B[b, n, t] * u[b, d, t]
            y += C[b, n, t] * h[b, d, n]
        out[b, d, t] = y * z[b, d, t] / (1 + math.exp(-z[b, d, t]))
    return torch.from_numpy(out), torch.from_numpy(h)


def test_the_plain_loop_is_the_recurrence():
    inputs = scan_inputs(2, 7, 3, 4, torch.float64)
    out, last = selective_scan_ref(**inputs, delta_softplus=True, return_last_state=True)
    expected_out, expected_last = scan_in_numpy(**inputs)
    torch.testing.assert_close(out.cpu(), expected_out)
    torch.testing.assert_close(last.cpu(), expected_last)


SIZES = [(2, 1, 3, 1), (1, 2, 70, 5), (3, 3, 5, 8), (2, 31, 66, 16), (1, 257, 3, 5)]


@pytest.mark.parametrize("without", [(), ("initial_state",)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece_size", [scan_kernel.PIECE_SIZE, 300])
def test_cpu_scan(size, piece_size, without, monkeypatch):
    """Values and all gradients. The small pieces cut the batch, too."""
    monkeypatch.setattr(scan_kernel, "PIECE_SIZE", piece_size)
    assert_matches(selective_scan_cpu, scan_inputs(*size, without=without))


@needs_triton
@pytest.mark.parametrize("without", [(), ("initial_state",)])
@pytest.mark.parametrize("size", SIZES)
def test_triton_scan(size, without):
    assert_matches(selective_scan_triton, scan_inputs(*size, without=without))


@every_scan
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("without", [*[(name,) for name in OPTIONAL], OPTIONAL])
def test_scan_without_optional_arguments(scan, without, softplus):
    inputs = scan_inputs(2, 9, 6, 3, without=without)
    if not softplus:  # dt must not be negative then
        with torch.no_grad():
            inputs["delta"].abs_()
            if inputs["delta_bias"] is not None:
                inputs["delta_bias"].abs_()
    assert_matches(scan, inputs, softplus)


@pytest.mark.parametrize("scan", [
    selective_scan_ref, selective_scan_cpu,
    pytest.param(selective_scan_triton, marks=needs_triton),
])
def test_a_scan_in_pieces_equals_the_whole(scan):
    """Each piece starts from the last state of the one before. Values and all gradients."""
    def in_pieces(initial_state, **inputs):
        outs = []
        state = initial_state
        for start, end in ((0, 1), (1, 12), (12, 19), (19, 40)):
            piece = dict(inputs)
            for name in ("u", "delta", "B", "C", "z"):
                piece[name] = inputs[name][:, :, start:end]
            piece.pop("return_last_state")
            out, state = scan(**piece, return_last_state=True, initial_state=state)
            outs.append(out)
        return torch.cat(outs, dim=2), state

    for without in ((), ("initial_state",)):
        inputs = scan_inputs(2, 40, 5, 3, torch.float64, without=without)
        whole = passes(scan, inputs)
        for name, x in passes(in_pieces, inputs).items():
            torch.testing.assert_close(x, whole[name], msg=lambda text: f"{name}: {text}")


@every_scan
def test_gradients_by_finite_differences(scan):
    """Of all arguments, the initial state too, through the output and the last state."""
    inputs = scan_inputs(2, 5, 3, 2, torch.float64)

    def function(*tensors):
        named = dict(zip(NAMES, tensors))
        return scan(**named, delta_softplus=True, return_last_state=True)

    torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


@every_scan
def test_gradients_through_the_last_state_alone(scan):
    inputs = scan_inputs(2, 11, 3, 2)
    _, last = scan(**inputs, delta_softplus=True, return_last_state=True)
    _, exact = selective_scan_ref(**inputs, delta_softplus=True, return_last_state=True)
    for name in ("u", "delta", "A", "B", "delta_bias", "initial_state"):
        gradient, = torch.autograd.grad(last.sum(), inputs[name], retain_graph=True)
        expected, = torch.autograd.grad(exact.sum(), inputs[name], retain_graph=True)
        torch.testing.assert_close(gradient, expected, msg=lambda text: f"{name}: {text}")


@every_scan
def test_states_that_are_not_used_cost_nothing(scan, monkeypatch):
    """Without an initial state and a use of the last one, the backward pass is given neither."""
    calls = []
    name = "cpu_backward" if scan is selective_scan_cpu else "triton_backward"
    backward = getattr(scan_kernel, name)

    def recorded(dout, dlast_state, inputs, *others):
        calls.append((dlast_state, inputs[8]))
        return backward(dout, dlast_state, inputs, *others)

    monkeypatch.setattr(scan_kernel, name, recorded)
    inputs = scan_inputs(2, 9, 6, 3, without=("initial_state",))
    out, _ = scan(**inputs, delta_softplus=True, return_last_state=True)
    out.sum().backward()
    assert calls == [(None, None)]


@every_scan
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float16, 1e-3), (torch.bfloat16, 8e-3),
])
def test_dtypes(scan, dtype, tolerance):
    """Half precision, beside float64 on the same rounded inputs: only results are rounded.

    The interpreter truncates to bfloat16 where the chip rounds: by one unit in the last place.
    """
    inputs = scan_inputs(2, 9, 6, 5, dtype)
    out, last = scan(**inputs, delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(scan, inputs, tolerance=tolerance)


@every_scan
def test_mixed_dtypes(scan):
    """Each per-token argument may have a dtype of its own. out has u's."""
    inputs = scan_inputs(2, 9, 6, 3)
    for name, dtype in (
        ("delta", torch.float64), ("z", torch.float64), ("delta", torch.bfloat16),
        ("B", torch.bfloat16), ("initial_state", torch.float64),
    ):
        mixed = inputs | {name: inputs[name].detach().to(dtype).requires_grad_()}
        assert scan(**mixed).dtype == torch.float32
        assert_matches(scan, mixed, tolerance=8e-3 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("scan", [
    selective_scan_ref, selective_scan_cpu,
    pytest.param(selective_scan_triton, marks=needs_triton),
])
def test_autocast_does_not_reach_into_the_scan(scan):
    """The same bits inside and outside: products of states stay float32."""
    inputs = scan_inputs(2, 9, 6, 3)
    plain = passes(scan, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = passes(scan, inputs)
    for name, x in inside.items():
        torch.testing.assert_close(x, plain[name], rtol=0, atol=0)


@every_scan
def test_strides(scan):
    """Views give the same bits: time before channels, every second channel, expanded."""
    inputs = scan_inputs(2, 6, 5, 3)
    views = {}
    for name, x in inputs.items():
        x = x.detach()
        if name == "u":
            x = torch.stack([x, x], dim=2).flatten(1, 2)[:, ::2]
        elif name == "D":
            x = torch.stack([x, x], dim=1)[:, 0]
        elif x.dim() > 1:
            x = x.mT.contiguous().mT
        views[name] = x.requires_grad_()
    assert not views["u"].is_contiguous() and not views["D"].is_contiguous()
    plain = passes(scan, inputs)
    for name, x in passes(scan, views).items():
        torch.testing.assert_close(x, plain[name], rtol=0, atol=0)
    expanded = inputs | {"u": inputs["u"].detach()[:1].expand(2, -1, -1)}
    copied = inputs | {"u": expanded["u"].clone()}
    torch.testing.assert_close(scan(**expanded), scan(**copied), rtol=0, atol=0)


@every_scan
def test_extremes(scan):
    """Steps of 0, and steps so large that exp(dt A) is 0: finite, and right. An empty batch."""
    inputs = scan_inputs(1, 12, 4, 3)
    with torch.no_grad():
        inputs["delta"][:, :, 3:6] = -200.0
        inputs["delta"][:, :, 7:9] = 300.0
        inputs["A"] *= 50
    assert_matches(scan, inputs)
    for name in ("u", "delta", "B", "C", "z", "initial_state"):
        inputs[name] = inputs[name][:0]
    out = scan(**inputs, delta_softplus=True)
    gradient, = torch.autograd.grad(out.sum(), inputs["A"])
    assert out.shape == (0, 4, 12) and gradient.abs().max() == 0


@every_scan
def test_nothing_comes_from_behind_the_end(scan):
    """A growing state, with steps that only delta keeps small.

    Behind the last step delta reads as 0. The state would overflow there.
    """
    inputs = scan_inputs(1, 9, 4, 3)
    with torch.no_grad():
        inputs["delta"].sub_(101)
        inputs["A"].abs_().add_(1)
        inputs["delta_bias"].fill_(100)
    assert_matches(scan, inputs)


MAMBA_SSM_TOLERANCES = {  # rtol, atol
    torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2),
}


@pytest.mark.parametrize("scan, dtype, seqlen", [
    *[(selective_scan_cpu, torch.float32, n) for n in (128, 256, 512, 1024, 2048, 4096)],
    *[(selective_scan_cpu, torch.float16, n) for n in (128, 4096)],
    *[(selective_scan_cpu, torch.bfloat16, n) for n in (128, 4096)],
    pytest.param(selective_scan_triton, torch.float32, 512, marks=needs_triton),
    pytest.param(selective_scan_triton, torch.float16, 128, marks=needs_triton),
    pytest.param(selective_scan_triton, torch.bfloat16, 128, marks=needs_triton),
])
def test_tolerances_of_mamba_ssm(scan, dtype, seqlen):
    """The sizes, inputs and tolerances with which the mamba_ssm package tests its CUDA kernel."""
    rtol, atol = MAMBA_SSM_TOLERANCES[dtype]
    torch.manual_seed(0)
    batch, dim, dstate = 2, 4, 8
    inputs = {
        "u": torch.randn(batch, dim, seqlen, dtype=dtype),
        "delta": (0.5 * torch.rand(batch, dim, seqlen)).to(dtype),
        "A": -0.5 * torch.rand(dim, dstate),
        "B": torch.randn(batch, dstate, seqlen, dtype=dtype),
        "C": torch.randn(batch, dstate, seqlen, dtype=dtype),
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, seqlen, dtype=dtype),
        "delta_bias": 0.5 * torch.rand(dim),
    }
    inputs = {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}
    out, last = scan(**inputs, delta_softplus=True, return_last_state=True)
    out_ref, last_ref = selective_scan_ref(**inputs, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(out, out_ref, rtol=rtol, atol=atol)
    torch.testing.assert_close(last, last_ref, rtol=rtol, atol=atol)
    tensors = list(inputs.values())
    gradients = torch.autograd.grad(out, tensors, torch.ones_like(out))
    expected = torch.autograd.grad(out_ref, tensors, torch.ones_like(out))
    weight_rtol, weight_atol = max(1e-3, rtol), max(1e-3, atol)
    tolerances = {
        "u": (2 * rtol, 2 * atol), "delta": (5 * rtol, 10 * atol),
        "A": (weight_rtol, 5 * weight_atol), "B": (rtol, atol), "C": (rtol, atol),
    }
    for name, gradient, reference in zip(inputs, gradients, expected):
        r, a = tolerances.get(name, (weight_rtol, weight_atol))
        torch.testing.assert_close(
            gradient, reference, rtol=r, atol=a, msg=lambda text: f"{name}: {text}"
        )


@every_scan
@pytest.mark.parametrize("without", [(), ("initial_state",)])
def test_scan_under_compile_and_checkpoint(scan, without):
    """torch.compile takes it without a graph break. Both give the same bits."""
    def checkpointed(**inputs):
        return torch.utils.checkpoint.checkpoint(scan, use_reentrant=False, **inputs)

    inputs = scan_inputs(3, 33, 20, 4, without=without)
    plain = passes(scan, inputs)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for wrapped in (scan, compiled, checkpointed):
        for name, x in passes(wrapped, inputs).items():
            torch.testing.assert_close(x, plain[name], rtol=0, atol=0)


class LiveMemory(TorchDispatchMode):
    """Counts the elements of the tensors that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                size = storage.nbytes() // x.element_size()
                self.known.add(key)
                self.now += size
                weakref.finalize(storage, self.free, key, size)
        self.peak = max(self.peak, self.now)
        return result


@every_scan
def test_scan_memory(scan, monkeypatch):
    """Saved for the backward pass: the inputs, and a state for each chunk of time.

    There is never a tensor (batch, dim, seqlen, dstate), nor as much memory in smaller ones.
    """
    if scan is selective_scan_cpu:
        batch, seqlen, dim, dstate = 4, 256, 64, 128
        chunk, use_triton = scan_kernel.CPU_CHUNK, False
    else:
        batch, seqlen, dim, dstate = 1, 64, 32, 64
        chunk, use_triton = scan_kernel.TRITON_CHUNK, True
    monkeypatch.setattr(scan_kernel, "PIECE_SIZE", 1 << 14)
    inputs = scan_inputs(batch, seqlen, dim, dstate)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(**inputs, delta_softplus=True)
    known = {x.data_ptr() for x in inputs.values()}
    saved_states = sum(x.numel() for x in saved if x.data_ptr() not in known)
    assert saved_states == math.ceil(seqlen / chunk) * batch * dim * dstate

    # The interpreter of the kernels allocates for itself: leave it out.
    monkeypatch.setattr(scan_kernel, "launch", lambda *args: None)
    tensors = [x.detach() for x in inputs.values()]
    with LiveMemory() as live:
        out, _, states = scan_kernel.scan_op(*tensors, True, True, use_triton)
        dout = torch.ones_like(out)
        scan_kernel.scan_backward_op(dout, None, *tensors, states, True, use_triton)
    assert saved_states < live.peak < batch * seqlen * dim * dstate / 2


OFFSETS = """
import re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import scan_kernel
for kernel in (scan_kernel.forward_kernel, scan_kernel.backward_kernel):
    signature, constants = {}, {}
    sizes = {"SOFTPLUS": True, "CHUNK": 2, "BLOCK_N": 16, "BLOCK_D": 32}
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
    assert min(kinds.values()) > 10


def test_scan_refuses_arguments_of_another_form():
    inputs = scan_inputs(2, 6, 5, 3)
    u, A, B = inputs["u"], inputs["A"], inputs["B"]
    for wrong, says in (
        ({"A": A.cfloat()}, "A must be a real tensor"),
        ({"B": B[:, None]}, "B must be .* in groups, are not supported"),
        ({"C": inputs["C"][0]}, "C must be"),
        ({"delta": inputs["delta"][:, :, 1:]}, "delta must be"),
        ({"D": inputs["D"][1:]}, "D must be"),
        ({"initial_state": inputs["initial_state"].mT}, "initial_state must be"),
        ({"A": torch.tensor(-1.0)}, "u must be"),
        ({"u": torch.tensor(1.0)}, "u must be"),
        ({"u": u[:, :, :0]}, "u must be"),
    ):
        with pytest.raises(ValueError, match=says):
            selective_scan(**(inputs | wrong))


def test_selective_scan_picks_the_fastest(monkeypatch):
    """The plain loop for one step or little work, else the path for the device."""
    picked = []
    for name in ("selective_scan_ref", "selective_scan_cpu", "selective_scan_triton"):
        monkeypatch.setattr(
            scan_kernel, name, lambda *args, name=name: picked.append(name.split("_")[-1])
        )
    for batch, seqlen in ((64, 1), (1, 3), (64, 3)):
        selective_scan(**{name: x.cpu() for name, x in scan_inputs(batch, seqlen, 20, 4).items()})
    assert picked == ["ref", "ref", "cpu"]

    class OnGPU(torch.Tensor):
        is_cuda = True

    if scan_kernel.triton is not None:
        inputs = scan_inputs(64, 3, 20, 4)
        selective_scan(**(inputs | {"u": inputs["u"].detach().as_subclass(OnGPU)}))
        assert picked[-1] == "triton"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None    # as if it were not installed
import torch
from scan_kernel import selective_scan, selective_scan_triton
u, A, B = torch.ones(64, 20, 3), -torch.ones(20, 4), torch.ones(64, 4, 3)
print(tuple(selective_scan(u, u, A, B, B).shape))
try:
    selective_scan_triton(u, u, A, B, B)
except RuntimeError as error:
    print(error)
"""


def test_scan_without_triton():
    """As on macOS and Windows: the scan runs, and the Triton one says what it needs."""
    command = [sys.executable, "-c", WITHOUT_TRITON]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    shape, message = result.stdout.splitlines()
    assert shape == "(64, 20, 3)"
    assert message.startswith("selective_scan_triton needs Triton and a GPU")


# ---- model_gpt.py, model_mamba.py

every_model = pytest.mark.parametrize("name", train.DEFAULTS)  # a third one is held to the same
SMALL = {"n_layer": 2, "n_embd": 16, "n_head": 2, "d_state": 4}
SMALL_STAR = PathStar(2, 5, 10)


def small(name):
    """A small model for graphs of SMALL_STAR, with 14 tokens."""
    torch.manual_seed(0)
    return train.build_model(argparse.Namespace(model=name, **SMALL), SMALL_STAR)


def tokens(*shape, seed=0):
    return torch.randint(0, 14, shape, generator=torch.Generator().manual_seed(seed))


@every_model
def test_forward_returns_logits_and_loss(name):
    """The loss is the mean over the targets that are not -1."""
    model, idx = small(name), tokens(3, 11)
    targets = tokens(3, 11, seed=1)
    targets[:, :7] = -1
    logits, loss = model(idx, targets)
    given = logits.log_softmax(2).gather(2, targets[:, :, None].clamp(min=0))
    assert logits.shape == (3, 11, 14)
    torch.testing.assert_close(loss, -given[:, 7:].mean())
    same, none = model(idx)
    assert none is None
    torch.testing.assert_close(same, logits)


@every_model
def test_models_are_causal(name):
    """A token changes the logits at its place and behind it, and none before."""
    model, idx = small(name), tokens(2, 12)
    changed = idx.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 14
    before, after = model(idx)[0], model(changed)[0]
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


@pytest.mark.parametrize("name", ["gpt", "mamba"])
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


def test_attention_written_out_equals_fused():
    generator = torch.Generator().manual_seed(0)
    for T, S in ((7, 7), (1, 7), (3, 7)):
        q = torch.randn(2, 3, T, 8, generator=generator, dtype=torch.float64)
        k = torch.randn(2, 3, S, 8, generator=generator, dtype=torch.float64)
        v = torch.randn(2, 3, S, 8, generator=generator, dtype=torch.float64)
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        expected = F.scaled_dot_product_attention(q, k, v, seen)
        torch.testing.assert_close(attention(q, k, v), expected)
        torch.testing.assert_close(fused_attention(q, k, v), expected)


def small_gpt(fused):
    torch.manual_seed(0)
    return GPT(GPTConfig(40, 14, n_layer=2, n_head=2, n_embd=16, fused=fused))


def shake(model):
    """Moves all weights away from where they start, as some start at 0 or 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.state_dict()


def shapes_of(weights):
    return {name: tuple(x.shape) for name, x in weights.items()}


def test_gpt2s_weights_have_the_names_and_shapes_of_ours():
    block = {
        "ln_1": (16,), "attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "ln_2": (16,),
        "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64),
    }
    shapes = {
        "transformer.wte.weight": (14, 16), "transformer.wpe.weight": (40, 16),
        "lm_head.weight": (14, 16), "transformer.ln_f.weight": (16,),
        "transformer.ln_f.bias": (16,),
    }
    for i in (0, 1):
        for name, shape in block.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            shapes[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    model = small_gpt(fused=True)
    assert shapes_of(model.state_dict()) == shapes
    model.load_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("fused", [True, False])
def test_gpt_is_gpt2(fused):
    """The logits, against GPT-2's equations on the raw weights, with the exact GELU."""
    model = small_gpt(fused).double()
    w, idx = shake(model), tokens(1, 10)[0]

    def norm(x, name):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:10]
    for i in range(2):
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
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2           # GELU, the exact form
        x = x + linear(y, pre + "mlp.c_proj")
    expected = norm(x, "transformer.ln_f") @ w["lm_head.weight"].T
    torch.testing.assert_close(model(idx[None])[0][0], expected)


def test_gpt_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="41 tokens is longer than block_size 40"):
        small_gpt(fused=True)(tokens(1, 41))
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig(n_head=5, n_embd=16)


@pytest.mark.parametrize("width", [96, 768])
def test_gpt_starts_as_gpt2_at_its_width(width):
    """Apart from what the docstring says: 1 / i, and positions that are sinusoids."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 500, n_layer=2, n_head=2, n_embd=width))
    weights = model.state_dict()
    scale = 0.02 * math.sqrt(768 / width)
    for name, divisor in (
        ("0.attn.c_attn", 1), ("1.mlp.c_fc", 1), ("0.mlp.c_proj", 1), ("1.mlp.c_proj", 2),
        ("1.attn.c_proj", 2),
    ):
        std = weights[f"transformer.h.{name}.weight"].std().item()
        assert std == pytest.approx(scale / divisor, rel=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.std().item() == pytest.approx(scale, rel=0.05)
    table = model.transformer.wpe.weight / (2 * scale)
    products = (table[:-1] * table[1:]).sum(dim=1)       # one step is the same rotation everywhere
    torch.testing.assert_close(products, products[:1].expand(63))
    shortest, longest = table[:4, :2], table[63, -2:]
    expected = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]])
    torch.testing.assert_close(shortest, expected, atol=1e-5, rtol=0)
    turns = math.atan2(*longest.tolist()) / (2 * math.pi)
    assert 0.97 < turns / (63 / (4 * 64)) < 1.2


def small_mamba():
    torch.manual_seed(0)
    return Mamba(MambaConfig(vocab_size=14, n_layer=2, d_model=16, d_state=4))


MIXER = {
    "in_proj.weight": (64, 16), "conv1d.weight": (32, 1, 4), "conv1d.bias": (32,),
    "x_proj.weight": (9, 32), "dt_proj.weight": (32, 1), "dt_proj.bias": (32,),
    "A_log": (32, 4), "D": (32,), "out_proj.weight": (16, 32),
}


def test_mambas_weights_have_the_names_and_shapes_of_ours():
    shapes = {
        "backbone.embedding.weight": (14, 16), "backbone.norm_f.weight": (16,),
        "lm_head.weight": (14, 16),
    }
    for i in (0, 1):
        shapes[f"backbone.layers.{i}.norm.weight"] = (16,)
        for name, shape in MIXER.items():
            shapes[f"backbone.layers.{i}.mixer.{name}"] = shape
    model = small_mamba()
    assert shapes_of(model.state_dict()) == shapes
    model.load_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()})


def test_mamba_is_mamba():
    """The logits, against the paper's equations on the raw weights."""
    model = small_mamba().double()
    w, idx = shake(model), tokens(1, 10)[0]

    def norm(x, name):
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]

    x = w["backbone.embedding.weight"][idx]
    for i in range(2):
        p = {name: w[f"backbone.layers.{i}.mixer.{name}"] for name in MIXER}
        u, z = (norm(x, f"backbone.layers.{i}.norm") @ p["in_proj.weight"].T).split(32, dim=1)
        padded = torch.cat([torch.zeros(3, 32), u])
        u = sum(padded[k:k + 10] * p["conv1d.weight"][:, 0, k] for k in range(4))
        u = F.silu(u + p["conv1d.bias"])
        dt, B, C = (u @ p["x_proj.weight"].T).split([1, 4, 4], dim=1)
        delta = dt @ p["dt_proj.weight"].T
        y, _ = scan_in_numpy(
            u.T[None], delta.T[None], -torch.exp(p["A_log"]), B.T[None], C.T[None], p["D"],
            z.T[None], p["dt_proj.bias"], torch.zeros(1, 32, 4)
        )
        x = x + y[0].T @ p["out_proj.weight"].T
    expected = norm(x, "backbone.norm_f") @ w["lm_head.weight"].T
    torch.testing.assert_close(model(idx[None])[0][0], expected)


def test_mamba_starts_as_the_original():
    """Apart from the embedding, which begins larger, and what layer i adds, divided by i."""
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=14, n_layer=4, d_model=512))
    mixer = model.backbone.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).repeat(1024, 1))
    log_dt = F.softplus(mixer.dt_proj.bias).log()
    low, high = math.log(0.001), math.log(0.1)
    assert low - 1e-3 <= log_dt.min() and log_dt.max() <= high + 1e-3
    assert abs(log_dt.mean() - (low + high) / 2) < 0.15  # mean and variance of a uniform one
    assert abs(log_dt.var() / ((high - low) ** 2 / 12) - 1) < 0.15
    assert mixer.dt_proj.weight.abs().max() <= 32 ** -0.5 and mixer.D.eq(1).all()
    for i, layer in enumerate(model.backbone.layers, start=1):
        bound = 1 / math.sqrt(1024) / i                  # of a linear layer, over i
        assert 0.99 * bound < layer.mixer.out_proj.weight.abs().max() <= bound
    embedding = model.backbone.embedding.weight
    assert embedding is model.lm_head.weight
    assert embedding.std().item() == pytest.approx(512 ** -0.5, rel=0.05)


def test_weight_decay_spares_vectors_and_A():
    model = small_mamba()
    args = argparse.Namespace(lr=1e-3, weight_decay=0.1)
    groups = train.make_optimizer(model, args, torch.device("cpu")).param_groups
    decayed = set()
    for group in groups:
        if group["weight_decay"] > 0:
            decayed.update(id(p) for p in group["params"])
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.dim() > 1 and "A_log" not in name), name


# ---- train.py: three ways to train, two phases of evaluation


def flags(**given):
    """The flags of a run, for functions that need a few of them."""
    args = train.make_parser().parse_args([])
    for name, value in given.items():
        setattr(args, name, value)
    train.fill_in_defaults(args)
    return args


def graphs(n, star=SMALL_STAR):
    """-> prefixes, paths, and the prompts and targets of teacher forcing"""
    prefixes, paths = data.draw(star, n, rng())
    return prefixes, paths, *train.prompts_and_targets(flags(), prefixes, paths)


@pytest.mark.parametrize("objective", [
    {}, {"teacherless": True}, {"reverse": True}, {"teacherless": True, "reverse": True},
    {"only_first_hop": True},
])
def test_what_is_fed_in_and_what_is_to_be_predicted(objective):
    prefixes, paths, _, _ = graphs(50)
    args = flags(**objective)
    inputs, targets = train.training_tokens(args, SMALL_STAR, prefixes, paths)
    written = paths[:, ::-1] if args.reverse else paths
    if args.only_first_hop:
        written = paths[:, :2]
    fed = np.full_like(written, 13) if args.teacherless else written
    n = written.shape[1]
    assert (inputs.numpy() == np.concatenate([prefixes, fed[:, :-1]], axis=1)).all()
    assert (targets[:, -n:].numpy() == written).all()
    assert (targets[:, :-n] == -1).all() and targets.shape == inputs.shape


@every_model
def test_teacherless_leaks_no_target(name):
    """Change any target: the teacherless logits do not move. Teacher forced, they do."""
    model = small(name)
    prefixes, paths, _, _ = graphs(4)
    for teacherless in (True, False):
        args = flags(teacherless=teacherless)
        inputs, _ = train.training_tokens(args, SMALL_STAR, prefixes, paths)
        before, _ = model(inputs)
        for i in range(4):
            other = paths.copy()
            other[:, i] = (other[:, i] + 1) % 10
            inputs, _ = train.training_tokens(args, SMALL_STAR, prefixes, other)
            after, _ = model(inputs)
            assert torch.equal(before, after) == teacherless


class Cheat:
    """Plays the Clever Hans cheat: it takes the edge that leaves the last token.

    At the start it takes the first such edge in the list, which leads to a random arm.
    """

    def __init__(self, star):
        self.star = star

    def __call__(self, idx):
        predicted = torch.zeros_like(idx)
        prefix_len = self.star.prefix_len
        for row, out in zip(idx.tolist(), predicted):
            edges = data.edges_of(row[:prefix_len])
            out[prefix_len - 1] = row[prefix_len - 3]
            for t in range(prefix_len, len(row)):
                out[t] = next((b for a, b in edges if a == row[t]), 0)
        return F.one_hot(predicted, self.star.vocab_size).float(), None

    def generate(self, idx, n):
        for _ in range(n):
            logits, _ = self(idx)
            idx = torch.cat([idx, logits[:, -1:].argmax(dim=2)], dim=1)
        return idx


def test_the_two_phases_are_kept_apart():
    """On the cheat. Forced, all nodes but the first hop are right. By itself it walks an arm."""
    _, _, prompts, targets = graphs(400)
    answers, forced = train.predict(Cheat(SMALL_STAR), prompts, targets)
    result = train.summary(answers, forced, targets)
    hop = result["forced_node_accuracy"][1]
    assert 0.4 < hop < 0.6
    assert result["forced_node_accuracy"] == [1, hop, 1, 1, 1]
    assert result["node_accuracy"] == [1, hop, hop, hop, hop]
    assert result["accuracy"] == result["forced_accuracy"] == hop
    assert result["cheat_accuracy"] == 1


@every_model
def test_predictions_are_those_of_plain_passes(name):
    """Also where the graphs fill more than one batch."""
    model = small(name)
    _, _, prompts, targets = graphs(train.EVAL_BATCH + 30)
    answers, forced = train.predict(model, prompts, targets)
    assert torch.equal(answers, model.generate(prompts, 5)[:, prompts.size(1):])
    logits, _ = model(torch.cat([prompts, targets[:, :-1]], dim=1))
    assert torch.equal(forced, logits[:, -5:].argmax(dim=2))
    assert not torch.equal(answers, forced)
    dollars = torch.full_like(targets, SMALL_STAR.dollar)
    answers, forced = train.predict(model, prompts, targets, SMALL_STAR.dollar)
    logits, _ = model(torch.cat([prompts, dollars[:, :-1]], dim=1))
    assert torch.equal(answers, logits[:, -5:].argmax(dim=2)) and forced is None


def test_the_cheat_accuracy_counts_all_nodes_after_the_first_hop():
    _, _, prompts, targets = graphs(400)
    answers, forced = train.predict(Cheat(SMALL_STAR), prompts, targets)
    wrong = targets.clone()
    wrong[:, 1] = -1                                     # the first hop does not count
    wrong[:100, 2] = -1
    wrong[50:150, 4] = -1                                # 150 graphs with a wrong later node
    assert train.summary(answers, forced, wrong)["cheat_accuracy"] == 250 / 400
    result = train.summary(answers, None, targets)       # teacherless: no forced phase
    assert result["forced_accuracy"] is None and result["cheat_accuracy"] is None


def test_verdicts():
    _, _, prompts, targets = graphs(400)
    answers, forced = train.predict(Cheat(SMALL_STAR), prompts, targets)
    wrong = torch.full_like(targets, -1)
    for answers, forced, given, says in (
        (answers, forced, {}, "Clever Hans"),
        (targets, targets, {}, "solved, the model finds the path"),
        (wrong, targets, {}, "neither solved nor the cheat"),
        (answers[:, :2], forced[:, :2], {"only_first_hop": True}, "indecipherable"),
        (targets[:, :2], targets[:, :2], {"only_first_hop": True}, "finds the first hop"),
        (wrong[:, :2], wrong[:, :2], {"only_first_hop": True, "deg": 20}, "neither solved"),
    ):
        result = train.summary(answers, forced, targets[:, :answers.size(1)])
        assert says in train.verdict(result, flags(**given), 400)
        assert "too few graphs (99)" in train.verdict(result, flags(**given), 99)


# ---- train.py and sample.py, from the command line

TINY = (
    "--n_layer", 1, "--n_embd", 16, "--n_train", 200, "--n_test", 20, "--batch_size", 8,
    "--max_iters", 6, "--eval_interval", 3, "--device", "cpu",
)
KEYS = [
    "iter", "examples", "elapsed_s", "train_loss", "lr", "accuracy", "node_accuracy",
    "forced_accuracy", "forced_node_accuracy", "cheat_accuracy", "samples",
]


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_ckpt(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize("given", [
    (),
    ("--model", "mamba"),
    ("--teacherless",),
    ("--model", "mamba", "--teacherless", "--d_state", 4),
    ("--reverse",),
    ("--model", "mamba", "--reverse", "--teacherless"),
    ("--only_first_hop",),
    ("--n_train", 0, "--n_head", 2),
    ("--deg", 3, "--path_len", 3, "--num_nodes", 12, "--lr", 0.01, "--weight_decay", 0),
    ("--dtype", "bfloat16"),
    ("--model", "mamba", "--dtype", "bfloat16"),
])
def test_tiny_runs(given, monkeypatch, tmp_path, capsys):
    """Each objective trains, writes a log and a checkpoint, and can be sampled."""
    out = tmp_path / "run"
    assert call(monkeypatch, train, *TINY, *given, "--out_dir", out) == 0
    header, *lines = read_log(out)
    assert list(header) == ["command", "config", "versions", "machine"]
    assert header["command"].startswith("python train.py --n_layer 1 --n_embd 16")
    assert [line["iter"] for line in lines] == [0, 3, 6]
    assert [line["examples"] for line in lines] == [0, 24, 48]
    n_targets = 2 if "--only_first_hop" in given else header["config"]["path_len"]
    for line in lines:
        assert list(line) == KEYS
        assert (line["forced_accuracy"] is None) == ("--teacherless" in given)
        assert len(line["node_accuracy"]) == n_targets
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "log.jsonl"]
    assert read_ckpt(out)["log"] == [header, *lines]
    assert "where guessing an arm gives" in capsys.readouterr().out.splitlines()[-1]

    assert call(monkeypatch, sample, "--out_dir", out, "--num_graphs", 30) == 0
    printed = capsys.readouterr().out
    assert printed.count("  answer") == 3
    assert "a real arm" in printed and "path accuracy" in printed


def test_each_flag_of_the_training_changes_the_weights(monkeypatch, tmp_path):
    """Learning rate, warm-up, weight decay, seed, fresh data and dtype."""
    def weights(name, *given):
        out = tmp_path / name
        assert call(monkeypatch, train, *TINY, "--warmup_iters", 5, *given, "--out_dir", out) == 0
        return read_ckpt(out)["model"]["lm_head.weight"]

    base = weights("base")
    assert torch.equal(base, weights("same"))
    for i, given in enumerate((
        ("--lr", 0.1), ("--weight_decay", 0.9), ("--seed", 1), ("--n_train", 0),
        ("--warmup_iters", 0), ("--dtype", "bfloat16"),
    )):
        assert not torch.equal(base, weights(f"other{i}", *given)), given


def test_fresh_graphs_are_never_test_graphs(monkeypatch, tmp_path):
    """In a space of 48 graphs, 8 of them for testing, a run sees the other 40."""
    training_tokens, seen = train.training_tokens, set()

    def recorded(args, star, prefixes, paths):
        seen.update(data.keys(prefixes))
        return training_tokens(args, star, prefixes, paths)

    monkeypatch.setattr(train, "training_tokens", recorded)
    given = ("--deg", 2, "--path_len", 2, "--num_nodes", 4, "--n_train", 0, "--n_test", 8)
    given = (*TINY, *given, "--batch_size", 100, "--out_dir", tmp_path / "run")
    assert call(monkeypatch, train, *given) == 0
    _, _, (test_prefixes, _) = data.datasets(2, 2, 4, 0, 8, 0)
    assert len(seen) == 40 and not seen & set(data.keys(test_prefixes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_has_the_dtype_of_the_training(dtype, monkeypatch, tmp_path):
    predict, seen = train.predict, []

    def recorded(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return predict(*args)

    monkeypatch.setattr(train, "predict", recorded)
    given = (*TINY, "--dtype", dtype, "--out_dir", tmp_path / "run")
    assert call(monkeypatch, train, *given) == 0
    assert seen == [dtype == "bfloat16"] * 3


def test_learning_rate_rises_and_falls():
    args = argparse.Namespace(lr=1.0, warmup_iters=3, max_iters=12, decay_frac=1 / 3)
    rates = [train.learning_rate(args, step) for step in range(13)]
    rise, fall = [1 / 4, 2 / 4, 3 / 4], [3 / 4, 2 / 4, 1 / 4, 0]
    assert rates == pytest.approx(rise + [1] * 6 + fall)
    args.decay_frac = 1.0
    assert train.learning_rate(args, 9) == pytest.approx(1 / 4)


def test_a_run_stops_when_the_task_is_solved(monkeypatch, tmp_path, capsys):
    """With one arm of one edge there is nothing to plan."""
    assert call(
        monkeypatch, train, "--model", "mamba", "--deg", 1, "--path_len", 2, "--num_nodes", 20,
        "--n_train", 0, "--n_test", 100, "--n_layer", 1, "--n_embd", 32, "--batch_size", 64,
        "--lr", 0.01, "--max_iters", 3000, "--eval_interval", 25, "--out_dir", tmp_path
    ) == 0
    last = read_log(tmp_path)[-1]
    assert last["accuracy"] >= 0.995 and last["iter"] < 2200
    assert "solved" in capsys.readouterr().out


def assert_same_run(one, two):
    """The same weights, optimizer state and log to the bit, but for the time that it took."""
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


@pytest.mark.parametrize("model", ["gpt", "mamba"])
@pytest.mark.parametrize("objective", [
    (), ("--teacherless",), ("--reverse",), ("--only_first_hop",), ("--n_train", 0)
])
def test_a_killed_run_resumes_to_the_bit(model, objective, monkeypatch, tmp_path, capsys):
    """Killed in step 5; while it saves at step 6; at the end, between checkpoint and log."""
    given = (*TINY, "--model", model, *objective, "--max_iters", 9)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(monkeypatch, train, *given, "--out_dir", whole) == 0

    class Killed(BaseException):
        pass

    clip, replace = torch.nn.utils.clip_grad_norm_, os.replace
    steps = []

    def kill_in_step_5(*args):
        steps.append(1)
        if len(steps) == 5:
            raise Killed
        return clip(*args)

    def kill_in_save(old, new):
        if new.endswith("ckpt.pt"):
            raise Killed
        return replace(old, new)

    def kill_before_log(old, new):
        if new.endswith("log.jsonl") and read_ckpt(parts)["log"][-1]["iter"] == 9:
            raise Killed
        return replace(old, new)

    for owner, name, killer, flags in (
        (torch.nn.utils, "clip_grad_norm_", kill_in_step_5, (*given, "--out_dir", parts)),
        (os, "replace", kill_in_save, ("--resume", parts)),
        (os, "replace", kill_before_log, ("--resume", parts)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killer)
            with pytest.raises(Killed):
                call(patch, train, *flags)
    assert read_log(parts)[-1]["iter"] == 6 and read_ckpt(parts)["log"][-1]["iter"] == 9
    assert call(monkeypatch, train, "--resume", parts) == 0
    assert_same_run(whole, parts)

    files = {path: path.read_bytes() for path in parts.iterdir()}
    assert call(monkeypatch, train, "--resume", parts) == 0     # it is finished: nothing changes
    assert files == {path: path.read_bytes() for path in parts.iterdir()}
    assert "where guessing an arm gives" in capsys.readouterr().out.splitlines()[-1]


def test_a_finished_run_can_go_further(finished, monkeypatch, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    assert call(monkeypatch, train, "--resume", out, "--max_iters", 12) == 0
    header, *lines = read_log(out)
    assert [line["iter"] for line in lines] == [0, 3, 6, 9, 12]
    assert header["config"]["max_iters"] == 12


def test_resume_refuses_other_flags(finished, monkeypatch, capsys):
    for given, says in (
        (("--lr", 0.5), "omit --lr"),
        (("--out_dir=x",), "omit --out_dir"),
        (("--seed", 0), "omit --seed"),
        (("--max_iters", 3), "too few: 6 steps are done"),
    ):
        assert call(monkeypatch, train, "--resume", finished, *given) == 2
        assert is_one_line(capsys.readouterr(), says)
    assert read_log(finished)[0]["config"]["max_iters"] == 6


def test_nothing_is_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, train, *TINY, "--max_iters", 3) == 0
    [out] = (tmp_path / "out").iterdir()
    assert out.name == "gpt-teacher_forced-deg2-len5-seed0"
    files = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert call(monkeypatch, train, *TINY) == 2
    assert is_one_line(capsys.readouterr(), f"--resume {out.relative_to(tmp_path)} goes on")
    (out / "ckpt.pt").rename(tmp_path / "kept")                 # a log alone is a record, too
    assert call(monkeypatch, train, *TINY) == 2
    (tmp_path / "kept").rename(out / "ckpt.pt")
    assert files == {path: path.read_bytes() for path in out.iterdir()}
    assert call(monkeypatch, train, *TINY, "--overwrite") == 0
    assert [line["iter"] for line in read_log(out)[1:]] == [0, 3, 6]
    for given in (("--reverse",), ("--model", "mamba"), ("--seed", 1), ("--teacherless",)):
        assert call(monkeypatch, train, *TINY, *given) == 0
    assert len(list((tmp_path / "out").iterdir())) == 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@every_model
def test_compiled_run_equals_eager(name, monkeypatch, tmp_path):
    torch_compile, compiled = torch.compile, []

    def recorded(model):
        compiled.append(folder)
        return torch_compile(model)

    monkeypatch.setattr(torch, "compile", recorded)
    for folder, given in (("eager", ()), ("compiled", ("--compile",))):
        given = (*TINY, "--model", name, *given, "--out_dir", tmp_path / folder)
        assert call(monkeypatch, train, *given) == 0
    assert compiled == ["compiled"]
    eager_log, compiled_log = read_log(tmp_path / "eager"), read_log(tmp_path / "compiled")
    for a, b in zip(eager_log[2:], compiled_log[2:], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


# A program that trains, and writes down the inputs of each training step of each process.
RECORDER = """
import json, os, sys
sys.path.insert(0, {here!r})
import train
build_model = train.build_model

def recorded(*args):
    model = build_model(*args)
    forward = model.forward

    def seen(idx, targets=None):
        if targets is not None:
            with open({folder!r} + "/rank" + os.environ.get("RANK", ""), "a") as file:
                print(json.dumps(idx.tolist()), file=file)
        return forward(idx, targets)
    model.forward = seen
    return model

train.build_model = recorded
train.main()
"""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@every_model
def test_two_processes_follow_one(name, tmp_path):
    """The same loss, from disjoint halves of the same batches."""
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER.format(here=str(HERE), folder=str(tmp_path)))
    given = (*TINY, "--model", name, "--n_train", 200 if name == "gpt" else 0, "--batch_size", 16)
    for folder, python in (("one", (sys.executable,)), ("two", TORCHRUN)):
        command = [*python, script, *given, "--out_dir", tmp_path / folder]
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=ONE_THREAD
        )
        assert result.returncode == 0, result.stderr
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for a, b in zip(one[2:], two[2:], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    batches = []
    for rank in ("", "0", "1"):
        lines = (tmp_path / f"rank{rank}").read_text().splitlines()
        batches.append([json.loads(line) for line in lines])
    assert len(batches[0]) == 6
    for whole, half, other_half in zip(*batches, strict=True):
        assert sorted(whole) == sorted(half + other_half)


# ---- sample.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished tiny run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, train, *TINY, "--out_dir", out) == 0
    return out


def test_sample_on_files_and_prompts(finished, monkeypatch, tmp_path, capsys):
    lines = lines_of(SMALL_STAR, *data.draw(SMALL_STAR, 4, rng()))
    file = tmp_path / "graphs.txt"
    file.write_text("\n".join(lines))
    assert call(monkeypatch, sample, "--out_dir", finished, "--file", file) == 0
    printed = capsys.readouterr().out
    assert "on 4 graphs" in printed
    for line in lines[:3]:
        path = line.split("=")[1].split(",")
        assert "%" + " ->".join(f"{node:>5}" for node in path) + "\n" in printed
    prompt = lines[0].split("=")[0] + "="
    assert call(monkeypatch, sample, "--out_dir", finished, "--prompt", prompt) == 0
    assert "on 1 graphs" in capsys.readouterr().out


@pytest.mark.parametrize("objective", [(), ("--reverse",), ("--only_first_hop",)])
def test_sample_knows_a_right_answer(objective, monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, train, *TINY, *objective, "--out_dir", tmp_path / "run") == 0
    capsys.readouterr()
    monkeypatch.setattr(sample, "predict", lambda model, prompts, targets, _: (targets, targets))
    assert call(monkeypatch, sample, "--out_dir", tmp_path / "run", "--num_graphs", 100) == 0
    printed = capsys.readouterr().out
    assert printed.count("        right\n") == 3
    assert "a real arm         100.0%" in printed and "solved" in printed


def probabilities_of(*rows):
    """(places, tokens), from {token: probability} for each place"""
    p = torch.zeros(len(rows), 10)
    for place, row in enumerate(rows):
        for token, share in row.items():
            p[place, token] = share
    return p


ARMS = [[1, 2, 3], [1, 4, 5]]       # the second is right


def test_sample_marks_where_the_answer_leaves_the_path(capsys):
    p = probabilities_of({1: 0.99}, {2: 0.5, 4: 0.25}, {3: 1})
    graph = sample.explain([1, 4, 5], ARMS, [1, 2, 3], [1, 2, 5], p)
    assert graph["leaves_at"] == 1 and graph["real_arm"]
    assert graph["arms"] == [[1, 4, 5], [1, 2, 3]] and graph["first_hop"] == [0.25, 0.5]
    sample.show(graph, pause=0)
    assert capsys.readouterr().out.splitlines() == [
        "P(hop 1)    from 1 to 5",
        "   25.0%    1 ->    4 ->    5",
        "   50.0%    1 ->    2 ->    3",
        "  answer    1 ->  [2] ->  [3]",
        "    sure  99%     50%    100%",
        "  forced    1 ->  [2] ->    5",
        "        wrong: leaves the path at node 2, where 4 is right, and walks another arm",
        "",
    ]
    p = probabilities_of({1: 1}, {4: 1}, {5: 1})
    graph = sample.explain([1, 4, 5], ARMS, [1, 4, 5], None, p)
    assert graph["leaves_at"] is None and graph["real_arm"] and graph["forced"] is None
    sample.show(graph, pause=0)
    assert capsys.readouterr().out.splitlines()[3:] == [
        "  answer    1 ->    4 ->    5", "    sure 100%    100%    100%", "        right", ""
    ]
    p = probabilities_of({1: 1}, {2: 1}, {5: 1})
    assert not sample.explain([1, 4, 5], ARMS, [1, 2, 5], None, p)["real_arm"]


@pytest.mark.parametrize("objective, shown", [((), True), (("--reverse",), False)])
def test_sample_prints_the_cheat_accuracy(objective, shown, monkeypatch, tmp_path, capsys):
    """But not of a reversed path, whose first hop is written last but one."""
    assert call(monkeypatch, train, *TINY, *objective, "--out_dir", tmp_path / "run") == 0
    capsys.readouterr()
    assert call(monkeypatch, sample, "--out_dir", tmp_path / "run") == 0
    assert ("cheat accuracy" in capsys.readouterr().out) == shown


def test_probe_names_a_folder_without_a_run(tmp_path):
    result = run("results/probe.py", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("probe.py: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("objective", [
    (), ("--teacherless",), ("--reverse",), ("--only_first_hop",), ("--model", "mamba")
])
def test_probabilities_of_a_sample(objective, monkeypatch, tmp_path, capsys):
    """What `sample.py --json` says the model gives each node, against one pass for each."""
    out = tmp_path / "run"
    assert call(monkeypatch, train, *TINY, *objective, "--out_dir", out) == 0
    capsys.readouterr()
    given = ("--out_dir", out, "--num_graphs", 5, "--show", 2, "--json")
    assert call(monkeypatch, sample, *given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_graphs"] == 5 and "too few graphs (5)" in printed["verdict"]
    assert len(printed["graphs"]) == 2
    _, _, star, model = train.load_checkpoint(out)
    prefixes, _ = data.draw(star, 5, rng([0, 4]))
    for graph, prefix in zip(printed["graphs"], prefixes.tolist()):
        written, hop = graph["answer"], 1
        if "--reverse" in objective:
            written, hop = written[::-1], 3
        rows = []
        for i in range(len(written)):
            before = [star.dollar] * i if "--teacherless" in objective else written[:i]
            logits, _ = model(torch.tensor([prefix + before]))
            rows.append(logits[0, -1].softmax(0).tolist())
        sure = [row[node] for row, node in zip(rows, written)]
        if "--reverse" in objective:
            sure = sure[::-1]
        assert graph["sure"] == pytest.approx(sure, abs=1e-5)
        first_hop = [rows[hop][arm[1]] for arm in graph["arms"]]
        assert graph["first_hop"] == pytest.approx(first_hop, abs=1e-5)
        if "--teacherless" in objective:
            assert graph["forced"] is None
            continue
        path = graph["path"][:len(written)]
        if "--reverse" in objective:
            path = path[::-1]
        forced = []
        for i in range(len(path)):
            logits, _ = model(torch.tensor([prefix + path[:i]]))
            forced.append(logits[0, -1].argmax().item())
        if "--reverse" in objective:
            forced = forced[::-1]
        assert graph["forced"] == forced


@pytest.mark.parametrize("objective", [
    (), ("--teacherless",), ("--reverse",), ("--only_first_hop",), ("--model", "mamba")
])
def test_the_log_says_what_sample_says(objective, monkeypatch, tmp_path, capsys):
    """The answers in the last line of the log, against those to the same graphs from a file."""
    out = tmp_path / "run"
    file = tmp_path / "test.txt"
    prefixes, paths = data.draw(SMALL_STAR, 20, rng(3))
    file.write_text("".join(
        data.to_text(prefix, path) + "\n" for prefix, path in zip(prefixes.tolist(), paths.tolist())
    ))
    given = ("--test_file", file, "--num_nodes", SMALL_STAR.num_nodes)
    assert call(monkeypatch, train, *TINY, *objective, *given, "--out_dir", out) == 0
    capsys.readouterr()
    assert call(monkeypatch, sample, "--out_dir", out, "--file", file, "--show", 8, "--json") == 0
    graphs = json.loads(capsys.readouterr().out)["graphs"]
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert len(line["samples"]) == len(graphs) == 8
    for logged, graph in zip(line["samples"], graphs):
        assert logged["answer"] == graph["answer"]
        hop = graph["arms"].index(graph["path"])
        assert logged["first_hop"] == pytest.approx(graph["first_hop"][hop], abs=1e-4)


# ---- What is refused, and what stops a run


@pytest.mark.parametrize("given, says", [
    (("--model", "rnn"), "invalid choice"),
    (("--n_embed", 3), "unrecognized arguments"),
    (("--lr", "x"), "argument --lr: invalid"),
    (("--d_state", 4), "--d_state is not a setting of --model gpt"),
    (("--model", "mamba", "--n_head", 2), "--n_head is not"),
    (("--n_embd", 30), "multiple of n_head"),
    (("--num_nodes", 8), "num_nodes must be at least 9"),
    (("--deg", 0), "argument --deg: must be at least 1"),
    (("--batch_size", 0), "argument --batch_size: must be at least 1"),
    (("--seed", -1), "argument --seed: must not be negative"),
    (("--lr", "nan"), "argument --lr: must be positive"),
    (("--lr", "inf"), "argument --lr: must be positive"),
    (("--weight_decay", -1), "argument --weight_decay: must be finite and not negative"),
    (("--train_file", ""), "No such file"),
    (("--train_file", "missing"), "No such file"),
    (("--train_file", "missing", "--n_train", 0), "omit --train_file"),
    (("--device", "meta"), "--device meta"),
    (("--device", "cuda:99"), "--device cuda:99"),
    (("--device", "abacus"), "--device abacus"),
    (("--dtype", "float16"), "invalid choice"),
    (("--n_test", 10 ** 12), "only"),
    (("--only_first_hop", "--teacherless"), "--only_first_hop"),
    (("--only_first_hop", "--reverse"), "--only_first_hop"),
    (("--deg", 1, "--path_len", 2, "--num_nodes", 3), "only 6 different graphs"),
    (("--resume", "missing"), "No such file"),
])
def test_bad_flags_are_refused_in_one_line(given, says, monkeypatch, tmp_path, capsys):
    """With exit code 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, train, *given) == 2
    printed = capsys.readouterr()
    assert is_one_line(printed, says), printed.err
    assert not list(tmp_path.iterdir())


def test_a_script_refuses_in_one_line():
    """As a user sees it, in a process of its own."""
    for script, given, says in (
        ("train.py", ("--num_nodes", 3), "train.py: error: num_nodes must be at least 9"),
        ("data.py", ("--deg", -1), "data.py: error: argument --deg: must be at least 1"),
        ("data.py", ("--num_nodes", 8), "data.py: error: num_nodes must be at least 9"),
        ("data.py", ("--num_nodes", 10 ** 14), "data.py: error: Unable to allocate"),
        ("data.py", ("-n", -1), "data.py: error: argument -n: must not be negative"),
        ("sample.py", (), "--out_dir"),
    ):
        result = run(script, *given)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and says in result.stderr, result.stderr


def damaged_checkpoints(finished, tmp_path):
    """-> folders with a ckpt.pt that is not one of train.py"""
    whole = (finished / "ckpt.pt").read_bytes()
    ckpt = read_ckpt(finished)
    strange_header = ckpt["log"][0] | {"config": ckpt["log"][0]["config"] | {"n_layer": "x"}}
    contents = {
        "empty": b"",
        "truncated": whole[:len(whole) // 2],
        "other": {"weights": torch.zeros(2)},
        "renamed": ckpt | {"model": {}},
        "headless": ckpt | {"log": []},
        "strange": ckpt | {"log": [strange_header, *ckpt["log"][1:]]},
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        if isinstance(content, bytes):
            (tmp_path / name / "ckpt.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / name / "ckpt.pt")
    return [tmp_path / name for name in contents]


def test_bad_checkpoints_are_refused_in_one_line(finished, monkeypatch, tmp_path, capsys):
    for folder in [*damaged_checkpoints(finished, tmp_path), tmp_path / "none"]:
        says = "No such file" if folder.name == "none" else "does not hold a run of train.py"
        for module, flag in ((sample, "--out_dir"), (train, "--resume")):
            assert call(monkeypatch, module, flag, folder) == 2
            printed = capsys.readouterr()
            assert is_one_line(printed, says), printed.err


def test_bad_files_and_prompts_are_refused_in_one_line(finished, monkeypatch, tmp_path, capsys):
    file = tmp_path / "graphs.txt"
    file.write_text(LINE)
    for given, says in (
        (("--file", "x", "--prompt", LINE), "not allowed with"),
        (("--file", file), "line 1: node"),
        (("--file", tmp_path / "missing"), "No such file"),
        (("--prompt", "hello"), "'hello' is not of the form"),
        (("--prompt", LINE), "out of range"),
        (("--prompt", "0,1|0,2/0,1="), "deg 2 and path_len 2, where deg 2 and path_len 5"),
        (("--num_graphs", 0), "--num_graphs"),
        (("--pause", "nan"), "--pause"),
    ):
        assert call(monkeypatch, sample, "--out_dir", finished, *given) == 2, given
        printed = capsys.readouterr()
        assert is_one_line(printed, says), printed.err


def test_a_run_of_another_version_is_not_resumed(finished, monkeypatch, tmp_path, capsys):
    """Without the optimizer, or without a flag that train.py has now."""
    ckpt = read_ckpt(finished)
    config = dict(ckpt["log"][0]["config"])
    del config["lr"]
    without_flag = [ckpt["log"][0] | {"config": config}, *ckpt["log"][1:]]
    without_optimizer = {key: value for key, value in ckpt.items() if key != "optimizer"}
    for changed in (ckpt | {"log": without_flag}, without_optimizer):
        torch.save(changed, tmp_path / "ckpt.pt")
        assert call(monkeypatch, train, "--resume", tmp_path) == 2
        assert is_one_line(capsys.readouterr(), "is not one of this version of train.py")


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["PATHSTAR_EVIL"],)


def test_a_checkpoint_runs_no_code(finished, monkeypatch, tmp_path, capsys):
    evil = tmp_path / "evil"
    monkeypatch.setenv("PATHSTAR_EVIL", str(evil))
    torch.save(read_ckpt(finished) | {"more": Malicious()}, tmp_path / "ckpt.pt")
    for module, flag in ((sample, "--out_dir"), (train, "--resume")):
        assert call(monkeypatch, module, flag, tmp_path) == 2
        assert "does not hold a run of train.py" in capsys.readouterr().err
    assert not evil.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)        # it would have
    assert evil.exists()


def some_flags(random):
    """Flags at random, a few of them wrong."""
    values = {  # the first value is a good one
        "--deg": (2, 3, 0, -1), "--path_len": (3, 5, 1), "--num_nodes": (15, 12, 4),
        "--n_train": (50, 0, -3), "--n_test": (10, 0), "--model": ("gpt", "mamba", "rnn"),
        "--n_layer": (1, 0), "--n_embd": (16, 12, 15), "--n_head": (2, 4, 0), "--d_state": (2, 0),
        "--batch_size": (4, 0), "--lr": (1e-3, 0, "nan", "x"), "--decay_frac": (0.5, 0),
        "--weight_decay": (0, -1),
        "--warmup_iters": (0, 5, -1), "--eval_interval": (1, 2, 0), "--seed": (1, -1),
        "--dtype": ("float32", "bfloat16", "int8"), "--device": ("cpu", "cuda:7"),
        "--frobnicate": (1,), "--teacherless": None, "--reverse": None, "--only_first_hop": None,
    }
    given = ["--max_iters", 2]
    for name in random.permutation(list(values))[:random.integers(1, 9)]:
        given.append(name)
        choices = values[name]
        if choices is not None:
            good = random.random() < 0.7
            given.append(choices[0 if good else random.integers(len(choices))])
    for name, value in (("--n_train", 50), ("--n_test", 10)):   # small, where nothing else is said
        if name not in given:
            given += [name, value]
    return given


def try_flags(n, monkeypatch, tmp_path, capsys):
    """Each combination runs to its end, or is refused in one line -> how many ran"""
    random = rng()
    ran = 0
    for i in range(n):
        given, out = some_flags(random), tmp_path / str(i)
        code = call(monkeypatch, train, *given, "--out_dir", out)
        printed = capsys.readouterr()
        if code == 0:
            ran += 1
            assert out.exists(), given
        else:
            assert code == 2 and is_one_line(printed, "train.py: error:"), (given, printed.err)
            assert not out.exists(), given
    return ran


def test_combinations_of_flags(monkeypatch, tmp_path, capsys):
    assert 5 < try_flags(40, monkeypatch, tmp_path, capsys) < 35


def start(*given, torchrun=False, **options):
    """A training run in the background, in a process group of its own."""
    python = TORCHRUN if torchrun else (sys.executable,)
    return subprocess.Popen(
        [*python, str(HERE / "train.py"), *map(str, given)], text=True, env=ONE_THREAD,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options
    )


def wait_for(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.parametrize("torchrun", [False, True])
def test_ctrl_c_says_how_to_go_on(torchrun, tmp_path):
    out = tmp_path / "run"
    given = (*TINY, "--max_iters", 100_000, "--eval_interval", 20, "--out_dir", out)
    process = start(*given, torchrun=torchrun)
    wait_for((out / "log.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGINT)                       # as a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"python train.py --resume {out}\n" in err
    if not torchrun:
        assert err.count("\n") == 1, err
    done = read_ckpt(out)["log"][-1]["iter"]
    result = run("train.py", "--resume", out, "--max_iters", done + 3)
    assert result.returncode == 0, result.stderr
    assert read_log(out)[-1]["iter"] == done + 3


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, tmp_path, capsys):
    """Also where its gradient, and so the weights, stay finite. The last good checkpoint stays."""
    cross_entropy, steps = F.cross_entropy, []

    def explode(*args, **kwargs):
        steps.append(1)
        return cross_entropy(*args, **kwargs) + (math.inf if len(steps) == 5 else 0)

    monkeypatch.setattr(F, "cross_entropy", explode)
    assert call(monkeypatch, train, *TINY, "--out_dir", tmp_path) == 1
    printed = capsys.readouterr().err
    assert "infinite or NaN before step 6" in printed and printed.count("\n") == 1
    assert read_ckpt(tmp_path)["log"][-1]["iter"] == 3 and read_log(tmp_path)[-1]["iter"] == 3


def test_weights_that_are_not_finite_stop_the_run(monkeypatch, tmp_path):
    """Also where the loss was finite until then."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def explode(parameters, max_norm):
        parameters = list(parameters)
        clip(parameters, max_norm)
        steps.append(1)
        if len(steps) == 6:
            parameters[0].grad.fill_(math.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode)
    assert call(monkeypatch, train, *TINY, "--out_dir", tmp_path) == 1
    assert read_ckpt(tmp_path)["log"][-1]["iter"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
def test_a_full_disk_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    """A file may grow to 20 KB only: the log fits, a checkpoint does not."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    assert call(monkeypatch, train, *TINY, "--max_iters", 3, "--out_dir", tmp_path) == 0
    process = start("--resume", tmp_path, "--max_iters", 6, preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("\n") == 1 and "cannot write to" in err, err
    assert read_ckpt(tmp_path)["log"][-1]["iter"] == 3
    assert call(monkeypatch, train, "--resume", tmp_path, "--max_iters", 6) == 0
    assert [line["iter"] for line in read_log(tmp_path)[1:]] == [0, 3, 6]


# ---- Files that are copied out

DRAW = "from data import *; print(draw(PathStar(2, 3, 9), 4, np.random.default_rng())[0].shape)"
SCAN = """
import torch, scan_kernel
x = torch.ones(1, 2, 3)
print(scan_kernel.selective_scan(x, x, -torch.ones(2, 2), x, x).shape)
"""
LEARN = """
import torch
from model_{file} import {Model}, {Model}Config
model = {Model}({Model}Config({sizes}))
idx = torch.randint(9, (2, 8))
model(idx, idx)[1].backward()
print(model.generate(idx[:, :3], 2).shape)
"""
LEARN_GPT = LEARN.format(file="gpt", Model="GPT", sizes="8, 9, 1, 2, 4")
LEARN_MAMBA = LEARN.format(file="mamba", Model="Mamba", sizes="9, 1, 4")


@pytest.mark.parametrize("files, command, says", [
    ("data.py", ("data.py",), "="),
    ("data.py", ("-c", DRAW), "(4, 15)"),
    ("scan_kernel.py", ("-c", SCAN), "[1, 2, 3]"),
    ("model_gpt.py", ("-c", LEARN_GPT), "[2, 5]"),
    ("model_mamba.py scan_kernel.py", ("-c", LEARN_MAMBA), "[2, 5]"),
    ("train.py data.py model_gpt.py", ("train.py", *TINY), "accuracy"),
    ("train.py data.py model_mamba.py scan_kernel.py",
     ("train.py", *TINY, "--model", "mamba"), "accuracy"),
    ("sample.py train.py data.py model_gpt.py",
     ("sample.py", "--out_dir", "run"), "path accuracy"),
])
def test_files_work_where_they_are_copied_to(files, command, says, finished, tmp_path):
    """Each file with those that it imports, and nothing else."""
    for name in files.split():
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and says in result.stdout, result.stderr


def test_a_model_that_was_not_copied_is_missed_in_one_line(tmp_path):
    for name in ("train.py", "data.py", "model_gpt.py"):
        shutil.copy(HERE / name, tmp_path)
    command = [sys.executable, "train.py", *map(str, TINY), "--model", "mamba"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "train.py: error: No module named 'model_mamba'\n"


# ---- results/ and README.md

LOGS = HERE / "results" / "logs"
CURES = HERE / "results" / "cures"
README = (HERE / "README.md").read_text()


def git(*args):
    return subprocess.run(["git", *map(str, args)], cwd=HERE, capture_output=True).returncode


needs_unchanged_files = pytest.mark.skipif(
    shutil.which("git") is None or git("diff", "--quiet", "HEAD", "--", "*.py", ":!test_all.py"),
    reason="files were changed",
)


def test_the_table_is_that_of_the_logs():
    """results/README.md is what table.py prints. README.md has its lines on the default graph."""
    table = run("results/table.py")
    assert table.returncode == 0, table.stderr
    assert table.stdout == (HERE / "results" / "README.md").read_text()
    shown = []
    for line in table.stdout.splitlines():
        others = ("--deg", "--path_len", "--n_layer")
        if line.startswith("| `python") and not any(flag in line for flag in others):
            shown.append(line)
    assert len(shown) >= 8
    for line in shown:
        assert line in README, line


@pytest.mark.parametrize("page, command", [
    ("tried.md", ("results/tried.py",)),
    ("cures/README.md", ("results/cures.py",)),
])
def test_other_pages_are_what_their_scripts_print(page, command):
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (HERE / "results" / page).read_text()


def test_the_hops_in_readme_are_those_of_the_logs():
    """Section 5 quotes the node accuracies at the end of a few runs."""
    text = " ".join(README.split())

    def node_accuracy(log):
        return json.loads((HERE / "results" / log).read_text().splitlines()[-1])["node_accuracy"]

    for name, hops in (
        ("logs/gpt-teacherless-deg2-len6", slice(1, 4)),        # those that it guesses
        ("cures/mamba-teacherless-deg5-len5", slice(1, -1)),
        ("tried/mamba-deg3-len5", slice(1, -1)),
    ):
        shares = node_accuracy(f"{name}-seed0.jsonl")[hops]
        *first, last = [f"{100 * share:.0f}" for share in shares]
        assert f"{', '.join(first)} and {last} %" in text, name
    failed = []
    for seed in (1, 2):
        _, hop_1, hop_2, *_ = node_accuracy(f"logs/mamba-teacherless-deg2-len6-seed{seed}.jsonl")
        failed += [f"{100 * hop_1:.0f}", f"{100 * hop_2:.0f}"]
    assert "with {} and {} % of the first two hops, and with {} and {} %.".format(*failed) in text
    first_hops = []
    for name in ("len6-seed0", "len6-seed1", "len6-long-seed2"):        # with eight layers
        _, first_hop, *later, _ = node_accuracy(f"tried/mamba-deg2-{name}.jsonl")
        assert min(later) > 0.99
        first_hops.append(f"{100 * first_hop:.0f}")
    assert "Only the first hop was missing, right in {}, {} and {} %".format(*first_hops) in text


@pytest.mark.parametrize("graph, solved, text", [
    ("deg3-len5", 3, "Mamba, three arms*: solved after {:,} to {:,} steps, three of three seeds"),
    ("deg2-len6", 1, "with twelve layers: one of three seeds is solved, after {:,} steps."),
])
def test_readme_tells_when_larger_graphs_were_solved(graph, solved, text):
    """By the Mamba, teacherless."""
    ends = []
    for log in LOGS.glob(f"mamba-teacherless-{graph}-seed*.jsonl"):
        ends.append(json.loads(log.read_text().splitlines()[-1]))
    assert len(ends) == 3
    steps = [end["iter"] for end in ends if end["accuracy"] >= train.SOLVED]
    assert len(steps) == solved
    assert text.format(min(steps), max(steps)) in " ".join(README.split())


def test_readme_tells_when_the_mamba_escapes():
    """Teacher-forced on paths of four nodes."""
    log = LOGS / "mamba-teacher_forced-deg2-len4-seed0.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    guessing, escaping = re.search(
        r"guesses for ([\d,]+) steps and is right ([\d,]+) steps later", " ".join(README.split())
    ).groups()
    guessing = int(guessing.replace(",", ""))
    guesses = [line["iter"] for line in lines if 0.45 < line["node_accuracy"][1] < 0.55]
    assert max(guesses) == guessing
    solved = [line["iter"] for line in lines if line["accuracy"] >= train.STOP_AT]
    assert solved == [guessing + int(escaping.replace(",", ""))]


def teacherless_runs(model, n_layer):
    """How the names of the recorded runs begin, for a depth on the default graph."""
    if n_layer == train.DEFAULTS[model]["n_layer"]:
        return f"{model}-teacherless"
    return f"{model}-teacherless-len5-layers{n_layer}"


def test_the_long_runs_still_guess():
    """After five times the steps that the teacherless run of the same seed and depth took."""
    logs = [*LOGS.glob("*-teacher_forced-long-seed*"), *LOGS.glob("*-first_hop-long-seed*")]
    for log in logs:
        header, *lines = [json.loads(line) for line in log.read_text().splitlines()]
        model, seed = header["config"]["model"], header["config"]["seed"]
        name = teacherless_runs(model, header["config"]["n_layer"])
        cured = (LOGS / f"{name}-seed{seed}.jsonl").read_text().splitlines()[-1]
        assert lines[-1]["iter"] >= 5 * json.loads(cured)["iter"], log.name
        assert 0.45 < lines[-1]["node_accuracy"][1] < 0.55, log.name
    assert {log.name.split("-")[0] for log in logs} == {"gpt", "mamba"}


def steps_until_solved(model, n_layer):
    """-> the number of recorded teacherless runs, and the steps of those that were solved"""
    ends = []
    for log in LOGS.glob(f"{teacherless_runs(model, n_layer)}-seed*.jsonl"):
        ends.append(json.loads(log.read_text().splitlines()[-1]))
    return len(ends), [end["iter"] for end in ends if end["accuracy"] >= train.SOLVED]


def test_readme_tells_of_the_depths():
    """How many seeds of each depth were solved, and after how many steps at most."""
    text = " ".join(README.split())
    counts = {"gpt": [], "mamba": []}
    steps = {}
    for model in counts:
        for n_layer in (2, 3, 4, 6, 8):
            runs, steps[model, n_layer] = steps_until_solved(model, n_layer)
            counts[model].append((len(steps[model, n_layer]), runs))
    assert counts["gpt"] == [(0, 3), (0, 3), (0, 3), (5, 5), (5, 5)]
    assert counts["mamba"] == [(0, 3), (2, 3), (2, 3), (5, 5), (1, 1)]
    three, four, six = (f"{max(steps['mamba', n_layer]):,}" for n_layer in (3, 4, 6))
    assert f"three layers took up to {three} steps, those of four up to {four}" in text
    assert f"and those of six up to {six}." in text
    six, eight = steps["gpt", 6], steps["gpt", 8]
    assert f"Transformers of six layers took {min(six):,} to {max(six):,} steps," in text
    assert f"and those of eight {min(eight):,} to {max(eight):,}.)" in text


def test_readme_tells_how_the_default_seeds_end():
    """All teacherless runs are solved. Some Transformers trained on the first hop do not guess."""
    text = " ".join(README.split())

    def ends(name):
        logs = sorted(LOGS.glob(f"{name}-seed*.jsonl"))
        assert len(logs) == 5
        return [json.loads(log.read_text().splitlines()[-1])["accuracy"] for log in logs]

    for model in ("gpt", "mamba"):
        assert min(ends(f"{model}-teacherless")) >= train.SOLVED
    assert "all five seeds of both models solve the teacherless task" in text
    low = sorted(f"{100 * share:.0f}" for share in ends("gpt-first_hop") if share < 0.45)
    assert f"with {' and '.join(low)} %. So they do not" in text


def test_the_table_counts_right(tmp_path):
    """Means, ranges, the count solved and the steps of the cascade, of two small logs."""
    logs = tmp_path / "results" / "logs"
    logs.mkdir(parents=True)
    shutil.copy(HERE / "results" / "table.py", tmp_path / "results")
    command = "python train.py --teacherless --path_len 4"
    config = vars(flags(teacherless=True, path_len=4))
    third_node = {0: 0, 100: 1, 200: 0, 300: 1}                 # its accuracy at each step
    for seed, accuracy in ((0, 0.5), (1, 1.0)):
        header = {
            "command": f"{command} --seed {seed}", "config": config | {"seed": seed},
            "versions": {"python": "3", "torch": "2"}, "machine": "m",
        }
        lines = [header]
        for step, share in third_node.items():
            lines.append({
                "iter": step, "examples": 8 * step, "elapsed_s": 60, "accuracy": accuracy,
                "cheat_accuracy": None,
                "node_accuracy": [1, accuracy, share, 1], "forced_node_accuracy": None,
            })
        (logs / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    script = tmp_path / "results" / "table.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    line = f"| `{command}` | 2 | 1 | 75.0% (50.0% - 100.0%) | - | - | 0, 1 never; 300 | 300 | 2k | "
    line += "1.0 |"
    assert line in result.stdout.splitlines(), result.stdout
    result = run(script, tmp_path)
    assert result.returncode == 1 and "there are no logs in" in result.stderr


def test_each_listed_experiment_is_on_record():
    """Under its name, with the command that `reproduce.py --list` shows, and a cure's patch."""
    listed = run("results/reproduce.py", "--list").stdout.splitlines()
    assert len(listed) >= 24
    logs = set()
    for line in listed:
        name, command = re.match(r"(\S+) +(python train.py .*?)(?:   .*)?$", line).groups()
        folder = LOGS
        if name.startswith("cures/"):
            folder = LOGS.parent
            objective = name.split("-")[1]
            patched = objective not in ("next_token", "teacherless")
            assert patched == (f"   with {objective}.patch" in line), line
        log = folder / f"{name}.jsonl"
        header = json.loads(log.read_text().splitlines()[0])
        assert re.sub(r" --out_dir \S+", "", header["command"]) == command, name
        logs.add(log)
    assert {*LOGS.glob("*.jsonl"), *CURES.glob("*.jsonl")} == logs


def test_estimate_of_a_step(monkeypatch):
    """Six FLOP for each weight of a matrix and each token. A Mamba has little else."""
    monkeypatch.syspath_prepend(HERE / "results")
    import paper

    args, star, _, flop, kept = paper.count("mamba", 2, 5)
    model = train.build_model(args, star)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    tokens = args.batch_size * (star.prefix_len + star.path_len - 1)
    assert flop == pytest.approx(6 * weights * tokens, rel=0.01)

    # The kernels save a state for every 8 of the 31 tokens: four, where one chunk has one.
    monkeypatch.setattr(scan_kernel, "TRITON_CHUNK", 31)
    *_, less = paper.count("mamba", 2, 5)
    state = 2 * args.n_embd * args.d_state * 4                  # bytes
    assert kept - less == args.n_layer * args.batch_size * 3 * state


@pytest.mark.parametrize("command", [
    ("data.py", "-n", "20000"), ("results/reproduce.py", "--list"), ("results/paper.py", "--list")
])
def test_a_reader_may_stop_reading(command):
    """As in `python data.py -n 20000 | head`: no traceback."""
    script, *flags = command
    process = subprocess.Popen(
        [sys.executable, "-u", HERE / script, *flags], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait()


def test_runs_of_the_papers_size_are_started(monkeypatch, tmp_path):
    """In the folder out/paper, here with small runs, two at a time."""
    monkeypatch.syspath_prepend(HERE / "results")
    import paper
    for file in ("train.py", "data.py", "model_gpt.py"):
        shutil.copy(HERE / file, tmp_path)
    monkeypatch.setattr(paper, "PROJECT", tmp_path)
    small = [*map(str, TINY), "--max_iters", "2"]
    paper.run_for(2, 2, {"first": small, "second": small})
    for name in ("first", "second"):
        assert paper.is_finished(tmp_path / "out" / "paper" / name / "log.jsonl"), name


@needs_unchanged_files
def test_a_cure_is_run_with_its_patch(monkeypatch):
    """In a copy of the files in out/, that is inside the repository."""
    monkeypatch.syspath_prepend(HERE / "results")
    import reproduce
    assert reproduce.code_for(None) == HERE
    copy = reproduce.code_for("look_ahead")
    assert "class LookAhead" in (copy / "train.py").read_text()
    assert "class LookAhead" not in (HERE / "train.py").read_text()
    assert (copy / "data.py").read_text() == (HERE / "data.py").read_text()
    assert not (copy / "test_all.py").exists()


def test_each_recorded_command_asks_for_the_recorded_run():
    """The flags in a log's command are those in its config, and no others differ by default."""
    parser = train.make_parser()
    for path in [*LOGS.glob("*.jsonl"), *CURES.glob("*.jsonl")]:
        header = json.loads(path.read_text().splitlines()[0])
        args = parser.parse_args(header["command"].split()[2:])
        train.fill_in_defaults(args)
        for name in ("out_dir", "overwrite", "resume"):
            delattr(args, name)
        config = {"decay_frac": 1 / 3} | header["config"]       # in logs from before that flag
        for name, value in vars(args).items():
            assert config[name] == value, (path.name, name)


def test_no_script_works_at_import():
    """Importing the scripts prints nothing, and needs no arguments."""
    names = [path.stem for path in (HERE / "results").glob("*.py")]
    if importlib.util.find_spec("matplotlib") is None:
        names.remove("figures")
    code = f"import sys; sys.path.insert(0, 'results'); import {', '.join(sorted(names))}"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


SOLUTIONS = sorted((HERE / "results" / "exercises").glob("*.patch"))
CHECKS = {  # the tests that README names
    "4": "attention or gpt_is or cache_or_state", "5": "cpu_scan", "6": "gru",
}


@needs_unchanged_files
def test_solutions_of_the_exercises_fit():
    """Each applies to the files as they are."""
    assert [patch.stem[0] for patch in SOLUTIONS] == list("4567")
    for patch in SOLUTIONS:
        assert git("apply", "--check", patch) == 0, patch.name


def test_the_seconds_of_the_first_command_are_those_of_its_log():
    for name in ("first_command", "first_command_slower", "first_command_faster"):
        log = (HERE / "results" / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(log[0])["command"] == "python train.py --model mamba --teacherless"
        assert f"trained for {json.loads(log[-1])['elapsed_s']:.0f} seconds" in README


def test_the_exercises_quote_their_logs():
    """The accuracy and the step in an exercise's text are those at the end of its log."""
    exercises = README.split("## 8. Exercises")[1]
    logs = [(log, int(log.stem[0])) for log in (HERE / "results" / "exercises").glob("*.jsonl")]
    assert len(logs) == 3
    logs.append((CURES / "mamba-look_ahead-deg2-len5-seed0.jsonl", 8))
    logs.append((CURES / "gpt-half_and_half-deg2-len5-seed0.jsonl", 9))
    for log, number in logs:
        text = exercises.split(f"\n{number}. ")[1].split(f"\n{number + 1}. ")[0]
        end = json.loads(log.read_text().splitlines()[-1])
        assert f"{100 * end['accuracy']:.1f} %" in text, log.name
        assert f"{end['iter']:,}" in text, log.name


# ---- results/cures


def test_readme_quotes_the_cures():
    """Section 6 has the first table of the page on the cures, and the runs that nearly solve it."""
    page = (CURES / "README.md").read_text()
    table = page[page.index("| objective |"):].split("\n\n")[0]
    assert len(table.splitlines()) == 9
    assert table in README

    ends = []
    for log in CURES.glob("mamba-look_ahead-deg5-len5-seed*.jsonl"):
        ends.append(json.loads(log.read_text().splitlines()[-1])["accuracy"])
    failed = sorted((100 * share for share in ends if share < train.SOLVED), reverse=True)
    text = " ".join(README.split())
    assert len(ends) == 3
    assert f"The other two ended with {failed[0]:.0f} and {failed[1]:.0f} % of the paths" in text


def patched_train(patch, folder):
    """train.py with a patch, as a module."""
    shutil.copy(HERE / "train.py", folder)
    assert subprocess.run(["git", "apply", patch], cwd=folder).returncode == 0
    spec = importlib.util.spec_from_file_location("patched_train", folder / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_unchanged_files
@pytest.mark.parametrize("model", ["gpt", "mamba"])
@pytest.mark.parametrize("patch", sorted(CURES.glob("*.patch")), ids=lambda patch: patch.stem)
def test_cures_fit_and_train(patch, model, monkeypatch, tmp_path, capsys):
    """The loss falls. A run can be resumed, and inference is that of the model within."""
    module = patched_train(patch, tmp_path)
    out = tmp_path / "run"
    given = [*TINY, "--model", model, "--n_embd", 32, "--max_iters", 40, "--eval_interval", 20]
    if patch.stem == "half_and_half":
        given.append("--teacherless")
    assert call(monkeypatch, module, *given, "--lr", 0.003, "--out_dir", out) == 0
    _, _, first, last = read_log(out)
    assert last["train_loss"] < first["train_loss"]
    assert call(monkeypatch, module, "--resume", out, "--max_iters", 60) == 0
    if patch.stem == "half_and_half":
        return                                                  # it adds nothing to the model
    _, _, star, whole = module.load_checkpoint(out)
    prompts = torch.from_numpy(data.draw(star, 5, rng())[0])
    assert torch.equal(whole.generate(prompts, 3), whole.model.generate(prompts, 3))
    assert torch.equal(whole(prompts)[0], whole.model(prompts)[0])


def cure(name, folder):
    """-> the model of a cure, a batch (idx, targets), and the states and logits on it"""
    module = patched_train(CURES / f"{name}.patch", folder)
    torch.manual_seed(0)
    whole = module.build_model(argparse.Namespace(model="gpt", **SMALL), SMALL_STAR).double()
    args = flags()
    idx, targets = module.training_tokens(args, SMALL_STAR, *data.draw(SMALL_STAR, 3, rng()))
    with torch.no_grad():
        h, _ = whole.model.hidden_states(idx)
    return whole, idx, targets, h, whole.model.lm_head(h)


def mean_of(terms):
    return torch.stack(terms).mean()


def losses_ahead(logits, targets, k):
    """-log p of the token k places after the next one, where there is one. logits (B, T, V)"""
    terms = []
    for b, t in np.ndindex(*targets.shape):
        if t + k < targets.size(1) and targets[b, t + k] >= 0:
            terms.append(-logits[b, t].log_softmax(0)[targets[b, t + k]])
    return mean_of(terms)


def path_positions(targets):
    """Where the model has to write: (sequence, position, all tokens from the next to the goal)"""
    for b, t in np.ndindex(*targets.shape):
        if targets[b, t] >= 0:
            yield b, t, targets[b, t:].tolist()


@needs_unchanged_files
@pytest.mark.parametrize("model", ["gpt", "mamba"])
def test_half_and_half_adds_both_losses(model, monkeypatch, tmp_path):
    """The loss of the first step is the sum of those of the two objectives, from equal weights."""
    module = patched_train(CURES / "half_and_half.patch", tmp_path)
    given = [*TINY, "--model", model, "--max_iters", 1, "--eval_interval", 1]
    losses = []
    for name, code, objective in (
        ("half", module, ["--teacherless"]), ("teacherless", train, ["--teacherless"]),
        ("forced", train, []),
    ):
        out = tmp_path / name
        assert call(monkeypatch, code, *given, *objective, "--out_dir", out) == 0
        losses.append(read_log(out)[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1] + losses[2], abs=1e-5)


@needs_unchanged_files
def test_look_ahead_is_its_equation(tmp_path):
    whole, idx, targets, h, logits = cure("look_ahead", tmp_path)
    expected = losses_ahead(logits, targets, 0)
    for k, head in enumerate(whole.heads, start=1):
        expected = expected + losses_ahead(whole.model.lm_head(head(h)), targets, k)
    assert len(whole.heads) == 3
    torch.testing.assert_close(whole(idx, targets)[1].double(), expected, atol=1e-5, rtol=0)


@needs_unchanged_files
def test_token_order_is_its_equation(tmp_path):
    """With the paper's scores W - j, here for a window of 7."""
    whole, idx, targets, h, logits = cure("token_order", tmp_path)
    terms = []
    for b, t, path in path_positions(targets):
        score = torch.full((SMALL_STAR.vocab_size,), -math.inf)
        for j, token in enumerate(path, start=1):
            score[token] = 7 - j
        terms.append(-(score.softmax(0) * whole.order(h[b, t]).log_softmax(0)).sum())
    expected = losses_ahead(logits, targets, 0) + mean_of(terms)
    torch.testing.assert_close(whole(idx, targets)[1].double(), expected, atol=1e-5, rtol=0)


@needs_unchanged_files
def test_bag_of_words_is_its_equation(tmp_path):
    whole, idx, targets, h, logits = cure("bag_of_words", tmp_path)
    terms = []
    for b, t, path in path_positions(targets):
        p = whole.summary(h[b, t]).sigmoid()
        for token in range(SMALL_STAR.vocab_size):
            terms.append(-(p[token] if token in path[1:] else 1 - p[token]).log())
    expected = losses_ahead(logits, targets, 0) + SMALL_STAR.vocab_size * mean_of(terms)
    torch.testing.assert_close(whole(idx, targets)[1].double(), expected, atol=1e-5, rtol=0)


@needs_unchanged_files
def test_next_latent_is_its_equation(tmp_path):
    """Its value and its gradients: none through the targets, and none to the W that reads g."""
    whole, idx, targets, *_ = cure("next_latent", tmp_path)
    h, _ = whole.model.hidden_states(idx)
    logits = whole.model.lm_head(h)
    weight = whole.model.lm_head.weight
    expected = losses_ahead(logits, targets, 0)
    for k in range(1, 4):
        near, kl = [], []
        for b, t in np.ndindex(3, idx.size(1) - k):
            g = h[b, t]
            for j in range(1, k + 1):
                g = g + whole.dynamics(torch.cat([weight[idx[b, t + j]], g]))
            gap = (g - h[b, t + k].detach()).abs()
            near.append(torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean())
            if targets[b, t + k] >= 0:
                p = logits[b, t + k].detach().softmax(0)
                q = (weight.detach() @ g).softmax(0)
                kl.append((p * (p / q).log()).sum())
        expected = expected + (mean_of(near) + mean_of(kl)) / 3
    _, loss = whole(idx, targets)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(loss, list(whole.parameters()))
    for gradient, other in zip(gradients, torch.autograd.grad(expected, list(whole.parameters()))):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


# ---- results/explore.html


def data_of(page):
    """The runs that stand in a page."""
    text = re.search('<script type="application/json" id="data">(.*?)</script>', page).group(1)
    return json.loads(text)


def answers_in(log):
    """-> [the answers of an evaluation, ...]"""
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    return [[shown["answer"] for shown in line["samples"]] for line in lines]


def answers_of(page_run):
    return [evaluation["answers"] for evaluation in page_run["evaluations"]]


def test_the_page_is_that_of_the_logs(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "results")
    import explore
    page = (HERE / "results" / "explore.html").read_text()
    assert page == explore.page(explore.recorded_logs(), explore.FIRST_SHOWN, HERE / "results")
    assert len(page.encode()) < 700_000
    assert not re.search("(src|href)=.?(https?:|//)", page)     # nothing from elsewhere
    run_shown = data_of(page)["runs"]["mamba-teacherless-seed0"]
    answers = answers_of(run_shown)
    assert answers == answers_in(LOGS / "mamba-teacherless-seed0.jsonl")
    assert answers[-1] == [graph["path"] for graph in run_shown["graphs"]]  # so they are its graphs
    for graph in run_shown["graphs"]:
        assert graph["path"] in graph["arms"] and len(graph["arms"]) == 2


def test_a_page_of_ones_own_runs(finished, tmp_path):
    """Side by side, one of them reversed and with graphs from a file."""
    file = tmp_path / "graphs.txt"
    file.write_text("\n".join(lines_of(SMALL_STAR, *data.draw(SMALL_STAR, 300, rng()))))
    other = tmp_path / "other"
    result = run(
        "train.py", *TINY, "--reverse", "--train_file", file, "--test_file", file,
        "--out_dir", other
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    result = run("results/explore.py", folder, other)
    assert result.returncode == 0, result.stderr
    page = (folder / "explore.html").read_text()
    shown = data_of(page)
    readme = re.search('href="(.*README.md)#', page).group(1)
    assert (folder / readme).resolve() == HERE / "README.md"
    assert shown["first_shown"] == [str(folder), str(other)]
    assert answers_of(shown["runs"][str(folder)]) == answers_in(folder / "log.jsonl")
    reversed_run = shown["runs"][str(other)]
    assert answers_of(reversed_run) == answers_in(other / "log.jsonl")
    paths = [list(map(int, line.split("=")[1].split(","))) for line in file.read_text().split()]
    assert [graph["path"] for graph in reversed_run["graphs"]] == paths[:8]
    end = json.loads((other / "log.jsonl").read_text().splitlines()[-1])
    shares = [round(100 * share, 1) for share in end["node_accuracy"]]
    assert reversed_run["evaluations"][-1]["nodes"] == shares[::-1]
    result = run("results/explore.py", tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("explore.py: ")
    log = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text(log[0])                   # stopped before an evaluation
    result = run("results/explore.py", folder)
    assert result.returncode == 1 and "does not have the model's answers" in result.stderr


@pytest.fixture
def browser():
    """A function that opens a page at a width, and gives a Selenium driver."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("there is no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))

    def open_page(width, page=HERE / "results" / "explore.html"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.as_uri())
        return driver

    yield open_page
    driver.quit()


def shown_in(driver, panel):
    """-> the step in the panel's text, and the nodes of the answer in its table"""
    text = driver.find_element("css selector", f"#panel{panel} .share-text").text
    cells = driver.find_elements("css selector", f"#panel{panel} td.answer")
    nodes = []
    for cell in cells:
        token = cell.text.strip("()✓✗ ")                       # the names are 0 to 9
        nodes.append(10 + "|=/$".index(token) if token in "|=/$" else int(token))
    return int(re.search("at step ([0-9,]+)", text).group(1).replace(",", "")), nodes


def in_log(name, step, graph):
    lines = [json.loads(line) for line in (LOGS / f"{name}.jsonl").read_text().splitlines()[1:]]
    last = [line for line in lines if line["iter"] <= step][-1]
    return last["iter"], last["samples"][graph]["answer"]


def press(driver, *keys):
    from selenium.webdriver import ActionChains
    ActionChains(driver).send_keys(*keys).perform()


@pytest.mark.browser
def test_the_page_shows_what_the_log_says(browser):
    """By the slider, by keys and by the menus. No error is on the console."""
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import Select
    driver = browser(1100)
    forced, teacherless = "mamba-teacher_forced-seed0", "mamba-teacherless-seed0"
    for at in (0, 3, 10):
        driver.execute_script(
            "const slider = document.getElementById('slider'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'));", at
        )
        assert shown_in(driver, 0) == in_log(forced, 100 * at, 0)
        assert shown_in(driver, 1) == in_log(teacherless, 100 * at, 0)
    press(driver, Keys.ARROW_LEFT, Keys.ARROW_LEFT, "4")
    assert shown_in(driver, 0) == in_log(forced, 800, 3)
    assert shown_in(driver, 1) == in_log(teacherless, 800, 3)
    press(driver, " ")
    play = driver.find_element("id", "play")
    assert "Pause" in play.text
    deadline = time.time() + 60
    while "Pause" in play.text and time.time() < deadline:      # until the end of both runs
        time.sleep(0.1)
    assert shown_in(driver, 1) == in_log(teacherless, 1000, 3)
    menu = Select(driver.find_element("css selector", "#panel0 .objective"))
    menu.select_by_visible_text("reversed")
    assert shown_in(driver, 0) == in_log("mamba-reverse-seed0", 1000, 3)
    menu = Select(driver.find_element("css selector", "#panel1 .seed"))
    menu.select_by_value("mamba-teacherless-seed1")
    assert shown_in(driver, 1) == in_log("mamba-teacherless-seed1", 1000, 3)
    assert driver.get_log("browser") == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_the_page_fits(browser, width):
    """Nothing overflows, whichever run is shown."""
    driver = browser(width)
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    for name in data_of(driver.page_source)["runs"]:
        driver.execute_script("show(0, arguments[0]);", name)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, name
    assert driver.get_log("browser") == []


@pytest.mark.browser
def test_a_long_path_can_be_read_on_a_phone(browser, tmp_path):
    """Graph and table are wider than the page then. They scroll, and the page does not."""
    size = ("--deg", 2, "--path_len", 12, "--num_nodes", 24)
    assert run("train.py", *TINY, *size, "--out_dir", tmp_path).returncode == 0
    assert run("results/explore.py", tmp_path).returncode == 0
    driver = browser(360, tmp_path / "explore.html")
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    for part in ("graph svg", "table table"):
        width = f"return document.querySelector('#panel0 .{part}').clientWidth"
        assert driver.execute_script(width) > 600, part
    assert driver.get_log("browser") == []


# ---- The long tests: pytest -m slow


@pytest.mark.slow
@pytest.mark.parametrize("patch", SOLUTIONS, ids=lambda patch: patch.stem)
def test_solutions_of_the_exercises(patch, tmp_path):
    """They pass the tests that README names for them, and train."""
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copy(HERE / "README.md", tmp_path)
    assert subprocess.run(["git", "apply", patch], cwd=tmp_path).returncode == 0
    commands = [("train.py", *TINY)]
    commands.append(("train.py", *TINY, "--teacherless"))
    commands.append(("train.py", *TINY, "--model", "mamba"))
    if patch.stem[0] in CHECKS:
        commands = [("-m", "pytest", "-k", CHECKS[patch.stem[0]], "test_all.py")]
    for command in commands:
        command = [sys.executable, *map(str, command)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_100_000_mutated_lines_are_judged_rightly():
    assert fuzz(100_000) > 1000


@pytest.mark.slow
def test_500_combinations_of_flags(monkeypatch, tmp_path, capsys):
    assert 30 < try_flags(500, monkeypatch, tmp_path, capsys) < 470


@pytest.mark.slow
@pytest.mark.parametrize("given", [
    ("--model", "gpt"), ("--model", "mamba", "--teacherless", "--n_train", 0)
])
def test_25_kills(given, tmp_path):
    """kill -9 at random moments; the run ends with the same bits as one that was left alone.

    A checkpoint is written after each step, so many of the kills hit that.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = (*TINY, *given, "--max_iters", 1500, "--eval_interval", 1)
    assert run("train.py", *given, "--out_dir", whole).returncode == 0
    random, ckpt = rng(), parts / "ckpt.pt"
    for kill in range(25):
        begun = ckpt.exists()
        process = start(*(("--resume", parts) if begun else (*given, "--out_dir", parts)))
        if kill % 4 == 0:                                       # while it starts
            time.sleep(random.uniform(0.5, 3))
        else:                                                   # between and in its checkpoints
            before = ckpt.stat().st_mtime_ns if begun else 0
            wait_for(lambda: ckpt.exists() and ckpt.stat().st_mtime_ns > before, process)
            time.sleep(random.uniform(0, 0.3))
        assert process.poll() is None
        process.kill()
        _, err = process.communicate()
        assert err == ""
        if ckpt.exists():
            read_ckpt(parts)
    assert run("train.py", "--resume", parts).returncode == 0
    assert_same_run(whole, parts)


def workers_of(torchrun):
    """The process ids of the processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_a_killed_process_ends_the_job(tmp_path):
    """Of two processes. The job resumes."""
    out = tmp_path / "run"
    given = (*TINY, "--max_iters", 3000, "--eval_interval", 20, "--out_dir", out)
    process = start(*given, torchrun=True)
    wait_for((out / "log.jsonl").exists, process)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    done = read_ckpt(out)["log"][-1]["iter"]
    process = start("--resume", out, "--max_iters", done + 10, torchrun=True)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert read_log(out)[-1]["iter"] == done + 10


@pytest.mark.slow
def test_two_killed_processes_resume_to_the_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = (*TINY, "--max_iters", 3000, "--eval_interval", 50)
    process = start(*given, "--out_dir", whole, torchrun=True)
    process.communicate(timeout=120)
    process = start(*given, "--out_dir", parts, torchrun=True)
    log = parts / "log.jsonl"
    wait_for(lambda: log.exists() and read_log(parts)[-1]["iter"] > 0, process)
    for pid in [process.pid, *workers_of(process)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert 0 < read_ckpt(parts)["log"][-1]["iter"] < 3000
    process = start("--resume", parts, torchrun=True)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert_same_run(whole, parts)


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
    """The resident memory of a tiny run, from step 4,000 to step 20,000."""
    given = (*TINY, "--max_iters", 20_000, "--eval_interval", 2000, "--n_train", n_train)
    command = [sys.executable, "-c", PAGES, *map(str, given), "--out_dir", tmp_path / "run"]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=ONE_THREAD)
    pages = re.findall(r"pages (\d+)", result.stdout)
    pages = [int(number) for number in pages]
    assert len(pages) == 11, result.stderr
    assert max(pages[2:]) < 1.02 * pages[2], pages
