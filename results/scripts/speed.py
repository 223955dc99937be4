"""Measures this project's speed beside others', and prints tables for results/speed.md.

    pip install transformers==5.* mambapy==1.2.0
    git clone https://github.com/karpathy/nanoGPT
    python results/speed.py --nanogpt nanoGPT
    python results/speed.py --only gpu                      on a GPU; beside mamba_ssm

Every time is the median of calls that take turns. What is not installed is left out.
"""
import argparse
import contextlib
import datetime
import importlib.util
import io
import itertools
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import scan_kernel  # noqa: E402
import train  # noqa: E402
from data import PathStar, draw, run_script  # noqa: E402
from tables import markdown  # noqa: E402

STAR = PathStar(2, 5, 10)


def is_installed(name):
    return importlib.util.find_spec(name) is not None


def default_model(name, star):
    return train.build_model(argparse.Namespace(model=name, **train.DEFAULTS[name]), star)


def take_turns(calls, seconds):
    """Calls the functions in turn, for so many seconds in all -> {name: median milliseconds}"""
    def timed(call):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in calls.values():
        call()  # to warm up
    once = sum(timed(call) for call in calls.values())
    rounds = max(3, min(300, int(seconds / once)))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: 1e3 * statistics.median(measured) for name, measured in times.items()}


def print_table(title, columns, rows):
    texts = []
    for row in rows:
        texts.append([f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row])
    print(f"## {title}\n\n{markdown(columns, texts)}", flush=True)


# ---- The scan. All get u, delta, A, B, C, D, z, delta_bias, with delta before the softplus

CPU_SIZES = [               # batch, seqlen, dim, dstate
    (1, 16, 16, 4), (1, 64, 64, 16), (64, 1, 256, 16), (4, 128, 128, 16), (64, 31, 128, 16),
    (256, 17, 256, 16), (8, 512, 256, 16), (4, 2048, 512, 16),
]
MAX_SEQLEN = 256            # of the scan of transformers, which takes minutes beyond


def ours(*inputs):
    return scan_kernel.selective_scan(*inputs, delta_softplus=True)


def plain_loop(u, delta, A, B, C, D, z, delta_bias):
    """The recurrence one step after the other, under autograd."""
    u = u.mT
    dt = F.softplus(delta.mT + delta_bias)
    initial_state = u.new_zeros(u.size(0), A.size(1), A.size(0))
    y, _ = scan_kernel.scan_ref(dt * u, dt, A.T, B.mT, C.mT, initial_state)
    return ((y + D * u) * F.silu(z.mT)).mT


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias):
    """mambapy's pscan, from our layout and back."""
    from mambapy.mamba import MambaBlock
    dt = F.softplus(delta.mT + delta_bias)
    y = MambaBlock.selective_scan(None, u.mT, dt, A, B.mT, C.mT, D)
    return (y * F.silu(z.mT)).mT


