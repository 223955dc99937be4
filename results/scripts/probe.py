"""When does a teacherless model know which node? A table, as Markdown.

    python results/scripts/reproduce.py default/mamba-teacherless-seed0
    python results/scripts/probe.py out/reproduce/default/mamba-teacherless-seed0

After each pass of the layers, a least-squares map from the residual stream at one position to a
node is fitted on 4,000 graphs. The cell is the share of 1,000 other graphs in which the map finds
the node, at the position where it does so most often. A position is named after the node that it
has to predict. Graphs come from a stream of random numbers that no training has. (What the model
answers after each pass, sample.py says.)
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F

from tables import Log, markdown
from data import draw                                           # tables.py makes these importable
from train import load_checkpoint, prefixes_and_solutions

N_FIT, N_TEST = 4000, 1000


def graphs(args, star):
    """-> inputs (n, T), and nodes (n, path_len) in the order of writing"""
    rng = np.random.default_rng([args.seed, 5])
    prefixes, nodes = prefixes_and_solutions(args, *draw(star, N_FIT + N_TEST, rng))
    return torch.cat([prefixes, torch.full_like(nodes[:, 1:], star.dollar)], dim=1), nodes


def share_found(x, node):
    """In how many of the test graphs a linear map finds the node (n,) in x (n, width)."""
    x = F.pad(x, (0, 1), value=1.0)                             # for the constant of the map
    targets = F.one_hot(node).to(x.dtype)
    weight = torch.linalg.lstsq(x[:N_FIT], targets[:N_FIT]).solution
    return ((x[N_FIT:] @ weight).argmax(dim=1) == node[N_FIT:]).double().mean().item()


def maps(names, model, inputs, nodes):
    layers = model.transformer.h if hasattr(model, "transformer") else model.backbone.layers
    streams = []                                                # after each pass

    def keep(layer, inputs, output):
        streams.append(output[0][:, -len(names):])

    layers[-1].register_forward_hook(keep)
    model(inputs)
    rows = []
    for n, x in enumerate(streams, start=1):
        cells = []
        for node in nodes.unbind(1):
            best = max((share_found(x[:, i], node), -i) for i in range(len(names)))
            cells.append(f"{best[0]:.0%}, at {names[-best[1]]}")
        rows.append([n, *cells])
    return rows


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", help="of teacherless runs")
    for folder in parser.parse_args().folders:
        ckpt, args, star, model = load_checkpoint(folder)
        log, data = Log(folder, ckpt["header"], ckpt["lines"]), graphs(args, star)
        print(f"`{log.command}`, seed {args.seed}, step {log.end['iter']:,}\n")
        names = ["start", *[f"hop {i}" for i in range(1, star.path_len - 1)], "goal"]
        names = names[::-1] if args.reverse else names
        print(markdown(["after pass", *names], maps(names, model, *data)))


if __name__ == "__main__":
    main()
