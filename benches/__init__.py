"""Benchmarks of mmkernels: ``python -m benches``. See README.md in this folder."""
