"""Shows what a trained model does: its answers to a few graphs, node by node, and how often it is right on many.

    python sample.py --out_dir out/...                     on graphs drawn anew
    python sample.py --out_dir out/... --file graphs.txt   on graphs in text form (data.py), as `python data.py` prints them
    python sample.py --out_dir out/... --prompt "0,1|2,3|1,4|0,2/0,4="

Of each graph it prints the arms, the path first, with the probability that the model gives to setting out on each; the
model's answer, and how sure it was of each node; and what it says when it is forced, that is reads the true nodes before.
"""
import json
import os
import shutil
import sys
import textwrap
import time

import numpy as np
import torch

from data import Flags, assemble, draw, parse_line, read_graphs, verdict, walk_arms
from train import load_run, model_input, predict, prompts_and_targets, summary

GREEN, RED, FAINT = "32", "31", "2"        # terminal colours


def graphs_from(args, star):
    """The graphs that were asked for -> prefixes (n, prefix_len), paths (n, path_len)"""
    size = star.deg, star.path_len, star.num_nodes
    if args.file is not None:
        edges, paths = (x[:args.num_graphs] for x in read_graphs(args.file, None, *size))
    elif args.prompt is not None:
        edges, paths = (np.array([x]) for x in parse_line(args.prompt.strip(), *size))
    else:
        return draw(star, args.num_graphs, np.random.default_rng([args.seed, 4]))
    return assemble(star, edges[:, :, 0], edges[:, :, 1], paths), paths


def explain(arms, path, answer, sure, forced, first_hop):
    """One graph and what the model made of it, a dict that `show` prints and --json writes; all from start to goal.

    arms: lists of nodes, path one of them; answer: the model's nodes; sure: the probability it gave each of them; forced:
    its nodes when it reads the true ones (or None); first_hop: what it gives each token as the node after the start.
    """
    arms = sorted(arms, key=lambda arm: arm != path)
    wrong = next((i for i, (a, b) in enumerate(zip(answer, path)) if a != b), None)
    return {"path": path, "arms": arms, "first_hop": [first_hop[arm[1]] for arm in arms], "answer": answer, "sure": sure,
            "forced": forced, "leaves_at": wrong, "real_arm": answer in [arm[:len(answer)] for arm in arms]}


