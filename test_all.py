"""The tests: pytest, on a machine without a GPU. Triton kernels run in Triton's interpreter.

On a machine with a GPU, TRITON_INTERPRET=0 pytest -k scan runs the kernels themselves.
`pytest -m slow` runs the long tests.
"""
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")   # in models this small, threads wait for each other

import contextlib
import copy
import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
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
every_model = pytest.mark.parametrize("name", train.DEFAULTS)  # a third one is held to the same
our_models = pytest.mark.parametrize("name", ["gpt", "mamba"])


def rng(seed=0):
    return np.random.default_rng(seed)


def lines_of(prefixes, paths):
    """The text form of graphs."""
    return [data.to_text(*graph) for graph in zip(prefixes.tolist(), paths.tolist())]


def as_graphs(prefixes):
    """A set of graphs whose edges have no order."""
    rows = prefixes.tolist()
    return {(frozenset(data.edges_of(row)), row[-3], row[-2]) for row in rows}


def settings(*flags):
    """The settings of a run that is started with these flags."""
    args = train.make_parser().parse_args(list(map(str, flags)))
    train.resolve(args)
    return args


def flags_of(name, sizes):
    """The sizes that the model has -> flags."""
    sizes = {size: value for size, value in sizes.items() if size in train.DEFAULTS[name]}
    return ["--model", name, *[f"--{size}={value}" for size, value in sizes.items()]]


def small(name):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_loop": 2, "n_embd": 16, "n_head": 2, "d_state": 4}
    return train.build_model(settings(*flags_of(name, sizes)), SMALL_STAR)


def tokens(*shape):
    return torch.randint(0, 14, shape, generator=torch.Generator().manual_seed(0))


def call(module, *flags):
    """Runs a script in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
        try:
            module.main()
        except SystemExit as stop:
            if isinstance(stop.code, str):                      # as Python does with a message
                print(stop.code, file=sys.stderr)
                return 1
            return stop.code
    return 0


def output(capsys, module, *flags):
    """What a script prints that ends well."""
    capsys.readouterr()
    assert call(module, *flags) == 0
    return capsys.readouterr().out


def asked(capsys, *flags):
    """What sample.py finds, the JSON form."""
    return json.loads(output(capsys, sample, "--json", *flags))


def refusal(capsys, module, *flags, code=2):
    """What a script says that refuses its flags: one line, and nothing on stdout."""
    capsys.readouterr()
    assert call(module, *flags) == code
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert code == 1 or printed.out == ""
    return printed.err


def python(*words, **options):
    """Runs Python in a process of its own."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, text=True, capture_output=True, **{"cwd": HERE, **options})


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
    prefix, path = data.from_text(STAR, LINE)
    assert prefix.tolist() == [
        32, 3, 50, 16, 12, 50, 3, 19, 50, 32, 34, 50, 34, 6, 50, 6, 16, 50, 19, 47, 50, 47, 28, 52,
        32, 12, 51,
    ]
    assert path.tolist() == [32, 34, 6, 16, 12]
    assert (STAR.prefix_len, STAR.dollar, STAR.vocab_size) == (27, 53, 54)
    assert data.to_text(prefix.tolist(), path.tolist()) == LINE
    assert data.to_text(prefix.tolist()) == LINE.split("=")[0] + "="


@pytest.mark.parametrize("sizes", [(2, 5, 50), (1, 2, 2), (5, 3, 11), (3, 2, 200)])
def test_drawn_graphs_are_path_stars(sizes):
    """They are written, and read again by a parser that refuses anything else."""
    star = PathStar(*sizes)
    prefixes, paths = data.draw(star, 300, rng())
    assert prefixes.shape == (300, star.prefix_len) and paths.shape == (300, star.path_len)
    assert prefixes.dtype == paths.dtype == np.int64
    for line, prefix, path in zip(lines_of(prefixes, paths), prefixes, paths):
        read_prefix, read_path = data.from_text(star, f" {line}\r\n")
        assert (read_prefix == prefix).all() and (read_path == path).all()


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


@pytest.mark.parametrize("sizes, count", [((2, 2, 4), 24), ((1, 3, 4), 24), ((2, 3, 5), 120)])
def test_count_of_graphs(sizes, count):
    """Of all that are ever drawn, no matter in which order their edges are."""
    star = PathStar(*sizes)
    prefixes, _ = data.draw(star, 40 * count, rng())
    assert star.count() == count == len(as_graphs(prefixes))
    assert len(set(data.graph_keys(star, prefixes))) == count


@pytest.mark.parametrize("sizes, n_test", [((2, 2, 4), 8), ((2, 3, 6), 20)])
def test_training_and_test_set_share_no_graph(sizes, n_test):
    """Together they are all graphs that there are."""
    star = PathStar(*sizes)
    n_train = star.count() - n_test
    (train_set, _), (test_set, _) = data.datasets(star, n_train, n_test, 0)
    assert len(as_graphs(train_set)) == n_train and len(as_graphs(test_set)) == n_test
    assert not as_graphs(train_set) & as_graphs(test_set)
    (again, _), _ = data.datasets(star, n_train, n_test, 0)
    (other, _), _ = data.datasets(star, n_train, n_test, 1)
    assert (again == train_set).all() and (other != train_set).any()
    with pytest.raises(ValueError, match=f"only {star.count()} different graphs"):
        data.datasets(star, n_train + 1, n_test, 0)


