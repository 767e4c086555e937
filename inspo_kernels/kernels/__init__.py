"""Triton kernels between the head's matrix products, one file each: derivation, launch invariants, kernel, launcher.

Importing this package needs no Triton; importing one of its kernels does.
"""
