"""The tests: pytest, on a machine without a GPU, where Triton kernels run in Triton's interpreter.

On a machine with one, TRITON_INTERPRET=0 pytest -k scan runs the kernels themselves.
"""
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import json
import math
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

import data
import sample
import scan_kernel
import train
from data import PathStar
from model_gpt import GPT, GPTConfig, attention, fused_attention
from model_mamba import Mamba, MambaConfig
from scan_kernel import selective_scan, selective_scan_cpu, selective_scan_ref, selective_scan_triton

HERE = Path(__file__).parent
STAR = PathStar(2, 5, 50)
LINE = "32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12"


def rng(seed=0):
    return np.random.default_rng(seed)


def run(script, *flags, cwd=HERE, env=None):
    return subprocess.run([sys.executable, str(HERE / script), *map(str, flags)], cwd=cwd, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))


def fails(script, *flags, says, cwd=HERE):
    """The script refuses: exit code 2, one line on stderr that says why, nothing printed."""
    result = run(script, *flags, cwd=cwd)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and says in result.stderr, result.stderr


# data.py

def test_the_papers_example_in_tokens():
    """FACTS of the paper's code: node k is k, | is N, = is N + 1, / is N + 2; commas are not tokens."""
    edges, path = data.parse_line(LINE)
    edges, paths = np.array([edges]), np.array([path])
    prefixes = data.assemble(STAR, edges[:, :, 0], edges[:, :, 1], paths)
    assert prefixes[0].tolist() == [32, 3, 50, 16, 12, 50, 3, 19, 50, 32, 34, 50, 34, 6, 50, 6, 16, 50, 19, 47, 50, 47, 28,
                                    52, 32, 12, 51]
    assert paths[0].tolist() == [32, 34, 6, 16, 12]
    assert STAR.prefix_len == 27 and STAR.dollar == 53 and STAR.vocab_size == 54
    assert list(data.text(STAR, prefixes, paths)) == [LINE]
    assert list(data.text(STAR, prefixes)) == [LINE.split("=")[0] + "="]


@pytest.mark.parametrize("sizes", [(2, 5, 50), (1, 2, 2), (5, 3, 11), (3, 2, 200)])
def test_drawn_graphs_are_path_stars(sizes, tmp_path):
    star, file = PathStar(*sizes), tmp_path / "graphs.txt"
    prefixes, paths = data.draw(star, 500, rng())
    file.write_text("".join(line + "\n" for line in data.text(star, prefixes, paths)))
    edges, read = data.read_graphs(file, num_nodes=star.num_nodes)   # refuses anything but a path-star graph
    assert (data.assemble(star, edges[:, :, 0], edges[:, :, 1], read) == prefixes).all() and (read == paths).all()
    assert edges.shape == (500, star.n_edges, 2) and paths.shape == (500, star.path_len)