@pytest.mark.parametrize("line, says", [
    ("32,3|16,12", "not of the form"),
    (LINE.replace("32", "9" * 5000), "not of the form"),
    (LINE.replace("/32,12=32", "/9,12=9"), "no arm of the start 9"),
    (LINE.replace("47,28", "47,16"), "two lead to the same node"),
    (LINE.replace("47,28", "47,32"), "an edge leads to the start"),
    (LINE.replace("47,28", "19,28"), "some edges are on no arm"),
    ("0,1|0,2|2,3/0,3=0,2,3", "not a graph G(2,5)"),
    (LINE.replace("47", "50"), "node 50: names go up to 49"),
    (LINE.replace("/32,12", "/32,16"), "the goal 16 is not the end of an arm"),
    (LINE.replace("=32,34", "=32,3"), "path 32,3,6,16,12 is not the arm"),
])
def test_malformed_lines(line, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        data.from_text(STAR, line)


def test_every_epoch_sees_every_graph_once():
    """Also where a batch holds more than an epoch."""
    for n, size in (20, 8), (5, 20):
        seen = np.concatenate([data.batch_indices(n, size, 0, step) for step in range(5)]).tolist()
        assert Counter(seen[:n]) == Counter(seen[n:2 * n]) == Counter(range(n))
        assert seen[:n] != seen[n:2 * n]


def test_printed_graphs_are_not_those_of_a_run_with_the_same_seed(capsys):
    """NumPy draws the same numbers from seed s and [s, 0], so they need a stream of their own."""
    given = ("--num_nodes", 50, "-n", 300)
    printed = output(capsys, data, *given, "--seed", 0)
    assert output(capsys, data, *given) == printed != output(capsys, data, *given, "--seed", 1)
    prefixes = np.array([data.from_text(STAR, line)[0] for line in printed.splitlines()])
    (train_set, _), (test_set, _) = data.datasets(STAR, 300, 300, 0)
    assert not as_graphs(prefixes) & (as_graphs(train_set) | as_graphs(test_set))
    assert "to 100000, got 999999999" in refusal(capsys, data, "--num_nodes", 999_999_999)


@pytest.mark.parametrize("sizes", [(2, 5, 10), (4, 3, 12)])
def test_goals_move_to_other_arms(sizes):
    star = PathStar(*sizes)
    prefixes, paths = data.draw(star, 200, rng())
    moved, new_paths = data.move_goals(prefixes)
    assert (np.delete(moved, -2, axis=1) == np.delete(prefixes, -2, axis=1)).all()
    assert (moved[:, -2] != prefixes[:, -2]).all() and (new_paths[:, 1] != paths[:, 1]).all()
    for line in lines_of(moved, new_paths):
        data.from_text(star, line)                              # refuses a wrong path
    for _ in range(star.deg - 1):
        moved, new_paths = data.move_goals(moved)
    assert (moved == prefixes).all() and (new_paths == paths).all()


# ---- model_gpt.py and model_mamba.py


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


def test_a_mambas_state_does_not_grow_with_the_prompt():
    _, states = small("mamba").hidden_states(tokens(1, 1000))
    for conv_state, _ in states:
        assert conv_state.untyped_storage().nbytes() == 4 * conv_state.numel() == 4 * 3 * 32


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

    idx = tokens(1, 10)[0]
    x = w["backbone.embedding.weight"][idx]
    for i in [0, 1] * n_loop:
        p = {key: w[f"backbone.layers.{i}.mixer.{key}"] for key in mixer}
        u, z = (norm(x, f"backbone.layers.{i}.norm") @ p["in_proj.weight"].T).split(32, dim=1)
        before = torch.cat([torch.zeros(3, 32), u])
        u = sum(before[k:k + 10] * p["conv1d.weight"][:, 0, k] for k in range(4))
        u = F.silu(u + p["conv1d.bias"])
        dt, B, C = (u @ p["x_proj.weight"].T).split([1, 4, 4], dim=1)
        delta = torch.log(1 + torch.exp(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
        A = -torch.exp(p["A_log"])
        h, y = torch.zeros(32, 4, dtype=torch.float64), []
        for t in range(10):
            h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
            y.append(h @ C[t] + p["D"] * u[t])
        x = x + (torch.stack(y) * F.silu(z)) @ p["out_proj.weight"].T
    expected = norm(x, "backbone.norm_f") @ w["lm_head.weight"].T

    model = Mamba(MambaConfig(14, n_layer=2, d_model=16, d_state=4, n_loop=n_loop)).double()
    model.load_state_dict(w, strict=True)
    torch.testing.assert_close(model(idx[None])[0][0], expected)


@our_models
@pytest.mark.parametrize("how", ["deepcopy", "assign", "to_empty"])
def test_a_model_that_is_copied_or_loaded_trains_as_the_first(name, how):
    """One embedding reads and writes, and weight decay spares Mamba's A, known by its name."""
    idx, args = tokens(4, 12), settings("--model", name, "--lr", 0.01, "--weight_decay", 0.5)
    model, other = small(name), copy.deepcopy(small(name))
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    if how == "assign":
        other.load_state_dict(weights, assign=True)
    elif how == "to_empty":
        other.to("meta").to_empty(device="cpu").load_state_dict(weights)
    for each in (model, other):
        optimizer = train.make_optimizer(each, args)
        for _ in range(3):
            optimizer.zero_grad()
            each(idx, idx)[1].backward()
            optimizer.step()
    weights, loaded = other.state_dict(), small(name)
    loaded.load_state_dict(weights)
    for key, x in model.state_dict().items():
        assert torch.equal(weights[key], x) or key == "lm_head.weight"
    for each in (other, loaded):
        assert torch.equal(each(idx)[0], model(idx)[0])


@our_models
def test_models_run_on_the_meta_device_and_exported(name):
    with torch.device("meta"):
        logits, loss = small(name)(tokens(2, 12).to("meta"), tokens(2, 12).to("meta"))
        loss.backward()
    assert logits.shape == (2, 12, 14) and logits.is_meta
    model, idx = small(name), tokens(2, 12)
    exported = torch.export.export(model, (idx,)).module()
    logits, expected = exported(idx)[0], model(idx)[0]
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    gradients = {key: p.grad for key, p in exported.named_parameters()}
    expected.square().sum().backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(gradients[key], p.grad, rtol=1e-4, atol=1e-4)


def test_gpt_refuses_more_tokens_than_it_has_positions_for():
    model = GPT(GPTConfig(block_size=40, vocab_size=14, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(ValueError, match="41 tokens is longer than block_size 40"):
        model.generate(tokens(1, 40), 2)


@pytest.mark.parametrize("width", [96, 768])
def test_gpt_starts_as_gpt2_at_its_width(width):
    """Apart from what the docstring says: 1 / i, and positions that are sinusoids."""
    torch.manual_seed(0)
    weights = GPT(GPTConfig(64, 500, n_layer=2, n_head=2, n_embd=width)).state_dict()
    scale = 0.02 * math.sqrt(768 / width)
    divisors = {"wte": 1, "h.0.mlp.c_proj": 1, "h.1.mlp.c_proj": 2, "h.1.attn.c_proj": 2}
    for name, divisor in divisors.items():
        std = weights[f"transformer.{name}.weight"].std().item()
        assert std == pytest.approx(scale / divisor, rel=0.05)
    for pair in range(0, width, 2):
        angle = torch.arange(64) * math.pi / 2 / 64 ** (pair / width)
        expected = 4 * scale * torch.stack([angle.sin(), angle.cos()], dim=1)
        table = weights["transformer.wpe.weight"][:, pair:pair + 2]
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)


def test_mamba_starts_as_the_original():
    """Apart from the embedding, which begins larger, and what layer i adds, divided by i."""
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=14, n_layer=4, d_model=512, A_init=0.1))
    mixer = model.backbone.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).repeat(1024, 1) / 10)
    assert mixer.dt_proj.weight.abs().max() <= 32 ** -0.5 and mixer.D.eq(1).all()
    places = F.softplus(mixer.dt_proj.bias).log10() / 2 + 1.5   # 0.001 -> 0, 0.1 -> 1
    assert_uniform((places.detach().numpy() * 8).clip(0, 7).astype(int), 8)
    assert -1e-3 < places.min() and places.max() < 1 + 1e-3
    for i, layer in enumerate(model.backbone.layers, start=1):
        bound = 1 / math.sqrt(1024) / i                         # of a linear layer, over i
        assert 0.99 * bound < layer.mixer.out_proj.weight.abs().max() <= bound
    embedding = model.backbone.embedding.weight
    assert embedding.std().item() == pytest.approx(512 ** -0.5, rel=0.05)


