"""Where in the stack does a teacherless model know which node? Linear probes, as Markdown.

    python results/reproduce.py default/mamba-teacherless-seed0
    python results/probe.py out/reproduce/default/mamba-teacherless-seed0

A cell belongs to a layer, a node of the path and a position of the input. A least-squares map from
the residual stream after this layer, at this position, to the node is fitted on 4,000 new graphs.
The cell is the share of 2,000 other graphs in which the map finds the node.

The position "at start" is the one that has to predict the start, the last token of the prefix. The
position "at hop 1" is the first $, and so on. Training asks for a node at its own position only.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import draw, run_script  # noqa: E402
from tables import markdown  # noqa: E402
from train import inputs_and_targets, load_checkpoint, prefixes_and_solutions  # noqa: E402

N_FIT, N_TEST = 4000, 2000


@torch.no_grad()
def residual_streams(model, idx):
    """The residual stream after each layer -> a list of (n, T, width)"""
    streams = []

    def keep(layer, inputs, output):
        x, _ = output  # the other one is a cache or a state
        streams.append(x)

    layers = model.transformer.h if hasattr(model, "transformer") else model.backbone.layers
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    model(idx)
    for hook in hooks:
        hook.remove()
    return streams


def probe(x, nodes, vocab_size):
    """The share of the test graphs whose node a linear map finds in x (n, width)."""
    x = F.pad(x, (0, 1), value=1.0)                             # for the constant of the map
    targets = F.one_hot(nodes, vocab_size).to(x.dtype)
    weight = torch.linalg.lstsq(x[:N_FIT], targets[:N_FIT]).solution
    found = (x[N_FIT:] @ weight).argmax(dim=1)
    return (found == nodes[N_FIT:]).double().mean().item()


def probes(args, star, model):
    """-> the table of a run, in Markdown"""
    hops = [f"hop {i}" for i in range(1, star.path_len - 1)]
    graphs = draw(star, N_FIT + N_TEST, np.random.default_rng(99))
    prefixes, solutions = prefixes_and_solutions(args, *graphs)
    inputs, _ = inputs_and_targets(args, star, prefixes, solutions)
    rows = []
    for layer, x in enumerate(residual_streams(model, inputs), start=1):
        x = x[:, prefixes.size(1) - 1:]                         # (n, path_len, width)
        for node, name in enumerate(hops, start=1):
            row = [layer, name]
            for position in range(star.path_len - 1):
                share = probe(x[:, position], solutions[:, node], star.vocab_size)
                row.append(f"{share:.0%}")
            rows.append(row)
    return markdown(["after layer", "node", *[f"at {name}" for name in ["start", *hops]]], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", help="of teacherless runs")
    for folder in parser.parse_args().folders:
        try:
            ckpt, args, star, model = load_checkpoint(folder)
            if not args.teacherless or args.reverse:
                raise ValueError(f"{folder} is not teacherless, from start to goal")
        except (OSError, ValueError) as error:
            sys.exit(f"probe.py: {error}")
        end = ckpt["lines"][-1]
        accuracy = f"{end['accuracy']:.1%}"
        print(f"{args.model}, seed {args.seed}, step {end['iter']}, accuracy {accuracy}\n")
        print(probes(args, star, model), flush=True)


if __name__ == "__main__":
    run_script(main)
