"""What a step takes at best: its work over what the hardware can do.

Four things take time: products, memory, the links between chips, and the network between slices.
If they overlap perfectly, a step takes as long as the longest; if nothing overlaps, their sum. Both
take the hardware at its peak: they are bounds, not measurements.
"""

import collections
import dataclasses
from collections.abc import Mapping

from mod_jax.config import ModelConfig
from mod_jax.interop.hf_config import CLASS_TOKENS
from mod_jax.rehearsal import products
from mod_jax.rehearsal.collectives import Collective, collectives
from mod_jax.rehearsal.hardware import Hardware
from mod_jax.rehearsal.places import Places
from mod_jax.rehearsal.program import Program
from mod_jax.rehearsal.traffic import Traffic
from mod_jax.rehearsal.trips import Work, trips


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does in a step.

    Attributes:
      flops: Module -> operations of products.
      memory: Module -> bytes that are read and written.
      collectives: What it sends.
    """

    flops: Mapping[str, float]
    memory: Mapping[str, float]
    collectives: tuple[Collective, ...]

    def sent(self, by: str) -> dict[str, float]:
        """Bytes by "module", "kind" or "axes", the most first."""
        found: dict[str, float] = collections.defaultdict(float)
        for one in self.collectives:
            value = getattr(one, by)
            found[value if isinstance(value, str) else " x ".join(value)] += one.sent
        return _most_first(found)


def _most_first(found: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def costs(
    program: Program, mesh: Mapping[str, int], work: Work, slices: int, on_chip: bool
) -> Costs:
    """Counts what the program of a step does.

    Args:
      program: The program of one device.
      mesh: Name -> size of each axis.
      work: What the data give a device to do.
      slices: Number of slices.
      on_chip: As for `Traffic`.
    """
    rounds = trips(work, program)
    places, traffic = Places(program), Traffic(program, on_chip)
    flops: dict[str, float] = collections.defaultdict(float)
    memory: dict[str, float] = collections.defaultdict(float)
    for computation, instruction, times in program.located_runs(rounds):
        product = products.product(instruction)
        moved = traffic.of(computation, instruction)
        if not times or not (product or moved):
            continue
        place = places.of(computation, instruction)
        memory[place] += moved * times
        if product:
            filled = work.filled(product.rows) if product.rows else 1
            flops[place] += product.flops * filled * times
    sent = tuple(collectives(program, mesh, rounds, slices))
    return Costs(_most_first(flops), _most_first(memory), sent)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step for each of the things that take time.

    Attributes:
      compute, memory, links, network: Seconds.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def step(self) -> float:
        """Seconds of a step in which everything overlaps."""
        return max(dataclasses.astuple(self))

    @property
    def no_overlap(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        return sum(dataclasses.astuple(self))

    @property
    def binds(self) -> str:
        """Name of what takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(found: Costs, attention: float, hardware: Hardware) -> Roofline:
    """The roofline of a step.

    Args:
      found: From `costs`.
      attention: Operations of attention's kernels, from `attention_flops`.
      hardware: What the device can do.
    """
    network = sum(one.network * one.times for one in found.collectives)
    return Roofline(
        (sum(found.flops.values()) + attention) / hardware.flops,
        sum(found.memory.values()) / hardware.bandwidth,
        sum(one.links * one.times for one in found.collectives) / hardware.links,
        network / hardware.network if network else 0.0,
    )


def attention_flops(
    student: ModelConfig, teacher: ModelConfig | None, rows: float, length: int, pictures: int
) -> float:
    """Operations of attention's kernels in a step, which no program's text tells.

    Positions of a row see all before them (packed samples see less). The student runs forward
    twice, as its layers are recomputed, and the backward pass makes five products where the forward
    pass makes two. The tower runs forward, every position with every other one.

    Args:
      student, teacher: The models.
      rows: Rows of a device in a step.
      length: Positions of a row.
      pictures: Pictures of a row.
    """
    pairs = rows * length**2 / 2
    found = pairs * _of_a_pair(student) * (2 + 2.5)
    if teacher is not None:
        found += pairs * _of_a_pair(teacher)
    tower = student.vision
    features = tower.num_features + CLASS_TOKENS[tower.family]
    layers = tower.num_layers + 1 + tower.feature_layer
    return found + rows * pictures * features**2 * 4 * layers * tower.hidden_size


def _of_a_pair(config: ModelConfig) -> int:
    decoder = config.decoder
    return 4 * decoder.num_layers * decoder.num_heads * decoder.head_dim
