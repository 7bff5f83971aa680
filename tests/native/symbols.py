"""No code compiled for one instruction set may be merged into another's by the linker.

A function that several objects define weakly (a template, an inline function) is linked once, from
whichever object comes first. So an object compiled for AVX-512 must not define such a function
under a name that baseline code uses too: the program would end on a processor without AVX-512.

    symbols.py NM OBJECT...    objects named .../kernels_ISA.dir/..., as CMake names them
"""

from __future__ import annotations

import re
import subprocess
import sys

# nm writes a local symbol's letter in lower case; "u" and "v", "w" are weak or unique all the same.
LOCAL = set("tdbra")

# No code: where the C++ runtime keeps the address of its unwinder, the same in every object that
# has a destructor to run.
HARMLESS = {"DW.ref.__gxx_personality_v0"}


def foreign_symbols(nm: str, path: str) -> list[str]:
    """What `path`, an object of one instruction set, defines for others under a shared name."""
    isa = re.search(r"kernels_(\w+)\.dir", path)
    if not isa:
        raise SystemExit(f"{path}: expected an object in a directory kernels_ISA.dir")
    command = [nm, "--demangle", "--defined-only", path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines]
    if not symbols:
        raise SystemExit(f"{path}: defines nothing; nothing was checked")
    own = f"rnnfast::cpu::{isa[1]}::"
    table = f"rnnfast::cpu::kernels_{isa[1]}"
    return [
        name
        for kind, name in symbols
        if kind not in LOCAL and name not in {table, *HARMLESS} and own not in name
    ]


def main() -> int:
    """Prints every offender; 1 if there are any."""
    nm, *objects = sys.argv[1:]
    found = {path: foreign_symbols(nm, path) for path in objects}
    for path, names in found.items():
        for name in names:
            print(f"{path} defines {name} outside of its instruction set's namespace")
    if not objects:
        raise SystemExit("no objects given; nothing was checked")
    print(f"{len(objects)} objects, {sum(map(len, found.values()))} symbols that could be merged")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
