#!/usr/bin/env python3
"""Makes crates/tp-model/tests/fixtures: small random checkpoints and what `transformers` says.

    pip install -r scripts/requirements-fixtures.txt
    scripts/make_fixtures.py                 # write all (deterministic)
    scripts/make_fixtures.py --only NAME     # one of them
    scripts/make_fixtures.py --check         # regenerate in a temporary folder and compare
"""

import argparse
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from fixtures.checkpoint import write_checkpoint
from fixtures.golden import write_golden
from fixtures.specs import FIXTURES, Fixture

STORED = Path(__file__).resolve().parent.parent / "crates/tp-model/tests/fixtures"


def make(fixture: Fixture, root: Path) -> Path:
    folder = root / fixture.name
    if folder.exists():
        shutil.rmtree(folder)
    write_checkpoint(fixture, folder)
    figures = write_golden(fixture, folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    margin = min(f["min_margin"] for f in figures.values())
    distinct = min(f["distinct_tokens"] for f in figures.values())
    print(
        f"{fixture.name:20} {size / 1e3:7.0f} kB  smallest margin {margin:.2e}  "
        f"fewest distinct tokens {distinct}",
        flush=True,
    )
    return folder


def differences(stored: Path, made: Path) -> list[str]:
    """What differs. Golden logits may differ in the last digits between CPUs, nothing else may."""
    names = {p.name for p in stored.iterdir()} | {p.name for p in made.iterdir()}
    found = []
    for name in sorted(names):
        a, b = stored / name, made / name
        if not (a.exists() and b.exists()):
            found.append(f"{a}: {'missing' if b.exists() else 'not made by this script'}")
        elif name == "golden.safetensors":
            found += _golden_differences(a, b)
        elif name != "golden.json" and a.read_bytes() != b.read_bytes():
            found.append(f"{a}: contents differ")
    return found


def _golden_differences(a: Path, b: Path) -> list[str]:
    x, y = load_file(a), load_file(b)
    if x.keys() != y.keys():
        return [f"{a}: other tensors than expected: {sorted(x.keys() ^ y.keys())}"]
    found = []
    for key in x:
        if x[key].shape != y[key].shape:
            found.append(f"{a}: {key}: shape {tuple(x[key].shape)}, made {tuple(y[key].shape)}")
        elif x[key].is_floating_point():
            scale = y[key].abs().amax(-1, keepdim=True)
            error = ((x[key] - y[key]).abs() / scale).max().item()
            if not error < 2e-5:
                found.append(f"{a}: {key}: relative difference {error:.1e}")
        elif not torch.equal(x[key], y[key]):
            found.append(f"{a}: {key}: token ids differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="this fixture alone")
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    args = parser.parse_args()

    chosen = [f for f in FIXTURES if args.only in (None, f.name)]
    if not chosen:
        parser.error(f"no fixture {args.only!r}; there are {', '.join(f.name for f in FIXTURES)}")
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, safetensors {safetensors.__version__}, "
        f"tokenizers {tokenizers.__version__}, numpy {numpy.__version__}"
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the tensors are tiny; one order of summation everywhere

    if not args.check:
        for fixture in chosen:
            make(fixture, STORED)
        return
    with tempfile.TemporaryDirectory() as tmp:
        found = []
        for fixture in chosen:
            found += differences(STORED / fixture.name, make(fixture, Path(tmp)))
    if found:
        sys.exit("\n".join(found))
    print(f"{len(chosen)} fixtures are as stored")


if __name__ == "__main__":
    main()
