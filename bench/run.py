"""The project's measuring stick: ``script/bench`` runs it, in one go, on one computer.

Every figure is measured in this run and given as a ratio to what it is compared with in the same
run; absolute times drift with the computer. Writes JSON, a table and a chart to ``bench/results``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from bench import chart, folders, inside, starts, survival, virtualbox
from vmjob.home import Home
from vmjob.image.recipe import Recipe
from vmjob.image.store import ImageStore
from vmjob.machine.qemu import argv, programs

#: Figure -> its name in the chart.
CHARTED = {
    "warm: vmjob run -- true s": "vmjob run, second call",
    "bare QEMU boot s": "bare QEMU boot",
    "cold: start to first byte s": "vmjob run --cold",
    "virtme-ng: one command s": "virtme-ng, one command",
    "quicksand: one command s": "quicksand, one command",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each (median is given)")
    parser.add_argument("--size", type=int, default=1024, help="size of the file put and got, MiB")
    parser.add_argument("--many", type=int, default=100, help="idle machines of 128 MiB at once")
    parser.add_argument("--peers-python", metavar="PATH",
                        help="a Python in whose environment virtme-ng or quicksand is installed")
    parser.add_argument("--peers-kernel", metavar="PATH",
                        help="a kernel with 9p for virtme-ng (of linux-image-amd64)")
    options = parser.parse_args()
    home = Home()
    store = ImageStore(home)
    store.ensure(Recipe(), lambda fraction, text: None)
    image = store.verified("default")
    runs = options.runs
    with tempfile.TemporaryDirectory(dir=home.cache) as name:
        place = Path(name)
        figures = starts.starts(home, image, place, runs)
        others = starts.peers(options.peers_python, options.peers_kernel, max(1, runs // 2))
        figures |= others
        for peer, seconds in others.items():
            figures[f"vmjob run, warm / {peer.partition(':')[0]}"] = (
                figures["warm: vmjob run -- true s"] / seconds)
        figures["--help / python -c pass"] = starts.help_ratio(4 * runs)
        figures |= asyncio.run(inside.one_machine(home, place, runs, options.size))
        figures["host memory of 1 put and get MB"] = inside.host_memory(home, place, options.size)
        figures |= asyncio.run(survival.checkpoints(home, place, runs))
        figures |= asyncio.run(survival.slowdown(home, place, runs))
        figures |= asyncio.run(survival.against_bare(home, image, place, runs))
        figures |= asyncio.run(survival.intrusion(home, runs))
        figures |= asyncio.run(folders.delays(home, place, runs))
        figures |= asyncio.run(virtualbox.figures(home, min(runs, 3)))
        figures |= asyncio.run(inside.many_machines(home, 10, 256))
        figures |= asyncio.run(inside.many_machines(home, options.many, 128))
    report: dict[str, Any] = {
        "figures": figures, "runs": runs, "size_mib": options.size,
        "qemu": programs.version(programs.find(programs.system_binary())),
        "kernel": image.manifest.kernel_version, "machine_type": argv.MACHINE,
        "cpu_model": argv.CPU_MODELS["tcg"], "host": platform.platform(),
        "host_cpus": os.cpu_count(), "python": platform.python_version()}
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = [f"| {name} | {value:.3g} |" for name, value in figures.items()]
    table = "\n".join(["| figure | median |", "| --- | --- |", *rows])
    (results / "bench.md").write_text(table + "\n")
    (results / "starts.svg").write_text(chart.bars(
        "Time to run one command without KVM", {
            shown: figures[figure] for figure, shown in CHARTED.items() if figure in figures},
        "s", frozenset({"vmjob run, second call", "vmjob run --cold"})))
    print(table)


if __name__ == "__main__":
    main()