def transformers_scan(u, delta, A, B, C, D, z, delta_bias):
    """The sequential path of transformers, which indexes the sequence at every step."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    return mamba_selective_scan(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True
    )


def scan_inputs(batch, seqlen, dim, dstate, device):
    """-> u, delta, A, B, C, D, z, delta_bias, in float32, channels last as the Mamba has them"""
    torch.manual_seed(0)

    def sequence(channels):
        return torch.randn(batch, seqlen, channels, device=device).mT

    A = -dstate * torch.rand(dim, dstate, device=device)
    D, delta_bias = torch.randn(2, dim, device=device)
    inputs = [
        sequence(dim), sequence(dim), A, sequence(dstate), sequence(dstate), D, sequence(dim),
        delta_bias
    ]
    return [x.detach().requires_grad_() for x in inputs]


def forward_and_backward(scan, inputs):
    y = scan(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)  # A, for one step


def print_scan(args):
    scans = {"ours": ours, "plain loop": plain_loop}
    for name, scan in (("mambapy", mambapy_scan), ("transformers", transformers_scan)):
        if is_installed(name):
            scans[name] = scan
    rows = []
    for size in CPU_SIZES:
        inputs = scan_inputs(*size, "cpu")
        expected = plain_loop(*inputs)
        calls = {}
        for name, scan in scans.items():
            if name == "transformers" and size[1] > MAX_SEQLEN:
                continue
            torch.testing.assert_close(scan(*inputs), expected, atol=1e-2, rtol=1e-3)
            calls[name] = partial(forward_and_backward, scan, inputs)
        ms = take_turns(calls, seconds=4)
        others = [ms[name] / ms["ours"] if name in ms else "-" for name in list(scans)[1:]]
        rows.append([size, ms["ours"], *others])
    columns = ["batch, seqlen, dim, dstate", "ours, ms", *list(scans)[1:]]
    threads = torch.get_num_threads()
    print_table(f"The scan, forward and backward, float32, {threads} threads", columns, rows)


# ---- The scan on a GPU, beside CUDA and beside other settings of our kernels

GPU_SIZES = [(256, 31, 1568, 16), (256, 247, 768, 16), (8, 2048, 1536, 16), (1, 8192, 1536, 16)]
EDITS = {                   # what stands in scan_kernel.py -> what takes its place
    "3 stages": {"in range(seqlen)": "in tl.range(seqlen, num_stages=3)"},
    "8 stages": {"in range(seqlen)": "in tl.range(seqlen, num_stages=8)"},
    "chunk 4": {"TRITON_CHUNK = 8": "TRITON_CHUNK = 4"},
    "chunk 4, 168 registers": {
        "TRITON_CHUNK = 8": "TRITON_CHUNK = 4",
        "num_warps=NUM_WARPS": "num_warps=NUM_WARPS, maxnreg=168",
    },
}


def mamba_ssm_scan(*inputs):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(*inputs, delta_softplus=True)


def edited_scan(edits, folder):
    """Our scan with some lines of its file changed."""
    text = Path(scan_kernel.__file__).read_text()
    for old, new in edits.items():
        if text.count(old) != 1:
            raise ValueError(f"{old!r} does not occur once in scan_kernel.py")
        text = text.replace(old, new)
    file = Path(folder) / f"scan_{abs(hash(text))}.py"          # Triton reads its kernels there
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return partial(module.selective_scan, delta_softplus=True)


def gpu_inputs(size, dtype):
    """-> inputs with channels last, as ours wants them, and with time last, as mamba_ssm does"""
    inputs = scan_inputs(*size, "cuda")
    for i in (0, 1, 3, 4, 6):                                   # u, delta, B, C, z
        inputs[i] = inputs[i].detach().to(dtype).requires_grad_()
    return inputs, [x.detach().contiguous().requires_grad_() for x in inputs]


def print_gpu(args):
    if not torch.cuda.is_available():
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scans = {"ours": ours}
        scans |= {name: edited_scan(edits, folder) for name, edits in EDITS.items()}
        if is_installed("mamba_ssm"):
            scans["mamba_ssm"] = mamba_ssm_scan
        for size, dtype in itertools.product(GPU_SIZES, (torch.float32, torch.bfloat16)):
            ours_inputs, cuda_inputs = gpu_inputs(size, dtype)
            expected = ours(*ours_inputs).float()
            forward, both = {}, {}
            for name, scan in scans.items():
                inputs = cuda_inputs if name == "mamba_ssm" else ours_inputs
                error = (scan(*inputs).float() - expected).norm() / expected.norm()
                if error > 0.01:
                    raise ValueError(f"{name} differs from ours by {error:.0%} at {size}, {dtype}")
                forward[name] = torch.no_grad()(partial(scan, *inputs))
                both[name] = partial(forward_and_backward, scan, inputs)
            forward["copy of u, delta, z"] = lambda: [ours_inputs[i].clone() for i in (0, 1, 6)]
            for what, calls in (("forward", forward), ("and backward", both)):
                ms = take_turns(calls, seconds=3)
                others = [ms[name] / ms["ours"] if name in ms else "-" for name in [*forward][1:]]
                rows.append([size, str(dtype)[6:], what, ms["ours"], *others])
    columns = ["batch, seqlen, dim, dstate", "dtype", "", "ours, ms", *[*forward][1:]]
    print_table(f"The scan, {torch.cuda.get_device_name()}", columns, rows)


# ---- A training step


def training_step(model, get_logits, targets):
    """-> a function that takes a step: forward, backward, AdamW"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad(set_to_none=True)
        logits = get_logits(model)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
        optimizer.step()

    return step


def batch_of(n):
    """-> inputs and targets of n graphs, teacher-forced"""
    args = argparse.Namespace(teacherless=False, reverse=False, only_first_hop=False)
    graphs = draw(STAR, n, np.random.default_rng(0))
    return train.inputs_and_targets(args, STAR, *train.prefixes_and_solutions(args, *graphs))