def test_draws_are_uniform():
    """Names, the goal's arm and the order of the edges: chi-square tests, each failing once in about 10^5 seeds."""
    star, n = PathStar(2, 3, 6), 60_000
    prefixes, paths = data.draw(star, n, rng(1))

    def uniform(values, kinds):
        counts = np.bincount(values, minlength=kinds)
        assert len(counts) == kinds
        chi2 = ((counts - n / kinds) ** 2 / (n / kinds)).sum()
        assert chi2 < (kinds - 1) + 4.5 * math.sqrt(2 * (kinds - 1)) + 10

    for column in (*paths.T, prefixes[:, 0], prefixes[:, 4]):
        uniform(column, 6)
    # the order of the edges, seen as the positions of the two edges on the goal's arm: 4 * 3 pairs
    first = [np.argmax((prefixes[:, 0:-3:3] == paths[:, [i]]) & (prefixes[:, 1:-3:3] == paths[:, [i + 1]]), axis=1)
             for i in (0, 1)]
    uniform(first[0] * 4 + first[1] - (first[0] * 4 + first[1]) // 5 - 1, 12)
    # pairs of names, so that they are independent too: 30 ordered pairs of different ones
    a, b = paths[:, 0], paths[:, 2]
    uniform(a * 5 + b - (b > a), 30)


def test_same_seed_same_bytes():
    command = "--deg", 2, "--path_len", 5, "--num_nodes", 50, "-n", 3, "--seed"
    first = run("data.py", *command, 0).stdout
    assert first == run("data.py", *command, 0).stdout != run("data.py", *command, 1).stdout
    assert len(first.splitlines()) == 3


def test_printed_graphs_are_not_those_of_a_run_with_the_same_seed(tmp_path):
    """Numbers drawn from seed s are those drawn from [s, 0]: files made with --seed must stand apart from every run's sets."""
    (tmp_path / "graphs.txt").write_text(run("data.py", "-n", 300, "--seed", 0).stdout)
    printed = data.datasets(n_test=1, train_file=tmp_path / "graphs.txt", num_nodes=50)[1][0]
    for prefixes, _ in data.datasets(2, 5, 50, 300, 300, seed=0)[1:3]:
        assert not set(data.keys(prefixes)) & set(data.keys(printed))


def test_train_and_test_share_no_prefix():
    star, (train_prefixes, _), (test_prefixes, _), _ = data.datasets(2, 2, 4, 40, 8)
    assert star.count() == 48                                        # all of this space is used, each graph once
    assert len(set(data.keys(train_prefixes)) | set(data.keys(test_prefixes))) == 48
    fresh, _ = data.draw_unseen(star, 1000, rng(), set(data.keys(test_prefixes)), distinct=False)
    assert not set(data.keys(fresh)) & set(data.keys(test_prefixes)) and len(set(data.keys(fresh))) == 40
    again, other = data.datasets(2, 2, 4, 40, 8), data.datasets(2, 2, 4, 40, 8, seed=1)
    assert (again[1][0] == train_prefixes).all() and (other[1][0] != train_prefixes).any()
    for n_train, n_test in ((41, 8), (0, 48)):
        with pytest.raises(ValueError, match="only 48 different graphs"):
            data.datasets(2, 2, 4, n_train, n_test)


@pytest.mark.parametrize("sizes", [(2, 2, 4), (1, 3, 4), (3, 2, 4), (2, 3, 5)])
def test_count_of_graphs(sizes):
    star = PathStar(*sizes)
    assert len(set(data.keys(data.draw(star, 40 * star.count(), rng())[0]))) == star.count()


def test_files_and_what_they_determine(tmp_path):
    for name, n, seed in (("train", 30, 1), ("test", 10, 2)):
        lines = list(data.text(STAR, *data.draw(STAR, n, rng(seed))))
        (tmp_path / name).write_text("\n".join(lines + lines[:2] if name == "train" else lines + [LINE]))
    with open(tmp_path / "train", "a") as f:
        f.write("\r\n" + LINE + "\r\n")
    star, (p, _), (q, _), warnings = data.datasets(train_file=tmp_path / "train", test_file=tmp_path / "test")
    assert (star.deg, star.path_len, star.num_nodes) == (2, 5, 50) and (len(p), len(q)) == (33, 11)
    assert warnings == ["2 lines of the train file repeat a graph", "1 of the 11 test graphs occur in the training file too"]
    star, (p, _), (q, _), warnings = data.datasets(train_file=tmp_path / "train", n_train=5, n_test=7, num_nodes=60)
    assert (star.num_nodes, len(p), len(q), warnings) == (60, 5, 7, [])
    assert list(data.text(star, p[:1])) == [(tmp_path / "train").read_text().split("=")[0] + "="]


@pytest.mark.parametrize("line, says", [
    ("32,3|16,12", "not of the form"), ("", "not of the form"), (LINE.replace(",", ";"), "not of the form"),
    (LINE + ",", "not of the form"), (LINE.replace("32,3", "x,3"), "not of the form"),
    (LINE.replace("32", "9" * 5000), "not of the form"),
    (LINE.replace("/32,12=32", "/9,12=9"), "no edge leaves the start 9"),
    (LINE.replace("47,28", "47,16"), "node 16 is repeated"), (LINE.replace("47,28", "47,32"), "node 32 is repeated"),
    (LINE.replace("47,28", "46,28"), "some edges are on no arm"), (LINE.replace("47,28", "19,28"), "some edges are on no arm"),
    ("0,1|0,2|2,3/0,3=0,2,3", "arms differ in length"),
    (LINE.replace("/32,12", "/32,16"), "the goal 16 is not the end of an arm"),
    (LINE.replace("=32,34", "=32,3"), "path 32,3,6,16,12 is not in the graph"),
    (LINE.replace("=32,34,6,16,12", "="), "the path is missing"),
    ("0,1|2,3|1,4|0,2/0,4=0,1,4", "deg 2 and path_len 3, where deg 2 and path_len 5 are expected"),
    (LINE.replace("28", "60"), "node 60 is out of range")])
def test_malformed_lines(line, says, tmp_path):
    file = tmp_path / "graphs.txt"
    file.write_text(f"{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(ValueError) as error:
        data.read_graphs(file, num_nodes=60)
    assert says in str(error.value) and f"{file}, line 2: " in str(error.value)


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "one").write_text(LINE)
    for name, limit, says in (("empty", None, "is empty"), ("binary", None, "line 1"), ("one", 2, "has 1 graphs")):
        with pytest.raises(ValueError, match=says):
            data.read_graphs(tmp_path / name, limit)
    with pytest.raises(ValueError, match="one, line 1: a graph with deg 2 and path_len 5, where deg 3"):
        data.datasets(deg=3, n_test=1, train_file=tmp_path / "one")


# scan_kernel.py

NAMES = "u delta A B C D z delta_bias".split()
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
SCANS = [selective_scan_cpu] + [selective_scan_triton] * (scan_kernel.triton is not None)  # none on macOS and Windows


def scan_inputs(batch, seqlen, dim, dstate, dtype=torch.float32, without=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, B, vector = (batch, dim, seqlen), (batch, dstate, seqlen), (dim,)
    inputs = [torch.randn(shape, generator=generator) for shape in (u, u, (dim, dstate), B, B, vector, u, vector)]
    inputs[2] = -inputs[2].abs() * 2
    per_token = {"u", "delta", "B", "C", "z"}
    dtypes = [dtype if name in per_token else max(dtype, torch.float32, key=lambda d: d.itemsize) for name in NAMES]
    return [None if name in without else x.to(DEVICE, dtype).requires_grad_() for name, x, dtype in zip(NAMES, inputs, dtypes)]


def passes(scan, inputs, softplus=True):
    """-> {what: tensor}: out, last state, and the gradient of each input through a weighted sum of out."""
    out, last = scan(*inputs, delta_softplus=softplus, return_last_state=True)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
    given = [(name, x) for name, x in zip(NAMES, inputs) if x is not None]
    grads = torch.autograd.grad((out.double() * weight).sum(), [x for _, x in given])
    return {"out": out, "last": last} | {name: grad for (name, _), grad in zip(given, grads)}


def assert_matches(scan, inputs, softplus=True, tolerance=2e-5):
    exact = passes(selective_scan_ref, [x if x is None else x.detach().double().requires_grad_() for x in inputs], softplus)
    for name, x in passes(scan, inputs, softplus).items():
        scale = exact[name].abs().max().clamp(min=1e-3)
        assert x.shape == exact[name].shape
        assert (x.double() - exact[name]).abs().max() <= tolerance * scale, name


def loop(u, delta, A, B, C, D, z, delta_bias):
    """The recurrence in NumPy, number by number."""
    u, delta, A, B, C, D, z, delta_bias = (x.detach().double().cpu().numpy() for x in (u, delta, A, B, C, D, z, delta_bias))
    out = np.zeros(u.shape)
    h = np.zeros((u.shape[0], *A.shape))
    for b, d, t in np.ndindex(*u.shape):
        dt = math.log1p(math.exp(delta[b, d, t] + delta_bias[d]))
        for n in range(A.shape[1]):
            h[b, d, n] = math.exp(dt * A[d, n]) * h[b, d, n] + dt * B[b, n, t] * u[b, d, t]
        y = sum(C[b, n, t] * h[b, d, n] for n in range(A.shape[1])) + D[d] * u[b, d, t]
        out[b, d, t] = y * z[b, d, t] / (1 + math.exp(-z[b, d, t]))
    return torch.from_numpy(out), torch.from_numpy(h)


def test_reference_is_the_recurrence():
    inputs = scan_inputs(2, 7, 3, 4, torch.float64)
    for ours, theirs in zip(selective_scan_ref(*inputs, delta_softplus=True, return_last_state=True), loop(*inputs)):
        torch.testing.assert_close(ours.cpu(), theirs)


SIZES = [(2, 1, 3, 1), (1, 2, 70, 5), (3, 3, 5, 8), (2, 31, 66, 16), (1, 257, 3, 5)]

@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [scan_kernel.PIECE, 300])          # as it is; and in pieces of batch, and of time
def test_cpu_scan(size, piece, monkeypatch):
    monkeypatch.setattr(scan_kernel, "PIECE", piece)
    assert_matches(selective_scan_cpu, scan_inputs(*size))


@pytest.mark.skipif(scan_kernel.triton is None, reason="needs triton")
@pytest.mark.parametrize("size", SIZES)
def test_triton_scan(size):
    assert_matches(selective_scan_triton, scan_inputs(*size))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("without, softplus", [(("D",), True), (("z",), True), (("delta_bias",), True), (("D", "z"), False),
                                               ((), False), (("D", "z", "delta_bias"), False)])
def test_optional_arguments(scan, without, softplus):
    inputs = scan_inputs(2, 9, 6, 3, without=without)
    if not softplus:                                                 # dt must not be negative
        with torch.no_grad():
            inputs[1].abs_()
            if inputs[7] is not None:
                inputs[7].abs_()
    assert_matches(scan, inputs, softplus)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_dtypes(scan, dtype, tolerance):
    """Half precision is compared to the float64 scan of the same rounded inputs: what is left is the rounding of results.
    The interpreter truncates to bfloat16 where the chip rounds: one unit in the last place, 2^-7."""
    inputs = scan_inputs(2, 9, 6, 5, dtype)
    out, last = scan(*inputs, delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype and last.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert not last.requires_grad
    assert_matches(scan, inputs, tolerance=tolerance)


@pytest.mark.parametrize("scan", SCANS)
def test_strides(scan):
    """Views: time running slower than channels, every second channel, expanded."""
    inputs = scan_inputs(2, 6, 5, 3)
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() if x.dim() == 3 else x for x in inputs]
    views[0] = torch.stack([inputs[0], inputs[0]], dim=2).flatten(1, 2)[:, ::2].detach().requires_grad_()
    views[2] = inputs[2].detach().t().contiguous().t().requires_grad_()
    views[5] = torch.stack([inputs[5], inputs[5]], dim=1)[:, 0].detach().requires_grad_()
    for x, y in zip(passes(scan, inputs).values(), passes(scan, views).values()):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    u = inputs[0].detach()[:1].expand(2, -1, -1)
    torch.testing.assert_close(scan(u, *inputs[1:]), scan(u.clone(), *inputs[1:]), rtol=0, atol=0)


@pytest.mark.parametrize("scan", SCANS)
def test_extremes(scan):
    """Steps of 0, and steps so large that exp(dt A) is 0: finite, and right."""
    inputs = scan_inputs(1, 12, 4, 3)
    with torch.no_grad():
        inputs[1][:, :, 3:6], inputs[1][:, :, 7:9] = -200.0, 300.0
        inputs[2] *= 50
    assert_matches(scan, inputs)
    empty = scan(*(x[:0] if x.dim() == 3 else x for x in inputs), delta_softplus=True)
    assert empty.shape == (0, 4, 12) and torch.autograd.grad(empty.sum(), inputs[2])[0].abs().max() == 0


@pytest.mark.parametrize("scan", SCANS)
def test_nothing_comes_from_beyond_the_end(scan):
    """A growing state, steps that only delta keeps small: behind the last step, where delta reads as 0, it would overflow."""
    inputs = scan_inputs(1, 9, 4, 3)
    with torch.no_grad():
        inputs[1].sub_(101)
        inputs[2].abs_().add_(1)
        inputs[7].fill_(100)
    assert_matches(scan, inputs)


def test_gradients_by_finite_differences():
    torch.autograd.gradcheck(lambda *x: selective_scan_cpu(*x, delta_softplus=True), scan_inputs(2, 5, 3, 2, torch.float64))


GRID = [(selective_scan_cpu, torch.float32, seqlen) for seqlen in (128, 256, 512, 1024, 2048, 4096)]
GRID += [(selective_scan_cpu, dtype, seqlen) for dtype in (torch.float16, torch.bfloat16) for seqlen in (128, 4096)]
GRID += [(scan, dtype, seqlen) for scan in SCANS[1:] for dtype, seqlen in (
    (torch.float32, 512), (torch.float16, 128), (torch.bfloat16, 128))]

@pytest.mark.parametrize("scan, dtype, seqlen", GRID)
def test_grid_of_mamba_ssm(scan, dtype, seqlen):
    """The sizes, inputs and tolerances with which the mamba_ssm package tests its CUDA kernel."""
    rtol, atol = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}[dtype]
    torch.manual_seed(0)
    batch, dim, dstate = 2, 4, 8
    u, B, C, z = (torch.randn(batch, n, seqlen, dtype=dtype) for n in (dim, dstate, dstate, dim))
    delta, A = (0.5 * torch.rand(batch, dim, seqlen)).to(dtype), -0.5 * torch.rand(dim, dstate)
    inputs = [x.to(DEVICE).requires_grad_() for x in (u, delta, A, B, C, torch.randn(dim), z, 0.5 * torch.rand(dim))]
    (out, last, *grads), (out_ref, last_ref, *grads_ref) = (
        [*result, *torch.autograd.grad(result[0], inputs, torch.ones_like(result[0]))]
        for result in (f(*inputs, delta_softplus=True, return_last_state=True) for f in (scan, selective_scan_ref)))
    torch.testing.assert_close(out, out_ref, rtol=rtol, atol=atol)
    torch.testing.assert_close(last, last_ref, rtol=rtol, atol=atol)
    weights = max(1e-3, rtol), max(1e-3, atol)
    for name, grad, ref in zip(NAMES, grads, grads_ref):
        r, a = {"u": (2 * rtol, 2 * atol), "delta": (5 * rtol, 10 * atol), "A": (weights[0], 5 * weights[1]),
                "B": (rtol, atol), "C": (rtol, atol)}.get(name, weights)
        torch.testing.assert_close(grad, ref, rtol=r, atol=a, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("scan", SCANS)
def test_scan_under_compile_and_checkpoint(scan):
    """No graph break; the same bits, and the same bits again."""
    inputs = scan_inputs(3, 33, 20, 4)
    plain = passes(scan, inputs)
    for wrapped in (scan, torch.compile(scan, fullgraph=True, backend="aot_eager"),
                    lambda *x, **options: torch.utils.checkpoint.checkpoint(scan, *x, use_reentrant=False, **options)):
        for name, x in passes(wrapped, inputs).items():
            torch.testing.assert_close(x, plain[name], rtol=0, atol=0, msg=lambda text: f"{name}: {text}")


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of the tensors that are alive, and the most there ever were."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.now += (size := x.untyped_storage().nbytes() // x.element_size())
                weakref.finalize(x.untyped_storage(), self.freed, key, size)
        self.peak = max(self.peak, self.now)
        return result


@pytest.mark.parametrize("scan", SCANS)
def test_scan_memory(scan, monkeypatch):
    """Saved for the backward pass: the inputs, and a state for each chunk of time. At no time is there a tensor of (batch,
    dim, seqlen, dstate), nor as much memory in pieces of it."""
    batch, seqlen, dim, dstate = size = (4, 256, 64, 128) if scan is selective_scan_cpu else (1, 64, 32, 64)
    monkeypatch.setattr(scan_kernel, "PIECE", 1 << 14)
    inputs = scan_inputs(*size)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(*inputs, delta_softplus=True)
    mine = sum(x.numel() for x in saved if not any(x.data_ptr() == y.data_ptr() for y in inputs))
    chunk = scan_kernel.TIME if scan is selective_scan_cpu else scan_kernel.CHUNK
    assert mine == -(-seqlen // chunk) * batch * dim * dstate
    forward, backward = (scan_kernel.cpu_forward, scan_kernel.cpu_backward) if scan is selective_scan_cpu else (
        scan_kernel.triton_forward, scan_kernel.triton_backward)
    inputs = [x.detach() for x in inputs]
    monkeypatch.setattr(scan_kernel, "launch", lambda *args, **options: None)    # it is their interpreter that allocates
    with Live() as live:
        out, _, states = forward(*inputs, True, True)
        backward(torch.ones_like(out), *inputs, states, True)
    assert mine < live.peak < batch * seqlen * dim * dstate / 2


@pytest.mark.skipif(scan_kernel.triton is None or sys.platform != "linux", reason="needs triton, and memory only when touched")
def test_offsets_beyond_32_bits():
    inputs = scan_inputs(2, 3, 4, 2)
    storage = torch.empty((1 << 31) + 100, dtype=torch.float16, device=DEVICE)   # 4 GB; on a CPU two pages of them are touched
    far = storage.as_strided((2, 4, 3), (1 << 31, 3, 1))
    with torch.no_grad():
        near = far.copy_(inputs[0]).clone()
    assert torch.equal(selective_scan_triton(far, *inputs[1:]), selective_scan_triton(near, *inputs[1:]))


def test_scan_arguments():
    u, delta, A, B, C, D, z, bias = inputs = scan_inputs(2, 6, 5, 3)
    for wrong, says in (([u, delta, A.cfloat(), B, C], "complex A is not supported"),
                        ([u, delta, A, B[:, None], C], "constant and grouped B and C are not supported"),
                        ([u, delta, A, B, C[0]], "constant and grouped B and C are not supported"),
                        ([u, delta[:, :, 1:], A, B, C], "delta must be"), ([u, delta, A, B, C, D[1:]], "D must be")):
        with pytest.raises(ValueError, match=says):
            selective_scan(*wrong)
    for scalar in ((u, delta, torch.tensor(-1.0), B, C), (torch.tensor(1.0), delta, A, B, C)):
        with pytest.raises(ValueError, match="u must be"):
            selective_scan(*scalar)
    torch.testing.assert_close(selective_scan(*inputs), selective_scan_cpu(*inputs))


# model_gpt.py, model_mamba.py

def small(name, **settings):
    torch.manual_seed(0)
    model, Config, fields = train.model_class(name)
    sizes = dict(vocab_size=14, block_size=40, n_layer=2, n_head=2, n_embd=16, d_model=16, d_state=4) | settings
    return model(Config(**{field: size for field, size in sizes.items() if field in fields}))


def tokens(*shape, seed=0):
    return torch.randint(0, 14, shape, generator=torch.Generator().manual_seed(seed))


every_model = pytest.mark.parametrize("name", train.MODELS)           # a third architecture is held to the same


@every_model
def test_face(name):
    """Logits everywhere when there are targets or they are asked for, else the last; a target of -1 does not count."""
    model, idx = small(name), tokens(3, 11)
    targets = tokens(3, 11, seed=1)
    targets[:, :7] = -1
    logits, loss = model(idx, targets)
    expected = -logits.log_softmax(2).gather(2, targets[:, :, None].clamp(min=0))[:, 7:].mean()
    assert logits.shape == (3, 11, 14)
    torch.testing.assert_close(loss, expected)
    every, none = model(idx, all_logits=True)
    last, _ = model(idx)
    assert none is None
    torch.testing.assert_close(every, logits)
    torch.testing.assert_close(last, logits[:, -1:])


@every_model
def test_causal(name):
    model, idx = small(name), tokens(2, 12)
    changed = idx.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 14
    before, after = model(idx, all_logits=True)[0], model(changed, all_logits=True)[0]
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=0)
    assert (before[:, 8:] != after[:, 8:]).any(dim=2).all()


@every_model
@torch.no_grad()
def test_cache_equals_full_pass(name):
    model, idx = small(name).double(), tokens(3, 20)
    full, _ = model(idx, all_logits=True)
    for sizes in ([12] + [1] * 8, [1] * 20, [5, 6, 9]):
        cache = model.new_cache()
        parts = [model(part, cache=cache, all_logits=True)[0] for part in idx.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full)
    answer = idx[:, :9]
    for _ in range(6):
        answer = torch.cat([answer, model(answer)[0].argmax(dim=2)], dim=1)
    assert (model.generate(idx[:, :9], 6) == answer).all()


def test_attention_written_out_equals_fused():
    generator = torch.Generator().manual_seed(0)
    for T, S in ((7, 7), (1, 7), (3, 7)):
        q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (T, S, S))
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, seen))
        torch.testing.assert_close(fused_attention(q, k, v), attention(q, k, v))
    idx = tokens(2, 9)
    plain, fused = small("gpt", fused=False), small("gpt")
    torch.testing.assert_close(plain(idx)[0], fused(idx)[0])


