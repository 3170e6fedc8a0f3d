"""Compiled kernels: packed linear layers and whole decoder steps in C++, built on first use."""
