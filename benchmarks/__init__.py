"""Measurements: each module is a command that prints a table and writes JSON.

    python -m benchmarks.topk           the sparse top-k core on a CPU, beside other libraries (peers.py)
    python -m benchmarks.pipeline       whole training jobs on a CPU, beside peers and beside their own matmuls
    python -m benchmarks.selection      the selection of the k largest beside `lax.top_k`, on a CPU
    python -m benchmarks.gpu            every kernel on a GPU: right or not, and how far from the roofline
    python -m benchmarks.tpu_compile    every TPU kernel through the real TPU compiler; no TPU needed
    python -m benchmarks.tpu_bundles    how many instructions the fused TPU encoder takes, beside the plain matmul
    python -m benchmarks.preflight      its estimates beside measured steps; exchanges from 16 to 512 chips; remat
    python -m benchmarks.sweep          a sweep of eight runs beside eight runs
    python -m benchmarks.faults         a run that is killed at random, resumed, and compared with one left alone

What a compiler can say (memory, shapes, collectives) is checked and decides the exit code; times are printed as ratios
of one interleaved run, and decide nothing.
"""
