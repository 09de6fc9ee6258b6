"""The energy counters of a machine, as files of the kernel's form that are made up."""

import pytest

from hf_clt.training.energy import EnergyMeter, rapl_counters


def make_zone(folder, name, microjoules, wraps_at=1_000_000_000):
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return folder / "energy_uj"


@pytest.fixture
def machine(tmp_path):
    """Two packages with their cores, memory that counts apart, and the whole machine, which holds the packages."""
    return {
        "first": make_zone(tmp_path / "intel-rapl:0", "package-0", 100_000_000),
        "cores": make_zone(tmp_path / "intel-rapl:0:0", "core", 50_000_000),
        "memory": make_zone(tmp_path / "intel-rapl:0:1", "dram", 7_000_000),
        "second": make_zone(tmp_path / "intel-rapl:1", "package-1", 990_000_000),
        "all": make_zone(tmp_path / "intel-rapl:2", "psys", 300_000_000),
    }


def test_packages_and_memory_count_and_counters_begin_again(machine, tmp_path):
    meter = EnergyMeter({"cpu": rapl_counters(tmp_path), "gpu": []})
    assert meter.joules == {"cpu": 0.0}
    for name, microjoules in (("first", 130e6), ("cores", 70e6), ("memory", 9e6), ("second", 5e6), ("all", 400e6)):
        machine[name].write_text(f"{microjoules:.0f}\n")
    meter.read()
    assert meter.joules["cpu"] == pytest.approx(30 + 2 + (10 + 5))  # the second one began again at 1,000 J
    machine["first"].write_text("131000000\n")
    meter.read()
    meter.read()
    assert meter.joules["cpu"] == pytest.approx(48)


def test_what_cannot_be_read_says_nothing(machine, tmp_path):
    assert rapl_counters(tmp_path / "nothing") == []
    for name in ("first", "memory"):
        machine[name].unlink()
    machine["second"].write_text("not a number")
    meter = EnergyMeter({"cpu": rapl_counters(tmp_path)})
    meter.read()
    assert meter.joules is None


def test_a_resumed_run_goes_on_unless_a_part_was_not_counted(machine, tmp_path):
    def resumed(before):
        meter = EnergyMeter({"cpu": rapl_counters(tmp_path)})
        meter.start(before, resumed=True)
        machine["first"].write_text(str(int(machine["first"].read_text()) + 1_000_000))
        meter.read()
        return meter.joules

    assert resumed({"cpu": 20.0}) == {"cpu": pytest.approx(21.0)}
    assert resumed(None) is None  # of a checkpoint from another machine
    assert resumed({"cpu": 20.0, "gpu": 3.0}) is None
    without = EnergyMeter({"cpu": []})
    without.start({"cpu": 20.0}, resumed=True)
    assert without.joules is None