# ---- scan_kernel.py

OPTIONAL = ["D", "z", "delta_bias", "initial_state"]
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@pytest.fixture(params=["cpu", "triton"])
def path(request, monkeypatch):
    """The two ways in which the recurrence is written."""
    if request.param == "triton" and scan_kernel.triton is None:
        pytest.skip("needs triton")
    monkeypatch.setattr(scan_kernel, "use_triton", lambda x: request.param == "triton")
    return request.param


def loop(
    u, delta, A, B, C, D=None, z=None, delta_bias=None,
    delta_softplus=False, return_last_state=True, initial_state=None,
):
    """The equations of the scan as a loop, whose gradient autograd finds."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:
        dt = torch.where(dt > 40, dt, dt.clamp(max=40).exp().log1p())
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    y = []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt * u)[:, :, t, None] * B[:, None, :, t]
        y.append((h * C[:, None, :, t]).sum(2))
    out = torch.stack(y, dim=2)
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * z * z.sigmoid()
    return out, h


def scan_inputs(batch, seqlen, dim, dstate, dtype=torch.float64, without=()):
    """Random arguments {name: value}. Those of a token have the dtype, the others a full one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "u": (batch, dim, seqlen), "delta": (batch, dim, seqlen), "A": (dim, dstate),
        "B": (batch, dstate, seqlen), "C": (batch, dstate, seqlen), "D": (dim,),
        "z": (batch, dim, seqlen), "delta_bias": (dim,), "initial_state": (batch, dim, dstate),
    }
    inputs = {"delta_softplus": True, "return_last_state": True}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        x = -2 * x.abs() if name == "A" else x
        of_a_token = name in ("u", "delta", "B", "C", "z")
        x = x.to(dtype if of_a_token else torch.promote_types(dtype, torch.float32))
        if name not in without:
            inputs[name] = x.to(DEVICE).requires_grad_()
    return inputs


def tensors_of(inputs):
    return {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}


def results_of(scan, inputs):
    """-> {name: tensor}: out, the last state, and the gradients of a weighted sum of both"""
    outputs, given = scan(**inputs), tensors_of(inputs)
    weights = [torch.linspace(-1, 1, x.numel()).to(x).reshape(x.shape) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(given.values()), weights)
    return dict(zip(("out", "last", *given), (*outputs, *gradients)))


def assert_same(results, expected, tolerance=0):
    """The same to the bit, or but for a tolerance, relative to the largest number."""
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        atol = tolerance * max([1e-3, *x.abs().flatten().tolist()])
        torch.testing.assert_close(
            results[name].to(x.dtype), x, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}"
        )


def assert_is_the_loop(inputs, tolerance=1e-12):
    """Values and all gradients are those of the loop in float64."""
    exact = dict(inputs)
    for name, x in tensors_of(inputs).items():
        exact[name] = x.detach().double().requires_grad_()
    assert_same(results_of(selective_scan, inputs), results_of(loop, exact), tolerance)


@pytest.mark.parametrize("without", [(), OPTIONAL])
@pytest.mark.parametrize("size", [(2, 1, 3, 1), (1, 2, 70, 5), (2, 19, 34, 16), (0, 2, 3, 4)])
def test_scan_is_the_loop(path, size, without):
    inputs = scan_inputs(*size, without=without)
    assert_is_the_loop(inputs | {"delta_softplus": not without})
    alone = selective_scan(**inputs | {"return_last_state": False})
    assert torch.equal(alone, selective_scan(**inputs)[0])


@pytest.mark.parametrize("seqlen", [7, 8, 9, 15, 16, 17])
def test_scan_around_the_edges_of_chunks(path, seqlen, monkeypatch):
    """Also where each sequence is a group of its own, and with steps of all sizes."""
    assert scan_kernel.CHUNK == 8
    monkeypatch.setattr(scan_kernel, "GROUP_SIZE", 1)
    middling, large_and_small = [scan_inputs(3, seqlen, 4, 3) for _ in range(2)]
    with torch.no_grad():
        middling["delta"][:, :, 0] = 22.0   # PyTorch's softplus is not exact there, by default
        large_and_small["delta"][:, :, seqlen // 3] = -200.0
        large_and_small["delta"][:, :, seqlen // 2] = 300.0
        large_and_small["A"] *= 50
    assert_is_the_loop(middling)
    assert_is_the_loop(large_and_small)


def test_scan_gradients_by_finite_differences(path):
    inputs = scan_inputs(2, 9, 3, 2)
    tensors = tensors_of(inputs)

    def outputs(*values):
        return selective_scan(**inputs | dict(zip(tensors, values)))

    torch.autograd.gradcheck(outputs, list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 2e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3),
])
def test_scan_dtypes(path, dtype, tolerance):
    """Beside float64 on the same rounded inputs. Triton's interpreter truncates to bfloat16."""
    inputs = scan_inputs(2, 9, 6, 5, dtype)
    out, last = selective_scan(**inputs)
    assert out.dtype == dtype and last.dtype == torch.float32
    assert_is_the_loop(inputs, tolerance)


def test_scan_under_autocast_and_checkpoint(path):
    """The same bits: products of states stay float32."""
    def checkpointed(**inputs):
        return torch.utils.checkpoint.checkpoint(selective_scan, use_reentrant=False, **inputs)

    inputs = scan_inputs(3, 33, 5, 4, torch.float32)
    plain = results_of(selective_scan, inputs)
    assert_same(results_of(checkpointed, inputs), plain)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(results_of(selective_scan, inputs), plain)


