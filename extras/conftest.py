"""Tests of extras/ run if its packages are installed: pip install -r extras/requirements.txt"""

from importlib.util import find_spec

PACKAGES = ["accelerate", "bitsandbytes", "peft", "safetensors", "schedulefree", "scipy"]
PACKAGES += ["sklearn", "transformers"]
MISSING = [name for name in PACKAGES if find_spec(name) is None]
if MISSING:
    collect_ignore = ["test_extras.py", "experiments"]


def pytest_report_header() -> str | None:
    if MISSING:
        return (
            f"most tests of extras/ are left out, because these are missing: {', '.join(MISSING)}"
        )
