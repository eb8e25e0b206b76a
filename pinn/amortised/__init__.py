"""An operator trained on streamed simulations, which answers for a new patient in one pass."""
