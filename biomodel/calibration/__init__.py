"""From visits to parameters: the data's residuals, the optimiser and what it found."""