@pytest.mark.parametrize("fused", [True, False])
def test_gpt_is_gpt2(fused):
    """Names and shapes as in nanoGPT; the numbers, against GPT-2's equations on the raw weights."""
    model = small("gpt", fused=fused).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    w, idx = model.state_dict(), tokens(1, 10)[0]
    block = {"ln_1": (16,), "attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "ln_2": (16,), "mlp.c_fc": (64, 16),
             "mlp.c_proj": (16, 64)}
    shapes = {f"transformer.h.{i}.{name}.{kind}": shape if kind == "weight" else shape[:1]
              for i in (0, 1) for name, shape in block.items() for kind in ("weight", "bias")}
    shapes |= {"transformer.wte.weight": (14, 16), "transformer.wpe.weight": (40, 16), "lm_head.weight": (14, 16),
               "transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,)}
    assert {name: tuple(x.shape) for name, x in w.items()} == shapes

    def norm(x, name):
        x = x - x.mean(1, keepdim=True)
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

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
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))
        x = x + linear(y, pre + "mlp.c_proj")
    expected = norm(x, "transformer.ln_f") @ w["lm_head.weight"].T
    torch.testing.assert_close(model(idx[None], all_logits=True)[0][0], expected)
    with pytest.raises(ValueError, match="block_size"):
        model(tokens(1, 41))
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig(n_head=5, n_embd=16)


def test_gpt_starts_as_gpt2_at_its_width():
    for width in (96, 768):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=2, n_head=2, n_embd=width))
        scale = math.sqrt(768 / width)
        for name, std in (("0.attn.c_attn", 0.02), ("1.mlp.c_fc", 0.02), ("0.mlp.c_proj", 0.02),
                          ("1.mlp.c_proj", 0.01), ("1.attn.c_proj", 0.01)):
            assert model.state_dict()[f"transformer.h.{name}.weight"].std().item() == pytest.approx(std * scale, rel=0.05)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.weight.std().item() == pytest.approx(0.02 * scale, rel=0.05)
        table = model.transformer.wpe.weight                         # of sinusoids: one step is the same rotation everywhere
        products = (table[:-1] * table[1:]).sum(dim=1)
        torch.testing.assert_close(products, products[:1].expand(63))
        first, last = table[:, :2] / (0.04 * scale), table[:, -2:] / (0.04 * scale)   # the shortest and the longest wavelength
        torch.testing.assert_close(first[:4], torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]]), atol=1e-5, rtol=0)
        assert 0.97 < math.atan2(*last[63].tolist()) / (2 * math.pi * 63 / (4 * 64)) < 1.2


