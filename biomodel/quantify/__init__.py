"""From raw series to calibrated maps on one grid: what ``tumorcast quantify`` does."""
