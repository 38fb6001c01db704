#!/usr/bin/env bash
# Everything that only a GPU can show, in about nine minutes: bash bench/gpu.sh [RESULTS_FOLDER]
# The kernels against float64 in fp32 and bf16, the GPU tests, the benchmarks, memory beside --dry-run's
# estimate, and the toy in bf16.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv | tee "$out/machine.txt"
python3 -m pytest -q tests/test_gpu.py tests/test_kernels.py -k gpu 2>&1 | tee "$out/tests.txt"
python3 -m bench.logprob --shape 8192 3584 152064 --out "$out/logprob-7b.json" 2>&1 | tee "$out/logprob-7b.txt"
python3 -m bench.logprob --shape 2048 896 151936 --out "$out/logprob-0.5b.json" 2>&1 | tee "$out/logprob-0.5b.txt"
python3 -m bench.sampler --pairs 3 --out "$out/sampler.json" 2>&1 | tee "$out/sampler.txt"
python3 -m bench.memory --out "$out/memory.json" 2>&1 | tee "$out/memory.txt"
run="runs/gpu-$(date +%s)"
python3 ssr.py --preset toy --device cuda --folder "$run" 2>&1 | tee "$out/toy.txt"
python3 -m eval --prompts toy --max-new-tokens 20 --sets toy:kasu-bevo,toy:bevo-kasu --metrics bleu,chrf \
  --model "$run/best" --out "$run/eval" 2>&1 | tee "$out/eval.txt"
