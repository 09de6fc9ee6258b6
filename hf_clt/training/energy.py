"""
The energy of a run, from the counters that a machine offers: RAPL's for the CPUs and their memory
(`/sys/class/powercap`, which only root may read on many systems), NVML's for NVIDIA GPUs (package `nvidia-ml-py`).
They count whatever the machine does. Where there is none that can be read, nothing is said.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch


POWERCAP = Path("/sys/class/powercap")


def rapl_counters(powercap: Path = POWERCAP) -> list[tuple[Callable[[], float], float]]:
    """
    Pairs of a function that gives the joules counted so far, and the joules at which it begins again at 0: of each
    CPU package, and of the memory where it counts apart. Other zones are parts of a package, or the whole machine.
    """
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's CPUs have this name too
        try:
            name = (zone / "name").read_text().strip()
            wraps_at = int((zone / "max_energy_range_uj").read_text()) / 1e6
            int((zone / "energy_uj").read_text())
        except (OSError, ValueError):
            continue
        if name.startswith("package") or name == "dram":
            counters.append((lambda path=zone / "energy_uj": int(path.read_text()) / 1e6, wraps_at))
    return counters


def nvml_counters(devices: Iterable[torch.device]) -> list[tuple[Callable[[], float], float]]:
    """The same of these GPUs; their counters do not begin again."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return []
    except pynvml.NVMLError:
        return []
    counters = []
    for device in devices:
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:  # a card without such a counter, or a part of one
            return []
        counters.append((lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, float("inf")))
    return counters


class EnergyMeter:
    """
    Joules since [`start`]. Read it more often than a counter begins anew, which at 100 W takes about 40 minutes.

    Args:
        counters (`dict`): Lists of counters by kind, `"cpu"` and `"gpu"`; kinds without any are left out.

    Attributes:
        joules (`dict[str, float]` or None): By kind; None where a part of the run was not counted.
    """

    def __init__(self, counters: dict[str, list]):
        self._counters = {kind: found for kind, found in counters.items() if found}
        self.joules = dict.fromkeys(self._counters, 0.0) if self._counters else None
        self.start()

    def start(self, before: dict[str, float] | None = None, resumed: bool = False) -> None:
        """Counts from now on; a resumed run adds to `before`, what its earlier part counted, if it was the same."""
        if resumed:
            same = before is not None and self.joules is not None and set(before) == set(self.joules)
            self.joules = dict(before) if same else None
        self._last = {kind: [read() for read, _ in found] for kind, found in self._counters.items()}

    def read(self) -> None:
        """Brings `joules` up to now."""
        if self.joules is None:
            return
        for kind, found in self._counters.items():
            now = [read() for read, _ in found]
            for (_, wraps_at), new, last in zip(found, now, self._last[kind], strict=True):
                self.joules[kind] += new - last if new >= last else new - last + wraps_at
            self._last[kind] = now


__all__ = ["EnergyMeter", "nvml_counters", "rapl_counters"]