def test_mamba_is_mamba():
    """Names and shapes as in state-spaces/mamba; the numbers, against the paper's equations on the raw weights."""
    model = small("mamba").double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)
    w, idx = model.state_dict(), tokens(1, 10)[0]
    mixer = {"in_proj.weight": (64, 16), "conv1d.weight": (32, 1, 4), "conv1d.bias": (32,), "x_proj.weight": (9, 32),
             "dt_proj.weight": (32, 1), "dt_proj.bias": (32,), "A_log": (32, 4), "D": (32,), "out_proj.weight": (16, 32)}
    shapes = {f"backbone.layers.{i}.mixer.{name}": shape for i in (0, 1) for name, shape in mixer.items()}
    shapes |= {f"backbone.layers.{i}.norm.weight": (16,) for i in (0, 1)}
    shapes |= {"backbone.embedding.weight": (14, 16), "backbone.norm_f.weight": (16,), "lm_head.weight": (14, 16)}
    assert {name: tuple(x.shape) for name, x in w.items()} == shapes

    def norm(x, name):
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]

    x = w["backbone.embedding.weight"][idx]
    for i in range(2):
        p = {name: w[f"backbone.layers.{i}.mixer.{name}"] for name in mixer}
        u, z = (norm(x, f"backbone.layers.{i}.norm") @ p["in_proj.weight"].T).split(32, dim=1)
        padded = torch.cat([torch.zeros(3, 32), u])
        u = F.silu(sum(padded[k:k + 10] * p["conv1d.weight"][:, 0, k] for k in range(4)) + p["conv1d.bias"])
        dt, B, C = (u @ p["x_proj.weight"].T).split([1, 4, 4], dim=1)
        y, _ = loop(*(y.T[None] for y in (u, dt @ p["dt_proj.weight"].T)), -torch.exp(p["A_log"]),
                    *(y.T[None] for y in (B, C)), p["D"], z.T[None], p["dt_proj.bias"])
        x = x + y[0].T @ p["out_proj.weight"].T
    expected = norm(x, "backbone.norm_f") @ w["lm_head.weight"].T
    torch.testing.assert_close(model(idx[None], all_logits=True)[0][0], expected)


def test_mamba_starts_as_the_original():
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=14, n_layer=4, d_model=512))
    mixer = model.backbone.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).repeat(1024, 1))
    log_dt = F.softplus(mixer.dt_proj.bias).log()                    # log-uniform: mean and variance of a uniform one
    low, high = math.log(0.001), math.log(0.1)
    assert low - 1e-3 <= log_dt.min() and log_dt.max() <= high + 1e-3
    assert abs(log_dt.mean() - (low + high) / 2) < 0.15 and abs(log_dt.var() / ((high - low) ** 2 / 12) - 1) < 0.15
    assert mixer.dt_proj.weight.abs().max() <= 32 ** -0.5 and mixer.D.eq(1).all()
    bound = 1 / math.sqrt(1024) / math.sqrt(4)                       # of a linear layer's uniform weights, over sqrt(n_layer)
    assert 0.99 * bound < mixer.out_proj.weight.abs().max() <= bound
    embedding = model.backbone.embedding.weight                      # this alone begins otherwise: larger
    assert embedding is model.lm_head.weight and embedding.std().item() == pytest.approx(512 ** -0.5, rel=0.05)
    groups = train.make_optimizer(model, {"lr": 1e-3, "weight_decay": 0.1}, torch.device("cpu")).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.dim() > 1 and "A_log" not in name), name


# train.py: objectives and evaluation

def objective(star=PathStar(2, 5, 10), n=50, **flags):
    config = {"teacherless": False, "reverse": False, "only_first_hop": False} | flags
    prefixes, paths = data.draw(star, n, rng())
    prompts, targets = train.prompts_and_targets(config, prefixes, paths)
    dollar = star.dollar if config["teacherless"] else None
    return prefixes, paths, prompts, targets, train.model_input(prompts, targets, dollar), train.loss_targets(prompts, targets)


@pytest.mark.parametrize("flags", [{}, {"teacherless": True}, {"reverse": True}, {"teacherless": True, "reverse": True},
                                   {"only_first_hop": True}])
def test_what_is_fed_in_and_what_is_asked_for(flags):
    prefixes, paths, prompts, targets, inputs, wanted = objective(**flags)
    written = paths[:, ::-1] if "reverse" in flags else paths
    fed = np.full_like(written, 13) if "teacherless" in flags else written
    length, asked = inputs.shape[1], wanted.numpy().copy()
    if "only_first_hop" in flags:
        assert (inputs.numpy() == np.concatenate([prefixes, paths[:, :1]], axis=1)).all()
        assert (asked[:, -1] == paths[:, 1]).all() and (asked[:, :-1] == -1).all()
    else:
        assert (inputs.numpy() == np.concatenate([prefixes, fed[:, :-1]], axis=1)).all()
        assert (asked[:, -5:] == written).all() and (asked[:, :-5] == -1).all()
    assert asked.shape[1] == length and (inputs[:, :prompts.shape[1]] == prompts).all()


@every_model
def test_teacherless_leaks_no_target(name):
    """Change any target token: what the model reads, and so its logits, must not move. Teacher forced, they do."""
    model, star = small(name), PathStar(2, 5, 10)
    _, _, prompts, targets, _, _ = objective(star, 4)
    for dollar in (star.dollar, None):
        before, _ = model(train.model_input(prompts, targets, dollar), all_logits=True)
        for i in range(4):
            other = targets.clone()
            other[:, i] = (other[:, i] + 1) % 10
            after, _ = model(train.model_input(prompts, other, dollar), all_logits=True)
            assert torch.equal(before, after) == (dollar is not None)


class Cheat:
    """Plays the Clever Hans cheat: takes the edge that leaves the last token; at the start, the first such in the list."""

    def __init__(self, star):
        self.star = star

    def new_cache(self):
        return [{}]

    def __call__(self, idx, cache, all_logits=False):
        seen = cache[0]["seen"] = torch.cat([cache[0]["seen"], idx], dim=1) if cache[0] else idx
        best = torch.zeros_like(seen)
        P = self.star.prefix_len
        for row, out in zip(seen.tolist(), best):
            edges = list(zip(row[0:P - 3:3], row[1:P - 3:3]))
            out[P - 1] = row[P - 3]
            for t in range(P, len(row)):
                out[t] = next((b for a, b in edges if a == row[t]), 0)
        return F.one_hot(best[:, -idx.size(1) if all_logits else -1:], self.star.vocab_size).float(), None

    def generate(self, idx, n, cache):
        tokens = [idx]
        for _ in range(n):
            tokens.append(self(tokens[-1], cache)[0].argmax(dim=2))
        return torch.cat(tokens, dim=1)


@every_model
def test_predict_is_the_plain_passes(name):
    model, (_, _, prompts, targets, _, _) = small(name), objective(PathStar(2, 3, 10), 30)
    own, forced = train.predict(model, prompts, targets, None, at_once=20)
    assert torch.equal(own, model.generate(prompts, 3)[:, prompts.size(1):])
    logits = model(train.model_input(prompts, targets), all_logits=True)[0]
    assert torch.equal(forced, logits[:, prompts.size(1) - 1:].argmax(dim=2)) and not torch.equal(own, forced)


def test_phases_are_told_apart():
    """On the cheat: forced, every node but the first hop is right; by its own inference it walks a real arm, at random."""
    star = PathStar(2, 5, 10)
    _, paths, prompts, targets, _, _ = objective(star, 400)
    own, forced = train.predict(Cheat(star), prompts, targets, None, at_once=150)
    result = train.summary(own, forced, targets)
    hop = result["forced_node_accuracy"][1]
    assert 0.4 < hop < 0.6 and result["forced_node_accuracy"] == [1, hop, 1, 1, 1] and result["forced_accuracy"] == hop
    assert result["node_accuracy"] == [1, hop, hop, hop, hop] and result["accuracy"] == hop and result["cheat_accuracy"] == 1
    some = targets.clone()
    some[:100, 2] = some[50:150, 4] = some[:, 1] = -1                # 150 graphs with a later node wrong, the hop never right
    assert train.summary(own, some, targets)["cheat_accuracy"] == 250 / 400
    config = {"deg": 2, "n_test": 400, "only_first_hop": False, "reverse": False}
    assert "Clever Hans" in train.verdict(result, config)
    solved = train.summary(targets, targets, targets)
    assert solved["accuracy"] == 1 and "solved" in train.verdict(solved, config)
    nothing = train.summary(torch.zeros_like(targets) - 1, targets, targets)
    assert nothing["accuracy"] == 0 and nothing["forced_accuracy"] == 1
    assert "neither solved nor the cheat" in train.verdict(nothing, config)
    assert train.summary(own, None, targets)["forced_node_accuracy"] is None


