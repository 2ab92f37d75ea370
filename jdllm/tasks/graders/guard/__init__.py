"""Judging untrusted programs in processes of their own; started by code.py as a script.

`__main__` forks a program's process from the judge's, both in a sandbox (sandbox.py, filter.py).
They speak through wire.py: the program's side reports values, the judge's runs the tests. Nothing
is imported but the standard library.
"""
