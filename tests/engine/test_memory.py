"""What memory there is, control groups included."""

from pathlib import Path

from engine import memory


def fake_system(monkeypatch, root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(memory, "PROC_ROOT", root / "proc")
    monkeypatch.setattr(memory, "CGROUP_ROOT", root / "cgroup")


def test_control_groups_limit_what_is_available(tmp_path, monkeypatch):
    meminfo = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n"}
    fake_system(monkeypatch, tmp_path / "plain", meminfo)
    assert memory.available_host_bytes() == 800 * 1024
    second = {
        **meminfo,
        "proc/self/cgroup": "0::/outer/inner\n",
        "cgroup/outer/inner/memory.max": "max\n",
        "cgroup/outer/inner/memory.current": "5\n",
        "cgroup/outer/memory.max": "5000\n",
        "cgroup/outer/memory.current": "4000\n",
        "cgroup/outer/memory.stat": "anon 1\ninactive_file 300\n",
    }
    fake_system(monkeypatch, tmp_path / "v2", second)
    assert memory.available_host_bytes() == 1300
    first = {
        **meminfo,
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/in/a/container\n",
        "cgroup/memory/memory.limit_in_bytes": "7000\n",
        "cgroup/memory/memory.usage_in_bytes": "6900\n",
    }
    fake_system(monkeypatch, tmp_path / "v1", first)
    assert memory.available_host_bytes() == 100
    fake_system(monkeypatch, tmp_path / "none", {})
    assert memory.available_host_bytes() is None
