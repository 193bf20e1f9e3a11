"""Write the software bill of materials of this environment: `python release/sbom.py FILE` (CycloneDX 1.6, JSON).

It lists what this package needs and has here, by name, version, license and package URL, and which needs which.
`make dist` writes it for the pinned stack into dist/.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from version import __version__

PACKAGE = "alignment"


def bill(version: str) -> dict[str, Any]:
    """The bill: this package in a version, and all that it needs in this environment, directly or not."""
    found = needed(PACKAGE)
    ref = f"pkg:pypi/{PACKAGE}@{version.replace('+', '%2B')}"
    own = component(found.pop(PACKAGE)) | {"type": "application", "version": version, "purl": ref, "bom-ref": ref}
    components = [component(found[name]) for name in sorted(found)]
    needs = requirements(metadata.distribution(PACKAGE))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": components,
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(purl(found[name]) for name in found.keys() & set(needs))},
            *(
                {"ref": purl(found[name]), "dependsOn": sorted(purl(found[i]) for i in direct(found[name], found))}
                for name in sorted(found)
            ),
        ],
    }


def needed(name: str) -> dict[str, metadata.Distribution]:
    """A package and all that it needs here, by their normalised names."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [canonicalize_name(name)]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        try:
            found[one] = metadata.distribution(one)
        except metadata.PackageNotFoundError:  # for another system, or an extra that was left out
            continue
        waiting += requirements(found[one])
    return found


def requirements(package: metadata.Distribution) -> list[str]:
    """The normalised names of what a package needs on this machine, without extras."""
    lines = map(Requirement, package.requires or [])
    return [canonicalize_name(r.name) for r in lines if r.marker is None or r.marker.evaluate({"extra": ""})]


def direct(package: metadata.Distribution, found: dict[str, metadata.Distribution]) -> set[str]:
    """Those of what a package needs that are installed."""
    return set(requirements(package)) & found.keys()


def component(package: metadata.Distribution) -> dict[str, Any]:
    """The entry of one package."""
    entry = {
        "type": "library",
        "bom-ref": purl(package),
        "name": package.name,
        "version": package.version,
        "purl": purl(package),
    }
    return entry | ({"licenses": [found]} if (found := license_of(package)) else {})


def license_of(package: metadata.Distribution) -> dict[str, Any] | None:
    """What a package says of its license: an expression, else its classifier, else a short name."""
    if expression := package.metadata.get("License-Expression"):
        return {"expression": expression}
    named = [
        line.rpartition(" :: ")[2] for line in package.metadata.get_all("Classifier") or [] if "License ::" in line
    ]
    stated = (package.metadata.get("License") or "").strip()
    name = " and ".join(named) or (stated if stated and len(stated) < 60 and "\n" not in stated else "")
    return {"license": {"name": name}} if name else None


def purl(package: metadata.Distribution) -> str:
    """The package URL."""
    return f"pkg:pypi/{canonicalize_name(package.name)}@{package.version.replace('+', '%2B')}"


def main() -> None:
    """Write the bill into the file that is named."""
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bill(__version__), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
