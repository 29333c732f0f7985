"""What the forecasts know of devices: their data sheets' numbers, and which part of them a program gets. No torch.

The data sheets' peaks for bfloat16 are given here without structured sparsity, and the bandwidths of links for one
direction (NVIDIA writes the sum of both). A "GB" of a device's memory is 2^30 bytes, which is nearly what the driver
offers. The network is that of the vendor's own systems, one adapter a GPU, where there are such systems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from titan_yulan.errors import UserError


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: as it is asked for.
        memory: GiB.
        peak: dense bfloat16 matrix products, TFLOP/s.
        bandwidth: of its memory, GB/s.
        link: to the other GPUs of its node, GB/s in one direction.
        network: to other nodes, GB/s in one direction.
        node: GPUs of a node.
        source: where the numbers stand.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    link: float
    network: float
    node: int = 8
    source: str = "given on the command line"


_DEVICES = (
    Device("a100-40", 40, 312, 1555, 300, 25, source="NVIDIA A100 data sheet; network of DGX A100, 8 x 200 Gbit/s"),
    Device("a100", 80, 312, 2039, 300, 25, source="NVIDIA A100 data sheet (SXM); network of DGX A100, 8 x 200 Gbit/s"),
    Device("a800", 80, 312, 2039, 200, 25, source="NVIDIA A800 data sheet (SXM); network assumed to be DGX A100's"),
    Device("h100", 80, 989, 3350, 450, 50, source="NVIDIA H100 data sheet (SXM); network of DGX H100, 8 x 400 Gbit/s"),
    Device("h100-pcie", 80, 756, 2000, 64, 50, source="NVIDIA H100 data sheet (PCIe 5.0 x 16); network assumed"),
    Device("h200", 141, 989, 4800, 450, 50, source="NVIDIA H200 data sheet (SXM); network of DGX H200, 8 x 400 Gbit/s"),
    Device("b200", 180, 2250, 8000, 900, 50, source="NVIDIA DGX B200 data sheet, an eighth of it; 8 x 400 Gbit/s"),
    Device("rtx4090", 24, 165, 1008, 32, 3.125, source="NVIDIA Ada white paper (PCIe 4.0 x 16); network assumed"),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}


@dataclass(frozen=True)
class Assumptions:
    """Which part of a data sheet's number is reached; chosen from what others published, not fitted to a run.

    Attributes:
        products: of the peak by matrix products. cuBLAS gets 0.65 to 0.8 of it on large bfloat16 matrices.
        attention: of the peak by attention: what FlashAttention-2, the kernel PyTorch has, gets on an H100 (arXiv
            2407.08608, section 1); 0.5 to 0.73 on an A100 (arXiv 2307.08691).
        copies: of the memory's bandwidth.
        links: of the bandwidth between GPUs and between nodes.
        hop: microseconds that one step of a ring takes beside its bytes.
        usable: of a device's memory; the rest is for what the allocator cannot reuse, NCCL and the CUDA context.
    """

    products: float = 0.7
    attention: float = 0.35
    copies: float = 0.8
    links: float = 0.8
    hop: float = 3.0
    usable: float = 0.9


_OF_DEVICE = ("memory", "peak", "bandwidth", "link", "network", "node")
_SHARES = ("products", "attention", "copies", "links", "usable")


def choose(name: str, interconnect: str = "", assume: Sequence[str] = ()) -> tuple[Device, Assumptions]:
    """The device `name` with what the command line says otherwise.

    Args:
        interconnect: "LINK,NETWORK" or "LINK,NETWORK,NODE": GB/s in one direction inside and between nodes, GPUs of a
            node; empty: the device's.
        assume: "NAME=NUMBER" each: a number of `Device` or of `Assumptions`.

    Raises:
        UserError: an unknown device or name, or no such number; a new device needs all numbers but `node`.
    """
    given = dict(_numbers(assume))
    if interconnect:
        given |= _interconnect(interconnect)
    of_device = {key: value for key, value in given.items() if key in _OF_DEVICE}
    shares = {key: value for key, value in given.items() if key not in _OF_DEVICE}
    known = DEVICES.get(name.lower())
    if known is None:
        missing = [key for key in _OF_DEVICE if key not in given and key != "node"]
        if missing:
            raise UserError(
                f"--device {name}: not known; choose one of {', '.join(DEVICES)}, or give the numbers of your own with "
                f"--assume NAME=NUMBER; missing: {', '.join(missing)}"
            )
        known = Device(name, 0, 0, 0, 0, 0)
    changed = {key: int(value) if key == "node" else value for key, value in of_device.items()}
    source = f"{known.source}; given: {', '.join(changed)}" if changed and name.lower() in DEVICES else known.source
    device = replace(known, source=source, **changed)  # type: ignore[arg-type]  # numbers of float fields
    return device, Assumptions(**shares)


def _interconnect(text: str) -> dict[str, float]:
    parts = text.split(",")
    if len(parts) not in (2, 3):
        raise UserError(f"--interconnect {text}: write LINK,NETWORK or LINK,NETWORK,NODE, such as 450,50 or 300,25,4")
    names = ("link", "network", "node")
    return {name: _number(f"--interconnect {text}", name, part) for name, part in zip(names, parts, strict=False)}


def _numbers(assume: Sequence[str]) -> list[tuple[str, float]]:
    known = [*_OF_DEVICE, *(field.name for field in fields(Assumptions))]
    pairs = []
    for text in assume:
        name, _, value = text.partition("=")
        if name not in known:
            raise UserError(f"--assume {text}: write NAME=NUMBER; the names are {', '.join(known)}")
        pairs.append((name, _number(f"--assume {text}", name, value)))
    return pairs


def _number(where: str, name: str, text: str) -> float:
    number = _positive(where, text)
    if name == "node" and not number.is_integer():
        raise UserError(f"{where}: GPUs of a node, {text!r} is no whole number of at least 1")
    if name in _SHARES and number > 1:
        raise UserError(f"{where}: a share, at most 1")
    return number


def _positive(where: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"{where}: {text!r} is no number above 0")
    return number
