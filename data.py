"""The path-star task (Bachmann & Nagarajan 2024, arXiv 2403.06963, figure 1).

A path-star graph G(deg, path_len) has a start node with `deg` arms. Each arm, with the start, is a
path of `path_len` nodes. Nodes carry different names, drawn from 0 .. num_nodes - 1. The last node
of one arm is the goal. The task: given the edges in random order, the start and the goal, write
the path from start to goal.

As text, one graph a line:  32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12

As tokens: node k is k, `|` is num_nodes, `=` is num_nodes + 1, `/` is num_nodes + 2. Commas are
not tokens. `$` is num_nodes + 3: it stands in for target tokens in teacherless training. All up to
and with `=` is the prefix, 3 deg (path_len - 1) + 3 tokens. The path, path_len tokens, follows it.

    python data.py --deg 2 --path_len 5 --num_nodes 10 -n 3 --seed 0        prints three graphs
"""
import argparse
import errno
import functools
import math
import os
import re
import sys

import numpy as np


class PathStar:
    """The sizes of a path-star graph, and its token ids.

    Raises ValueError where no such graph exists.
    """

    def __init__(self, deg, path_len, num_nodes):
        if deg < 1 or path_len < 2:
            raise ValueError(f"deg must be at least 1 and path_len 2, got {deg} and {path_len}")
        self.deg = deg
        self.path_len = path_len
        self.num_nodes = num_nodes
        self.n_edges = deg * (path_len - 1)
        if num_nodes < self.n_edges + 1:
            raise ValueError(
                f"num_nodes must be at least {self.n_edges + 1}, the nodes of a graph with "
                f"deg {deg} and path_len {path_len}, got {num_nodes}"
            )
        self.prefix_len = 3 * self.n_edges + 3
        self.pipe = num_nodes
        self.equals = num_nodes + 1
        self.slash = num_nodes + 2
        self.dollar = num_nodes + 3
        self.vocab_size = num_nodes + 4

    def __str__(self):
        return f"G({self.deg},{self.path_len}) with {self.num_nodes} names"

    def count(self):
        """The number of different graphs. The order in which the edges are listed does not count.
        """
        names = math.perm(self.num_nodes, self.n_edges + 1)
        # Nor does the order of the arms. The end of each of them can be the goal.
        return names // math.factorial(self.deg) * self.deg


# ---- Drawing graphs


def draw(star, n, rng):
    """Draws n graphs independently -> prefixes (n, prefix_len), paths (n, path_len), int64."""
    every_name = np.tile(np.arange(star.num_nodes), (n, 1))
    names = rng.permuted(every_name, axis=1)[:, :star.n_edges + 1]
    start = names[:, :1]
    arms = names[:, 1:].reshape(n, star.deg, star.path_len - 1)
    starts = np.broadcast_to(start[:, None], (n, star.deg, 1))
    tails = np.concatenate([starts, arms[:, :, :-1]], axis=2)   # an edge leads from its tail
    heads = arms                                                # to its head
    edges = np.stack([tails, heads], axis=3).reshape(n, star.n_edges, 2)
    order = rng.permuted(np.tile(np.arange(star.n_edges), (n, 1)), axis=1)
    edges = np.take_along_axis(edges, order[:, :, None], axis=1)
    # Names and edges are in random order. So the goal may always be on the first arm.
    paths = np.concatenate([start, arms[:, 0]], axis=1)
    return prefix_tokens(star, edges, paths), paths


def prefix_tokens(star, edges, paths):
    """edges (n, n_edges, 2), paths (n, path_len) -> prefixes (n, prefix_len)

    Raises ValueError for a node that is not below num_nodes.
    """
    largest = edges.max(initial=0)
    if largest >= star.num_nodes:
        raise ValueError(f"node {largest} is out of range: names go up to {star.num_nodes - 1}")
    prefixes = np.full((len(paths), star.prefix_len), star.pipe)
    prefixes[:, 0:-3:3] = edges[:, :, 0]
    prefixes[:, 1:-3:3] = edges[:, :, 1]
    prefixes[:, -4] = star.slash
    prefixes[:, -3] = paths[:, 0]
    prefixes[:, -2] = paths[:, -1]
    prefixes[:, -1] = star.equals
    return prefixes


def edges_of(prefix):
    """The edges [(tail, head), ...] in the tokens of a prefix, a list."""
    return list(zip(prefix[0:-3:3], prefix[1:-3:3]))


def find_arms(edges, start):
    """-> the arms [[start, ..., end], ...] of a graph with these edges [(tail, head), ...]"""
    after = {tail: head for tail, head in edges if tail != start}
    arms = []
    for tail, head in edges:
        if tail == start:
            arm = [start, head]
            while arm[-1] in after:
                arm.append(after.pop(arm[-1]))
            arms.append(arm)
    return arms


