"""Trains the authors' Transformer and ours side by side, from the same weights.

    pip install transformers tqdm pandas
    git clone https://github.com/gregorbachmann/Next-Token-Failures
    python results/scripts/authors.py Next-Token-Failures

The settings are those of the command in their README: deg 2, path length 5, 50 names, 6 layers,
width 384, 6 heads, batch 256, learning rate 1e-4. They read the graphs from a file, with their
tokenizer. A step is the body of their training loop, that of train.py without clipping.
"""
import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tables import markdown
from data import PathStar, batch_indices, draw, to_text         # tables.py makes these importable
from model_gpt import GPT, GPTConfig
from train import inputs_and_targets

STEPS, BATCH, LR = 30, 256, 1e-4
STAR = PathStar(2, 5, 50)
OUR_NAMES = {
    "embed_tokens": "transformer.wte", "pos_encoding": "transformer.wpe",
    "final_layernorm": "transformer.ln_f", "layers": "transformer.h",
    "attn.proj": "attn.c_proj", "mlp.expand": "mlp.c_fc", "mlp.proj": "mlp.c_proj",
}


def converted(their_weights):
    """Their state dict under our names, with queries, keys and values stacked into one matrix."""
    weights = {}
    for their_name, value in their_weights.items():
        name = their_name
        for old, new in OUR_NAMES.items():
            name = name.replace(old, new)
        if "queries_linear" in name:
            names = [their_name.replace("queries", part) for part in ("queries", "keys", "values")]
            value = torch.cat([their_weights[name] for name in names])
            name = name.replace("queries_linear", "c_attn")
        if "_linear" not in name:
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
    args.block_size, args.vocab_size = data.num_tokens, tokenizer.vocab_size

    def lr_at(step):
        return get_lr(step + 1, LR, 100, 10 ** 6, 1e-5)         # their first step would have 0

    return get_model(args), data, lr_at


def train_both(checkout):
    """-> (their loss, our loss) for each step"""
    torch.manual_seed(0)
    prefixes, paths = draw(STAR, STEPS * BATCH, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "train.txt"
        lines = [to_text(*graph) for graph in zip(prefixes.tolist(), paths.tolist())]
        file.write_text("".join(line + "\n" for line in lines))
        theirs, their_data, lr_at = build_theirs(checkout, file)
    inputs, targets = inputs_and_targets(STAR, *map(torch.from_numpy, (prefixes, paths)), False)
    ours = GPT(GPTConfig(their_data.num_tokens, STAR.vocab_size, n_layer=6, n_head=6, n_embd=384))
    ours.load_state_dict(converted(theirs.state_dict()))
    optimizers = [torch.optim.AdamW(m.parameters(), weight_decay=0.0) for m in (theirs, ours)]
    losses = []
    for step in range(STEPS):
        rows = batch_indices(len(inputs), BATCH, 0, step).tolist()
        x, y = (torch.stack(column) for column in zip(*[their_data[i] for i in rows]))
        if not torch.equal(x, inputs[rows]) or not torch.equal(y, targets[rows]):
            sys.exit("authors.py: the batches differ")
        losses.append([])
        for model, optimizer in zip((theirs, ours), optimizers):
            optimizer.param_groups[0]["lr"] = lr_at(step)
            loss = model(x, y)[1]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", help="of the authors' repository")
    losses = train_both(parser.parse_args().checkout)
    rows = [[step, *[f"{loss:.7f}" for loss in pair]] for step, pair in enumerate(losses, start=1)]
    print(markdown(["step", "loss of theirs", "loss of ours"], rows))
    gap = max(abs(theirs - ours) / theirs for theirs, ours in losses)
    print(f"The losses differ by {gap:.1e} of the loss at most.")


if __name__ == "__main__":
    main()
