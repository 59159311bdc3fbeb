#!/usr/bin/env bash
# Installs Debian's chromium for the tests of this folder, where that is possible; says so and goes on where it is not.
set -uo pipefail
for name in "${HAMTS_BROWSER:-}" chromium chromium-browser google-chrome; do
    if [ -n "$name" ] && command -v "$name" >/dev/null; then
        echo "== browser: $(command -v "$name")"
        exit 0
    fi
done
apt=(apt-get)
[ "$(id -u)" = 0 ] || apt=(sudo -n apt-get)
if command -v apt-get >/dev/null && "${apt[@]}" update -qq >/dev/null 2>&1 &&
    DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1; then
    echo "== browser: $(command -v chromium), installed"
else
    echo "== browser: none, and apt-get could not install chromium: the tests in tests/browser are skipped"
fi
