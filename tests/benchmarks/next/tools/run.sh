#!/bin/bash
# run.sh LOG PROGRAM ARGS...: one thread, nice -10
cd /work/r17/repo
export PYTHONPATH=/work/r17/repo:/work/r17/repo/tests/benchmarks OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
log=$1; shift
exec nice -n ${NICE:--4} /work/main/.venv/bin/python "$@" >> /work/r17/$log 2>&1