def test_every_epoch_sees_every_graph_once():
    seen = np.concatenate([data.batch_indices(20, 8, 0, it) for it in range(5)])
    assert Counter(seen[:20].tolist()) == Counter(seen[20:].tolist()) == Counter(range(20))
    assert seen[:20].tolist() != seen[20:].tolist()


# train.py and sample.py, end to end

TINY = ("--n_layer", 1, "--n_embd", 16, "--n_train", 200, "--n_test", 20, "--batch_size", 8, "--max_iters", 6,
        "--eval_interval", 3, "--device", "cpu")
KEYS = ["iter", "examples", "elapsed_s", "train_loss", "lr", "cheat_accuracy", "accuracy", "node_accuracy", "forced_accuracy",
        "forced_node_accuracy"]


def call(monkeypatch, module, *flags):
    """Runs a script in this process -> its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [
    (), ("--model", "mamba"), ("--teacherless",), ("--model", "mamba", "--teacherless", "--d_state", 4), ("--reverse",),
    ("--model", "mamba", "--reverse", "--teacherless"), ("--only_first_hop",), ("--n_train", 0, "--n_head", 2),
    ("--deg", 3, "--path_len", 3, "--num_nodes", 12, "--lr", 0.01, "--weight_decay", 0, "--warmup_iters", 0, "--seed", 3),
    ("--dtype", "bfloat16"), ("--model", "mamba", "--dtype", "bfloat16")])
def test_tiny_runs(flags, monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(monkeypatch, train, *TINY, *flags, "--out_dir", out) == 0
    header, *lines = read_log(out)
    assert header.keys() == {"config", "versions", "machine"}
    assert header["config"].keys() >= {flag[2:] for flag in (*TINY, *flags) if str(flag).startswith("--")}
    assert [line["iter"] for line in lines] == [0, 3, 6] and [line["examples"] for line in lines] == [0, 24, 48]
    for line in lines:
        assert list(line) == KEYS
        assert (line["forced_accuracy"] is None) == ("--teacherless" in flags)
        targets = 1 if "--only_first_hop" in flags else header["config"]["path_len"]
        assert len(line["node_accuracy"]) == targets
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl"]
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    assert ckpt["config"] == header["config"] and ckpt["iter"] == 6
    printed = capsys.readouterr().out
    assert "where guessing an arm gives" in printed.splitlines()[-1]

    assert call(monkeypatch, sample, "--out_dir", out, "--num_graphs", 30) == 0
    printed = capsys.readouterr().out
    assert printed.count("  answer") == 3 and "a real arm" in printed and "path accuracy" in printed


def test_flags_of_the_loop_do_what_they_say(monkeypatch, tmp_path):
    """The learning rate rises and falls, steps depend on it and on weight decay, and the seed changes everything."""
    def weights(name, *flags):
        assert call(monkeypatch, train, *TINY, *flags, "--out_dir", tmp_path / name) == 0
        return torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"]["lm_head.weight"]

    base = weights("base", "--warmup_iters", 5)
    assert torch.equal(base, weights("same", "--warmup_iters", 5))
    for i, flags in enumerate((("--lr", 0.1), ("--weight_decay", 0.9), ("--seed", 1), ("--n_train", 0), ("--warmup_iters", 0),
                               ("--dtype", "bfloat16"))):
        assert not torch.equal(base, weights(f"other{i}", "--warmup_iters", 5, *flags)), flags
    weights("schedule", "--warmup_iters", 3, "--max_iters", 12, "--eval_interval", 1)
    lr = [line["lr"] / 1e-3 for line in read_log(tmp_path / "schedule")[1:]]
    assert lr == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0])


def test_stops_when_solved(monkeypatch, tmp_path, capsys):
    """With one arm of one edge there is nothing to plan."""
    out = tmp_path / "run"
    assert call(monkeypatch, train, "--model", "mamba", "--deg", 1, "--path_len", 2, "--num_nodes", 20, "--n_train", 0,
                "--n_test", 50, "--n_layer", 1, "--n_embd", 32, "--batch_size", 64, "--lr", 0.01,
                "--eval_interval", 25, "--out_dir", out) == 0
    last = read_log(out)[-1]
    assert last["accuracy"] >= 0.995 and last["iter"] < 2200 and "solved" in capsys.readouterr().out


def same_run(one, two):
    """The same weights, optimizer state and log, but for the time that it took."""
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (one, two))
    leaves = [torch.utils._pytree.tree_leaves((ckpt["model"], ckpt["optimizer"]["state"])) for ckpt in (a, b)]
    for x, y in zip(*leaves, strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))
    assert a["iter"] == b["iter"] and a["result"] == b["result"]
    logs = [[line | {"elapsed_s": 0} for line in read_log(folder)[1:]] for folder in (one, two)]
    assert logs[0] == logs[1] and [line["iter"] for line in logs[0]] == sorted({line["iter"] for line in logs[0]})


@pytest.mark.parametrize("model", ["gpt", "mamba"])
@pytest.mark.parametrize("flags", [(), ("--teacherless",), ("--reverse",), ("--only_first_hop",), ("--n_train", 0)])
def test_resume_is_exact(model, flags, monkeypatch, tmp_path, capsys):
    """Interrupted after step 4 by a signal, killed while it saves at step 6, and then finished."""
    flags, whole, parts = ("--model", model, *flags, "--max_iters", 9), tmp_path / "whole", tmp_path / "parts"
    assert call(monkeypatch, train, *TINY, *flags, "--out_dir", whole) == 0
    real, steps = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 4:
            train.SIGNALS.append(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        patch.setattr(train, "SIGNALS", [])
        assert call(patch, train, *TINY, *flags, "--out_dir", parts) == 143
    assert "interrupted after step 4: python train.py --resume" in capsys.readouterr().out
    assert torch.load(parts / "ckpt.pt", weights_only=True)["iter"] == 4
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new:
                      (_ for _ in ()).throw(KeyboardInterrupt) if "ckpt" in new else os.rename(old, new))
        with pytest.raises(KeyboardInterrupt):
            call(patch, train, "--resume", "--out_dir", parts)
    with open(parts / "log.jsonl", "a") as f:                        # lines that the checkpoint knows nothing of
        f.write(json.dumps(read_log(parts)[-1] | {"iter": 9}) + '\n{"iter": 12, "exam')
    assert call(monkeypatch, train, "--resume", "--out_dir", parts) == 0
    same_run(whole, parts)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts.iterdir() if path.suffix != ".tmp"}
    capsys.readouterr()
    assert call(monkeypatch, train, "--resume", "--out_dir", parts) == 0 and "finished at step 9" in capsys.readouterr().err
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert call(monkeypatch, train, "--resume", "--out_dir", parts, "--lr", 0.5) == 2
    assert call(monkeypatch, train, "--resume", "--out_dir", parts, "--max_iters", 12) == 0
    header, *lines = read_log(parts)
    assert [line["iter"] for line in lines] == [0, 3, 6, 9, 12] and header["config"]["max_iters"] == 12


def test_resume_before_the_first_checkpoint(monkeypatch, tmp_path):
    assert call(monkeypatch, train, *TINY, "--reverse", "--out_dir", tmp_path / "whole") == 0
    assert call(monkeypatch, train, *TINY, "--reverse", "--out_dir", tmp_path / "parts") == 0
    (tmp_path / "parts" / "ckpt.pt").unlink()
    assert call(monkeypatch, train, "--resume", "--out_dir", tmp_path / "parts") == 0
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_is_not_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = set()
    for flags in ((), ("--reverse",), ("--model", "mamba"), ("--seed", 1), ("--num_nodes", 11), ("--teacherless",),
                  ("--n_train", 0), ("--lr", 0.5)):
        assert call(monkeypatch, train, *TINY, *flags, "--max_iters", 1) == 0
        names = {p.name for p in (tmp_path / "out").iterdir()}
    assert len(names) == 8
    assert call(monkeypatch, train, *TINY, "--lr", 0.5, "--max_iters", 1, "--resume") == 0
    capsys.readouterr()
    assert call(monkeypatch, train, *TINY) == 2
    assert "holds a run already: --resume" in capsys.readouterr().err
    (tmp_path / "out").rename(tmp_path / "moved")
    assert call(monkeypatch, train, *TINY, "--max_iters", 6) == 0
    assert call(monkeypatch, train, *TINY, "--max_iters", 3, "--overwrite") == 0
    [out] = (tmp_path / "out").iterdir()
    assert [line["iter"] for line in read_log(out)[1:]] == [0, 3]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@every_model
def test_compiled_run_equals_eager(name, monkeypatch, tmp_path):
    for flag in ((), ("--compile",)):
        assert call(monkeypatch, train, *TINY, "--model", name, "--out_dir", tmp_path / str(len(flag)), *flag) == 0
    for a, b in zip(read_log(tmp_path / "0")[2:], read_log(tmp_path / "1")[2:]):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


RECORDER = """
import json, os, sys
sys.path.insert(0, HERE)
import train
build_model = train.build_model

