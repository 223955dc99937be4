"""The path-star task (Bachmann & Nagarajan 2024, arXiv 2403.06963, figure 1).

A path-star graph G(deg, path_len) has a start node with `deg` arms. Each arm, with the start, is a
path of `path_len` nodes. Nodes carry different names, drawn from 0 .. num_nodes - 1. The last node
of one arm is the goal. The task: given the edges in random order, the start and the goal, write
the path from start to goal.

As text, one graph a line:  32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12

As tokens: node k is k, `|` is num_nodes, `=` is num_nodes + 1, `/` is num_nodes + 2. Commas are
not tokens. `$` is num_nodes + 3: it stands in for target tokens in teacherless training. All up to
and with `=` is the prefix, 3 deg (path_len - 1) + 3 tokens. The path, path_len tokens, follows it.

    python data.py --deg 2 --path_len 5 --num_nodes 50 -n 3 --seed 0        prints three graphs
"""
import argparse
import functools
import itertools
import math
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
        """The number of different prefixes."""
        names = math.perm(self.num_nodes, self.n_edges + 1)
        arms = math.factorial(self.deg)                     # the order of the arms does not count,
        edges = math.factorial(self.n_edges)                # the order of the edges does
        return names // arms * edges * self.deg             # each arm's end can be the goal


def draw_distinct(rng, n, high, k):
    """-> (n, k): rows of k different numbers below `high`, uniformly at random.

    These are the first k steps of a Fisher-Yates shuffle, of all rows at once.
    """
    deck = np.tile(np.arange(high, dtype=np.int32), (n, 1))
    row = np.arange(n)
    for i in range(k):
        j = rng.integers(i, high, size=n)
        deck[row, i], deck[row, j] = deck[row, j], deck[row, i]
    return deck[:, :k]


def draw(star, n, rng):
    """Draws n graphs independently -> prefixes (n, prefix_len), paths (n, path_len), int64."""
    names = draw_distinct(rng, n, star.num_nodes, star.n_edges + 1)
    start = names[:, :1]
    arms = names[:, 1:].reshape(n, star.deg, star.path_len - 1)
    starts = np.broadcast_to(start[:, None], (n, star.deg, 1))
    tails = np.concatenate([starts, arms[:, :, :-1]], axis=2)       # an edge leads from its tail
    heads = arms                                                    # to its head
    order = draw_distinct(rng, n, star.n_edges, star.n_edges)
    edges = np.stack([tails, heads], axis=3).reshape(n, star.n_edges, 2)
    edges = np.take_along_axis(edges, order[:, :, None], axis=1)    # (n, n_edges, 2)
    # Names and edges are in random order. So the goal may always be on the first arm.
    paths = np.concatenate([start, arms[:, 0]], axis=1)
    return prefix_tokens(star, edges, paths), paths.astype(np.int64)


def prefix_tokens(star, edges, paths):
    """edges (n, n_edges, 2), paths (n, path_len) -> prefixes (n, prefix_len)"""
    prefixes = np.full((len(paths), star.prefix_len), star.pipe)
    prefixes[:, 0:-3:3] = edges[:, :, 0]
    prefixes[:, 1:-3:3] = edges[:, :, 1]
    prefixes[:, -4] = star.slash
    prefixes[:, -3] = paths[:, 0]
    prefixes[:, -2] = paths[:, -1]
    prefixes[:, -1] = star.equals
    return prefixes


def edges_of(prefix):
    """The edges [(a, b), ...] in the tokens of a prefix, a list."""
    return list(zip(prefix[0:-3:3], prefix[1:-3:3]))


def to_text(prefix, path=()):
    """The text form of a graph, given its tokens as lists. Without a path it ends with `=`."""
    edges = "|".join(f"{a},{b}" for a, b in edges_of(prefix))
    start, goal = prefix[-3], prefix[-2]
    return f"{edges}/{start},{goal}=" + ",".join(map(str, path))


# Reading graphs in text form

