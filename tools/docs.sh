#!/usr/bin/env bash
# Build the documentation, docs/ and the docstrings, into the folder site/.
#
#   tools/docs.sh               then open site/index.html; any warning is an error
#   tools/docs.sh --serve       show it at http://127.0.0.1:8000 and follow changes
#
# Needs a finished .venv (tools/setup.sh) and no network.
set -euo pipefail
# shellcheck source=tools/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

export NO_MKDOCS_2_WARNING=1 # the theme's, about a version that is not locked here
case "${1:-}" in
'') ;;
--serve) exec python -m mkdocs serve --strict -f tools/mkdocs.yml ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' tools/docs.sh
    [ "$1" = --help ] || [ "$1" = -h ]
    exit
    ;;
esac

python -m mkdocs build --strict -f tools/mkdocs.yml
# A page that loads something from elsewhere is broken on a machine without a network.
if grep -rnoE --include='*.html' --include='*.css' \
    '(<(script|img|iframe)[^>]* src=|<link[^>]* rel="?stylesheet"?[^>]* href=|@import |url\()["'"'"']?(https?:)?//[^ >]*' site; then
    echo "tools/docs.sh: the pages above load something from the network" >&2
    exit 1
fi
echo "site/index.html: $(find site -name '*.html' | wc -l) pages"
