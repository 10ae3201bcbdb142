"""Say why the environment whose Python runs this cannot be used, or nothing.

    .venv/bin/python -I .ci/environment.py FOLDER STAMP [VERSION]

-I shows the packages as a kernel in another folder sees them. FOLDER is the checkout, STAMP the file that marks a
finished installation, VERSION what Python is asked for, such as 3.12.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

here, stamp, *wanted = sys.argv[1:]
found = [Path(spec.origin).resolve().parents[1] for name in ("koala_lib", "koala_lab") if (spec := find_spec(name))]
foreign = [folder for folder in found if folder not in (Path(here).resolve(), Path(here).resolve() / "lab")]
if not find_spec("pip"):
    print("has no pip")
elif foreign:
    print("belongs to", foreign[0])
elif Path(stamp).exists() and len(found) < 2:
    print("belongs to a folder that is gone")
elif any(not sys.version.startswith(f"{version}.") for version in wanted):
    print("is of Python", ".".join(map(str, sys.version_info[:2])), "and not", *wanted)