NODE = "[0-9]{1,9}"
EDGE = f"{NODE},{NODE}"
LINE = re.compile(rf"({EDGE}(?:\|{EDGE})*)/({NODE}),({NODE})=({NODE}(?:,{NODE})*)?")


def find_arms(edges, start):
    """-> the arms [[start, ..., end], ...] of a graph with these edges [(a, b), ...]"""
    after = {a: b for a, b in edges if a != start}
    arms = []
    for a, b in edges:
        if a == start:
            arm = [start, b]
            while arm[-1] in after:
                arm.append(after.pop(arm[-1]))
            arms.append(arm)
    return arms


def check_star(edges, start):
    """-> the arms. Raises ValueError if the edges are not those of a path-star graph."""
    arms = find_arms(edges, start)
    nodes = [start] + [b for _, b in edges]
    if not arms:
        raise ValueError(f"not a star: no edge leaves the start {start}")
    if len(set(nodes)) < len(nodes):
        raise ValueError(f"not a star: node {max(nodes, key=nodes.count)} is repeated")
    if sum(len(arm) - 1 for arm in arms) < len(edges):
        raise ValueError("not a star: some edges are on no arm")
    if len({len(arm) for arm in arms}) > 1:
        raise ValueError("not a star: its arms differ in length")
    return arms


def parse_line(line, deg=None, path_len=None, num_nodes=None):
    """A graph in text form, with its path or without -> edges [(a, b), ...], path [start, ...].

    Raises ValueError for a line that is not a path-star graph with its right path, and for a graph
    that has another deg or path_len than is given, or names from num_nodes up.
    """
    match = LINE.fullmatch(line)
    if not match:
        raise ValueError(f"{line[:60]!r} is not of the form a,b|c,d|.../start,goal=start,...,goal")
    edges = []
    for edge in match[1].split("|"):
        a, b = edge.split(",")
        edges.append((int(a), int(b)))
    start, goal = int(match[2]), int(match[3])
    arms = check_star(edges, start)
    path = None
    for arm in arms:
        if arm[-1] == goal:
            path = arm
    if path is None:
        raise ValueError(f"the goal {goal} is not the end of an arm")
    if match[4] is not None and [int(node) for node in match[4].split(",")] != path:
        raise ValueError(f"the path {match[4]} is not the arm from {start} to {goal}")
    if deg not in (None, len(arms)) or path_len not in (None, len(path)):
        raise ValueError(
            f"a graph with deg {len(arms)} and path_len {len(path)}, where deg {deg or len(arms)} "
            f"and path_len {path_len or len(path)} are expected"
        )
    largest = max(max(edge) for edge in edges)
    if num_nodes is not None and largest >= num_nodes:
        raise ValueError(f"node {largest} is out of range: the names go from 0 to {num_nodes - 1}")
    return edges, path


def read_graphs(file, n=None, deg=None, path_len=None, num_nodes=None):
    """The first n graphs of a file (None: all) -> edges (n, n_edges, 2), paths (n, path_len).

    All graphs must have their paths, and one size: the given one, or that of the first line.
    Raises ValueError with the file's name and the line's number if one has not, and if there are
    fewer than n.
    """
    edges, paths = [], []
    with open(file, errors="replace") as lines:
        for number, line in enumerate(itertools.islice(lines, n), start=1):
            line = line.strip()
            try:
                line_edges, path = parse_line(line, deg, path_len, num_nodes)
                if line.endswith("="):
                    raise ValueError("the path is missing")
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            edges.append(line_edges)
            paths.append(path)
            path_len = len(path)
            deg = len(line_edges) // (path_len - 1)
    if not paths:
        raise ValueError(f"{file} is empty: expected one graph a line, as in 0,1|0,2/0,2=0,2")
    if n is not None and len(paths) < n:
        raise ValueError(f"{file} has {len(paths)} graphs, fewer than the {n} asked for")
    return np.array(edges), np.array(paths)


