"""tests/run.sh as a script: what its steps are started with.

Needs nothing but Python's standard library. Run by ctest, or by hand:
python3 tests/structure/run_script_test.py
"""

import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]


class RunScript(unittest.TestCase):
    """A copy of the script, with stand-ins for the programs that build and test."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)
        (self.root / "tests").mkdir()
        shutil.copy(ROOT / "tests" / "run.sh", self.root / "tests")
        # Python's packages are there already.
        for name, installed in [
            ("requirements.txt", ".venv/requirements.txt"),
            ("perf_analyzer.txt", ".venv/perf_analyzer/requirements.txt"),
        ]:
            for path in (self.root / "tests" / name, self.root / installed):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("none\n")
        self.bin = self.root / "bin"
        self.bin.mkdir()
        for program in ("cmake", "ctest"):
            (self.bin / program).write_text(
                f'#!/bin/sh\nenv | grep ^EPSERVE_ >>"{self.root}/{program}.env"\nexit 0\n'
            )
            (self.bin / program).chmod(0o755)

    def variables_of(self, program, **exported):
        own = {key: value for key, value in os.environ.items() if not key.startswith("EPSERVE_")}
        result = subprocess.run(
            [self.root / "tests" / "run.sh", "--quick", "--no-install"],
            env=own | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | exported,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        self.assertEqual(0, result.returncode, result.stdout + result.stderr)
        return set((self.root / f"{program}.env").read_text().splitlines())

    def test_flags_that_another_service_has_in_the_environment_reach_no_test(self):
        for program in ("cmake", "ctest"):
            self.assertEqual(
                {"EPSERVE_REQUIRE_PYTHON=1"},
                self.variables_of(
                    program, EPSERVE_CHECKPOINT="/models/x", EPSERVE_LISTEN="0.0.0.0:8001"
                ),
            )

    def test_variables_of_the_tests_themselves_reach_them(self):
        given = {
            "EPSERVE_SOAK_SECONDS": "600",
            "EPSERVE_CUDA_IMAGE": "1",
            "EPSERVE_SIM_SEED": "7",
            "EPSERVE_FUZZ_ROUNDS": "9",
            "EPSERVE_TEST_SLOWNESS": "3",
        }
        self.assertEqual(
            {"EPSERVE_REQUIRE_PYTHON=1"} | {f"{name}={value}" for name, value in given.items()},
            self.variables_of("ctest", **given),
        )


if __name__ == "__main__":
    unittest.main()