def move_goals(prefixes):
    """The same graphs, with the end of another arm as the goal.

    prefixes (n, prefix_len) of graphs with two or more arms -> prefixes in which only the goal is
    another, and the paths to it (n, path_len)
    """
    moved = prefixes.copy()
    paths = []
    for prefix in moved:
        *_, start, goal, _ = prefix.tolist()
        arms = find_arms(edges_of(prefix.tolist()), start)
        ends = [arm[-1] for arm in arms]
        arm = arms[(ends.index(goal) + 1) % len(arms)]
        prefix[-2] = arm[-1]
        paths.append(arm)
    return moved, np.array(paths)


# ---- Training and test sets


def graph_keys(star, prefixes):
    """One bytes object for each graph. Prefixes of the same graph have the same one.

    It holds the edges as a set, the start and the goal: the order of the edges does not count.
    """
    edges = np.sort(prefixes[:, 0:-3:3] * star.num_nodes + prefixes[:, 1:-3:3], axis=1)
    rows = np.concatenate([edges, prefixes[:, -3:-1]], axis=1)
    return [row.tobytes() for row in rows]


def draw_unseen(star, n, rng, seen, distinct=True):
    """Draws n graphs without a key in the set `seen` -> prefixes, paths.

    With `distinct`, no two of them are alike either. Raises ValueError if there are too few.
    """
    # One at least, also for n = 0: with --n_train 0 the steps draw theirs later.
    needed = len(seen) + (max(n, 1) if distinct else 1)
    if needed > star.count():
        raise ValueError(f"there are only {star.count()} different graphs {star}, not {needed}")
    at_once = max(1, (1 << 18) // star.num_nodes)               # they stay in the cache then
    seen = set(seen)
    parts = [draw(star, 0, rng)]                                # no graphs, so that n may be 0
    missing = n
    while missing > 0:
        prefixes, paths = draw(star, min(missing, at_once), rng)
        new = []
        for i, key in enumerate(graph_keys(star, prefixes)):
            if key not in seen:
                new.append(i)
                if distinct:
                    seen.add(key)
        parts.append((prefixes[new], paths[new]))
        missing -= len(new)
    prefixes, paths = zip(*parts)
    return np.concatenate(prefixes), np.concatenate(paths)


def datasets(deg, path_len, num_nodes, n_train, n_test, seed, train_file=None, test_file=None):
    """Reads or draws a training set and a test set.

    A set is the first n graphs of its file (n None: all). Without a file, n graphs are drawn from
    the seed: no two are alike, and none is in the other set. Of what a file determines, deg,
    path_len and num_nodes may be None.

    Returns the PathStar; (prefixes, paths) for training; (prefixes, paths) for testing.
    Raises ValueError for a malformed file, for sizes that contradict each other, and if there are
    too few different graphs; OSError for a file that cannot be read.
    """
    size = deg, path_len
    read = {}
    for name, file, n in (("train", train_file, n_train), ("test", test_file, n_test)):
        if file is not None:
            edges, paths, size = read_graphs(file, n, size)
            read[name] = edges, paths
    if num_nodes is None:
        num_nodes = 1 + max(int(edges.max()) for edges, _ in read.values())
    star = PathStar(*size, num_nodes)
    for name, (edges, paths) in read.items():
        read[name] = prefix_tokens(star, edges, paths), paths

    train, test = read.get("train"), read.get("test")
    train_keys = set() if train is None else set(graph_keys(star, train[0]))
    if test is None:
        test = draw_unseen(star, n_test, np.random.default_rng([seed, 1]), train_keys)
    test_keys = graph_keys(star, test[0])
    if train is None:
        train = draw_unseen(star, n_train, np.random.default_rng([seed, 0]), set(test_keys))
    overlap = sum(key in train_keys for key in test_keys)
    if overlap > 0:
        print(f"warning: {overlap} of the test graphs are training graphs", file=sys.stderr)
    return star, train, test


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, 2, epoch]).permutation(n)