def test_scan_strides(path):
    """Views give the same bits: other orders in memory, every second channel, expanded."""
    inputs = scan_inputs(2, 6, 5, 3, torch.float32)
    views = {name: x.detach() for name, x in tensors_of(inputs).items()}
    inputs["delta"] = views["delta"][:1].repeat(2, 1, 1).requires_grad_()
    for name in ("B", "C", "z", "A", "initial_state"):
        views[name] = views[name].mT.contiguous().mT
    views["u"] = views["u"].repeat_interleave(2, 1)[:, ::2]
    views["D"] = views["D"].repeat_interleave(2)[::2]
    views["delta"] = views["delta"][:1].expand(2, -1, -1)
    views = {name: x.requires_grad_() for name, x in views.items()}
    assert_same(results_of(selective_scan, inputs | views), results_of(selective_scan, inputs))


@pytest.mark.parametrize("without", [("initial_state",), OPTIONAL])
def test_results_of_a_scan_may_be_changed_in_place(path, without):
    """Nothing that the backward pass needs changes with them."""
    def doubled(**inputs):
        return [2 * x for x in selective_scan(**inputs)]

    def doubled_in_place(**inputs):
        return [x.mul_(2) for x in selective_scan(**inputs)]

    inputs = scan_inputs(2, 9, 6, 3, without=without)
    assert_same(results_of(doubled_in_place, inputs), results_of(doubled, inputs), 1e-12)


def test_scan_refuses_what_it_has_no_gradient_for(path):
    """Also where the loss is linear in the scan, as `once_differentiable` would not."""
    inputs = scan_inputs(1, 9, 2, 3, without=("D", "z"))

    def loss_of(u):
        return selective_scan(**inputs | {"u": u})[0].sum()

    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss_of(inputs["u"]), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="with functorch transforms"):
        torch.func.grad(loss_of)(inputs["u"].detach())


def test_scan_under_compile(path):
    torch.compiler.reset()
    inputs = scan_inputs(3, 12, 16, 4)
    compiled = torch.compile(selective_scan, backend="aot_eager")
    assert_same(results_of(compiled, inputs), results_of(selective_scan, inputs), 1e-12)


def test_scan_memory(path):
    """The state before each chunk is saved for the backward pass, and that of no other step."""
    inputs = scan_inputs(2, 42, 3, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        selective_scan(**inputs)
    chunks = math.ceil(42 / scan_kernel.CHUNK)
    assert [x.shape for x in saved if x.dim() > 3] == [(2, chunks, 2, 3)]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import scan_kernel
sizes = {"CHUNK": 8, "BLOCK_N": 16, "BLOCK_D": 32}
for kernel in (scan_kernel.forward_kernel, scan_kernel.backward_kernel):
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(sizes, "constexpr")
    types |= {"dim": "i32", "seqlen": "i32", "dstate": "i32"}
    code = compile(ASTSource(kernel, types, sizes), target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    for line in code.splitlines():
        if "tt.addptr" in line:
            print(kernel.__name__, "i64" if "i64" in line.split(" : ")[1] else line)
"""


@pytest.mark.skipif(scan_kernel.triton is None, reason="needs triton")
def test_scan_kernels_compile_for_a_gpu():
    """In what they compile to, each offset from a pointer to a tensor is a 64-bit number."""
    result = python("-c", COMPILE, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.splitlines()) == {"forward_kernel i64", "backward_kernel i64"}


def test_scan_refuses_arguments_of_another_form():
    inputs = scan_inputs(8, 12, 6, 5)
    u, A, B, D = [inputs[name].detach() for name in ("u", "A", "B", "D")]
    for name, x, says in (
        ("A", A.cfloat(), "A must .*complex64"), ("A", A[0], "A .*got"), ("A", A[1:], "A must"),
        ("u", u[:, :, 0], "u must"), ("delta", u[:, :, 1:], "delta must"), ("D", D[1:], "D must"),
        ("B", B[:, None], "B must"), ("C", B[..., 0], "C must"), ("z", u.int(), "z must .*int32"),
        ("initial_state", inputs["initial_state"].mT, "initial_state must"),
        ("delta_bias", D.to("meta"), "delta_bias must .* meta"),
    ):
        with pytest.raises(ValueError, match=says):
            selective_scan(**inputs | {name: x})


# ---- train.py: four ways to train


@our_models
def test_sizes_reach_the_model(name):
    sizes = {"n_layer": 3, "n_loop": 5, "n_embd": 24, "n_head": 2, "d_state": 7, "A_init": 0.5}
    config = vars(train.build_model(settings(*flags_of(name, sizes)), SMALL_STAR).config)
    config["n_embd"] = config.get("d_model", config.get("n_embd"))
    for size in train.DEFAULTS[name].keys() & sizes.keys():
        assert config[size] == sizes[size]
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
    inputs, targets = train.inputs_and_targets(star, *given, args.teacherless)
    assert inputs.tolist() == [[3, 9, 10, 7, 3, 12, 7, 9, 11, *reads]]
    assert targets.tolist() == [[-1] * 8 + predicts]


@every_model
@pytest.mark.parametrize("way, dtype", [((), "float32"), (("--teacherless",), "bfloat16")])
def test_a_run_is_this_loop(name, way, dtype, tmp_path):
    """The same weights, optimizer and losses. Weight decay spares vectors and Mamba's A."""
    given = ("--lr", 0.01, "--warmup_iters", 2, "--decay_frac", 0.5, "--weight_decay", 0.3)
    given = (*TINY, "--model", name, *way, "--dtype", dtype, "--seed", 3, *given)
    assert call(train, *given, "--out_dir", tmp_path / "run") == 0

    (prefixes, paths), _ = data.datasets(SMALL_STAR, 200, 20, 3)
    fed = torch.from_numpy(np.full_like(paths, SMALL_STAR.dollar) if way else paths)
    inputs = torch.cat([torch.from_numpy(prefixes), fed[:, :-1]], dim=1)
    torch.manual_seed(3)
    model = train.build_model(settings(*given), SMALL_STAR)
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
    weights = read_ckpt(tmp_path / "run")["model"]
    for key, x in model.state_dict().items():
        torch.testing.assert_close(weights[key], x, rtol=1e-4, atol=1e-6)
    for line, first in zip(read_log(tmp_path / "run")[2:], (0, 3)):
        assert line["train_loss"] == pytest.approx(sum(losses[first:first + 3]) / 3, rel=1e-5)


@our_models
def test_a_run_stops_when_the_task_is_solved(name, tmp_path, capsys):
    """With one arm of one edge there is nothing to plan, but something to learn."""
    flags = (*TINY, "--model", name, "--deg", 1, "--path_len", 2, "--num_nodes", 12)
    flags += ("--n_train", 100, "--n_test", 10, "--n_embd", 32, "--batch_size", 64, "--lr", 0.01)
    flags += ("--max_iters", 3000, "--eval_interval", 25, "--out_dir", tmp_path / "run")
    assert "too few graphs (10)" in output(capsys, train, *flags)
    last = read_log(tmp_path / "run")[-1]
    assert last["accuracy"] == 1 and 0 < last["iter"] < 3000 and last["goal_moved"] is None
    printed = output(capsys, sample, "--out_dir", tmp_path / "run", "--num_graphs", 5)
    assert "goal moved" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("way, says", [
    (("--teacherless",), "solved, the model finds the path"), ((), "the Clever Hans cheat"),
])
def test_mamba_plans_without_a_teacher_and_cheats_with_one(way, says, tmp_path, capsys):
    """The two commands at the top of train.py."""
    assert says in output(capsys, train, "--model", "mamba", *way, "--out_dir", tmp_path / "run")


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
        if name in ("gpt", "mamba"):                            # an untrained GRU may say one thing
            assert not torch.equal(answers, forced)
    assert torch.equal(answers, turned(written))
    p = train.probabilities(args, SMALL_STAR, model, graphs[0], answers).double()
    torch.testing.assert_close(p, turned(logits_after(written).softmax(2)), rtol=1e-4, atol=1e-6)


class HandMade(nn.Module):
    """Takes the edge that leaves the last token.

    At the start it takes the one towards the goal, if it `plans`. Else it takes the first in the
    list, which leads to a random arm: the Clever Hans cheat.
    """

    def __init__(self, star, plans):
        super().__init__()
        self.star, self.plans, self.config = star, plans, GPTConfig()
        self.matrix, self.vector = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))

    def forward(self, idx, targets=None):
        n, predicted = self.star.prefix_len, torch.zeros_like(idx)
        for row, out in zip(idx.tolist(), predicted):
            edges, start, goal = data.edges_of(row[:n]), row[n - 3], row[n - 2]
            after = {self.star.equals: start} | dict(reversed(edges))
            if self.plans:
                [after[start]] = [arm[1] for arm in data.find_arms(edges, start) if goal in arm]
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
    graphs = data.draw(SMALL_STAR, 400, rng())
    cheat = HandMade(SMALL_STAR, plans=False)
    result, _, _ = train.evaluate(settings(), SMALL_STAR, cheat, *graphs)
    tails, heads = graphs[0][:, 0:-3:3], graphs[0][:, 1:-3:3]
    first = np.argmax(tails == graphs[1][:, [0]], axis=1)
    hop = (np.take_along_axis(heads, first[:, None], 1)[:, 0] == graphs[1][:, 1]).mean()
    assert 0.4 < hop < 0.6
    assert result["forced_node_accuracy"] == [1, hop, 1, 1, 1]
    assert result["node_accuracy"] == [1, hop, hop, hop, hop]
    assert result["accuracy"] == result["forced_accuracy"] == hop
    assert result["cheat_accuracy"] == 1


