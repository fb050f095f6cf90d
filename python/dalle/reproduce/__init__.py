"""`dalle reproduce`: every figure and table of the paper at the scale of this machine.

A theme is a module of makers, functions `Context -> Figure`; `registry.FIGURES` lists them.
"""
