"""Shows what a trained model does: its answers to a few graphs, and how often it is right on many.

    python sample.py --out_dir out/...                     on graphs drawn anew
    python sample.py --out_dir out/... --file graphs.txt   on graphs in text form, see data.py
    python sample.py --out_dir out/... --prompt "0,1|2,3|1,4|0,2/0,4="

For each graph it prints
- the arms, the right one first, with the probability that the model gives to setting out on each;
- the model's answer, and how sure it is of each node;
- what it predicts when it is forced, that is, when it reads the true nodes before each place.
"""
import argparse
import json
import os
import sys
import time

import numpy as np
import torch

from data import (
    draw, edges_of, find_arms, non_negative_int, parse_line, positive_int, prefix_tokens,
    read_graphs
)
from train import (
    from_start, load_checkpoint, non_negative_float, predict, probabilities, prompts_and_targets,
    summary, verdict
)

GREEN, RED, FAINT = 32, 31, 2  # terminal colours


def get_graphs(args, star):
    """The graphs that the flags ask for -> prefixes (n, prefix_len), paths (n, path_len)"""
    if args.file is not None:
        edges, paths = read_graphs(args.file, None, star.deg, star.path_len, star.num_nodes)
        edges, paths = edges[:args.num_graphs], paths[:args.num_graphs]
    elif args.prompt is not None:
        edges, path = parse_line(args.prompt.strip(), star.deg, star.path_len, star.num_nodes)
        edges, paths = np.array([edges]), np.array([path])
    else:
        return draw(star, args.num_graphs, np.random.default_rng([args.seed, 4]))
    return prefix_tokens(star, edges, paths), paths


def explain(path, arms, answer, forced, p):
    """One graph and what the model makes of it -> a dict for JSON

    path, arms, answer and forced (or None) are lists of tokens, p (places, tokens) has the
    probabilities, all in the order from start to goal.
    """
    arms = sorted(arms, key=lambda arm: arm != path)        # the right one first
    leaves_at = None
    for place, node in enumerate(answer):
        if node != path[place]:
            leaves_at = place
            break
    return {
        "path": path,
        "arms": arms,
        "first_hop": [p[1, arm[1]].item() for arm in arms],
        "answer": answer,
        "sure": [p[place, token].item() for place, token in enumerate(answer)],
        "forced": forced,
        "leaves_at": leaves_at,
        "real_arm": is_arm(answer, arms),
    }


def is_arm(answer, arms):
    """Whether the answer walks one of the arms, right or wrong."""
    return any(answer == arm[:len(answer)] for arm in arms)


def colored(text, color):
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{color}m{text}\033[0m"
    return text


def print_nodes(label, nodes, path, pause=0.0):
    """Prints nodes in a row. Those that are not on the path are red, in brackets."""
    print(f"{label:>8}", end="")
    for place, node in enumerate(nodes):
        right = node == path[place]
        text = str(node) if right else f"[{node}]"
        arrow = " ->" if place > 0 else ""
        print(arrow + colored(f"{text:>5}", GREEN if right else RED), end="", flush=True)
        time.sleep(pause)
    print()


def show(graph, pause):
    """Prints what `explain` returns. Waits `pause` seconds at each node of the answer."""
    path = graph["path"]
    print(f"P(hop 1)    from {path[0]} to {path[-1]}")
    for arm, p in zip(graph["arms"], graph["first_hop"]):
        nodes = " ->".join(f"{node:>5}" for node in arm)
        print(f"{p:8.1%}" + colored(nodes, GREEN if arm == path else FAINT))
    print_nodes("answer", graph["answer"], path, pause)
    print(f"{'sure':>8}" + "   ".join(f"{share:5.0%}" for share in graph["sure"]))
    if graph["forced"] is not None:
        print_nodes("forced", graph["forced"], path)
    place = graph["leaves_at"]
    answer = "right"
    if place is not None:
        answer = f"wrong: leaves the path at node {place + 1}, where {path[place]} is right"
        if graph["real_arm"]:
            answer += ", and walks another arm"
    print(f"        {answer}\n")


def print_result(result, run, star, n):
    print(f"{run.model} on {n} graphs {star}, tokens in the order in which they are written")
    print(f"path accuracy     {result['accuracy']:7.1%}   (guessing an arm: {1 / star.deg:.1%})")
    source = "from the prefix alone" if run.teacherless else "from its own tokens"
    for label, key, phase in (
        ("node accuracy", "node_accuracy", source),
        ("", "forced_node_accuracy", "from the true tokens"),
    ):
        if result[key] is not None:
            shares = "".join(f" {share:7.1%}" for share in result[key])
            print(f"{label:17}{shares}   {phase}")
    if result["cheat_accuracy"] is not None and not run.reverse:
        share = result["cheat_accuracy"]
        print(f"cheat accuracy    {share:7.1%}   all later nodes right, given the true ones before")
    print(f"a real arm        {result['real_arm']:7.1%}   of the answers, wrong arms included")
    print(result["verdict"])


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out_dir", required=True, help="folder of the run")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--file", help="take the graphs from this file")
    source.add_argument("--prompt", help="take this graph: its edges, start and goal")
    add("--num_graphs", type=positive_int, default=1000, help="graphs to judge the model on")
    add("--show", type=non_negative_int, default=3, help="graphs to print")
    add("--seed", type=non_negative_int, default=0, help="of the graphs drawn")
    add("--pause", type=non_negative_float, default=0.0, help="seconds to wait at each node")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    try:
        _, run, star, model = load_checkpoint(args.out_dir)
        prefixes, paths = get_graphs(args, star)
    except (ValueError, OSError, MemoryError) as error:
        parser.error(" ".join(str(error).split()))

    prompts, targets = prompts_and_targets(run, prefixes, paths)
    dollar = star.dollar if run.teacherless else None
    answers, forced = predict(model, prompts, targets, dollar)
    result = summary(answers, forced, targets)
    shown = slice(args.show)
    p = probabilities(run, model, prompts[shown], answers[shown], dollar)
    answers = from_start(run, answers).tolist()
    if forced is None:
        forced = [None] * len(paths)
    else:
        forced = from_start(run, forced).tolist()
    prefixes, paths = prefixes.tolist(), paths.tolist()
    graphs = []
    real_arms = 0
    for i, prefix in enumerate(prefixes):
        start = prefix[-3]
        arms = find_arms(edges_of(prefix), start)
        real_arms += is_arm(answers[i], arms)
        if i < args.show:
            graphs.append(explain(paths[i], arms, answers[i], forced[i], p[i]))
    result["real_arm"] = real_arms / len(paths)
    result["verdict"] = verdict(result, run, len(paths))
    if args.json:
        print(json.dumps({**result, "num_graphs": len(paths), "graphs": graphs}))
        return
    for graph in graphs:
        show(graph, args.pause)
    print_result(result, run, star, len(paths))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # as in `python sample.py ... | head`
        sys.stderr.close()
