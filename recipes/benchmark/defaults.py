"""Run recipes without flags, one after the other, and print a line of the table in recipes/README.md for each.

    python recipes/benchmark/defaults.py
    python recipes/benchmark/defaults.py causal_lm sft

Results are those of the test data. Seconds are those of processors, all cores together, which other work on the machine
changes little. Each run is left in runs/, with its log.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]


def line(name: str) -> str:
    """Run a recipe; returns a row of the table, or what went wrong."""
    directory = Path("runs", name)
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(RECIPES / f"{name}.py"), "--output_dir", str(directory), "--overwrite_output_dir"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (directory / "log.txt").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if code:
        return f"| `{name}` | failed with code {code}: see {directory / 'log.txt'} |"
    results = re.findall(r"^test (.*?) +([\d.]+) +([\d.]+)$", (directory / "log.txt").read_text(), re.MULTILINE)
    report = json.loads((directory / "report.json").read_text())
    metric, dense, pruned = results[0]
    sizes = " to ".join(f"{report[model]['weight_bytes'] / 1e6:.1f}" for model in ("dense", "pruned"))
    macs = " to ".join(f"{report[model]['macs'] / 1e9:.2f}" for model in ("dense", "pruned"))
    return (
        f"| `{name}` | {seconds:.0f} | {metric} | {dense} | {pruned} | {report['achieved']:.0%} | {sizes} | {macs} | "
        f"{report['speedup']:.2f} |"
    )


def main() -> None:
    """Run from the command line."""
    names = sorted(path.stem for path in RECIPES.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="RECIPE", nargs="*", help="default: all")
    chosen = parser.parse_args().names or names
    if unknown := set(chosen) - set(names):
        parser.error(f"no recipe is called {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    print("| recipe | CPU seconds | metric | dense | pruned | removed | weights, MB | MACs, G | times as fast |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for name in chosen:
        print(line(name), flush=True)


if __name__ == "__main__":
    main()
