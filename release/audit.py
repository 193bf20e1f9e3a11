"""Ask pip-audit whether a package of this environment has a known vulnerability.

It ends with status 1 where one has. Where the service cannot be asked it says so in one line and ends with 0: no
network is no vulnerability.
"""

from __future__ import annotations

import json
import subprocess
import sys

_COMMAND = ("-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10", "--skip-editable")


def main() -> int:
    """Print what was found; returns the exit status."""
    done = subprocess.run([sys.executable, *_COMMAND, *sys.argv[1:]], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        sys.stdout.write(f"NOT AUDITED: the vulnerability service cannot be asked ({why[:200]}).\n")
        return 0
    # A package that the service does not know, or could not be asked about, has a reason in place of an answer
    asked = [package for package in packages if "vulns" in package]
    if not asked:
        sys.stdout.write(f"NOT AUDITED: the vulnerability service knows none of {len(packages)} packages.\n")
        return 0
    found = [(package, vulnerability) for package in asked for vulnerability in package["vulns"]]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "none yet"
        sys.stdout.write(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}\n")
    unasked = f", {len(packages) - len(asked)} unknown to the service" if len(asked) < len(packages) else ""
    sys.stdout.write(f"{len(asked)} packages{unasked}, {len(found)} known vulnerabilities.\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