def batch_indices(n, batch_size, seed, step):
    """Which of n training graphs a step sees.

    Epochs follow each other without a gap, each in an order of its own. The batch depends on
    nothing but seed and step, so a resumed run sees the same batches.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(places // n):
        inside = places // n == epoch
        indices[inside] = epoch_order(n, seed, epoch)[places[inside] % n]
    return indices


# ---- Graphs as text

NODE = "[0-9]{1,9}"
EDGE = f"{NODE},{NODE}"
LINE = re.compile(rf"({EDGE}(?:\|{EDGE})*)/({NODE}),({NODE})=({NODE}(?:,{NODE})*)?")


def to_text(prefix, path=()):
    """The text form of a graph, given its tokens as lists. Without a path it ends with `=`."""
    edges = "|".join(f"{tail},{head}" for tail, head in edges_of(prefix))
    start, goal = prefix[-3], prefix[-2]
    return f"{edges}/{start},{goal}=" + ",".join(map(str, path))


def parse_graph(line):
    """A graph in text form, with its path or without -> edges [(tail, head), ...], path.

    Raises ValueError for a line that is not a path-star graph, and for a wrong path.
    """
    match = LINE.fullmatch(line.strip())
    if not match:
        raise ValueError(f"{line[:60]!r} is not of the form a,b|c,d|.../start,goal=start,...,goal")
    edges = []
    for edge in match[1].split("|"):
        tail, head = edge.split(",")
        edges.append((int(tail), int(head)))
    start, goal = int(match[2]), int(match[3])
    entered = [start] + [head for _, head in edges]
    if len(set(entered)) < len(entered):
        raise ValueError("not a star: an edge leads to the start, or two lead to the same node")
    arms = find_arms(edges, start)
    if sum(len(arm) - 1 for arm in arms) < len(edges):
        raise ValueError(f"not a star: some edges are on no arm of the start {start}")
    if len({len(arm) for arm in arms}) > 1:
        raise ValueError("not a star: its arms differ in length")
    for path in arms:
        if path[-1] == goal:
            break
    else:
        raise ValueError(f"the goal {goal} is not the end of an arm")
    if match[4] is not None and [int(node) for node in match[4].split(",")] != path:
        raise ValueError(f"the path {match[4]} is not the arm from {start} to {goal}")
    return edges, path


def read_graphs(file, n=None, size=(None, None)):
    """The first n graphs of a file (None: all), which have the size (deg, path_len).

    A size that is None is that of the first graph. Returns edges (n, n_edges, 2), paths (n,
    path_len), and the size. Raises ValueError, with the file's name and the line's number, for a
    line that is not such a graph with its path, and if there are fewer than n.
    """
    all_edges, paths = [], []
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if len(paths) == n:
                break
            if line.isspace():
                continue
            try:
                edges, path = parse_graph(line)
                if line.strip().endswith("="):
                    raise ValueError("the path is missing")
                size_here = len(edges) // (len(path) - 1), len(path)
                for name, given, here in zip(("deg", "path_len"), size, size_here):
                    if given not in (None, here):
                        raise ValueError(f"a graph with {name} {here}, where {given} is expected")
                size = size_here
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            all_edges.append(edges)
            paths.append(path)
    if not paths:
        raise ValueError(f"{file} is empty: expected one graph a line, as in 0,1|0,2/0,2=0,2")
    if n is not None and len(paths) < n:
        raise ValueError(f"{file} has {len(paths)} graphs, fewer than the {n} asked for")
    return np.array(all_edges), np.array(paths), size


# ---- Command line


def bounded(kind, low, high=10 ** 9):
    """A type for argparse's flags: numbers of a kind, from `low` up and below `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"must be from {low} up and below {high:g}")
        return value

    parse.__name__ = kind.__name__                              # argparse names it in its messages
    return parse


positive_int = bounded(int, 1)
non_negative_int = bounded(int, 0)


def run_script(main):
    """Runs the main function of a script.

    Ctrl-C, a closed pipe (`| head`) and a full disk end it without a traceback.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")            # it may be closed from the start
    if hasattr(sys.stdout, "reconfigure"):                      # a notebook's lacks it
        sys.stdout.reconfigure(errors="backslashreplace")       # for names that it cannot encode
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Python flushes stdout once more when it exits. Let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if error.errno == errno.EPIPE else f"cannot write: {error.strerror}")


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description="Prints path-star graphs, drawn independently, one a line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--deg", type=positive_int, default=2, help="arms of a graph")
    parser.add_argument("--path_len", type=positive_int, default=5, help="nodes on a path")
    parser.add_argument("--num_nodes", type=positive_int, default=10, help="names to draw from")
    parser.add_argument("-n", type=non_negative_int, default=1, help="number of graphs")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the random numbers")
    args = parser.parse_args()
    rng = np.random.default_rng([args.seed, 3])                 # no run of train.py uses this one
    missing = args.n
    try:
        star = PathStar(args.deg, args.path_len, args.num_nodes)
        while missing > 0:
            prefixes, paths = draw(star, min(missing, 10_000), rng)
            for prefix, path in zip(prefixes.tolist(), paths.tolist()):
                print(to_text(prefix, path))
            missing -= len(paths)
    except (ValueError, MemoryError) as error:
        parser.error(str(error) or "not enough memory")


if __name__ == "__main__":
    run_script(main)