# Training and test sets


def keys(prefixes):
    """One bytes object for each row, to look it up in a set."""
    return [row.tobytes() for row in prefixes.astype(np.int32)]


def draw_unseen(star, n, rng, seen, distinct=True):
    """Draws n graphs whose prefixes have no key in the set `seen` -> prefixes, paths.

    With `distinct`, no two of them are alike either.
    """
    at_once = max(1, (1 << 18) // star.num_nodes)           # draw_distinct stays in the cache then
    seen = set(seen)
    parts = [draw(star, 0, rng)]                            # no graphs, so that n may be 0
    missing = n
    while missing > 0:
        prefixes, paths = draw(star, min(missing, at_once), rng)
        new = []
        for i, key in enumerate(keys(prefixes)):
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
    the seed: no two are alike, and none is in the other set. Files determine deg and path_len, and
    num_nodes where it is None.

    Returns the PathStar; (prefixes, paths) for training; (prefixes, paths) for testing.
    Raises ValueError for a malformed file, for sizes that contradict each other, and if there are
    too few different graphs; OSError for a file that cannot be read.
    """
    train_graphs = test_graphs = None
    largest = 0
    if train_file is not None:
        train_graphs = read_graphs(train_file, n_train, deg, path_len, num_nodes)
        n_edges, path_len = train_graphs[0].shape[1], train_graphs[1].shape[1]
        deg = n_edges // (path_len - 1)
        largest = train_graphs[0].max()
    if test_file is not None:
        test_graphs = read_graphs(test_file, n_test, deg, path_len, num_nodes)
        n_edges, path_len = test_graphs[0].shape[1], test_graphs[1].shape[1]
        deg = n_edges // (path_len - 1)
        largest = max(largest, test_graphs[0].max())
    star = PathStar(deg, path_len, int(largest) + 1 if num_nodes is None else num_nodes)

    known = set()
    if train_graphs is not None:
        edges, paths = train_graphs
        train = prefix_tokens(star, edges, paths), paths
        known.update(keys(train[0]))
    if test_graphs is not None:
        edges, paths = test_graphs
        test = prefix_tokens(star, edges, paths), paths
        overlap = sum(key in known for key in keys(test[0]))
        if overlap > 0:
            print(f"warning: {overlap} of the test graphs are training graphs", file=sys.stderr)
        known.update(keys(test[0]))
    needed = len(known)
    needed += n_test if test_graphs is None else 0
    needed += max(n_train, 1) if train_graphs is None else 0
    if needed > star.count():
        raise ValueError(f"there are only {star.count()} different graphs {star}, not {needed}")
    if test_graphs is None:
        test = draw_unseen(star, n_test, np.random.default_rng([seed, 1]), known)
        known.update(keys(test[0]))
    if train_graphs is None:
        train = draw_unseen(star, n_train, np.random.default_rng([seed, 0]), known)
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


# Command line


def positive_int(text):
    """For argparse: raises ArgumentTypeError unless the text is a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description="Prints path-star graphs, drawn independently, one a line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--deg", type=positive_int, default=2, help="arms of a graph")
    parser.add_argument("--path_len", type=positive_int, default=5, help="nodes on a path")
    parser.add_argument("--num_nodes", type=positive_int, default=50, help="names to draw from")
    parser.add_argument("-n", type=non_negative_int, default=1, help="number of graphs")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the random numbers")
    args = parser.parse_args()
    rng = np.random.default_rng([args.seed, 3])             # no run of train.py uses this stream
    missing = args.n
    try:
        star = PathStar(args.deg, args.path_len, args.num_nodes)
        while missing > 0:
            prefixes, paths = draw(star, min(missing, 10_000), rng)
            for prefix, path in zip(prefixes.tolist(), paths.tolist()):
                print(to_text(prefix, path))
            missing -= len(paths)
    except (ValueError, MemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # as in `python data.py -n 1000 | head`
        sys.stderr.close()
