"""How many devices does a run need, what does it wait for, and where does that change? By arithmetic alone.

    python benchmarks/scale_plan.py [--model llama-8b] [--tokens 8192] [--length 4096] [--out FILE.json]

A step gives every GPU one micro-batch of `--tokens`, in texts of `--length`. Memory is what must lie on a GPU; traffic,
what must cross its links; time, what the slowest of computing, the links inside a machine and those between machines
takes, since the three overlap, and behind it the tree of the adapters' gradients, which nothing overlaps. Figures that
others have published are set against the same arithmetic at the end: it knows no waiting, so that it is an upper bound.

What is assumed stands in `Machine` and `Model`; P are the parameters, T the tokens of a text, D, L and V width, layers
and vocabulary, R the rank. Nothing here was measured on several GPUs.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

GB = 1e9
SIZES = (1, 8, 64, 256, 1024)
PIECE_BITS = 4  # as in engine/parallel/tree.py, of the numbers of the pieces that gradients travel in


@dataclass(frozen=True)
class Machine:
    """Eight H100 with NVLink, and a network card of 400 Gb/s for each, at rates that programs reach."""

    n_gpus: int = 8
    memory: float = 80 * GB
    products: float = 600e12  # FLOP/s of matrix products in bf16
    attention: float = 350e12  # FLOP/s of attention, forward and backward
    bandwidth: float = 3.0e12  # bytes/s of a GPU's memory
    nvlink: float = 360 * GB  # bytes/s out of a GPU, inside the machine
    network: float = 40 * GB  # bytes/s out of a GPU, to other machines
    latency: float = 20e-6  # seconds of a message


@dataclass(frozen=True)
class Model:
    """A Llama's shapes."""

    n_layer: int
    d_model: int
    d_ff: int
    kv_width: int
    vocab_size: int

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        attention = self.d_model * (2 * self.d_model + 2 * self.kv_width)
        return attention + 3 * self.d_model * self.d_ff

    @property
    def total(self) -> int:
        """P"""
        return self.n_layer * self.layer + 2 * self.vocab_size * self.d_model

    def factors(self, rank: int) -> int:
        """Parameters of an adapter on all projections."""
        d, kv, f = self.d_model, self.kv_width, self.d_ff
        return self.n_layer * rank * (2 * (d + d) + 2 * (d + kv) + 2 * (d + f) + (f + d))


MODELS = {
    "llama-8b": Model(32, 4096, 14336, 1024, 128256),
    "llama-70b": Model(80, 8192, 28672, 1024, 128256),
    "llama-405b": Model(126, 16384, 53248, 1024, 128256),
}


@dataclass(frozen=True)
class Plan:
    """How a run is divided."""

    n: int  # GPUs
    shard: str  # none, full, hybrid
    bits: int = 16  # of a frozen weight
    rank: int | None = 16  # of an adapter; None: all weights train, in bf16 with fp32 masters
    tokens: int = 8192  # of a GPU's micro-batch
    length: int = 4096
    recompute: bool = False  # whether the backward pass computes each layer's forward pass again


@dataclass(frozen=True)
class Cost:
    """What a step costs a GPU: bytes, bytes out of it, seconds; and what the step waits for."""

    memory: float
    inside: float
    between: float
    compute: float
    seconds: float
    tree: float
    waits_for: str
    tokens_per_second: float  # of a GPU


def tree_seconds(n: int, size: float, machine: Machine) -> float:
    """How long the tree over n processes takes for gradients of so many bytes, as engine/parallel/tree.py sends them.

    Level by level, node by node, piece by piece, one half goes to where the other is, and both processes wait for that.
    Then each piece is told to all.
    """
    n_pieces = min(2**PIECE_BITS, 1 << (n - 1).bit_length())
    n_levels = (n - 1).bit_length()
    clocks = [0.0] * n

    def takes(sender: int, receiver: int) -> float:
        is_near = sender // machine.n_gpus == receiver // machine.n_gpus
        return size / n_pieces / (machine.nvlink if is_near else machine.network) + machine.latency

    holders = [list(range(n)) for _ in range(n_pieces)]  # of the nodes of a level, by piece
    for level in reversed(range(n_levels)):
        halves, holders = holders, [[] for _ in range(n_pieces)]
        for i in range(0, len(halves[0]), 2):
            for piece in range(n_pieces):
                ours, *others = halves[piece][i : i + 2]
                for theirs in others:
                    clocks[ours] = clocks[theirs] = max(clocks[ours], clocks[theirs]) + takes(ours, theirs)
                goes_right = others and piece >> level % PIECE_BITS & 1
                holders[piece].append(others[0] if goes_right else ours)
    return max(clocks) + n_pieces * takes(0, n - 1)