def test_the_cheat_accuracy_counts_all_nodes_after_the_first_hop(monkeypatch):
    graphs, model = data.draw(SMALL_STAR, 400, rng()), HandMade(SMALL_STAR, plans=False)
    right = torch.from_numpy(graphs[1])
    forced = right.clone()
    forced[:, :2] = -1                                          # these do not count
    forced[:100, 2] = -1
    forced[50:150, 4] = -1                                      # 150 have a wrong later node
    monkeypatch.setattr(train, "predict", lambda *given: (right, forced, 0.0))
    for way, cheat_accuracy in ((), 250 / 400), (("--reverse",), None):
        result, _, _ = train.evaluate(settings(*way), SMALL_STAR, model, *graphs)
        assert result["cheat_accuracy"] == cheat_accuracy and result["accuracy"] == 1


@pytest.mark.parametrize("flags, n, hop, cheat, says", [
    ((), 1000, 0.5, 1, "the Clever Hans cheat"),
    ((), 1000, 0.44, 0.98, "the Clever Hans cheat"),
    ((), 1000, 0.58, 1, "neither solved nor the cheat"),        # too often right for a guess
    ((), 1000, 0.5, 0.97, "neither solved nor the cheat"),
    ((), 1000, 0.99, 1, "solved, the model finds the path"),
    ((), 99, 0.99, 1, "too few graphs (99)"),
    (("--deg", 1), 1000, 0.99, 1, "with one arm there is nothing to choose"),
    (("--deg", 5), 1000, 0.2, 1, "the Clever Hans cheat"),
    (("--teacherless",), 1000, 0.5, None, "neither solved nor the cheat"),
    (("--only_first_hop",), 1000, 0.5, None, "indecipherable token"),
    (("--only_first_hop",), 1000, 0.58, None, "neither solved nor the cheat"),
    (("--only_first_hop", "--deg", 20), 100, 0, None, "neither solved nor the cheat"),
    (("--only_first_hop",), 1000, 1, None, "solved, the model finds the first hop"),
])
def test_verdicts(flags, n, hop, cheat, says):
    """All nodes are right as often as the first hop."""
    args = settings("--num_nodes", 100, "--path_len", 5, *flags)
    result = {"accuracy": hop, "node_accuracy": [1, hop], "cheat_accuracy": cheat}
    text = train.verdict(result, args, n)
    assert says in text and f"accuracy {hop:.1%}, where guessing an arm gives" in text


@pytest.mark.parametrize("plans", [True, False])
def test_the_first_hop_follows_the_goal_or_not(plans, monkeypatch, tmp_path, capsys):
    """In the last line of a log, and in what sample.py prints."""
    monkeypatch.setattr(train, "build_model", lambda args, star: HandMade(star, plans))
    out = tmp_path / "run"
    printed = output(capsys, train, *TINY, "--n_loop", 1, "--n_test", 200, "--out_dir", out)
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


def test_graphs_to_judge_on_are_those_that_the_run_has_not_seen(trained, capsys):
    """Of 60 graphs, 30 are trained on and 10 tested on."""
    out = trained("--path_len", 2, "--num_nodes", 5, "--n_train", 30, "--n_test", 10)
    (train_set, _), (test_set, _) = data.datasets(PathStar(2, 2, 5), 30, 10, 0)
    judged = set()
    for graph in asked(capsys, "--out_dir", out, "--show", 20, "--num_graphs", 20)["graphs"]:
        edges = {edge for arm in graph["arms"] for edge in zip(arm, arm[1:])}
        judged.add((frozenset(edges), graph["path"][0], graph["path"][-1]))
    assert len(judged) == 20 and not judged & (as_graphs(train_set) | as_graphs(test_set))


