"""The part that runs under the interpreter that has dolfinx: it imports nothing else of this project."""
