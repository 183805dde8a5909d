#!/bin/sh
# A virtual environment at $1 with the newest Python here that oban runs on: it needs 3.12.
for python in python3.14 python3.13 python3.12 python3 "$HOME"/.pyenv/versions/3.1[2-9].*/bin/python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
        exec "$python" -m venv "$1"
    fi
done
echo "oban needs Python 3.12 or later" >&2
exit 1
