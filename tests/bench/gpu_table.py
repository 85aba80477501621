#!/usr/bin/env python3
"""Measures dispatch and combine on the GPUs of one host, and prints the README's table.

    tests/bench/gpu_table.py --program build/cuda/bin/epserve-microbench --ranks 4 --out DIR

Writes DIR/alltoallv.jsonl (one JSON object a line, as epserve-microbench prints it) and
DIR/alltoallv.md. One process a GPU; every line's result is verified by the program itself.
"""

import argparse
import json
import pathlib
import subprocess
import sys

PREFILL = ["--tokens=4096", "--hidden=7168", "--experts=256"]
SMALL = ["--tokens=4096", "--hidden=2048", "--experts=128"]
DECODE = ["--hidden=7168", "--experts=256", "--mode=decode"]

# What is measured, and the arguments that measure it.
CASES = [
    ("prefill 4096 × 7168, 24 blocks", PREFILL),
    ("prefill 4096 × 7168, 64 blocks", PREFILL + ["--comm-blocks=64", "--reduce-blocks=64"]),
    ("prefill 4096 × 7168, 96 + 32 blocks", PREFILL + ["--comm-blocks=96", "--reduce-blocks=32"]),
    ("prefill 4096 × 7168, fp8 dispatch, 24 blocks", PREFILL + ["--fp8"]),
    ("prefill 4096 × 2048, 128 experts, 24 blocks", SMALL),
    (
        "prefill 4096 × 2048, 128 experts, 64 blocks",
        SMALL + ["--comm-blocks=64", "--reduce-blocks=64"],
    ),
    ("decode 128 × 7168, fp8 dispatch", DECODE + ["--tokens=128", "--fp8"]),
    ("decode 128 × 7168", DECODE + ["--tokens=128"]),
    ("decode 1 × 7168", DECODE + ["--tokens=1"]),
]


def measure(program, ranks, arguments):
    command = [program, "alltoallv", "--backend=cuda", f"--ranks={ranks}", "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {result.returncode}: {result.stderr.strip()}")
    return json.loads(result.stdout)


def row(name, figures):
    both = f"{figures['pair_us_p50']:.0f}" if "pair_us_p50" in figures else ""
    return (
        f"| {name} | {figures['dispatch_us_p50']:.0f} | {figures['copy_limit_us']:.0f} "
        f"| {figures['combine_us_p50']:.0f} | {figures['combine_copy_limit_us']:.0f} | {both} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="build/cuda/bin/epserve-microbench")
    parser.add_argument("--ranks", type=int, default=4, help="GPUs, one process each")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| p50, us | dispatch | its copy limit | combine | its copy limit | both in a row |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with (arguments.out / "alltoallv.jsonl").open("w") as log:
        for name, case in CASES:
            figures = measure(arguments.program, arguments.ranks, case)
            log.write(json.dumps(figures) + "\n")
            lines.append(row(name, figures))
            print(lines[-1], flush=True)
    (arguments.out / "alltoallv.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
