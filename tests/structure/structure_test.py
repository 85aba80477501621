"""Checks of how the code is laid out: who may include what, sizes, and that the README is whole.

Needs nothing but Python's standard library. Run by ctest, or by hand:
python3 tests/structure/structure_test.py
"""

import os
import pathlib
import re
import subprocess
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN_DIR = pathlib.Path(os.environ.get("EPSERVE_BIN_DIR", ROOT / "build" / "release" / "bin"))

MAX_LINES = 500
MAX_COLUMNS = 100
CODE = {".h", ".cc", ".cu", ".cuh", ".proto", ".py", ".sh"}
CPP = {".h", ".cc", ".cu", ".cuh"}
SKIPPED = {"build", "__pycache__"}
PROGRAMS = {
    "epserve-coordinator": [],
    "epserve-worker": [],
    "epserve": ["up", "infer", "verify", "bench", "status", "health", "drain", "make-checkpoint"],
    "epserve-microbench": ["alltoallv", "ffn", "rpc"],
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
# Headers of the C and C++ libraries and of the system have no slash but in these folders.
SYSTEM_FOLDERS = ("sys/", "linux/", "arpa/", "netinet/")
GENERATED = re.compile(r"\.(grpc\.)?pb\.h$")
EDGE = re.compile(r"(_service|_stream|proto_convert[a-z_]*)\.(h|cc)$")


def files(*folders, suffixes=CODE):
    """Paths below `folders` (the whole tree if none), relative to the root."""
    found = []
    for folder in folders or (".",):
        assert (ROOT / folder).is_dir(), f"no folder {folder}"
        for directory, names, leaves in os.walk(ROOT / folder):
            # Of hidden folders only .ci is the repository's.
            names[:] = [
                name
                for name in names
                if name not in SKIPPED and (name == ".ci" or not name.startswith("."))
            ]
            for leaf in leaves:
                path = pathlib.Path(directory, leaf).relative_to(ROOT)
                if path.suffix in suffixes:
                    found.append(path)
    return sorted(found)


def lines(path):
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def includes(path):
    """(line number, quoted or not, what) of every include."""
    for number, line in enumerate(lines(path), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match.group(1) == '"', match.group(2)


def is_system(header):
    return "/" not in header or header.startswith(SYSTEM_FOLDERS)


class IncludeRules(unittest.TestCase):
    def check(self, folders, allowed, suffixes=CPP):
        wrong = [
            f"{path}:{number}: {header}"
            for path in files(*folders, suffixes=suffixes)
            for number, _, header in includes(path)
            if not allowed(path, header)
        ]
        self.assertEqual([], wrong)

    def test_runtime_includes_neither_grpc_nor_protobuf_nor_other_parts(self):
        banned = ("grpc", "google/", "proto/", "server/", "client/", "tests/", "prometheus/")
        self.check(
            ["runtime"],
            lambda _, header: not header.startswith(banned) and not GENERATED.search(header),
        )

    def test_runtime_includes_spdlog_in_sources_only(self):
        self.check(
            ["runtime"],
            lambda path, header: path.suffix == ".cc" or not header.startswith(("spdlog/", "fmt/")),
        )

    def test_client_includes_neither_server_nor_runtime(self):
        self.check(["client"], lambda _, header: not header.startswith(("server/", "runtime/")))

    def test_server_includes_no_client(self):
        self.check(["server"], lambda _, header: not header.startswith("client/"))

    def test_coordinator_includes_no_worker_and_no_weights(self):
        banned = (
            "server/worker/", "runtime/alltoallv/", "runtime/experts/"
        )  # fmt: skip
        self.check(["server/coordinator"], lambda _, header: not header.startswith(banned))

    def test_worker_includes_no_coordinator(self):
        self.check(
            ["server/worker"], lambda _, header: not header.startswith("server/coordinator/")
        )

    def test_state_machine_includes_std_and_absl_only(self):
        own = "server/coordinator/state_machine/"
        clocks = {"chrono", "thread", "mutex", "ctime", "time.h", "condition_variable", "random"}

        pure = ("runtime/routing/count_matrix.h", "server/common/small_batch.h")

        def allowed(_, header):
            if header in clocks or header.startswith(("absl/time/clock", "absl/synchronization/")):
                return False
            return (
                header.startswith((own, "absl/"))
                or header in pure
                or is_system(header)
            )

        self.check(["server/coordinator/state_machine"], allowed)

    def test_generated_headers_are_included_at_the_edges_only(self):
        def allowed(path, header):
            if not GENERATED.search(header):
                return True
            return path.parts[0] in ("client", "tests") or bool(EDGE.search(path.name))

        self.check(["runtime", "server", "client", "tests"], allowed)

    def test_own_headers_are_included_from_the_root(self):
        wrong = [
            f"{path}:{number}: {header}"
            for path in files("runtime", "server", "client", "tests", suffixes=CPP)
            for number, quoted, header in includes(path)
            if quoted
            and not header.startswith(("absl/", "google/", "nlohmann/", "gtest/", "gmock/"))
            and not GENERATED.search(header)
            and not (ROOT / header).is_file()
        ]
        self.assertEqual([], wrong)


class Sizes(unittest.TestCase):
    def test_files_stay_short(self):
        long = {str(path): len(lines(path)) for path in files() if len(lines(path)) > MAX_LINES}
        self.assertEqual({}, long)

    def test_lines_stay_narrow(self):
        wide = [
            f"{path}:{number}"
            for path in files()
            for number, line in enumerate(lines(path), 1)
            if len(line) > MAX_COLUMNS
        ]
        self.assertEqual([], wide)


class Words(unittest.TestCase):
    def test_nothing_is_left_to_be_done_and_no_machine_is_named(self):
        # Put together here, so that this file does not hold them.
        banned = re.compile(
            r"\bTO" r"DO\b|\bFIX" r"ME\b|\bXX" r"X\b|\bHA" r"CK\b"
            r"|/wor" r"k/|/tmp/bri" r"ef|/ro" r"ot/|/ho" r"me/"
        )  # fmt: skip
        suffixes = CODE | {".txt", ".json", ".md", ".yaml", ".yml", ".supp"}
        found = [
            f"{path}:{number}: {line.strip()}"
            for path in files(suffixes=suffixes)
            for number, line in enumerate(lines(path), 1)
            if banned.search(line)
        ]
        self.assertEqual([], found)

    def test_environment_is_read_by_options_alone(self):
        # But for what is the system's and no setting of a program's own. command_line.cc has the
        # options that the servers share.
        system = re.compile(r'getenv\("(TERM|NO_COLOR|TMPDIR)"\)')
        found = [
            f"{path}:{number}"
            for path in files("runtime", "server", "client", suffixes=CPP)
            if path.name not in ("options.cc", "command_line.cc")
            for number, line in enumerate(lines(path), 1)
            if re.search(r"\b(secure_)?getenv\(|->envname\(", line) and not system.search(line)
        ]
        self.assertEqual([], found)


class Build(unittest.TestCase):
    def test_every_source_is_listed_where_it_lies(self):
        listed = {
            path.parent: (ROOT / path).read_text()
            for path in files(suffixes={".txt"})
            if path.name == "CMakeLists.txt"
        }
        # What the tests share is listed by those that use it.
        shared = pathlib.Path("tests", "support")
        listed[shared] = "\n".join(t for f, t in listed.items() if f.parts[:1] in ((), ("tests",)))
        missing = []
        for path in files("runtime", "server", "client", "tests", suffixes={".cc", ".cu"}):
            near = [listed.get(folder, "") for folder in path.parents]
            if not any(re.search(rf"\b{re.escape(path.name)}\b", text) for text in near):
                missing.append(str(path))
        self.assertEqual([], missing)

    def test_every_end_to_end_test_is_listed(self):
        listed = (ROOT / "tests" / "e2e" / "CMakeLists.txt").read_text()
        missing = [
            path.name
            for path in files("tests/e2e", suffixes={".py"})
            if path.name.startswith("test_") and path.stem.removeprefix("test_") not in listed
        ]
        self.assertEqual([], missing)

    def test_no_sources_are_globbed(self):
        found = [
            str(path)
            for path in files(suffixes={".txt", ".cmake"})
            if path.name != "requirements.txt"
            and re.search(r"\bfile\s*\(\s*GLOB|aux_source_directory", (ROOT / path).read_text())
        ]
        self.assertEqual([], found)


class Readme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.text = (ROOT / "README.md").read_text(encoding="utf-8")
        cls.flags = {}
        for program, commands in PROGRAMS.items():
            if not (BIN_DIR / program).is_file():
                raise unittest.SkipTest(f"{BIN_DIR / program} is not built")
            for command in [[], *([command] for command in commands)]:
                result = subprocess.run(
                    [BIN_DIR / program, *command, "--help"],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=True,
                )
                name = " ".join([program, *command])
                flag = r"(?m)^\s+(?:-\w,)?(--[a-z][a-z0-9-]*)"
                cls.flags[name] = set(re.findall(flag, result.stdout))

    def test_every_flag_of_every_program_is_in_the_readme(self):
        named = set(re.findall(r"--[a-z][a-z0-9-]*", self.text))
        missing = {
            program: sorted(flags - named) for program, flags in self.flags.items() if flags - named
        }
        self.assertEqual({}, missing)

    def test_every_flag_in_a_table_of_the_readme_is_a_programs(self):
        known = set().union(*self.flags.values())
        tabled = set(re.findall(r"(?m)^\|\s*`(--[a-z][a-z0-9-]*)", self.text))
        self.assertEqual(set(), tabled - known)

    def test_up_hands_on_every_flag_that_it_does_not_set_itself(self):
        own = {
            "--coordinator", "--device", "--health-listen", "--local-rank", "--metrics-port-file",
            "--port-file", "--version", "--worker-id",
        }  # fmt: skip
        children = self.flags["epserve-coordinator"] | self.flags["epserve-worker"]
        self.assertEqual(set(), children - own - self.flags["epserve up"])

    def test_every_metric_is_in_the_readme(self):
        source = (ROOT / "server" / "coordinator" / "metrics.cc").read_text()
        names = set(re.findall(r'"(epserve_[a-z_]+)"', source))
        self.assertTrue(names)
        self.assertEqual(set(), {name for name in names if name not in self.text})


if __name__ == "__main__":
    unittest.main()
