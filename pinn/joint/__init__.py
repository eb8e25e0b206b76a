"""An unknown start, parameters and noise at once, from few visits."""
