#!/usr/bin/env bash
# Known vulnerabilities of the packages in requirements.lock: bash scripts/audit.sh [arguments of pip-audit, such as -s osv]
# It needs a network: for pip-audit, which goes into a temporary environment, and for the advisories of pypi.org.
# Exit codes: 0 none is known, 1 some are, 3 not all packages could be looked up.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

unknown() {
    echo "audit: $1; whether the packages have known vulnerabilities is NOT known." >&2
    sed 's/^/audit:   /' "$work/log" | tail -n 5 >&2
    exit 3
}

"${PYTHON:-python3}" -m venv "$work/venv" &> "$work/log" || unknown "no environment could be made for pip-audit"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 20 pip-audit &> "$work/log" \
    || unknown "pip-audit could not be installed (is there a network, or PIP_INDEX_URL?)"
"$work/venv/bin/pip-audit" --requirement "$root/requirements.lock" --no-deps --disable-pip --progress-spinner off \
    --format json --output "$work/report.json" "$@" &> "$work/log" || [ -s "$work/report.json" ] \
    || unknown "the advisories could not be asked for"
"$work/venv/bin/python" - "$work/report.json" << 'END'
import json
import sys

packages = json.load(open(sys.argv[1]))["dependencies"]
found = [(package, one) for package in packages for one in package.get("vulns", [])]
for package, one in found:
    cure = ", ".join(one["fix_versions"]) or "none yet"
    print(f"audit: {package['name']} {package['version']}: {one['id']} {' '.join(one['aliases'])} (fixed in: {cure})")
skipped = [package for package in packages if "skip_reason" in package]
print(f"audit: {len(packages) - len(skipped)} of {len(packages)} packages looked up, {len(found)} known vulnerabilities")
if skipped:
    names = ", ".join(package["name"] for package in skipped[:5]) + (" ..." if len(skipped) > 5 else "")
    print(f"audit: {names}: NOT known whether they have any: {skipped[0]['skip_reason']}", file=sys.stderr)
sys.exit(1 if found else 3 if skipped or not packages else 0)
END