def recorded(*args):
    model = build_model(*args)
    forward = model.forward

    def seen(idx, targets=None, **options):
        if targets is not None:
            print(json.dumps(idx.tolist()), file=open(FOLDER + "/rank" + os.environ.get("RANK", ""), "a"))
        return forward(idx, targets, **options)
    model.forward = seen
    return model

train.build_model = recorded
train.main()
"""


@every_model
def test_two_processes_follow_one(name, tmp_path):
    """The same loss, from disjoint halves of the same batches."""
    script, torchrun = tmp_path / "recorder.py", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    script.write_text(f"HERE, FOLDER = {str(HERE)!r}, {str(tmp_path)!r}\n{RECORDER}")
    for folder, options in (("one", ()), ("two", torchrun)):
        command = (sys.executable, *options, script, *TINY, "--model", name, "--n_train", 200 if name == "gpt" else 0,
                   "--batch_size", 16, "--out_dir", tmp_path / folder)
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    for a, b in zip(read_log(tmp_path / "one")[2:], read_log(tmp_path / "two")[2:], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    whole, *parts = ([json.loads(line) for line in (tmp_path / f"rank{rank}").read_text().splitlines()] for rank in ("", 0, 1))
    assert len(whole) == 6 and all(sorted(a) == sorted(b + c) for a, b, c in zip(whole, *parts, strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, train, *TINY, "--out_dir", out) == 0
    return out


def test_sample_on_files_and_prompts(finished, monkeypatch, tmp_path, capsys):
    star = PathStar(2, 5, 10)
    lines = list(data.text(star, *data.draw(star, 4, rng())))
    (tmp_path / "graphs.txt").write_text("\n".join(lines))
    assert call(monkeypatch, sample, "--out_dir", finished, "--file", tmp_path / "graphs.txt") == 0
    printed = capsys.readouterr().out
    assert "on 4 graphs" in printed
    for line in lines[:3]:
        assert "%" + " ->".join(f"{node:>5}" for node in line.split("=")[1].split(",")) + "\n" in printed
    assert call(monkeypatch, sample, "--out_dir", finished, "--prompt", lines[0].split("=")[0] + "=") == 0
    assert "on 1 graphs" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--reverse",), ("--only_first_hop",)])
def test_sample_knows_a_right_answer(flags, monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, train, *TINY, *flags, "--out_dir", tmp_path / "run") == 0
    capsys.readouterr()
    monkeypatch.setattr(sample, "predict", lambda model, prompts, targets, dollar: (targets, targets))
    assert call(monkeypatch, sample, "--out_dir", tmp_path / "run", "--num_graphs", 100) == 0
    printed = capsys.readouterr().out
    assert printed.count("        right\n") == 3 and "a real arm         100.0%" in printed and "solved" in printed


def test_sample_marks_where_the_answer_leaves_the_path(capsys):
    arms = [[1, 2, 3], [1, 4, 5]]
    wrong = sample.explain(arms, [1, 4, 5], [1, 2, 3], [0.99, 0.5, 1], [1, 2, 5], {2: 0.5, 4: 0.25})
    assert wrong["leaves_at"] == 1 and wrong["real_arm"] and wrong["arms"] == arms[::-1] and wrong["first_hop"] == [0.25, 0.5]
    sample.show(wrong, columns=40)
    assert capsys.readouterr().out.splitlines() == [
        "P(hop 1)    from 1 to 5",
        "   25.0%    1 ->    4 ->    5",
        "   50.0%    1 ->    2 ->    3",
        "  answer    1 ->  [2] ->  [3]",
        "    sure  99%     50%    100%",
        "  forced    1 ->  [2] ->    5",
        "        wrong: leaves the path at node",
        "        2, where 4 is right, and walks",
        "        another arm"]
    sample.show(wrong, columns=20, color=True)                       # one node fits; right ones are green, wrong ones red
    assert capsys.readouterr().out.splitlines()[7:10] == [
        "  answer\033[32m    1\033[0m", "        \033[31m  [2]\033[0m", "        \033[31m  [3]\033[0m"]
    right = sample.explain(arms, [1, 4, 5], [1, 4, 5], [1, 1, 1], None, {2: 0, 4: 1})
    assert right["leaves_at"] is None and right["real_arm"]
    assert not sample.explain(arms, [1, 4, 5], [1, 2, 5], [1, 1, 1], None, {2: 0, 4: 1})["real_arm"]
    sample.show(right)
    assert capsys.readouterr().out.splitlines()[3:] == ["  answer    1 ->    4 ->    5", "    sure 100%    100%    100%",
                                                        "        right"]


@pytest.mark.parametrize("flags", [(), ("--teacherless",), ("--reverse",), ("--only_first_hop",), ("--model", "mamba")])
def test_the_probabilities_of_a_sample(flags, monkeypatch, tmp_path, capsys):
    """What `sample.py --json` says the model gave each node, against one pass for each token."""
    assert call(monkeypatch, train, *TINY, *flags, "--out_dir", tmp_path / "run") == 0
    capsys.readouterr()
    assert call(monkeypatch, sample, "--out_dir", tmp_path / "run", "--num_graphs", 5, "--show", 2, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_graphs"] == 5 and printed["verdict"] is None and len(printed["graphs"]) == 2
    _, star, model = train.load_run(tmp_path / "run")
    for graph, prefix in zip(printed["graphs"], data.draw(star, 5, rng([0, 4]))[0].tolist()):
        assert graph["path"] in graph["arms"] and all([prefix[-3], arm[1]] in [prefix[i:i + 2] for i in range(0, 24, 3)]
                                                      for arm in graph["arms"])
        written, hop = graph["answer"], 1
        if "--reverse" in flags:
            written, hop = written[::-1], 3
        rows = []
        for i in range(len(written)):
            before = [star.dollar] * i if "--teacherless" in flags else written[:i]
            rows.append(model(torch.tensor([prefix + before]))[0][0, -1].softmax(0))
        sure = [row[node].item() for row, node in zip(rows, written)]
        if "--only_first_hop" in flags:
            sure[0] = 1                                              # the start is given
        assert graph["sure"] == pytest.approx(sure[::-1] if "--reverse" in flags else sure, abs=1e-5)
        assert graph["first_hop"] == pytest.approx([rows[hop][arm[1]].item() for arm in graph["arms"]], abs=1e-5)
        assert (graph["forced"] is None) == (flags in (("--teacherless",), ("--only_first_hop",)))


@pytest.mark.parametrize("flags, says", [
    (("--model", "rnn"), "invalid choice"), (("--n_embed", 3), "unrecognized arguments"), (("--lr", "x"), "invalid float"),
    (("--d_state", 4), "--d_state is not a setting of --model gpt"), (("--model", "mamba", "--n_head", 2), "--n_head is not"),
    (("--n_embd", 30), "multiple of n_head"), (("--num_nodes", 8), "num_nodes must be at least 9"),
    (("--deg", 0), "--deg must be positive"), (("--batch_size", 0), "--batch_size must be positive"),
    (("--seed", -1), "--seed must not be negative"), (("--lr", "nan"), "--lr must be positive"),
    (("--lr", "inf"), "--lr must be positive"),
    (("--train_file", ""), "No such file"), (("--device", "meta"), "--device meta"), (("--n_test", 10 ** 12), "only"),
    (("--only_first_hop", "--teacherless"), "--only_first_hop"), (("--only_first_hop", "--reverse"), "--only_first_hop"),
    (("--deg", 1, "--path_len", 2, "--num_nodes", 3), "only 6 different graphs"), (("--train_file", "missing"), "No such file"),
    (("--device", "cuda:99"), "--device cuda:99"), (("--device", "abacus"), "--device abacus"),
    (("--dtype", "float16"), "invalid choice"), (("--resume",), "No such file")])
def test_bad_flags(flags, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, train, *flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and says in printed.err, printed.err
    assert not list(tmp_path.iterdir())


def test_bad_files_prompts_and_checkpoints(finished, monkeypatch, tmp_path, capsys):
    (tmp_path / "graphs.txt").write_text(LINE)
    for name in ("truncated", "other", "renamed", "empty", "strange"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty" / "ckpt.pt").write_bytes(b"")
    whole = (finished / "ckpt.pt").read_bytes()
    (tmp_path / "truncated" / "ckpt.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other" / "ckpt.pt")
    ckpt = torch.load(finished / "ckpt.pt", weights_only=True)
    torch.save(ckpt | {"model": {}}, tmp_path / "renamed" / "ckpt.pt")
    torch.save(ckpt | {"config": ckpt["config"] | {"model": "rnn"}}, tmp_path / "strange" / "ckpt.pt")
    for name in ("truncated", "other", "renamed", "empty", "strange", "none"):
        for module, flags in ((sample, ()), (train, ("--resume",))):
            assert call(monkeypatch, module, *flags, "--out_dir", tmp_path / name) == 2
            printed = capsys.readouterr()
            assert printed.out == "" and printed.err.count("\n") == 1, printed.err
            assert ("No such file" if name == "none" else "does not hold a run of train.py") in printed.err
    for flags, says in (
            (("--out_dir", finished, "--file", "x", "--prompt", LINE), "not allowed with"),
            (("--out_dir", finished, "--file", tmp_path / "graphs.txt"), "line 1: node"),
            (("--out_dir", finished, "--prompt", "hello"), "'hello' is not of the form"),
            (("--out_dir", finished, "--prompt", LINE), "out of range"),
            (("--out_dir", finished, "--prompt", "0,1|0,2/0,1="), "deg 2 and path_len 2, where deg 2 and path_len 5"),
            (("--out_dir", finished, "--num_graphs", 0), "--num_graphs")):
        assert call(monkeypatch, sample, *flags) == 2, flags
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and says in printed.err, printed.err


def start(*flags, processes=1, **options):
    """A training run in the background, in a session of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, str(HERE / "train.py"), *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True, **options)