# ---- train.py: runs


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@every_model
def test_tiny_runs(name, way, trained, capsys):
    """What a run leaves behind, and that sample.py finds the same on the same graphs."""
    out = trained("--model", name, *way)
    header, *lines = read_log(out)
    assert list(header) == ["command", "config", "graphs", "versions", "machine"]
    assert header["command"].startswith("python train.py --n_layer 1 --n_embd 16")
    assert [line["iter"] for line in lines] == [0, 3, 6]
    for line in lines:
        assert line.keys() == {
            "iter", "examples", "elapsed_s", "train_loss", "lr", "samples", "goal_moved",
            "test_loss", "accuracy", "node_accuracy", "forced_accuracy", "forced_node_accuracy",
            "cheat_accuracy",
        }
        assert line["examples"] == 8 * line["iter"]
        assert len(line["node_accuracy"]) == (2 if "--only_first_hop" in way else 5)
        assert (line["forced_accuracy"] is None) == ("--teacherless" in way)
        assert (line["cheat_accuracy"] is not None) == (way == ())
        assert (line["goal_moved"] is not None) == (line["iter"] == 6)
        assert len(line["samples"]) == len(header["graphs"]) == 8
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "log.jsonl"]
    assert read_ckpt(out)["header"] == header and read_ckpt(out)["lines"] == lines

    file = out.parent / "test.txt"
    _, test_set = data.datasets(SMALL_STAR, 200, 20, 0)
    file.write_text("\n".join(lines_of(*test_set)))
    result = asked(capsys, "--out_dir", out, "--file", file, "--show", 8)
    assert result | lines[-1] == lines[-1] | result
    for graph, logged, text in zip(result["graphs"], lines[-1]["samples"], header["graphs"]):
        assert graph["answer"] == logged["answer"]
        assert text.endswith("=" + ",".join(map(str, graph["path"])))
        p = {arm[1]: share for arm, share in zip(graph["arms"], graph["p_first_hop"])}
        assert logged["p_first_hop"] == pytest.approx(p[graph["path"][1]], abs=1e-4)


