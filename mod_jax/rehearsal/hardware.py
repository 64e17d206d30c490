"""What accelerators can do at best, as their makers state it: the roofs of a roofline.

Sources. TPUs: the pages of Cloud TPU on each generation (docs.cloud.google.com/tpu/docs/v5e, v5p,
v6e, tpu7x): peak of bfloat16, memory, its bandwidth, and the network's share of a chip (v5e: 6.4
Tbit/s for a pod of 256). Links: 45 GB/s (v5e) and 90 GB/s (v5p, v6e) of each in one direction, as
"How to Scale Your Model" (jax-ml.github.io/scaling-book) has them; of tpu7x the page states the
same sum as for v5p. NVIDIA: data sheets of the H100, H200, A100 (80 GB) and B200 in their SXM form,
dense rates; links are those of NVLink, one direction.

Usable memory. TPUs: what libtpu compiles for, as its errors state it ("Used X of Y hbm"). NVIDIA:
95 % of the card's, which needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, as JAX takes 75 % by default.
"""

from typing import NamedTuple

GIB = 2**30
GB = 1e9
OF_CARD = 0.95  # share of an NVIDIA card's memory that a program may use


class Hardware(NamedTuple):
    """One device, as JAX counts them.

    Attributes:
      memory: Bytes that a program may use.
      flops: Operations a second on bfloat16.
      bandwidth: Bytes a second between the device and its memory.
      links: Bytes a second that it can send over all of its links together.
      network: Bytes a second that it can send to other slices; 0 where there are none.
      devices_a_chip: Devices of a chip.
      devices_a_host: Devices of a host.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    network: float
    devices_a_chip: int = 1
    devices_a_host: int = 4


GENERATIONS = {
    "v5e": Hardware(15.75 * GIB, 197e12, 819 * GB, 4 * 45 * GB, 3.125 * GB),
    "v6e": Hardware(31.25 * GIB, 918e12, 1638 * GB, 4 * 90 * GB, 12.5 * GB),
    "v5p": Hardware(95.74 * GIB, 459e12, 2765 * GB, 6 * 90 * GB, 6.25 * GB),
    # half a chip
    "tpu7x": Hardware(94.75 * GIB, 2307e12 / 2, 3690 * GB, 3 * 90 * GB, 6.25 * GB, 2, 8),
    "h100": Hardware(OF_CARD * 84942979072, 989e12, 3352 * GB, 450 * GB, 0, devices_a_host=8),
    "h200": Hardware(OF_CARD * 151397597184, 989e12, 4800 * GB, 450 * GB, 0, devices_a_host=8),
    "a100": Hardware(OF_CARD * 85100068864, 312e12, 2039 * GB, 300 * GB, 0, devices_a_host=8),
    "b200": Hardware(OF_CARD * 191514411008, 2250e12, 7672 * GB, 900 * GB, 0, devices_a_host=8),
}


def hardware(topology: str) -> Hardware:
    """What a device of a topology (`topology.NAMES`) can do."""
    return GENERATIONS[topology.partition("-")[0]]
