#!/usr/bin/env python3
"""Measures dispatch and combine on the GPUs of one host, and prints the README's table.

    tests/bench/gpu_table.py --program build/release/bin/epserve-microbench --out DIR

Writes DIR/alltoallv.jsonl (one JSON object a line, as epserve-microbench prints it) and
DIR/alltoallv.md. One process a GPU; every line's result is verified by the program itself.

With R ranks and top-8 a received row has 8 / (ranks that hold any of the token's experts) experts
here to add up: 4 at two ranks, 2.2 at four. The lines with top-4 at two ranks come near the latter.
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
PREFILL_CASES = [
    ("prefill 4096 × 7168, 24 blocks", PREFILL),
    ("prefill 4096 × 7168, 64 blocks", PREFILL + ["--comm-blocks=64"]),
    ("prefill 4096 × 7168, 48 blocks", PREFILL + ["--comm-blocks=48"]),
    ("prefill 4096 × 7168, fp8 dispatch, 24 blocks", PREFILL + ["--fp8"]),
    ("prefill 4096 × 2048, 128 experts, 24 blocks", SMALL),
    ("prefill 4096 × 2048, 128 experts, 64 blocks", SMALL + ["--comm-blocks=64"]),
    ("prefill 4096 × 7168, top-4, 24 blocks", PREFILL + ["--topk=4"]),
]
DECODE_CASES = [
    ("decode 128 × 7168, fp8 dispatch", DECODE + ["--tokens=128", "--fp8"]),
    ("decode 128 × 7168", DECODE + ["--tokens=128"]),
    ("decode 16 × 7168", DECODE + ["--tokens=16"]),
    ("decode 1 × 7168", DECODE + ["--tokens=1"]),
]


# The other backends have no blocks of ours, no cast and no path of their own for few tokens.
CASES = {
    "cuda": PREFILL_CASES + DECODE_CASES,
    "nccl": [
        ("prefill 4096 × 7168", PREFILL),
        ("prefill 4096 × 2048, 128 experts", SMALL),
        ("prefill 128 × 7168", ["--tokens=128", "--hidden=7168", "--experts=256"]),
        ("prefill 1 × 7168", ["--tokens=1", "--hidden=7168", "--experts=256"]),
    ],
}


def num_gpus():
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())


def measure(program, backend, ranks, arguments):
    command = [
        program, "alltoallv", f"--backend={backend}", f"--ranks={ranks}", "--json", *arguments
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {result.returncode}: {result.stderr.strip()}")
    return json.loads(result.stdout)


def row(name, figures):
    both = f"{figures['pair_us_p50']:.0f}" if "pair_us_p50" in figures else ""
    return (
        f"| {name} | {figures['dispatch_us_p50']:.0f} | {figures['copy_limit_us']:.0f} "
        f"| {figures['combine_us_p50']:.0f} | {figures['combine_copy_limit_us']:.0f} | {both} "
        f"| {figures['max_relative_error']:.1e} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default="build/release/bin/epserve-microbench")
    parser.add_argument("--backend", choices=sorted(CASES), default="cuda")
    parser.add_argument("--ranks", type=int, help="processes, one a GPU; default: the GPUs here")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write to")
    arguments = parser.parse_args()
    ranks = arguments.ranks or num_gpus()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| p50, us | dispatch | its copy limit | combine | its copy limit | both in a row "
        "| largest relative error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    with (arguments.out / "alltoallv.jsonl").open("w") as log:
        for name, case in CASES[arguments.backend]:
            figures = measure(arguments.program, arguments.backend, ranks, case)
            log.write(json.dumps(figures) + "\n")
            lines.append(row(name, figures))
            print(lines[-1], flush=True)
    (arguments.out / "alltoallv.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
