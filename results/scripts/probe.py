"""Looks into teacherless models: three tables, as Markdown.

    python results/reproduce.py default/mamba-teacherless-seed0
    python results/probe.py out/reproduce/default/mamba-teacherless-seed0

1. When does the model know which node? A row belongs to a node of the path, and to the residual
   stream after so many applications of a layer; a column to a position of the input. A
   least-squares map from the stream at this position to the node is fitted on 4,000 random graphs.
   The cell is the share of 2,000 other graphs in which the map finds the node. The position "at
   start" is the one that has to predict the start. Training asks for a node at its own position
   only.
2. Which position needs the answer of which? A row belongs to a position. There, after each run of
   the layers, the residual stream is exchanged for that of another graph. The cell is the share of
   1,000 random graphs in which a node is still right.
3. How many paths are right if the layers run more or less often than in training, on paths of this
   length and on shorter ones? On 1,000 random graphs, with as many arms and names as in training.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import PathStar, draw, run_script  # noqa: E402
from tables import Log, markdown  # noqa: E402
from train import (  # noqa: E402
    flip_if_reversed, inputs_and_targets, load_checkpoint, predict, prefixes_and_solutions, summary
)

N_FIT, N_TEST = 4000, 2000


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.backbone.layers


def names_of_places(args, star):
    """The nodes of a path, in the order in which they are written."""
    names = ["start", *[f"hop {i}" for i in range(1, star.path_len - 1)], "goal"]
    return names[::-1] if args.reverse else names


@torch.no_grad()
def residual_streams(model, idx):
    """The residual stream after each run of a layer -> a list of (n, T, width)"""
    streams = []

    def keep(layer, inputs, output):
        x, _ = output  # the other one is a cache or a state
        streams.append(x)

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
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
    """-> the first table of a run"""
    names = names_of_places(args, star)[:-1]
    graphs = draw(star, N_FIT + N_TEST, np.random.default_rng(99))
    prefixes, solutions = prefixes_and_solutions(args, *graphs)
    inputs, _ = inputs_and_targets(args, star, prefixes, solutions)
    rows = []
    for applied, x in enumerate(residual_streams(model, inputs), start=1):
        x = x[:, prefixes.size(1) - 1:]                         # (n, path_len, width)
        for node in range(1, len(names)):
            row = [applied, names[node]]
            for position in range(len(names)):
                share = probe(x[:, position], solutions[:, node], star.vocab_size)
                row.append(f"{share:.0%}")
            rows.append(row)
    return markdown(["applied", "node", *[f"at {name}" for name in names]], rows)


def exchanges(args, star, model):
    """-> the second table of a run"""
    names = names_of_places(args, star)
    graphs = draw(star, 1000, np.random.default_rng(97))
    prefixes, solutions = prefixes_and_solutions(args, *graphs)
    rows = []
    for place, name in enumerate(names[:-1]):
        position = prefixes.size(1) - 1 + place

        def exchange(layer, inputs, output):
            x, state = output
            x[:, position] = x[:, position].roll(1, dims=0)     # that of the graph before
            return x, state

        hook = layers_of(model)[-1].register_forward_hook(exchange)
        answers, _, _ = predict(args, star, model, prefixes, solutions)
        hook.remove()
        right = flip_if_reversed(args, answers) == solutions
        rows.append([name, *[f"{share:.0%}" for share in right.double().mean(dim=0)]])
    return markdown(["exchanged at", *names], rows)


def other_lengths(args, star, model):
    """-> the third table of a run"""
    loops = range(1, 2 * args.n_loop + 1)
    rows = []
    for path_len in range(3, star.path_len + 1):
        other = PathStar(star.deg, path_len, star.num_nodes)
        graphs = draw(other, 1000, np.random.default_rng(98))
        row = [path_len]
        for n_loop in loops:
            model.config.n_loop = n_loop
            answers, _, _ = predict(args, other, model, *prefixes_and_solutions(args, *graphs))
            share = summary(args, answers, None, graphs[1])["accuracy"]
            row.append(f"{share:.0%}")
        rows.append(row)
    model.config.n_loop = args.n_loop
    return markdown(["nodes of the path", *[f"{n} x" for n in loops]], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", help="of teacherless runs")
    for folder in parser.parse_args().folders:
        try:
            ckpt, args, star, model = load_checkpoint(folder)
            if not args.teacherless:
                raise ValueError(f"{folder} is not teacherless")
        except (OSError, ValueError) as error:
            sys.exit(f"probe.py: {error}")
        log = Log(Path(folder), ckpt["header"], ckpt["lines"])
        end = f"step {log.end['iter']:,}, accuracy {log.end['accuracy']:.1%}"
        print(f"`{log.command}`, seed {args.seed}, {end}\n")
        print(probes(args, star, model), flush=True)
        print(exchanges(args, star, model), flush=True)
        print(other_lengths(args, star, model), flush=True)


if __name__ == "__main__":
    run_script(main)
