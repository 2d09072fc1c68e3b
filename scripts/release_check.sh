#!/usr/bin/env bash
# What a release has to pass, `make release-check`: wheel and source archive are built, the wheel from the archive, into dist/; the constraints resolve
# on every Python that the metadata admit; and the wheel, in an empty environment and outside the clone, samples and passes tests of the archive.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet -c constraints.txt build twine uv
rm -rf dist
"$work/tools/bin/python" -m build
"$work/tools/bin/twine" check --strict dist/*

# uv resolves from metadata alone: it downloads no torch.
for version in 3.11 3.12 3.13 3.14; do
  "$work/tools/bin/uv" pip compile --quiet --python-version $version -c constraints.txt --extra dev --extra test-ui --extra ui --extra docs \
    --output-file "$work/$version.txt" pyproject.toml
  echo "Python $version: $(grep -c == "$work/$version.txt") packages"
done

"$python" -m venv "$work/installed"
"$work/installed/bin/python" -m pip install --quiet --no-compile -c constraints.txt dist/*.whl
cd "$work"
installed/bin/microcinema sample prompt="a large red star moving quickly to the left on sand" num_inference_steps=4 output_dir=samples
ls samples/*.mp4
installed/bin/microcinema prepare sprites num_videos=8
installed/bin/microcinema doctor experiment=sprites_microcinema cached_latents=null

"$work/installed/bin/python" -m pip install --quiet --no-compile -c "$root/constraints.txt" pytest
mkdir source
tar -xzf "$root"/dist/*.tar.gz -C source --strip-components=1
rm -r source/microcinema source/configs
cd source
"$work/installed/bin/python" -m pytest -m "not slow" tests/commands/test_cli.py tests/commands/test_sample.py tests/config tests/pipelines/test_text_to_video.py
