"""Benchmarks of generation on this machine, beside other programs and beside the machine's own speed."""
