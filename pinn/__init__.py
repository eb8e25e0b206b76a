"""Physics-informed networks that solve the models of `biomodel`; empty until that part is built."""
