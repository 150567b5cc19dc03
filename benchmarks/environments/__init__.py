"""Environments of their own for what cannot be installed next to this program: compilers for absent accelerators, and peers."""