def wait_for(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_signals(number, processes, tmp_path):
    process = start(*TINY, "--max_iters", 100000, "--eval_interval", 20, "--out_dir", tmp_path / "run", processes=processes)
    wait_for(lambda: (tmp_path / "run" / "ckpt.pt").exists(), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number if processes == 1 else process.returncode, (out, err)
    assert "goes on" in out.splitlines()[-1] and (processes > 1 or err == ""), (out, err)
    done = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["iter"]
    result = run("train.py", "--resume", "--max_iters", done + 3, "--out_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, tmp_path, capsys):
    real, steps = F.cross_entropy, []

    def explodes(*args, **kwargs):
        steps.append(1)
        return real(*args, **kwargs) * (float("nan") if len(steps) == 5 else 1)

    monkeypatch.setattr(F, "cross_entropy", explodes)
    assert call(monkeypatch, train, *TINY, "--out_dir", tmp_path) == 1
    assert "step 5 made the loss infinite or NaN" in capsys.readouterr().err
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter"] == 3 and read_log(tmp_path)[-1]["iter"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
def test_full_disk(monkeypatch, tmp_path):
    """A file may grow to 20 KB only: the log fits, a checkpoint does not."""
    import resource
    assert call(monkeypatch, train, *TINY, "--max_iters", 3, "--out_dir", tmp_path) == 0
    process = start("--resume", "--max_iters", 6, "--out_dir", tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    out, err = process.communicate()
    assert process.returncode == 1 and err.count("\n") == 1 and "cannot write to" in err, err
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter"] == 3
    assert call(monkeypatch, train, "--resume", "--max_iters", 6, "--out_dir", tmp_path) == 0
    assert [line["iter"] for line in read_log(tmp_path)[1:]] == [0, 3, 6]


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["PATHSTAR_EVIL"],)


def test_a_checkpoint_runs_no_code(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATHSTAR_EVIL", str(tmp_path / "evil"))
    ckpt = torch.load(finished / "ckpt.pt", weights_only=True)
    torch.save(ckpt | {"result": Malicious()}, tmp_path / "ckpt.pt")
    for module, flags in ((sample, ()), (train, ("--resume",))):
        assert call(monkeypatch, module, *flags, "--out_dir", tmp_path) == 2
        assert "does not hold a run of train.py" in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)             # it would have
    assert (tmp_path / "evil").exists()


def is_path_star(line):
    """The judge of the fuzzer: another way to decide what `parse_line` decides."""
    body, path = line.split("=")
    edges, question = body.split("/")
    edges, (start, goal) = [tuple(map(int, edge.split(","))) for edge in edges.split("|")], map(int, question.split(","))
    parent = {b: a for a, b in edges}
    children = Counter(a for a, _ in edges)
    if len(parent) < len(edges) or start in parent or max((n for a, n in children.items() if a != start), default=1) > 1:
        return False
    def to_start(node):
        way = [node]
        while way[-1] in parent and len(way) <= len(edges):
            way.append(parent[way[-1]])
        return way
    ends = [to_start(b) for b in parent if b not in children]
    if ({way[-1] for way in ends} != {start} or len({len(way) for way in ends}) != 1
            or sum(len(way) - 1 for way in ends) < len(edges)):
        return False
    answer = [way[::-1] for way in ends if way[0] == goal]
    return bool(answer) and (path == "" or [int(x) for x in path.split(",")] == answer[0])


def fuzz(n):
    random = np.random.default_rng(0)
    stars = PathStar(2, 4, 12), PathStar(3, 3, 12)
    lines = [line for star in stars for line in data.text(star, *data.draw(star, 200, random))]
    accepted = 0
    for _ in range(n):
        line = lines[random.integers(len(lines))]
        for _ in range(random.integers(1, 4)):
            k, j = sorted(random.integers(len(line), size=2))
            character = "0123456789,|/= x-"[random.integers(17)]
            line = [line[:k] + character + line[k + 1:], line[:k] + line[k + 1:], line[:k] + character + line[k:],
                    line[:k] + line[j:j + 3] + line[k:]][random.integers(4)] or "0"
        try:
            right = bool(data.LINE.fullmatch(line)) and is_path_star(line)
        except ValueError:
            right = False
        try:
            data.parse_line(line)
            accepted += 1
            assert right, line
        except ValueError:
            assert not right, line
    return accepted


def test_fuzzed_lines():
    assert 50 < fuzz(5000) < 2500


def some_flags(random):
    """Flags at random, a few of them wrong."""
    values = {"--deg": (2, 3, 0, -1), "--path_len": (3, 5, 1), "--num_nodes": (15, 12, 4), "--n_train": (50, 0, -3),
              "--n_test": (10, 0),
              "--model": ("gpt", "mamba", "rnn"), "--n_layer": (1, 0), "--n_embd": (16, 12, 15), "--n_head": (2, 4, 0),
              "--d_state": (2, 0),
              "--batch_size": (4, 0), "--lr": (1e-3, 0, "nan", "x"), "--weight_decay": (0, -1), "--warmup_iters": (0, 5, -1),
              "--eval_interval": (1, 2, 0), "--seed": (1, -1), "--dtype": ("float32", "bfloat16", "float16", "int8"),
              "--teacherless": None, "--reverse": None, "--only_first_hop": None, "--device": ("cpu", "cuda:7"),
              "--frobnicate": (1,)}
    flags = ["--max_iters", 2]
    for name in random.permutation(list(values))[:random.integers(1, 9)]:
        choices = values[name]
        flags += [name] if choices is None else [name, choices[0 if random.random() < 0.7 else random.integers(len(choices))]]
    return flags


def try_flags(n, monkeypatch, tmp_path, capsys):
    """Every combination of flags runs to its end, or is refused in one line with nothing written -> how many ran"""
    random, ran = np.random.default_rng(0), 0
    for i in range(n):
        flags, out = some_flags(random), tmp_path / str(i)
        sizes = [] if "--n_train" in flags else ["--n_train", 50], [] if "--n_test" in flags else ["--n_test", 10]
        code = call(monkeypatch, train, *flags, *sizes[0], *sizes[1], "--out_dir", out)
        printed = capsys.readouterr()
        refused = code == 2 and printed.err.count("\n") == 1 and not printed.out and not out.exists()
        assert refused or code == 0 and out.exists(), flags
        ran += code == 0
    return ran


def test_combinations_of_flags(monkeypatch, tmp_path, capsys):
    assert 5 < try_flags(40, monkeypatch, tmp_path, capsys) < 35


DRAW = "from data import *; print(draw(PathStar(2, 3, 9), 4, np.random.default_rng())[0].shape)"
SCAN = ("import torch, scan_kernel; x = torch.ones(1, 2, 3); "
        "print(scan_kernel.selective_scan(x, x, -torch.ones(2, 2), x, x).shape)")
LEARN = """import torch, model_{0}
model = model_{0}.{1}
idx = torch.randint(9, (2, 8))
model(idx, idx)[1].backward()
print(model.generate(idx[:, :3], 2).shape)"""


@pytest.mark.parametrize("files, command, says", [
    ("data.py", ("data.py",), "="), ("data.py", ("-c", DRAW), "(4, 15)"),
    ("scan_kernel.py", ("-c", SCAN), "[1, 2, 3]"),
    ("model_gpt.py", ("-c", LEARN.format("gpt", "GPT(model_gpt.GPTConfig(8, 9, 1, 2, 4))")), "[2, 5]"),
    ("model_mamba.py scan_kernel.py", ("-c", LEARN.format("mamba", "Mamba(model_mamba.MambaConfig(9, 1, 4))")), "[2, 5]"),
    ("train.py data.py model_gpt.py", ("train.py", *TINY), "accuracy"),
    ("train.py data.py model_gpt.py", ("train.py", *TINY, "--model", "mamba"), "train.py: No module named 'model_mamba'\n"),
    ("train.py data.py model_mamba.py scan_kernel.py", ("train.py", *TINY, "--model", "mamba"), "accuracy"),
    ("sample.py train.py data.py model_gpt.py", ("sample.py", "--out_dir", "run"), "path accuracy"),
])
def test_files_work_where_they_are_copied_to(files, command, says, finished, tmp_path):
    """Each file with those that it imports, and nothing else."""
    for name in files.split():
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    ran = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert says in ran.stdout if ran.returncode == 0 else (ran.returncode, ran.stderr) == (2, says)


def test_a_script_refuses_in_one_line():
    """As a user sees it, in a process of its own."""
    fails("train.py", "--num_nodes", 3, says="train.py: num_nodes must be at least 9")
    fails("data.py", "--deg", -1, says="data.py: deg must be at least 1")
    fails("sample.py", says="--out_dir")


def test_tables_say_what_the_logs_say():
    """results/README.md is the table of the logs; README.md shows its lines on the default graph, and figures of the grid."""
    table = run("results/table.py")
    assert table.returncode == 0 and table.stdout == (HERE / "results" / "README.md").read_text()
    lines = [line for line in table.stdout.splitlines()
             if line.startswith("| `python") and "--deg" not in line and "--path_len" not in line]
    readme = (HERE / "README.md").read_text()
    assert len(lines) >= 8
    for line in lines:
        assert line in readme, line
    text = " ".join(readme.split())                                  # the hops but the goal, or the three that are guessed
    for name in ("mamba-teacherless-deg2-len6", "mamba-teacherless-deg5-len5", "gpt-teacherless-deg2-len6"):
        end = json.loads((HERE / "results" / f"{name}-seed0.jsonl").read_text().splitlines()[-1])
        *hops, last = (f"{100 * share:.0f}" for share in end["node_accuracy"][1:4 if name[0] == "g" else -1])
        assert f"{', '.join(hops)} and {last} %" in text, name


def test_the_table_counts_from_the_logs(tmp_path):
    """Means, ranges, the count solved and the steps of the cascade, for two small logs with known numbers."""
    (tmp_path / "results").mkdir()
    for file in (*HERE.glob("*.py"), HERE / "results" / "table.py"):
        shutil.copy(file, tmp_path / file.relative_to(HERE))
    config = train.resolve({"teacherless": True, "path_len": 4}, train.make_flags()[1])
    nodes = ((0, 0), (100, 1), (200, 0), (300, 1))                   # (step, accuracy of the third node)
    for seed, accuracy in ((0, 0.5), (1, 1.0)):
        end = {"accuracy": accuracy, "forced_node_accuracy": None, "cheat_accuracy": None, "elapsed_s": 60}
        lines = [{"config": config | {"seed": seed}, "versions": {"python": "3", "torch": "2"}, "machine": "m"},
                 *({"iter": it, "node_accuracy": [1, accuracy, third, 1], **end} for it, third in nodes)]
        (tmp_path / "results" / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = subprocess.run([sys.executable, tmp_path / "results" / "table.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    line = "`python train.py --teacherless --path_len 4` | 2 | 1 | 75.0% (50.0% - 100.0%) | - | - | 0, 1 never; 300 | 300 | 1.0"
    assert f"| {line} |" in result.stdout.splitlines(), result.stdout


def test_the_experiments_are_what_was_recorded():
    """`results/reproduce.py` runs, under the name of each record, the command that made it."""
    listed = run("results/reproduce.py", "--list").stdout.splitlines()
    flags, defaults = train.make_flags()
    assert len(listed) >= 24
    for line in listed:
        name, command = line.split(" ", 1)
        given = vars(flags.parse_args(command.split("train.py")[1].split("   ")[0].split()))
        recorded = json.loads((HERE / "results" / f"{name}.jsonl").read_text().splitlines()[0])["config"]
        assert train.resolve(given, defaults) | {"out_dir": None} == recorded | {"out_dir": None}, name


SOLUTIONS = sorted((HERE / "results" / "exercises").glob("*.patch"), key=lambda patch: patch.stem)
CHECKS = {"4": "attention or gpt_is or cache_equals", "5": "cpu_scan", "6": "gru"}   # what the README tells to check them by


def git(*args):
    return subprocess.run(["git", *map(str, args)], cwd=HERE, capture_output=True).returncode


@pytest.mark.skipif(shutil.which("git") is None or git("diff", "--quiet", "HEAD", "--", "*.py", ":!test_all.py"),
                    reason="files were changed")
def test_solutions_of_the_exercises_fit():
    """Each applies to the files as they are; the figures that README quotes are those of their logs."""
    exercises = (HERE / "README.md").read_text().split("## 8. Exercises")[1]
    assert [patch.stem[0] for patch in SOLUTIONS] == list("456789")
    for patch in SOLUTIONS:
        assert git("apply", "--check", patch) == 0, patch.name
    for log in (HERE / "results" / "exercises").glob("*.jsonl"):
        text = exercises.split(f"\n{log.stem[0]}. ")[1].split(f"\n{int(log.stem[0]) + 1}. ")[0]
        end = json.loads(log.read_text().splitlines()[-1])
        assert f"{end['accuracy']:.1%}".replace("%", " %") in text and f"{end['iter']:,}" in text, log.name


# The long tests: pytest -m slow

@pytest.mark.slow
@pytest.mark.parametrize("patch", SOLUTIONS, ids=lambda patch: patch.stem)
def test_solutions_of_the_exercises(patch, tmp_path):
    """They pass the tests that the README names, and train."""
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    assert subprocess.run(["git", "apply", patch], cwd=tmp_path).returncode == 0
    commands = [("train.py", *TINY, *flags) for flags in ((), ("--teacherless",), ("--model", "mamba"))]
    if patch.stem[0] in CHECKS:
        commands = [("-m", "pytest", "-k", CHECKS[patch.stem[0]], "test_all.py")]
    for command in commands:
        ran = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr

@pytest.mark.slow
def test_fuzzed_lines_at_length():
    assert fuzz(100_000) > 1000


@pytest.mark.slow
def test_combinations_of_flags_at_length(monkeypatch, tmp_path, capsys):
    assert 30 < try_flags(500, monkeypatch, tmp_path, capsys) < 470


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--model", "gpt"), ("--model", "mamba", "--teacherless", "--n_train", 0)])
def test_25_kills(flags, tmp_path):
    """kill -9 at random moments; a checkpoint is written after every step, so many of them hit that. Always resumable."""
    flags, whole, parts = (*TINY, *flags, "--max_iters", 1500, "--eval_interval", 1), tmp_path / "whole", tmp_path / "parts"
    assert run("train.py", *flags, "--out_dir", whole).returncode == 0
    random, ckpt = np.random.default_rng(0), parts / "ckpt.pt"
    for kill in range(25):
        process = start(*(("--resume", "--out_dir", parts) if (parts / "log.jsonl").exists() else (*flags, "--out_dir", parts)))
        if kill % 4:                                                 # between and in its checkpoints
            before = ckpt.stat().st_mtime_ns if ckpt.exists() else 0
            wait_for(lambda: ckpt.exists() and ckpt.stat().st_mtime_ns > before, process)
            time.sleep(random.uniform(0, 0.3))
        else:                                                        # while it starts
            time.sleep(random.uniform(0.5, 3))
        assert process.poll() is None
        process.kill()
        out, err = process.communicate()
        assert err == ""
        if ckpt.exists():
            torch.load(ckpt, weights_only=True)
    assert run("train.py", "--resume", "--out_dir", parts).returncode == 0
    same_run(whole, parts)


@pytest.mark.slow
def test_a_killed_process_ends_the_job(tmp_path):
    flags = *TINY, "--max_iters", 3000, "--eval_interval", 20, "--out_dir", tmp_path / "run"
    process = start(*flags, processes=2)
    wait_for(lambda: (tmp_path / "run" / "ckpt.pt").exists(), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    done = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["iter"]
    process = start("--resume", "--max_iters", done + 10, "--out_dir", tmp_path / "run", processes=2)
    assert process.communicate(timeout=120) and process.returncode == 0
    assert read_log(tmp_path / "run")[-1]["iter"] == done + 10


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    flags, whole, parts = (*TINY, "--max_iters", 300, "--eval_interval", 100), tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        process = start(*flags, "--out_dir", folder, processes=2)
        if folder is parts:
            wait_for(lambda: (parts / "ckpt.pt").exists(), process)
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert 0 < torch.load(parts / "ckpt.pt", weights_only=True)["iter"] < 300
    process = start("--resume", "--out_dir", parts, processes=2)
    assert process.communicate(timeout=120) and process.returncode == 0
    same_run(whole, parts)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n_train", [200, 0])
def test_memory_stays_flat(n_train, tmp_path):
    """The resident memory of a tiny run, from step 4,000 to step 20,000."""
    code = ("import train\nreport = train.report\n"
            "def reported(line, config):\n    return 'pages ' + open('/proc/self/statm').read().split()[1]\n"
            "train.report = reported\ntrain.SOLVED = 2\ntrain.main()")
    flags = *TINY, "--max_iters", 20000, "--eval_interval", 2000, "--n_train", n_train, "--out_dir", tmp_path / "run"
    result = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=HERE, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    pages = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("pages")]
    assert len(pages) == 11, result.stderr
    assert max(pages[2:]) < 1.02 * pages[2], pages