def cost(model: Model, plan: Plan, machine: Machine) -> Cost:
    """The arithmetic."""
    full = plan.rank is None
    n_local = min(plan.n, machine.n_gpus)
    n_shards = {"none": 1, "full": plan.n, "hybrid": n_local}[plan.shard]
    trained = model.total if full else model.factors(plan.rank or 0)

    # Weights: NF4's 4 bits are 0.516 bytes; embedding and head stay in bf16.
    byte_of = {16: 2.0, 8: 1.0, 4: 0.516}[plan.bits]
    layers = model.n_layer * model.layer * byte_of
    outside = 2 * model.vocab_size * model.d_model * 2.0
    weights = (layers + outside) / n_shards

    # A trained weight has a master, a gradient and two moments in fp32; with gathered layers, this one and the next.
    state = 16.0 * trained / (n_shards if full else 1)
    gathered = 0.0 if n_shards == 1 else outside + 2 * model.layer * byte_of
    # Saved for the backward pass: 11.5 widths a token and layer in bf16, or one where layers are computed again.
    widths = 1.0 if plan.recompute else 11.5
    activations = plan.tokens * model.d_model * 2.0 * (model.n_layer * widths + (11.5 if plan.recompute else 0))
    memory = weights + state + gathered + activations

    # A product costs 2 FLOP a weight and token forward, as many for dx, and as many for dW where the weight trains.
    passes = 2 + full + plan.recompute
    products = 2.0 * model.total * plan.tokens * passes
    # Causal attention: two products over half of T² forward; 2.5 times as much backward.
    attention = 2.0 * plan.tokens * plan.length * model.d_model * model.n_layer * (3.5 + plan.recompute)
    elementwise = plan.tokens * model.n_layer * model.d_model * 2.0 * 55  # widths read and written a layer
    compute = products / machine.products + attention / machine.attention + elementwise / machine.bandwidth

    # Gathering brings a GPU what it lacks, once forward and once backward; full fine-tuning scatters fp32 gradients.
    moved = 0.0 if n_shards == 1 else (2 * (layers + outside) + (4.0 * model.total if full else 0)) * (1 - 1 / n_shards)
    crosses = n_shards > machine.n_gpus
    inside, between = (0.0, moved) if crosses else (moved, 0.0)
    if full and 1 < n_shards < plan.n:
        between += 2 * 4.0 * model.total / n_shards  # copies of a shard add up their gradients

    # The tree of what is whole.
    tree = 0.0
    if plan.n > 1 and (n_shards == 1 or not full):
        tree = tree_seconds(plan.n, 4.0 * trained, machine)

    waits = {"computing": compute, "NVLink": inside / machine.nvlink, "the network": between / machine.network}
    waits_for = max(waits, key=lambda name: waits[name])
    seconds = waits[waits_for] + tree
    if memory > machine.memory:
        waits_for = "memory: does not fit"
    return Cost(memory, inside, between, compute, seconds, tree, waits_for, plan.tokens / seconds)


# (what, who, GPUs, model, plan, tokens a second and GPU)
PUBLISHED = (
    ("8B, LoRA", "NeMo AutoModel", "llama-8b", Plan(1, "none"), 12473),
    ("70B, LoRA", "NeMo AutoModel", "llama-70b", Plan(8, "full", recompute=True), 1092),
    ("8B, all", "torchtitan, compiled, 500 W", "llama-8b", Plan(8, "full", 16, None, 16384, 8192), 6667),
    ("8B, all", "torchtitan, compiled, 500 W", "llama-8b", Plan(128, "full", 16, None, 16384, 8192), 6514),
)


def plans(tokens: int, length: int) -> list[tuple[str, Plan]]:
    """The rows of the table."""
    rows = []
    for n in SIZES:
        modes = ("none",) if n == 1 else ("none", "full") if n <= Machine().n_gpus else ("none", "hybrid", "full")
        for shard in modes:
            for bits in (16, 8, 4):
                rows.append((f"LoRA, {bits} bits", Plan(n, shard, bits, 16, tokens, length)))
            rows.append(("LoRA, 16 bits, again", Plan(n, shard, 16, 16, tokens, length, recompute=True)))
            rows.append(("all weights", Plan(n, shard, 16, None, tokens, length)))
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=MODELS, default="llama-8b")
    arguments.add_argument("--tokens", type=int, default=8192, help="of a GPU's micro-batch")
    arguments.add_argument("--length", type=int, default=4096, help="of a text")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()

    machine = Machine()
    model = MODELS[options.model]
    print(f"{options.model}: {model.total / GB:.2f} billion parameters, {model.factors(16) / 1e6:.0f} million of an "
          f"adapter of rank 16; {options.tokens} tokens a GPU and step")  # fmt: skip
    print(f"{'GPUs':>5} {'shards':7} {'what trains':21} {'GB':>7} {'ms':>8} {'tree':>6} {'tokens/s':>9}  waits for")
    rows = []
    for what, plan in plans(options.tokens, options.length):
        result = cost(model, plan, machine)
        rows.append({"what": what, **asdict(plan), **asdict(result)})
        print(f"{plan.n:>5} {plan.shard:7} {what:21} {result.memory / GB:>7.1f} {1e3 * result.seconds:>8.0f} "
              f"{1e3 * result.tree:>6.1f} {result.tokens_per_second:>9,.0f}  {result.waits_for}")  # fmt: skip

    print("\npublished, tokens/s of a GPU       theirs  arithmetic  ratio")
    published = []
    for what, who, name, plan, theirs in PUBLISHED:
        ours = cost(MODELS[name], plan, machine).tokens_per_second
        published.append({"what": what, "who": who, "n": plan.n, "published": theirs, "arithmetic": ours})
        print(f"{what + ', ' + who:34} {theirs:>7,} {ours:>11,.0f} {theirs / ours:>6.2f}")
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": asdict(machine), "rows": rows, "published": published}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