def mamba_steps():
    """-> {name: function that takes a step} for Mambas of the default size"""
    defaults = train.DEFAULTS["mamba"]
    n_layer = defaults["n_layer"] * defaults["n_loop"]          # theirs have no loop
    width, d_state = defaults["n_embd"], defaults["d_state"]
    idx, targets = batch_of(defaults["batch_size"])
    model = default_model("mamba", STAR)
    steps = {"ours": training_step(model, lambda model: model(idx)[0], targets)}
    if is_installed("transformers"):
        from transformers import MambaConfig, MambaForCausalLM
        model = MambaForCausalLM(MambaConfig(
            vocab_size=STAR.vocab_size, hidden_size=width, state_size=d_state,
            num_hidden_layers=n_layer, use_mambapy=False
        ))
        steps["transformers"] = training_step(model, lambda model: model(idx).logits, targets)
    if is_installed("mambapy"):
        from mambapy import mamba
        config = mamba.MambaConfig(d_model=width, n_layers=n_layer, d_state=d_state)
        model = torch.nn.Sequential(
            torch.nn.Embedding(STAR.vocab_size, width), mamba.Mamba(config),
            torch.nn.RMSNorm(width), torch.nn.Linear(width, STAR.vocab_size, bias=False)
        )
        steps["mambapy"] = training_step(model, lambda model: model(idx), targets)
    return steps


def gpt_steps(checkout):
    """-> {name: function that takes a step} for Transformers of the default size"""
    idx, targets = batch_of(train.DEFAULTS["gpt"]["batch_size"])

    def get_logits(model):
        return model(idx, targets)[0]  # without targets, nanoGPT gives the last logits only

    steps = {"ours": training_step(default_model("gpt", STAR), get_logits, targets)}
    if checkout is not None:
        spec = importlib.util.spec_from_file_location("nanogpt", Path(checkout) / "model.py")
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        size = {name: train.DEFAULTS["gpt"][name] for name in ("n_layer", "n_head", "n_embd")}
        size["n_layer"] *= train.DEFAULTS["gpt"]["n_loop"]
        with contextlib.redirect_stdout(io.StringIO()):         # it prints its size
            config = nanogpt.GPTConfig(idx.size(1), STAR.vocab_size, **size, dropout=0.0)
            model = nanogpt.GPT(config)
        steps["nanoGPT"] = training_step(model, get_logits, targets)
    return steps


def print_steps(args):
    torch.set_num_threads(1)
    rows = []
    for name, steps in (("Mamba", mamba_steps()), ("Transformer", gpt_steps(args.nanogpt))):
        ms = take_turns(steps, seconds=20)
        rows += [[name, code, t, t / ms["ours"]] for code, t in ms.items()]
    columns = ["default model", "code", "ms", "times as long as ours"]
    print_table("A training step of the default models, one thread", columns, rows)


# ---- Generation


@torch.no_grad()
def generate_without_cache(model, idx, max_new_tokens):
    for _ in range(max_new_tokens):
        logits, _ = model(idx)
        idx = torch.cat([idx, logits[:, -1:].argmax(dim=2)], dim=1)
    return idx


def print_generation(args):
    torch.set_num_threads(1)
    rows = []
    for star in (STAR, PathStar(20, 5, 100)):
        prefixes = torch.from_numpy(draw(star, 200, np.random.default_rng(0))[0])
        for name in ("gpt", "mamba"):
            model = default_model(name, star)
            n = star.path_len
            calls = {
                "cache": partial(model.generate, prefixes, n),
                "none": partial(generate_without_cache, model, prefixes, n),
            }
            ms = take_turns(calls, seconds=4)
            rates = [f"{1e3 * 200 * n / t:.0f}" for t in ms.values()]
            rows.append([name, star, *rates, ms["none"] / ms["cache"]])
    columns = ["model", "graph", "tokens per second", "without the cache", "ratio"]
    print_table("Greedy generation for 200 prefixes, one thread", columns, rows)


TABLES = {
    "scan": print_scan, "gpu": print_gpu, "steps": print_steps, "generation": print_generation
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", help="checkout of nanoGPT, for the table `steps`")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(
        f"Of {datetime.date.today()}, at commit {train.commit()}: {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}.\n"
    )
    for name in args.only:
        TABLES[name](args)


if __name__ == "__main__":
    run_script(main)