def show(graph, columns=80, color=False, pause=0.0):
    """Prints what `explain` returned in lines of at most `columns` characters; waits `pause` seconds for each node."""
    path, wrong = graph["path"], graph["leaves_at"]

    def row(label, cells, code=None, arrow=" ->"):
        a_line = max(1, (columns - 8) // 8)
        for i, cell in enumerate(cells):
            print((f"\n{'':8}" if i else f"{label:>8}") if i % a_line == 0 else arrow, end="")
            ok = i >= len(path) or cell == path[i]
            cell = f"{cell if ok or code else f'[{cell}]':>5}"
            print(f"\033[{code or (GREEN if ok else RED)}m{cell}\033[0m" if color else cell, end="", flush=True)
            time.sleep(pause if label == "answer" else 0)
        print()

    print(f"P(hop 1)    from {path[0]} to {path[-1]}")
    for arm, p in zip(graph["arms"], graph["first_hop"]):
        row(f"{p:.1%}", arm, GREEN if arm == path else FAINT)
    row("answer", graph["answer"])
    row("sure", [f"{p:.0%}" for p in graph["sure"]], FAINT, arrow="   ")
    if graph["forced"] is not None:
        row("forced", graph["forced"])
    words = "right" if wrong is None else (f"wrong: leaves the path at node {wrong + 1}, where {path[wrong]} is right"
                                           + (", and walks another arm" if graph["real_arm"] else ""))
    print(textwrap.fill(words, max(20, columns), initial_indent=" " * 8, subsequent_indent=" " * 8))


@torch.no_grad()
def main():
    flags = Flags(__doc__)
    flags.add_argument("--out_dir", required=True, help="folder of the run")
    flags.add_argument("--num_graphs", type=int, default=1000, help="graphs to judge the model on")
    flags.add_argument("--show", type=int, default=3, help="graphs to print")
    flags.add_argument("--seed", type=int, default=0, help="of the graphs drawn")
    flags.add_argument("--pause", type=float, default=0.0, help="seconds to wait at each node, to watch the model walk")
    flags.add_argument("--json", action="store_true", help="print one JSON object instead")
    source = flags.add_mutually_exclusive_group()
    source.add_argument("--file", help="take the graphs from this file")
    source.add_argument("--prompt", help="take this graph: its edges, start and goal")
    args = flags.parse_args()
    if min(args.num_graphs - 1, args.show, args.seed) < 0 or not 0 <= args.pause < 60:
        flags.error("--num_graphs must be at least 1, --show and --seed not negative, --pause from 0 to 60")
    try:
        ckpt, star, model = load_run(args.out_dir)
        prefixes, paths = graphs_from(args, star)
    except (ValueError, OSError, MemoryError) as error:
        flags.error(str(error))
    config = ckpt["config"]

    prompts, targets = prompts_and_targets(config, prefixes, paths)
    dollar = star.dollar if config["teacherless"] else None
    own, forced = predict(model, prompts, targets, dollar)
    logits, _ = model(model_input(prompts[:args.show], own[:args.show], dollar), all_logits=True)
    given = logits[:, prompts.size(1) - 1:].softmax(dim=2)           # what it gives each token, reading its own before
    sure = given.gather(2, own[:args.show, :, None])[:, :, 0]
    answers, forced_answers = own, forced                            # as written; from here on, from start to goal
    if config["reverse"]:
        answers, forced_answers, sure, given = (None if x is None else x.flip(1) for x in (own, forced, sure, given))
    if config["only_first_hop"]:                                     # the start is part of the prompt
        answers, forced_answers = torch.cat([prompts[:, -1:], own], dim=1), None
        sure = torch.cat([torch.ones_like(sure), sure], dim=1)
    first_hop = given[:, 0 if config["only_first_hop"] else 1].tolist()
    graph_arms = [walk_arms(list(zip(row[0:-3:3], row[1:-3:3])), row[-3]) for row in prefixes.tolist()]
    graphs = [explain(*graph) for graph in zip(graph_arms, paths.tolist(), answers.tolist(), sure.tolist(),
              [None] * len(paths) if forced_answers is None else forced_answers.tolist(), first_hop)]
    is_arm = [answer in [arm[:len(answer)] for arm in arms] for arms, answer in zip(graph_arms, answers.tolist())]
    result = {**summary(own, forced, targets), "real_arm": sum(is_arm) / len(is_arm), "chance": 1 / star.deg}
    says = verdict(result, config | {"n_test": len(paths)}) if len(paths) >= 100 else None      # fewer tell nothing
    if args.json:
        print(json.dumps({"out_dir": args.out_dir, "num_graphs": len(paths), **result, "verdict": says, "graphs": graphs}))
        return
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for graph in graphs:
        show(graph, shutil.get_terminal_size().columns, color, args.pause)
        print()

    print(f"{config['model']} on {len(paths)} graphs {star}, tokens in the order in which they are written")
    print(f"path accuracy     {result['accuracy']:7.1%}   (guessing an arm: {1 / star.deg:.1%})")
    print("node accuracy    ", *(f"{share:7.1%}" for share in result["node_accuracy"]), "  from its own tokens")
    if forced is not None:
        print("                 ", *(f"{share:7.1%}" for share in result["forced_node_accuracy"]), "  from the true tokens")
    if result["cheat_accuracy"] is not None:
        print(f"cheat accuracy    {result['cheat_accuracy']:7.1%}   all later nodes right, given the true ones before")
    print(f"a real arm        {result['real_arm']:7.1%}   of the answers, the wrong arm included")
    if says:
        print(says)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                # the reader, `head` say, has seen enough
        sys.stderr.close()
