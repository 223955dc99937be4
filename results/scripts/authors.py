"""Trains the authors' Transformer and ours side by side, from the same weights.

    pip install transformers tqdm pandas
    git clone https://github.com/gregorbachmann/Next-Token-Failures
    python results/authors.py Next-Token-Failures > results/authors.md

The settings are those of the command in their README: deg 2, path length 5, 50 names, 6 layers,
width 384, 6 heads, batch 256, learning rate 1e-4. Both sides read the same file, in the authors'
format, each with its own tokenizer. A step of theirs is the body of their training loop. A step of
ours is that of train.py without clipping of gradients, which theirs does not do.
"""
import argparse
import contextlib
import datetime
import io
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from data import PathStar, batch_indices, datasets, draw, run_script, to_text  # noqa: E402
from model_gpt import GPT, GPTConfig  # noqa: E402
from tables import markdown  # noqa: E402
from train import (  # noqa: E402
    commit, inputs_and_targets, make_optimizer, prefixes_and_solutions
)

STEPS, BATCH, LR = 30, 256, 1e-4
OUR_NAMES = {
    "embed_tokens": "transformer.wte",
    "pos_encoding": "transformer.wpe",
    "final_layernorm": "transformer.ln_f",
    "layers": "transformer.h",
    "attn.proj": "attn.c_proj",
    "mlp.expand": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}


def write_graphs(file, star, n, seed):
    """Writes a file of n graphs in text form, which is the authors' form."""
    prefixes, paths = draw(star, n, np.random.default_rng(seed))
    with open(file, "w") as lines:
        for prefix, path in zip(prefixes.tolist(), paths.tolist()):
            print(to_text(prefix, path), file=lines)


def converted(their_weights):
    """Their state dict under our names, with queries, keys and values stacked into one matrix."""
    weights = {}
    for their_name, value in their_weights.items():
        name = their_name
        for old, new in OUR_NAMES.items():
            name = name.replace(old, new)
        if "queries_linear" in name:
            parts = []
            for part in ("queries", "keys", "values"):
                parts.append(their_weights[their_name.replace("queries", part)])
            weights[name.replace("queries_linear", "c_attn")] = torch.cat(parts)
        elif "_linear" not in name:
            weights[name] = value
    return weights


def build_theirs(checkout, file):
    """-> their model, their data set, their learning rate as a function of the step"""
    del sys.modules["data"]                                     # they have a module of this name
    sys.path.insert(0, checkout)
    from data.graphs import Graphs
    from models import get_model
    from tokenizing import get_tokenizer
    from utils.training_utils import get_lr
    args = argparse.Namespace(model="gpt", n_layer=6, n_head=6, n_embd=384, use_flash=False)
    args.num_nodes, args.teacherless_token = 50, None
    tokenizer = get_tokenizer(args)
    data = Graphs(tokenizer, STEPS * BATCH, file, "cpu", teacherless_token=None)
    args.block_size = data.num_tokens
    args.vocab_size = tokenizer.vocab_size
    model = get_model(args)

    def lr_at(step):
        return get_lr(step + 1, LR, 100, 10 ** 6, 1e-5)         # their first step would have 0

    return model, data, lr_at


def train_both(checkout):
    """-> (their loss, our loss) for each step, and the seconds of their steps and of ours"""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "train.txt"
        write_graphs(file, PathStar(2, 5, 50), STEPS * BATCH, seed=0)
        star, train_set, _ = datasets(2, 5, 50, None, 1, 0, train_file=file)
        theirs, their_data, lr_at = build_theirs(checkout, file)

    settings = argparse.Namespace(
        teacherless=False, reverse=False, only_first_hop=False, lr=LR, weight_decay=0.0
    )
    prefixes_and_paths = prefixes_and_solutions(settings, *train_set)
    inputs, targets = inputs_and_targets(settings, star, *prefixes_and_paths)
    ours = GPT(GPTConfig(their_data.num_tokens, star.vocab_size, n_layer=6, n_head=6, n_embd=384))
    ours.load_state_dict(converted(theirs.state_dict()))
    our_optimizer = make_optimizer(ours, settings)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.0)

    losses, their_seconds, our_seconds = [], [], []
    for step in range(STEPS):
        for group in their_optimizer.param_groups + our_optimizer.param_groups:
            group["lr"] = lr_at(step)
        indices = batch_indices(len(inputs), BATCH, 0, step).tolist()
        x = torch.stack([their_data[i][0] for i in indices])
        y = torch.stack([their_data[i][1] for i in indices])
        if not torch.equal(x, inputs[indices]) or not torch.equal(y, targets[indices]):
            sys.exit("authors.py: the batches differ")

        start = time.perf_counter()
        _, their_loss, _ = theirs(x, y)
        their_loss_value = their_loss.item()
        their_loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad(set_to_none=True)
        their_seconds.append(time.perf_counter() - start)

        start = time.perf_counter()
        _, our_loss = ours(inputs[indices], targets[indices])
        our_optimizer.zero_grad(set_to_none=True)
        our_loss.backward()
        our_optimizer.step()
        our_seconds.append(time.perf_counter() - start)
        losses.append((their_loss_value, our_loss.item()))
    return losses, their_seconds, our_seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", help="of the authors' repository")
    losses, their_seconds, our_seconds = train_both(parser.parse_args().checkout)
    theirs, ours = statistics.median(their_seconds), statistics.median(our_seconds)
    difference = max(abs(their_loss - our_loss) / their_loss for their_loss, our_loss in losses)
    print(
        f"Made by `python results/authors.py Next-Token-Failures` on {datetime.date.today()}, at "
        f"commit {commit()}:\n{platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, seed 0.\n\n"
        f"A step of theirs takes {1000 * theirs:.0f} ms, a step of ours {1000 * ours:.0f} ms "
        f"(medians, taking turns): {theirs / ours:.2f} times as long.\n"
        f"The losses, in float32, differ by {difference:.1e} of the loss at most:\n"
    )
    rows = []
    for step, (their_loss, our_loss) in enumerate(losses, start=1):
        rows.append([step, f"{their_loss:.7f}", f"{our_loss:.7f}"])
    print(markdown(["step", "theirs", "ours"], rows), end="")


if __name__ == "__main__":
    run_script(main)
