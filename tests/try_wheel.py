"""Tries an installed wheel from outside the clone: python -I try_wheel.py CLONE. Run by `make wheel`."""

import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import hamts

clone, home = Path(sys.argv[1]).resolve(), Path(hamts.__file__).resolve()
if not home.is_relative_to(Path.cwd().resolve()) or home.is_relative_to(clone):
    sys.exit(f"hamts came from {home}, not from the wheel")
if metadata.version("hamts") != hamts.__version__:
    sys.exit(f"the wheel says {metadata.version('hamts')}, the package {hamts.__version__}")
package = resources.files("hamts")
if not (package / "py.typed").is_file():
    sys.exit("the wheel lacks py.typed")
for name in ("page.html", "report.css", "base.js", "forecasts.js", "explorer.js", "detail.js", "main.js"):
    if not (package / "report_assets" / name).is_file():
        sys.exit(f"the wheel lacks report_assets/{name}")
tomllib.loads((package / "_datasets" / "catalog.toml").read_text(encoding="utf-8"))
names = list(hamts.list_datasets())
for name in hamts.__all__:
    getattr(hamts, name)
print(f"hamts {hamts.__version__}: {len(hamts.__all__)} public names, {len(names)} data sets")