def assert_same_run(one, two):
    """The same weights, optimizer and log to the bit, but for the time that it took."""
    a, b = read_ckpt(one), read_ckpt(two)
    for part in ("model", "optimizer"):
        for x, y in zip(tree_leaves(a[part]), tree_leaves(b[part]), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    logs = [[line | {"elapsed_s": 0} for line in read_log(folder)[1:]] for folder in (one, two)]
    assert logs[0] == logs[1] and [line["iter"] for line in logs[0]] == [0, 3, 6]


class Killed(BaseException):
    """Stands for kill -9: no code handles it."""


def stop(error, function, count, *flags):
    """Runs train.py until it calls a step of AdamW or os.replace for the count-th time."""
    owner, calls = os if function == "replace" else torch.optim.AdamW, []
    original = getattr(owner, function)

    def stopper(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise error
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(owner, function, stopper)
        assert call(train, *flags) == 1
    assert len(calls) == count


@pytest.mark.parametrize("given", [
    ("--model", "gpt"),
    ("--model", "mamba", "--teacherless"),
    ("--model", "mamba", "--only_first_hop", "--dtype", "bfloat16"),
], ids=lambda given: " ".join(map(str, given)))
def test_a_killed_run_resumes_to_the_bit(given, tmp_path, capsys):
    """One run, killed before it replaces each of its files, and in a step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(train, *TINY, *given, "--out_dir", whole) == 0
    new = (*TINY, *given, "--out_dir", parts)
    over, resume = (*new, "--overwrite"), (*new, "--resume")
    for function, count, flags, in_ckpt, in_log in (
        ("replace", 1, new, None, None),        # the first checkpoint is not in its place
        ("replace", 2, over, 0, None),
        ("step", 2, resume, 0, 0),              # resuming wrote the log
        ("replace", 1, resume, 0, 0),
        ("replace", 3, resume, 0, 0),
        ("replace", 4, resume, 3, 0),
        ("step", 2, resume, 3, 3),
        ("replace", 3, resume, 3, 3),
        ("replace", 4, resume, 6, 3),
    ):
        stop(Killed, function, count, *flags)
        assert (parts / "ckpt.pt").exists() == (in_ckpt is not None)
        assert in_ckpt is None or read_ckpt(parts)["lines"][-1]["iter"] == in_ckpt
        assert (parts / "log.jsonl").exists() == (in_log is not None)
        assert in_log is None or read_log(parts)[-1]["iter"] == in_log
    assert call(train, *resume) == 0
    assert_same_run(whole, parts)
    before = files_of(parts)
    assert "where guessing an arm gives" in output(capsys, train, *resume)
    assert files_of(parts) == before                            # it is finished: nothing changes


def test_ctrl_c_says_how_to_go_on(trained, tmp_path, capsys):
    flags = (*TINY, "--out_dir", tmp_path / "my run")
    stop(KeyboardInterrupt, "step", 5, *flags)
    says = capsys.readouterr().err
    assert says.startswith("interrupted: the same command goes on with --resume")
    assert call(train, *flags, "--resume") == 0
    assert_same_run(tmp_path / "my run", trained())


@pytest.mark.parametrize("given, says", [
    (("--lr", 0.5), "that run has lr 0.001, not 0.5"),
    (("--reverse",), "that run has reverse False, not True"),
    (("--seed", 1), "that run has seed 0, not 1"),
    (("--n_embd", 32), "that run has n_embd 16, not 32"),
    ((), "that run has graphs"),
])
def test_resume_refuses_other_settings(given, says, copied, monkeypatch, capsys):
    monkeypatch.chdir(copied.parent)
    before = files_of(copied.parent)
    if given == ():
        monkeypatch.setattr(data, "draw_unseen", lambda star, n, r, s: data.draw(star, n, rng(9)))
    assert says in refusal(capsys, train, *TINY, "--out_dir", copied, "--resume", *given)
    assert files_of(copied.parent) == before


def test_nothing_is_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(train, *TINY, "--max_iters", 1) == 0
    out = tmp_path / "out" / "gpt-teacher_forced-deg2-len5-seed0"
    before = files_of(tmp_path)
    says = f"out/{out.name} is there: --resume goes on with it, --overwrite"
    assert says in refusal(capsys, train, *TINY)
    assert files_of(tmp_path) == before
    assert call(train, *TINY, "--overwrite") == 0
    assert [line["iter"] for line in read_log(out)[1:]] == [0, 3, 6]


@our_models
def test_init_from_starts_with_the_weights_of_another_run(name, trained, tmp_path):
    """A Mamba's fit graphs of all sizes. The number of passes may differ, too."""
    given = ("--model", name, "--teacherless")
    flags = (*TINY, "--model", name, "--n_loop", 2, "--init_from", trained(*given), "--out_dir")
    more = ("--deg", 1, "--path_len", 4) if name == "mamba" else ()
    stop(Killed, "step", 1, *flags, tmp_path / "new", *more)      # before a step has changed them
    started, weights = read_ckpt(tmp_path / "new")["model"], read_ckpt(trained(*given))["model"]
    assert list(started) == list(weights)
    assert all(torch.equal(started[key], weights[key]) for key in weights)
    assert call(train, *flags, tmp_path / "new", *more, "--resume") == 0  # with its own weights
    assert call(train, *flags, tmp_path / "whole", *more) == 0
    assert_same_run(tmp_path / "new", tmp_path / "whole")


@pytest.mark.parametrize("name, given, says", [
    ("gpt", ("--n_head", 2), "that run has n_head 1, not 2"),
    ("gpt", ("--num_nodes", 11), "that run has num_nodes 10, not 11"),
    ("gpt", ("--deg", 1), "that run has deg 2, not 1"),
    ("gpt", ("--path_len", 4), "that run has path_len 5, not 4"),
    ("gpt", ("--seed", 1), "that run has seed 0, not 1"),
    ("gpt", ("--n_test", 30), "that run has n_test 20, not 30"),
    ("gpt", ("--model", "mamba"), "that run has model gpt, not mamba"),
    ("gpt", ("--init_from", "none"), "none/ckpt.pt is not a checkpoint of this train.py"),
    ("mamba", ("--A_init", 0.2), "that run has A_init 0.1, not 0.2"),
    ("mamba", ("--d_state", 4), "that run has d_state 16, not 4"),
])
def test_init_from_refuses(name, given, says, trained, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = (*TINY, "--model", name, "--init_from", trained("--model", name), *given)
    assert says in refusal(capsys, train, *flags)
    assert not list(tmp_path.iterdir())


@every_model
def test_a_compiled_run_equals_the_eager_one(name, trained, monkeypatch, tmp_path):
    compiled = functools.partial(torch.compile, backend="aot_eager")  # needs no C++ compiler
    models = []
    monkeypatch.setattr(torch, "compile", lambda model: models.append(model) or compiled(model))
    assert call(train, *TINY, "--model", name, "--compile", "--out_dir", tmp_path / "run") == 0
    assert len(models) == 1
    assert_close_runs(trained("--model", name), tmp_path / "run")


def assert_close_runs(one, two):
    """The losses of two runs are the same, but for rounding."""
    for a, b in zip(read_log(one)[2:], read_log(two)[2:], strict=True):
        assert a["iter"] == b["iter"]
        for name in ("train_loss", "test_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run(training, monkeypatch, tmp_path, capsys):
    """In training or in the evaluation after it. The last good checkpoint stays."""
    cross_entropy, steps = F.cross_entropy, []

    def explode(*args, **kwargs):
        steps.append(torch.is_grad_enabled())
        at_step_6 = steps[-1] == training and sum(steps) == 6
        return cross_entropy(*args, **kwargs) + (math.inf if at_step_6 else 0)

    monkeypatch.setattr(F, "cross_entropy", explode)
    says = refusal(capsys, train, *TINY, "--out_dir", tmp_path / "run", code=1)
    assert "the loss is infinite or NaN at step 6" in says
    lines = read_log(tmp_path / "run")[1:]
    assert lines == read_ckpt(tmp_path / "run")["lines"] and lines[-1]["iter"] == 3


# ---- train.py: several processes


def torchrun(*flags):
    """-> what two processes print"""
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train.py")
    result = python(*words, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_do_what_one_does(trained, tmp_path):
    """One log, one checkpoint, and one says what it does. --resume takes up a run of one."""
    given = ("--model", "mamba", "--lr", 0.01, "--warmup_iters", 1)
    printed = torchrun(*TINY, *given, "--out_dir", tmp_path / "two")
    assert printed.count("iter ") == 3 and printed.count("where guessing an arm gives") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["ckpt.pt", "log.jsonl"]
    assert_close_runs(trained(*given), tmp_path / "two")
    stop(Killed, "step", 5, *TINY, *given, "--out_dir", tmp_path / "one")
    printed = torchrun(*TINY, *given, "--out_dir", tmp_path / "one", "--resume")
    assert printed.count("iter ") == 1
    assert_close_runs(trained(*given), tmp_path / "one")


def test_two_processes_refuse_an_odd_batch(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.chdir(tmp_path)
    says = "2 processes can't share --batch_size 7\n"
    assert refusal(capsys, train, *TINY, "--batch_size", 7).endswith(says)
    assert not list(tmp_path.iterdir())


# ---- Mistakes of a user: one line


@pytest.mark.parametrize("given, says", [
    (("--lr", "nan"), "--lr must be above 0"),
    (("--decay_frac", 1.01), "--decay_frac must be at most 1"),
    (("--d_state", 4), "--d_state is not a setting of --model gpt"),
    (("--n_embd", 30, "--n_head", 4), "multiple of n_head"),
    (("--num_nodes", 8), "num_nodes must be from 9, the nodes of a graph"),
    (("--num_nodes", 999_999_999), "to 100000, got 999999999"),
    (("--deg", 0), "argument --deg: must be 1 or more"),
    (("--n_test", 10 ** 8), "there are only 3628800 different graphs G(2,5) with 10 names"),
    (("--only_first_hop", "--teacherless"), "--only_first_hop goes with neither"),
    (("--out_dir", "/dev/null/run"), "Not a directory"),
    (("--resume",), "ckpt.pt is not a checkpoint of this train.py"),
])
def test_bad_flags_leave_nothing_behind(given, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, train, "--n_train", 200, "--n_layer", 1, *given)
    assert said.startswith("train.py: error: ") and says in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, says", [
    (("--file", "x", "--graph", LINE), "not allowed with"),
    (("--file", "50.txt"), "50.txt, line 2: node 47: names go up to 9"),
    (("--file", "empty"), "empty has no graph"),
    (("--graph", "hello"), "--graph, line 1: 'hello' is not of the form"),
    (("--graph", "0,1|0,2/0,1="), "not a graph G(2,5)"),
])
def test_sample_refuses(given, says, trained, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "50.txt").write_text("\n" + LINE)
    (tmp_path / "empty").write_text("\n\n")
    assert says in refusal(capsys, sample, "--out_dir", trained(), *given)


@pytest.mark.parametrize("native, dtype", [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_is_the_default_where_a_gpu_computes_in_it(native, dtype, monkeypatch):
    """On an older one PyTorch would only emulate it."""
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    args = train.make_parser().parse_args([])
    args.device = "cuda"
    train.resolve(args)
    assert args.dtype == dtype


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["PATHSTAR_EVIL"],)


def test_a_checkpoint_runs_no_code(copied, monkeypatch, capsys):
    monkeypatch.setenv("PATHSTAR_EVIL", str(copied / "evil"))
    torch.save(read_ckpt(copied) | {"more": Malicious()}, copied / "ckpt.pt")
    assert "is not a checkpoint" in refusal(capsys, sample, "--out_dir", copied)
    assert not (copied / "evil").exists()
    torch.load(copied / "ckpt.pt", weights_only=False)          # this would run it
    assert (copied / "evil").exists()


@pytest.mark.parametrize("missing", ["header", "model", "the second half"])
def test_damaged_checkpoints_are_refused(missing, copied, capsys):
    """By hand, by a full disk, or by an older version. Nothing is written."""
    file, ckpt = copied / "ckpt.pt", read_ckpt(copied)
    if missing in ckpt:
        del ckpt[missing]
        torch.save(ckpt, file)
    else:
        file.write_bytes(file.read_bytes()[:9000])
    before = files_of(copied)
    for module, flags in (train, (*TINY, "--resume")), (sample, ()):
        says = refusal(capsys, module, *flags, "--out_dir", copied)
        assert "ckpt.pt is not a checkpoint of this train.py" in says
    assert files_of(copied) == before


# ---- sample.py


@every_model
@pytest.mark.parametrize("way", [(), ("--teacherless",)], ids=" ".join)
def test_pass_by_pass(name, way, trained, tmp_path, capsys):
    """Each row is what a model of so many passes answers, with the same weights."""
    given = ("--model", name, "--n_loop", 3, "--lr", 0.01, "--warmup_iters", 0, *way)
    graphs, file = data.draw(SMALL_STAR, 30, rng()), tmp_path / "graphs.txt"
    file.write_text("\n".join(lines_of(*graphs)))
    flags = ("--out_dir", trained(*given), "--file", file, "--show", 30)
    result = asked(capsys, *flags)
    printed = output(capsys, sample, *flags)
    rows = [("from $ alone" if way else "from its own tokens", result)]
    for n_loop, shares in enumerate(result["passes"], start=1):
        args = settings(*TINY, *given, "--n_loop", n_loop)
        model = train.build_model(args, SMALL_STAR)
        model.load_state_dict(read_ckpt(trained(*given))["model"])
        expected, answers, _ = train.evaluate(args, SMALL_STAR, model, *graphs)
        assert shares == expected
        for graph, answer in zip(result["graphs"], answers.tolist()):
            assert graph["passes"][n_loop - 1] == answer
        rows.append((f"after pass {n_loop}", shares))
        assert printed.count(f"\n      pass {n_loop}") == 30
    for label, shares in rows:
        shares = [*shares["node_accuracy"], shares["accuracy"]]
        assert f"\n{label:22}" + "".join(f"{share:10.1%}" for share in shares) in printed
    assert len(rows) == 4 and ("from the true tokens" in printed) == (way == ())
    assert any(graph["passes"][0] != graph["answer"] for graph in result["graphs"])
    once = output(capsys, sample, "--out_dir", trained("--model", name, "--n_loop", 1))
    assert "pass" not in once


def test_sample_on_files_and_single_graphs(trained, tmp_path, capsys):
    lines = lines_of(*data.draw(SMALL_STAR, 4, rng()))
    file = tmp_path / "graphs.txt"
    file.write_bytes(("\ufeff\n" + "\r\n\r\n".join(lines)).encode())
    given = ("--out_dir", trained(), "--show", 9)
    whole = asked(capsys, *given, "--file", file)
    assert whole["num_graphs"] == 4 and "too few graphs (4)" in whole["verdict"]
    assert len(asked(capsys, *given, "--file", file, "--num_graphs", 3)["graphs"]) == 3
    for line, graph in zip(lines, whole["graphs"], strict=True):
        assert graph["path"] == [int(node) for node in line.split("=")[1].split(",")]
        [alone] = asked(capsys, *given, "--graph", line.split("=")[0] + "=")["graphs"]
        assert alone["answer"] == graph["answer"]


def test_sample_shows_where_the_answer_leaves_the_path(capsys):
    sample.show({
        "arms": [[1, 2, 3], [1, 4, 5]], "p_first_hop": [0.5, 0.25], "path": [1, 4, 5],
        "answer": [1, 2, 3], "forced": [1, 2, 5], "passes": [[1, 3, 5]],
    })
    assert capsys.readouterr().out.splitlines() == [
        "P(first hop)",
        "       50.0%    1 ->    2 ->    3",
        "       25.0%    1 ->    4 ->    5   to the goal",
        "      answer    1 ->  [2] ->  [3]",
        "      forced    1 ->  [2] ->    5",
        "      pass 1    1 ->  [3] ->    5",
        "",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
@pytest.mark.parametrize("script", ["data.py", "sample.py"])
def test_head_ends_a_script_in_silence(script, trained):
    flags = ("-n", 100_000) if script == "data.py" else ("--out_dir", trained(), "--show", 1000)
    command = [sys.executable, str(HERE / script), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=600) == -signal.SIGPIPE


# ---- Files that are copied out

MAMBA_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None        # as on macOS and Windows
from model_mamba import *
print(Mamba(MambaConfig(9, 1, 4)).generate(torch.zeros(2, 3, dtype=int), 2).shape)
"""
TRAIN_MAMBA = ("train.py", *TINY, "--model", "mamba")


@pytest.mark.parametrize("files, command, says", [
    ("data.py", ("data.py",), "="),
    ("model_mamba.py scan_kernel.py", ("-c", MAMBA_WITHOUT_TRITON), "[2, 5]"),
    ("train.py data.py model_mamba.py scan_kernel.py", TRAIN_MAMBA, "accuracy"),
    ("sample.py train.py data.py model_gpt.py", ("sample.py", "--out_dir", "run"), "a real arm"),
])
def test_files_work_where_they_are_copied_to(files, command, says, trained, tmp_path):
    """Each file with those that it imports, and nothing else."""
    for name in files.split():
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(trained(), tmp_path / "run")
    result = python(*command, cwd=tmp_path)
    assert result.returncode == 0 and says in result.stdout, result.stderr


@pytest.mark.parametrize("missing", ["model_mamba", "scan_kernel"])
def test_a_file_that_was_not_copied_is_missed_in_one_line(missing, monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "model_mamba")
    monkeypatch.setitem(sys.modules, missing, None)             # Python does not find it
    says = refusal(capsys, train, "--model", "mamba", "--out_dir", tmp_path / "run")
    assert says == f"train.py: error: {missing}.py is missing\n"
    assert not list(tmp_path.iterdir())
