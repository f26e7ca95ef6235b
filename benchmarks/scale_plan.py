"""Memory, bandwidth and cost of large trios by arithmetic: which path serves which size.

    python benchmarks/scale_plan.py
    python benchmarks/scale_plan.py --price 3 --reached 0.5 --context 4096

Nothing here was run on a GPU. A step of decoding reads every weight and the KV of every row once, so its time
is bytes over bandwidth, divided by the share of the bandwidth that is reached. Split layers read on all
devices at once, and wait for two sums per layer. `device_map: auto` puts layers one after the other, and one
device reads at a time."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """One model."""

    parameters: float
    layers: int
    kv_heads: int = 8
    head: int = 128
    bytes_per_number: float = 2.0

    @property
    def weights(self) -> float:
        """Bytes."""
        return self.parameters * self.bytes_per_number

    @property
    def kv(self) -> float:
        """Bytes of KV of a token, in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head * 2


SMALL = Shape(8.03e9, 32)
TRIOS = {
    "8B alone": (SMALL,),
    "13B trio of the paper": (Shape(13.0e9, 40, 40), Shape(6.74e9, 32, 32), Shape(6.74e9, 32, 32)),
    "70B trio (8B experts)": (Shape(70.6e9, 80), SMALL, SMALL),
    "70B trio, base in 4 bits": (Shape(70.6e9, 80, bytes_per_number=0.56), SMALL, SMALL),
    "405B trio (8B experts)": (Shape(405.9e9, 126), SMALL, SMALL),
    "405B trio, base in 8 bits": (Shape(405.9e9, 126, bytes_per_number=1.02), SMALL, SMALL),
}
"""Llama 2 and 3.1, as their configurations say."""


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    memory: float
    bandwidth: float


H100 = Device("H100", 80 * GB, 3350 * GB)
USABLE = 0.9
"""Share of the memory for weights and KV."""
PATHS = {
    "one GPU": ((1,), False),
    "`device_map: auto`": ((2, 4, 8), False),
    "split (vLLM, or `device_map: tensor`)": ((2, 4, 8), True),
    "split over 2 machines": ((16,), True),
}
"""Path -> numbers of GPUs, and whether all of them read at a time."""


@dataclass(frozen=True)
class Assumed:
    """What the table assumes."""

    context: int
    """Tokens of a sequence at its end."""
    rows: int
    """Sequences decoded together at most."""
    reached: float
    """Share of the bandwidth."""
    collective: float
    """Seconds of a sum over the devices."""
    price: float
    """USD per hour of a GPU."""


@dataclass(frozen=True)
class Plan:
    """A trio on some GPUs."""

    devices: int
    weights: float
    rows: int
    seconds: float
    """Of a step."""
    speed: float
    """Tokens per second of all rows."""
    usd: float
    """Per million tokens."""


def plan(trio: tuple[Shape, ...], devices: int, split: bool, assumed: Assumed) -> Plan | None:
    """The trio on so many devices; None where it does not fit with an eighth of the rows."""
    weights, kv = sum(one.weights for one in trio), sum(one.kv for one in trio) * assumed.context
    rows = min(assumed.rows, int((devices * H100.memory * USABLE - weights) // kv))
    if rows < assumed.rows / 8:
        return None
    # a row has half of its context on average
    read, bandwidth = weights + rows * kv / 2, H100.bandwidth * (devices if split else 1)
    sums = 2 * sum(one.layers for one in trio) if split else 0  # behind attention and behind the MLP
    seconds = read / (bandwidth * assumed.reached) + sums * assumed.collective
    speed = rows / seconds
    return Plan(devices, weights, rows, seconds, speed, devices * assumed.price / 3600 / speed * 1e6)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence at its end")
    parser.add_argument("--rows", type=int, default=64, help="sequences decoded together at most")
    parser.add_argument("--reached", type=float, default=0.6, help="share of the bandwidth that is reached")
    parser.add_argument("--collective", type=float, default=15, help="microseconds of a sum over devices")
    parser.add_argument("--price", type=float, default=2.5, help="USD per hour of a GPU")
    given = parser.parse_args()
    print(f"{H100.name}s at {given.price:g} USD an hour, {given.reached:.0%} of their bandwidth reached,")
    print(f"sequences of {given.context} tokens, at most {given.rows} together")
    print("| system | path | GPUs | weights, GB | KV, MB/token | rows | ms/step | tokens/s | USD per 1M |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    assumed = Assumed(given.context, given.rows, given.reached, given.collective / 1e6, given.price)
    for name, trio in TRIOS.items():
        kv, held = sum(one.kv for one in trio) / 1e6, False
        for path, (counts, split) in PATHS.items():
            fitting = (plan(trio, count, split, assumed) for count in counts)
            found = next((one for one in fitting if one is not None), None)  # the fewest GPUs that hold it
            if found is not None and not (len(counts) == 1 and counts[0] > 1 and held):
                held = True
                print(
                    f"| {name} | {path} | {found.devices} | {found.weights / GB:.0f} | {kv:.2f} | "
                    f"{found.rows} | {found.seconds * 1e3:.0f} | {found.speed:.0f} | {found.usd:.2f} |"
                )


if __name__ == "__main__":
    main()
